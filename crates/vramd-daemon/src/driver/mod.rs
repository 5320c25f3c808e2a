//! The driver: the one task that owns all state.
//!
//! It takes one closed [`Event`] at a time, decides with `vramd-core`, sends device work to threads and reads its
//! outcome as further events. It does nothing slow itself. After each batch of events it publishes a [`Snapshot`]
//! and only then sends the replies, so that a client that reads after it wrote sees what it wrote.

mod allocations;
mod attachments;
mod clear;
mod copies;
mod defragment;
mod event;
mod forecasts;
mod limits;
mod loads;
mod measurements;
mod models;
mod operations;
mod plans;
mod prefetch;
mod pressure;
mod quiet_hours;
mod refusals;
mod relief;
mod reservations;
mod restore;
mod room;
mod snapshot;
mod split;
mod tiers;
mod transfers;
mod unloads;
mod ways;
mod workers;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use vramd_api::attach::{Access, HandleType};
use vramd_api::{
    AllocateRequest, AllocationId, ApiError, ComponentName, DeviceId, ErrorCode, EventKind, EvictionPolicy,
    Holder, KeepAlive, LeaseId, ModelName, Operation, OperationId, OwnerName, WorkerId,
};
use vramd_core::Now;
use vramd_core::footprints::Footprints;
use vramd_core::ledger::{Ledger, Request, SegmentId};
use vramd_core::models::{Models, Plan};
use vramd_core::pressure::{Gauge, Stall, Thresholds};
use vramd_core::queue::Queue;
use vramd_core::succession::Succession;
use vramd_core::trial::Trial;
use vramd_core::usage::Counts;
use vramd_device::Device;

use crate::clock::Clock;
use crate::devices::Devices;
use crate::event_log::EventLog;
use crate::mover::Mover;
use crate::store::{Change, Store, StoreError, Stored};

pub use attachments::{Attachment, Moved, Told};
pub use event::{Event, LoadFailure, OnStored};
pub use forecasts::{PlanLoads, PlannedLoad};
pub use operations::{Entry, Progress};
pub use quiet_hours::Schedule;
pub use snapshot::{DeviceView, Snapshot, memory_status};
pub use tiers::Tiers;
pub use workers::{Home, Joining, Launch, Workers, named as named_worker};

/// How often leases, waits and keep-alives are looked at and devices are measured: pressure is to be seen within 250 ms.
const TICK: Duration = Duration::from_millis(100);
/// The most events that wait for the driver; senders beyond wait themselves.
const MAILBOX: usize = 4096;
/// The most events in one batch, between two snapshots.
const BATCH: usize = 256;

/// Where an answer goes.
pub type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// A request for memory, checked.
#[derive(Debug)]
pub struct Allocate {
    pub request: Request,
    pub on: Option<DeviceId>,
    /// Why there, if the daemon has chosen it before.
    pub reason: Option<String>,
    /// The time to live of its lease; None for persistent ones.
    pub lease_seconds: Option<u64>,
    pub shortage: OnShortage,
    /// As it came, for the journal.
    pub body: AllocateRequest,
}

/// A request to load a model, or some of its components.
#[derive(Debug, Clone)]
pub struct Load {
    pub model: ModelName,
    pub device: Option<DeviceId>,
    pub components: Option<Vec<ComponentName>>,
    pub keep_alive: Option<KeepAlive>,
    pub shortage: OnShortage,
    /// Its components may go to different devices, or it is a part of a load whose components do.
    pub split: bool,
    /// What has arrived is summed.
    pub checksum: bool,
    /// Nobody asked: it is no use of the model.
    pub unasked: bool,
    /// It goes to RAM, to be there for its next use on that device.
    pub cache_for: Option<DeviceId>,
}

/// What becomes of a request for which there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnShortage {
    /// Idle models go for it.
    pub evict: bool,
    /// It goes to host memory instead.
    pub spill: bool,
    /// How long it waits beyond that; None does not.
    pub wait_seconds: Option<u64>,
}

/// The answer to a load.
#[derive(Debug)]
pub enum LoadAnswer {
    Operation(Box<Operation>),
    /// Read these files' headers, then ask again with them.
    Prepare(BTreeMap<ComponentName, String>),
    /// Some of it is on its way out by this operation: ask again once that has ended.
    After(OperationId),
}

