//! Relief: models go because memory is tight or somebody asks for it, the daemon's and the workers' in one order of cost.
//!
//! In rounds, until enough is free, nothing more can go, or time is over. First what is held for nobody goes back and workers are told how
//! tight it is; then, each time, the cheapest set that should be enough goes, is waited for and measured. What workers say they let
//! go is believed once their processes are measured to have less.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::value::RawValue;
use vramd_api::worker_protocol::{UNLOAD_MODEL, bytes_of};
use vramd_api::{
    AllocationId, ApiError, Bytes, DeviceId, ErrorCode, EventKind, EvictedComponent as Evicted,
    EvictionPolicy, ModelsOptimized, OperationId, OperationKind, OptimizeModels, PerformanceImpact,
    PressureLevel, ReliefAction, ReliefStep, UnloadedModel, WorkerId, WorkerOutcome,
};
use vramd_core::Tick;
use vramd_core::eviction::{self, Candidate};
use vramd_core::ledger::Allocation;

use super::operations::Running;
use super::pressure::level_data;
use super::ways::{Ask, Means, Way};
use super::{Caller, Event, Reply, State};
use crate::platform;

/// How long it may take, where nobody says.
const DEFAULT_MILLISECONDS: u64 = 10_000;
/// How long a worker may take for what it is asked.
const ASK_PATIENCE: Duration = Duration::from_secs(5);
const TELL_PATIENCE: Duration = Duration::from_millis(500);
/// After so long the next are asked too, where memory is tight.
const ANSWER_MILLISECONDS: u64 = 500;
/// So long nobody asks a worker again that did not answer, or said what was not so.
const DOUBT_SECONDS: u64 = 30;
/// How long memory may take to be free after a worker says that it is.
const SETTLE_PATIENCE: Duration = Duration::from_millis(1500);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long readers may take to hang up once their worker says they have.
const HANG_UP_MILLISECONDS: u64 = 500;
/// Who says less than this was freed is not held to it.
const LEAST_CLAIM: u64 = 1 << 20;

/// What is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// As much as pressure asks for, and that so many bytes are free in the end: what workers let go of is so for us alone.
    Pressure { free_bytes: u64 },
    /// The level, and so many bytes at least.
    Level(PressureLevel, u64),
    /// So many bytes.
    Bytes(u64),
    /// All that is idle.
    All,
}

/// One under way.
#[derive(Debug)]
pub(super) struct Relief {
    device: DeviceId,
    goal: Goal,
    policy: EvictionPolicy,
    pub excluded: BTreeSet<String>,
    /// Who asked for it: others' workers are not asked. None: the daemon itself.
    pub caller: Option<Caller>,
    most_models: usize,
    begun: Tick,
    deadline: Tick,
    reply: Option<Reply<ModelsOptimized>>,
    /// What was needed when it began.
    needed: u64,
    told: bool,
    /// Unloads of the daemon's, and what each is of.
    unloads: BTreeMap<OperationId, Vec<Evicted>>,
    /// Answers of workers that have not come, and how long they are waited for where memory is tight.
    asked: usize,
    hurries_from: Tick,
    pub tried: BTreeSet<(WorkerId, String)>,
    /// What workers let go of: it is idle once their connections have closed, at that time at the latest.
    released: BTreeMap<AllocationId, Tick>,
    /// The next round is decided by a measurement that began after this.
    measured_after: Option<Tick>,
    unloaded: Vec<UnloadedModel>,
    workers: BTreeMap<WorkerId, WorkerOutcome>,
    impact: PerformanceImpact,
}

impl Relief {
    /// What has gone is to be loaded again one day.
    fn misses(&mut self, gone: &Candidate) {
        self.impact.reload_seconds += gone.reload_seconds;
        self.impact.expected_seconds_per_hour += gone.reload_seconds * gone.uses_per_second * 3600.0;
    }
}

/// How a worker did what it was asked.
#[derive(Debug)]
pub struct Asked {
    pub operation: OperationId,
    worker: WorkerId,
    /// What it was asked to unload; None: it was told of the pressure.
    model: Option<String>,
    requested_bytes: u64,
    /// What its absence costs, where it is the worker's own.
    candidate: Option<Candidate>,
    /// What it says that it let go of its own.
    outcome: Result<u64, ApiError>,
    /// By how much less its process has.
    measured_bytes: Option<u64>,
}

