//! Reservations: room for what a process of somebody else takes beside the weights, and what such runs were measured to take.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{AllocationType, Bytes, DeviceId, ModelName, OnShortage, OwnerName, Priority};

/// The most numbers in a shape.
pub const MAX_DIMENSIONS: usize = 8;
/// The most runs that a footprint remembers.
pub const RECENT_PEAKS: usize = 8;

/// A request for room for working memory: activations, a KV cache, whatever a framework allocates while a model runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReserveRequest {
    /// A device's id or uuid. Left out: where the model is, or the nearest memory that has room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
    /// Whose run it is: what runs of it were measured to take is then reserved, and this one is learned from. It need not be
    /// registered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    /// What the run's memory depends on, such as batch, height and width: runs of one shape are taken to need the same. 8 numbers
    /// at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 8)]
    pub shape: Vec<u64>,
    /// What it is expected to take: reserved as long as nothing was measured for this model, device and shape. May be left out
    /// where something was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<Bytes>,
    /// The process that fills the room. Where the device tells how much a process uses, it is followed, and the reservation ends
    /// with the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub pid: Option<u32>,
    /// The part of it that the process holds already, such as what its framework keeps cached.
    #[serde(default)]
    pub held_bytes: u64,
    /// Default `Activation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation_type: Option<AllocationType>,
    /// Free text for people and for statistics.
    #[serde(default)]
    #[schema(max_length = 128)]
    pub purpose: String,
    #[serde(default)]
    pub priority: Priority,
    /// As for allocations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 86400)]
    pub timeout_seconds: Option<u64>,
    /// The lease: the room is given up when it was not renewed for this long. Default 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 31_536_000)]
    pub lease_seconds: Option<u64>,
    /// As for allocations. The model itself does not go for it.
    #[serde(default)]
    pub on_shortage: OnShortage,
    /// As for allocations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<OwnerName>,
}

/// What an allocation that is only room is for, and what is used of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Reservation {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    pub shape: Vec<u64>,
    /// Where its size comes from.
    pub basis: Basis,
    /// What the caller expected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate_bytes: Option<u64>,
    /// What runs of this model, device and shape had been measured to take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learned_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// What is in use now: it counts as the device's `workerBytes`, the rest as its `reservedBytes`.
    pub used_bytes: u64,
    /// The most that was in use; null as long as nobody has told or measured it.
    pub peak_bytes: Option<u64>,
}

/// Where the size of a reservation comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum Basis {
    /// The request: nothing was measured.
    #[default]
    Estimate,
    /// The largest of the last runs of this model, device and shape.
    Learned,
    /// Runs of other shapes of this model on this device, by the product of their numbers: between two of them along a straight
    /// line, above the largest in proportion, below the smallest as much as that.
    Interpolated,
}

/// What runs of a model of one shape took on a device, beside its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Footprint {
    pub model: ModelName,
    pub device_id: DeviceId,
    pub shape: Vec<u64>,
    /// What the last caller who said so expected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate_bytes: Option<u64>,
    /// The largest of `recentPeakBytes`: what the next run reserves.
    pub learned_bytes: u64,
    /// The most that each of the last eight runs used, the oldest first.
    pub recent_peak_bytes: Vec<u64>,
    /// What was reserved for the last run, over what it used, minus 1: 0.25 is a quarter too much, −0.25 a quarter too little.
    pub error: f64,
    /// The mean of all runs' errors, each without its sign.
    pub mean_error: f64,
    pub run_count: u64,
    pub updated_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct FootprintPage {
    pub footprints: Vec<Footprint>,
}
