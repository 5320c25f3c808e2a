//! The devices `d3d12:N`: memory of any card that has a Direct3D 12 driver, on Windows.
//!
//! [`discover`] asks DXGI, whose library and that of Direct3D 12 are loaded by name when it is called: a machine
//! without them has no adapter, and the program starts all the same. A segment is a heap with one buffer over all of it;
//! bytes go through staging buffers on a copy queue.

mod adapter;
mod context;
mod device;

pub use crate::card::Options;
pub use adapter::{Adapter, NoDirect3d, discover};
pub use device::Device;
