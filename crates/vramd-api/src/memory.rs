//! Devices, allocations, leases, pressure: the bodies of `/api/devices` and `/api/memory`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::de::IntoDeserializer as _;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::attach::HandleType;
use crate::{AllocationId, Bytes, DeviceId, EvictedComponent, Footprint, LeaseId, OwnerName, Reservation};

/// What kind of memory a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub enum MemoryType {
    #[serde(rename = "RAM")]
    Ram,
    #[serde(rename = "VRAM")]
    Vram,
    Shared,
    Unified,
    Unknown,
}

/// What the bytes of an allocation are for.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, ToSchema,
)]
pub enum AllocationType {
    #[default]
    Buffer,
    Weights,
    KvCache,
    Activation,
    Workspace,
    Staging,
}

/// Orders requests that wait for room; the higher goes first.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, ToSchema,
)]
pub enum Priority {
    Low,
    #[default]
    Normal,
    High,
    Critical,
}

impl std::fmt::Display for Priority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

impl std::str::FromStr for Priority {
    type Err = serde::de::value::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::deserialize(text.into_deserializer())
    }
}

/// What a request wants when there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum OnShortage {
    /// Answer `INSUFFICIENT_MEMORY` at once.
    #[default]
    Fail,
    /// Wait up to `timeoutSeconds`, in order of priority, then age.
    Wait,
    /// Unload idle models until there is room, those whose absence costs least; wait for that, and if it is not enough up to
    /// `timeoutSeconds`, if these are given.
    Evict,
    /// Go to host memory if there is room now, and say so in the reply; else answer `INSUFFICIENT_MEMORY`.
    Spill,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub enum AllocationStatus {
    Active,
    Moving,
    Releasing,
}

/// A request for memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AllocateRequest {
    pub size_bytes: Bytes,
    /// A power of two, in bytes, from 1 to 2 MiB: the offset in its segment is a multiple of it. Default 256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 2_097_152)]
    pub alignment: Option<u64>,
    #[serde(default)]
    pub allocation_type: AllocationType,
    /// Only devices with this type of memory are considered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_type: Option<MemoryType>,
    /// Free text for people and for statistics.
    #[serde(default)]
    #[schema(max_length = 128)]
    pub purpose: String,
    #[serde(default)]
    pub priority: Priority,
    /// Kept until it is deleted, and known again after a restart (its contents are then zero, its generation higher).
    #[serde(default)]
    pub persistent: bool,
    /// How long to wait for room when `onShortage` is `wait` (default 30), or `evict` and no idle model is in the way (default 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 86400)]
    pub timeout_seconds: Option<u64>,
    /// The lease: released when it was not renewed for this long. Default 300. Not together with `persistent`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 31_536_000)]
    pub lease_seconds: Option<u64>,
    #[serde(default)]
    pub on_shortage: OnShortage,
    /// For whom the memory is held: a label. Default `uid:N` on the Unix socket, `local` over TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<OwnerName>,
}

impl AllocateRequest {
    /// A request for `size` with every default.
    pub fn new(size: Bytes) -> Self {
        Self {
            size_bytes: size,
            alignment: None,
            allocation_type: AllocationType::default(),
            memory_type: None,
            purpose: String::new(),
            priority: Priority::default(),
            persistent: false,
            timeout_seconds: None,
            lease_seconds: None,
            on_shortage: OnShortage::default(),
            owner: None,
        }
    }
}

/// Renews the lease of an allocation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RenewRequest {
    /// The new time to live, from now. Default: the length that the lease had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 31_536_000)]
    pub lease_seconds: Option<u64>,
    /// Of a reservation: what its process uses of it now. It counts from the device's next measurement on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<u64>,
}

/// Bytes on a device that the daemon holds for an owner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Allocation {
    pub allocation_id: AllocationId,
    pub device_id: DeviceId,
    /// As asked for.
    pub size_bytes: u64,
    /// What the ledger charges: `sizeBytes` rounded up to the device's granularity.
    pub block_bytes: u64,
    pub alignment: u64,
    pub allocation_type: AllocationType,
    pub purpose: String,
    pub priority: Priority,
    pub persistent: bool,
    pub status: AllocationStatus,
    pub owner: OwnerName,
    /// Counts up whenever the bytes get a new place or new contents behind the owner's back.
    pub generation: u64,
    /// What keeps it; the last to end releases it.
    pub leases: Vec<Lease>,
    pub created_at: Timestamp,
    /// Present where this is no allocation of its own, but the other place of one that moves: the new one until the bytes
    /// are there, the old one until the last reader has followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place_of: Option<AllocationId>,
    /// Present where only room is reserved: the bytes in it are made by a process of its owner's, and vramd cannot read or move them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation: Option<Reservation>,
    /// Present in the answer to a request for memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// Present where one allocation is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<Vec<AllocationHistoryEntry>>,
}