impl State {
    /// The operation that frees memory on a device.
    pub(super) fn relieving(&self, device: &DeviceId) -> Option<OperationId> {
        let mut all = self.operations.running.iter();
        all.find_map(|(id, running)| match running {
            Running::Relief(relief) if relief.device == *device => Some(*id),
            _ => None,
        })
    }

    pub(super) fn optimize_models(
        &mut self,
        device: DeviceId,
        request: &OptimizeModels,
        caller: Caller,
        reply: Reply<ModelsOptimized>,
    ) {
        if let Some(operation) = self.relieving(&device) {
            let error = ApiError::new(ErrorCode::Conflict, format!("{device} is being relieved already"));
            let error = error.hint("wait for that operation").detail("operationId", operation.to_string());
            return self.answer(reply, Err(error));
        }
        let target = request.target_pressure_level.unwrap_or(PressureLevel::Moderate);
        let least = request.min_memory_to_free.map(vramd_api::Bytes::get);
        let goal = match (least, request.target_pressure_level) {
            (Some(bytes), None) => Goal::Bytes(bytes),
            (None, None) if request.force_optimization => Goal::All,
            (least, _) => Goal::Level(target, least.unwrap_or(0)),
        };
        let policy = request.strategy.unwrap_or_else(|| self.policy_on(&device));
        if let Some(unknown) = request.exclude_models.iter().find(|name| !self.is_model(name)) {
            let error = ApiError::invalid("excludeModels", format!("there is no model {unknown}"));
            let hint = "`vramd models` and `vramd workers` show those that there are";
            return self.answer(reply, Err(error.hint(hint)));
        }
        if self.remaining(&device, goal, 0) == 0 {
            let level = self.level_on(&device);
            let message = if level > target {
                format!(
                    "{device} is at {level:?} because tasks wait for its memory, not because bytes lack: nothing was done"
                )
            } else {
                format!("{device} is at {level:?} already: nothing was done")
            };
            return self.answer(reply, Ok(nothing_done(device, policy, level, message)));
        }
        self.begin_relief(&device, goal, Some((request, (caller, reply))));
    }

    /// Whether the daemon or a worker has a model of that name.
    fn is_model(&self, name: &str) -> bool {
        let of_workers = || self.workers.values().flat_map(|worker| worker.models.iter());
        name.parse().is_ok_and(|name| self.models.get(&name).is_some())
            || of_workers().any(|model| model.name == name)
    }

    pub(super) fn begin_relief(
        &mut self,
        device: &DeviceId,
        goal: Goal,
        asked: Option<(&OptimizeModels, (Caller, Reply<ModelsOptimized>))>,
    ) {
        let needed = self.remaining(device, goal, 0);
        let subject = match goal {
            Goal::Pressure { .. } => format!("{device}, where pressure is {:?}", self.level_on(device)),
            _ => device.to_string(),
        };
        let total = if goal == Goal::All { 0 } else { needed };
        let operation = self.operations.begin(OperationKind::Optimize, subject, total, self.now);
        let (request, asked) = asked.unzip();
        let (caller, reply) = asked.unzip();
        let milliseconds = request.and_then(|it| it.max_optimization_time_ms).unwrap_or(DEFAULT_MILLISECONDS);
        let relief = Relief {
            device: device.clone(),
            goal,
            policy: request.and_then(|it| it.strategy).unwrap_or_else(|| self.policy_on(device)),
            excluded: request.map(|it| it.exclude_models.iter().cloned().collect()).unwrap_or_default(),
            caller: caller.filter(|caller| !caller.is_admin()),
            most_models: request
                .and_then(|it| it.max_models_to_unload)
                .map_or(usize::MAX, |most| most as usize),
            begun: self.now.tick,
            deadline: Tick(self.now.tick.0 + milliseconds),
            reply,
            needed,
            told: false,
            unloads: BTreeMap::new(),
            asked: 0,
            hurries_from: Tick::default(),
            tried: BTreeSet::new(),
            released: BTreeMap::new(),
            measured_after: None,
            unloaded: Vec::new(),
            workers: BTreeMap::new(),
            impact: PerformanceImpact::default(),
        };
        self.operations.running.insert(operation, Running::Relief(Box::new(relief)));
        if let Ok(shown) = self.operations.show(operation) {
            self.emit(EventKind::OperationChanged, serde_json::json!(shown));
        }
        self.to_go_on.insert(operation);
    }

