//! The pages of one block: mapped, and replaced under whoever reads them.

#[cfg(unix)]
mod linux;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub use linux::{Pages, read_at, write_at};
#[cfg(windows)]
pub use windows::{Pages, read_at, write_at};
