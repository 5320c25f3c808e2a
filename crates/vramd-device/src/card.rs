//! A card behind a driver: the books of what it holds, and the contract's calls, by way of staging memory.
//!
//! What differs between the interfaces that drivers have is a [`Driver`]. It is open while there is a segment: an idle daemon
//! has nothing open on a card.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::host::Host;
use crate::staged::{self, parts};
use crate::table::{Extent, Table};
use crate::{
    Call, DeviceError, ExportAccess, Exported, Facts, Fill, Range, Sample, SegmentId, Source, Take, Writers,
};

/// What goes through a staging buffer at once.
pub(crate) const STAGE_BYTES: u64 = 4 << 20;
/// What one submission fills or copies at most: others wait for it, and their patience is bounded.
const SUBMIT_BYTES: u64 = 256 << 20;
/// Pieces of memory that are left to staging buffers, of those that the driver allows.
const SPARE_PIECES: u32 = 64;
/// What cards give out without waste: most have pages of this size or take several together.
pub(crate) const GRANULARITY: u64 = 64 << 10;

/// What an administrator may say about an adapter.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// The N of `vulkan:N` or `d3d12:N`.
    pub ordinal: u16,
    /// The most that the device may hold; it is then the device's total.
    pub limit_bytes: Option<u64>,
}

/// A driver that is open for one adapter.
pub trait Driver: Sized + Send + Sync + 'static {
    type Adapter: std::fmt::Debug + Send + Sync;
    /// Memory on the card, and whatever it takes to copy there.
    type Block: Send + Sync;
    /// A buffer of [`STAGE_BYTES`] that the processor sees, and whatever it takes to copy through it.
    type Stage;
    type Failed: Failed;

    fn open(adapter: &Self::Adapter) -> Result<Self, Self::Failed>;

    /// What this process could still get, where the driver says; `held` is what it has.
    fn available_bytes(adapter: &Self::Adapter, held: u64) -> Option<u64>;

    fn block(&self, bytes: u64) -> Result<Self::Block, Self::Failed>;

    /// Gives a block back, once; nothing that was submitted uses it any more.
    fn free(&self, block: &mut Self::Block);

    /// Lends a stage to `work`.
    fn staged<T>(
        &self,
        work: impl FnOnce(&mut Self::Stage) -> Result<T, Self::Failed>,
    ) -> Result<T, Self::Failed>;

    /// The first `bytes` of a stage, as the processor sees them.
    fn bytes(stage: &mut Self::Stage, bytes: usize) -> &mut [u8];

    /// Copies a stage's first bytes to a place in `to`, and waits until they are there.
    fn push(&self, stage: &mut Self::Stage, to: (&Self::Block, u64), bytes: u64) -> Result<(), Self::Failed>;

    /// Copies from a place in `from` to a stage's beginning, and waits until they are there.
    fn pull(
        &self,
        stage: &mut Self::Stage,
        from: (&Self::Block, u64),
        bytes: u64,
    ) -> Result<(), Self::Failed>;

    /// Copies between two places that do not overlap, and waits.
    fn copy(
        &self,
        stage: &mut Self::Stage,
        from: (&Self::Block, u64),
        to: (&Self::Block, u64),
        bytes: u64,
    ) -> Result<(), Self::Failed>;

    /// Fills with zeros, and waits; both ends are multiples of four.
    fn zero(&self, stage: &mut Self::Stage, at: (&Self::Block, u64), bytes: u64) -> Result<(), Self::Failed>;

    /// A way for other processes to a block. Only asked for where the facts name a kind of handle.
    fn export(
        &self,
        adapter: &Self::Adapter,
        block: &Self::Block,
        access: ExportAccess,
    ) -> Result<Exported, Self::Failed>;
}

/// A failed call of a driver, before it is known what it means.
pub trait Failed {
    fn explain(self, call: Call, requested: u64, available: u64) -> DeviceError;
}

/// One adapter's memory as a device.
pub struct Device<D: Driver> {
    facts: Facts,
    adapter: D::Adapter,
    /// How many pieces of memory the driver gives.
    max_count: u32,
    /// Of adapters without memory or figures of their own: theirs is the machine's.
    host: Option<Host>,
    state: Mutex<State>,
    /// Open while there is a segment. Opening may take long: nobody who only wants figures waits for it.
    driver: Mutex<Weak<D>>,
    segments: Table<Segment<D>>,
}

impl<D: Driver> std::fmt::Debug for Device<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("facts", &self.facts).finish_non_exhaustive()
    }
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
struct Segment<D: Driver> {
    driver: Arc<D>,
    block: D::Block,
    bytes: u64,
    writers: Writers,
}