    /// How much is still to become free.
    fn remaining(&self, device: &DeviceId, goal: Goal, freed: u64) -> u64 {
        let Some(gauge) = self.gauges.get(device) else { return 0 };
        match goal {
            Goal::Pressure { free_bytes } => {
                gauge.needs().max(free_bytes.saturating_sub(gauge.reading().free_bytes))
            }
            Goal::Level(target, least) => {
                let above = match target {
                    PressureLevel::Normal => PressureLevel::Moderate,
                    PressureLevel::Moderate => PressureLevel::High,
                    PressureLevel::High | PressureLevel::Critical => PressureLevel::Critical,
                };
                let by_level = if gauge.level() > target { gauge.needs_below(above) } else { 0 };
                // Whatever is asked for meanwhile, pressure has its due.
                by_level.max(least.saturating_sub(freed)).max(gauge.needs())
            }
            Goal::Bytes(bytes) => bytes.saturating_sub(freed).max(gauge.needs()),
            Goal::All => u64::MAX,
        }
    }

    fn relief(&mut self, operation: OperationId) -> Option<&mut Relief> {
        match self.operations.running.get_mut(&operation) {
            Some(Running::Relief(relief)) => Some(relief),
            _ => None,
        }
    }

    /// Takes the next step, if the last is done.
    pub(super) fn go_on_relieving(&mut self, operation: OperationId) {
        let Some(Running::Relief(relief)) = self.operations.running.get(&operation) else { return };
        if self.operations.cancelled(operation) || self.stopping {
            return self.end_relief(operation, "it was cancelled");
        }
        if relief.deadline <= self.now.tick {
            return self.end_relief(operation, "time is over");
        }
        if self.ledger.is_lost(&relief.device) {
            return self.end_relief(operation, "the device is lost");
        }
        let readers_left = relief.released.iter().any(|(id, until)| {
            *until > self.now.tick && self.ledger.allocation(*id).is_some_and(Allocation::is_attached)
        });
        // Who is asked and does not answer at once holds nobody up where memory is tight.
        let hurries = self.gauges.get(&relief.device).is_some_and(|gauge| gauge.needs() > 0);
        let waits = relief.asked > 0 && (!hurries || self.now.tick < relief.hurries_from);
        if waits || !relief.unloads.is_empty() || relief.measured_after.is_some() || readers_left {
            return;
        }
        let freed = relief.unloaded.iter().map(|one| one.measured_bytes).sum();
        let needed = self.remaining(&relief.device, relief.goal, freed);
        if needed == 0 {
            return self.end_relief(operation, "enough is free");
        }
        if relief.told {
            self.choose_for_relief(operation, needed);
        } else {
            self.tell_for_relief(operation, needed);
        }
    }

    /// The first round: what costs nothing.
    fn tell_for_relief(&mut self, operation: OperationId, needed: u64) {
        let Some(relief) = self.relief(operation) else { return };
        relief.told = true;
        let (device, goal) = (relief.device.clone(), relief.goal);
        if let Some((segment, bytes)) = self.ledger.spare(&device)
            && let Some(work) = self.ledger.release_spare(&device, segment)
        {
            self.perform(work);
            let step = step(operation, &device, ReliefAction::DropPool, bytes);
            self.emit(
                EventKind::PressureStep,
                ReliefStep { acknowledged_bytes: bytes, measured_bytes: bytes, ..step },
            );
        }
        // Workers hear of pressure, not of what somebody asks for.
        if matches!(goal, Goal::Pressure { .. }) {
            let data = level_data(&device, self.level_on(&device), needed);
            let told: Vec<_> = self.told_of_levels().map(|it| (it.id, it.pid, it.link.clone())).collect();
            for (worker, pid, link) in told {
                let data = data.clone();
                let call = async move {
                    let answer = link.call("memory.pressure_check", &data, TELL_PATIENCE).await?;
                    Ok(answered(&answer)?.freed_mb.and_then(bytes_of).unwrap_or(0))
                };
                self.ask_worker(operation, &device, (worker, pid), (None, 0, None), call);
            }
        }
        self.measure_for_relief(operation);
    }

