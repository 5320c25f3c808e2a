//! Reading a file into memory by the straightest way: past the page cache where everything is aligned for it.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::slice;

/// The alignment of offset, address and length that every file system accepts for direct reads.
pub(crate) const DIRECT_ALIGN: usize = 4096;

/// Large enough for a disk to run at its speed, small enough to notice a lost device in between.
pub(crate) const READ_BYTES: usize = 4 << 20;

/// An open file to fill memory from.
#[derive(Debug)]
pub struct Source {
    /// Opened for direct reads (`O_DIRECT`, `FILE_FLAG_NO_BUFFERING`) where the file system takes that.
    pub direct: Option<File>,
    /// The same file, buffered: for unaligned heads and tails, and where `direct` is missing.
    pub buffered: File,
}

impl Source {
    pub(crate) fn read(&self, target: &mut [u8], offset: u64) -> io::Result<()> {
        // SAFETY: the slice is writable and ours alone.
        unsafe { self.read_into(target.as_mut_ptr(), target.len(), offset) }
    }

    /// Reads exactly `bytes` from `offset` on. The middle goes past the page cache if `target` and `offset` are
    /// the same distance from a multiple of 4096; otherwise all of it is buffered.
    ///
    /// # Safety
    /// `bytes` bytes at `target` must be writable, and no other thread of this process may use them meanwhile.
    pub(crate) unsafe fn read_into(&self, target: *mut u8, bytes: usize, offset: u64) -> io::Result<()> {
        if offset.checked_add(bytes as u64).is_none_or(|end| end > i64::MAX as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut direct =
            self.direct.as_ref().filter(|_| target.addr() % DIRECT_ALIGN == offset as usize % DIRECT_ALIGN);
        let mut done = 0;
        while done < bytes {
            let at = offset + done as u64;
            let left = bytes - done;
            let misaligned = at as usize % DIRECT_ALIGN;
            let (file, count) = match direct {
                Some(file) if misaligned == 0 && left >= DIRECT_ALIGN => {
                    (file, (left - left % DIRECT_ALIGN).min(READ_BYTES))
                }
                Some(_) => (&self.buffered, (DIRECT_ALIGN - misaligned).min(left)),
                None => (&self.buffered, left.min(READ_BYTES)),
            };
            // SAFETY: inside of what the caller vouches for. `MaybeUninit` claims nothing about contents that
            // another process may change at any time, and only the kernel writes through the slice.
            let part =
                unsafe { slice::from_raw_parts_mut(target.add(done).cast::<MaybeUninit<u8>>(), count) };
            match read_at(file, part, at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Some file systems take the flag and then refuse the read.
                Err(error)
                    if error.kind() == io::ErrorKind::InvalidInput
                        && direct.is_some_and(|direct| std::ptr::eq(direct, file)) =>
                {
                    direct = None;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(unix)]
fn read_at(file: &File, into: &mut [MaybeUninit<u8>], offset: u64) -> io::Result<usize> {
    let (read, _) = rustix::io::pread(file, into, offset)?;
    Ok(read.len())
}

#[cfg(windows)]
fn read_at(file: &File, into: &mut [MaybeUninit<u8>], offset: u64) -> io::Result<usize> {
    // SAFETY: a mapping or a buffer of ours, both made with contents, and only the system writes through the slice.
    let into = unsafe { slice::from_raw_parts_mut(into.as_mut_ptr().cast::<u8>(), into.len()) };
    std::os::windows::fs::FileExt::seek_read(file, into, offset)
}
