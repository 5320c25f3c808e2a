//! The header of one GGUF file, of version 2 or 3: what it says of itself, and where its tensors are.
//!
//! A file is magic, version, counts, key-value pairs, descriptions of tensors, padding, payload; little-endian. The length of the header is
//! written nowhere: who reads it gives what there is, and more if that ends too early ([`GgufError::Short`]).
//!
//! Of the pairs, texts and single values become metadata; lists (vocabularies, mostly) are passed over. Accepted is what llama.cpp accepts:
//! tensors one after another, each at the next multiple of the alignment. Every count is held to what is really there before anything is
//! taken for it, and what is kept has a bound, since all who attach get it.

use std::collections::BTreeMap;

use vramd_api::attach::{Dtype, Packed, PlainDtype, Tensor};

use super::{FileHeader, Header, MAX_NAME_BYTES, MAX_TENSORS, excerpt};

/// The first bytes of a file.
const MAGIC: [u8; 4] = *b"GGUF";
const VERSIONS: [u32; 2] = [2, 3];
const DEFAULT_ALIGNMENT: u64 = 32;
/// No writer asks for more; the padding between tensors is part of the block.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// The most key-value pairs.
const MAX_PAIRS: u64 = 65_536;
/// The most dimensions that GGML has.
const MAX_RANK: u64 = 4;
/// What metadata may come to as JSON, which everybody who attaches gets: a chat template has a few thousand bytes.
const MAX_METADATA_BYTES: usize = 16 << 20;

/// One file of a model, and its place among several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gguf {
    pub file: FileHeader,
    pub split: Option<Split>,
}

/// A file's place among those that a model was split into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// From 0.
    pub number: u64,
    pub count: u64,
    /// Of all files together.
    pub tensors: u64,
}

/// Why a file is no GGUF file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GgufError {
    /// Not a fault while there is more of the file.
    #[error("the header does not end within {have} bytes")]
    Short { have: u64 },
    #[error(
        "the header is longer than {most} bytes, which are left of those that all files of a model may have"
    )]
    TooLong { most: u64 },
    #[error("the file does not begin with \"GGUF\"")]
    Magic,
    #[error("it is of GGUF version {version}; {} and {} can be read", VERSIONS[0], VERSIONS[1])]
    Version { version: u32 },
    #[error("it is a big-endian GGUF file")]
    BigEndian,
    #[error("it has {count} {what}; at most {most} are allowed")]
    TooMany { what: &'static str, count: u64, most: u64 },
    #[error("the key {key:?} is malformed: {reason}")]
    Pair { key: String, reason: &'static str },
    #[error("a name is malformed: {reason}")]
    Name { reason: &'static str },
    #[error("the tensor {tensor:?} is of GGML type {id}, which is not known")]
    Type { tensor: String, id: u32 },
    #[error(
        "the tensor {tensor:?} of {dtype} {shape:?} has no size: rows are whole blocks, and 64 bits have to count its bytes"
    )]
    Shape { tensor: String, dtype: Dtype, shape: Vec<u64> },
    #[error(
        "the tensor {tensor:?} begins at byte {begin} of the payload, but the one before it ends so that {expected} comes next"
    )]
    Place { tensor: String, begin: u64, expected: u64 },
    #[error("the tensor {tensor:?} is there twice")]
    Duplicate { tensor: String },
    #[error("the tensor {tensor:?} ends at byte {end}, but the file's payload has only {payload_bytes}")]
    PayloadTooShort { tensor: String, end: u64, payload_bytes: u64 },
}

impl GgufError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Short { .. } | Self::PayloadTooShort { .. } => {
                "the file is cut off: fetch it again and compare its size or checksum"
            }
            Self::Magic => "this is no GGUF file, or a damaged one: check the path",
            Self::Version { .. } | Self::BigEndian => {
                "convert the model again with a current llama.cpp, on a little-endian machine"
            }
            Self::TooLong { .. } => "register the parts of the model as components of their own",
            Self::Type { .. } => "convert the model to a type that llama.cpp has today",
            Self::TooMany { .. }
            | Self::Pair { .. }
            | Self::Name { .. }
            | Self::Shape { .. }
            | Self::Place { .. }
            | Self::Duplicate { .. } => {
                "the file is damaged, or the program that wrote it wrote it wrongly: convert the model again"
            }
        }
    }
}