    /// Has the cheapest set go that should be enough.
    fn choose_for_relief(&mut self, operation: OperationId, needed: u64) {
        let Some(Running::Relief(relief)) = self.operations.running.get(&operation) else { return };
        let (device, policy, deadline) = (relief.device.clone(), relief.policy, relief.deadline);
        let gone: BTreeSet<_> =
            relief.unloaded.iter().map(|one| (one.worker.clone(), one.model.clone())).collect();
        let places = relief.most_models.saturating_sub(gone.len());
        let mut ways = self.ways(&device, Some(relief));
        // What workers let go of for this goes before all else is asked.
        let released: Vec<usize> =
            (0..ways.len()).filter(|at| self.was_released(relief, &ways[*at])).collect();
        let candidates: Vec<Candidate> = ways.iter().map(|way| way.candidate).collect();
        let mut chosen = if released.is_empty() {
            eviction::choose(&candidates, needed, policy).unwrap_or_else(|| (0..ways.len()).collect())
        } else {
            released
        };
        chosen.sort_by(|a, b| candidates[*a].loss().total_cmp(&candidates[*b].loss()).then(a.cmp(b)));
        // Several parts of one model are one model.
        let mut going = BTreeSet::new();
        chosen.retain(|at| {
            let model = ways[*at].model();
            gone.contains(&model) || going.contains(&model) || (going.len() < places && going.insert(model))
        });
        // Somebody may still answer, or something that was loaded just now may go in time.
        let more = relief.asked > 0 || self.more_may_go_before(&device, deadline);
        if chosen.is_empty() && places > 0 && more {
            return;
        }
        if chosen.is_empty() {
            let why = if ways.is_empty() { "nothing more may go" } else { "as many went as may" };
            return self.end_relief(operation, why);
        }
        chosen.sort_unstable();
        let mut taken: Vec<Way> = chosen.into_iter().rev().map(|at| ways.swap_remove(at)).collect();
        taken.reverse();
        for way in taken {
            match way.means {
                Means::Unload(parts) => {
                    if let Some(relief) = self.relief(operation) {
                        relief.misses(&way.candidate);
                    }
                    self.unload_for_relief(operation, &parts, policy);
                }
                Means::Ask(ask) => self.ask_for_relief(operation, &device, &ask, Some(way.candidate)),
                Means::LetGo { model, asks } => {
                    let until = Tick(self.now.tick.0 + HANG_UP_MILLISECONDS);
                    let blocks = self.blocks_of(&model, &device);
                    if let Some(relief) = self.relief(operation) {
                        relief.released.extend(blocks.into_iter().map(|id| (id, until)));
                    }
                    for ask in asks {
                        self.ask_for_relief(operation, &device, &ask, None);
                    }
                }
            }
        }
        self.measure_for_relief(operation);
    }

    /// Whether something that was loaded just now, and stays for a moment, may go in time.
    fn more_may_go_before(&self, device: &DeviceId, deadline: Tick) -> bool {
        let idle = self.candidates(device, vramd_api::Priority::Critical, None);
        idle.iter().any(|idle| idle.stays > self.now.tick && idle.stays <= deadline)
    }

    fn was_released(&self, relief: &Relief, way: &Way) -> bool {
        let Means::Unload(parts) = &way.means else { return false };
        let block = |part: &Evicted| {
            let entry = self.models.get(&part.model)?.components.get(&part.component)?;
            Some(entry.residency.get(&part.device_id)?.allocation())
        };
        parts.iter().filter_map(block).any(|id| relief.released.contains_key(&id))
    }

    fn unload_for_relief(&mut self, operation: OperationId, parts: &[Evicted], policy: EvictionPolicy) {
        self.tell_evicted(parts, policy, "other programs", "relief", &[]);
        let begun = self.unload_evicted(parts, true);
        let Some(relief) = self.relief(operation) else { return };
        for (at, id) in begun.into_iter().enumerate() {
            // What several share is one block: it is counted with the first of them.
            let parts = parts.iter().enumerate().map(|(number, part)| {
                let bytes = if number == 0 { part.bytes } else { 0 };
                Evicted { bytes, ..part.clone() }
            });
            relief.unloads.insert(id, if at == 0 { parts.collect() } else { Vec::new() });
        }
        self.promote_later(super::tiers::PROMOTE_LATER_SECONDS);
        // One that had nothing to wait for has ended already.
        let ended = |id: &OperationId| self.operations.show(*id).is_ok_and(|it| it.state.ended());
        let Some(Running::Relief(relief)) = self.operations.running.get(&operation) else { return };
        for id in relief.unloads.keys().copied().filter(ended).collect::<Vec<_>>() {
            self.unloaded_for_relief(id);
        }
    }