/// What an attach names.
#[derive(Debug)]
pub enum AttachTarget {
    Model { model: ModelName, component: Option<ComponentName> },
    Allocation(AllocationId),
}

#[derive(Debug)]
pub struct AttachRequest {
    pub target: AttachTarget,
    pub device: Option<DeviceId>,
    pub access: Access,
    pub holder: Holder,
    /// It follows moves.
    pub moves: bool,
    /// What it can import.
    pub handles: Vec<HandleType>,
    pub tell: mpsc::UnboundedSender<Told>,
}

/// Who calls: over TCP the daemon's own user, on the Unix socket the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    pub uid: Option<u32>,
}

impl Caller {
    /// Root, the daemon's own user, and whoever reaches its loopback port.
    pub fn is_admin(self) -> bool {
        self.uid.is_none_or(|uid| uid == 0 || uid == crate::platform::own_uid())
    }
}

/// The way to the driver.
#[derive(Debug, Clone)]
pub struct Driver {
    sender: mpsc::Sender<Event>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    pub log: Arc<EventLog>,
    pub devices: Arc<Devices>,
}

/// By what the driver acts where nobody says otherwise.
#[derive(Debug)]
pub struct Rules {
    pub schedule: Schedule,
    pub eviction: EvictionPolicy,
    /// In seconds.
    pub minimum_stay: u64,
    pub tiers: Tiers,
    pub home: Home,
    pub thresholds: Thresholds,
}

impl Driver {
    /// Starts the driver on what the journal held. Ends after [`Self::stop`]; the handle tells when.
    pub fn start(
        devices: Devices,
        store: Store,
        stored: Stored,
        run: String,
        rules: Rules,
        unasked: mpsc::UnboundedSender<Load>,
    ) -> std::io::Result<(Self, tokio::task::JoinHandle<()>)> {
        let mover = Mover::start()?;
        let (sender, inbox) = mpsc::channel(MAILBOX);
        let devices = Arc::new(devices);
        let log = EventLog::new(run);
        let clock = Clock::start();
        let mut state = State {
            ledger: Ledger::default(),
            queue: Queue::default(),
            models: Models::default(),
            operations: operations::Operations::default(),
            waiting: HashMap::new(),
            releasing: HashMap::new(),
            attachments: HashMap::new(),
            copies: HashMap::new(),
            last_copy: 0,
            waiting_loads: BTreeMap::new(),
            load_rates: BTreeMap::new(),
            copy_rates: BTreeMap::new(),
            demotions: Vec::new(),
            models_changed_at: vramd_core::Tick::default(),
            tiers: rules.tiers,
            succession: Succession::default(),
            reservations: BTreeMap::new(),
            footprints: Footprints::default(),
            unasked,
            promote_after: vramd_core::Tick::default(),
            trials: BTreeMap::new(),
            policy: rules.eviction,
            minimum_stay: rules.minimum_stay,
            to_go_on: BTreeSet::new(),
            rates: BTreeMap::new(),
            defragmented_at: BTreeMap::new(),
            looked_for_waiting: vramd_core::Tick::default(),
            schedule: rules.schedule,
            mover,
            counts: BTreeMap::new(),
            unreleased: BTreeSet::new(),
            undestroyed: BTreeSet::new(),
            unrestored: BTreeMap::new(),
            removing: BTreeSet::new(),
            changing: BTreeSet::new(),
            gauges: BTreeMap::new(),
            thresholds: rules.thresholds,
            stall: (Stall::None, vramd_core::Tick::default()),
            relieve_after: BTreeMap::new(),
            measuring: BTreeMap::new(),
            tries: BTreeMap::new(),
            workers: Workers::new(),
            ending_workers: HashMap::new(),
            workers_looked_at: vramd_core::Tick::default(),
            worker_looks: BTreeMap::new(),
            workers_changed: false,
            home: rules.home,
            samples: BTreeMap::new(),
            jobs: 0,
            outbox: Vec::new(),
            stopping: false,
            devices: devices.clone(),
            store,
            log: log.clone(),
            sender: sender.clone(),
            clock,
            now: clock.now(),
        };
        state.begin(stored);
        let (publish, snapshots) = watch::channel(Arc::new(state.snapshot()));
        let task = tokio::spawn(state.run(inbox, publish));
        Ok((Self { sender, snapshots, log, devices }, task))
    }

