//! Other processes: who they are, whether they live, and handles for them.

use std::io;
use std::os::windows::ffi::OsStringExt as _;
use std::os::windows::io::{AsHandle, AsRawHandle as _, BorrowedHandle, FromRawHandle as _, OwnedHandle};
use std::path::PathBuf;

use windows::Win32::Foundation::{
    DUPLICATE_CLOSE_SOURCE, DUPLICATE_SAME_ACCESS, DuplicateHandle, HANDLE, WAIT_TIMEOUT,
};
use windows::Win32::System::Pipes::GetNamedPipeClientProcessId;
use windows::Win32::System::ProcessStatus::{GetProcessMemoryInfo, PROCESS_MEMORY_COUNTERS_EX};
use windows::Win32::System::Threading::{
    GetCurrentProcess, OpenProcess, PROCESS_ACCESS_RIGHTS, PROCESS_DUP_HANDLE, PROCESS_NAME_FORMAT,
    PROCESS_QUERY_LIMITED_INFORMATION, PROCESS_SYNCHRONIZE, PROCESS_TERMINATE, QueryFullProcessImageNameW,
    TerminateProcess, WaitForSingleObject,
};
use windows::core::PWSTR;

use crate::system;

/// A process; while this lives, its number is given to no other.
#[derive(Debug)]
pub struct Process {
    pub pid: u32,
    handle: OwnedHandle,
}

/// A handle of another process's, by its value there.
#[derive(Debug)]
#[must_use = "closed in the other process when it is dropped"]
pub struct Given<'a> {
    to: &'a Process,
    value: usize,
}

impl Process {
    pub fn open(pid: u32) -> io::Result<Self> {
        Self::with(pid, PROCESS_QUERY_LIMITED_INFORMATION | PROCESS_SYNCHRONIZE)
    }

    /// The client of a named pipe, so that it can be given handles.
    pub fn client_of(pipe: impl AsHandle) -> io::Result<Self> {
        Self::with(
            client_pid(pipe)?,
            PROCESS_QUERY_LIMITED_INFORMATION | PROCESS_SYNCHRONIZE | PROCESS_DUP_HANDLE,
        )
    }

    /// For [`end`](Self::end).
    pub fn open_to_end(pid: u32) -> io::Result<Self> {
        Self::with(pid, PROCESS_TERMINATE)
    }

    /// Ends it without warning.
    pub fn end(&self) -> io::Result<()> {
        // SAFETY: the handle lives.
        unsafe { TerminateProcess(raw(self.handle.as_handle()), 9) }.map_err(system)
    }

    fn with(pid: u32, rights: PROCESS_ACCESS_RIGHTS) -> io::Result<Self> {
        // SAFETY: a plain question; the handle that comes is ours.
        let handle = unsafe { OpenProcess(rights, false, pid) }.map_err(system)?;
        // SAFETY: as above.
        Ok(Self { pid, handle: unsafe { OwnedHandle::from_raw_handle(handle.0) } })
    }

    /// Whether it has not ended.
    pub fn lives(&self) -> bool {
        // SAFETY: the handle lives.
        unsafe { WaitForSingleObject(raw(self.handle.as_handle()), 0) == WAIT_TIMEOUT }
    }

    /// Its program's file.
    pub fn program(&self) -> io::Result<PathBuf> {
        let mut units = [0_u16; 1024];
        let mut length = units.len() as u32;
        let handle = raw(self.handle.as_handle());
        let (format, name) = (PROCESS_NAME_FORMAT::default(), PWSTR(units.as_mut_ptr()));
        // SAFETY: the handle lives, and the buffer is as long as is said.
        unsafe { QueryFullProcessImageNameW(handle, format, name, &raw mut length) }.map_err(system)?;
        Ok(std::ffi::OsString::from_wide(&units[..length as usize]).into())
    }

