//! The devices `cuda:N`: the books of what they hold, and the contract's calls.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use nvml_wrapper::error::NvmlError;
use vramd_api::attach::{Handle, HandleType};
use vramd_api::{DeviceCapabilities, MemoryType};

use super::adapter::{Adapter, Reports};
use super::driver::{Driver, Failed, Memory, NoDriver, Ordinal};
use super::loader::{Loader, LoaderCommand, Stage, Trouble, lock};
use super::message::{Request, STAGE_BYTES};
use super::xid;
use crate::staged::{self, parts};
use crate::table::{Extent, Table};
use crate::{
    Call, DeviceError, ExportAccess, Exported, Facts, Fill, Process, Range, Report, Sample, SegmentId,
    Source, Take, Writers,
};

/// What a context takes of a card: so much is left for the loader while it is not running.
const CONTEXT_BYTES: u64 = 512 << 20;

/// The granularity of every card so far; the driver's own is asked for when it is first used.
const GRANULARITY: u64 = 2 << 20;

/// What an administrator may say about a card.
#[derive(Debug, Clone)]
pub struct Options {
    /// The most that the device may hold; it is then the device's total.
    pub limit_bytes: Option<u64>,
    pub loader: LoaderCommand,
    /// A loader that nobody has needed for so long ends, and gives its context back.
    pub idle: Duration,
    /// A card that answers nothing for so long is lost.
    pub patience: Duration,
}

impl Options {
    /// As a daemon has them.
    pub fn new(loader: LoaderCommand) -> Self {
        Self { limit_bytes: None, loader, idle: Duration::from_secs(10), patience: Duration::from_mins(1) }
    }
}

/// One card's memory as a device.
#[derive(Debug)]
pub struct Device {
    facts: Facts,
    adapter: Adapter,
    options: Options,
    driver: Arc<Driver>,
    /// The driver's number of the card, once it is in use.
    ordinal: OnceLock<Ordinal>,
    state: Mutex<State>,
    lost: Mutex<Option<String>>,
    /// Running while something is to be copied or filled.
    loader: Mutex<Option<Arc<Loader>>>,
    /// Held while one starts, which takes a while.
    starting: Mutex<()>,
    /// Held while the driver is asked for memory.
    creating: Mutex<()>,
    /// A loader's context counts among what NVML calls used.
    has_context: AtomicBool,
    segments: Table<Segment>,
    /// By their uuids: what is known of the ways from other cards.
    ways: Mutex<BTreeMap<String, Way>>,
    /// None where NVML has no reports of the card.
    reports: Option<Reports>,
    /// Segments that were never handed out, and that the driver has not taken back yet.
    left: Mutex<Vec<Segment>>,
}

/// The way from another card's memory to this one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Bytes that went there have arrived.
    Proven,
    /// The driver said that it works, and it does not.
    Broken,
}

#[derive(Debug, Default)]
struct State {
    /// The size of all segments, those being created included.
    held: u64,
    /// The part of `held` that the driver is being asked for: NVML may not count it as used yet.
    pending: u64,
}

/// Memory of the card; it goes with this.
struct Segment {
    driver: Arc<Driver>,
    id: u64,
    /// None once it is given back. Held while it is exported: the driver may use its number again.
    memory: Mutex<Option<Memory>>,
    bytes: u64,
    writers: Writers,
    /// The loaders of other cards that may have it mapped.
    peers: Mutex<Vec<Weak<Loader>>>,
}

impl std::fmt::Debug for Segment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Segment({})", self.id)
    }
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Driver")
    }
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Loader")
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
        let mut memory = lock(&self.memory);
        if let Some(number) = *memory {
            self.driver.release(number)?;
            *memory = None;
        }
        Ok(())
    }

    fn export(&self) -> Result<std::os::fd::OwnedFd, Failed> {
        let memory = lock(&self.memory);
        self.driver.export((*memory).ok_or(Failed::UNKNOWN)?)
    }
}

