//! Asks the system's own calls, and the registry for names.

use std::collections::BTreeMap;

use vramd_windows::{Memory, Process};
use windows::Win32::System::Registry::{HKEY_LOCAL_MACHINE, RRF_RT_REG_SZ, RegGetValueW};
use windows::core::{HSTRING, PCWSTR};

use crate::{Call, DeviceError};

/// The memory of the machine.
#[derive(Debug)]
pub(crate) struct Host {
    total_bytes: u64,
}

impl Host {
    pub(crate) fn probe() -> Result<Self, DeviceError> {
        Ok(Self { total_bytes: memory()?.total_bytes })
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// What the machine would give now: memory that is free, and that the system would still promise to somebody.
    #[allow(clippy::unused_self, reason = "elsewhere the answer depends on where the machine is read from")]
    pub(crate) fn free_bytes(&self) -> Result<u64, DeviceError> {
        let memory = memory()?;
        Ok(memory.available_bytes.min(memory.promisable_bytes))
    }

    /// The system keeps no pool of large pages.
    #[allow(clippy::unused_self, reason = "as above")]
    pub(crate) fn free_huge_page_bytes(&self) -> u64 {
        0
    }

    /// The memory that processes share with nobody.
    #[allow(clippy::unused_self, reason = "as above")]
    pub(crate) fn private_bytes(&self, pids: &[u32]) -> BTreeMap<u32, u64> {
        let private = |pid: u32| Process::open(pid).and_then(|process| process.private_bytes()).ok();
        pids.iter().filter_map(|pid| Some((*pid, private(*pid)?))).collect()
    }

    /// `host-<machine guid>`, or `host-named-<computer name>`.
    #[allow(clippy::unused_self, reason = "as above")]
    pub(crate) fn uuid(&self) -> String {
        let guid = text(r"SOFTWARE\Microsoft\Cryptography", "MachineGuid");
        match guid.filter(|guid| uuid::Uuid::try_parse(guid).is_ok()) {
            Some(guid) => format!("host-{}", guid.to_ascii_lowercase()),
            None => {
                let name = std::env::var("COMPUTERNAME").unwrap_or_else(|_| "localhost".to_owned());
                format!("host-named-{name}")
            }
        }
    }

    /// The processor's name for people.
    #[allow(clippy::unused_self, reason = "as above")]
    pub(crate) fn processor(&self) -> Option<String> {
        let name = text(r"HARDWARE\DESCRIPTION\System\CentralProcessor\0", "ProcessorNameString")?;
        Some(name.split_whitespace().collect::<Vec<_>>().join(" ")).filter(|name| !name.is_empty())
    }
}

fn memory() -> Result<Memory, DeviceError> {
    vramd_windows::memory().map_err(|source| DeviceError::Native {
        call: Call::Sample,
        native: "GlobalMemoryStatusEx",
        source,
    })
}

/// A value of the registry that is text.
fn text(key: &str, name: &str) -> Option<String> {
    let mut buffer = [0_u16; 256];
    let mut bytes = size_of_val(&buffer) as u32;
    let (key, name) = (HSTRING::from(key), HSTRING::from(name));
    // SAFETY: both names end with a zero, and the buffer is as long as is said.
    let done = unsafe {
        RegGetValueW(
            HKEY_LOCAL_MACHINE,
            PCWSTR(key.as_ptr()),
            PCWSTR(name.as_ptr()),
            RRF_RT_REG_SZ,
            None,
            Some(buffer.as_mut_ptr().cast()),
            Some(&raw mut bytes),
        )
    };
    done.ok().ok()?;
    let units = &buffer[..(bytes as usize / 2).min(buffer.len())];
    Some(String::from_utf16_lossy(units).trim_end_matches('\0').to_owned())
}
