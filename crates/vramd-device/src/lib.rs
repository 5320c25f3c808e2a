//! Memory backends behind one trait.
//!
//! Owns every call of the daemon to a driver or to the kernel's memory management, and all unsafe code that runs in it.
//! It does not decide: what to create, where and for whom is the ledger's business. Each backend is a folder with a
//! `device.rs`; what a backend can do is data ([`Facts`]), never a question of its name.
//!
//! A segment's life: `create → (zero | write | read | copy | fill_from_file | export | …)* → destroy`. A segment is named
//! by a [`SegmentId`] that the caller chose, never by a pointer, so that a backend may keep the memory in
//! another process.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot go on fails"))]

mod card;
pub mod cpu;
#[cfg(unix)]
pub mod cuda;
#[cfg(windows)]
pub mod d3d12;
mod error;
mod host;
mod segment;
pub mod sim;
mod source;
mod staged;
mod table;
pub mod vulkan;

/// What the system calls a way to something of the kernel's that can be handed to another process.
#[cfg(unix)]
pub use std::os::fd::OwnedFd as Descriptor;
#[cfg(windows)]
pub use std::os::windows::io::OwnedHandle as Descriptor;

use std::any::Any;
use std::collections::BTreeMap;

pub use error::{Call, DeviceError};
pub use source::Source;
use vramd_api::attach::Handle;
use vramd_api::{DeviceCapabilities, DeviceId, MemoryType};

/// Names one segment. Never used twice while a daemon runs, whatever the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub u64);

/// What a device is; none of it changes while it is open.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    pub device: DeviceId,
    /// Stable over restarts and processes.
    pub uuid: String,
    /// By which Windows knows the card until it starts again, whatever driver shows it.
    pub luid: Option<u64>,
    /// Where it is on the machine's bus, as `lspci -D` has it; None of what is none of the bus's devices, or a part of one.
    pub pci_address: Option<String>,
    pub name: String,
    pub memory_type: MemoryType,
    pub total_bytes: u64,
    /// A segment's size is a multiple of it. A power of two.
    pub granularity_bytes: u64,
    /// A segment is no larger, however much there is.
    pub max_segment_bytes: u64,
    /// The page size that an importer's mapping has to respect.
    pub page_bytes: u64,
    pub capabilities: DeviceCapabilities,
    /// What was found that costs speed or comfort, in words: a fallback and its reason.
    pub notes: Vec<String>,
}

/// What was measured, now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// As the driver counts it.
    pub used_bytes: u64,
    /// What the driver would still give, before any limit of ours.
    pub available_bytes: u64,
    /// The segments that this process has there, as far as `used_bytes` counts them: those under way included.
    pub held_bytes: u64,
    /// The part of `available_bytes` that this process has made ready, in no segment yet.
    pub ready_bytes: u64,
}

/// Who may write to an exported segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writers {
    /// Only the device itself (`write`, `zero`, `fill_from_file`); no importer ever can, where
    /// [`DeviceCapabilities::read_only_export`] says so, and elsewhere none is to.
    DeviceOnly,
    /// Importers that were handed a writable descriptor too. They can also give the memory behind the segment
    /// back to the system, though never change its size.
    Importers,
}

/// What an importer may do with an exported segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportAccess {
    Read,
    Write,
}

/// A way to a segment's memory for another process.
#[derive(Debug)]
pub struct Exported {
    pub descriptor: Descriptor,
    /// What the descriptor is.
    pub handle: Handle,
}

/// A range of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub segment: SegmentId,
    pub offset: u64,
    pub bytes: u64,
}

/// What a driver has reported of a device by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// In whose numbering: "Xid".
    pub kind: &'static str,
    pub code: u64,
    /// None of those that are not known here.
    pub meaning: Option<&'static str>,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, code, meaning } = self;
        write!(f, "{kind} {code}")?;
        meaning.map_or(Ok(()), |meaning| write!(f, ": {meaning}"))
    }
}

/// A process that uses a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    /// None where the driver does not say.
    pub used_bytes: Option<u64>,
}

/// Puts the bytes that belong at an offset of a range into a part of it.
pub type Fill<'a> = dyn FnMut(u64, &mut [u8]) -> Result<(), DeviceError> + 'a;

/// Gets the bytes at an offset of a range.
pub type Take<'a> = dyn FnMut(u64, &[u8]) -> Result<(), DeviceError> + 'a;

/// The segment that [`Device::adopt`] tries a device with.
const PROBE: SegmentId = SegmentId(u64::MAX);

/// Whether a device makes a segment, zeros it and takes it back.
fn works(device: &dyn Device) -> Result<(), DeviceError> {
    // One that did not go back the last time.
    let _ = device.destroy(PROBE);
    device.create(PROBE, device.facts().granularity_bytes, Writers::DeviceOnly)?;
    device.destroy(PROBE)
}

fn unreachable_memory(segment: SegmentId) -> Result<(), DeviceError> {
    let reason = "the device does not reach the other one's memory";
    Err(DeviceError::Misuse { call: Call::Copy, segment, reason })
}

/// What goes through a buffer of the caller's at once.
const BUFFER_BYTES: u64 = 1 << 20;

