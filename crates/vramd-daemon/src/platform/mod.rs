//! What each system does in its own way: the local socket and who is at its other end, other processes, and opening files
//! beneath a directory.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub use unix::*;
#[cfg(windows)]
pub use windows::*;