    /// The state after the last batch of events.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// For those who wait until a snapshot shows something.
    pub fn snapshots(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.clone()
    }

    /// Sends an event that is answered.
    pub async fn ask<T>(&self, event: impl FnOnce(Reply<T>) -> Event) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        let stopping =
            || ApiError::new(ErrorCode::Unavailable, "the daemon is stopping").hint("try again in a moment");
        self.sender.send(event(reply)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// As [`Self::tell`], from a thread that may wait.
    pub fn tell_blocking(&self, event: Event) {
        let _ = self.sender.blocking_send(event);
    }

    /// Sends an event that is not.
    pub async fn tell(&self, event: Event) {
        let _ = self.sender.send(event).await;
    }

    /// Cancels what runs and ends the driver once it has ended.
    pub async fn stop(&self) {
        self.tell(Event::Stop).await;
    }
}

/// All state of the daemon.
struct State {
    ledger: Ledger,
    queue: Queue,
    models: Models,
    operations: operations::Operations,
    /// What happens when a reservation becomes ready, or room is found.
    waiting: HashMap<AllocationId, allocations::OnReady>,
    /// What happens when an allocation's bytes are back.
    releasing: HashMap<AllocationId, allocations::OnReleased>,
    /// The open attachments.
    attachments: HashMap<LeaseId, attachments::Reader>,
    copies: HashMap<copies::CopyId, copies::Copy>,
    last_copy: copies::CopyId,
    /// Loads that wait for room.
    waiting_loads: BTreeMap<OperationId, room::WaitingLoad>,
    /// Bytes per second that loads onto a device came to lately.
    load_rates: BTreeMap<DeviceId, f64>,
    policy: EvictionPolicy,
    /// How many seconds what was loaded stays at least.
    minimum_stay: u64,
    /// Bytes per second that copies of components from one device to another came to lately.
    copy_rates: BTreeMap<(DeviceId, DeviceId), f64>,
    /// Components on their way to RAM, or waiting for room there.
    demotions: Vec<tiers::Demotion>,
    /// When a model was last loaded or unloaded, or was to be.
    models_changed_at: vramd_core::Tick,
    tiers: Tiers,
    /// What usually follows.
    succession: Succession<ModelName>,
    /// The active reservations.
    reservations: BTreeMap<AllocationId, reservations::Reserved>,
    footprints: Footprints,
    /// To whoever begins loads that nobody asked for.
    unasked: mpsc::UnboundedSender<Load>,
    /// Nothing comes back from RAM by itself before.
    promote_after: vramd_core::Tick,
    /// By device: what the policies would have loaded.
    trials: BTreeMap<DeviceId, Trial<ModelName>>,
    /// Operations that can take their next step.
    to_go_on: BTreeSet<OperationId>,
    /// Bytes per second that moves on a device were last measured at; before the first, those at which a segment was
    /// made, which is mostly writing zeros.
    rates: BTreeMap<DeviceId, f64>,
    /// When a device was last defragmented without a gain.
    defragmented_at: BTreeMap<DeviceId, vramd_core::Tick>,
    /// When it was last looked whether packing would help those who wait.
    looked_for_waiting: vramd_core::Tick,
    schedule: Schedule,
    mover: Mover,
    /// What happened on each device since somebody asked.
    counts: BTreeMap<DeviceId, Counts>,
    /// Allocations whose bytes the device failed to give back; it is asked again at each tick.
    unreleased: BTreeSet<AllocationId>,
    /// Empty segments likewise.
    undestroyed: BTreeSet<(DeviceId, SegmentId)>,
    /// Persistent allocations of an earlier run for which there is no room or no device now. The next start tries again;
    /// deleting one gives up on it.
    unrestored: BTreeMap<AllocationId, (DeviceId, OwnerName)>,
    /// Persistent allocations whose removal the journal is writing: nobody attaches to them any more.
    removing: BTreeSet<AllocationId>,
    /// Models that the journal is writing a change of.
    changing: BTreeSet<ModelName>,
    gauges: BTreeMap<DeviceId, Gauge>,
    thresholds: Thresholds,
    /// What the system told of last, and until when that counts.
    stall: (Stall, vramd_core::Tick),
    /// Where what was done did not help, when it is tried again.
    relieve_after: BTreeMap<DeviceId, vramd_core::Tick>,
    /// The measurements under way, and when they began.
    measuring: BTreeMap<DeviceId, vramd_core::Tick>,
    /// When lost devices are tried next, and how many seconds later again.
    tries: BTreeMap<DeviceId, (vramd_core::Tick, u64)>,
    workers: Workers,
    /// Who asked a worker to end and waits for it.
    ending_workers: HashMap<WorkerId, Vec<Reply<vramd_api::Worker>>>,
    /// When it is looked again which processes they have.
    workers_looked_at: vramd_core::Tick,
    /// When it may be looked again what those use of a device; None while that is under way.
    worker_looks: BTreeMap<DeviceId, Option<vramd_core::Tick>>,
    /// What is theirs is to be added up anew.
    workers_changed: bool,
    home: Home,
    samples: BTreeMap<DeviceId, jiff::Timestamp>,
    /// Device calls and journal writes under way.
    jobs: usize,
    /// Answers to be sent after the next snapshot.
    outbox: Vec<Box<dyn FnOnce() + Send>>,
    stopping: bool,
    devices: Arc<Devices>,
    store: Store,
    log: Arc<EventLog>,
    sender: mpsc::Sender<Event>,
    clock: Clock,
    /// Read once for each batch.
    now: Now,
}

impl State {
    async fn run(mut self, mut inbox: mpsc::Receiver<Event>, publish: watch::Sender<Arc<Snapshot>>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH);
        while !(self.stopping && self.jobs == 0) {
            tokio::select! {
                _ = inbox.recv_many(&mut batch, BATCH) => {}
                _ = ticks.tick() => batch.push(Event::Tick),
            }
            self.now = self.clock.now();
            for event in batch.drain(..) {
                self.take(event);
                while let Some(operation) = self.to_go_on.pop_first() {
                    self.go_on(operation);
                    self.end_transfer(operation);
                    self.go_on_clearing(operation);
                    self.go_on_splitting(operation);
                    self.go_on_relieving(operation);
                }
            }
            self.refigure_workers();
            debug_assert_eq!(self.ledger.check(), Ok(()));
            self.observe_peaks();
            publish.send_replace(Arc::new(self.snapshot()));
            for send in self.outbox.drain(..) {
                send();
            }
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Allocate(allocate, reply) => self.allocate(*allocate, reply),
            Event::Reserve(allocate, reply) => self.reserve(*allocate, reply),
            Event::Release(id, peak, caller, reply) => self.release(id, peak, caller, reply),
            Event::Renew(id, request, caller, reply) => self.renew(id, &request, caller, reply),
            Event::ForgetFootprints(model, reply) => {
                let forgotten = self.forget_footprints(&model);
                self.answer(reply, Ok(forgotten));
            }
            Event::SetLimits(device, limits, reply) => self.set_limits(device, limits, reply),
            Event::Register(model, reply) => self.register(model, reply),
            Event::Remove(name, reply) => self.remove(name, reply),
            Event::Load(load, prepared, reply) => self.load(&load, prepared, reply),
            Event::Unload(name, device, reply) => self.unload(&name, device.as_ref(), reply),
            Event::Pin(name, pinned, reply) => self.pin(name, pinned, reply),
            Event::Touch(name, keep_alive, reply) => self.touch(name, keep_alive, reply),
            Event::Cancel(id, reply) => self.cancel(id, reply),
            Event::Pause(id, paused, reply) => self.pause(id, paused, reply),
            Event::Transfer(request, caller, reply) => self.transfer(&request, caller, reply),
            Event::Copy(request, caller, reply) => self.copy_into(&request, caller, reply),
            Event::Defragment(request, device, reply) => self.defragment(request, device, reply),
            Event::PlanLoads(request, reply) => self.plan_loads(&request, reply),
            Event::PlanDefragment(request, device, reply) => self.plan_defragment(&request, device, reply),
            Event::Clear(request, device, caller, reply) => self.clear(&request, device, caller, reply),
            Event::PlanClear(request, device, caller, reply) => {
                self.plan_clear(&request, device, caller, reply);
            }
            Event::PartCleared { operation, allocation, outcome } => {
                self.jobs -= 1;
                self.part_cleared(operation, allocation, outcome);
            }
            Event::Zeroed { operation, allocation, device, outcome } => {
                self.jobs -= 1;
                self.zeroed(operation, allocation, &device, outcome);
            }
            Event::BaseMeasured { reservation, outcome } => {
                self.jobs -= 1;
                self.base_measured(reservation, outcome.unwrap_or_default());
            }
            Event::Attach(request, reply) => self.attach(*request, reply),
            Event::Inspected(name, plans) => self.inspected(&name, plans),
            // Who stops closes the connections: what they keep is still mapped, and must not be zeroed or given out.
            Event::LeaseEnded(_) if self.stopping => {}
            Event::LeaseEnded(lease) => self.lease_ended(lease),
            Event::MoveAnswered { lease, generation, refused } => {
                self.move_answered(lease, generation, refused);
            }
            Event::Copied { copy, outcome } => {
                self.jobs -= 1;
                self.copied(copy, outcome);
            }
            Event::Planned { operation, plan } => {
                self.jobs -= 1;
                self.planned(operation, plan);
            }
            Event::Surveyed { device, plan } => {
                self.jobs -= 1;
                self.surveyed(&device, plan);
            }
            Event::SegmentCreated { device, segment, kept, outcome } => {
                self.jobs -= 1;
                if let Some(kept) = kept {
                    self.ledger.not_destroyed(&device, kept);
                    self.undestroyed.insert((device.clone(), kept));
                }
                self.segment_created(&device, segment, outcome);
            }
            Event::SegmentDestroyed { device, segment, outcome } => {
                self.jobs -= 1;
                self.segment_destroyed(device, segment, &outcome);
            }
            Event::BlockReleased { allocation, outcome } => {
                self.jobs -= 1;
                self.block_released(allocation, outcome);
            }
            Event::LoadRead { operation, outcome } => {
                self.jobs -= 1;
                self.load_read(operation, outcome);
            }
            Event::StartWorker(launch, reply) => self.start_worker(*launch, reply),
            Event::JoinWorker(joining, reply) => self.join_worker(*joining, reply),
            Event::StopWorker(name, caller, reply) => self.stop_worker(&name, caller, reply),
            Event::Worker(id, news) => self.worker_news(id, news),
            Event::WorkerAsked(asked) => {
                self.jobs -= 1;
                self.worker_asked(*asked);
            }
            Event::Pressure(device, reply) => {
                let all = self.ledger.devices().map(|facts| &facts.device);
                let meant = all.filter(|on| device.as_ref().is_none_or(|device| device == *on));
                let shown = meant.map(|device| self.pressure_on(device)).collect();
                self.answer(reply, Ok(shown));
            }
            Event::OptimizeModels(device, request, caller, reply) => {
                self.optimize_models(device, &request, caller, reply);
            }
            Event::Stalled(stall) => self.stalled(stall),
            Event::Measured { device, reports, used_by, outcome } => {
                self.jobs -= 1;
                self.note_reports(&device, &reports);
                self.measured(&device, &used_by, outcome);
            }
            Event::WorkersFound(families) => self.workers_found(&families),
            Event::WorkersMeasured(device, used, took) => self.workers_measured(&device, &used, took),
            Event::Adopted { device, reports, outcome } => {
                self.jobs -= 1;
                self.note_reports(&device, &reports);
                self.adopted(&device, &outcome);
            }
            Event::Stored(next, outcome) => {
                self.jobs -= 1;
                self.stored(*next, outcome);
            }
            Event::TakeCounts(reply) => {
                let counts = std::mem::take(&mut self.counts);
                self.answer(reply, Ok(counts));
            }
            Event::Tick => self.tick(),
            Event::Stop => self.stop(),
        }
    }

