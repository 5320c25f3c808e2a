//! Errors of devices: few variants, the native call and code kept.

use std::io;

use crate::SegmentId;

/// The calls of the contract, for errors and for faults on demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    Sample,
    Create,
    Destroy,
    Zero,
    Write,
    Read,
    FillFromFile,
    Copy,
    Importers,
    Export,
}

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The device or the machine has not that many bytes left.
    #[error("{requested} bytes are not to be had; {available} are available")]
    OutOfMemory { requested: u64, available: u64 },
    /// The device is gone; every segment on it is lost.
    #[error("the device is lost: {reason}")]
    Lost { reason: String },
    /// A process that does this for the device ended meanwhile. Nothing is lost by it: the next call starts another one.
    #[error("the process that does {call:?} for the device ended")]
    Interrupted {
        call: Call,
        #[source]
        source: io::Error,
    },
    /// The file to read from failed.
    #[error("the source could not be read")]
    Source(#[source] io::Error),
    /// A call to the driver or the kernel failed.
    #[error("{native} failed in {call:?}")]
    Native {
        call: Call,
        native: &'static str,
        #[source]
        source: io::Error,
    },
    /// The caller broke the contract: a segment that does not exist, a range outside of it, a size that is no
    /// multiple of the granularity, an access that it was not created for.
    #[error("{call:?} on segment {segment:?}: {reason}")]
    Misuse { call: Call, segment: SegmentId, reason: &'static str },
}

impl DeviceError {
    /// This process has as many descriptors open as it may.
    pub fn is_out_of_descriptors(&self) -> bool {
        #[cfg(unix)]
        let codes = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE].map(rustix::io::Errno::raw_os_error);
        #[cfg(windows)]
        let codes = [windows::Win32::Foundation::ERROR_TOO_MANY_OPEN_FILES.0.cast_signed()];
        matches!(self, Self::Native { source, .. } if source.raw_os_error().is_some_and(|code| codes.contains(&code)))
    }
}
