//! How the bytes of model files go into one block, and where in it each tensor then is.
//!
//! Owns the reading of headers and indexes, which may come from anyone, and the plan made of them. It opens no
//! file: bytes in, a [`Layout`] or a named fault out. It does not convert anything: a payload goes into the
//! block as it is, so a tensor is as well aligned in memory as it is in its file.

mod gguf;
mod header;
mod index;
mod unique;

use std::collections::{BTreeMap, HashMap};

use vramd_api::Bytes;
use vramd_api::attach::Tensor;

pub use gguf::{Gguf, GgufError, Split, parse_gguf};
pub use header::{
    Header, HeaderError, MAX_HEADER_BYTES, MAX_NAME_BYTES, MAX_RANK, PREFIX_BYTES, header_length,
    parse_header,
};
pub use index::{Index, IndexError, MAX_INDEX_BYTES, MAX_SHARDS, parse_index};

/// The most tensors of one model.
pub const MAX_TENSORS: usize = 1_000_000;

/// What the offsets of a span in its file and in the block are multiples of: all that direct reads ask for on
/// any disk. Shards are not put on huge pages of their own: the block as a whole begins on one, and padding
/// each shard to 2 MiB would only waste memory.
pub const SPAN_ALIGNMENT: u64 = 4096;

/// One file whose header was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHeader {
    /// The plain name of the file.
    pub name: String,
    /// Where the payload begins.
    pub payload_offset: u64,
    pub header: Header,
}

/// One read: `bytes` from `source_offset` of a file go to `block_offset` of the block.
///
/// `block_offset` is a multiple of [`SPAN_ALIGNMENT`]; so is `source_offset`, unless the file's header is not
/// padded to a multiple of 8 as the format's own writers do. The read therefore begins up to 4095 bytes before the
/// payload, and the end of the header comes along; no tensor covers it, and it is no secret to anyone who may
/// read the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// An index into the files that the layout was built from.
    pub file: usize,
    pub source_offset: u64,
    pub bytes: u64,
    pub block_offset: u64,
}

/// Where everything of one component goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The size of the block, a multiple of [`SPAN_ALIGNMENT`] and never 0.
    pub block_bytes: u64,
    /// What the tensors hold together, with what a format has between them.
    pub payload_bytes: u64,
    /// In order of their place in the block, without overlap. A file without payload has none.
    pub spans: Vec<Span>,
    /// Sorted by offset, which counts from the beginning of the block.
    pub tensors: Vec<Tensor>,
    /// `__metadata__` of all safetensors files, single values and texts of GGUF's; where two differ about a key, the first file's word stands.
    pub metadata: BTreeMap<String, String>,
}

/// Why files that are each sound do not make one model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("the tensor {tensor:?} is in two files, {first:?} and {second:?}")]
    TwoFiles { tensor: String, first: String, second: String },
    #[error("the index says that the tensor {tensor:?} is in {file:?}, but it is not")]
    NotInFile { tensor: String, file: String },
    #[error("the tensor {tensor:?} is in {file:?}, but the index does not say so")]
    NotInIndex { tensor: String, file: String },
    #[error("the files hold more than {MAX_TENSORS} tensors")]
    TooManyTensors,
    #[error("the files together are larger than 2^63 - 1 bytes")]
    TooLarge,
}

impl LayoutError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::TwoFiles { .. } | Self::NotInFile { .. } | Self::NotInIndex { .. } => {
                "the shards and the index are not of one model or not of one version: fetch them again together"
            }
            Self::TooManyTensors | Self::TooLarge => {
                "register the parts of the model as components of their own"
            }
        }
    }
}

impl Layout {
    /// Puts the payloads of `files` one after another into a block. With an index, it and the files must name
    /// the same tensors in the same places.
    pub fn build(files: Vec<FileHeader>, index: Option<&Index>) -> Result<Self, LayoutError> {
        check_names(&files, index)?;
        let mut layout = Self {
            block_bytes: 0,
            payload_bytes: 0,
            spans: Vec::new(),
            tensors: Vec::with_capacity(files.iter().map(|file| file.header.tensors.len()).sum()),
            metadata: BTreeMap::new(),
        };
        for (file, FileHeader { payload_offset, header, .. }) in files.into_iter().enumerate() {
            let source_offset = source_offset(payload_offset);
            let block_offset = layout.block_bytes;
            let mut base = block_offset;
            if header.payload_bytes > 0 {
                let lead = payload_offset - source_offset;
                let bytes = header.payload_bytes.checked_add(lead).ok_or(LayoutError::TooLarge)?;
                layout.spans.push(Span { file, source_offset, bytes, block_offset });
                layout.block_bytes = block_offset
                    .checked_add(bytes)
                    .and_then(|end| end.checked_next_multiple_of(SPAN_ALIGNMENT))
                    .filter(|end| *end <= Bytes::MAX)
                    .ok_or(LayoutError::TooLarge)?;
                base += lead;
            }
            layout.payload_bytes += header.payload_bytes;
            layout.tensors.extend(
                header.tensors.into_iter().map(|tensor| Tensor { offset: base + tensor.offset, ..tensor }),
            );
            for (key, value) in header.metadata {
                layout.metadata.entry(key).or_insert(value);
            }
        }
        layout.block_bytes = layout.block_bytes.max(SPAN_ALIGNMENT);
        Ok(layout)
    }
}

/// Where the reading of a payload begins: on a boundary that direct reads take. A payload that does not even
/// begin at a multiple of the largest element is read from its first byte on, which costs its direct reads and
/// leaves its tensors aligned.
fn source_offset(payload_offset: u64) -> u64 {
    const LARGEST_ELEMENT: u64 = 8;
    if payload_offset.is_multiple_of(LARGEST_ELEMENT) {
        payload_offset - payload_offset % SPAN_ALIGNMENT
    } else {
        payload_offset
    }
}

/// Every tensor in one file only, and where an index is given, exactly where it says.
fn check_names(files: &[FileHeader], index: Option<&Index>) -> Result<(), LayoutError> {
    let count: usize = files.iter().map(|file| file.header.tensors.len()).sum();
    if count > MAX_TENSORS {
        return Err(LayoutError::TooManyTensors);
    }
    let mut file_of: HashMap<&str, &str> = HashMap::with_capacity(count);
    for file in files {
        for tensor in &file.header.tensors {
            if let Some(first) = file_of.insert(&tensor.name, &file.name) {
                return Err(LayoutError::TwoFiles {
                    tensor: tensor.name.clone(),
                    first: first.to_owned(),
                    second: file.name.clone(),
                });
            }
        }
    }
    let Some(index) = index else { return Ok(()) };
    for (tensor, file) in index.weight_map() {
        if file_of.get(tensor.as_str()) != Some(&file.as_str()) {
            return Err(LayoutError::NotInFile { tensor: excerpt(tensor), file: file.clone() });
        }
    }
    // Each name of the index was found; one more in the files is one that it lacks.
    if count == index.weight_map().len() {
        return Ok(());
    }
    let (tensor, file) = file_of
        .into_iter()
        .filter(|(tensor, _)| !index.weight_map().contains_key(*tensor))
        .min()
        .expect("the files name more tensors than the index, and every tensor of the index");
    Err(LayoutError::NotInIndex { tensor: tensor.to_owned(), file: file.to_owned() })
}

/// The beginning of a text that came from a file, for a message.
fn excerpt(text: &str) -> String {
    const MOST: usize = 400;
    match text.char_indices().nth(MOST) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
