//! What moves bytes: transfers, copies, defragmentation and clearing; their requests and results.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    AllocationId, Bytes, ComponentName, DeviceId, Holder, ModelName, OperationId, OwnerName, Priority,
};

/// The most items in one transfer.
pub const MAX_TRANSFER_ITEMS: usize = 1000;

/// `POST /api/memory/transfer`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TransferRequest {
    /// All of them, or none is begun.
    #[serde(deserialize_with = "crate::object::list")]
    #[schema(min_items = 1, max_items = 1000)]
    pub items: Vec<TransferItem>,
    /// A device id or uuid.
    pub target_device_id: String,
    #[serde(default)]
    pub mode: TransferMode,
    /// Read back what arrived and compare. The result names the checksum and its value for each item.
    #[serde(default)]
    pub checksum: bool,
    /// Its share when several operations move bytes: each step up is four times the share.
    #[serde(default)]
    pub priority: Priority,
    /// The most it may move in a second, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes_per_second: Option<Bytes>,
}

/// An allocation, or a model, or one component of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TransferItem {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation_id: Option<AllocationId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    /// Only one; default: all that are resident on the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component: Option<ComponentName>,
    /// Where a model is copied from, when it is resident on several: a device id or uuid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_device_id: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum TransferMode {
    /// The allocation keeps its id and gets a new generation; the old bytes go once the new ones are there.
    #[default]
    Move,
    /// The old one stays; the copy of an allocation is one of its own, with the same lease.
    Copy,
}

/// One item of a transfer that has ended; in the operation's `result.items`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Transferred {
    /// What was moved, or copied from.
    pub allocation_id: AllocationId,
    /// The copy, if it is an allocation of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_allocation_id: Option<AllocationId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component: Option<ComponentName>,
    pub source_device_id: DeviceId,
    pub target_device_id: DeviceId,
    pub bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<Checksum>,
    /// Processes that still have what it left behind: those bytes are not back with the system before they let go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_by: Vec<Holder>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Checksum {
    /// `CRC-64/NVME`
    pub algorithm: String,
    /// Sixteen hexadecimal digits.
    pub value: String,
}

impl Checksum {
    pub fn crc64(value: u64) -> Self {
        Self { algorithm: "CRC-64/NVME".to_owned(), value: format!("{value:016x}") }
    }
}

/// `POST /api/memory/copy`: from one allocation into another, on any devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CopyRequest {
    pub source_allocation_id: AllocationId,
    pub target_allocation_id: AllocationId,
    #[serde(default)]
    pub source_offset: u64,
    #[serde(default)]
    pub target_offset: u64,
    /// Default: to the end of the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<Bytes>,
    #[serde(default)]
    pub checksum: bool,
    #[serde(default)]
    pub priority: Priority,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes_per_second: Option<Bytes>,
}

/// `POST /api/memory/operations/defragment`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DefragmentRequest {
    /// Only plan: answers what it would do.
    #[serde(default)]
    pub dry_run: bool,
    /// The most bytes to copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<Bytes>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub max_moves: Option<u64>,
    /// No move begins after this long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub max_milliseconds: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes_per_second: Option<Bytes>,
    /// Default: `Low`, so that transfers go first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
}

/// What a dry run answers: one plan for each device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DefragmentPlans {
    pub plans: Vec<DefragmentPlan>,
}

/// What a defragmentation of one device would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DefragmentPlan {
    pub device_id: DeviceId,
    /// Blocks that get another place.
    pub moves: u64,
    /// What is copied for it.
    pub bytes: u64,
    /// At the rate that moves on this device were last measured at; before the first, at that of making a segment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_seconds: Option<f64>,
    /// Rounds that one after another need the places that the one before has left.
    pub passes: u64,
    /// What goes back to the device.
    pub reclaimed_bytes: u64,
    pub before: FragmentationFigures,
    pub after: FragmentationFigures,
    /// What cannot move, and why; a thousand at most.
    pub fixed: Vec<FixedBlock>,
    pub fixed_count: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct FragmentationFigures {
    /// The largest block that the device could give.
    pub largest_free_bytes: u64,
    /// Free inside of the segments that blocks share.
    pub pool_free_bytes: u64,
    pub hole_count: u64,
    pub segment_count: u64,
}

/// A block that stays where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct FixedBlock {
    pub allocation_id: AllocationId,
    pub reason: FixedReason,
    /// The processes because of which it stays.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holders: Vec<Holder>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum FixedReason {
    /// Its model is pinned.
    Pinned,
    /// A process or an operation may write to it.
    Written,
    /// A process has it attached that does not follow moves.
    ReaderDoesNotFollow,
    /// A process has not answered to an earlier move, or refused it.
    ReaderNotAnswering,
    /// A process has it attached.
    Attached,
    /// An operation is at work on it, or it is on its way in or out.
    Busy,
    /// Its new place was taken, or it changed, since the plan was made.
    Stale,
    /// The copy failed.
    Failed,
}

/// A defragmentation that has ended; the operation's `result`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Defragmented {
    pub devices: Vec<DeviceDefragmented>,
    pub moves: u64,
    pub bytes: u64,
    pub milliseconds: u64,
    /// Why it ended: `done`, or the bound that it met.
    pub ended_by: EndedBy,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviceDefragmented {
    pub device_id: DeviceId,
    pub moves: u64,
    pub bytes: u64,
    pub passes: u64,
    pub before: FragmentationFigures,
    pub after: FragmentationFigures,
    /// What did not move, and why; a thousand at most.
    pub fixed: Vec<FixedBlock>,
    pub fixed_count: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum EndedBy {
    Done,
    MaxBytes,
    MaxMoves,
    MaxMilliseconds,
    /// It was begun in quiet hours, and they were over before it was done.
    QuietHoursEnded,
}

/// `POST /api/memory/operations/clear`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClearRequest {
    pub what: ClearTarget,
    /// With `Allocations`: whose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<OwnerName>,
    /// With `Zero`: which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation_id: Option<AllocationId>,
    #[serde(default)]
    pub dry_run: bool,
    /// With `Allocations`: also what processes have attached, whose leases end. With `Zero`: though processes have it
    /// attached. Only for root, the daemon's own user, and over TCP.
    #[serde(default)]
    pub force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum ClearTarget {
    /// The free pool: segments that hold nothing.
    Cache,
    /// The free pool, and models that nobody has attached and that are not pinned.
    Unused,
    /// The allocations of an owner.
    Allocations,
    /// One allocation's bytes; it stays.
    Zero,
}

/// What was cleared, or would be; the operation's `result`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Cleared {
    pub dry_run: bool,
    /// What was asked to go.
    pub asked_bytes: u64,
    /// What is free again: back with the device, or in segments that others share.
    pub acknowledged_bytes: u64,
    /// By how much the measured use of the devices fell; absent when it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured_bytes: Option<u64>,
    pub allocations: Vec<AllocationId>,
    pub models: Vec<ModelName>,
    /// What stays because processes have it attached.
    pub kept: Vec<FixedBlock>,
    /// The operations that it waited for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub operations: Vec<OperationId>,
}
