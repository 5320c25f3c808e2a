//! `POST /api/memory/plan`: what would become of loads, without any.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Bytes, ComponentName, DeviceId, ModelName};

/// The most models in one plan.
pub const MAX_PLANNED: usize = 64;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanRequest {
    /// In this order, each beside those before; 64 at most.
    #[serde(deserialize_with = "crate::object::list")]
    #[schema(min_items = 1, max_items = 64)]
    pub models: Vec<PlanItem>,
    /// Where those go that name no device of their own; left out, as for a load: the nearest memory that could hold them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanItem {
    pub model: ModelName,
    /// All if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub components: Option<Vec<ComponentName>>,
    /// A device's id or uuid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
    /// With room for a run beside its weights, as a reservation would have it.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::object::optional")]
    pub working_memory: Option<PlannedRun>,
}

/// A run of a model, of which a plan counts the working memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlannedRun {
    /// As of reservations.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 8)]
    pub shape: Vec<u64>,
    /// What it is expected to take, if no such run was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<Bytes>,
}

/// What loads of these models, now and one after the other, would come to, with `onShortage=evict`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MemoryPlan {
    /// All of them together.
    pub fits: bool,
    pub models: Vec<PlannedModel>,
    /// All that would go.
    pub evicted: Vec<EvictedComponent>,
    /// To load them, one after the other.
    pub seconds: f64,
    /// If they do not all fit: most of them that do, and of as many the largest. Exact for up to ten models.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub largest_set: Vec<ModelName>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlannedModel {
    pub model: ModelName,
    pub outcome: PlanOutcome,
    /// Where it is, or would go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<DeviceId>,
    /// What it takes beyond what is there.
    pub bytes: u64,
    /// The part of `bytes` that is for a run beside its weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_bytes: Option<u64>,
    /// To load it: measured the last time, or by the rate that loads to that device came to lately.
    pub seconds: f64,
    /// From where it would be copied, if not read from its files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copied_from: Vec<DeviceId>,
    /// What would go for it.
    pub evicted: Vec<EvictedComponent>,
    /// How many bytes too few there are on the device that comes closest, with all gone that may go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_bytes: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum PlanOutcome {
    /// It is there.
    Resident,
    /// There is room.
    Fits,
    /// Idle models would go for it.
    Evicts,
    /// There is no room, with all gone that may go; it may come up, since the device could hold it.
    NoRoom,
    /// It could not be held even by an empty device.
    TooLarge,
}

/// A component that goes to make room, and what it is worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct EvictedComponent {
    pub model: ModelName,
    pub component: ComponentName,
    pub device_id: DeviceId,
    pub bytes: u64,
    pub idle_seconds: f64,
    pub uses_per_hour: f64,
    /// To get it back.
    pub load_seconds: f64,
}