impl Segment {
    /// Notes that another card's loader may have it mapped from now on.
    fn note_loader(&self, loader: &Arc<Loader>) {
        let mut peers = lock(&self.peers);
        peers.retain(|peer| peer.strong_count() > 0);
        if !peers.iter().any(|peer| peer.as_ptr() == Arc::as_ptr(loader)) {
            peers.push(Arc::downgrade(loader));
        }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = self.release();
    }
}

impl Device {
    /// Fails without a library that has what is needed here; takes nothing of the card.
    pub fn open(adapter: Adapter, options: Options) -> Result<Self, NoDriver> {
        let driver = Arc::new(Driver::load(&adapter.libraries.cuda)?);
        let total = adapter.total_bytes;
        let facts = Facts {
            device: format!("cuda:{}", adapter.ordinal).parse().expect("of the right form"),
            uuid: adapter.uuid.clone(),
            luid: None,
            pci_address: adapter.pci_address.clone(),
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
                peer_copy: !adapter.peers.is_empty(),
            },
            notes: Vec::new(),
        };
        let reports = adapter.reports().inspect_err(|error| tracing::info!(%error, "no reports of a card"));
        let reports = reports.ok();
        let (ordinal, state, lost, loader, creating) = <(_, _, _, _, _)>::default();
        let (starting, has_context, segments, left) = <(_, _, _, _)>::default();
        Ok(Self {
            facts,
            adapter,
            options,
            driver,
            ordinal,
            state,
            lost,
            loader,
            starting,
            creating,
            has_context,
            segments,
            ways: Mutex::default(),
            reports,
            left,
        })
    }

    /// What is free of the card, what could be created now, and what is held. Asks NVML before it looks at the books: nobody
    /// waits for it.
    fn figures(&self) -> Result<(u64, u64, u64), NvmlError> {
        let free = self.adapter.free_bytes()?;
        let state = lock(&self.state);
        let (free, available) = self.with_books(&state, free);
        Ok((free, available, state.held))
    }

    fn with_books(&self, state: &State, free: u64) -> (u64, u64) {
        let ours = self.facts.total_bytes.saturating_sub(state.held);
        let free = free.saturating_sub(state.pending);
        // Without room for it nothing could be filled or copied any more. One that runs counts as used.
        let context = if self.has_context.load(Ordering::Relaxed) { 0 } else { CONTEXT_BYTES };
        (ours.min(free), ours.min(free.saturating_sub(context)))
    }

    /// The driver's number of the card. The first call begins to use the driver.
    fn ordinal(&self) -> Result<Ordinal, DeviceError> {
        if let Some(ordinal) = self.ordinal.get() {
            return Ok(*ordinal);
        }
        let unfit = |native: &'static str, error: String| DeviceError::Native {
            call: Call::Create,
            native,
            source: std::io::Error::other(error),
        };
        let ordinal = self
            .driver
            .find(self.adapter.id)
            .map_err(|error| unfit("looking for the card", error.to_string()))?;
        let granularity = self.driver.granularity(ordinal).map_err(self.explain_failed(Call::Create, 0))?;
        if !GRANULARITY.is_multiple_of(granularity.max(1)) {
            let text = format!("the driver gives memory in pieces of {granularity} bytes");
            return Err(unfit("cuMemGetAllocationGranularity", text));
        }
        Ok(*self.ordinal.get_or_init(|| ordinal))
    }

    fn running(&self) -> Option<Arc<Loader>> {
        lock(&self.loader).as_ref().filter(|loader| !loader.is_failed()).cloned()
    }

    /// The running loader, or a new one.
    fn loader(&self) -> Result<Arc<Loader>, Trouble> {
        if let Some(loader) = self.running() {
            return Ok(loader);
        }
        let _starting = lock(&self.starting);
        // Another thread may have started one meanwhile.
        if let Some(loader) = self.running() {
            return Ok(loader);
        }
        // The failed one first: it holds memory.
        self.end_loader();
        let loader = Arc::new(Loader::start(&self.options.loader, &self.adapter, self.options.patience)?);
        let mut slot = lock(&self.loader);
        // Whoever loses the card says so first, and then ends what is in the slot.
        if lock(&self.lost).is_some() {
            return Err(Trouble::Gone(std::io::ErrorKind::NotConnected.into()));
        }
        self.has_context.store(true, Ordering::Relaxed);
        *slot = Some(loader.clone());
        Ok(loader)
    }

    /// Ends the loader, if there is one, and waits until it is gone.
    fn end_loader(&self) {
        let mut slot = lock(&self.loader);
        if let Some(loader) = slot.take() {
            loader.kill();
        }
        self.has_context.store(false, Ordering::Relaxed);
    }

    /// Lends a stage to `work`, in whose loader `segments` are mapped.
    fn staged(
        &self,
        segments: &[&Segment],
        work: impl FnOnce(&Arc<Loader>, &mut Stage) -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        let loader = self.loader()?;
        loader.staged(|stage| {
            for segment in segments {
                loader.map(stage, (segment.id, segment.bytes), || segment.export())?;
            }
            work(&loader, stage)
        })
    }

    /// Has a request carried out that needs no staging memory.
    fn ask(&self, segments: &[&Segment], request: Request) -> Result<(), Trouble> {
        self.staged(segments, |loader, stage| loader.ask(stage, request))
    }

    fn check_lost(&self) -> Result<(), DeviceError> {
        lock(&self.lost).as_ref().map_or(Ok(()), |reason| Err(DeviceError::Lost { reason: reason.clone() }))
    }

    fn explain_nvml(&self, error: NvmlError) -> DeviceError {
        if matches!(error, NvmlError::GpuLost) {
            return self.lose("it has fallen off the bus, or cannot be reached (NVML)".to_owned());
        }
        let native = "nvmlDeviceGetMemoryInfo_v2";
        DeviceError::Native { call: Call::Sample, native, source: std::io::Error::other(error) }
    }

    fn lose(&self, reason: String) -> DeviceError {
        let reason = lock(&self.lost).get_or_insert(reason).clone();
        // They are of no more use, and what they have open keeps the card from being reset.
        self.end_loader();
        for segment in self.segments.all() {
            for loader in std::mem::take(&mut *lock(&segment.peers)).iter().filter_map(Weak::upgrade) {
                loader.kill();
            }
        }
        DeviceError::Lost { reason }
    }

    fn explain(&self, call: Call, requested: u64) -> impl FnOnce(Trouble) -> DeviceError {
        move |trouble| {
            let looked = self.figures().map_err(|error| self.explain_nvml(error));
            match looked {
                Err(lost @ DeviceError::Lost { .. }) => lost,
                looked => {
                    let (_, available, _) = looked.unwrap_or_default();
                    match trouble.explain(call, requested, available) {
                        DeviceError::Lost { reason } => self.lose(reason),
                        error => error,
                    }
                }
            }
        }
    }

    fn explain_failed(&self, call: Call, requested: u64) -> impl FnOnce(Failed) -> DeviceError {
        move |failed| self.explain(call, requested)(Trouble::Driver(failed))
    }

    /// Memory of the driver's.
    fn take(&self, bytes: u64) -> Result<Memory, DeviceError> {
        let ordinal = self.ordinal()?;
        self.driver.create(ordinal, bytes).map_err(self.explain_failed(Call::Create, bytes))
    }

    /// Gives back what could not be made. What the driver does not take stays in the books, and is tried again.
    fn give_up(&self, made: Segment) {
        self.unmap(&made);
        match made.release() {
            Ok(()) => lock(&self.state).held -= made.bytes,
            Err(failed) => {
                tracing::warn!(device = %self.facts.device, %failed, "memory is not given back yet");
                lock(&self.left).push(made);
            }
        }
    }

    /// Tries again what [`give_up`](Self::give_up) could not.
    fn release_left(&self) {
        lock(&self.left).retain(|made| {
            let released = made.release().is_ok();
            if released {
                lock(&self.state).held -= made.bytes;
            }
            !released
        });
    }

    /// Has the loaders let go of a segment.
    fn unmap(&self, segment: &Segment) {
        let own = lock(&self.loader).clone();
        let others = std::mem::take(&mut *lock(&segment.peers));
        for loader in own.into_iter().chain(others.iter().filter_map(Weak::upgrade)) {
            loader.forget(segment.id);
        }
    }

    /// Another card, if this one reaches its memory.
    fn peer<'a>(&self, other: &'a dyn crate::Device) -> Option<&'a Self> {
        let other = (other as &dyn Any).downcast_ref::<Self>()?;
        let reaches = self.adapter.peers.contains(&other.adapter.uuid);
        let works = self.way(other) != Some(Way::Broken) && other.check_lost().is_ok();
        (reaches && works).then_some(other)
    }

    fn way(&self, other: &Self) -> Option<Way> {
        lock(&self.ways).get(&other.adapter.uuid).copied()
    }

    /// The way from another card does not work: what could not go there goes by way of host memory.
    fn break_way(&self, other: &Self, why: &dyn std::fmt::Display) {
        let (device, from) = (&self.facts.device, &other.facts.device);
        tracing::warn!(%device, %from, %why, "copies from card to card fail: from now on they go through host memory");
        lock(&self.ways).insert(other.adapter.uuid.clone(), Way::Broken);
    }

    /// Whether what was copied straight has arrived, and was more than zeros, which are there anyway.
    fn has_arrived(&self, other: &Self, from: Range, to: Range) -> Result<Option<bool>, DeviceError> {
        use crate::Device as _;
        let (mut sent, mut arrived) = (Vec::new(), Vec::new());
        let mut differs = false;
        let mut proof = false;
        for (offset, part) in parts(from, STAGE_BYTES as u64) {
            sent.resize(part.len(), 0);
            arrived.resize(part.len(), 0);
            other.read(from.segment, offset, &mut sent).map_err(|error| DeviceError::Interrupted {
                call: Call::Copy,
                source: std::io::Error::other(error.to_string()),
            })?;
            self.read(to.segment, to.offset + part.start as u64, &mut arrived)?;
            differs |= sent != arrived;
            proof |= sent.iter().any(|byte| *byte != 0);
        }
        Ok(if differs { Some(false) } else { proof.then_some(true) })
    }

    /// Ends a loader that nobody needs.
    fn end_idle(&self) {
        // Somebody needs it who has the lock.
        let Ok(mut slot) = self.loader.try_lock() else { return };
        let unneeded = |loader: &mut Arc<Loader>| {
            // Under the lock nobody gets another reference but to have it forget a segment, which its end does too.
            Arc::strong_count(loader) == 1 && (loader.is_failed() || loader.is_idle_for(self.options.idle))
        };
        if let Some(loader) = slot.take_if(unneeded) {
            loader.kill();
            self.has_context.store(false, Ordering::Relaxed);
        }
    }

    /// Copies into a range what `fill` puts into each part of it: an offset in the range, and the part.
    fn fill_parts(&self, (call, range): (Call, Range), fill: &mut Fill<'_>) -> Result<(), DeviceError> {
        let target = self.segments.get_range(call, range)?;
        self.check_lost()?;
        let mut stopped = None;
        if range.bytes > 0 {
            let filled = self.staged(&[&target], |loader, stage| {
                for (offset, part) in parts(range, STAGE_BYTES as u64) {
                    let bytes = part.len() as u64;
                    if let Err(error) = fill(part.start as u64, stage.bytes(part.len())) {
                        stopped = Some(error);
                        return Ok(());
                    }
                    loader.ask(stage, Request::Push { segment: target.id, offset, bytes })?;
                }
                Ok(())
            });
            filled.map_err(self.explain(call, range.bytes))?;
        }
        stopped.map_or(Ok(()), Err)
    }
}

