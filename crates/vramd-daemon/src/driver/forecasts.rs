//! Plans of loads: what is known of models and books is put together here; a thread then tries the loads on a copy.

use std::collections::{BTreeMap, BTreeSet};

use vramd_api::{
    AllocationType, Bytes, ComponentName, DeviceId, EvictedComponent, MemoryPlan, ModelName, PlanOutcome,
    PlannedModel, PlannedRun, Priority,
};
use vramd_core::ledger::Request;
use vramd_core::models::Residency;
use vramd_core::plan::{self, Ask, Idle, Outcome};

use super::models::{no_component, no_model};
use super::{Load, OnShortage, Reply, State};

/// Loads that nobody begins.
#[derive(Debug)]
pub struct PlanLoads {
    /// Each model once.
    pub models: Vec<PlannedLoad>,
}

#[derive(Debug)]
pub struct PlannedLoad {
    pub model: ModelName,
    /// All if None.
    pub components: Option<Vec<ComponentName>>,
    pub device: Option<DeviceId>,
    /// What it runs beside its weights.
    pub run: Option<PlannedRun>,
}

/// What is known of one of them.
struct Known {
    model: ModelName,
    there: Option<DeviceId>,
    working_bytes: Option<u64>,
    /// For each device: how long it takes, and from where it is copied.
    seconds: BTreeMap<DeviceId, (f64, BTreeSet<DeviceId>)>,
}

impl State {
    pub(super) fn plan_loads(&mut self, request: &PlanLoads, reply: Reply<MemoryPlan>) {
        match self.forecast(request) {
            Err(error) => self.answer(reply, Err(error)),
            Ok(compute) => {
                // It is none of the driver's jobs: nothing comes of it.
                tokio::task::spawn_blocking(move || {
                    let _ = reply.send(Ok(compute()));
                });
            }
        }
    }

