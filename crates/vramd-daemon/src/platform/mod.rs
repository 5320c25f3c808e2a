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

/// Why a file beneath a directory could not be opened.
#[derive(Debug)]
pub enum OpenError {
    /// A link leads out of the directory.
    Leaves,
    NotThere,
    Denied,
    /// It is nothing that can be read, such as a socket or a device.
    NotRegular,
    /// Links that lead to each other, or a name that is too long or not allowed.
    Unfollowable,
    Failed(std::io::Error),
}
