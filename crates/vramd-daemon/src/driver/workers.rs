//! Workers: which there are, what they have, when one is started again, and what its end sets right.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use imbl::OrdMap;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vramd_api::worker_protocol::{Greeting, Hello, MAX_LINE_BYTES, ModelInfo, VERSION, megabytes};
use vramd_api::{
    ApiError, DeviceId, ErrorCode, EventKind, OwnerName, RestartPolicy, WorkerExit, WorkerId, WorkerLimit,
    WorkerMemory, WorkerModel, WorkerName, WorkerState,
};
use vramd_core::Tick;
use vramd_core::ledger::Lease;
use vramd_core::restarts::{Next, Restarts};

use super::{Caller, Event, Reply, State};
use crate::platform;
use crate::requests;
use crate::workers::{self, Command, Link, Log, MARK_VARIABLE, News, Task};

/// The most workers, those that have ended and are still shown included.
const MAX_WORKERS: usize = 1024;
/// So many may join of one user, but the daemon's own.
const MOST_OF_A_USER: usize = 64;
/// So many of those that have ended are shown.
const MOST_ENDED: usize = 64;
/// How often what workers have is measured.
const MEASURE_MILLISECONDS: u64 = 1000;

/// Where the daemon serves, for workers to find it.
#[derive(Debug, Clone, Default)]
pub struct Home {
    pub server: Option<String>,
    pub socket: Option<String>,
    /// By which a later run of this daemon, and no other, knows the processes that it left.
    pub mark: String,
}

/// A program to be run as a worker, checked.
#[derive(Debug, Clone)]
pub struct Launch {
    pub program: WorkerName,
    pub name: Option<WorkerName>,
    pub command: Vec<String>,
    pub environment: BTreeMap<String, String>,
    pub device: Option<DeviceId>,
    pub limit_bytes: Option<u64>,
    pub restart: RestartPolicy,
    pub heartbeat_seconds: u64,
}

/// A worker that somebody else started.
#[derive(Debug, Clone)]
pub struct Joining {
    pub name: WorkerName,
    pub device: Option<DeviceId>,
    /// None: nobody knows which processes it has.
    pub pid: Option<u32>,
    pub uid: u32,
}

/// Where it comes from.
#[derive(Debug, Clone)]
enum Origin {
    Started(Arc<Launch>),
    Joined,
}

/// One worker.
#[derive(Debug, Clone)]
pub struct Worker {
    pub id: WorkerId,
    pub name: WorkerName,
    pub state: WorkerState,
    origin: Origin,
    pub owner: OwnerName,
    pub device: Option<DeviceId>,
    pub pid: Option<u32>,
    pub uid: Option<u32>,
    /// Its answer to the handshake.
    pub greeting: Option<Arc<Greeting>>,
    /// That process and all that it started, as far as is known.
    pub pids: Arc<[u32]>,
    /// What each of them was measured to have, by device.
    measured: BTreeMap<DeviceId, BTreeMap<u32, u64>>,
    pub models: Arc<Vec<WorkerModel>>,
    synchronized: Option<Timestamp>,
    limit: Option<WorkerLimit>,
    restarts: Restarts,
    restart_count: u64,
    next_start: Option<(Tick, Timestamp)>,
    ready_since: Option<Tick>,
    /// It said what was not so, or did not answer: until then it is not asked for what is its own.
    pub doubted_until: Tick,
    pub started_at: Timestamp,
    exit: Option<WorkerExit>,
    pub link: Link,
    log: Arc<Log>,
    stop: CancellationToken,
}

/// Those that there are, by their ids, which sort by age.
pub type Workers = OrdMap<WorkerId, Arc<Worker>>;