    /// An unload has ended: was it for relief?
    pub(super) fn unloaded_for_relief(&mut self, unload: OperationId) {
        let mut all = self.operations.running.iter();
        let found = all.find_map(|(id, running)| match running {
            Running::Relief(relief) if relief.unloads.contains_key(&unload) => Some(*id),
            _ => None,
        });
        let Some(operation) = found else { return };
        let error = self.operations.show(unload).ok().and_then(|it| it.error).map(|error| error.message);
        let Some(relief) = self.relief(operation) else { return };
        let parts = relief.unloads.remove(&unload).unwrap_or_default();
        let device = relief.device.clone();
        let mut steps = Vec::new();
        for part in parts {
            // What the device has given back, it was asked to verify.
            let measured = if error.is_none() { part.bytes } else { 0 };
            relief.unloaded.push(UnloadedModel {
                model: part.model.to_string(),
                component: Some(part.component.to_string()),
                worker: None,
                asked_bytes: part.bytes,
                acknowledged_bytes: measured,
                measured_bytes: measured,
            });
            steps.push(ReliefStep {
                model: Some(format!("{}/{}", part.model, part.component)),
                acknowledged_bytes: measured,
                measured_bytes: measured,
                error: error.clone(),
                ..step(operation, &device, ReliefAction::UnloadModel, part.bytes)
            });
        }
        for step in steps {
            self.emit(EventKind::PressureStep, step);
        }
        self.measure_for_relief(operation);
        self.to_go_on.insert(operation);
    }

    fn ask_for_relief(
        &mut self,
        operation: OperationId,
        device: &DeviceId,
        ask: &Ask,
        candidate: Option<Candidate>,
    ) {
        let Some(worker) = self.workers.get(&ask.worker) else { return };
        let (link, pid) = (worker.link.clone(), worker.pid);
        let Some(relief) = self.relief(operation) else { return };
        // It may be asked for two reasons.
        if !relief.tried.insert((ask.worker, ask.model.clone())) {
            return;
        }
        let (data, bytes) = (serde_json::json!({ "name": ask.model }), ask.bytes);
        let call = async move {
            let answer = link.call(UNLOAD_MODEL, &data, ASK_PATIENCE).await?;
            // One that does not say is taken to mean what it was asked.
            Ok(answered(&answer)?.acknowledged_mb.map_or(bytes, |said| bytes_of(said).unwrap_or(0)))
        };
        let asked = (Some(ask.model.clone()), bytes, candidate);
        self.ask_worker(operation, device, (ask.worker, pid), asked, call);
    }

    /// Asks a worker for something that frees memory, and measures whether it does.
    fn ask_worker(
        &mut self,
        operation: OperationId,
        device: &DeviceId,
        (worker, pid): (WorkerId, Option<u32>),
        (model, requested_bytes, candidate): (Option<String>, u64, Option<Candidate>),
        call: impl Future<Output = Result<u64, ApiError>> + Send + 'static,
    ) {
        let hurries_from = Tick(self.now.tick.0 + ANSWER_MILLISECONDS);
        let Some(relief) = self.relief(operation) else { return };
        relief.asked += 1;
        relief.hurries_from = hurries_from;
        let on = self.devices.get(device).expect("it is the ledger's").clone();
        let sender = self.sender.clone();
        self.jobs += 1;
        tokio::spawn(async move {
            let used = async || {
                let on = on.clone();
                let look = move || match pid {
                    Some(pid) => {
                        let used = on.used_by(&platform::with_descendants(pid)).ok()?;
                        (!used.is_empty()).then(|| used.values().sum())
                    }
                    // Nobody knows its processes: what the whole device has in use.
                    None => on.sample().ok().map(|sample| sample.used_bytes),
                };
                tokio::task::spawn_blocking(look).await.ok().flatten()
            };
            let before = used().await;
            let outcome = call.await;
            let said = outcome.as_ref().copied().unwrap_or(0);
            let until = tokio::time::Instant::now() + SETTLE_PATIENCE;
            let measured_bytes = loop {
                let looked = tokio::time::Instant::now();
                let freed = before.zip(used().await).map(|(before, after)| before.saturating_sub(after));
                // Some say so before it is true.
                if said < LEAST_CLAIM
                    || freed.is_none_or(|freed| freed >= said / 2)
                    || tokio::time::Instant::now() >= until
                {
                    // More is others' doing: several things go at once.
                    break freed.map(|freed| freed.min(said));
                }
                tokio::time::sleep(LOOK_AGAIN.max(looked.elapsed())).await;
            };
            let asked =
                Asked { operation, worker, model, requested_bytes, candidate, outcome, measured_bytes };
            let _ = sender.send(Event::WorkerAsked(Box::new(asked))).await;
        });
    }