    fn observe_peaks(&mut self) {
        for facts in self.ledger.devices() {
            if let Some(usage) = self.ledger.usage(&facts.device) {
                self.counts.entry(facts.device.clone()).or_default().observe(&usage);
            }
        }
    }

    fn tick(&mut self) {
        if !self.stopping {
            for lease in self.ledger.expired(self.now.tick) {
                self.lease_ended(lease);
            }
            self.end_reservations();
        }
        self.release_again();
        self.expire_waiting();
        self.pack_for_waiting();
        self.expire_models();
        self.make_room_for_waiting();
        self.keep_limits();
        self.look_after_tiers();
        self.operations.prune();
        self.keep_quiet_hours();
        self.restart_workers();
        // Readers may have had their time.
        self.to_go_on.extend(self.operations.running.keys());
        if !self.stopping {
            // What they fill of their reservations is theirs no less.
            self.workers_changed |= !self.reservations.is_empty();
            self.look_at_workers();
            self.measure();
            self.adopt();
        }
    }

    fn stop(&mut self) {
        self.stopping = true;
        self.emit(EventKind::DaemonStopping, serde_json::json!({}));
        self.operations.cancel_all();
        self.stop_workers();
        self.mover.sweep();
        self.queue.retain(|_| false);
        self.stop_waiting_loads();
        for (_, on_ready) in std::mem::take(&mut self.waiting) {
            on_ready
                .refuse(&mut self.outbox, || ApiError::new(ErrorCode::Unavailable, "the daemon is stopping"));
        }
    }

