//! The devices `vulkan:N`: the books of what they hold, and the contract's calls.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vramd_api::attach::{Handle, HandleType};
use vramd_api::{DeviceCapabilities, DeviceId, MemoryType};

use super::adapter::Adapter;
use super::context::{Block, Context, Failed, STAGE_BYTES, SUBMIT_BYTES};
use crate::host::Host;
use crate::staged::{self, parts};
use crate::table::{Extent, Table};
use crate::{
    Call, DeviceError, ExportAccess, Exported, Facts, Fill, Range, Sample, SegmentId, Source, Take, Writers,
};

/// What cards give out without waste: most have pages of this size or take several together.
const GRANULARITY: u64 = 64 << 10;
/// Pieces of memory that are left to staging buffers, of those that the driver allows.
const SPARE_PIECES: u32 = 64;

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
    /// Of adapters without memory or figures of their own: theirs is the machine's.
    host: Option<Host>,
    state: Mutex<State>,
    /// Open while there is a segment. Opening may take long: nobody who only wants figures waits for it.
    context: Mutex<Weak<Context>>,
    segments: Table<Segment>,
}

#[derive(Debug, Default)]
struct State {
    /// The size of all segments, those being created included.
    held: u64,
    /// The part of `held` that the driver or the machine may not count as used yet.
    pending: u64,
    /// How many segments there are.
    count: u32,
    lost: Option<String>,
}

/// One block of the card's memory; it goes with this.
struct Segment {
    context: Arc<Context>,
    block: Block,
    bytes: u64,
    writers: Writers,
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
        let shares_host = adapter.is_software() || adapter.memory_type() == MemoryType::Unified;
        let host = (shares_host && !adapter.has_budget).then(Host::probe).transpose()?;
        let device: DeviceId = format!("vulkan:{}", options.ordinal).parse().expect("of the right form");
        let mut notes = Vec::new();
        if adapter.is_software() {
            notes.push("a software driver: it runs on the processor, in host memory".to_owned());
        }
        if !adapter.exports {
            notes.push("the driver cannot export memory: other processes cannot attach it".to_owned());
        }
        if !adapter.has_budget {
            notes.push(
                "the driver has no VK_EXT_memory_budget: what other programs use is not seen".to_owned(),
            );
        }
        let facts = Facts {
            device,
            uuid: adapter.uuid.to_string(),
            name: adapter.name.clone(),
            memory_type: adapter.memory_type(),
            total_bytes: options.limit_bytes.map_or(heap_bytes, |limit| limit.min(heap_bytes)),
            granularity_bytes: GRANULARITY,
            max_segment_bytes: adapter.max_bytes & !(GRANULARITY - 1),
            page_bytes: 4096,
            capabilities: DeviceCapabilities {
                handle: adapter.exports.then_some(HandleType::VulkanOpaqueFd),
                read_only_export: false,
                host_access: false,
                remap: false,
                sparse: false,
                peer_copy: false,
            },
            notes,
        };
        let (state, context, segments) = <(_, _, _)>::default();
        Ok(Self { facts, adapter, host, state, context, segments })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of it is a single step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What could be created now.
    fn available_bytes(&self, state: &State) -> Result<u64, DeviceError> {
        let ours = self.facts.total_bytes.saturating_sub(state.held);
        let by_driver = self.adapter.available_bytes().unwrap_or(u64::MAX);
        let by_host = self.host.as_ref().map_or(Ok(u64::MAX), Host::available_bytes)?;
        Ok(ours.min(by_driver.min(by_host).saturating_sub(state.pending)))
    }

    /// The context, opened if this is the first segment.
    fn context(&self) -> Result<Arc<Context>, Failed> {
        let mut open = self.context.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(context) = open.upgrade() {
            return Ok(context);
        }
        let context = Arc::new(Context::open(&self.adapter)?);
        *open = Arc::downgrade(&context);
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
            let available = self.available_bytes(&self.state()).unwrap_or_default();
            let error = failed.explain(call, requested, available);
            if let DeviceError::Lost { reason } = &error {
                self.state().lost.get_or_insert_with(|| reason.clone());
            }
            error
        }
    }

    /// Copies into a range what `fill` puts into each part of it.
    fn fill_parts(&self, (call, range): (Call, Range), fill: &mut Fill<'_>) -> Result<(), DeviceError> {
        let target = self.segments.get_range(call, range)?;
        self.check_lost()?;
        let context = &target.context;
        let mut stopped = None;
        let filled = context.staged(|stage| {
            for (offset, part) in parts(range, STAGE_BYTES) {
                if let Err(error) = fill(part.start as u64, stage.bytes(part.len())) {
                    stopped = Some(error);
                    return Ok(());
                }
                stage.push(context, target.block, offset, part.len() as u64)?;
            }
            Ok(())
        });
        filled.map_err(self.explain(call, range.bytes))?;
        stopped.map_or(Ok(()), Err)
    }

    fn make(&self, bytes: u64, writers: Writers) -> Result<Segment, Failed> {
        let context = self.context()?;
        let block = context.block(bytes)?;
        let segment = Segment { context, block, bytes, writers };
        // The driver may hand out what another program had.
        segment.zero(0, bytes)?;
        Ok(segment)
    }
}

impl Segment {
    /// Fills a range whose ends are multiples of four.
    fn zero(&self, offset: u64, bytes: u64) -> Result<(), Failed> {
        let range = Range { segment: SegmentId(0), offset, bytes };
        self.context.staged(|stage| {
            parts(range, SUBMIT_BYTES)
                .try_for_each(|(at, part)| stage.zero(&self.context, self.block, at, part.len() as u64))
        })
    }
}

