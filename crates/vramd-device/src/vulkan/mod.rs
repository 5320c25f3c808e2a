//! The devices `vulkan:N`: memory of any card that has a Vulkan driver.
//!
//! [`discover`] finds the adapters through the loader, which is looked for when it is called; a machine without one
//! has none. Bytes go through staging buffers on the adapter's transfer queue.

mod adapter;
mod context;
mod device;

pub use crate::card::Options;
pub use adapter::{Adapter, NoVulkan, discover};
pub use device::Device;