/// What keeps an allocation or a model resident.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    pub lease_id: LeaseId,
    pub kind: LeaseKind,
    /// When a lease with a time to live ends, unless it is renewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// The process behind a connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum LeaseKind {
    /// Ends when the connection closes, which the kernel does when the process dies.
    Connection,
    /// Ends at `expiresAt`, unless it is renewed.
    TimeToLive,
    /// Ends when it is deleted.
    Persistent,
    /// The model cache holds it.
    Model,
    /// An operation reads or writes its bytes; ends with it.
    Operation,
}

/// A process that holds memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Holder {
    pub pid: u32,
    pub uid: u32,
    pub command: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AllocationHistoryEntry {
    pub at: Timestamp,
    pub what: String,
}

/// A process that uses a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviceProcess {
    /// As the driver has it: in a container it may be the host's.
    pub pid: u32,
    /// "?" where no such process is seen from here.
    pub command: String,
    /// Null where the driver does not say.
    pub used_bytes: Option<u64>,
}

/// Why this device was chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    pub reason: String,
    /// The devices that had no room for it, if it is in host memory instead of there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spilled_from: Vec<DeviceId>,
    pub considered: Vec<Candidate>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Candidate {
    pub device_id: DeviceId,
    pub fits: bool,
    pub available_bytes: u64,
    pub largest_free_bytes: u64,
    pub reason: PlacementReason,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum PlacementReason {
    Chosen,
    /// It fits, and another fits better.
    LessPreferred,
    NotEnoughMemory,
    OtherMemoryType,
    Lost,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AllocationPage {
    pub allocations: Vec<Allocation>,
    /// Give it back as `pageToken` for the next page; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_page_token: Option<String>,
}

/// The answer to a release, once the bytes are back with the device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Released {
    pub allocation_id: AllocationId,
    pub device_id: DeviceId,
    /// What the ledger got back.
    pub released_bytes: u64,
    /// Its memory is back with the device: no process that had it attached has it mapped or open any more.
    pub verified: bool,
    /// Otherwise those that have, 1.2 seconds after the release: until they let go, the memory counts as foreign. On a device
    /// whose driver does not tell: those that had it attached and live.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_by: Vec<Holder>,
    /// What was learned from a reservation of a model's, if its peak was told or measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub footprint: Option<Footprint>,
}

/// What a device is; none of it changes while the daemon runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    pub device_id: DeviceId,
    /// Stable over restarts and processes.
    pub uuid: String,
    /// Where it is on the machine's bus, as `lspci -D` has it, if it is there and the driver says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_address: Option<String>,
    pub name: String,
    pub memory_type: MemoryType,
    pub total_bytes: u64,
    /// Sizes are rounded up to a multiple of it when memory is taken from the driver.
    pub granularity_bytes: u64,
    pub capabilities: DeviceCapabilities,
    pub health: DeviceHealth,
    /// What was found that costs speed or comfort, in words.
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[allow(clippy::struct_excessive_bools)] // independent facts, not a state
pub struct DeviceCapabilities {
    /// What other processes import its memory by; null where they cannot.
    pub handle: Option<HandleType>,
    /// What is handed out for reading cannot be written to. Otherwise that is a promise which importers keep.
    pub read_only_export: bool,
    /// The daemon's own process can read and write its memory directly.
    pub host_access: bool,
    /// Pages can be given another address without a copy.
    pub remap: bool,
    /// Address space can be reserved without memory behind it.
    pub sparse: bool,
    /// Its driver says that it reaches memory of another of its kind: copies from there take no way through host memory, as long as
    /// that works.
    pub peer_copy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum DeviceHealth {
    Healthy,
    Lost,
}

/// `GET /api/devices`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DevicePage {
    pub devices: Vec<Device>,
}

/// `GET /api/memory/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemoryStatus {
    pub devices: Vec<DeviceStatus>,
    pub total: TotalStatus,
}

