//! Pressure: how tight each device is, who is told, and when something is done about it.

use std::time::Duration;

use vramd_api::{
    DeviceId, DevicePressure, EventKind, PressureLevel, Priority, RecommendedAction, ReliefAction,
    WorkerState,
};
use vramd_core::Tick;
use vramd_core::pressure::{Gauge, Reading, Stall};

use super::State;
use super::relief::Goal;
use super::tiers::is_ram;
use super::ways::Way;
use super::workers::Worker;

/// A stall that the system has told of counts for so long: it tells of one every two seconds at most.
const STALL_MILLISECONDS: u64 = 2500;
/// After what was done did not help enough, it is tried again so much later.
const PAUSE_SECONDS: u64 = 5;
/// How long a worker may take to hear of a level.
const TELL_PATIENCE: Duration = Duration::from_secs(2);
/// What may go so soon counts as available.
const SOON_SECONDS: u64 = 10;
/// As many recommendations are given.
const RECOMMENDED: usize = 10;

impl State {
    /// The system says that tasks wait for memory.
    pub(super) fn stalled(&mut self, stall: Stall) {
        self.stall = (stall, Tick(self.now.tick.0 + STALL_MILLISECONDS));
        // What that means for host memory shows at the next look: that is taken at once.
        self.measure();
    }

    fn reading(&self, device: &DeviceId) -> Option<Reading> {
        let usage = self.ledger.usage(device)?;
        let facts = self.devices.get(device)?.facts();
        let idle = self.candidates(device, Priority::Critical, None);
        // What was loaded just now stays for a moment, for whoever it is for.
        let soon = self.now.tick.after_seconds(SOON_SECONDS);
        let idle = idle.iter().filter(|idle| idle.stays <= soon).map(|idle| idle.candidate.bytes);
        let (stall, until) = self.stall;
        Some(Reading {
            total_bytes: facts.total_bytes,
            free_bytes: self.ledger.free_bytes(device).min(facts.total_bytes),
            idle_bytes: idle.fold(usage.pool_free_bytes, u64::saturating_add),
            held_bytes: usage.allocated_bytes + usage.pool_free_bytes,
            others_bytes: usage.foreign_bytes + usage.worker_bytes,
            stall: if is_ram(facts) && self.now.tick < until { stall } else { Stall::None },
        })
    }

    /// A device was measured.
    pub(super) fn watch_pressure(&mut self, device: &DeviceId) {
        let Some(reading) = self.reading(device) else { return };
        let gauge = self.gauges.entry(device.clone()).or_default();
        let before = gauge.read(reading, self.thresholds, self.now.tick);
        let (level, ratio, needs, available) =
            (gauge.level(), gauge.ratio(), gauge.needs(), gauge.available_bytes());
        let stalled = gauge.reading().stall > Stall::None;
        if let Some(before) = before {
            let data = serde_json::json!({
                "deviceId": device, "level": level, "before": before, "ratio": ratio, "neededBytes": needs,
                "availableBytes": available, "freeBytes": reading.free_bytes, "totalBytes": reading.total_bytes,
                "stalled": stalled,
            });
            self.emit(EventKind::PressureChanged, data);
            if needs == 0 {
                self.tell_level(device, level);
            }
        }
        let due = self.relieve_after.get(device).is_none_or(|after| *after <= self.now.tick);
        let worse = before.is_some_and(|before| before < level);
        if needs > 0 && (due || worse) && !self.stopping && self.relieving(device).is_none() {
            self.relieve_after.insert(device.clone(), self.now.tick.after_seconds(PAUSE_SECONDS));
            let free_bytes = reading.free_bytes.saturating_add(needs);
            self.begin_relief(device, Goal::Pressure { free_bytes }, None);
        }
    }

    /// The workers that can be told how tight memory is.
    pub(super) fn told_of_levels(&self) -> impl Iterator<Item = &Worker> {
        let can =
            |worker: &&Worker| worker.state == WorkerState::Ready && worker.can("memory.pressure_check");
        self.workers.values().map(AsRef::as_ref).filter(can)
    }

    fn tell_level(&self, device: &DeviceId, level: PressureLevel) {
        for worker in self.told_of_levels() {
            let (link, data) = (worker.link.clone(), level_data(device, level, 0));
            // Whether it heard is for its heartbeats to show.
            tokio::spawn(async move { link.call("memory.pressure_check", &data, TELL_PATIENCE).await });
        }
    }

    pub(super) fn level_on(&self, device: &DeviceId) -> PressureLevel {
        self.gauges.get(device).map(Gauge::level).unwrap_or_default()
    }

    /// How tight a device is, and what would help.
    pub(super) fn pressure_on(&self, device: &DeviceId) -> DevicePressure {
        let gauge = self.gauges.get(device).cloned().unwrap_or_default();
        let total = self.devices.get(device).map_or(0, |it| it.facts().total_bytes);
        let used = total.saturating_sub(gauge.reading().free_bytes);
        let rounded = |value: f64, digits: f64| (value * digits).round() / digits;
        DevicePressure {
            device_id: device.clone(),
            pressure_level: gauge.level(),
            ratio: rounded(gauge.ratio(), 10_000.0),
            available_memory: gauge.available_bytes(),
            free_memory: gauge.reading().free_bytes,
            total_memory: total,
            utilization_percentage: rounded(used as f64 / total.max(1) as f64 * 100.0, 100.0),
            stalled: gauge.reading().stall > Stall::None,
            trend: gauge.trend(),
            shrinks_per_second: gauge.shrinks_per_second().round(),
            seconds_to_exhaustion: gauge.seconds_to_exhaustion().map(|seconds| rounded(seconds, 10.0)),
            needed_bytes: gauge.needs(),
            operation_id: self.relieving(device),
            recommended_actions: self.recommended(device),
        }
    }

    /// What would free memory on a device: what costs least a byte first.
    fn recommended(&self, device: &DeviceId) -> Vec<RecommendedAction> {
        let mut all = self.ways(device, None);
        let density = |way: &Way| way.candidate.loss() / way.candidate.bytes.max(1) as f64;
        all.sort_by(|a, b| density(a).total_cmp(&density(b)).then(b.candidate.bytes.cmp(&a.candidate.bytes)));
        let pool = self.ledger.usage(device).map_or(0, |usage| usage.pool_free_bytes);
        let drop_pool = (pool > 0).then(|| RecommendedAction {
            action: ReliefAction::DropPool,
            reason: "it is held for nobody".to_owned(),
            bytes: pool,
            call: format!("POST /api/memory/operations/defragment/{device}"),
        });
        drop_pool.into_iter().chain(all.iter().map(|way| way.recommended(device))).take(RECOMMENDED).collect()
    }
}

/// What a worker is told of a level.
pub(super) fn level_data(device: &DeviceId, level: PressureLevel, target_bytes: u64) -> serde_json::Value {
    let target_mb = vramd_api::worker_protocol::megabytes(target_bytes);
    serde_json::json!({ "device_id": device, "level": level, "target_mb": target_mb })
}
