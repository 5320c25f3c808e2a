//! Mappings of memory files, which the kernel replaces in one step.

use std::ffi::c_void;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap, mremap_fixed, munmap};
use vramd_api::attach::{Access, AttachedBlock, AttachedSegment};

/// Unmapped when dropped.
#[derive(Debug)]
pub struct Pages {
    address: NonNull<c_void>,
    bytes: usize,
    /// Where the block begins in the first page.
    block: usize,
}

// SAFETY: the pages belong to no thread. What is read through shared references is a copy (`Mapped::read_at`) or has its
// own contract (`Mapped::as_slice`), and the address never changes.
unsafe impl Send for Pages {}
// SAFETY: as for `Send`.
unsafe impl Sync for Pages {}

impl Pages {
    /// Whether they can be replaced under a reader.
    pub const FOLLOW: bool = true;

    /// Maps the pages that hold a block, wherever there is room. `filled`: with all of them brought in.
    pub fn map(
        descriptor: &OwnedFd,
        segment: &AttachedSegment,
        block: &AttachedBlock,
        access: Access,
        filled: bool,
    ) -> io::Result<Self> {
        let page = segment.page_bytes;
        let start = block.offset - block.offset % page;
        let end = (block.offset + block.bytes.max(1)).next_multiple_of(page);
        let bytes = usize::try_from(end - start).map_err(io::Error::other)?;
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::Write => ProtFlags::READ | ProtFlags::WRITE,
        };
        let flags = if filled { MapFlags::SHARED | MapFlags::POPULATE } else { MapFlags::SHARED };
        // SAFETY: a new mapping where the kernel finds room; nothing that exists is touched.
        let address = unsafe { mmap(ptr::null_mut(), bytes, protection, flags, descriptor, start) }?;
        let address = NonNull::new(address).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        let pages = Self { address, bytes, block: (block.offset - start) as usize };
        // A child would keep the old place after a move, when it belongs to others.
        // SAFETY: the range is the mapping made above; the advice changes nothing for this process.
        unsafe { madvise(address.as_ptr(), bytes, Advice::LinuxDontFork) }?;
        Ok(pages)
    }

    /// Where the block is; the same for as long as it is mapped.
    pub fn block(&self) -> NonNull<u8> {
        // SAFETY: the block begins inside the mapping.
        unsafe { self.address.cast::<u8>().add(self.block) }
    }

    /// Puts `new` in the place of these pages, in one step of the kernel. On an error these stay; if the kernel could not
    /// even do that, for want of memory of its own, the process ends: whoever read them next would crash.
    ///
    /// # Safety
    /// `new` has the same bytes as these pages.
    pub unsafe fn replace(&self, new: Self) -> io::Result<()> {
        if (new.bytes, new.block) != (self.bytes, self.block) {
            return Err(io::Error::other("the new pages do not have the size of the old"));
        }
        // SAFETY: both ranges are mappings that the two own, of the same size. Readers of the old pages see the same
        // bytes in the new ones, by this function's contract; no access can fall between, since the kernel swaps them
        // under the lock that a fault takes.
        unsafe {
            let flags = MremapFlags::MAYMOVE;
            let moved =
                mremap_fixed(new.address.as_ptr(), new.bytes, new.bytes, flags, self.address.as_ptr());
            if let Err(error) = moved {
                let there = madvise(self.address.as_ptr(), self.bytes, Advice::LinuxDontFork);
                if there == Err(rustix::io::Errno::NOMEM) {
                    eprintln!("vramd: the kernel has lost pages while it replaced them ({error})");
                    std::process::abort();
                }
                return Err(error.into());
            }
        }
        // Its range is mapped no more.
        std::mem::forget(new);
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own mapping, and nobody has a reference that outlives it.
        // It fails for arguments that no mapping has.
        let _ = unsafe { munmap(self.address.as_ptr(), self.bytes) };
    }
}

/// Copies what a descriptor of host memory has from `offset` on, without mapping it.
pub fn read_at(descriptor: &OwnedFd, offset: u64, into: &mut [u8]) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    std::fs::File::from(descriptor.try_clone()?).read_exact_at(into, offset)
}

/// Copies to `offset` of what a descriptor of host memory has, without mapping it.
pub fn write_at(descriptor: &OwnedFd, offset: u64, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    std::fs::File::from(descriptor.try_clone()?).write_all_at(bytes, offset)
}