impl crate::Device for Device {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sample(&self) -> Result<Sample, DeviceError> {
        self.check_lost()?;
        self.end_idle();
        self.release_left();
        let figures = self.figures().map_err(|error| self.explain_nvml(error));
        let (free, available_bytes, held_bytes) = figures?;
        Ok(Sample { used_bytes: self.facts.total_bytes - free, available_bytes, held_bytes, ready_bytes: 0 })
    }

    fn create(&self, segment: SegmentId, bytes: u64, writers: Writers) -> Result<(), DeviceError> {
        self.segments.check_new(segment, bytes, self.facts.granularity_bytes)?;
        self.check_lost()?;
        // One at a time: between its figure and the driver's answer nobody else takes what it counts on.
        let creating = lock(&self.creating);
        let free = self.adapter.free_bytes().map_err(|error| self.explain_nvml(error))?;
        {
            let mut state = lock(&self.state);
            let (_, available) = self.with_books(&state, free);
            if bytes > available {
                return Err(DeviceError::OutOfMemory { requested: bytes, available });
            }
            state.held += bytes;
            state.pending += bytes;
        }
        let taken = self.take(bytes);
        // From the driver's answer on NVML counts it as used.
        lock(&self.state).pending -= bytes;
        drop(creating);
        let gone = |_: &DeviceError| lock(&self.state).held -= bytes;
        let memory = Mutex::new(Some(taken.inspect_err(gone)?));
        let (driver, peers) = (self.driver.clone(), Mutex::default());
        let made = Segment { driver, id: segment.0, memory, bytes, writers, peers };
        // The driver hands out what another program had.
        let zeroed = self.ask(&[&made], Request::Zero { segment: made.id, offset: 0, bytes });
        if let Err(trouble) = zeroed {
            self.give_up(made);
            return Err(self.explain(Call::Create, bytes)(trouble));
        }
        self.segments.insert(segment, made).inspect_err(gone)
    }