    fn forecast(
        &self,
        request: &PlanLoads,
    ) -> Result<impl FnOnce() -> MemoryPlan + Send + 'static, vramd_api::ApiError> {
        let (mut asks, mut known) = (Vec::new(), Vec::new());
        for load in &request.models {
            let (ask, one) = self.known(load)?;
            asks.push(ask);
            known.push(one);
        }
        let planned: BTreeSet<&ModelName> = request.models.iter().map(|load| &load.model).collect();
        let (mut idle, mut parts, mut policies) = (Vec::new(), Vec::new(), BTreeMap::new());
        for facts in self.ledger.devices() {
            let device = &facts.device;
            policies.insert(device.clone(), self.policy_on(device));
            // What stays for somebody stays for a while only: in a plan it may go.
            for one in self.candidates(device, Priority::Critical, None) {
                if one.parts.iter().any(|part| planned.contains(&part.model)) {
                    continue;
                }
                let (allocation, candidate) = (one.allocation, one.candidate);
                idle.push(Idle { allocation, device: device.clone(), candidate });
                parts.push(one.parts);
            }
        }
        let (mut ledger, now) = (self.ledger.clone(), self.now);
        Ok(move || {
            ledger.settle(now);
            let policy = |device: &DeviceId| policies.get(device).copied().unwrap_or_default();
            let all: Vec<&Ask> = asks.iter().collect();
            let outcomes = plan::plan(ledger.clone(), &all, &idle, &policy, now);
            let fits = outcomes.iter().all(|outcome| matches!(outcome, Outcome::Fits { .. }));
            let set = if fits { Vec::new() } else { plan::largest_set(&ledger, &asks, &idle, &policy, now) };
            let largest_set = set.into_iter().map(|at| known[at].model.clone()).collect();
            let models: Vec<PlannedModel> = known
                .into_iter()
                .zip(&asks)
                .zip(outcomes)
                .map(|((known, ask), outcome)| shown(known, ask, outcome, &parts))
                .collect();
            MemoryPlan {
                fits,
                evicted: models.iter().flat_map(|model| model.evicted.clone()).collect(),
                seconds: rounded(models.iter().map(|model| model.seconds).sum()),
                models,
                largest_set,
            }
        })
    }

    fn known(&self, planned: &PlannedLoad) -> Result<(Ask, Known), vramd_api::ApiError> {
        let PlannedLoad { model: name, components, device, run } = planned;
        let model = self.models.get(name).ok_or_else(|| no_model(name))?;
        let wanted: Vec<ComponentName> =
            components.clone().unwrap_or_else(|| model.components.keys().cloned().collect());
        for component in &wanted {
            let entry = model.components.get(component).ok_or_else(|| no_component(model, component))?;
            if let Err(error) = &entry.plan {
                return Err((**error).clone());
            }
        }
        let device = device.clone().or_else(|| self.most_parts(model, &wanted));
        let load = Load {
            model: name.clone(),
            device: device.clone(),
            components: None,
            keep_alive: None,
            shortage: OnShortage { evict: true, spill: false, wait_seconds: None },
            split: false,
            checksum: false,
            unasked: false,
            cache_for: None,
        };
        let is_there = |component: &ComponentName| {
            let entry = &model.components[component];
            let Some(device) = &device else { return false };
            let held = matches!(
                entry.residency.get(device),
                Some(Residency::Resident { .. } | Residency::Loading { .. })
            );
            let of_others = entry.plan.as_ref().is_ok_and(|plan| self.has_bytes(plan, device));
            held || of_others
        };
        // A load that names no device finds it wherever its parts are.
        let somewhere = planned.device.is_none() && self.places(model, &wanted).len() == wanted.len();
        let missing: Vec<&ComponentName> =
            wanted.iter().filter(|component| !somewhere && !is_there(component)).collect();
        let mut requests: Vec<Request> = missing
            .iter()
            .filter_map(|component| {
                let plan = model.components[*component].plan.as_ref().ok()?;
                Some(Self::weights(&load, Some(component), plan.layout.block_bytes, model.priority))
            })
            .collect();
        let mut seconds = BTreeMap::new();
        for facts in self.ledger.devices() {
            let (mut sum, mut from) = (0.0, BTreeSet::new());
            for component in &missing {
                let entry = &model.components[*component];
                let bytes = entry.plan.as_ref().map_or(0, |plan| plan.layout.block_bytes);
                sum += self.seconds_to_get_back(entry, &facts.device, bytes);
                let elsewhere = entry.residency.iter().find(|(on, residency)| {
                    **on != facts.device && matches!(residency, Residency::Resident { .. })
                });
                from.extend(elsewhere.map(|(on, _)| on.clone()));
            }
            seconds.insert(facts.device.clone(), (sum, from));
        }
        let there = device.clone().filter(|_| missing.is_empty());
        let working_bytes =
            run.as_ref().map(|run| self.working_bytes(name, run, device.as_ref())).transpose()?;
        requests.extend(working_bytes.map(|size_bytes| Request {
            allocation_type: AllocationType::Activation,
            owner: "local".parse().expect("a valid owner"),
            purpose: String::new(),
            sealed: false,
            room: Some(Box::default()),
            ..Self::weights(&load, None, size_bytes, model.priority)
        }));
        let on = device.into_iter().collect();
        Ok((Ask { requests, on }, Known { model: name.clone(), there, working_bytes, seconds }))
    }

    /// How much a run is taken to need beside the weights: on that device, or at most on those that it may go to.
    fn working_bytes(
        &self,
        name: &ModelName,
        run: &PlannedRun,
        device: Option<&DeviceId>,
    ) -> Result<u64, vramd_api::ApiError> {
        let said = run.size_bytes.map(Bytes::get);
        let devices = device.map_or_else(|| self.nearest_devices(), |device| vec![device.clone()]);
        let expected = |device| self.expected(Some(name), device, &run.shape, said);
        let most = devices.iter().filter_map(expected).map(|(bytes, _)| bytes).max();
        most.ok_or_else(|| {
            let names: Vec<_> = devices.iter().map(DeviceId::as_str).collect();
            let what =
                format!("how much such a run of {name} takes was not measured on {}", names.join(", "));
            let hint =
                "say sizeBytes; `vramd footprints` shows what was measured, by model, device and shape";
            vramd_api::ApiError::invalid("workingMemory", what).hint(hint)
        })
    }
}

fn shown(known: Known, ask: &Ask, outcome: Outcome, parts: &[Vec<EvictedComponent>]) -> PlannedModel {
    let Known { model, there, working_bytes, mut seconds } = known;
    let bytes = ask.requests.iter().fold(0, |sum, one| u64::saturating_add(sum, one.size_bytes));
    let mut planned = PlannedModel {
        model,
        outcome: PlanOutcome::Resident,
        device_id: there,
        bytes,
        working_bytes,
        seconds: 0.0,
        copied_from: Vec::new(),
        evicted: Vec::new(),
        missing_bytes: None,
    };
    match outcome {
        Outcome::Fits { goes, .. } if planned.device_id.is_some() && goes.is_empty() => {}
        Outcome::Fits { device, goes } => {
            planned.outcome = if goes.is_empty() { PlanOutcome::Fits } else { PlanOutcome::Evicts };
            planned.evicted = goes.into_iter().flat_map(|at| parts[at].clone()).collect();
            if let Some((sum, from)) = device.as_ref().and_then(|device| seconds.remove(device)) {
                planned.seconds = rounded(sum);
                planned.copied_from = from.into_iter().collect();
            }
            planned.device_id = device;
        }
        Outcome::No { missing } => {
            planned.outcome = if missing.is_some() { PlanOutcome::NoRoom } else { PlanOutcome::TooLarge };
            planned.missing_bytes = missing;
        }
    }
    planned
}

fn rounded(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}
