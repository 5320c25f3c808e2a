//! Pressure, models in one view with what workers have, and what is done where memory is tight.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    Bytes, DeviceId, DeviceStatus, EvictionPolicy, OperationId, PressureLevel, WorkerId, WorkerName,
    WorkerState,
};

/// Where pressure is heading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum Trend {
    /// Others take more from second to second.
    Rising,
    Steady,
    Falling,
}

/// How tight memory is on a device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DevicePressure {
    pub device_id: DeviceId,
    pub pressure_level: PressureLevel,
    /// 0 to 1: the share of the device that is not available.
    pub ratio: f64,
    /// What is free, and what may go at once: idle models, and what is held for nobody.
    pub available_memory: u64,
    /// The part of it that is free now.
    pub free_memory: u64,
    pub total_memory: u64,
    /// 0 to 100: the share of the device that is not free.
    pub utilization_percentage: f64,
    /// Tasks wait for this memory, as the system tells.
    pub stalled: bool,
    pub trend: Trend,
    /// How many bytes others take on top from second to second; negative where they give back.
    pub shrinks_per_second: f64,
    /// When nothing would be available any more at that rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_to_exhaustion: Option<f64>,
    /// How much the daemon looks for now; 0 below `High`.
    pub needed_bytes: u64,
    /// What the daemon is doing about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
    /// What could be done, what helps most first.
    pub recommended_actions: Vec<RecommendedAction>,
}

/// Something that would free memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct RecommendedAction {
    pub action: ReliefAction,
    /// In words: `sdxl has been idle for 12 min`.
    pub reason: String,
    /// What would be free then.
    pub bytes: u64,
    /// The call that carries it out: `POST /api/models/sdxl/unload`.
    pub call: String,
}

/// A way to free memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum ReliefAction {
    /// Memory that is held for nobody goes back.
    DropPool,
    /// A model of the daemon's that nobody uses is unloaded.
    UnloadModel,
    /// Workers are told how tight memory is: they drop their caches.
    TellWorker,
    /// A worker unloads a model of its own.
    AskWorker,
    /// Workers let go of a model of the daemon's that they have attached and do not use, so that it can be unloaded.
    AskToLetGo,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PressurePage {
    pub devices: Vec<DevicePressure>,
}

/// System memory and model memory of a device in one view.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelStatus {
    pub device_id: DeviceId,
    pub system_memory: DeviceStatus,
    pub model_memory: ModelMemory,
    pub worker_memory: WorkerMemoryStatus,
    /// What the daemon holds of models on the device, and all that workers' processes have of their own there: nothing is counted twice.
    pub total_memory_usage: u64,
    /// What models could take: what is free, and what may go at once.
    pub available_for_models: u64,
    pub loaded_model_count: u64,
    pub loaded_models: Vec<LoadedModel>,
    pub pressure_level: PressureLevel,
    /// What can be asked of models here now: paths of the API.
    pub available_operations: Vec<String>,
    pub optimization_recommendations: Vec<RecommendedAction>,
    /// When the worker that has said nothing for longest last did; absent without workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_synchronized: Option<Timestamp>,
    pub last_updated: Timestamp,
}

/// What the daemon holds of models on a device.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelMemory {
    pub resident_bytes: u64,
    /// The part of it that somebody has attached.
    pub attached_bytes: u64,
    /// The part of it that may go at once.
    pub idle_bytes: u64,
}

/// What workers hold on a device of their own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerMemoryStatus {
    /// What their processes were measured to have.
    pub measured_bytes: u64,
    /// What they say that their models take.
    pub reported_bytes: u64,
    pub workers: Vec<WorkerShare>,
    /// Why what workers say is not all in here.
    pub notes: Vec<String>,
}

/// One worker's part of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerShare {
    pub worker_id: WorkerId,
    pub name: WorkerName,
    pub state: WorkerState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported_bytes: Option<u64>,
    /// What it has attached: it is in `modelMemory`.
    pub attached_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_synchronized: Option<Timestamp>,
}

/// A model on a device, whoever holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoadedModel {
    pub name: String,
    /// The worker that holds it; absent for the daemon's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    pub bytes: u64,
    /// Somebody has it attached, or its worker computes with it.
    pub busy: bool,
    pub attached_count: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
}

/// `POST /api/memory/model/optimize/{deviceId}`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OptimizeModels {
    /// By what those are chosen that go. Default: the daemon's own policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<EvictionPolicy>,
    /// The level that pressure is to fall to. Default `Moderate`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_pressure_level: Option<PressureLevel>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100_000)]
    pub max_models_to_unload: Option<u32>,
    /// Bytes that are to become free, whatever the level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_memory_to_free: Option<Bytes>,
    /// All that is idle goes, though the level is low enough and nothing else was asked for.
    #[serde(default)]
    pub force_optimization: bool,
    /// Models that stay, the daemon's and the workers'.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 1024)]
    pub exclude_models: Vec<String>,
    /// How long it may take. Default 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 600_000)]
    pub max_optimization_time_ms: Option<u64>,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelsOptimized {
    /// Absent if nothing was to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
    pub device_id: DeviceId,
    /// Whether anything was to be done.
    pub optimization_triggered: bool,
    pub optimization_strategy: EvictionPolicy,
    /// What was looked for.
    pub needed_bytes: u64,
    /// What was asked for, of the daemon's own models and of workers.
    pub asked_bytes: u64,
    /// What those said that they let go.
    pub acknowledged_bytes: u64,
    /// What was measured as free: given back by the device, and gone from the workers' processes.
    pub memory_freed: u64,
    pub models_unloaded: Vec<UnloadedModel>,
    /// What it will cost to have them back.
    pub performance_impact: PerformanceImpact,
    pub optimization_time_ms: u64,
    /// In words: what was done, or why not.
    pub message: String,
    pub new_pressure_level: PressureLevel,
    /// How each worker that was asked did.
    pub workers: Vec<WorkerOutcome>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PerformanceImpact {
    /// To load all of them once.
    pub reload_seconds: f64,
    /// As often as they were used lately.
    pub expected_seconds_per_hour: f64,
}

/// A model that went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct UnloadedModel {
    pub model: String,
    /// Its part, of the daemon's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component: Option<String>,
    /// The worker that had it; absent for the daemon's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    pub asked_bytes: u64,
    pub acknowledged_bytes: u64,
    pub measured_bytes: u64,
}

/// How a worker did what it was asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerOutcome {
    pub worker_id: WorkerId,
    pub name: WorkerName,
    pub asked_bytes: u64,
    pub acknowledged_bytes: u64,
    pub measured_bytes: u64,
    /// Why it did not do all of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<String>,
}

/// One step of relief, as the event `pressure.step` tells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReliefStep {
    pub operation_id: OperationId,
    pub device_id: DeviceId,
    pub action: ReliefAction,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    pub asked_bytes: u64,
    pub acknowledged_bytes: u64,
    pub measured_bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
