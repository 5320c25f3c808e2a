//! The header of one safetensors file: its length, its JSON, and whether it describes the payload exactly.
//!
//! A file is eight bytes (the header's length, little-endian), the header, the payload. What is accepted here,
//! the `safetensors` crate accepts too; beyond it, a name that occurs twice is refused (a map would silently
//! keep the last one) and a fault names its tensor.
//!
//! Every list is bounded while it is read. The worst header, 100 MB of 64-dimensional shapes, takes 430 MB with its
//! own bytes and two seconds to read; the bound on all shards together keeps a model of many files to the same.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use vramd_api::attach::{PlainDtype as Dtype, Tensor};

use super::unique::UniqueMap;
use super::{MAX_TENSORS, excerpt};

/// The bytes before the header that hold its length.
pub const PREFIX_BYTES: u64 = 8;
/// The longest header, as the format has it; also the most that the headers of one model's files have together.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The longest name of a tensor, in bytes.
pub const MAX_NAME_BYTES: usize = 4096;
/// The most dimensions that any framework takes.
pub const MAX_RANK: usize = 64;
/// The most entries of `__metadata__`.
const MAX_METADATA: usize = 65_536;

/// What one file says about its payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Sorted by offset, without a gap but the padding that a format has. An offset counts from the payload's beginning.
    pub tensors: Vec<Tensor>,
    pub metadata: BTreeMap<String, String>,
    pub payload_bytes: u64,
}

/// Why a file is no safetensors file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error(
        "the file has {file_bytes} bytes; a safetensors file begins with 8 that hold its header's length"
    )]
    Truncated { file_bytes: u64 },
    #[error(
        "the header would be {header_bytes} bytes long; {MAX_HEADER_BYTES} are allowed for all files together"
    )]
    TooLong { header_bytes: u64 },
    #[error("the header would be {header_bytes} bytes long, but the whole file has only {file_bytes}")]
    PastEnd { header_bytes: u64, file_bytes: u64 },
    #[error("the header is not UTF-8: byte {at} of it is wrong")]
    NotUtf8 { at: usize },
    /// Not JSON, not of the right types, or beyond a bound.
    #[error("the header is malformed: {reason}")]
    Malformed { reason: String },
    #[error("the header has the tensor {name:?} twice")]
    Duplicate { name: String },
    #[error("the tensor {tensor:?} has the offsets {begin} to {end}, which end before they begin")]
    Reversed { tensor: String, begin: u64, end: u64 },
    #[error(
        "the tensor {tensor:?} begins at byte {begin}, inside the tensor before it, which ends at {previous_end}"
    )]
    Overlap { tensor: String, begin: u64, previous_end: u64 },
    #[error("the tensor {tensor:?} begins at byte {begin} and leaves a gap after byte {previous_end}")]
    Gap { tensor: String, begin: u64, previous_end: u64 },
    #[error("the tensor {tensor:?} of {dtype} {shape:?} has more bytes than 64 bits can count")]
    Overflow { tensor: String, dtype: Dtype, shape: Vec<u64> },
    #[error("the tensor {tensor:?} of {dtype} {shape:?} does not end on a whole byte")]
    NotWholeBytes { tensor: String, dtype: Dtype, shape: Vec<u64> },
    #[error(
        "the tensor {tensor:?} of {dtype} {shape:?} needs {needed} bytes, but its offsets span {spanned}"
    )]
    WrongSize { tensor: String, dtype: Dtype, shape: Vec<u64>, needed: u64, spanned: u64 },
    #[error("the tensor {tensor:?} ends at byte {end}, but the file's payload has only {payload_bytes}")]
    PayloadTooShort { tensor: String, end: u64, payload_bytes: u64 },
    #[error("the header describes {described} bytes, but the file's payload has {payload_bytes}")]
    PayloadTooLong { described: u64, payload_bytes: u64 },
}

impl HeaderError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Truncated { .. } | Self::PastEnd { .. } | Self::PayloadTooShort { .. } => {
                "the file is cut off or is no safetensors file: fetch it again and compare its size or checksum"
            }
            Self::TooLong { .. } | Self::NotUtf8 { .. } | Self::Malformed { .. } => {
                "this is no safetensors file, or a damaged one: check the path, or convert the model to safetensors"
            }
            Self::PayloadTooLong { .. } => {
                "something was appended to the file, or it is damaged: fetch it again"
            }
            Self::Duplicate { .. }
            | Self::Reversed { .. }
            | Self::Overlap { .. }
            | Self::Gap { .. }
            | Self::Overflow { .. }
            | Self::NotWholeBytes { .. }
            | Self::WrongSize { .. } => {
                "the program that wrote this file wrote it wrongly: save the model again with a current safetensors library"
            }
        }
    }
}

/// The header's length, from a file's first eight bytes: within the file, and within the bound together with
/// the `kept_bytes` of headers that were read for the same model before.
pub fn header_length(prefix: [u8; 8], file_bytes: u64, kept_bytes: u64) -> Result<u64, HeaderError> {
    let header_bytes = u64::from_le_bytes(prefix);
    let Some(rest) = file_bytes.checked_sub(PREFIX_BYTES) else {
        return Err(HeaderError::Truncated { file_bytes });
    };
    if header_bytes > MAX_HEADER_BYTES.saturating_sub(kept_bytes) {
        return Err(HeaderError::TooLong { header_bytes });
    }
    if header_bytes > rest {
        return Err(HeaderError::PastEnd { header_bytes, file_bytes });
    }
    Ok(header_bytes)
}

