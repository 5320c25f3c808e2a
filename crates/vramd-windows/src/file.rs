//! Open files.

use std::fs::File;
use std::io;
use std::os::windows::ffi::OsStringExt as _;
use std::os::windows::io::{AsRawHandle as _, FromRawHandle as _};
use std::path::PathBuf;

use windows::Win32::Foundation::{GENERIC_READ, HANDLE};
use windows::Win32::Storage::FileSystem::{
    BY_HANDLE_FILE_INFORMATION, FILE_FLAG_NO_BUFFERING, FILE_NAME_NORMALIZED, FILE_SHARE_DELETE,
    FILE_SHARE_READ, FILE_SHARE_WRITE, GETFINALPATHNAMEBYHANDLE_FLAGS, GetFileInformationByHandle,
    GetFinalPathNameByHandleW, ReOpenFile,
};

use crate::system;

/// By which an open file is known, whatever its names: its volume's number, and its own on it.
pub fn file_number(file: &File) -> io::Result<(u64, u64)> {
    let mut found = BY_HANDLE_FILE_INFORMATION::default();
    // SAFETY: the handle lives, and so does what is written to.
    unsafe { GetFileInformationByHandle(HANDLE(file.as_raw_handle()), &mut found) }.map_err(system)?;
    let number = u64::from(found.nFileIndexHigh) << 32 | u64::from(found.nFileIndexLow);
    Ok((u64::from(found.dwVolumeSerialNumber), number))
}

/// Where an open file or directory is, with all links followed, in the form that [`std::fs::canonicalize`] answers.
pub fn final_path(file: &File) -> io::Result<PathBuf> {
    let handle = HANDLE(file.as_raw_handle());
    let flags = GETFINALPATHNAMEBYHANDLE_FLAGS(FILE_NAME_NORMALIZED.0);
    let mut units = vec![0_u16; 512];
    loop {
        // SAFETY: the handle lives, and the buffer says how long it is.
        let length = unsafe { GetFinalPathNameByHandleW(handle, &mut units, flags) } as usize;
        if length == 0 {
            return Err(io::Error::last_os_error());
        }
        if length < units.len() {
            return Ok(std::ffi::OsString::from_wide(&units[..length]).into());
        }
        units.resize(length + 1, 0);
    }
}

/// The same file, read past the system's cache.
pub fn reopen_direct(file: &File) -> io::Result<File> {
    let share = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
    // SAFETY: the handle lives; the one that comes is ours.
    unsafe {
        let reopened =
            ReOpenFile(HANDLE(file.as_raw_handle()), GENERIC_READ.0, share, FILE_FLAG_NO_BUFFERING)
                .map_err(system)?;
        Ok(File::from_raw_handle(reopened.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_where_it_was_opened() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a file");
        std::fs::write(&path, "text").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(final_path(&file).unwrap(), path.canonicalize().unwrap());
    }
}
