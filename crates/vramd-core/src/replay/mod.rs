//! Traces of allocations, and what a pool would have made of them.
//!
//! Owns the formats ([`read`]), the history that they are turned into ([`Trace`]), the replay of one in a pool of a chosen
//! size ([`replay`]) and the picture of it ([`picture`]). Leaves out files and what a person is told: a trace comes from
//! any reader, and an answer is figures.
//!
//! Files come from strangers. Each format is read once, from front to back, in memory that its limits bound.

mod lines;
mod pickle;
pub mod picture;
mod pytorch;
pub mod recorded;
mod rmm;
mod simulation;
mod trace;

use std::io::BufRead;

use serde::Serialize;

pub use simulation::{
    Fragmentation, Lifetimes, Options, Placed, PoolTooSmall, Refusal, Refusals, Replay, Report, Sample,
    replay,
};
pub use trace::{DeviceTrace, Event, Irregularities, Step, Trace};

/// What a trace is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// JSON lines, as `vramd record` writes them.
    Vramd,
    /// The CSV log of RMM's logging adaptor.
    Rmm,
    /// The pickled memory snapshot of PyTorch.
    Pytorch,
}

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("it is empty")]
    Empty,
    #[error("it is no trace: neither of vramd, nor RMM's log, nor PyTorch's snapshot")]
    Unknown,
    #[error("line {line}: {problem}")]
    Line { line: u64, problem: String },
    #[error("byte {offset}: {problem}")]
    Byte { offset: u64, problem: String },
    #[error("{0}")]
    Content(String),
    #[error("it could not be read")]
    Read(#[from] std::io::Error),
}

/// Reads a trace to its end; what it is written in shows in its first bytes unless `format` says it.
pub fn read(reader: &mut impl BufRead, format: Option<Format>) -> Result<Trace, TraceError> {
    let first = reader.fill_buf()?;
    if first.is_empty() {
        return Err(TraceError::Empty);
    }
    match format.or_else(|| detect(first)).ok_or(TraceError::Unknown)? {
        Format::Vramd => recorded::read(reader),
        Format::Rmm => rmm::read(reader),
        Format::Pytorch => pytorch::read(reader),
    }
}

fn detect(first: &[u8]) -> Option<Format> {
    match first {
        [b'{', ..] => Some(Format::Vramd),
        [b'T', ..] if first.starts_with(b"Thread,") => Some(Format::Rmm),
        [0x80, ..] => Some(Format::Pytorch),
        _ => None,
    }
}