/// Reads a header out of a file's first bytes; `file_bytes` is what the whole file has.
pub fn parse_gguf(name: &str, bytes: &[u8], file_bytes: u64) -> Result<Gguf, GgufError> {
    let mut reader = Reader { bytes, at: 0 };
    if reader.array::<4>()? != MAGIC {
        return Err(GgufError::Magic);
    }
    let version = reader.u32()?;
    if VERSIONS.contains(&version.swap_bytes()) {
        return Err(GgufError::BigEndian);
    }
    if !VERSIONS.contains(&version) {
        return Err(GgufError::Version { version });
    }
    let (tensors, pairs) = (reader.u64()?, reader.u64()?);
    bounded("tensors", tensors, MAX_TENSORS as u64)?;
    bounded("key-value pairs", pairs, MAX_PAIRS)?;
    let pairs = Pairs::read(&mut reader, pairs)?;
    let alignment = pairs.number("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || !(8..=MAX_ALIGNMENT).contains(&alignment) {
        return Err(bad_pair("general.alignment", "it is no power of two from 8 to 2^20"));
    }
    let split = pairs.split()?;
    let infos = (0..tensors).map(|_| reader.tensor()).collect::<Result<Vec<_>, _>>()?;
    let payload_offset = (reader.at as u64).next_multiple_of(alignment);
    let payload_bytes = check(&infos, alignment, file_bytes.saturating_sub(payload_offset))?;
    let header = Header { tensors: infos, metadata: pairs.texts, payload_bytes };
    Ok(Gguf { file: FileHeader { name: name.to_owned(), payload_offset, header }, split })
}

/// Holds the tensors to their order and to the payload; answers how much of that they take.
fn check(tensors: &[Tensor], alignment: u64, payload_bytes: u64) -> Result<u64, GgufError> {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(GgufError::Duplicate { tensor: pair[0].to_owned() });
    }
    let mut end = 0_u64;
    for tensor in tensors {
        let name = || tensor.name.clone();
        let expected = end.next_multiple_of(alignment);
        if tensor.offset != expected {
            return Err(GgufError::Place { tensor: name(), begin: tensor.offset, expected });
        }
        end = expected.saturating_add(tensor.bytes);
        if end > payload_bytes {
            return Err(GgufError::PayloadTooShort { tensor: name(), end, payload_bytes });
        }
    }
    Ok(end)
}

/// What a text takes in JSON.
fn printed_bytes(text: &str) -> usize {
    let more = |byte: u8| match byte {
        b'"' | b'\\' => 1,
        byte if byte < 0x20 => 5,
        _ => 0,
    };
    text.len() + text.bytes().map(more).sum::<usize>()
}

fn bounded(what: &'static str, count: u64, most: u64) -> Result<(), GgufError> {
    if count > most { Err(GgufError::TooMany { what, count, most }) } else { Ok(()) }
}

fn bad_pair(key: &str, reason: &'static str) -> GgufError {
    GgufError::Pair { key: excerpt(key), reason }
}

impl Split {
    /// The name of another file of the set, of which `name` is one: `NAME-00001-of-00003.gguf`.
    pub fn sibling(&self, name: &str, number: u64) -> Option<String> {
        let stem = name.strip_suffix(&format!("-{:05}-of-{:05}.gguf", self.number + 1, self.count))?;
        Some(format!("{stem}-{:05}-of-{:05}.gguf", number + 1, self.count))
    }
}

/// The key-value pairs, as far as they are kept.
#[derive(Default)]
struct Pairs {
    texts: BTreeMap<String, String>,
}

impl Pairs {
    fn read(reader: &mut Reader<'_>, count: u64) -> Result<Self, GgufError> {
        let mut pairs = Self::default();
        let (mut keys, mut printed) = (std::collections::BTreeSet::new(), 0);
        for _ in 0..count {
            let key = reader.name()?;
            let value = reader.value(&key)?;
            if !keys.insert(key.clone()) {
                return Err(bad_pair(&key, "it is there twice"));
            }
            if let Some(value) = value {
                printed += key.len() + printed_bytes(&value);
                if printed <= MAX_METADATA_BYTES {
                    pairs.texts.insert(key, value);
                }
            }
        }
        Ok(pairs)
    }

    fn number(&self, key: &str) -> Result<Option<u64>, GgufError> {
        let number = |text: &String| text.parse().map_err(|_| bad_pair(key, "it is no natural number"));
        self.texts.get(key).map(number).transpose()
    }

