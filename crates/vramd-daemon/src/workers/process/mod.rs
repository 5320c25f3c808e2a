//! A worker's processes: started, limited, and ended together.

#[cfg(unix)]
mod limits;
#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

use std::collections::BTreeMap;

#[cfg(unix)]
pub use limits::sweep;
#[cfg(unix)]
pub use unix::{Group, end_left_over, started_at};
#[cfg(windows)]
pub use windows::{Group, end_left_over, started_at, sweep};

/// Tells a process which worker it is, and a later run of the daemon that it was ours.
pub const ID_VARIABLE: &str = "VRAMD_WORKER_ID";

/// What is to be run, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub program: String,
    pub arguments: Vec<String>,
    /// Beside what the daemon has in its own.
    pub environment: BTreeMap<String, String>,
    /// The most host memory that its processes may take.
    pub limit_bytes: Option<u64>,
}
