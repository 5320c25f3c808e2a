//! A segment of host memory: memory that other processes can map too, and our own mapping of it.
//!
//! Owns every access to the bytes. How the memory is made, populated and handed out is the system's way (`linux`, `windows`).
//! Leaves out how much may be taken and whether the pages are there: that differs between real and simulated memory.

#[cfg(unix)]
mod linux;
#[cfg(windows)]
mod windows;

use std::io;
use std::ptr;

#[cfg(unix)]
pub(crate) use linux::Ahead;
#[cfg(unix)]
use linux::SharedMemory;
#[cfg(windows)]
use windows::SharedMemory;

use crate::table::Extent;
use crate::{Call, Descriptor, DeviceError, ExportAccess, SegmentId, Writers};

#[cfg(unix)]
/// Mappings begin at a multiple of it, so that the kernel can use huge pages for them.
pub(crate) const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// What is behind a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Pages come when they are first written to.
    Sparse,
    /// Pages of the base size; the owner populates them.
    SmallPages,
    /// Transparent huge pages where the kernel finds them; the owner populates them.
    TransparentHugePages,
    /// Pages of the pool that the administrator set aside, reserved when this is created.
    HugePagePool,
}

/// A failed call to the system, before it is known what it means.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) native: &'static str,
    pub(crate) source: io::Error,
}

impl Failed {
    pub(crate) fn at<E: Into<io::Error>>(native: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self { native, source: error.into() }
    }

    /// For want of memory.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::OutOfMemory | io::ErrorKind::StorageFull)
            || SharedMemory::is_full(&self.source)
    }

    /// The error of `call`; a lack of memory is told apart from a broken call.
    pub(crate) fn explain(self, call: Call, requested: u64, available: u64) -> DeviceError {
        if self.is_full() {
            return DeviceError::OutOfMemory { requested, available };
        }
        DeviceError::Native { call, native: self.native, source: self.source }
    }
}

/// Shared memory, mapped by us for as long as this lives.
#[derive(Debug)]
pub(crate) struct Segment {
    memory: SharedMemory,
    writers: Writers,
}

impl Extent for Segment {
    fn bytes(&self) -> u64 {
        self.memory.bytes()
    }
}

impl Segment {
    pub(crate) fn create(name: &str, bytes: u64, writers: Writers, backing: Backing) -> Result<Self, Failed> {
        Ok(Self { memory: SharedMemory::create(name, bytes, writers, backing)?, writers })
    }

    /// One of memory that was made ahead.
    #[cfg(unix)]
    pub(crate) fn of(ahead: Ahead, bytes: u64, writers: Writers, backing: Backing) -> Result<Self, Failed> {
        Ok(Self { memory: ahead.into_memory(bytes, writers, backing)?, writers })
    }

    /// Makes the pages of a range present, as zeros where they never were.
    pub(crate) fn populate(&self, offset: u64, bytes: u64) -> Result<(), Failed> {
        self.memory.populate(offset, bytes)
    }

    /// The address of a range. Importers may write there at any time, so nobody makes a reference to the bytes:
    /// they are only ever copied, and which of two racing writes a copy sees is left open.
    fn place(&self, offset: u64, bytes: usize) -> *mut u8 {
        assert!(
            offset.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes()),
            "the table checked the range"
        );
        // SAFETY: just checked to be inside the mapping.
        unsafe { self.memory.base().as_ptr().add(offset as usize) }
    }

    pub(crate) fn zero(&self, offset: u64, bytes: u64) {
        // SAFETY: `place` checked the range; the mapping is writable and lives as long as we do.
        unsafe { ptr::write_bytes(self.place(offset, bytes as usize), 0, bytes as usize) }
    }

    /// Zeros a range without giving pages to what reads as zero anyway.
    pub(crate) fn zero_sparsely(&self, offset: u64, bytes: u64) -> Result<(), Failed> {
        self.memory.each_extent(offset, bytes, |at, bytes| self.zero(at, bytes))
    }

    /// Copies a range to a disjoint one, of another segment or of this.
    pub(crate) fn copy(&self, offset: u64, target: &Self, target_offset: u64, bytes: u64) {
        let (from, to) = (self.place(offset, bytes as usize), target.place(target_offset, bytes as usize));
        // SAFETY: `place` checked both ranges, the table that they are disjoint, and both mappings live as long as
        // their segments do.
        unsafe { ptr::copy_nonoverlapping(from, to, bytes as usize) }
    }

    /// The same without giving pages to what reads as zero.
    pub(crate) fn copy_sparsely(
        &self,
        offset: u64,
        target: &Self,
        target_offset: u64,
        bytes: u64,
    ) -> Result<(), Failed> {
        target.zero_sparsely(target_offset, bytes)?;
        self.memory.each_extent(offset, bytes, |at, bytes| {
            self.copy(at, target, target_offset + (at - offset), bytes);
        })
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        // SAFETY: `place` checked the range; `bytes` is ours and no part of a mapping.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.place(offset, bytes.len()), bytes.len()) }
    }

    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) {
        // SAFETY: `place` checked the range; `bytes` is ours and no part of a mapping.
        unsafe { ptr::copy_nonoverlapping(self.place(offset, bytes.len()), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Reads without giving pages to what reads as zero.
    pub(crate) fn read_sparsely(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Failed> {
        bytes.fill(0);
        let into = bytes.as_mut_ptr();
        self.memory.each_extent(offset, bytes.len() as u64, |at, count| {
            let from = self.place(at, count as usize);
            // SAFETY: the extent lies in the range, which `bytes` is as long as; `bytes` is ours and no part of a mapping.
            unsafe { ptr::copy_nonoverlapping(from, into.add((at - offset) as usize), count as usize) }
        })
    }

    /// Reads a file straight into a range.
    pub(crate) fn fill(
        &self,
        offset: u64,
        bytes: u64,
        source: &crate::Source,
        source_offset: u64,
    ) -> io::Result<()> {
        let target = self.place(offset, bytes as usize);
        // SAFETY: `place` checked the range, and the mapping outlives the call. By the contract nobody else in
        // this process uses the range meanwhile.
        unsafe { source.read_into(target, bytes as usize, source_offset) }
    }

    /// Those of `processes`, but for this one, that have the memory mapped or open, where the system tells.
    pub(crate) fn importers(&self, processes: &[u32]) -> Result<Option<Vec<u32>>, DeviceError> {
        self.memory.importers(processes).map_err(|failed| failed.explain(Call::Importers, 0, 0))
    }

    /// A descriptor for another process.
    pub(crate) fn export(&self, id: SegmentId, access: ExportAccess) -> Result<Descriptor, DeviceError> {
        if access == ExportAccess::Write && self.writers == Writers::DeviceOnly {
            return Err(DeviceError::Misuse {
                call: Call::Export,
                segment: id,
                reason: "it was created for the device to write only",
            });
        }
        self.memory.export(access).map_err(|failed| DeviceError::Native {
            call: Call::Export,
            native: failed.native,
            source: failed.source,
        })
    }
}
