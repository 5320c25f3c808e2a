//! Views of file mappings, which stay where they are.

use std::ffi::c_void;
use std::io;
use std::os::windows::io::{AsRawHandle as _, OwnedHandle};
use std::ptr::{self, NonNull};

use vramd_api::attach::{Access, AttachedBlock, AttachedSegment, Handle};
use windows::Win32::Foundation::HANDLE;
use windows::Win32::System::Memory::{
    FILE_MAP_READ, FILE_MAP_WRITE, MEMORY_MAPPED_VIEW_ADDRESS, MapViewOfFile, UnmapViewOfFile,
};

/// What views begin at a multiple of.
const VIEW_BYTES: u64 = 64 << 10;

/// Unmapped when dropped.
#[derive(Debug)]
pub struct Pages {
    address: NonNull<c_void>,
    /// Where the block begins in the first page.
    block: usize,
}

// SAFETY: the pages belong to no thread. What is read through shared references is a copy (`Mapped::read_at`) or has its
// own contract (`Mapped::as_slice`), and the address never changes.
unsafe impl Send for Pages {}
// SAFETY: as for `Send`.
unsafe impl Sync for Pages {}

impl Pages {
    /// Whether they can be replaced under a reader: the system cannot do that in one step.
    pub const FOLLOW: bool = false;

    /// Maps the pages that hold a block, wherever there is room.
    pub fn map(
        handle: &OwnedHandle,
        segment: &AttachedSegment,
        block: &AttachedBlock,
        access: Access,
        _filled: bool,
    ) -> io::Result<Self> {
        let start = block.offset - block.offset % VIEW_BYTES;
        let end = (block.offset + block.bytes.max(1)).next_multiple_of(segment.page_bytes);
        let bytes = usize::try_from(end - start).map_err(io::Error::other)?;
        let rights = match access {
            Access::Read => FILE_MAP_READ,
            Access::Write => FILE_MAP_READ | FILE_MAP_WRITE,
        };
        let (high, low) = ((start >> 32) as u32, start as u32);
        // SAFETY: a new view where the system finds room; nothing that exists is touched. One that reaches beyond the end
        // of what the handle is for is refused.
        let view = unsafe { MapViewOfFile(HANDLE(handle.as_raw_handle()), rights, high, low, bytes) };
        let address = NonNull::new(view.Value).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { address, block: (block.offset - start) as usize })
    }

    /// Where the block is; the same for as long as it is mapped.
    pub fn block(&self) -> NonNull<u8> {
        // SAFETY: the block begins inside the view.
        unsafe { self.address.cast::<u8>().add(self.block) }
    }

    /// # Safety
    /// None is needed: it always refuses.
    #[allow(clippy::unused_self, reason = "elsewhere it does it")]
    pub unsafe fn replace(&self, _new: Self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the view is this value's own, and nobody has a reference that outlives it.
        // It fails for addresses that no view has.
        let _ = unsafe { UnmapViewOfFile(MEMORY_MAPPED_VIEW_ADDRESS { Value: self.address.as_ptr() }) };
    }
}

/// Copies what a descriptor of host memory has from `offset` on; it is mapped meanwhile.
pub fn read_at(handle: &OwnedHandle, offset: u64, into: &mut [u8]) -> io::Result<()> {
    let pages = window(handle, offset, into.len(), Access::Read)?;
    // SAFETY: the range is mapped, and `into` is memory of our own. A writer elsewhere may change bytes meanwhile: the copy
    // then has some of both.
    unsafe { ptr::copy_nonoverlapping(pages.block().as_ptr(), into.as_mut_ptr(), into.len()) };
    Ok(())
}

/// Copies to `offset` of what a descriptor of host memory has; it is mapped meanwhile.
pub fn write_at(handle: &OwnedHandle, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let pages = window(handle, offset, bytes.len(), Access::Write)?;
    // SAFETY: the range is mapped for writing and does not overlap `bytes`.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), pages.block().as_ptr(), bytes.len()) };
    Ok(())
}

fn window(handle: &OwnedHandle, offset: u64, bytes: usize, access: Access) -> io::Result<Pages> {
    let bytes = bytes as u64;
    let segment = AttachedSegment { bytes: 0, page_bytes: 1, handle: Handle::FileMapping };
    Pages::map(handle, &segment, &AttachedBlock { segment: 0, offset, bytes }, access, false)
}