    /// A worker has answered, or not in time.
    pub(super) fn worker_asked(&mut self, asked: Asked) {
        let Asked { operation, worker: id, model, requested_bytes, candidate, outcome, measured_bytes } =
            asked;
        let Some(worker) = self.workers.get(&id).cloned() else {
            if let Some(relief) = self.relief(operation) {
                relief.asked -= 1;
            }
            return;
        };
        let acknowledged = outcome.as_ref().copied().unwrap_or(0);
        let silent = outcome.as_ref().is_err_and(|error| error.code == ErrorCode::Timeout);
        if silent && model.is_some() {
            self.doubt_worker(id, DOUBT_SECONDS);
        }
        let mut error = outcome.err().map(|error| error.message);
        // Where nobody can tell what a process has, the device's own figures decide what comes next.
        let measured = measured_bytes.unwrap_or(acknowledged);
        if model.is_some() && acknowledged >= LEAST_CLAIM && measured < acknowledged / 2 {
            let what = model.as_deref().unwrap_or_default();
            let fault =
                format!("it says that {what} went with {acknowledged} bytes; {measured} were measured");
            worker.note_fault(&fault);
            error = Some(fault);
            self.doubt_worker(id, DOUBT_SECONDS);
            self.emit_worker(EventKind::WorkerFault, id);
        }
        // It may take its time to say so by itself.
        if let Some(model) = model.as_deref().filter(|_| error.is_none()) {
            self.model_has_gone(id, model);
        }
        let Some(relief) = self.relief(operation) else { return };
        relief.asked -= 1;
        let outcome = relief.workers.entry(id).or_insert_with(|| WorkerOutcome {
            worker_id: id,
            name: worker.name.clone(),
            asked_bytes: 0,
            acknowledged_bytes: 0,
            measured_bytes: 0,
            errors: Vec::new(),
        });
        outcome.asked_bytes += requested_bytes;
        outcome.acknowledged_bytes += acknowledged;
        outcome.measured_bytes += measured;
        outcome.errors.extend(error.clone());
        let went = model.clone().filter(|_| error.is_none() && requested_bytes > 0);
        if let Some(model) = went {
            if let Some(candidate) = candidate {
                relief.misses(&candidate);
            }
            relief.unloaded.push(UnloadedModel {
                model,
                component: None,
                worker: Some(worker.name.clone()),
                asked_bytes: requested_bytes,
                acknowledged_bytes: acknowledged,
                measured_bytes: measured,
            });
        }
        let device = relief.device.clone();
        let action = match &model {
            None => ReliefAction::TellWorker,
            Some(_) if requested_bytes > 0 => ReliefAction::AskWorker,
            Some(_) => ReliefAction::AskToLetGo,
        };
        let told = ReliefStep {
            model,
            worker: Some(worker.name.clone()),
            acknowledged_bytes: acknowledged,
            measured_bytes: measured,
            error,
            ..step(operation, &device, action, requested_bytes)
        };
        self.emit(EventKind::PressureStep, told);
        self.measure_for_relief(operation);
        self.to_go_on.insert(operation);
    }

    /// What comes next is decided by a look at the device that begins from now on.
    fn measure_for_relief(&mut self, operation: OperationId) {
        let now = self.now.tick;
        if let Some(relief) = self.relief(operation) {
            relief.measured_after = Some(now);
        }
        self.measure();
    }

    /// A device was measured, by a look that began at `began`.
    pub(super) fn measured_for_relief(&mut self, device: &DeviceId, began: Tick) {
        let Some(operation) = self.relieving(device) else { return };
        let Some(relief) = self.relief(operation) else { return };
        match relief.measured_after {
            Some(after) if after > began => self.measure(),
            Some(_) => {
                relief.measured_after = None;
                self.to_go_on.insert(operation);
            }
            None => {}
        }
    }

