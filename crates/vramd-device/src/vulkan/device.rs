//! The devices `vulkan:N`: the books of what they hold, and the contract's calls.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vramd_api::{DeviceCapabilities, DeviceId};

use super::adapter::Adapter;
use super::context::{Block, Context, Failed, STAGE_BYTES};
use crate::host::Host;
use crate::table::{Extent, Table};
use crate::{Call, DeviceError, ExportAccess, Facts, Range, Sample, SegmentId, Source, Writers};

/// Drivers give memory in pages of their own, of which this is the largest in use.
const GRANULARITY: u64 = 64 << 10;

/// What an administrator may say about an adapter.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// The N of `vulkan:N`.
    pub ordinal: u16,
    /// The most that the device may hold; it is then the device's total.
    pub limit_bytes: Option<u64>,
}

/// One adapter's memory as a device.
#[derive(Debug)]
pub struct Device {
    facts: Facts,
    adapter: Adapter,
    /// Of software adapters: their memory is the machine's.
    host: Option<Host>,
    state: Mutex<State>,
    segments: Table<Segment>,
}

#[derive(Debug, Default)]
struct State {
    /// The size of all segments, those being created included.
    held: u64,
    /// Open while there is a segment.
    context: Weak<Context>,
    lost: Option<String>,
}

/// One block of the card's memory; it goes with this.
struct Segment {
    context: Arc<Context>,
    block: Block,
    bytes: u64,
}

impl Extent for Segment {
    fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        self.context.free(self.block);
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Context")
    }
}