    fn stored(&mut self, next: OnStored, outcome: Result<(), StoreError>) {
        if let Err(error) = &outcome {
            tracing::error!(error = error as &dyn std::error::Error, "the journal could not be written");
        }
        let outcome = outcome.map_err(|error| store_failed(&error));
        match next {
            OnStored::Activate(id, waiting) => self.activated(id, *waiting, outcome),
            OnStored::Release(id, reply) => self.release_stored(id, reply, outcome),
            OnStored::Forget(id, reply) => self.forgotten(id, reply, outcome),
            OnStored::Limits(device, limits, reply) => self.limits_stored(&device, *limits, reply, outcome),
            OnStored::Register(model, reply) => self.registered(*model, reply, outcome),
            OnStored::Remove(name, reply) => self.removed(&name, reply, outcome),
            OnStored::Pin(name, pinned, reply) => self.pinned(&name, pinned, reply, outcome),
            OnStored::Touch(name, keep_alive, reply) => self.touched(&name, Some(keep_alive), reply, outcome),
            OnStored::Copied(id, checksum) => self.copy_stored(id, checksum, outcome),
            OnStored::Nothing => {}
        }
    }

    /// Writes to the journal, then goes on with `next`.
    fn store(&mut self, change: Change, next: OnStored) {
        self.store_all(vec![change], next);
    }

