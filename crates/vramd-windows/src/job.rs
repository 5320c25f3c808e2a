//! Job objects: processes that are limited and ended together.

use std::io;
use std::os::windows::io::{AsRawHandle as _, FromRawHandle as _, OwnedHandle};

use windows::Win32::Foundation::HANDLE;
use windows::Win32::System::JobObjects::{
    AssignProcessToJobObject, CreateJobObjectW, JOB_OBJECT_LIMIT_JOB_MEMORY,
    JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE, JOBOBJECT_EXTENDED_LIMIT_INFORMATION,
    JobObjectExtendedLimitInformation, SetInformationJobObject, TerminateJobObject,
};
use windows::Win32::System::Threading::{OpenProcess, PROCESS_SET_QUOTA, PROCESS_TERMINATE};

use crate::system;

/// All that is in it ends with it.
#[derive(Debug)]
pub struct Job(OwnedHandle);

impl Job {
    /// One whose processes together may commit so many bytes.
    pub fn new(limit_bytes: Option<u64>) -> io::Result<Self> {
        // SAFETY: a plain question; the handle that comes is ours.
        let handle = unsafe { CreateJobObjectW(None, None) }.map_err(system)?;
        // SAFETY: as above.
        let job = Self(unsafe { OwnedHandle::from_raw_handle(handle.0) });
        let mut limits = JOBOBJECT_EXTENDED_LIMIT_INFORMATION::default();
        limits.BasicLimitInformation.LimitFlags = JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE;
        if let Some(bytes) = limit_bytes {
            limits.BasicLimitInformation.LimitFlags |= JOB_OBJECT_LIMIT_JOB_MEMORY;
            limits.JobMemoryLimit = usize::try_from(bytes).unwrap_or(usize::MAX);
        }
        let size = size_of::<JOBOBJECT_EXTENDED_LIMIT_INFORMATION>() as u32;
        // SAFETY: the structure is ours and as long as is said, and the handle lives.
        unsafe {
            SetInformationJobObject(
                job.raw(),
                JobObjectExtendedLimitInformation,
                (&raw const limits).cast(),
                size,
            )
        }
        .map_err(system)?;
        Ok(job)
    }

    /// Takes a process in; what it starts from now on is in it too.
    pub fn take_in(&self, pid: u32) -> io::Result<()> {
        // SAFETY: a plain question; the handle that comes is ours.
        let handle =
            unsafe { OpenProcess(PROCESS_SET_QUOTA | PROCESS_TERMINATE, false, pid) }.map_err(system)?;
        // SAFETY: as above.
        let process = unsafe { OwnedHandle::from_raw_handle(handle.0) };
        // SAFETY: both handles live.
        unsafe { AssignProcessToJobObject(self.raw(), HANDLE(process.as_raw_handle())) }.map_err(system)
    }

    /// Ends all that is in it.
    pub fn end(&self) {
        // SAFETY: the handle lives.
        let _ = unsafe { TerminateJobObject(self.raw(), 1) };
    }

    fn raw(&self) -> HANDLE {
        HANDLE(self.0.as_raw_handle())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Process;

    #[test]
    fn what_is_in_a_job_ends_with_it() {
        let mut child = std::process::Command::new("cmd").args(["/c", "pause"]).spawn().unwrap();
        let job = Job::new(Some(1 << 30)).unwrap();
        job.take_in(child.id()).unwrap();
        let process = Process::open(child.id()).unwrap();
        assert!(process.lives());
        drop(job);
        child.wait().unwrap();
        assert!(!process.lives());
    }
}
