//! The devices `cuda:N`: the books of what they hold, and the contract's calls.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nvml_wrapper::error::NvmlError;
use vramd_api::attach::{Handle, HandleType};
use vramd_api::{DeviceCapabilities, MemoryType};

use super::adapter::Adapter;
use super::driver::{Driver, Failed, Memory, NoDriver, Ordinal};
use super::loader::{Loader, LoaderCommand, Stage, Trouble};
use super::message::{Request, STAGE_BYTES};
use crate::table::{Extent, Table};
use crate::{Call, DeviceError, ExportAccess, Exported, Facts, Range, Sample, SegmentId, Source, Writers};

/// A loader that nobody has needed for so long ends, and gives its context back.
const IDLE: Duration = Duration::from_secs(10);

/// What a context takes of a card: so much is left for the loader while it is not running.
const CONTEXT_BYTES: u64 = 512 << 20;

/// The granularity of every card so far; the driver's own is asked for when it is opened.
const GRANULARITY: u64 = 2 << 20;

/// What an administrator may say about a card.
#[derive(Debug, Clone)]
pub struct Options {
    /// The N of `cuda:N`.
    pub ordinal: u16,
    /// The most that the device may hold; it is then the device's total.
    pub limit_bytes: Option<u64>,
    pub loader: LoaderCommand,
}

/// One card's memory as a device.
#[derive(Debug)]
pub struct Device {
    facts: Facts,
    adapter: Adapter,
    command: LoaderCommand,
    state: Mutex<State>,
    /// Loaded with the first segment.
    driver: Mutex<Option<Arc<Opened>>>,
    /// Running while something is to be copied or filled.
    loader: Mutex<Option<Arc<Loader>>>,
    /// A loader's context counts among what NVML calls used.
    has_context: AtomicBool,
    segments: Table<Segment>,
}

#[derive(Debug, Default)]
struct State {
    /// The size of all segments, those being created included.
    held: u64,
    /// The part of `held` that NVML may not count as used yet.
    pending: u64,
    lost: Option<String>,
}

/// The driver, and which of its cards this is.
struct Opened {
    driver: Driver,
    ordinal: Ordinal,
}