    /// As [`Self::store`], for changes that are written together or not at all.
    fn store_all(&mut self, changes: Vec<Change>, next: OnStored) {
        let sender = self.sender.clone();
        self.jobs += 1;
        self.store.write(changes, move |outcome| {
            let _ = sender.blocking_send(Event::Stored(Box::new(next), outcome));
        });
    }

    /// Runs a device call on a thread of its own; its outcome comes back as an event.
    fn spawn(&mut self, device: &DeviceId, call: impl FnOnce(&dyn Device) -> Event + Send + 'static) {
        let device = self.devices.get(device).expect("the ledger knows only devices that opened").clone();
        let sender = self.sender.clone();
        self.jobs += 1;
        tokio::task::spawn_blocking(move || {
            let event = call(device.as_ref());
            let _ = sender.blocking_send(event);
        });
    }

    fn answer<T: Send + 'static>(&mut self, reply: Reply<T>, answer: Result<T, ApiError>) {
        self.outbox.push(Box::new(move || {
            let _ = reply.send(answer);
        }));
    }

    /// Tells those who follow, once the snapshot shows it.
    fn emit(&mut self, kind: EventKind, data: impl serde::Serialize) {
        let data = serde_json::value::to_raw_value(&data).expect("events are plain data");
        let (log, at) = (self.log.clone(), self.now.wall);
        self.outbox.push(Box::new(move || log.push(kind, at, data)));
    }
}

fn store_failed(error: &StoreError) -> ApiError {
    let cause = std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
    ApiError::new(ErrorCode::StoreFailed, format!("{error}{cause}; nothing was changed"))
        .hint("free space in the state directory, then try again")
}

/// Keeps a component's plan beside the allocation it goes to.
#[derive(Debug, Clone)]
struct Part {
    component: ComponentName,
    allocation: AllocationId,
    plan: Arc<Plan>,
    /// Of the operation, while its bytes are read in, so that nobody moves or copies it; of the model, if it is shared.
    lease: LeaseId,
    /// It was there for another component of the same files.
    is_shared: bool,
    /// Where it is copied from, if not read from its files.
    origin: Option<tiers::Origin>,
    /// Sum what arrives.
    sums: bool,
    /// What it has to come to, if that is known.
    checksum: Option<u64>,
}
