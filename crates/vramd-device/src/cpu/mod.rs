//! Host memory: sealed memory files whose pages are all there from the start.
//!
//! Owns what may be taken of the machine's memory and how it is populated: `device` keeps the books, `pages`
//! chooses the size of the pages, `populate` brings them in, `memory` those of large segments as they are used, and `ahead` keeps some
//! ready. A full machine is a refusal, never a SIGBUS.

#[cfg(unix)]
mod ahead;
mod device;
mod memory;
mod pages;
mod populate;

pub use device::{Device, Options};
