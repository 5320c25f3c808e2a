//! What the system says about this machine.

#[cfg(unix)]
mod linux;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub use linux::checks;
#[cfg(windows)]
pub use windows::checks;

use vramd_api::Bytes;

use super::Check;

/// Below this the daemon itself has no room.
const LEAST_MEMORY: u64 = 256 << 20;

fn memory(available: u64, total: u64) -> Check {
    let message = format!("{} of {} are available", Bytes::show(available), Bytes::show(total));
    if available >= LEAST_MEMORY {
        Check::ok("memory", message)
    } else {
        Check::warning("memory", message, "the machine is full: models will not fit")
    }
}
