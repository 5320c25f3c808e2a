//! The devices `vulkan:N`: memory of any card that has a Vulkan driver.
//!
//! [`discover`] finds the adapters through the loader, which is looked for when it is called; a machine without one
//! has none. A [`Device`] opens its context in the driver with its first segment and closes it with its last, so that an
//! idle daemon has no logical device. Bytes go through staging buffers on the adapter's transfer queue.

mod adapter;
mod context;
mod device;

pub use adapter::{Adapter, NoVulkan, discover};
pub use device::{Device, Options};