    fn destroy(&self, segment: SegmentId) -> Result<(), DeviceError> {
        let removed = self.segments.remove(segment)?;
        self.unmap(&removed);
        if let Err(failed) = removed.release() {
            let error = self.explain_failed(Call::Destroy, 0)(failed);
            if self.check_lost().is_ok() {
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
        let zeroed = self.ask(&[&target], Request::Zero { segment: target.id, offset, bytes });
        zeroed.map_err(self.explain(Call::Zero, bytes))
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
        let mut stopped = None;
        if range.bytes > 0 {
            let read = self.staged(&[&source], |loader, stage| {
                for (offset, part) in parts(range, STAGE_BYTES as u64) {
                    let bytes = part.len() as u64;
                    loader.ask(stage, Request::Pull { segment: source.id, offset, bytes })?;
                    if let Err(error) = take(part.start as u64, stage.bytes(part.len())) {
                        stopped = Some(error);
                        return Ok(());
                    }
                }
                Ok(())
            });
            read.map_err(self.explain(Call::Read, range.bytes))?;
        }
        stopped.map_or(Ok(()), Err)
    }

    fn copy(&self, from: Range, to: SegmentId, to_offset: u64) -> Result<(), DeviceError> {
        let (source, target) = self.segments.get_copy(from, to, to_offset)?;
        self.check_lost()?;
        if from.bytes == 0 {
            return Ok(());
        }
        let (from_offset, bytes) = (from.offset, from.bytes);
        let request = Request::Copy { from: source.id, from_offset, to: target.id, to_offset, bytes };
        self.ask(&[&source, &target], request).map_err(self.explain(Call::Copy, bytes))
    }

    fn reaches(&self, other: &dyn crate::Device) -> bool {
        self.peer(other).is_some()
    }

    fn copy_from(
        &self,
        other: &dyn crate::Device,
        from: Range,
        to: SegmentId,
        to_offset: u64,
    ) -> Result<(), DeviceError> {
        let Some(peer) = self.peer(other) else { return crate::unreachable_memory(from.segment) };
        let (from_offset, bytes) = (from.offset, from.bytes);
        if self.segments.get(Call::Copy, from.segment).is_ok() {
            return crate::unreachable_memory(from.segment);
        }
        let source = peer.segments.get_range(Call::Copy, from)?;
        let target = self.segments.get_range(Call::Copy, Range { segment: to, offset: to_offset, bytes })?;
        self.check_lost()?;
        if bytes == 0 {
            return Ok(());
        }
        // Until then it is this card's own trouble.
        let mut under_way = false;
        let copied = self.staged(&[&target], |loader, stage| {
            under_way = true;
            source.note_loader(loader);
            loader.map(stage, (source.id, source.bytes), || source.export())?;
            loader.ask(stage, Request::Copy { from: source.id, from_offset, to: target.id, to_offset, bytes })
        });
        if let Err(trouble) = copied {
            let reason = format!("{trouble:?}");
            let error = match trouble {
                Trouble::Driver(failed) if under_way => {
                    if !failed.is_out_of_memory() {
                        self.break_way(peer, &reason);
                    }
                    DeviceError::Interrupted { call: Call::Copy, source: std::io::Error::other(reason) }
                }
                // Nobody knows which of the two it is that does nothing.
                Trouble::Hangs(_) if under_way => {
                    self.break_way(peer, &reason);
                    DeviceError::Interrupted { call: Call::Copy, source: std::io::Error::other(reason) }
                }
                trouble => self.explain(Call::Copy, bytes)(trouble),
            };
            return Err(error);
        }
        if self.way(peer).is_none() {
            // Machines are known whose driver says that it works, where it does not.
            let arrived = self.has_arrived(peer, from, Range { segment: to, offset: to_offset, bytes })?;
            match arrived {
                Some(true) => {
                    lock(&self.ways).insert(peer.adapter.uuid.clone(), Way::Proven);
                }
                Some(false) => {
                    let reason = "other bytes arrived than were sent";
                    self.break_way(peer, &reason);
                    let source = std::io::Error::other(reason);
                    return Err(DeviceError::Interrupted { call: Call::Copy, source });
                }
                None => {}
            }
        }
        Ok(())
    }

    fn fill_from_file(&self, range: Range, source: &Source, source_offset: u64) -> Result<(), DeviceError> {
        self.fill_parts((Call::FillFromFile, range), &mut |at, part| {
            source.read(part, source_offset + at).map_err(DeviceError::Source)
        })
    }

    fn reports(&self) -> Vec<Report> {
        let Some(reports) = &self.reports else { return Vec::new() };
        let found = match reports.take() {
            Ok(found) => found,
            Err(error) => {
                self.explain_nvml(error);
                return Vec::new();
            }
        };
        if let Some(fatal) = found.iter().find(|report| xid::is_fatal(report.code)) {
            self.lose(format!("{fatal} (NVML)"));
        }
        found
    }

    fn processes(&self) -> Result<Option<Vec<Process>>, DeviceError> {
        self.check_lost()?;
        self.adapter.processes().map(Some).map_err(|error| self.explain_nvml(error))
    }

    fn importers(&self, segment: SegmentId, _: &[u32]) -> Result<Option<Vec<u32>>, DeviceError> {
        self.segments.get(Call::Importers, segment).map(|_| None)
    }

    fn adopt(&self) -> Result<(), DeviceError> {
        // What it reported is of the time before.
        while !self.reports().is_empty() {}
        let Some(reason) = lock(&self.lost).take() else { return Ok(()) };
        lock(&self.ways).clear();
        crate::works(self).inspect_err(|_| {
            lock(&self.lost).get_or_insert(reason);
            self.end_loader();
        })
    }

    fn export(&self, segment: SegmentId, access: ExportAccess) -> Result<Exported, DeviceError> {
        let exported = self.segments.get(Call::Export, segment)?;
        self.check_lost()?;
        if access == ExportAccess::Write && exported.writers == Writers::DeviceOnly {
            let reason = "it was created for the device alone to write";
            return Err(DeviceError::Misuse { call: Call::Export, segment, reason });
        }
        // Without a look at NVML: this may not block.
        let descriptor = exported.export().map_err(|failed| failed.explain(Call::Export, 0, 0))?;
        let handle = Handle::CudaPosixFd { device_uuid: self.adapter.uuid.clone() };
        Ok(Exported { descriptor, handle })
    }
}