impl Worker {
    /// What is known of it.
    pub fn to_api(&self) -> vramd_api::Worker {
        let seen = self.log.seen();
        let program = match &self.origin {
            Origin::Started(launch) => Some(launch),
            Origin::Joined => None,
        };
        let mut memory: BTreeMap<&DeviceId, WorkerMemory> = BTreeMap::new();
        for (device, of) in &self.measured {
            memory.entry(device).or_insert_with(|| empty(device)).measured_bytes = Some(of.values().sum());
        }
        for model in self.models.iter() {
            let entry = memory.entry(&model.device_id).or_insert_with(|| empty(&model.device_id));
            *entry.reported_bytes.get_or_insert(0) += model.own_bytes;
        }
        let greeting = self.greeting.as_deref();
        vramd_api::Worker {
            worker_id: self.id,
            name: self.name.clone(),
            state: self.state,
            program: program.map(|launch| launch.program.clone()),
            pid: self.pid,
            uid: self.uid,
            device_id: self.device.clone(),
            implementation: greeting.and_then(|it| it.implementation.clone()),
            framework: greeting.and_then(|it| it.framework.clone()),
            actions: greeting.map(|it| it.actions.clone()).unwrap_or_default(),
            memory: memory.into_values().collect(),
            models: self.models.to_vec(),
            last_synchronized: self.synchronized,
            limit: self.limit.clone(),
            restart: program.map(|launch| launch.restart),
            restart_count: self.restart_count,
            next_start_at: self.next_start.map(|(_, at)| at),
            started_at: self.started_at,
            last_heard_at: seen.last_heard,
            last_exit: self.exit.clone(),
            fault_count: seen.fault_count,
            last_fault: seen.last_fault,
            logs: None,
        }
    }

    /// What it was last measured to have on a device.
    pub fn measured_on(&self, device: &DeviceId) -> Option<u64> {
        Some(self.measured_by_process(device)?.values().sum())
    }

    pub fn measured_by_process(&self, device: &DeviceId) -> Option<&BTreeMap<u32, u64>> {
        self.measured.get(device)
    }

    /// Whether it has an action.
    pub fn can(&self, action: &str) -> bool {
        self.greeting.as_ref().is_some_and(|it| it.actions.iter().any(|one| one == action))
    }

    pub fn note_fault(&self, fault: &str) {
        self.log.note_fault(fault);
    }

    pub fn logs(&self) -> Vec<vramd_api::LogLine> {
        self.log.lines()
    }

    /// Whether a caller may ask it or end it.
    pub fn may(&self, caller: Caller) -> Result<(), ApiError> {
        let mine = matches!(self.origin, Origin::Joined) && caller.uid.is_some() && caller.uid == self.uid;
        if caller.is_admin() || mine {
            return Ok(());
        }
        let error =
            ApiError::new(ErrorCode::PermissionDenied, format!("worker {} is another user's", self.name));
        Err(error.hint("ask as its user, or as the daemon's"))
    }
}

fn empty(device: &DeviceId) -> WorkerMemory {
    WorkerMemory { device_id: device.clone(), measured_bytes: None, reported_bytes: None }
}

/// The worker that an id or a name means; of several with one name, the one that is there.
pub fn named<'a>(workers: &'a Workers, text: &str) -> Result<&'a Arc<Worker>, ApiError> {
    let by_id = text.parse().ok().and_then(|id: WorkerId| workers.get(&id));
    let by_name = || {
        let named = || workers.values().rev().filter(|worker| worker.name.as_str() == text);
        named().find(|worker| worker.state.is_there()).or_else(|| named().next())
    };
    by_id.or_else(by_name).ok_or_else(|| ApiError::not_found("worker", text))
}

impl State {
    pub(super) fn start_worker(&mut self, launch: Launch, reply: Reply<vramd_api::Worker>) {
        let wanted = launch.name.clone();
        let name = match wanted {
            Some(name) if self.named_there(&name) => {
                let error = ApiError::new(ErrorCode::Conflict, format!("there is a worker {name} already"));
                let hint = "choose another name, or end that one: `vramd workers stop NAME`";
                return self.answer(reply, Err(error.hint(hint)));
            }
            Some(name) => name,
            None => self.free_name(&launch.program),
        };
        if let Err(error) = self.room_for_worker() {
            return self.answer(reply, Err(error));
        }
        let origin = Origin::Started(Arc::new(launch.clone()));
        let worker = self.new_worker(name, origin, launch.device, (None, Some(platform::own_uid())));
        let id = worker.id;
        self.workers.insert(id, Arc::new(worker));
        self.launch(id);
        let started = self.workers.get(&id).expect("it was put in above").to_api();
        self.answer(reply, Ok(started));
    }

