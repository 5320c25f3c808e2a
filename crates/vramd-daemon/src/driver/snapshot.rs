//! What readers see: the state after the last batch of events. Cheap to make, never changed afterwards.

use std::sync::{Arc, OnceLock};

use imbl::OrdMap;
use jiff::Timestamp;
use serde_json::value::RawValue;
use vramd_api::{
    AllocationId, DeviceHealth, DeviceId, DeviceStatus, FragmentationStatus, Holder, MemoryStatus,
    OperationId, Pressure, PressureLevel, TotalStatus,
};
use vramd_core::footprints::Footprints;
use vramd_core::ledger::{Allocations, Limits, Usage};
use vramd_core::models::Models;
use vramd_core::pressure::health_score;
use vramd_core::usage::fragmentation;
use vramd_device::Device;

use super::{Entry, State, Workers};

#[derive(Debug, Clone)]
pub struct Snapshot {
    pub devices: Vec<DeviceView>,
    pub allocations: Allocations,
    pub models: Models,
    pub operations: OrdMap<OperationId, Arc<Entry>>,
    pub footprints: Footprints,
    pub workers: Workers,
    pub stopping: bool,
    /// The answer to `GET /api/memory/status`, once somebody has asked for it.
    pub status_printed: OnceLock<Arc<RawValue>>,
}

/// One device and its figures.
#[derive(Debug, Clone)]
pub struct DeviceView {
    pub device: DeviceId,
    pub usage: Usage,
    pub limits: Limits,
    /// The level of pressure, and its ratio.
    pub gauge: (PressureLevel, f64),
    pub lost: bool,
    /// None until the device was measured once.
    pub sampled_at: Option<Timestamp>,
}

impl State {
    pub(super) fn snapshot(&self) -> Snapshot {
        let devices = self
            .ledger
            .devices()
            .map(|facts| DeviceView {
                device: facts.device.clone(),
                usage: self.ledger.usage(&facts.device).unwrap_or_default(),
                limits: self.ledger.limits(&facts.device).expect("it is one of the ledger's"),
                gauge: self
                    .gauges
                    .get(&facts.device)
                    .map(|gauge| (gauge.level(), gauge.ratio()))
                    .unwrap_or_default(),
                lost: self.ledger.is_lost(&facts.device),
                sampled_at: self.samples.get(&facts.device).copied(),
            })
            .collect();
        Snapshot {
            devices,
            allocations: self.ledger.allocations().clone(),
            models: self.models.clone(),
            operations: self.operations.entries().clone(),
            footprints: self.footprints.clone(),
            workers: self.workers.clone(),
            stopping: self.stopping,
            status_printed: OnceLock::new(),
        }
    }
}

impl Snapshot {
    pub fn device(&self, id: &DeviceId) -> Option<&DeviceView> {
        self.devices.iter().find(|view| view.device == *id)
    }

    /// Every device was measured once, or is lost.
    pub fn ready(&self) -> bool {
        !self.stopping && self.devices.iter().all(|view| view.lost || view.sampled_at.is_some())
    }

    pub fn allocation(&self, id: AllocationId) -> Option<vramd_api::Allocation> {
        self.allocations.get(&id).and_then(|allocation| allocation.to_api())
    }

    /// The processes attached to anything on a device, each once.
    pub fn processes(&self, device: &DeviceId) -> Vec<Holder> {
        let mut holders: Vec<Holder> = self
            .allocations
            .values()
            .filter(|allocation| allocation.device == *device)
            .flat_map(|allocation| allocation.holders().cloned())
            .collect();
        holders.sort();
        holders.dedup();
        holders
    }
}

impl DeviceView {
    pub fn status(&self, device: &dyn Device) -> DeviceStatus {
        let (facts, usage) = (device.facts(), self.usage);
        let ratio = (usage.used_bytes as f64 / facts.total_bytes.max(1) as f64).clamp(0.0, 1.0);
        let fragmentation = fragmentation(&usage);
        DeviceStatus {
            device_id: facts.device.clone(),
            uuid: facts.uuid.clone(),
            name: facts.name.clone(),
            memory_type: facts.memory_type,
            health: if self.lost { DeviceHealth::Lost } else { DeviceHealth::Healthy },
            total_bytes: facts.total_bytes,
            used_bytes: usage.used_bytes,
            available_bytes: usage.available_bytes,
            allocated_bytes: usage.allocated_bytes,
            pool_free_bytes: usage.pool_free_bytes,
            ready_bytes: usage.ready_bytes,
            reserved_bytes: usage.reserved_bytes,
            worker_bytes: usage.worker_bytes,
            foreign_bytes: usage.foreign_bytes,
            unknown_bytes: 0,
            limit_bytes: usage.limit_bytes,
            utilization: ratio,
            fragmentation,
            largest_free_bytes: usage.largest_free_bytes,
            health_score: health_score(self.gauge.1, fragmentation, self.lost),
            pressure: Pressure { level: self.gauge.0, ratio: self.gauge.1 },
            allocation_count: usage.allocation_count,
            sampled_at: self.sampled_at.unwrap_or(Timestamp::UNIX_EPOCH),
            allocations: None,
            usage: None,
            fragmentation_details: None,
            used_by: None,
            processes: None,
        }
    }

    pub fn fragmentation(&self) -> FragmentationStatus {
        FragmentationStatus {
            free_bytes: self.usage.available_bytes,
            largest_free_bytes: self.usage.largest_free_bytes,
            hole_count: self.usage.hole_count,
            segment_count: self.usage.segment_count,
        }
    }
}

/// The sums of `devices`, and the worst of what cannot be summed.
pub fn memory_status(devices: Vec<DeviceStatus>) -> MemoryStatus {
    let sum = |of: fn(&DeviceStatus) -> u64| devices.iter().map(of).fold(0, u64::saturating_add);
    let (total_bytes, used_bytes) = (sum(|d| d.total_bytes), sum(|d| d.used_bytes));
    let worst = devices
        .iter()
        .map(|d| d.pressure)
        .max_by(|a, b| a.level.cmp(&b.level).then(a.ratio.total_cmp(&b.ratio)));
    let total = TotalStatus {
        total_bytes,
        used_bytes,
        available_bytes: sum(|d| d.available_bytes),
        allocated_bytes: sum(|d| d.allocated_bytes),
        pool_free_bytes: sum(|d| d.pool_free_bytes),
        ready_bytes: sum(|d| d.ready_bytes),
        reserved_bytes: sum(|d| d.reserved_bytes),
        worker_bytes: sum(|d| d.worker_bytes),
        foreign_bytes: sum(|d| d.foreign_bytes),
        unknown_bytes: sum(|d| d.unknown_bytes),
        utilization: (used_bytes as f64 / total_bytes.max(1) as f64).clamp(0.0, 1.0),
        fragmentation: devices.iter().map(|d| d.fragmentation).fold(0.0, f64::max),
        largest_free_bytes: devices.iter().map(|d| d.largest_free_bytes).max().unwrap_or(0),
        health_score: devices.iter().map(|d| d.health_score).min().unwrap_or(100),
        pressure: worst.unwrap_or(Pressure { level: PressureLevel::Normal, ratio: 0.0 }),
        allocation_count: sum(|d| d.allocation_count),
        sampled_at: devices.iter().map(|d| d.sampled_at).min().unwrap_or(Timestamp::UNIX_EPOCH),
    };
    MemoryStatus { devices, total }
}
