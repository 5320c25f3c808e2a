//! What a process does with a descriptor that it was handed.

use vramd_api::attach::Handle;
use vramd_device::{Descriptor, Exported};

#[cfg(unix)]
use crate::cuda_importer;
#[cfg(windows)]
use crate::file_mapping as host_memory;
#[cfg(unix)]
use crate::memfd as host_memory;
#[cfg(unix)]
use crate::vulkan_importer::Imported;

pub use host_memory::{Import, is_inherited};

/// A segment in the hands of another program, whatever its descriptor is.
pub enum Importer {
    Mapped(Import),
    #[cfg(unix)]
    Vulkan(Box<Imported>),
    #[cfg(unix)]
    Cuda(cuda_importer::Imported),
}

impl Importer {
    pub fn reader(exported: Exported, bytes: u64) -> Self {
        Self::new(exported, bytes, false)
    }

    pub fn writer(exported: Exported, bytes: u64) -> Self {
        Self::new(exported, bytes, true)
    }

    fn new(exported: Exported, bytes: u64, writes: bool) -> Self {
        let map = |descriptor: Descriptor| Import::map(&descriptor, bytes, writes).unwrap();
        match exported.handle {
            Handle::Memfd | Handle::FileMapping => Self::Mapped(map(exported.descriptor)),
            #[cfg(unix)]
            Handle::VulkanOpaqueFd { .. } => Self::Vulkan(Box::new(Imported::new(exported, bytes))),
            #[cfg(unix)]
            Handle::CudaPosixFd { .. } => Self::Cuda(cuda_importer::Imported::new(&exported, bytes)),
            other => unreachable!("not of this system: {other:?}"),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Mapped(import) => import.bytes(),
            #[cfg(unix)]
            Self::Vulkan(imported) => imported.bytes(),
            #[cfg(unix)]
            Self::Cuda(imported) => imported.bytes(),
        }
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        match self {
            Self::Mapped(import) => import.write(offset, bytes),
            #[cfg(unix)]
            Self::Vulkan(imported) => imported.write(offset, bytes),
            #[cfg(unix)]
            Self::Cuda(imported) => imported.write(offset, bytes),
        }
    }
}