impl crate::Device for Device {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sample(&self) -> Result<Sample, DeviceError> {
        self.check_lost()?;
        let state = self.state();
        let available_bytes = self.available_bytes(&state)?;
        let used_bytes = self.facts.total_bytes - available_bytes;
        Ok(Sample { used_bytes, available_bytes, held_bytes: state.held })
    }

    fn create(&self, segment: SegmentId, bytes: u64, writers: Writers) -> Result<(), DeviceError> {
        self.segments.check_new(segment, bytes, self.facts.granularity_bytes)?;
        self.check_lost()?;
        {
            let mut state = self.state();
            let room = state.count < self.adapter.max_count.saturating_sub(SPARE_PIECES);
            let available = if room { self.available_bytes(&state)? } else { 0 };
            let available = available.min(self.facts.max_segment_bytes);
            if bytes > available {
                return Err(DeviceError::OutOfMemory { requested: bytes, available });
            }
            state.held += bytes;
            state.pending += bytes;
            state.count += 1;
        }
        let made = self.make(bytes, writers);
        let failed = |device: &Self| {
            let mut state = device.state();
            state.held -= bytes;
            state.count -= 1;
        };
        self.state().pending -= bytes;
        let made = made.inspect_err(|_| failed(self)).map_err(self.explain(Call::Create, bytes))?;
        self.segments.insert(segment, made).inspect_err(|_| failed(self))
    }

    fn destroy(&self, segment: SegmentId) -> Result<(), DeviceError> {
        let removed = self.segments.remove(segment)?;
        let bytes = removed.bytes;
        drop(removed);
        let mut state = self.state();
        state.held -= bytes;
        state.count -= 1;
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
        let ends = [(range.offset, first), (last, end)].into_iter().filter(|(from, to)| from < to);
        let zeroed = context.staged(|stage| {
            ends.into_iter().try_for_each(|(from, to)| {
                stage.bytes((to - from) as usize).fill(0);
                stage.push(context, target.block, from, to - from)
            })
        });
        zeroed.and_then(|()| target.zero(first, last - first)).map_err(self.explain(Call::Zero, range.bytes))
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        staged::write(self, segment, offset, bytes)
    }

    fn read(&self, segment: SegmentId, offset: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        staged::read(self, segment, offset, bytes)
    }

    fn write_from(&self, range: Range, _: &mut Vec<u8>, fill: &mut Fill<'_>) -> Result<(), DeviceError> {
        self.fill_parts((Call::Write, range), fill)
    }

    fn read_into(&self, range: Range, _: &mut Vec<u8>, take: &mut Take<'_>) -> Result<(), DeviceError> {
        let source = self.segments.get_range(Call::Read, range)?;
        self.check_lost()?;
        let context = &source.context;
        let mut stopped = None;
        let read = context.staged(|stage| {
            for (offset, part) in parts(range, STAGE_BYTES) {
                stage.pull(context, source.block, offset, part.len() as u64)?;
                if let Err(error) = take(part.start as u64, stage.bytes(part.len())) {
                    stopped = Some(error);
                    return Ok(());
                }
            }
            Ok(())
        });
        read.map_err(self.explain(Call::Read, range.bytes))?;
        stopped.map_or(Ok(()), Err)
    }

    fn copy(&self, from: Range, to: SegmentId, to_offset: u64) -> Result<(), DeviceError> {
        let (source, target) = self.segments.get_copy(from, to, to_offset)?;
        self.check_lost()?;
        let context = &source.context;
        let copied = context.staged(|stage| {
            parts(from, SUBMIT_BYTES).try_for_each(|(at, part)| {
                let place = (target.block.buffer, to_offset + part.start as u64);
                stage.copy(context, (source.block.buffer, at), place, part.len() as u64)
            })
        });
        copied.map_err(self.explain(Call::Copy, from.bytes))
    }

    fn fill_from_file(&self, range: Range, source: &Source, source_offset: u64) -> Result<(), DeviceError> {
        self.fill_parts((Call::FillFromFile, range), &mut |at, part| {
            source.read(part, source_offset + at).map_err(DeviceError::Source)
        })
    }

    fn importers(&self, segment: SegmentId, _: &[u32]) -> Result<Option<Vec<u32>>, DeviceError> {
        self.segments.get(Call::Importers, segment).map(|_| None)
    }

    fn export(&self, segment: SegmentId, access: ExportAccess) -> Result<Exported, DeviceError> {
        let exported = self.segments.get(Call::Export, segment)?;
        self.check_lost()?;
        let misuse = |reason| DeviceError::Misuse { call: Call::Export, segment, reason };
        if !self.adapter.exports {
            return Err(misuse("the driver cannot export memory"));
        }
        if access == ExportAccess::Write && exported.writers == Writers::DeviceOnly {
            return Err(misuse("it was created for the device alone to write"));
        }
        let (descriptor, memory) =
            exported.context.export(exported.block).map_err(self.explain(Call::Export, 0))?;
        let handle = Handle::VulkanOpaqueFd {
            device_uuid: self.adapter.uuid,
            driver_uuid: self.adapter.driver_uuid,
            memory_type_index: memory.memory_type,
            allocation_bytes: memory.bytes,
        };
        Ok(Exported { descriptor, handle })
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
        let is_open = || device.context.lock().unwrap().upgrade().is_some();
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