    pub(super) fn join_worker(&mut self, joining: Joining, reply: Reply<Task>) {
        // One that comes back takes the place of itself.
        let before = |worker: &&Arc<Worker>| {
            let same = worker.name == joining.name && worker.uid == Some(joining.uid);
            same && !worker.state.is_there() && matches!(worker.origin, Origin::Joined)
        };
        let before: Vec<WorkerId> = self.workers.values().filter(before).map(|worker| worker.id).collect();
        for id in before {
            self.workers.remove(&id);
        }
        let caller = Caller { uid: Some(joining.uid) };
        let theirs =
            self.workers.values().filter(|it| it.uid == Some(joining.uid) && it.state.is_there()).count();
        if !caller.is_admin() && theirs >= MOST_OF_A_USER {
            let error = ApiError::new(
                ErrorCode::TooManyRequests,
                format!("user {} has {theirs} workers", joining.uid),
            );
            return self.answer(reply, Err(error.detail("limit", MOST_OF_A_USER)));
        }
        if let Err(error) = self.room_for_worker() {
            return self.answer(reply, Err(error));
        }
        let name = self.free_name(&joining.name);
        let device = joining.device.or_else(|| self.ram());
        let process = (joining.pid, Some(joining.uid));
        let mut worker = self.new_worker(name, Origin::Joined, device, process);
        let task = self.task(&mut worker, requests::DEFAULT_HEARTBEAT_SECONDS as f64, None);
        let id = worker.id;
        self.workers.insert(id, Arc::new(worker));
        self.emit_worker(EventKind::WorkerStarted, id);
        self.answer(reply, Ok(task));
    }

    /// Whether a worker of that name is there, or is to be.
    fn named_there(&self, name: &WorkerName) -> bool {
        let lives = |worker: &Arc<Worker>| worker.state.is_there() || worker.state == WorkerState::Restarting;
        self.workers.values().any(|worker| worker.name == *name && lives(worker))
    }

    fn free_name(&self, wanted: &WorkerName) -> WorkerName {
        let stem: String = wanted.as_str().chars().take(58).collect();
        let numbered = (2..).map(|number| format!("{stem}-{number}").parse().expect("a short plain name"));
        let mut names = std::iter::once(wanted.clone()).chain(numbered);
        names.find(|name| !self.named_there(name)).expect("there are more numbers than workers")
    }

    fn room_for_worker(&mut self) -> Result<(), ApiError> {
        let ended = |worker: &&Arc<Worker>| matches!(worker.state, WorkerState::Exited | WorkerState::Failed);
        let all: Vec<WorkerId> = self.workers.values().filter(ended).map(|worker| worker.id).collect();
        for id in all.iter().take(all.len().saturating_sub(MOST_ENDED)) {
            self.workers.remove(id);
        }
        if self.stopping {
            return Err(ApiError::new(ErrorCode::Unavailable, "the daemon is stopping"));
        }
        if self.workers.len() >= MAX_WORKERS {
            let error = ApiError::new(ErrorCode::TooManyRequests, format!("there are {MAX_WORKERS} workers"));
            return Err(error.hint("end some of them first").detail("limit", MAX_WORKERS));
        }
        Ok(())
    }