impl Device {
    pub fn open(adapter: Adapter, options: Options) -> Result<Self, DeviceError> {
        let (_, heap_bytes) = adapter.heap();
        let host = adapter.is_software().then(Host::probe).transpose()?;
        let device: DeviceId = format!("vulkan:{}", options.ordinal).parse().expect("of the right form");
        let mut notes = Vec::new();
        if adapter.is_software() {
            notes.push("a software driver: it runs on the processor, in host memory".to_owned());
        }
        if !adapter.has_budget {
            notes.push(
                "the driver has no VK_EXT_memory_budget: what other programs use is not seen".to_owned(),
            );
        }
        let facts = Facts {
            device,
            uuid: adapter.uuid.clone(),
            name: adapter.name.clone(),
            memory_type: adapter.memory_type(),
            total_bytes: options.limit_bytes.map_or(heap_bytes, |limit| limit.min(heap_bytes)),
            granularity_bytes: GRANULARITY,
            page_bytes: 4096,
            capabilities: DeviceCapabilities {
                export: false,
                host_access: false,
                remap: false,
                sparse: false,
                peer_copy: false,
            },
            notes,
        };
        Ok(Self { facts, adapter, host, state: Mutex::default(), segments: Table::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of it is a single step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What could be created now.
    fn available_bytes(&self, held: u64) -> Result<u64, DeviceError> {
        let ours = self.facts.total_bytes.saturating_sub(held);
        let by_driver = self.adapter.budget().map_or(u64::MAX, |(_, available)| available);
        let by_host = self.host.as_ref().map_or(Ok(u64::MAX), Host::available_bytes)?;
        Ok(ours.min(by_driver).min(by_host))
    }

    /// The context, opened if this is the first segment.
    fn context(&self) -> Result<Arc<Context>, Failed> {
        let mut state = self.state();
        if let Some(context) = state.context.upgrade() {
            return Ok(context);
        }
        let context = Arc::new(Context::open(&self.adapter)?);
        state.context = Arc::downgrade(&context);
        Ok(context)
    }

    fn check_lost(&self) -> Result<(), DeviceError> {
        match &self.state().lost {
            Some(reason) => Err(DeviceError::Lost { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    fn explain(&self, call: Call, requested: u64) -> impl FnOnce(Failed) -> DeviceError {
        move |failed| {
            let held = self.state().held;
            let error = failed.explain(call, requested, self.available_bytes(held).unwrap_or_default());
            if let DeviceError::Lost { reason } = &error {
                self.state().lost.get_or_insert_with(|| reason.clone());
            }
            error
        }
    }

    fn make(&self, bytes: u64) -> Result<Segment, Failed> {
        let context = self.context()?;
        let block = context.block(bytes)?;
        let segment = Segment { context, block, bytes };
        // The driver may hand out what another program had.
        segment.context.staged(|stage| stage.zero(&segment.context, block, 0, bytes))?;
        Ok(segment)
    }
}

/// A range's parts that fit into a stage: places in the segment, and offsets in the range.
fn parts(range: Range) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    (0..range.bytes).step_by(STAGE_BYTES as usize).map(move |begin| {
        let end = range.bytes.min(begin + STAGE_BYTES);
        (range.offset + begin, begin as usize..end as usize)
    })
}

impl crate::Device for Device {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sample(&self) -> Result<Sample, DeviceError> {
        self.check_lost()?;
        let held_bytes = self.state().held;
        let available_bytes = self.available_bytes(held_bytes)?;
        Ok(Sample { used_bytes: self.facts.total_bytes - available_bytes, available_bytes, held_bytes })
    }

    fn create(&self, segment: SegmentId, bytes: u64, _: Writers) -> Result<(), DeviceError> {
        self.segments.check_new(segment, bytes, self.facts.granularity_bytes)?;
        self.check_lost()?;
        {
            let mut state = self.state();
            let available = self.available_bytes(state.held)?;
            if bytes > available {
                return Err(DeviceError::OutOfMemory { requested: bytes, available });
            }
            state.held += bytes;
        }
        self.make(bytes)
            .map_err(self.explain(Call::Create, bytes))
            .and_then(|made| self.segments.insert(segment, made))
            .inspect_err(|_| self.state().held -= bytes)
    }

    fn destroy(&self, segment: SegmentId) -> Result<(), DeviceError> {
        let removed = self.segments.remove(segment)?;
        let bytes = removed.bytes;
        drop(removed);
        self.state().held -= bytes;
        Ok(())
    }

    fn zero(&self, range: Range) -> Result<(), DeviceError> {
        let target = self.segments.get_range(Call::Zero, range)?;
        self.check_lost()?;
        let context = &target.context;
        // The driver fills whole words; the bytes at the ends are copied.
        let end = range.offset + range.bytes;
        let first = range.offset.next_multiple_of(4).min(end);
        let last = (end & !3).max(first);
        let zeroed = context.staged(|stage| {
            for (from, to) in [(range.offset, first), (last, end)].into_iter().filter(|(from, to)| from < to)
            {
                stage.bytes((to - from) as usize).fill(0);
                stage.push(context, target.block, from, to - from)?;
            }
            if first < last { stage.zero(context, target.block, first, last - first) } else { Ok(()) }
        });
        zeroed.map_err(self.explain(Call::Zero, range.bytes))
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let range = Range { segment, offset, bytes: bytes.len() as u64 };
        let target = self.segments.get_range(Call::Write, range)?;
        self.check_lost()?;
        let context = &target.context;
        let written = context.staged(|stage| {
            parts(range).try_for_each(|(at, part)| {
                let size = part.len() as u64;
                stage.bytes(part.len()).copy_from_slice(&bytes[part]);
                stage.push(context, target.block, at, size)
            })
        });
        written.map_err(self.explain(Call::Write, range.bytes))
    }

    fn read(&self, segment: SegmentId, offset: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let range = Range { segment, offset, bytes: bytes.len() as u64 };
        let source = self.segments.get_range(Call::Read, range)?;
        self.check_lost()?;
        let context = &source.context;
        let read = context.staged(|stage| {
            parts(range).try_for_each(|(at, part)| {
                stage.pull(context, source.block, at, part.len() as u64)?;
                let size = part.len();
                bytes[part].copy_from_slice(stage.bytes(size));
                Ok(())
            })
        });
        read.map_err(self.explain(Call::Read, range.bytes))
    }

    fn copy(&self, from: Range, to: SegmentId, to_offset: u64) -> Result<(), DeviceError> {
        let (source, target) = self.segments.get_copy(from, to, to_offset)?;
        self.check_lost()?;
        if from.bytes == 0 {
            return Ok(());
        }
        let context = &source.context;
        let places = ((source.block.buffer, from.offset), (target.block.buffer, to_offset));
        context
            .staged(|stage| stage.copy(context, places.0, places.1, from.bytes))
            .map_err(self.explain(Call::Copy, from.bytes))
    }

    fn fill_from_file(&self, range: Range, source: &Source, source_offset: u64) -> Result<(), DeviceError> {
        let target = self.segments.get_range(Call::FillFromFile, range)?;
        self.check_lost()?;
        let context = &target.context;
        let mut unread = None;
        let filled = context.staged(|stage| {
            for (at, part) in parts(range) {
                let size = part.len() as u64;
                if let Err(error) = source.read(stage.bytes(part.len()), source_offset + part.start as u64) {
                    unread = Some(error);
                    return Ok(());
                }
                stage.push(context, target.block, at, size)?;
            }
            Ok(())
        });
        filled.map_err(self.explain(Call::FillFromFile, range.bytes))?;
        unread.map_or(Ok(()), |error| Err(DeviceError::Source(error)))
    }

    fn importers(&self, segment: SegmentId, _: &[u32]) -> Result<Vec<u32>, DeviceError> {
        // Nothing is exported.
        self.segments.get(Call::Importers, segment).map(|_| Vec::new())
    }

    fn export(&self, segment: SegmentId, _: ExportAccess) -> Result<OwnedFd, DeviceError> {
        self.segments.get(Call::Export, segment)?;
        let reason = "this backend does not export memory";
        Err(DeviceError::Misuse { call: Call::Export, segment, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device as _;

    #[test]
    fn the_driver_is_open_only_while_there_is_a_segment() {
        let Some(adapter) = crate::vulkan::discover().ok().and_then(|adapters| adapters.into_iter().next())
        else {
            return eprintln!("SKIPPED: no Vulkan driver is installed");
        };
        let device = Device::open(adapter, Options::default()).unwrap();
        let is_open = || device.state().context.upgrade().is_some();
        device.sample().unwrap();
        assert!(!is_open());
        for _ in 0..2 {
            let ids = [SegmentId(1), SegmentId(2)];
            for id in ids {
                device.create(id, GRANULARITY, Writers::DeviceOnly).unwrap();
                assert!(is_open());
            }
            device.destroy(ids[0]).unwrap();
            assert!(is_open());
            device.destroy(ids[1]).unwrap();
            assert!(!is_open());
        }
    }
}
