//! Files to fill memory from.

use std::fs::{File, OpenOptions};
use std::io::Write;
#[cfg(unix)]
use std::os::unix::fs::OpenOptionsExt;
#[cfg(windows)]
use std::os::windows::fs::OpenOptionsExt;

use tempfile::NamedTempFile;
use vramd_device::Source;

/// Bytes that differ from page to page, so that a misplaced part shows.
pub fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at.wrapping_mul(31) ^ (at >> 12).wrapping_mul(97)) as u8).collect()
}

pub fn file(contents: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(contents).unwrap();
    file.flush().unwrap();
    file
}

/// As the daemon opens it: direct where the file system of the temporary directory takes it.
pub fn direct(file: &NamedTempFile) -> Source {
    #[cfg(unix)]
    let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    #[cfg(windows)]
    let flags = windows::Win32::Storage::FileSystem::FILE_FLAG_NO_BUFFERING.0;
    let direct = OpenOptions::new().read(true).custom_flags(flags).open(file.path()).ok();
    Source { direct, ..buffered(file) }
}

pub fn buffered(file: &NamedTempFile) -> Source {
    Source { direct: None, buffered: File::open(file.path()).unwrap() }
}