    fn split(&self) -> Result<Option<Split>, GgufError> {
        let count = self.number("split.count")?.unwrap_or(0);
        if count < 2 {
            return Ok(None);
        }
        let needed = |key| self.number(key)?.ok_or_else(|| bad_pair(key, "it is missing"));
        let (number, tensors) = (needed("split.no")?, needed("split.tensors.count")?);
        bounded("files", count, super::MAX_SHARDS as u64)?;
        if number >= count {
            return Err(bad_pair("split.no", "it counts from 0 and is below split.count"));
        }
        Ok(Some(Split { number, count, tensors }))
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8], GgufError> {
        let end = usize::try_from(count).ok().and_then(|count| self.at.checked_add(count));
        let taken = end.and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or(GgufError::Short { have: self.bytes.len() as u64 })?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        Ok(*self.take(N as u64)?.first_chunk().expect("so many were taken"))
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<&'a [u8], GgufError> {
        let length = self.u64()?;
        self.take(length)
    }

    /// Of a key or a tensor.
    fn name(&mut self) -> Result<String, GgufError> {
        let length = self.u64()?;
        if length > MAX_NAME_BYTES as u64 {
            return Err(GgufError::Name { reason: "it is longer than 4096 bytes" });
        }
        let text = std::str::from_utf8(self.take(length)?);
        let text = text.map_err(|_| GgufError::Name { reason: "it is not UTF-8" })?;
        if text.chars().any(char::is_control) {
            return Err(GgufError::Name { reason: "it has control characters" });
        }
        Ok(text.to_owned())
    }

    /// A value as text; None of what is passed over.
    fn value(&mut self, key: &str) -> Result<Option<String>, GgufError> {
        Ok(Some(match self.u32()? {
            0 => u8::from_le_bytes(self.array()?).to_string(),
            1 => i8::from_le_bytes(self.array()?).to_string(),
            2 => u16::from_le_bytes(self.array()?).to_string(),
            3 => i16::from_le_bytes(self.array()?).to_string(),
            4 => self.u32()?.to_string(),
            5 => i32::from_le_bytes(self.array()?).to_string(),
            6 => f32::from_le_bytes(self.array()?).to_string(),
            7 => (self.array::<1>()? != [0]).to_string(),
            TEXT => {
                let text = self.text()?;
                // What is no UTF-8 is for those who read the file themselves.
                return Ok(std::str::from_utf8(text).ok().map(ToOwned::to_owned));
            }
            LIST => {
                self.pass_list(key)?;
                return Ok(None);
            }
            10 => self.u64()?.to_string(),
            11 => i64::from_le_bytes(self.array()?).to_string(),
            12 => f64::from_le_bytes(self.array()?).to_string(),
            _ => return Err(bad_pair(key, "its type is not known")),
        }))
    }

    fn pass_list(&mut self, key: &str) -> Result<(), GgufError> {
        let (kind, count) = (self.u32()?, self.u64()?);
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            TEXT => {
                for _ in 0..count {
                    self.text()?;
                }
                return Ok(());
            }
            LIST => return Err(bad_pair(key, "it is a list of lists")),
            _ => return Err(bad_pair(key, "the type of its elements is not known")),
        };
        let bytes = count.checked_mul(width).ok_or_else(|| bad_pair(key, "it is too long"))?;
        self.take(bytes).map(drop)
    }

    /// A tensor's description. Its offset counts from the payload's beginning.
    fn tensor(&mut self) -> Result<Tensor, GgufError> {
        let name = self.name()?;
        let rank = self.u32()?;
        bounded("dimensions", rank.into(), MAX_RANK)?;
        let mut shape = (0..rank).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
        // The file has the fastest first, everybody else has it last.
        shape.reverse();
        let (id, offset) = (self.u32()?, self.u64()?);
        let Some(dtype) = dtype(id) else { return Err(GgufError::Type { tensor: name, id }) };
        match dtype.bytes(&shape) {
            Some(bytes) => Ok(Tensor { name, dtype, shape, offset, bytes }),
            None => Err(GgufError::Shape { tensor: name, dtype, shape }),
        }
    }
}

/// The types of values that are not numbers.
const TEXT: u32 = 8;
const LIST: u32 = 9;

fn dtype(id: u32) -> Option<Dtype> {
    Some(Dtype::Plain(match id {
        0 => PlainDtype::F32,
        1 => PlainDtype::F16,
        24 => PlainDtype::I8,
        25 => PlainDtype::I16,
        26 => PlainDtype::I32,
        27 => PlainDtype::I64,
        28 => PlainDtype::F64,
        30 => PlainDtype::BF16,
        _ => return Packed::of_gguf(id).map(Dtype::Packed),
    }))
}
