//! What the daemon asks of Windows beyond the standard library, each call safe to make: who is at the other end of a
//! pipe, who may open what, handing over a handle, ending processes together, where an open file really is, figures of the machine.
//!
//! Memory that others map, and cards, are `vramd-device`'s concern. On other systems this crate is empty.
#![cfg(windows)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot go on fails"))]

mod file;
pub mod job;
mod machine;
#[cfg(feature = "pipe")]
pub mod pipe;
mod process;
mod security;

pub use file::{file_number, final_path, reopen_direct};
pub use machine::{Memory, free_bytes, memory};
pub use process::{Given, Process, client_pid};
pub use security::{Security, is_trusted};

use std::io;

/// An error of the system, with the code that the standard library knows where there is one.
pub fn system(error: windows::core::Error) -> io::Error {
    match windows::Win32::Foundation::WIN32_ERROR::from_error(&error) {
        Some(code) => io::Error::from_raw_os_error(code.0.cast_signed()),
        None => error.into(),
    }
}
