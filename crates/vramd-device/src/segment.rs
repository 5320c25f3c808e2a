//! A segment of host memory: one sealed memory file and our own mapping of it.
//!
//! Owns the file's seals, the mapping and every access to the bytes. Leaves out how much may be taken and
//! whether the pages are there: that differs between real and simulated memory.
//!
//! The seals: an importer can neither shrink nor grow the file, so a mapping of it never faults; and with
//! [`Writers::DeviceOnly`] no descriptor, not even one that is opened anew through `/proc`, can be written to or
//! mapped writable. Only the mapping that existed before that seal, ours, still writes.

use std::io;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::table::Extent;
use crate::{Call, DeviceError, ExportAccess, SegmentId, Writers};

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

/// A failed call to the kernel, before it is known what it means.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) native: &'static str,
    pub(crate) errno: Errno,
}

impl Failed {
    pub(crate) fn at(native: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self { native, errno }
    }

    /// The error of `call`; a lack of memory is told apart from a broken kernel call.
    pub(crate) fn explain(self, call: Call, requested: u64, available: u64) -> DeviceError {
        match self.errno {
            Errno::NOMEM | Errno::NOSPC => DeviceError::OutOfMemory { requested, available },
            errno => DeviceError::Native { call, native: self.native, source: errno.into() },
        }
    }
}

/// A sealed memory file, mapped by us for as long as this lives.
#[derive(Debug)]
pub(crate) struct Segment {
    file: OwnedFd,
    mapping: Mapping,
    writers: Writers,
}

impl Extent for Segment {
    fn bytes(&self) -> u64 {
        self.mapping.bytes as u64
    }
}

impl Segment {
    pub(crate) fn create(name: &str, bytes: u64, writers: Writers, backing: Backing) -> Result<Self, Failed> {
        let file = memory_file(name, backing)?;
        rustix::fs::ftruncate(&file, bytes).map_err(Failed::at("ftruncate"))?;
        // Another user's process must not turn a read descriptor into a writable one through /proc.
        rustix::fs::fchmod(&file, Mode::RUSR).map_err(Failed::at("fchmod"))?;
        let mapping = Mapping::of(&file, bytes)?;
        // Other people's data has no place in a core file.
        mapping.advise(0, bytes, Advice::LinuxDontDump)?;
        if backing == Backing::TransparentHugePages {
            mapping.advise(0, bytes, Advice::LinuxHugepage)?;
        }
        let mut seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        if writers == Writers::DeviceOnly {
            seals |= SealFlags::FUTURE_WRITE;
        }
        rustix::fs::fcntl_add_seals(&file, seals).map_err(Failed::at("fcntl(F_ADD_SEALS)"))?;
        Ok(Self { file, mapping, writers })
    }

    /// Makes the pages of a range present, as zeros where they never were.
    pub(crate) fn populate(&self, offset: u64, bytes: u64) -> Result<(), Failed> {
        loop {
            match self.mapping.advise(offset, bytes, Advice::LinuxPopulateWrite) {
                Err(Failed { errno: Errno::INTR | Errno::AGAIN, .. }) => {}
                // The fault would have been a SIGBUS: the pool or its control group gave less than it promised.
                Err(Failed { errno: Errno::FAULT, native }) => {
                    return Err(Failed { native, errno: Errno::NOMEM });
                }
                done => return done,
            }
        }
    }

