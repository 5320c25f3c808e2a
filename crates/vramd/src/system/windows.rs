//! Directories of the user's profile, and the signals of a console.

use std::io;
use std::path::{Path, PathBuf};

pub use tokio::signal::windows::CtrlC as Interrupts;
use tokio::signal::windows::{ctrl_break, ctrl_c, ctrl_close, ctrl_shutdown};

use crate::settings::{Environment, set};

/// What has to be set where the state directory is not.
pub const HOME: &str = "LOCALAPPDATA";

/// Where the store is when nobody says otherwise.
pub fn state_dir(environment: &Environment) -> Option<PathBuf> {
    set(environment, HOME).map(|home| Path::new(home).join("vramd"))
}

/// Where settings may be, the strongest first.
pub fn config_files(environment: &Environment) -> Vec<PathBuf> {
    let places = ["APPDATA", "ProgramData"].map(|place| set(environment, place));
    places.into_iter().flatten().map(|place| Path::new(place).join("vramd").join("vramd.toml")).collect()
}

/// Each Ctrl-C, from now on.
pub fn interrupts() -> io::Result<Interrupts> {
    ctrl_c()
}

/// Completes when the daemon is to stop; heard from now on.
pub fn shutdown() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let (mut interrupt, mut stop) = (ctrl_c()?, ctrl_break()?);
    let (mut close, mut shutdown) = (ctrl_close()?, ctrl_shutdown()?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = stop.recv() => {}
            _ = close.recv() => {}
            _ = shutdown.recv() => {}
        }
    })
}

/// The system has no limit to raise.
pub fn raise_open_files() {}

/// Whether files in a directory can be read.
pub fn can_read(directory: &Path) -> io::Result<()> {
    std::fs::read_dir(directory).map(drop)
}

/// Whether files can be made in a directory: rights there are not told without trying.
pub fn can_write(directory: &Path) -> io::Result<()> {
    let probe = directory.join(format!(".vramd-{}", std::process::id()));
    std::fs::File::create_new(&probe)?;
    std::fs::remove_file(probe)
}

/// The room on a directory's disk.
pub fn free_bytes(directory: &Path) -> Option<u64> {
    vramd_windows::free_bytes(directory).ok()
}
