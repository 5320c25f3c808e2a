//! Directories by the XDG rules, signals, the limit on open files.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access, statvfs};
pub use tokio::signal::unix::Signal as Interrupts;
use tokio::signal::unix::{SignalKind, signal};

use crate::settings::{Environment, set};

/// What has to be set where the state directory is not.
pub const HOME: &str = "XDG_STATE_HOME";

/// Where the store is when nobody says otherwise.
pub fn state_dir(environment: &Environment) -> Option<PathBuf> {
    if rustix::process::getuid().is_root() {
        return Some("/var/lib/vramd".into());
    }
    let below_home = || set(environment, "HOME").map(|home| Path::new(home).join(".local/state"));
    set(environment, HOME).map(PathBuf::from).or_else(below_home).map(|dir| dir.join("vramd"))
}

/// Where settings may be, the strongest first.
pub fn config_files(environment: &Environment) -> Vec<PathBuf> {
    let home = set(environment, "XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| set(environment, "HOME").map(|home| Path::new(home).join(".config")));
    let own = home.map(|home| home.join("vramd/vramd.toml"));
    own.into_iter().chain(["/etc/vramd/vramd.toml".into()]).collect()
}

/// Each Ctrl-C, from now on.
pub fn interrupts() -> io::Result<Interrupts> {
    signal(SignalKind::interrupt())
}

/// Completes when the daemon is to stop; heard from now on.
pub fn shutdown() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = interrupts()?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Each segment and each connection is a descriptor; the usual soft limit of 1,024 is for programs that use
/// `select`, which none of ours does.
pub fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "the limit on open files could not be raised");
    }
}

/// Whether files in a directory can be read.
pub fn can_read(directory: &Path) -> io::Result<()> {
    Ok(access(directory, Access::READ_OK | Access::EXEC_OK)?)
}

/// Whether files can be made in a directory.
pub fn can_write(directory: &Path) -> io::Result<()> {
    Ok(access(directory, Access::WRITE_OK | Access::EXEC_OK)?)
}

/// The room on a directory's disk.
pub fn free_bytes(directory: &Path) -> Option<u64> {
    let disk = statvfs(directory).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}
