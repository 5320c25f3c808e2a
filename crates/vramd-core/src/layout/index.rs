//! The index of a sharded model, `model.safetensors.index.json`: which file holds which tensor.
//!
//! Its other figures (`metadata.total_size`) are not read: what the shards' own headers say is what holds.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::unique::UniqueMap;
use super::{MAX_TENSORS, excerpt};

/// The longest index.
pub const MAX_INDEX_BYTES: u64 = 100_000_000;
/// The most shards of one model.
pub const MAX_SHARDS: usize = 4096;

/// Which shard holds which tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    files: Vec<String>,
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// The shards, each once, sorted: plain names of files beside the index.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// Tensor names and their shards.
    pub(super) fn weight_map(&self) -> &BTreeMap<String, String> {
        &self.weight_map
    }
}

/// Why a file is no index of shards.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    #[error("the index has {bytes} bytes; at most {MAX_INDEX_BYTES} are allowed")]
    TooLong { bytes: u64 },
    /// Not JSON, no `weight_map`, a tensor twice, or beyond a bound.
    #[error("the index is malformed: {reason}")]
    Malformed { reason: String },
    #[error("the index names no tensor")]
    Empty,
    #[error("the index names {count} shards; at most {MAX_SHARDS} are allowed")]
    TooManyShards { count: usize },
    #[error("the index names the shard {name:?}, which is not the plain name of a file beside it")]
    FileName { name: String },
}

impl IndexError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::TooLong { .. } | Self::Malformed { .. } | Self::Empty | Self::TooManyShards { .. } => {
                "an index looks like {\"metadata\": {…}, \"weight_map\": {\"tensor\": \"model-00001-of-00002.safetensors\"}}"
            }
            Self::FileName { .. } => {
                "put all shards into the directory of the index and name them without a path"
            }
        }
    }
}

/// Reads an index.
pub fn parse_index(bytes: &[u8]) -> Result<Index, IndexError> {
    #[derive(Deserialize)]
    struct Json {
        weight_map: UniqueMap<MAX_TENSORS>,
    }
    if bytes.len() as u64 > MAX_INDEX_BYTES {
        return Err(IndexError::TooLong { bytes: bytes.len() as u64 });
    }
    let Json { weight_map: UniqueMap(weight_map) } = serde_json::from_slice(bytes)
        .map_err(|error| IndexError::Malformed { reason: excerpt(&error.to_string()) })?;
    let files: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
    if files.is_empty() {
        return Err(IndexError::Empty);
    }
    if files.len() > MAX_SHARDS {
        return Err(IndexError::TooManyShards { count: files.len() });
    }
    if let Some(name) = files.iter().find(|name| !is_plain(name)) {
        return Err(IndexError::FileName { name: excerpt(name) });
    }
    Ok(Index { files: files.into_iter().map(str::to_owned).collect(), weight_map })
}

/// Whether a name can only mean a file in the directory that it is looked up in.
fn is_plain(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains(['/', '\\', ':', '\0'])
}