    /// The address of a range. Importers may write there at any time, so nobody makes a reference to the bytes:
    /// they are only ever copied, and which of two racing writes a copy sees is left open.
    fn place(&self, offset: u64, bytes: usize) -> *mut u8 {
        assert!(
            offset.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes()),
            "the table checked the range"
        );
        // SAFETY: just checked to be inside the mapping.
        unsafe { self.mapping.base.as_ptr().add(offset as usize) }
    }

    pub(crate) fn zero(&self, offset: u64, bytes: u64) {
        // SAFETY: `place` checked the range; the mapping is writable and lives as long as we do.
        unsafe { ptr::write_bytes(self.place(offset, bytes as usize), 0, bytes as usize) }
    }

    /// Zeros a range without giving pages to what reads as zero anyway.
    pub(crate) fn zero_sparsely(&self, offset: u64, bytes: u64) -> Result<(), Failed> {
        self.each_extent(offset, bytes, |at, bytes| self.zero(at, bytes))
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
        self.each_extent(offset, bytes, |at, bytes| {
            self.copy(at, target, target_offset + (at - offset), bytes);
        })
    }

    /// Calls `each` for the parts of a range that have pages.
    fn each_extent(&self, offset: u64, bytes: u64, mut each: impl FnMut(u64, u64)) -> Result<(), Failed> {
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let from = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(from) => from,
                Err(Errno::NXIO) => break,
                Err(errno) => return Err(Failed { native: "lseek(SEEK_DATA)", errno }),
            };
            if from >= end {
                break;
            }
            let to =
                rustix::fs::seek(&self.file, SeekFrom::Hole(from)).map_err(Failed::at("lseek(SEEK_HOLE)"))?;
            let to = to.min(end);
            each(from, to - from);
            at = to;
        }
        Ok(())
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        // SAFETY: `place` checked the range; `bytes` is ours and no part of a mapping.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.place(offset, bytes.len()), bytes.len()) }
    }

    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) {
        // SAFETY: `place` checked the range; `bytes` is ours and no part of a mapping.
        unsafe { ptr::copy_nonoverlapping(self.place(offset, bytes.len()), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Reads through the file, which leaves holes without pages.
    pub(crate) fn read_sparsely(&self, offset: u64, mut bytes: &mut [u8]) -> Result<(), Failed> {
        let mut at = offset;
        while !bytes.is_empty() {
            match rustix::io::pread(&self.file, &mut *bytes, at) {
                Ok(0) => unreachable!("the table checked the range, and the file cannot shrink"),
                Ok(count) => {
                    bytes = &mut bytes[count..];
                    at += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Failed { native: "pread", errno }),
            }
        }
        Ok(())
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

    /// Those of `processes`, but for this one, that have the file mapped or open.
    pub(crate) fn importers(&self, processes: &[u32]) -> Result<Vec<u32>, DeviceError> {
        let failed = |errno: Errno| DeviceError::Native {
            call: Call::Importers,
            native: "fstat",
            source: errno.into(),
        };
        let inode = rustix::fs::fstat(&self.file).map_err(failed)?.st_ino;
        let others = processes.iter().filter(|process| **process != std::process::id());
        Ok(others.copied().filter(|process| imports(*process, inode)).collect())
    }

    /// A descriptor for another process.
    pub(crate) fn export(&self, id: SegmentId, access: ExportAccess) -> Result<OwnedFd, DeviceError> {
        let native = |native| {
            move |errno: Errno| DeviceError::Native { call: Call::Export, native, source: errno.into() }
        };
        match (access, self.writers) {
            (ExportAccess::Read, _) => {
                use std::os::fd::AsRawFd;
                let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(native("open(/proc/self/fd)"))
            }
            (ExportAccess::Write, Writers::Importers) => {
                rustix::io::fcntl_dupfd_cloexec(&self.file, 0).map_err(native("fcntl(F_DUPFD_CLOEXEC)"))
            }
            (ExportAccess::Write, Writers::DeviceOnly) => Err(DeviceError::Misuse {
                call: Call::Export,
                segment: id,
                reason: "it was created for the device to write only",
            }),
        }
    }
}

/// Whether a process has the memory file of that inode mapped or open. One that is gone, or that we may not look into,
/// has not, as far as we can tell.
fn imports(process: u32, inode: u64) -> bool {
    let is_mapped = |line: &str| {
        // address perms offset dev inode path
        line.contains("/memfd:") && line.split_ascii_whitespace().nth(4) == Some(&inode.to_string())
    };
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
    if maps.lines().any(is_mapped) {
        return true;
    }
    let open = std::fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
    open.filter_map(|entry| std::fs::metadata(entry.path()).ok()).any(|file| {
        use std::os::unix::fs::MetadataExt;
        file.ino() == inode && file.nlink() == 0
    })
}

fn memory_file(name: &str, backing: Backing) -> Result<OwnedFd, Failed> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if backing == Backing::HugePagePool {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Before Linux 6.3 a memory file could not say that it holds no program.
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        done => done,
    }
    .map_err(Failed::at("memfd_create"))
}

/// A shared, writable mapping that begins at a multiple of 2 MiB.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; how its bytes are used is `Segment`'s concern.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(file: &OwnedFd, bytes: u64) -> Result<Self, Failed> {
        let align = HUGE_PAGE_BYTES as usize;
        let bytes = usize::try_from(bytes).map_err(|_| Failed { native: "mmap", errno: Errno::NOMEM })?;
        let reserved = bytes
            .checked_next_multiple_of(align)
            .and_then(|bytes| bytes.checked_add(align))
            .ok_or(Failed { native: "mmap", errno: Errno::NOMEM })?;
        let private = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let whole =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), reserved, ProtFlags::empty(), private) }
                .map_err(Failed::at("mmap"))?
                .cast::<u8>();
        let head = whole.align_offset(align);
        let base = whole.wrapping_add(head);
        let shared = MapFlags::SHARED | MapFlags::FIXED;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: it replaces pages of the range that was reserved above, which nobody else knows of.
        let mapped = unsafe { rustix::mm::mmap(base.cast(), bytes, access, shared, file, 0) };
        let kept = if mapped.is_ok() { bytes } else { 0 };
        // SAFETY: both parts are inside the reserved range and outside of what is kept. The second is never
        // empty, since less than `align` came before it.
        unsafe {
            if head > 0 {
                let _ = rustix::mm::munmap(whole.cast(), head);
            }
            let _ = rustix::mm::munmap(base.wrapping_add(kept).cast(), reserved - head - kept);
        }
        mapped.map_err(Failed::at("mmap"))?;
        let base = NonNull::new(base).expect("the kernel maps nothing at address 0 unless asked to");
        Ok(Self { base, bytes })
    }

    fn advise(&self, offset: u64, bytes: u64, advice: Advice) -> Result<(), Failed> {
        debug_assert!(offset + bytes <= self.bytes as u64);
        let start = self.base.as_ptr().wrapping_add(offset as usize);
        // SAFETY: the range is inside our mapping, and none of the advice we give changes its contents.
        unsafe { rustix::mm::madvise(start.cast(), bytes as usize, advice) }.map_err(Failed::at("madvise"))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody holds a pointer into it beyond a call on `Segment`.
        let done = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(done.is_ok(), "munmap of our own mapping cannot fail: {done:?}");
    }
}