    fn new_worker(
        &self,
        name: WorkerName,
        origin: Origin,
        device: Option<DeviceId>,
        (pid, uid): (Option<u32>, Option<u32>),
    ) -> Worker {
        let log = Arc::new(Log::default());
        let theirs = uid.filter(|uid| !Caller { uid: Some(*uid) }.is_admin());
        let prefix = theirs.map_or_else(String::new, |uid| format!("uid:{uid}/"));
        Worker {
            id: WorkerId(Uuid::now_v7()),
            owner: format!("{prefix}worker:{name}").parse().expect("short plain names make owners"),
            name,
            state: WorkerState::Starting,
            origin,
            device,
            pid,
            uid,
            greeting: None,
            pids: pid.into_iter().collect(),
            measured: BTreeMap::new(),
            models: Arc::default(),
            synchronized: None,
            limit: None,
            restarts: Restarts::default(),
            restart_count: 0,
            next_start: None,
            ready_since: None,
            doubted_until: Tick::default(),
            started_at: self.now.wall,
            exit: None,
            link: Link::new(log.clone()).0,
            log,
            stop: CancellationToken::new(),
        }
    }

    /// What a worker's next conversation is led with.
    fn task(&mut self, worker: &mut Worker, heartbeat_seconds: f64, limit_bytes: Option<u64>) -> Task {
        let (link, writer) = Link::new(worker.log.clone());
        worker.link = link.clone();
        worker.stop = CancellationToken::new();
        self.jobs += 1;
        let facts = self.devices.iter().map(|device| device.facts());
        let hello = Hello {
            versions: vec![VERSION],
            worker_id: worker.id.to_string(),
            name: worker.name.clone(),
            owner: worker.owner.clone(),
            server: self.home.server.clone(),
            socket: self.home.socket.clone(),
            device_id: worker.device.clone(),
            device_uuids: facts.map(|facts| (facts.device.clone(), facts.uuid.clone())).collect(),
            memory_limit_mb: limit_bytes.map(megabytes),
            heartbeat_seconds,
            max_line_bytes: MAX_LINE_BYTES,
        };
        let (driver, stop) = (self.sender.clone(), worker.stop.clone());
        Task { id: worker.id, pid: worker.pid, hello, link, writer, driver, stop }
    }

