//! Sealed memory files.
//!
//! The seals: an importer can neither shrink nor grow the file, so a mapping of it never faults; and with
//! [`Writers::DeviceOnly`] no descriptor, not even one that is opened anew through `/proc`, can be written to or
//! mapped writable. Only the mapping that existed before that seal, ours, still writes.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::ptr::{self, NonNull};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::{Backing, Failed, HUGE_PAGE_BYTES};
use crate::{ExportAccess, Writers};

const ADVISE: &str = "madvise";

/// A sealed memory file, mapped by us for as long as this lives.
#[derive(Debug)]
pub(super) struct SharedMemory {
    file: OwnedFd,
    mapping: Mapping,
}

impl SharedMemory {
    pub(super) fn create(name: &str, bytes: u64, writers: Writers, backing: Backing) -> Result<Self, Failed> {
        let file = memory_file(name, backing)?;
        Self::of(file, bytes, writers, backing)
    }

    fn of(file: OwnedFd, bytes: u64, writers: Writers, backing: Backing) -> Result<Self, Failed> {
        let mapping = map(&file, bytes, backing)?;
        let mut seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        if writers == Writers::DeviceOnly {
            seals |= SealFlags::FUTURE_WRITE;
        }
        rustix::fs::fcntl_add_seals(&file, seals).map_err(Failed::at("fcntl(F_ADD_SEALS)"))?;
        Ok(Self { file, mapping })
    }

    /// Whether an error means a lack of memory that its kind does not show.
    pub(super) fn is_full(_error: &io::Error) -> bool {
        false
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        self.mapping.base
    }

    pub(super) fn bytes(&self) -> u64 {
        self.mapping.bytes as u64
    }

    /// Makes the pages of a range present, as zeros where they never were.
    pub(super) fn populate(&self, offset: u64, bytes: u64) -> Result<(), Failed> {
        self.mapping.populate(offset, bytes)
    }

    /// Calls `each` for the parts of a range that have pages.
    pub(super) fn each_extent(
        &self,
        offset: u64,
        bytes: u64,
        mut each: impl FnMut(u64, u64),
    ) -> Result<(), Failed> {
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let from = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(from) => from,
                Err(Errno::NXIO) => break,
                Err(errno) => return Err(Failed::at("lseek(SEEK_DATA)")(errno)),
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

    /// Those of `processes`, but for this one, that have the file mapped or open.
    pub(super) fn importers(&self, processes: &[u32]) -> Result<Option<Vec<u32>>, Failed> {
        let inode = rustix::fs::fstat(&self.file).map_err(Failed::at("fstat"))?.st_ino;
        let others = processes.iter().filter(|process| **process != std::process::id());
        Ok(Some(others.copied().filter(|process| imports(*process, inode)).collect()))
    }

    pub(super) fn export(&self, access: ExportAccess) -> Result<OwnedFd, Failed> {
        if access == ExportAccess::Write {
            return rustix::io::fcntl_dupfd_cloexec(&self.file, 0)
                .map_err(Failed::at("fcntl(F_DUPFD_CLOEXEC)"));
        }
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(Failed::at("open(/proc/self/fd)"))
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

/// Gives a memory file its size and maps it.
fn map(file: &OwnedFd, bytes: u64, backing: Backing) -> Result<Mapping, Failed> {
    rustix::fs::ftruncate(file, bytes).map_err(Failed::at("ftruncate"))?;
    // Another user's process must not turn a read descriptor into a writable one through /proc.
    rustix::fs::fchmod(file, Mode::RUSR).map_err(Failed::at("fchmod"))?;
    let mapping = Mapping::of(file, bytes)?;
    // Other people's data has no place in a core file.
    mapping.advise(0, bytes, Advice::LinuxDontDump).map_err(Failed::at(ADVISE))?;
    if backing == Backing::TransparentHugePages {
        mapping.advise(0, bytes, Advice::LinuxHugepage).map_err(Failed::at(ADVISE))?;
    }
    Ok(mapping)
}

/// A memory file that is no segment yet: its pages are made ahead, and nobody else has it.
#[derive(Debug)]
pub(crate) struct Ahead {
    file: OwnedFd,
    mapping: Mapping,
    populated: u64,
}

impl Ahead {
    pub(crate) fn create(name: &str, bytes: u64, backing: Backing) -> Result<Self, Failed> {
        let file = memory_file(name, backing)?;
        let mapping = map(&file, bytes, backing)?;
        Ok(Self { file, mapping, populated: 0 })
    }

    /// As many bytes from the start on have their pages, of zeros.
    pub(crate) fn populated(&self) -> u64 {
        self.populated
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.populated == self.mapping.bytes as u64
    }

    /// Makes the next pages.
    pub(crate) fn populate_next(&mut self, bytes: u64) -> Result<(), Failed> {
        let bytes = bytes.min(self.mapping.bytes as u64 - self.populated);
        self.mapping.populate(self.populated, bytes)?;
        self.populated += bytes;
        Ok(())
    }

    /// A segment of another size; pages beyond it go back to the system.
    pub(super) fn into_memory(
        self,
        bytes: u64,
        writers: Writers,
        backing: Backing,
    ) -> Result<SharedMemory, Failed> {
        drop(self.mapping);
        SharedMemory::of(self.file, bytes, writers, backing)
    }
}

fn too_large() -> Failed {
    Failed::at("mmap")(Errno::NOMEM)
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
        let bytes = usize::try_from(bytes).map_err(|_| too_large())?;
        let reserved = bytes
            .checked_next_multiple_of(align)
            .and_then(|bytes| bytes.checked_add(align))
            .ok_or_else(too_large)?;
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

    fn populate(&self, offset: u64, bytes: u64) -> Result<(), Failed> {
        loop {
            match self.advise(offset, bytes, Advice::LinuxPopulateWrite) {
                Err(Errno::INTR | Errno::AGAIN) => {}
                // The fault would have been a SIGBUS: the pool or its control group gave less than it promised.
                Err(Errno::FAULT) => return Err(Failed::at(ADVISE)(Errno::NOMEM)),
                done => return done.map_err(Failed::at(ADVISE)),
            }
        }
    }

    fn advise(&self, offset: u64, bytes: u64, advice: Advice) -> Result<(), Errno> {
        debug_assert!(offset + bytes <= self.bytes as u64);
        let start = self.base.as_ptr().wrapping_add(offset as usize);
        // SAFETY: the range is inside our mapping, and none of the advice we give changes its contents.
        unsafe { rustix::mm::madvise(start.cast(), bytes as usize, advice) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody holds a pointer into it beyond a call on `Segment`.
        let done = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(done.is_ok(), "munmap of our own mapping cannot fail: {done:?}");
    }
}
