//! What could go from a device, the daemon's and the workers', by one measure of what it is worth.

use std::collections::BTreeSet;

use vramd_api::worker_protocol::UNLOAD_MODEL;
use vramd_api::{
    AllocationId, DeviceId, EvictedComponent as Evicted, Priority, RecommendedAction, ReliefAction, WorkerId,
    WorkerModel, WorkerName, WorkerState,
};
use vramd_core::eviction::{Candidate, Popularity};
use vramd_core::ledger::State as AllocationState;
use vramd_core::models::Residency;

use super::State;
use super::relief::Relief;
use super::room::{BYTES_PER_SECOND, Idle};
use super::workers::Worker;

/// A model that could go, and how.
#[derive(Debug)]
pub(super) struct Way {
    pub candidate: Candidate,
    pub means: Means,
}

#[derive(Debug)]
pub(super) enum Means {
    /// The daemon's own, used by nobody.
    Unload(Vec<Evicted>),
    /// A worker's own.
    Ask(Ask),
    /// The daemon's, which workers have attached and do not use.
    LetGo { model: String, asks: Vec<Ask> },
}

/// Something that a worker is to unload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ask {
    pub worker: WorkerId,
    pub name: WorkerName,
    pub model: String,
    /// Its own bytes that go with it.
    pub bytes: u64,
}

impl Way {
    pub fn name(&self) -> &str {
        match &self.means {
            Means::Unload(parts) => parts[0].model.as_str(),
            Means::Ask(ask) => &ask.model,
            Means::LetGo { model, .. } => model,
        }
    }

    /// Whether one of its models is among these.
    pub fn names_one_of(&self, names: &BTreeSet<String>) -> bool {
        match &self.means {
            Means::Unload(parts) => parts.iter().any(|part| names.contains(part.model.as_str())),
            Means::Ask(_) | Means::LetGo { .. } => names.contains(self.name()),
        }
    }

    /// The model that goes with it, and whose it is.
    pub fn model(&self) -> (Option<WorkerName>, String) {
        match &self.means {
            Means::Ask(ask) => (Some(ask.name.clone()), ask.model.clone()),
            Means::Unload(_) | Means::LetGo { .. } => (None, self.name().to_owned()),
        }
    }

    pub fn recommended(&self, device: &DeviceId) -> RecommendedAction {
        let idle = format!("{:.0} s", self.candidate.idle_seconds);
        let (action, reason, call) = match &self.means {
            Means::Unload(parts) => {
                let model = &parts[0].model;
                let reason = format!("{model} has been idle for {idle}");
                (ReliefAction::UnloadModel, reason, format!("POST /api/models/{model}/unload"))
            }
            Means::Ask(Ask { name, model, .. }) => {
                let reason = format!("{model} of worker {name} has been idle for {idle}");
                (ReliefAction::AskWorker, reason, format!("POST /api/workers/{name}/call {UNLOAD_MODEL}"))
            }
            Means::LetGo { model, asks } => {
                let reason = format!("{} workers have {model} attached and do not use it", asks.len());
                (ReliefAction::AskToLetGo, reason, format!("POST /api/memory/model/optimize/{device}"))
            }
        };
        RecommendedAction { action, reason, bytes: self.candidate.bytes, call }
    }
}

impl State {
    /// All models that could go from a device: the daemon's, the workers' own, and what workers have attached and do not use.
    pub(super) fn ways(&self, device: &DeviceId, relief: Option<&Relief>) -> Vec<Way> {
        let tried = |worker: &Worker, model: &str| {
            relief.is_some_and(|relief| relief.tried.contains(&(worker.id, model.to_owned())))
        };
        let idle = self.candidates(device, Priority::Critical, None);
        let mut ways: Vec<Way> = idle
            .into_iter()
            .filter(|idle| idle.stays <= self.now.tick)
            .map(|Idle { candidate, parts, .. }| Way { candidate, means: Means::Unload(parts) })
            .collect();
        let caller = relief.and_then(|relief| relief.caller);
        let can = |worker: &&Worker| {
            worker.state == WorkerState::Ready
                && worker.can(UNLOAD_MODEL)
                && worker.doubted_until <= self.now.tick
                && caller.is_none_or(|caller| worker.may(caller).is_ok())
        };
        let workers: Vec<&Worker> = self.workers.values().map(AsRef::as_ref).filter(can).collect();
        for worker in &workers {
            let own =
                worker.models.iter().filter(|it| it.device_id == *device && it.own_bytes > 0 && !it.busy);
            for model in own.filter(|model| !tried(worker, &model.name)) {
                let ask = ask(worker, model, model.own_bytes);
                ways.push(Way { candidate: self.worth(worker, model), means: Means::Ask(ask) });
            }
        }
        ways.extend(self.attached_by_workers(device, &workers, tried));
        if let Some(relief) = relief {
            ways.retain(|way| !way.names_one_of(&relief.excluded));
        }
        ways
    }