/// Memory of the card; it goes with this.
struct Segment {
    opened: Arc<Opened>,
    id: u64,
    memory: Memory,
    released: AtomicBool,
    bytes: u64,
    writers: Writers,
    /// The number of the loader that has mapped it last.
    mapped_by: Mutex<u64>,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opened")
    }
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Extent for Segment {
    fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Segment {
    /// Gives the memory back, once.
    fn release(&self) -> Result<(), Failed> {
        if !self.released.load(Ordering::Relaxed) {
            self.opened.driver.release(self.memory)?;
            self.released.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Has a loader map it, unless it has.
    fn map(&self, loader: &Loader, stage: &mut Stage) -> Result<(), Trouble> {
        let mut mapped_by = lock(&self.mapped_by);
        if *mapped_by != loader.number {
            let descriptor = self.opened.driver.export(self.memory)?;
            stage.import(self.id, self.bytes, &descriptor)?;
            *mapped_by = loader.number;
        }
        Ok(())
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = self.release();
    }
}

impl Device {
    pub fn open(adapter: Adapter, options: Options) -> Result<Self, DeviceError> {
        let total = adapter.total_bytes;
        let facts = Facts {
            device: format!("cuda:{}", options.ordinal).parse().expect("of the right form"),
            uuid: adapter.uuid.clone(),
            name: adapter.name.clone(),
            memory_type: MemoryType::Vram,
            total_bytes: options.limit_bytes.map_or(total, |limit| limit.min(total)),
            granularity_bytes: GRANULARITY,
            max_segment_bytes: !(GRANULARITY - 1),
            page_bytes: GRANULARITY,
            capabilities: DeviceCapabilities {
                handle: Some(HandleType::CudaPosixFd),
                read_only_export: false,
                host_access: false,
                remap: false,
                sparse: false,
                peer_copy: false,
            },
            notes: Vec::new(),
        };
        let (state, driver, loader, has_context, segments) = <(_, _, _, _, _)>::default();
        let command = options.loader;
        Ok(Self { facts, adapter, command, state, driver, loader, has_context, segments })
    }

    /// What is free of it, and what could be created now.
    fn free_and_available(&self, state: &State) -> Result<(u64, u64), NvmlError> {
        let ours = self.facts.total_bytes.saturating_sub(state.held);
        let free = self.adapter.free_bytes()?.saturating_sub(state.pending);
        // Without room for it nothing could be filled or copied any more. One that runs counts as used.
        let context = if self.has_context.load(Ordering::Relaxed) { 0 } else { CONTEXT_BYTES };
        Ok((ours.min(free), ours.min(free.saturating_sub(context))))
    }

    fn available_bytes(&self, state: &State) -> Result<u64, NvmlError> {
        self.free_and_available(state).map(|(_, available)| available)
    }

    fn opened(&self) -> Result<Arc<Opened>, DeviceError> {
        let mut slot = lock(&self.driver);
        if let Some(opened) = &*slot {
            return Ok(opened.clone());
        }
        let unfit = |native: &'static str, error: String| DeviceError::Native {
            call: Call::Create,
            native,
            source: std::io::Error::other(error),
        };
        let driver = Driver::load(&self.adapter.libraries.cuda)
            .map_err(|error| unfit("loading libcuda.so.1", error.to_string()))?;
        let visible = driver
            .visible()
            .map_err(|failed| unfit("cuDeviceGetUuid_v2", NoDriver::from(failed).to_string()))?;
        let found = visible.into_iter().find(|(_, id)| *id == self.adapter.id);
        let (ordinal, _) = found.ok_or_else(|| {
            unfit("cuDeviceGetUuid_v2", "the CUDA driver does not show this card".to_owned())
        })?;
        let granularity = driver.granularity(ordinal).map_err(self.explain_failed(Call::Create, 0))?;
        if !GRANULARITY.is_multiple_of(granularity.max(1)) {
            let text = format!("the driver gives memory in pieces of {granularity} bytes");
            return Err(unfit("cuMemGetAllocationGranularity", text));
        }
        let opened = Arc::new(Opened { driver, ordinal });
        *slot = Some(opened.clone());
        Ok(opened)
    }

    /// The running loader, or a new one.
    fn loader(&self) -> Result<Arc<Loader>, Trouble> {
        let mut slot = lock(&self.loader);
        if let Some(loader) = slot.as_ref().filter(|loader| !loader.is_failed()) {
            return Ok(loader.clone());
        }
        // The failed one first: it holds memory.
        self.end(&mut slot);
        let loader = Loader::start(&self.command, &self.adapter.libraries.cuda, self.adapter.id)?;
        let loader = Arc::new(loader);
        self.has_context.store(true, Ordering::Relaxed);
        *slot = Some(loader.clone());
        Ok(loader)
    }

    /// Lends a stage to `work`, in whose loader `segments` are mapped.
    fn staged<T>(
        &self,
        segments: &[&Segment],
        work: impl FnOnce(&mut Stage) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        let loader = self.loader()?;
        loader.staged(|stage| {
            segments.iter().try_for_each(|segment| segment.map(&loader, stage))?;
            work(stage)
        })
    }

    fn check_lost(&self) -> Result<(), DeviceError> {
        match &lock(&self.state).lost {
            Some(reason) => Err(DeviceError::Lost { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// After a failure: what the card has still, or that it is gone.
    fn look(&self) -> Result<u64, DeviceError> {
        let state = lock(&self.state);
        let looked = self.available_bytes(&state);
        drop(state);
        looked.map_err(|error| self.explain_nvml(error))
    }

    fn explain_nvml(&self, error: NvmlError) -> DeviceError {
        if matches!(error, NvmlError::GpuLost) {
            return self.lose("it has fallen off the bus, or cannot be reached (NVML)".to_owned());
        }
        let native = "nvmlDeviceGetMemoryInfo_v2";
        DeviceError::Native { call: Call::Sample, native, source: std::io::Error::other(error) }
    }

    fn lose(&self, reason: String) -> DeviceError {
        let mut state = lock(&self.state);
        DeviceError::Lost { reason: state.lost.get_or_insert(reason).clone() }
    }

    fn explain(&self, call: Call, requested: u64) -> impl FnOnce(Trouble) -> DeviceError {
        move |trouble| match self.look() {
            Err(lost @ DeviceError::Lost { .. }) => lost,
            looked => match trouble.explain(call, requested, looked.unwrap_or_default()) {
                DeviceError::Lost { reason } => self.lose(reason),
                error => error,
            },
        }
    }

    fn explain_failed(&self, call: Call, requested: u64) -> impl FnOnce(Failed) -> DeviceError {
        move |failed| self.explain(call, requested)(Trouble::Driver(failed))
    }

    fn make(&self, segment: SegmentId, bytes: u64, writers: Writers) -> Result<Segment, DeviceError> {
        let opened = self.opened()?;
        let memory =
            opened.driver.create(opened.ordinal, bytes).map_err(self.explain_failed(Call::Create, bytes))?;
        let made = Segment {
            opened,
            id: segment.0,
            memory,
            released: AtomicBool::new(false),
            bytes,
            writers,
            mapped_by: Mutex::new(0),
        };
        // The driver hands out what another program had.
        let zeroed =
            self.staged(&[&made], |stage| stage.ask(Request::Zero { segment: made.id, offset: 0, bytes }));
        zeroed.inspect_err(|_| self.unmap(&made)).map_err(self.explain(Call::Create, bytes))?;
        Ok(made)
    }

    /// Has the loader let go of a segment; if that fails, its process ends, and lets go of all.
    fn unmap(&self, segment: &Segment) {
        let mut slot = lock(&self.loader);
        let Some(loader) = slot.as_ref() else { return };
        let mut mapped_by = lock(&segment.mapped_by);
        if *mapped_by != loader.number && !loader.is_failed() {
            return;
        }
        *mapped_by = 0;
        let forgotten = !loader.is_failed()
            && loader.staged(|stage| stage.ask(Request::Forget { segment: segment.id })).is_ok();
        if !forgotten {
            self.end(&mut slot);
        }
    }

    /// Ends the loader, and waits until it is gone.
    fn end(&self, slot: &mut Option<Arc<Loader>>) {
        *slot = None;
        self.has_context.store(false, Ordering::Relaxed);
    }

    /// Ends a loader that nobody needs.
    fn end_idle(&self) {
        // Somebody needs it who has the lock.
        let Ok(mut slot) = self.loader.try_lock() else { return };
        if let Some(loader) = slot.take_if(|loader| loader.is_failed() || loader.idle_for() >= IDLE) {
            self.has_context.store(false, Ordering::Relaxed);
            let ended =
                std::thread::Builder::new().name("vramd-loader-end".to_owned()).spawn(move || drop(loader));
            if let Err(error) = ended {
                tracing::debug!(%error, "the loader ends while this thread waits");
            }
        }
    }
}

/// A range's parts of at most a stage: places in the segment, and offsets in the range.
fn parts(range: Range) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    (0..range.bytes).step_by(STAGE_BYTES).map(move |begin| {
        let end = range.bytes.min(begin + STAGE_BYTES as u64);
        (range.offset + begin, begin as usize..end as usize)
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is a single step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl crate::Device for Device {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sample(&self) -> Result<Sample, DeviceError> {
        self.check_lost()?;
        self.end_idle();
        let state = lock(&self.state);
        let held_bytes = state.held;
        let figures = self.free_and_available(&state);
        drop(state);
        let (free, available_bytes) = figures.map_err(|error| self.explain_nvml(error))?;
        Ok(Sample { used_bytes: self.facts.total_bytes - free, available_bytes, held_bytes })
    }

    fn create(&self, segment: SegmentId, bytes: u64, writers: Writers) -> Result<(), DeviceError> {
        self.segments.check_new(segment, bytes, self.facts.granularity_bytes)?;
        self.check_lost()?;
        {
            let mut state = lock(&self.state);
            let available = self.available_bytes(&state);
            let available = match available {
                Ok(available) => available,
                Err(error) => {
                    drop(state);
                    return Err(self.explain_nvml(error));
                }
            };
            if bytes > available {
                return Err(DeviceError::OutOfMemory { requested: bytes, available });
            }
            state.held += bytes;
            state.pending += bytes;
        }
        let made = self.make(segment, bytes, writers);
        lock(&self.state).pending -= bytes;
        made.and_then(|made| self.segments.insert(segment, made))
            .inspect_err(|_| lock(&self.state).held -= bytes)
    }

    fn destroy(&self, segment: SegmentId) -> Result<(), DeviceError> {
        let removed = self.segments.remove(segment)?;
        self.unmap(&removed);
        if let Err(failed) = removed.release() {
            let error = self.explain_failed(Call::Destroy, 0)(failed);
            if !matches!(error, DeviceError::Lost { .. }) {
                self.segments.put_back(segment, removed);
                return Err(error);
            }
        }
        lock(&self.state).held -= removed.bytes;
        Ok(())
    }

    fn zero(&self, range: Range) -> Result<(), DeviceError> {
        let target = self.segments.get_range(Call::Zero, range)?;
        self.check_lost()?;
        let Range { offset, bytes, .. } = range;
        if bytes == 0 {
            return Ok(());
        }
        let zeroed =
            self.staged(&[&target], |stage| stage.ask(Request::Zero { segment: target.id, offset, bytes }));
        zeroed.map_err(self.explain(Call::Zero, bytes))
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let range = Range { segment, offset, bytes: bytes.len() as u64 };
        let target = self.segments.get_range(Call::Write, range)?;
        self.check_lost()?;
        let written = self.staged(&[&target], |stage| {
            parts(range).try_for_each(|(offset, part)| {
                let size = part.len() as u64;
                stage.bytes(part.len()).copy_from_slice(&bytes[part]);
                stage.ask(Request::Push { segment: target.id, offset, bytes: size })
            })
        });
        written.map_err(self.explain(Call::Write, range.bytes))
    }

    fn read(&self, segment: SegmentId, offset: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let range = Range { segment, offset, bytes: bytes.len() as u64 };
        let source = self.segments.get_range(Call::Read, range)?;
        self.check_lost()?;
        let read = self.staged(&[&source], |stage| {
            parts(range).try_for_each(|(offset, part)| {
                let size = part.len();
                stage.ask(Request::Pull { segment: source.id, offset, bytes: size as u64 })?;
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
        let (from_offset, bytes) = (from.offset, from.bytes);
        let request = Request::Copy { from: source.id, from_offset, to: target.id, to_offset, bytes };
        let copied = self.staged(&[&source, &target], |stage| stage.ask(request));
        copied.map_err(self.explain(Call::Copy, bytes))
    }

    fn fill_from_file(&self, range: Range, source: &Source, source_offset: u64) -> Result<(), DeviceError> {
        let target = self.segments.get_range(Call::FillFromFile, range)?;
        self.check_lost()?;
        let mut unread = None;
        let filled = self.staged(&[&target], |stage| {
            for (offset, part) in parts(range) {
                let bytes = part.len() as u64;
                if let Err(error) = source.read(stage.bytes(part.len()), source_offset + part.start as u64) {
                    unread = Some(error);
                    return Ok(());
                }
                stage.ask(Request::Push { segment: target.id, offset, bytes })?;
            }
            Ok(())
        });
        filled.map_err(self.explain(Call::FillFromFile, range.bytes))?;
        unread.map_or(Ok(()), |error| Err(DeviceError::Source(error)))
    }

    fn importers(&self, segment: SegmentId, _: &[u32]) -> Result<Option<Vec<u32>>, DeviceError> {
        self.segments.get(Call::Importers, segment).map(|_| None)
    }

    fn export(&self, segment: SegmentId, access: ExportAccess) -> Result<Exported, DeviceError> {
        let exported = self.segments.get(Call::Export, segment)?;
        self.check_lost()?;
        if access == ExportAccess::Write && exported.writers == Writers::DeviceOnly {
            let reason = "it was created for the device alone to write";
            return Err(DeviceError::Misuse { call: Call::Export, segment, reason });
        }
        let descriptor =
            exported.opened.driver.export(exported.memory).map_err(self.explain_failed(Call::Export, 0))?;
        let handle = Handle::CudaPosixFd { device_uuid: self.adapter.uuid.clone() };
        Ok(Exported { descriptor, handle })
    }
}