    /// What it has in memory that it shares with nobody, at most: what is committed and not touched is not there yet.
    pub fn private_bytes(&self) -> io::Result<u64> {
        let mut counters = PROCESS_MEMORY_COUNTERS_EX::default();
        let size = size_of_val(&counters) as u32;
        let handle = raw(self.handle.as_handle());
        // SAFETY: the handle lives, and the structure, of which the plain counters are the beginning, is as long as is said.
        unsafe { GetProcessMemoryInfo(handle, (&raw mut counters).cast(), size) }.map_err(system)?;
        Ok(counters.PrivateUsage.min(counters.WorkingSetSize) as u64)
    }

    /// Opens in that process what `handle` is here, with the same rights.
    pub fn give(&self, handle: impl AsHandle) -> io::Result<Given<'_>> {
        let mut value = HANDLE::default();
        // SAFETY: all handles live; what comes is a number of the other process's.
        unsafe {
            let to = raw(self.handle.as_handle());
            let handle = raw(handle.as_handle());
            DuplicateHandle(GetCurrentProcess(), handle, to, &raw mut value, 0, false, DUPLICATE_SAME_ACCESS)
        }
        .map_err(system)?;
        Ok(Given { to: self, value: value.0.addr() })
    }
}

impl Given<'_> {
    /// What the other process calls it.
    pub fn value(&self) -> u64 {
        self.value as u64
    }

    /// The other process knows of it: from now on it is that process's to close.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Given<'_> {
    fn drop(&mut self) {
        let mut back = HANDLE::default();
        // SAFETY: the value is one that was opened there and that nobody there was told of. Closing the source is all
        // that this is for: what comes back here is closed too.
        unsafe {
            let (from, options) = (raw(self.to.handle.as_handle()), DUPLICATE_CLOSE_SOURCE);
            let here = GetCurrentProcess();
            if DuplicateHandle(from, HANDLE(self.value as *mut _), here, &raw mut back, 0, false, options)
                .is_ok()
            {
                drop(OwnedHandle::from_raw_handle(back.0));
            }
        }
    }
}

/// The process at the other end of a named pipe that this one serves.
pub fn client_pid(pipe: impl AsHandle) -> io::Result<u32> {
    let mut pid = 0;
    // SAFETY: the handle lives.
    unsafe { GetNamedPipeClientProcessId(raw(pipe.as_handle()), &raw mut pid) }.map_err(system)?;
    Ok(pid)
}

fn raw(handle: BorrowedHandle<'_>) -> HANDLE {
    HANDLE(handle.as_raw_handle())
}

#[cfg(test)]
mod tests {
    use windows::Win32::Foundation::GetHandleInformation;

    use super::*;

    #[test]
    fn this_process_lives_and_is_this_program() {
        let process = Process::open(std::process::id()).unwrap();
        assert!(process.lives());
        // How much, Wine does not count.
        process.private_bytes().unwrap();
        let file = process.program().unwrap();
        assert_eq!(file.file_name(), std::env::current_exe().unwrap().file_name());
        assert!(Process::open(3).is_err(), "no process has an odd number");
    }

    #[test]
    fn what_was_given_and_not_kept_is_closed() {
        let file = tempfile::tempfile().unwrap();
        let process =
            Process::with(std::process::id(), PROCESS_DUP_HANDLE | PROCESS_QUERY_LIMITED_INFORMATION)
                .unwrap();
        let closed = process.give(&file).unwrap().value();
        let mut flags = 0;
        // SAFETY: whether it is a handle is what is asked.
        assert!(unsafe { GetHandleInformation(HANDLE(closed as _), &raw mut flags) }.is_err());
        let given = process.give(&file).unwrap();
        let value = given.value();
        given.keep();
        // SAFETY: this process was given it, and nobody else has it.
        let kept = std::fs::File::from(unsafe { OwnedHandle::from_raw_handle(value as _) });
        kept.set_len(3).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3);
    }
}
