//! The words of vramd: ids, units, states, wire bodies and error codes.
//!
//! Owns every name that appears in JSON, on the command line, in Python and on the attach socket. It holds
//! no behaviour beyond parsing, printing and checking those words. With the feature `client` it also holds
//! the typed HTTP client and the attach client.

pub mod attach;
#[cfg(feature = "client")]
pub mod client;
mod dtype;
mod error;
mod event;
mod health;
mod ids;
mod memory;
mod model;
mod movement;
mod object;
mod operation;
mod plan;
mod relief;
mod reservation;
mod units;
mod usage;
mod worker;
pub mod worker_protocol;

pub use error::{ApiError, ErrorCode, Failure, Success};
pub use event::{Event, EventKind};
pub use health::{Health, ReadyFile};
pub use ids::{
    AllocationId, BadName, ComponentName, DeviceId, LeaseId, ModelName, OperationId, OwnerName, WorkerId,
    WorkerName,
};
pub use memory::{
    AllocateRequest, Allocation, AllocationHistoryEntry, AllocationPage, AllocationStatus, AllocationType,
    Candidate, Device, DeviceCapabilities, DeviceHealth, DeviceLimits, DevicePage, DeviceProcess,
    DeviceStatus, FragmentationStatus, Holder, Lease, LeaseKind, LimitsPage, MemoryStatus, MemoryType,
    OnShortage, Placement, PlacementReason, Pressure, PressureLevel, Priority, Released, RenewRequest,
    SetLimits, ShareLimits, ShareUse, TotalStatus,
};
pub use model::{
    Component, ComponentSource, EvictionPolicy, KeepAlive, LoadRequest, Model, ModelPage, PrefetchRequest,
    RegisterModel, Residency, ResidencyState, TouchRequest, UnloadRequest,
};
pub use movement::{
    Checksum, ClearRequest, ClearTarget, Cleared, CopyRequest, DefragmentPlan, DefragmentPlans,
    DefragmentRequest, Defragmented, DeviceDefragmented, EndedBy, FixedBlock, FixedReason,
    FragmentationFigures, MAX_TRANSFER_ITEMS, TransferItem, TransferMode, TransferRequest, Transferred,
};
pub use operation::{Operation, OperationKind, OperationPage, OperationState};
pub use plan::{
    EvictedComponent, MAX_PLANNED, MemoryPlan, PlanItem, PlanOutcome, PlanRequest, PlannedModel, PlannedRun,
};
pub use relief::{
    DevicePressure, LoadedModel, ModelMemory, ModelStatus, ModelsOptimized, OptimizeModels,
    PerformanceImpact, PressurePage, RecommendedAction, ReliefAction, ReliefStep, Trend, UnloadedModel,
    WorkerMemoryStatus, WorkerOutcome, WorkerShare,
};
pub use reservation::{
    Basis, Footprint, FootprintPage, MAX_DIMENSIONS, RECENT_PEAKS, Reservation, ReserveRequest,
};
pub use units::{BadSize, Bytes, parse_size};
pub use usage::{
    DeviceUsage, MAX_USAGE_POINTS, USAGE_SECONDS, UsageAverage, UsagePage, UsagePeak, UsageRates,
    UsageSample, UsageShare,
};
pub use worker::{
    CallWorker, LimitKind, LogLine, RestartPolicy, StartWorker, Worker, WorkerAnswer, WorkerExit,
    WorkerFault, WorkerLimit, WorkerMemory, WorkerModel, WorkerModelState, WorkerPage, WorkerState,
};

/// The version of this build, as in every `Cargo.toml` of the workspace.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The address that the daemon listens on when none is configured.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:8726";