/// Reads a header (without the eight bytes before it) and checks that it describes every byte of a payload of
/// `payload_bytes`, each exactly once.
pub fn parse_header(header: &[u8], payload_bytes: u64) -> Result<Header, HeaderError> {
    if header.len() as u64 > MAX_HEADER_BYTES {
        return Err(HeaderError::TooLong { header_bytes: header.len() as u64 });
    }
    let text =
        std::str::from_utf8(header).map_err(|error| HeaderError::NotUtf8 { at: error.valid_up_to() })?;
    let Entries { mut tensors, metadata } = serde_json::from_str(text)
        .map_err(|error| HeaderError::Malformed { reason: excerpt(&error.to_string()) })?;

    refuse_duplicates(&tensors)?;
    tensors.sort_unstable_by(|a, b| (a.data_offsets, &a.name).cmp(&(b.data_offsets, &b.name)));
    let mut described = 0;
    for tensor in &tensors {
        check(tensor, described, payload_bytes)?;
        described = tensor.data_offsets.1;
    }
    if described != payload_bytes {
        return Err(HeaderError::PayloadTooLong { described, payload_bytes });
    }
    let tensors = tensors
        .into_iter()
        .map(|Entry { name, dtype, shape, data_offsets: (begin, end) }| Tensor {
            name,
            dtype: dtype.into(),
            shape,
            offset: begin,
            bytes: end - begin,
        })
        .collect();
    Ok(Header { tensors, metadata: metadata.unwrap_or_default(), payload_bytes })
}

fn refuse_duplicates(tensors: &[Entry]) -> Result<(), HeaderError> {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(HeaderError::Duplicate { name: pair[0].to_owned() }),
        None => Ok(()),
    }
}

/// One tensor against the end of the one before it, its own shape, and the payload.
fn check(entry: &Entry, previous_end: u64, payload_bytes: u64) -> Result<(), HeaderError> {
    let (begin, end) = entry.data_offsets;
    let tensor = || entry.name.clone();
    let (dtype, shape) = (entry.dtype, || entry.shape.clone());
    let Some(spanned) = end.checked_sub(begin) else {
        return Err(HeaderError::Reversed { tensor: tensor(), begin, end });
    };
    if begin < previous_end {
        return Err(HeaderError::Overlap { tensor: tensor(), begin, previous_end });
    }
    if end > payload_bytes {
        return Err(HeaderError::PayloadTooShort { tensor: tensor(), end, payload_bytes });
    }
    if begin > previous_end {
        return Err(HeaderError::Gap { tensor: tensor(), begin, previous_end });
    }
    let bits = entry
        .shape
        .iter()
        .try_fold(1u64, |elements, dimension| elements.checked_mul(*dimension))
        .and_then(|elements| elements.checked_mul(dtype.bitsize() as u64))
        .ok_or_else(|| HeaderError::Overflow { tensor: tensor(), dtype, shape: shape() })?;
    if !bits.is_multiple_of(8) {
        return Err(HeaderError::NotWholeBytes { tensor: tensor(), dtype, shape: shape() });
    }
    let needed = bits / 8;
    if needed != spanned {
        return Err(HeaderError::WrongSize { tensor: tensor(), dtype, shape: shape(), needed, spanned });
    }
    Ok(())
}

/// The header's JSON object, in its own order and with its duplicates.
struct Entries {
    tensors: Vec<Entry>,
    metadata: Option<BTreeMap<String, String>>,
}

struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The value beside a name. Keys that the format does not define are passed over, as its own library does.
#[derive(Deserialize)]
struct Info {
    dtype: Dtype,
    #[serde(deserialize_with = "shape")]
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut entries = Entries { tensors: Vec::new(), metadata: None };
        let mut metadata_seen = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if metadata_seen {
                    return Err(A::Error::duplicate_field("__metadata__"));
                }
                metadata_seen = true;
                entries.metadata = map
                    .next_value::<Option<UniqueMap<MAX_METADATA>>>()
                    .map_err(|error| A::Error::custom(format_args!("__metadata__: {error}")))?
                    .map(|map| map.0);
                continue;
            }
            if name.len() > MAX_NAME_BYTES {
                return Err(A::Error::custom(format_args!(
                    "the name {:?}… is longer than {MAX_NAME_BYTES} bytes",
                    name.chars().take(40).collect::<String>()
                )));
            }
            if entries.tensors.len() == MAX_TENSORS {
                return Err(A::Error::custom(format_args!("there are more than {MAX_TENSORS} tensors")));
            }
            let Info { dtype, shape, data_offsets } = map
                .next_value()
                .map_err(|error| A::Error::custom(format_args!("the tensor {name:?}: {error}")))?;
            entries.tensors.push(Entry { name, dtype, shape, data_offsets });
        }
        Ok(entries)
    }
}

fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Shape;
    impl<'de> Visitor<'de> for Shape {
        type Value = Vec<u64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {MAX_RANK} dimensions")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
            let mut shape = Vec::new();
            while let Some(dimension) = seq.next_element()? {
                if shape.len() == MAX_RANK {
                    return Err(A::Error::invalid_length(MAX_RANK + 1, &self));
                }
                shape.push(dimension);
            }
            shape.shrink_to_fit();
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(Shape)
}