    /// Models of the daemon's that only workers have attached, who all say that they do not use them.
    fn attached_by_workers<'a>(
        &'a self,
        device: &'a DeviceId,
        workers: &'a [&Worker],
        tried: impl Fn(&Worker, &str) -> bool + 'a,
    ) -> impl Iterator<Item = Way> + 'a {
        let models = self.models.iter();
        let models =
            models.filter(|it| !it.pinned && !self.is_on_its_way(it) && !self.changing.contains(&it.name));
        models.filter_map(move |model| {
            let here = |entry: &'a vramd_core::models::Component| match entry.residency.get(device)? {
                Residency::Resident { allocation, stays, .. } if *stays <= self.now.tick => {
                    self.ledger.allocation(*allocation)
                }
                _ => None,
            };
            // What nobody has attached may go without being asked for.
            let parts: Vec<_> =
                model.components.values().filter_map(here).filter(|part| part.is_attached()).collect();
            let mut asks: Vec<Ask> = Vec::new();
            for part in &parts {
                let still = part.state == AllocationState::Active && part.tasks().next().is_none();
                let whole = self.ledger.segment_bytes(part.request.id) == Some(part.block_bytes);
                if !still || !whole || part.model_count() > 1 {
                    return None;
                }
                for holder in part.holders() {
                    let mine =
                        |report: &&WorkerModel| report.is_of(&model.name) && report.device_id == *device;
                    // A process may be several workers.
                    let of_process = workers.iter().filter(|worker| worker.pids.contains(&holder.pid));
                    let reports = of_process.flat_map(|worker| {
                        worker.models.iter().filter(mine).map(move |report| (worker, report))
                    });
                    let reports: Vec<_> = reports.collect();
                    if reports.is_empty() || reports.iter().any(|(of, it)| it.busy || tried(of, &it.name)) {
                        return None;
                    }
                    asks.extend(reports.into_iter().map(|(worker, report)| ask(worker, report, 0)));
                }
            }
            asks.sort_by(|a, b| (a.worker, &a.model).cmp(&(b.worker, &b.model)));
            asks.dedup();
            if asks.is_empty() {
                return None;
            }
            let bytes = parts.iter().map(|part| part.block_bytes).sum();
            let reload = model.components.values().map(|entry| {
                let bytes = entry.plan.as_ref().map_or(0, |plan| plan.layout.block_bytes);
                self.seconds_to_get_back(entry, device, bytes)
            });
            let idle = model.last_used.map_or(0, |used| self.now.tick.0.saturating_sub(used.tick.0));
            let candidate = Candidate {
                bytes,
                priority: model.priority,
                idle_seconds: idle as f64 / 1000.0,
                uses_per_second: model.popularity.uses_per_second(self.now.tick),
                reload_seconds: reload.sum(),
            };
            Some(Way { candidate, means: Means::LetGo { model: model.name.to_string(), asks } })
        })
    }

    pub(super) fn blocks_of(&self, model: &str, device: &DeviceId) -> Vec<AllocationId> {
        let model = model.parse().ok().and_then(|name| self.models.get(&name));
        let entries = model.into_iter().flat_map(|model| model.components.values());
        entries.filter_map(|entry| Some(entry.residency.get(device)?.allocation())).collect()
    }

    /// What a worker's model is worth, by the same measure as the daemon's.
    fn worth(&self, worker: &Worker, model: &WorkerModel) -> Candidate {
        let seconds = |since| self.now.wall.duration_since(since).as_secs_f64().max(0.0);
        let idle = model.last_used_at.map_or_else(|| seconds(worker.started_at), seconds);
        Candidate {
            // It cannot give more than it was measured to have.
            bytes: worker
                .measured_on(&model.device_id)
                .map_or(model.own_bytes, |most| most.min(model.own_bytes)),
            priority: model.priority,
            idle_seconds: idle,
            uses_per_second: Popularity::rate(model.use_count, seconds(worker.started_at), idle),
            reload_seconds: model.load_seconds.unwrap_or(model.own_bytes as f64 / BYTES_PER_SECOND),
        }
    }
}

fn ask(worker: &Worker, model: &WorkerModel, bytes: u64) -> Ask {
    Ask { worker: worker.id, name: worker.name.clone(), model: model.name.clone(), bytes }
}