/// One device, now.
///
/// `usedBytes = allocatedBytes + poolFreeBytes + reservedBytes + workerBytes + foreignBytes + unknownBytes` and
/// `availableBytes` is what could still be given out, in any number of pieces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviceStatus {
    pub device_id: DeviceId,
    pub uuid: String,
    pub name: String,
    pub memory_type: MemoryType,
    pub health: DeviceHealth,
    pub total_bytes: u64,
    pub used_bytes: u64,
    pub available_bytes: u64,
    /// Given out by the daemon.
    pub allocated_bytes: u64,
    /// Held by the daemon, given to nobody.
    pub pool_free_bytes: u64,
    /// Of `availableBytes`: what the daemon has made ready, so that large segments need not wait for their pages.
    pub ready_bytes: u64,
    /// Admitted, not yet given, and what is not in use of room that is reserved for working memory.
    pub reserved_bytes: u64,
    /// What processes use of room that is reserved for their working memory.
    pub worker_bytes: u64,
    /// Held by processes that the daemon does not know.
    pub foreign_bytes: u64,
    /// Counted by the driver, claimed by nobody.
    pub unknown_bytes: u64,
    /// The most that the daemon may hold here.
    pub limit_bytes: u64,
    /// 0 to 1.
    pub utilization: f64,
    /// 1 − largest free / free; 0 when nothing is free.
    pub fragmentation: f64,
    pub largest_free_bytes: u64,
    /// 0 to 100: 100 − 70 × (pressure ratio)² − 30 × fragmentation; 0 when the device is lost.
    pub health_score: u8,
    pub pressure: Pressure,
    pub allocation_count: u64,
    pub sampled_at: Timestamp,
    /// With `include=allocations`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocations: Option<Vec<Allocation>>,
    /// With `include=usage`: the last hour in sixty steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<crate::DeviceUsage>,
    /// With `include=fragmentation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fragmentation_details: Option<FragmentationStatus>,
    /// With `include=processes`: who uses the device by the driver's word, known or not; absent where it does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<Vec<DeviceProcess>>,
    /// With `include=processes`: who is attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<Vec<Holder>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct FragmentationStatus {
    pub free_bytes: u64,
    pub largest_free_bytes: u64,
    /// Free ranges inside segments.
    pub hole_count: u64,
    pub segment_count: u64,
}

/// The sums over all devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TotalStatus {
    pub total_bytes: u64,
    pub used_bytes: u64,
    pub available_bytes: u64,
    pub allocated_bytes: u64,
    pub pool_free_bytes: u64,
    pub ready_bytes: u64,
    pub reserved_bytes: u64,
    pub worker_bytes: u64,
    pub foreign_bytes: u64,
    pub unknown_bytes: u64,
    pub utilization: f64,
    /// The worst of all devices.
    pub fragmentation: f64,
    pub largest_free_bytes: u64,
    /// The worst of all devices.
    pub health_score: u8,
    /// The worst of all devices.
    pub pressure: Pressure,
    pub allocation_count: u64,
    pub sampled_at: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Pressure {
    pub level: PressureLevel,
    /// 0 to 1: the share of the device that is not available.
    pub ratio: f64,
}

#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, ToSchema,
)]
pub enum PressureLevel {
    #[default]
    Normal,
    Moderate,
    High,
    Critical,
}

/// The limits of one device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviceLimits {
    pub device_id: DeviceId,
    /// The most that the daemon may hold here.
    pub limit_bytes: u64,
    /// Set by a call and kept over restarts, not the configured default.
    pub overridden: bool,
    /// Above it idle models go, without anybody asking for room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_limit_bytes: Option<u64>,
    /// What is left to other programs, by what was last measured.
    #[serde(default)]
    pub reserve_bytes: u64,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub owners: BTreeMap<OwnerName, ShareUse>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub purposes: BTreeMap<String, ShareUse>,
    /// What is held above the limit, and may not go now.
    #[serde(default)]
    pub above_bytes: u64,
    /// In the answer to a change: what goes for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evicted: Vec<EvictedComponent>,
}

/// What an owner or a purpose may have on a device, and has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShareUse {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes: Option<u64>,
    pub reserve_bytes: u64,
    pub used_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LimitsPage {
    pub limits: Vec<DeviceLimits>,
}

/// What an owner or a purpose may have on a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ShareLimits {
    /// The most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes: Option<Bytes>,
    /// What nobody else can take of the device while they use less than it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserve_bytes: Option<Bytes>,
}

/// `PUT /api/memory/limits/{deviceId}`: all of them; what is left out is lifted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SetLimits {
    /// The most that the daemon may hold here; null goes back to the configured limit. What is held stays.
    // Not `default`: leaving it out is a mistake, not a wish.
    #[serde(deserialize_with = "Option::deserialize")]
    #[schema(required = true)]
    pub limit_bytes: Option<Bytes>,
    /// Above it idle models go, without anybody asking for room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_limit_bytes: Option<Bytes>,
    /// What is left to other programs, by what was last measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserve_bytes: Option<Bytes>,
    /// By owner; models are the owner `vramd`'s.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "crate::object::map")]
    pub owners: BTreeMap<OwnerName, ShareLimits>,
    /// By purpose, or the beginning of one and `*`; a component's is `model/component`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "crate::object::map")]
    pub purposes: BTreeMap<String, ShareLimits>,
}
