//! A worker's processes: started, limited, and ended together.

#[cfg(unix)]
mod limits;
#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

use std::collections::BTreeMap;

#[cfg(unix)]
pub use unix::{Group, ended, sweep};
#[cfg(windows)]
pub use windows::{Group, ended, sweep};

/// Tells a later run of the daemon which processes are of its own workers.
pub const MARK_VARIABLE: &str = "VRAMD_WORKER_OF";

/// What is to be run, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub program: String,
    pub arguments: Vec<String>,
    /// Beside what the daemon has in its own.
    pub environment: BTreeMap<String, String>,
    /// The most host memory that its processes may take.
    pub limit_bytes: Option<u64>,
    /// Whose it is, among daemons of this machine.
    pub home_mark: String,
    /// That, and which start of which worker: in the environment of all that it starts.
    pub mark: String,
}