/// One contract for all memory. Every call but `facts` and `export` may block, and is not made on an async thread. All take `&self`
/// and may run at the same time from many threads; calls on one segment are ordered by the caller, except that
/// `fill_from_file`, `read`, `read_into`, `write`, `write_from` and `copy` on disjoint ranges of it may overlap, and so may those that only read.
///
/// On an error nothing has changed, except where a method says otherwise. A [`DeviceError::Lost`] is final for
/// every segment: `destroy` still succeeds afterwards, so that the books can be closed and the device be adopted again.
pub trait Device: Any + Send + Sync {
    fn facts(&self) -> &Facts;

    /// Measures the device. Cheap enough to call every 100 ms.
    fn sample(&self) -> Result<Sample, DeviceError>;

    /// What the driver has reported since the last call, of a lost device too. After a report that the device does not outlive it is
    /// lost.
    fn reports(&self) -> Vec<Report> {
        Vec::new()
    }

    /// Takes `bytes` (a multiple of the granularity, above 0) from the driver. On success every page is really
    /// there and reads as zero: a full device is an error here and never a fault later. Pages that only the device writes to may
    /// come with their first use: then that use is refused if others have filled the device meanwhile.
    fn create(&self, segment: SegmentId, bytes: u64, writers: Writers) -> Result<(), DeviceError>;

    /// Gives a segment back. Its bytes are free when this returns, as far as this process holds them.
    fn destroy(&self, segment: SegmentId) -> Result<(), DeviceError>;

    /// Fills a range with zeros.
    fn zero(&self, range: Range) -> Result<(), DeviceError>;

    /// Copies `bytes` into a segment. On an error the range's contents are undefined.
    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Copies out of a segment.
    fn read(&self, segment: SegmentId, offset: u64, bytes: &mut [u8]) -> Result<(), DeviceError>;

    /// Copies into a range what `fill` puts into memory that the device copies from, part by part and in order; `buffer` is
    /// for devices without such memory. An error of `fill` ends it, and is the answer. On an error the range's contents are
    /// undefined.
    fn write_from(&self, range: Range, buffer: &mut Vec<u8>, fill: &mut Fill<'_>) -> Result<(), DeviceError> {
        for (offset, part) in staged::parts(range, BUFFER_BYTES) {
            buffer.resize(part.len(), 0);
            fill(part.start as u64, buffer)?;
            self.write(range.segment, offset, buffer)?;
        }
        Ok(())
    }

    /// Gives a range to `take` in memory that the device copies to, part by part and in order; otherwise as `write_from`.
    fn read_into(&self, range: Range, buffer: &mut Vec<u8>, take: &mut Take<'_>) -> Result<(), DeviceError> {
        for (offset, part) in staged::parts(range, BUFFER_BYTES) {
            buffer.resize(part.len(), 0);
            self.read(range.segment, offset, buffer)?;
            take(part.start as u64, buffer)?;
        }
        Ok(())
    }

    /// Copies a range to `to_offset` of segment `to`, on this device, by the straightest way that it has. The two
    /// ranges are disjoint. On an error the target's contents are undefined and the source is as it was.
    fn copy(&self, from: Range, to: SegmentId, to_offset: u64) -> Result<(), DeviceError>;

    /// Whether [`copy_from`](Self::copy_from) works from segments of another device.
    fn reaches(&self, _other: &dyn Device) -> bool {
        false
    }

    /// Copies a range of another device's segment to `to_offset` of this one's segment `to`, with no way through host memory.
    /// An error other than [`DeviceError::Lost`], which is this device's own, says that this way does not work, now or any more: there
    /// is still that by `read` and `write`. On an error the target's contents are undefined.
    fn copy_from(
        &self,
        _other: &dyn Device,
        from: Range,
        _to: SegmentId,
        _to_offset: u64,
    ) -> Result<(), DeviceError> {
        unreachable_memory(from.segment)
    }

    /// Reads `range.bytes` of `source`, from `source_offset` on, into a range, by the straightest way that the
    /// device has. A file that ends early is [`DeviceError::Source`] with `UnexpectedEof`. On an error the
    /// range's contents are undefined.
    fn fill_from_file(&self, range: Range, source: &Source, source_offset: u64) -> Result<(), DeviceError>;

    /// The processes that use the device, and how much of it, where the driver tells. None: it does not.
    fn processes(&self) -> Result<Option<Vec<Process>>, DeviceError> {
        Ok(None)
    }

    /// How much of the device processes use beside what they map of ours; nothing of those of which the driver does not tell.
    fn used_by(&self, pids: &[u32]) -> Result<BTreeMap<u32, u64>, DeviceError> {
        let Some(all) = self.processes()? else { return Ok(BTreeMap::new()) };
        let used = |pid: u32| match all.iter().find(|one| one.pid == pid) {
            Some(one) => one.used_bytes,
            // Who has not used it yet is not listed.
            None => Some(0),
        };
        Ok(pids.iter().filter_map(|pid| Some((*pid, used(*pid)?))).collect())
    }

    /// Which of `processes` still have a segment's memory mapped or open: its bytes are not back with the system before
    /// these are gone too. This process is not meant. None: the driver does not tell.
    fn importers(&self, segment: SegmentId, processes: &[u32]) -> Result<Option<Vec<u32>>, DeviceError>;

    /// Takes a lost device into use again, if it is back: the error says why not. No segment is left on it, and nobody
    /// makes one meanwhile.
    fn adopt(&self) -> Result<(), DeviceError>;

    /// A descriptor through which another process has the whole segment. The segment stays the device's: the
    /// descriptor only keeps the memory itself alive.
    fn export(&self, segment: SegmentId, access: ExportAccess) -> Result<Exported, DeviceError>;
}