    fn end_relief(&mut self, operation: OperationId, why: &str) {
        let Some(Running::Relief(relief)) = self.operations.running.remove(&operation) else { return };
        let relief = *relief;
        let device = relief.device;
        let level = self.level_on(&device);
        let freed: u64 = relief.unloaded.iter().map(|one| one.measured_bytes).sum();
        let told: u64 = relief.workers.values().map(|it| it.measured_bytes).sum();
        let of_unloaded: u64 =
            relief.unloaded.iter().filter(|it| it.worker.is_some()).map(|it| it.measured_bytes).sum();
        // Caches that workers dropped count too.
        let freed = freed + told.saturating_sub(of_unloaded);
        // What workers refused was asked for too.
        let sum = |of_daemon: fn(&UnloadedModel) -> u64, of_worker: fn(&WorkerOutcome) -> u64| -> u64 {
            let own = relief.unloaded.iter().filter(|it| it.worker.is_none());
            own.map(of_daemon).sum::<u64>() + relief.workers.values().map(of_worker).sum::<u64>()
        };
        let names: BTreeSet<&str> = relief.unloaded.iter().map(|one| one.model.as_str()).collect();
        let count = if names.len() == 1 { "1 model".to_owned() } else { format!("{} models", names.len()) };
        let failed = relief.workers.values().filter(|it| !it.errors.is_empty()).count();
        let partly = if failed > 0 {
            let worker = if failed == 1 { "worker" } else { "workers" };
            format!("; {failed} {worker} did not do all that was asked")
        } else {
            String::new()
        };
        let message = format!("{count} went, {} were measured as free: {why}{partly}", Bytes::show(freed));
        let rounded = |value: f64| (value * 1000.0).round() / 1000.0;
        let result = ModelsOptimized {
            operation_id: Some(operation),
            device_id: device.clone(),
            optimization_triggered: true,
            optimization_strategy: relief.policy,
            needed_bytes: if relief.goal == Goal::All { 0 } else { relief.needed },
            asked_bytes: sum(|it| it.asked_bytes, |it| it.asked_bytes),
            acknowledged_bytes: sum(|it| it.acknowledged_bytes, |it| it.acknowledged_bytes),
            memory_freed: freed,
            performance_impact: PerformanceImpact {
                reload_seconds: rounded(relief.impact.reload_seconds),
                expected_seconds_per_hour: rounded(relief.impact.expected_seconds_per_hour),
            },
            optimization_time_ms: self.now.tick.0.saturating_sub(relief.begun.0),
            message,
            new_pressure_level: level,
            models_unloaded: relief.unloaded,
            workers: relief.workers.into_values().collect(),
        };
        let cancelled = self.operations.cancelled(operation);
        if !cancelled {
            self.emit(EventKind::PressureRelieved, &result);
        }
        let outcome = if cancelled {
            Err(ApiError::new(ErrorCode::Cancelled, "it was cancelled; what had gone stays gone"))
        } else {
            Ok(serde_json::json!(result))
        };
        self.end_operation(operation, outcome);
        if let Some(reply) = relief.reply {
            self.answer(reply, Ok(result));
        }
    }
}

/// What a worker says of what it let go of.
#[derive(Debug, serde::Deserialize)]
struct Freed {
    acknowledged_mb: Option<f64>,
    freed_mb: Option<f64>,
}

fn answered(answer: &RawValue) -> Result<Freed, ApiError> {
    let unreadable =
        |error| ApiError::new(ErrorCode::WorkerFailed, format!("its answer cannot be read: {error}"));
    serde_json::from_str(answer.get()).map_err(unreadable)
}

fn step(operation: OperationId, device: &DeviceId, action: ReliefAction, asked_bytes: u64) -> ReliefStep {
    ReliefStep {
        operation_id: operation,
        device_id: device.clone(),
        action,
        model: None,
        worker: None,
        asked_bytes,
        acknowledged_bytes: 0,
        measured_bytes: 0,
        error: None,
    }
}

fn nothing_done(
    device: DeviceId,
    policy: EvictionPolicy,
    level: PressureLevel,
    message: String,
) -> ModelsOptimized {
    ModelsOptimized {
        operation_id: None,
        device_id: device,
        optimization_triggered: false,
        optimization_strategy: policy,
        needed_bytes: 0,
        asked_bytes: 0,
        acknowledged_bytes: 0,
        memory_freed: 0,
        models_unloaded: Vec::new(),
        performance_impact: PerformanceImpact::default(),
        optimization_time_ms: 0,
        message,
        new_pressure_level: level,
        workers: Vec::new(),
    }
}
