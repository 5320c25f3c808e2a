//! The devices `cuda:N`: memory of NVIDIA cards, in segments that other processes import.
//!
//! ```text
//!   daemon                                      loader, one for each card in use
//!   NVML: what there is, what is used           a context, from the first copy until it idles
//!   cuMemCreate, export: no context  ──fd──▶    imports, maps
//!   Stage: host memory that both map ◀──────▶   copies, fills, through pinned stages
//! ```
//!
//! A context costs hundreds of megabytes of the card and dies of any fault there. So this process never has one: what needs it
//! runs in a child process, whose end is an error of the calls under way there and of nothing else. Both libraries are looked
//! for when cards are.

mod adapter;
mod device;
mod driver;
mod loader;
mod message;
mod xid;

use std::path::PathBuf;

pub use adapter::{Adapter, NoCuda, discover};
pub use device::{Device, Options};
pub use loader::{LoaderCommand, serve};

/// Where NVIDIA's libraries are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Libraries {
    pub cuda: PathBuf,
    pub nvml: PathBuf,
}

impl Default for Libraries {
    /// Wherever the system's linker finds them.
    fn default() -> Self {
        Self { cuda: "libcuda.so.1".into(), nvml: "libnvidia-ml.so.1".into() }
    }
}
