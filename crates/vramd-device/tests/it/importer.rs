//! What a process does with a descriptor that it was handed.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use vramd_api::attach::Handle;
use vramd_device::Exported;

use crate::cuda_importer;
use crate::vulkan_importer::Imported;

/// A segment in the hands of another program, whatever its descriptor is.
pub enum Importer {
    Mapped(Import),
    Vulkan(Box<Imported>),
    Cuda(cuda_importer::Imported),
}

impl Importer {
    pub fn reader(exported: Exported, bytes: u64) -> Self {
        Self::new(exported, bytes, ProtFlags::READ)
    }

    pub fn writer(exported: Exported, bytes: u64) -> Self {
        Self::new(exported, bytes, ProtFlags::READ | ProtFlags::WRITE)
    }

    fn new(exported: Exported, bytes: u64, access: ProtFlags) -> Self {
        match exported.handle {
            Handle::Memfd => Self::Mapped(Import::map(exported.descriptor, bytes, access).unwrap()),
            Handle::VulkanOpaqueFd { .. } => Self::Vulkan(Box::new(Imported::new(exported, bytes))),
            Handle::CudaPosixFd { .. } => Self::Cuda(cuda_importer::Imported::new(&exported, bytes)),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Mapped(import) => import.bytes(),
            Self::Vulkan(imported) => imported.bytes(),
            Self::Cuda(imported) => imported.bytes(),
        }
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        match self {
            Self::Mapped(import) => import.write(offset, bytes),
            Self::Vulkan(imported) => imported.write(offset, bytes),
            Self::Cuda(imported) => imported.write(offset, bytes),
        }
    }
}

pub struct Import {
    base: *mut u8,
    bytes: usize,
}

impl Import {
    pub fn map(file: impl AsFd, bytes: u64, access: ProtFlags) -> Result<Self, Errno> {
        let bytes = bytes as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), bytes, access, MapFlags::SHARED, file, 0) }?;
        Ok(Self { base: base.cast(), bytes })
    }

    pub fn read(file: impl AsFd, bytes: u64) -> Self {
        Self::map(file, bytes, ProtFlags::READ).expect("a read descriptor can be mapped for reading")
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut copy = vec![0; self.bytes];
        // SAFETY: the mapping has that many readable bytes.
        unsafe { ptr::copy_nonoverlapping(self.base, copy.as_mut_ptr(), self.bytes) };
        copy
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.bytes);
        // SAFETY: in range, and only writable mappings are written to here.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset), bytes.len()) };
    }

    pub fn make_writable(&self) -> Result<(), Errno> {
        // SAFETY: more rights on our own mapping change nothing for anybody else.
        unsafe {
            rustix::mm::mprotect(self.base.cast(), self.bytes, MprotectFlags::READ | MprotectFlags::WRITE)
        }
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and ends with us.
        unsafe { rustix::mm::munmap(self.base.cast(), self.bytes) }.expect("our own mapping");
    }
}

/// Opens a descriptor's file anew for reading and writing, which only a privileged user may.
pub fn reopen_writable(file: &OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::fs::open(
        format!("/proc/self/fd/{}", file.as_raw_fd()),
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )
}
