//! The client's side of `protocol/attach.md`.
//!
//! [`attach`] asks the daemon and checks its answer: descriptors and a table of tensors, for who maps them himself.
//! [`Mapped`] maps them as well and stays mapped, at the same address with the same bytes, while the daemon moves
//! them (on Windows they are not moved meanwhile). Memory on Vulkan devices is imported by `vulkan::import` (feature `vulkan`). What is resident is decided over REST, not here.
//!
//! ```no_run
//! use vramd_api::attach::Attach;
//! use vramd_attach::{Mapped, default_socket};
//!
//! let request = Attach { model: Some("minilm".parse()?), moves: true, ..Attach::default() };
//! let weights = Mapped::attach(&default_socket(), &request)?;
//! for tensor in weights.tensors() {
//!     let mut bytes = vec![0; tensor.bytes as usize];
//!     weights.read_at(tensor.offset, &mut bytes);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![cfg(any(target_os = "linux", windows))]

mod connection;
mod mapped;
mod pages;
mod stream;
#[cfg(all(feature = "vulkan", unix))]
pub mod vulkan;

pub use connection::{AttachError, Attachment, Place, attach};
pub use mapped::{Ended, Mapped};
pub use pages::{read_at, write_at};
pub use stream::{Descriptor, Stopper, Stream, default_socket};
