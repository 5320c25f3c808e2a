//! The registry of models: what is registered, where it is resident, when it goes.
//!
//! A component on a device: `OnDisk → Loading → Resident → Evicting → OnDisk`; a load that fails or is cancelled
//! goes from `Loading` straight back. The bytes themselves are allocations in the ledger.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;
use jiff::Timestamp;
use serde_json::value::RawValue;
use vramd_api::{
    AllocationId, ApiError, Checksum, ComponentName, DeviceId, Holder, KeepAlive, ModelName, OperationId,
    Priority, ResidencyState,
};

use crate::eviction::Popularity;
use crate::layout::Layout;
use crate::ledger::Allocations;
use crate::{Now, Tick};

/// The most models that can be registered.
pub const MAX_MODELS: usize = 10_000;

/// A component's layout, its tensor table as every attached client reads it, and the files it was read from.
#[derive(Debug)]
pub struct Plan {
    pub layout: Layout,
    pub table: Arc<RawValue>,
    pub files: Vec<FileIdentity>,
}

/// By which a file is known again, under whatever name, until somebody writes to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileIdentity {
    pub volume: u64,
    pub file: u64,
    pub bytes: u64,
    /// Since the epoch.
    pub modified_nanoseconds: i128,
}

impl Plan {
    pub fn new(layout: Layout, files: Vec<FileIdentity>) -> Self {
        let table = serde_json::value::to_raw_value(&layout.tensors).expect("names and numbers always print");
        Self { layout, table: table.into(), files }
    }

    /// Whether both are of the same files, as they were: a block of one is a block of the other.
    pub fn is_same(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
            || (!self.files.is_empty()
                && self.files == other.files
                && self.layout.block_bytes == other.layout.block_bytes
                && self.table.get() == other.table.get())
    }
}

#[derive(Debug, Clone)]
pub struct Model {
    pub name: ModelName,
    pub components: BTreeMap<ComponentName, Component>,
    pub pinned: bool,
    pub keep_alive: KeepAlive,
    pub priority: Priority,
    pub registered_at: Timestamp,
    pub last_used: Option<Now>,
    pub popularity: Popularity,
}

#[derive(Debug, Clone)]
pub struct Component {
    pub path: String,
    /// As read last; an error when the file could not be.
    pub plan: Result<Arc<Plan>, Box<ApiError>>,
    pub residency: BTreeMap<DeviceId, Residency>,
    /// What it took to bring it to a device, the last time.
    pub load_seconds: BTreeMap<DeviceId, f64>,
    /// Of its bytes, as of those files, if a load was asked for one.
    pub checksum: Option<(Arc<Plan>, u64)>,
}

#[derive(Debug, Clone)]
pub enum Residency {
    Loading {
        allocation: AllocationId,
        operation: OperationId,
        plan: Arc<Plan>,
    },
    Resident {
        allocation: AllocationId,
        plan: Arc<Plan>,
        /// Somebody had it loaded and nobody has attached it since: until then it is theirs.
        awaited: Option<Tick>,
        /// It does not go for others before.
        stays: Tick,
        /// Nobody asked for it here: it had to go from that device, and waits in RAM for its next use there.
        cached_from: Option<DeviceId>,
    },
    Evicting {
        allocation: AllocationId,
        operation: OperationId,
    },
}

impl Residency {
    pub fn allocation(&self) -> AllocationId {
        match self {
            Self::Loading { allocation, .. }
            | Self::Resident { allocation, .. }
            | Self::Evicting { allocation, .. } => *allocation,
        }
    }

    /// The device that it had to go from, if nobody asked for it here.
    pub fn cached_from(&self) -> Option<&DeviceId> {
        match self {
            Self::Resident { cached_from, .. } => cached_from.as_ref(),
            Self::Loading { .. } | Self::Evicting { .. } => None,
        }
    }

    /// The load or unload under way.
    pub fn operation(&self) -> Option<OperationId> {
        match self {
            Self::Loading { operation, .. } | Self::Evicting { operation, .. } => Some(*operation),
            Self::Resident { .. } => None,
        }
    }

    fn state(&self) -> ResidencyState {
        match self {
            Self::Loading { .. } => ResidencyState::Loading,
            Self::Resident { .. } => ResidencyState::Resident,
            Self::Evicting { .. } => ResidencyState::Evicting,
        }
    }
}

/// Why a model cannot be removed or unloaded now.
#[derive(Debug, Clone, PartialEq)]
pub enum Busy {
    Attached(Vec<Holder>),
    /// A load or unload is under way.
    Operation(OperationId),
    /// It still has bytes on these devices.
    Resident(Vec<DeviceId>),
}

#[derive(Debug, Clone, Default)]
pub struct Models {
    models: OrdMap<ModelName, Arc<Model>>,
}

impl Models {
    pub fn get(&self, name: &ModelName) -> Option<&Model> {
        self.models.get(name).map(AsRef::as_ref)
    }