impl<D: Driver> Extent for Segment<D> {
    fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl<D: Driver> Drop for Segment<D> {
    fn drop(&mut self) {
        self.driver.free(&mut self.block);
    }
}

impl<D: Driver> Device<D> {
    pub(crate) fn of(adapter: D::Adapter, facts: Facts, max_count: u32, host: Option<Host>) -> Self {
        let (state, driver, segments) = <(_, _, _)>::default();
        Self { facts, adapter, max_count, host, state, driver, segments }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of it is a single step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What could be created now.
    fn available_bytes(&self, state: &State) -> Result<u64, DeviceError> {
        let ours = self.facts.total_bytes.saturating_sub(state.held);
        let by_driver = D::available_bytes(&self.adapter, state.held - state.pending).unwrap_or(u64::MAX);
        let by_host = self.host.as_ref().map_or(Ok(u64::MAX), Host::available_bytes)?;
        Ok(ours.min(by_driver.min(by_host).saturating_sub(state.pending)))
    }

    /// The driver, opened if this is the first segment.
    fn driver(&self) -> Result<Arc<D>, D::Failed> {
        let mut open = self.driver.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = open.upgrade() {
            return Ok(driver);
        }
        let driver = Arc::new(D::open(&self.adapter)?);
        *open = Arc::downgrade(&driver);
        Ok(driver)
    }

    fn check_lost(&self) -> Result<(), DeviceError> {
        match &self.state().lost {
            Some(reason) => Err(DeviceError::Lost { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    fn explain(&self, call: Call, requested: u64) -> impl FnOnce(D::Failed) -> DeviceError {
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
        let driver = &target.driver;
        let mut stopped = None;
        let filled = driver.staged(|stage| {
            for (offset, part) in parts(range, STAGE_BYTES) {
                if let Err(error) = fill(part.start as u64, D::bytes(stage, part.len())) {
                    stopped = Some(error);
                    return Ok(());
                }
                driver.push(stage, (&target.block, offset), part.len() as u64)?;
            }
            Ok(())
        });
        filled.map_err(self.explain(call, range.bytes))?;
        stopped.map_or(Ok(()), Err)
    }

    fn make(&self, bytes: u64, writers: Writers) -> Result<Segment<D>, D::Failed> {
        let driver = self.driver()?;
        let block = driver.block(bytes)?;
        let segment = Segment { driver, block, bytes, writers };
        // The driver may hand out what another program had.
        segment.zero(0, bytes)?;
        Ok(segment)
    }
}

impl<D: Driver> Segment<D> {
    /// Fills a range whose ends are multiples of four.
    fn zero(&self, offset: u64, bytes: u64) -> Result<(), D::Failed> {
        let range = Range { segment: SegmentId(0), offset, bytes };
        self.driver.staged(|stage| {
            parts(range, SUBMIT_BYTES)
                .try_for_each(|(at, part)| self.driver.zero(stage, (&self.block, at), part.len() as u64))
        })
    }
}

impl<D: Driver> crate::Device for Device<D> {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sample(&self) -> Result<Sample, DeviceError> {
        self.check_lost()?;
        let state = self.state();
        let available_bytes = self.available_bytes(&state)?;
        let used_bytes = self.facts.total_bytes - available_bytes;
        Ok(Sample { used_bytes, available_bytes, held_bytes: state.held, ready_bytes: 0 })
    }

    fn create(&self, segment: SegmentId, bytes: u64, writers: Writers) -> Result<(), DeviceError> {
        self.segments.check_new(segment, bytes, self.facts.granularity_bytes)?;
        self.check_lost()?;
        {
            let mut state = self.state();
            let room = state.count < self.max_count.saturating_sub(SPARE_PIECES);
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
        let driver = &target.driver;
        // The driver fills whole words; the bytes at the ends are copied.
        let end = range.offset + range.bytes;
        let first = range.offset.next_multiple_of(4).min(end);
        let last = (end & !3).max(first);
        let ends = [(range.offset, first), (last, end)].into_iter().filter(|(from, to)| from < to);
        let zeroed = driver.staged(|stage| {
            ends.into_iter().try_for_each(|(from, to)| {
                D::bytes(stage, (to - from) as usize).fill(0);
                driver.push(stage, (&target.block, from), to - from)
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
        let driver = &source.driver;
        let mut stopped = None;
        let read = driver.staged(|stage| {
            for (offset, part) in parts(range, STAGE_BYTES) {
                driver.pull(stage, (&source.block, offset), part.len() as u64)?;
                if let Err(error) = take(part.start as u64, D::bytes(stage, part.len())) {
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
        let driver = &source.driver;
        let copied = driver.staged(|stage| {
            parts(from, SUBMIT_BYTES).try_for_each(|(at, part)| {
                let place = (&target.block, to_offset + part.start as u64);
                driver.copy(stage, (&source.block, at), place, part.len() as u64)
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

    fn adopt(&self) -> Result<(), DeviceError> {
        let Some(reason) = self.state().lost.take() else { return Ok(()) };
        crate::works(self).inspect_err(|_| {
            self.state().lost.get_or_insert(reason);
        })
    }

    fn export(&self, segment: SegmentId, access: ExportAccess) -> Result<Exported, DeviceError> {
        let exported = self.segments.get(Call::Export, segment)?;
        self.check_lost()?;
        let misuse = |reason| DeviceError::Misuse { call: Call::Export, segment, reason };
        if self.facts.capabilities.handle.is_none() {
            return Err(misuse("the driver cannot export memory"));
        }
        if access == ExportAccess::Write && exported.writers == Writers::DeviceOnly {
            return Err(misuse("it was created for the device alone to write"));
        }
        let exporting = exported.driver.export(&self.adapter, &exported.block, access);
        exporting.map_err(self.explain(Call::Export, 0))
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
impl<D: Driver> Device<D> {
    pub(crate) fn is_open(&self) -> bool {
        self.driver.lock().unwrap().upgrade().is_some()
    }
}
