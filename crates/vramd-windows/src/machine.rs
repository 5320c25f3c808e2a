//! Figures of the machine.

use std::io;
use std::path::Path;

use windows::Win32::Storage::FileSystem::GetDiskFreeSpaceExW;
use windows::Win32::System::SystemInformation::{GlobalMemoryStatusEx, MEMORYSTATUSEX};
use windows::core::{HSTRING, PCWSTR};

use crate::system;

/// The machine's memory, now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub total_bytes: u64,
    pub available_bytes: u64,
    /// What the system would still promise to programs, of RAM and the page file.
    pub promisable_bytes: u64,
}

pub fn memory() -> io::Result<Memory> {
    for _ in 0..ATTEMPTS {
        let mut status =
            MEMORYSTATUSEX { dwLength: size_of::<MEMORYSTATUSEX>() as u32, ..MEMORYSTATUSEX::default() };
        // SAFETY: the structure is ours and says how long it is.
        unsafe { GlobalMemoryStatusEx(&raw mut status) }.map_err(system)?;
        if status.ullTotalPhys > 0 {
            return Ok(Memory {
                total_bytes: status.ullTotalPhys,
                available_bytes: status.ullAvailPhys,
                promisable_bytes: status.ullAvailPageFile,
            });
        }
        std::thread::yield_now();
    }
    Err(io::Error::other("the system says that the machine has no memory"))
}

/// Wine answers with zeros while another thread asks for the first time.
const ATTEMPTS: u32 = 10_000;

/// What this user may still write to a directory's disk.
pub fn free_bytes(directory: &Path) -> io::Result<u64> {
    let name = HSTRING::from(directory);
    let mut bytes = 0;
    // SAFETY: the name ends with a zero, and the number is ours.
    unsafe { GetDiskFreeSpaceExW(PCWSTR(name.as_ptr()), Some(&raw mut bytes), None, None) }
        .map_err(system)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_asks_first_and_with_others_is_answered() {
        let askers: Vec<_> = (0..8).map(|_| std::thread::spawn(memory)).collect();
        for asker in askers {
            assert!(asker.join().unwrap().unwrap().available_bytes > 0);
        }
    }

    #[test]
    fn there_is_memory_and_room() {
        let memory = memory().unwrap();
        assert!(memory.available_bytes <= memory.total_bytes && memory.promisable_bytes > 0, "{memory:?}");
        assert!(free_bytes(&std::env::temp_dir()).unwrap() > 0);
        assert!(free_bytes(Path::new(r"Z:\there is nothing here")).is_err());
    }
}