    pub fn get_mut(&mut self, name: &ModelName) -> Option<&mut Model> {
        self.models.get_mut(name).map(Arc::make_mut)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Model> {
        self.models.values().map(AsRef::as_ref)
    }

    pub fn len(&self) -> usize {
        self.models.len()
    }

    pub fn is_empty(&self) -> bool {
        self.models.is_empty()
    }

    pub fn insert(&mut self, model: Model) {
        self.models.insert(model.name.clone(), Arc::new(model));
    }

    pub fn remove(&mut self, name: &ModelName) {
        self.models.remove(name);
    }

    /// The models whose keep-alive is over, with the devices they are resident on.
    pub fn expired(&self, tick: Tick, allocations: &Allocations) -> Vec<(ModelName, BTreeSet<DeviceId>)> {
        self.iter()
            .filter(|model| model.expires(allocations).is_some_and(|(deadline, _)| deadline <= tick))
            .map(|model| (model.name.clone(), model.resident_on()))
            .collect()
    }
}

impl Model {
    /// Somebody uses it.
    pub fn used(&mut self, now: Now) {
        self.last_used = Some(now);
        self.popularity.record(now.tick);
    }

    pub fn resident_on(&self) -> BTreeSet<DeviceId> {
        self.components
            .values()
            .flat_map(|component| &component.residency)
            .filter(|(_, residency)| matches!(residency, Residency::Resident { .. }))
            .map(|(device, _)| device.clone())
            .collect()
    }

    /// Who has any component of it attached, on `device` or anywhere.
    pub fn holders(&self, device: Option<&DeviceId>, allocations: &Allocations) -> Vec<Holder> {
        self.residencies(device)
            .filter_map(|residency| allocations.get(&residency.allocation()))
            .flat_map(|allocation| allocation.holders().cloned())
            .collect()
    }

    /// Whether some of it is on its way to a device.
    pub fn is_loading(&self) -> bool {
        self.residencies(None).any(|residency| matches!(residency, Residency::Loading { .. }))
    }

    /// The load or unload under way, on `device` or anywhere.
    pub fn operation(&self, device: Option<&DeviceId>) -> Option<OperationId> {
        self.residencies(device).find_map(Residency::operation)
    }

    fn residencies(&self, device: Option<&DeviceId>) -> impl Iterator<Item = &Residency> {
        self.components
            .values()
            .flat_map(|component| &component.residency)
            .filter(move |(on, _)| device.is_none_or(|device| device == *on))
            .map(|(_, residency)| residency)
    }

    /// Whether its registration can be taken back.
    pub fn removable(&self, allocations: &Allocations) -> Result<(), Busy> {
        let holders = self.holders(None, allocations);
        if !holders.is_empty() {
            return Err(Busy::Attached(holders));
        }
        if let Some(operation) = self.operation(None) {
            return Err(Busy::Operation(operation));
        }
        let devices = self.resident_on();
        if devices.is_empty() { Ok(()) } else { Err(Busy::Resident(devices.into_iter().collect())) }
    }

    /// When it goes unless it is used: never while it is pinned, kept for ever, attached or not resident.
    pub fn expires(&self, allocations: &Allocations) -> Option<(Tick, Timestamp)> {
        let KeepAlive::Seconds(seconds) = self.keep_alive else { return None };
        let used = self.last_used?;
        if self.pinned || self.resident_on().is_empty() || !self.holders(None, allocations).is_empty() {
            return None;
        }
        Some((used.tick.after_seconds(seconds), used.wall_after(seconds)))
    }

    pub fn to_api(&self, allocations: &Allocations) -> vramd_api::Model {
        let components: Vec<_> =
            self.components.iter().map(|(name, component)| component.to_api(name, allocations)).collect();
        vramd_api::Model {
            name: self.name.clone(),
            size_bytes: components
                .iter()
                .fold(0, |sum, component| u64::saturating_add(sum, component.size_bytes)),
            components,
            pinned: self.pinned,
            priority: self.priority,
            keep_alive: self.keep_alive,
            expires_at: self.expires(allocations).map(|(_, at)| at),
            last_used_at: self.last_used.map(|now| now.wall),
            registered_at: self.registered_at,
        }
    }
}

impl Component {
    fn to_api(&self, name: &ComponentName, allocations: &Allocations) -> vramd_api::Component {
        let layout = self.plan.as_ref().ok().map(|plan| &plan.layout);
        vramd_api::Component {
            name: name.clone(),
            path: self.path.clone(),
            size_bytes: layout.map_or(0, |layout| layout.payload_bytes),
            tensor_count: layout.map_or(0, |layout| layout.tensors.len() as u64),
            shard_count: layout.map_or(0, |layout| layout.spans.len() as u64),
            residency: self
                .residency
                .iter()
                .map(|(device, residency)| {
                    let allocation = allocations.get(&residency.allocation());
                    vramd_api::Residency {
                        device_id: device.clone(),
                        state: residency.state(),
                        bytes: allocation.map_or(0, |allocation| allocation.block_bytes),
                        attached_count: allocation
                            .map_or(0, |allocation| allocation.holders().count() as u64),
                        shared: allocation.is_some_and(|allocation| allocation.model_count() > 1),
                        cached_from: residency.cached_from().cloned(),
                        allocation_id: Some(residency.allocation()),
                        operation_id: residency.operation(),
                    }
                })
                .collect(),
            checksum: self.checksum.as_ref().map(|(_, value)| Checksum::crc64(*value)),
            error: self.plan.as_ref().err().map(|error| (**error).clone()),
        }
    }
}
