//! File mappings over the system's page file.
//!
//! All of it is committed when it is made, so that no access faults for want of memory. A reader's handle has the right
//! to map for reading alone.

use std::io;
use std::os::windows::io::{AsRawHandle as _, FromRawHandle as _, OwnedHandle};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use windows::Win32::Foundation::{
    DUPLICATE_HANDLE_OPTIONS, DuplicateHandle, ERROR_COMMITMENT_LIMIT, HANDLE, INVALID_HANDLE_VALUE,
};
use windows::Win32::System::Memory::{
    CreateFileMappingW, FILE_MAP_READ, FILE_MAP_WRITE, MEMORY_MAPPED_VIEW_ADDRESS, MapViewOfFile,
    PAGE_READWRITE, SEC_COMMIT, UnmapViewOfFile,
};
use windows::Win32::System::Threading::GetCurrentProcess;
use windows::core::PCWSTR;

use vramd_windows::{Security, system};

use super::{Backing, Failed};
use crate::{ExportAccess, Writers};

const PAGE_BYTES: usize = 4096;

/// A file mapping and our own view of it.
#[derive(Debug)]
pub(super) struct SharedMemory {
    handle: OwnedHandle,
    base: NonNull<u8>,
    bytes: u64,
}

// SAFETY: a view belongs to the process, not to a thread; how its bytes are used is `Segment`'s concern.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// It has no name, so that nobody comes to it but by a handle of ours.
    pub(super) fn create(
        _name: &str,
        bytes: u64,
        _writers: Writers,
        _backing: Backing,
    ) -> Result<Self, Failed> {
        let (high, low) = ((bytes >> 32) as u32, bytes as u32);
        let protection = PAGE_READWRITE | SEC_COMMIT;
        // Else whoever has a handle for reading could open a better one by it.
        let security = Security::nobody().map_err(Failed::at("a security descriptor"))?;
        let attributes = security.attributes();
        // SAFETY: the attributes live until the call returns; the handle that comes is ours.
        let handle = unsafe {
            let made = CreateFileMappingW(
                INVALID_HANDLE_VALUE,
                Some(&raw const attributes),
                protection,
                high,
                low,
                PCWSTR::null(),
            )
            .map_err(system)
            .map_err(Failed::at("CreateFileMapping"))?;
            OwnedHandle::from_raw_handle(made.0)
        };
        // SAFETY: a new view at an address of the system's choice replaces nothing.
        let view = unsafe {
            MapViewOfFile(
                HANDLE(handle.as_raw_handle()),
                FILE_MAP_READ | FILE_MAP_WRITE,
                0,
                0,
                bytes as usize,
            )
        };
        let base = NonNull::new(view.Value.cast())
            .ok_or_else(|| Failed::at("MapViewOfFile")(io::Error::last_os_error()))?;
        Ok(Self { handle, base, bytes })
    }

    /// Whether an error means a lack of memory that its kind does not show.
    pub(super) fn is_full(error: &io::Error) -> bool {
        error.raw_os_error() == Some(ERROR_COMMITMENT_LIMIT.0.cast_signed())
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Touches each page, with a write that changes nothing.
    #[allow(clippy::unnecessary_wraps, reason = "elsewhere the system may refuse")]
    pub(super) fn populate(&self, offset: u64, bytes: u64) -> Result<(), Failed> {
        for page in (offset..offset + bytes).step_by(PAGE_BYTES) {
            // SAFETY: inside the view, which lives; an atomic write may race with those of other processes.
            unsafe { &*self.base.as_ptr().add(page as usize).cast::<AtomicU8>() }
                .fetch_or(0, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Calls `each` for the parts of a range that may hold something: the system does not tell of untouched pages.
    #[allow(
        clippy::unnecessary_wraps,
        clippy::unused_self,
        reason = "elsewhere the system tells, or fails to"
    )]
    pub(super) fn each_extent(
        &self,
        offset: u64,
        bytes: u64,
        mut each: impl FnMut(u64, u64),
    ) -> Result<(), Failed> {
        each(offset, bytes);
        Ok(())
    }

    /// The system does not tell who has a view or a handle.
    #[allow(
        clippy::unnecessary_wraps,
        clippy::unused_self,
        reason = "elsewhere the system tells, or fails to"
    )]
    pub(super) fn importers(&self, _processes: &[u32]) -> Result<Option<Vec<u32>>, Failed> {
        Ok(None)
    }

    pub(super) fn export(&self, access: ExportAccess) -> Result<OwnedHandle, Failed> {
        let rights = match access {
            ExportAccess::Read => FILE_MAP_READ,
            ExportAccess::Write => FILE_MAP_READ | FILE_MAP_WRITE,
        };
        let mut copy = HANDLE::default();
        // SAFETY: both handles are of this process, the first lives, and the second comes to be ours.
        unsafe {
            let process = GetCurrentProcess();
            let handle = HANDLE(self.handle.as_raw_handle());
            let options = DUPLICATE_HANDLE_OPTIONS(0);
            DuplicateHandle(process, handle, process, &raw mut copy, rights.0, false, options)
                .map_err(system)
                .map_err(Failed::at("DuplicateHandle"))?;
            Ok(OwnedHandle::from_raw_handle(copy.0))
        }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        let view = MEMORY_MAPPED_VIEW_ADDRESS { Value: self.base.as_ptr().cast() };
        // SAFETY: the view is ours, and nobody holds a pointer into it beyond a call on `Segment`.
        let done = unsafe { UnmapViewOfFile(view) };
        debug_assert!(done.is_ok(), "unmapping our own view cannot fail: {done:?}");
    }
}