    /// Starts a worker's process, for the first time or again.
    fn launch(&mut self, id: WorkerId) {
        let Some(mut worker) = self.workers.get(&id).map(|worker| Worker::clone(worker)) else { return };
        let Origin::Started(launch) = worker.origin.clone() else { return };
        worker.state = WorkerState::Starting;
        worker.greeting = None;
        worker.next_start = None;
        worker.started_at = self.now.wall;
        let task = self.task(&mut worker, launch.heartbeat_seconds as f64, launch.limit_bytes);
        let mark = format!("{}:{}", self.home.mark, Uuid::now_v7());
        let mut environment = launch.environment.clone();
        let own = [
            ("VRAMD_WORKER", Some("stdio".to_owned())),
            ("VRAMD_WORKER_ID", Some(id.to_string())),
            (MARK_VARIABLE, Some(mark.clone())),
            ("VRAMD_OWNER", Some(worker.owner.to_string())),
            ("VRAMD_SOCKET", self.home.socket.clone()),
            ("VRAMD_SERVER", self.home.server.clone()),
        ];
        environment.extend(own.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
        let (program, arguments) = launch.command.split_first().expect("a program has a name");
        let command = Command {
            program: program.clone(),
            arguments: arguments.to_vec(),
            environment,
            limit_bytes: launch.limit_bytes,
            home_mark: self.home.mark.clone(),
            mark,
        };
        self.workers.insert(id, Arc::new(worker));
        tokio::spawn(workers::supervise(task, command));
    }

    pub(super) fn stop_worker(&mut self, name: &str, caller: Caller, reply: Reply<vramd_api::Worker>) {
        let worker = match named(&self.workers, name).and_then(|worker| worker.may(caller).map(|()| worker)) {
            Ok(worker) => worker.clone(),
            Err(error) => return self.answer(reply, Err(error)),
        };
        if !worker.state.is_there() {
            self.workers.remove(&worker.id);
            return self.answer(reply, Ok(worker.to_api()));
        }
        worker.stop.cancel();
        self.change_worker(worker.id, |worker| worker.state = WorkerState::Stopping);
        self.ending_workers.entry(worker.id).or_default().push(reply);
    }

    /// All of them are asked to end.
    pub(super) fn stop_workers(&mut self) {
        for worker in self.workers.values() {
            worker.stop.cancel();
        }
    }

    fn change_worker(&mut self, id: WorkerId, change: impl FnOnce(&mut Worker)) {
        if let Some(worker) = self.workers.get_mut(&id) {
            change(Arc::make_mut(worker));
        }
    }

    pub(super) fn worker_news(&mut self, id: WorkerId, news: News) {
        match news {
            News::Started { pid, limit } => {
                self.change_worker(id, |worker| {
                    (worker.pid, worker.limit) = (Some(pid), limit);
                    worker.pids = Arc::new([pid]);
                });
                self.emit_worker(EventKind::WorkerStarted, id);
            }
            News::Ready(greeting) => {
                let now = self.now.tick;
                self.change_worker(id, |worker| {
                    worker.greeting = Some(Arc::from(greeting));
                    worker.ready_since = Some(now);
                    if worker.state == WorkerState::Starting {
                        worker.state = WorkerState::Ready;
                    }
                });
                self.emit_worker(EventKind::WorkerReady, id);
            }
            News::Responds(does) => {
                let before = self.workers.get(&id).map(|worker| worker.state);
                self.change_worker(id, |worker| match (worker.state, does) {
                    (WorkerState::Ready, false) => worker.state = WorkerState::Unresponsive,
                    (WorkerState::Unresponsive, true) => worker.state = WorkerState::Ready,
                    _ => {}
                });
                if self.workers.get(&id).map(|worker| worker.state) != before {
                    self.emit_worker(EventKind::WorkerChanged, id);
                }
            }
            News::Models(info) => self.models_reported(id, &info),
            News::Faulted => self.emit_worker(EventKind::WorkerFault, id),
            News::Ended(exit, well) => {
                self.jobs -= 1;
                self.worker_ended(id, exit, well);
            }
        }
    }

    fn models_reported(&mut self, id: WorkerId, info: &ModelInfo) {
        let facts = self.devices.iter().map(|device| device.facts());
        let totals: BTreeMap<DeviceId, u64> =
            facts.map(|facts| (facts.device.clone(), facts.total_bytes)).collect();
        // Before the handshake nobody could ask it for anything; after that it is asked what it has.
        let Some(worker) = self.workers.get(&id).filter(|worker| worker.greeting.is_some()) else { return };
        let own = worker.device.clone().or_else(|| self.ram()).or_else(|| totals.keys().next().cloned());
        let Some(own) = own else { return };
        match info.models(&own, &totals, self.now.wall) {
            Ok(models) => {
                let now = self.now.wall;
                let changed = *worker.models != models;
                self.change_worker(id, |worker| {
                    worker.models = Arc::new(models);
                    worker.synchronized = Some(now);
                });
                if changed {
                    self.workers_changed = true;
                    self.emit_worker(EventKind::WorkerChanged, id);
                }
            }
            Err(fault) => {
                worker.log.note_fault(&fault);
                self.emit_worker(EventKind::WorkerFault, id);
            }
        }
    }

    /// What a worker says of its memory is not to be built on for a while.
    pub(super) fn doubt_worker(&mut self, id: WorkerId, seconds: u64) {
        let until = self.now.tick.after_seconds(seconds);
        self.change_worker(id, |worker| worker.doubted_until = until);
    }

    /// A worker has unloaded a model.
    pub(super) fn model_has_gone(&mut self, id: WorkerId, name: &str) {
        self.change_worker(id, |worker| {
            let left = worker.models.iter().filter(|model| model.name != name);
            worker.models = Arc::new(left.cloned().collect());
        });
    }

    /// A worker is gone: what it held is nobody's, and it is started again if that is its way.
    fn worker_ended(&mut self, id: WorkerId, exit: WorkerExit, well: bool) {
        let Some(mut worker) = self.workers.get(&id).map(|worker| Worker::clone(worker)) else { return };
        let (asked, ready) =
            (worker.state == WorkerState::Stopping || self.stopping, worker.ready_since.take());
        worker.exit = Some(exit);
        worker.pid = None;
        worker.pids = Arc::default();
        worker.limit = None;
        worker.measured.clear();
        worker.models = Arc::default();
        worker.state = WorkerState::Exited;
        if let (Origin::Started(launch), false) = (&worker.origin, asked) {
            match worker.restarts.after_end(launch.restart, ready, well, self.now.tick) {
                Next::Stay(state) => worker.state = state,
                Next::StartAt(at) => {
                    let wait = i64::try_from(at.0.saturating_sub(self.now.tick.0)).unwrap_or(0);
                    let then = self.now.wall.checked_add(jiff::SignedDuration::from_millis(wait));
                    worker.state = WorkerState::Restarting;
                    worker.next_start = Some((at, then.unwrap_or(self.now.wall)));
                }
            }
        }
        let (owner, state) = (worker.owner.clone(), worker.state);
        let why = worker.exit.as_ref().map_or("", |exit| exit.reason.as_str());
        tracing::info!(name = %worker.name, ?state, why, "a worker has ended");
        self.workers.insert(id, Arc::new(worker));
        // When the daemon stops, nobody's memory is taken from under them.
        if !self.stopping {
            self.end_leases_of(&owner);
            self.end_reservations();
        }
        self.workers_changed = true;
        self.emit_worker(EventKind::WorkerExited, id);
        if let Some(replies) = self.ending_workers.remove(&id) {
            let last = self.workers.remove(&id).expect("it was put in above").to_api();
            for reply in replies {
                self.answer(reply, Ok(last.clone()));
            }
        }
        // What the device has free now shows at the next look: that is taken at once.
        if !self.stopping {
            self.measure();
        }
    }

    /// Ends what a worker allocated and nobody asked to keep.
    fn end_leases_of(&mut self, owner: &OwnerName) {
        let theirs = self.ledger.allocations().values().filter(|it| it.request.owner == *owner);
        let leases: Vec<_> = theirs
            .filter(|allocation| !allocation.request.persistent)
            .flat_map(|allocation| allocation.leases.iter())
            .filter(|(_, lease)| matches!(lease, Lease::TimeToLive { .. }))
            .map(|(lease, _)| *lease)
            .collect();
        for lease in leases {
            self.lease_ended(lease);
        }
    }

    /// Starts those whose pause is over.
    pub(super) fn restart_workers(&mut self) {
        let due = |worker: &&Arc<Worker>| {
            worker.next_start.is_some_and(|(at, _)| at <= self.now.tick) && !self.stopping
        };
        for id in self.workers.values().filter(due).map(|worker| worker.id).collect::<Vec<_>>() {
            self.change_worker(id, |worker| worker.restart_count += 1);
            self.launch(id);
        }
    }

    /// Looks which processes workers have, and what those use of each device, if it is time.
    pub(super) fn look_at_workers(&mut self) {
        let roots: BTreeSet<u32> = self.workers.values().filter_map(|worker| worker.pid).collect();
        if roots.is_empty() || self.now.tick < self.workers_looked_at {
            return;
        }
        self.workers_looked_at = Tick(self.now.tick.0 + MEASURE_MILLISECONDS);
        let now = self.now.tick;
        let mut devices = Vec::new();
        for device in self.devices.iter() {
            let id = &device.facts().device;
            let look = self.worker_looks.get(id);
            let is_due = look.is_none_or(|next| next.is_some_and(|next| next <= now));
            if is_due && !self.ledger.is_lost(id) {
                self.worker_looks.insert(id.clone(), None);
                devices.push(device.clone());
            }
        }
        let sender = self.sender.clone();
        tokio::task::spawn_blocking(move || {
            let families: BTreeMap<u32, Vec<u32>> =
                roots.into_iter().map(|pid| (pid, platform::with_descendants(pid))).collect();
            let all: BTreeSet<u32> = families.values().flatten().copied().collect();
            let all: Arc<[u32]> = all.into_iter().collect();
            // A daemon that has ended meanwhile needs none of it.
            let _ = sender.blocking_send(Event::WorkersFound(families));
            // One device that does not answer holds up no other.
            for device in devices {
                let (all, sender) = (all.clone(), sender.clone());
                tokio::task::spawn_blocking(move || {
                    let begun = std::time::Instant::now();
                    let used = device.used_by(&all).unwrap_or_default();
                    let device = device.facts().device.clone();
                    let _ = sender.blocking_send(Event::WorkersMeasured(device, used, begun.elapsed()));
                });
            }
        });
    }

    pub(super) fn workers_found(&mut self, families: &BTreeMap<u32, Vec<u32>>) {
        let of = |worker: &Worker| worker.pid.and_then(|pid| families.get(&pid));
        let other = |worker: &&Arc<Worker>| of(worker).is_some_and(|now| **now != *worker.pids);
        for id in self.workers.values().filter(other).map(|worker| worker.id).collect::<Vec<_>>() {
            self.change_worker(id, |worker| {
                worker.pids = of(worker).map(|pids| pids.as_slice().into()).unwrap_or_default();
            });
        }
    }

    /// Takes in what workers' processes were measured to have on a device.
    pub(super) fn workers_measured(&mut self, device: &DeviceId, used: &BTreeMap<u32, u64>, took: Duration) {
        // A tenth of a processor at most, however many pages there are to be looked at.
        let pause = u64::try_from(took.as_millis()).map_or(u64::MAX, |took| took.saturating_mul(10));
        self.worker_looks.insert(device.clone(), Some(Tick(self.now.tick.0.saturating_add(pause))));
        let now = |worker: &Worker| -> BTreeMap<u32, u64> {
            worker.pids.iter().filter_map(|pid| Some((*pid, *used.get(pid)?))).collect()
        };
        let seen = self.workers.values().map(|worker| (worker.id, now(worker)));
        let changed: Vec<_> = seen
            .filter(|(id, now)| !now.is_empty() && self.workers[id].measured.get(device) != Some(now))
            .collect();
        self.workers_changed |= !changed.is_empty();
        for (id, now) in changed {
            self.change_worker(id, |worker| drop(worker.measured.insert(device.clone(), now)));
        }
    }

    /// Charges workers what is theirs alone, if that may have changed: not what fills a reservation, which is charged already.
    pub(super) fn refigure_workers(&mut self) {
        if !std::mem::take(&mut self.workers_changed) {
            return;
        }
        let devices: Vec<DeviceId> = self.ledger.devices().map(|facts| facts.device.clone()).collect();
        for device in devices {
            // What a process has is counted once, however many workers it is of.
            let of = self.workers.values().filter_map(|worker| worker.measured.get(&device));
            let own: BTreeMap<u32, u64> = of.flatten().map(|(pid, bytes)| (*pid, *bytes)).collect();
            let filled = self.filled_on(&device);
            let theirs = |(pid, bytes): (&u32, &u64)| bytes.saturating_sub(*filled.get(pid).unwrap_or(&0));
            let sum: u64 = own.iter().map(theirs).sum();
            // Of one whose processes nobody knows, what it says counts, as far as somebody has it.
            let unknown = self.workers.values().filter(|it| it.pid.is_none() && it.state.is_there());
            let models = unknown.flat_map(|worker| worker.models.iter());
            let said: u64 = models.filter(|it| it.device_id == device).map(|it| it.own_bytes).sum();
            self.ledger.note_workers(&device, sum.saturating_add(said));
        }
    }

    pub(super) fn emit_worker(&mut self, kind: EventKind, id: WorkerId) {
        let Some(worker) = self.workers.get(&id) else { return };
        let mut data = serde_json::json!({ "workerId": id, "name": worker.name, "state": worker.state });
        match kind {
            EventKind::WorkerFault => {
                let seen = worker.log.seen();
                data["fault"] = serde_json::json!(seen.last_fault.map(|fault| fault.message));
                data["faultCount"] = seen.fault_count.into();
            }
            EventKind::WorkerExited => {
                data["exit"] = serde_json::json!(worker.exit);
                data["nextStartAt"] = serde_json::json!(worker.next_start.map(|(_, at)| at));
            }
            _ => data["pid"] = worker.pid.into(),
        }
        self.emit(kind, data);
    }
}
