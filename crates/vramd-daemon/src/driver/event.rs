//! What the driver takes, one at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use vramd_api::{
    AllocationId, ApiError, ClearRequest, Cleared, ComponentName, CopyRequest, DefragmentPlans,
    DefragmentRequest, DeviceId, DeviceLimits, DevicePressure, FootprintPage, Holder, KeepAlive, LeaseId,
    MemoryPlan, ModelName, ModelsOptimized, Operation, OperationId, OptimizeModels, Released, RenewRequest,
    SetLimits, TransferRequest, WorkerId,
};
use vramd_core::ledger::SegmentId;
use vramd_core::models::{Model, Plan};
use vramd_core::pressure::Stall;
use vramd_core::usage::Counts;
use vramd_device::{DeviceError, Report, Sample};

use super::{
    Allocate, AttachRequest, Attachment, Caller, Joining, Launch, Load, LoadAnswer, PlanLoads, Reply,
    allocations, copies, plans, relief,
};
use crate::mover;
use crate::source::Prepared;
use crate::store::StoreError;
use crate::workers::{News, Task};

/// Everything that can happen to the daemon.
#[derive(Debug)]
pub enum Event {
    Allocate(Box<Allocate>, Reply<vramd_api::Allocation>),
    Reserve(Box<Allocate>, Reply<vramd_api::Allocation>),
    /// With the most that was in use, of a reservation.
    Release(AllocationId, Option<u64>, Caller, Reply<Released>),
    Renew(AllocationId, RenewRequest, Caller, Reply<vramd_api::Allocation>),
    SetLimits(DeviceId, Box<SetLimits>, Reply<DeviceLimits>),
    ForgetFootprints(ModelName, Reply<FootprintPage>),
    Register(Box<Model>, Reply<vramd_api::Model>),
    Remove(ModelName, Reply<vramd_api::Model>),
    Load(Load, Option<BTreeMap<ComponentName, Prepared>>, Reply<LoadAnswer>),
    Unload(ModelName, Option<DeviceId>, Reply<Operation>),
    Pin(ModelName, bool, Reply<vramd_api::Model>),
    Touch(ModelName, Option<KeepAlive>, Reply<vramd_api::Model>),
    Cancel(OperationId, Reply<Operation>),
    Pause(OperationId, bool, Reply<Operation>),
    Transfer(Box<TransferRequest>, Caller, Reply<Operation>),
    Copy(Box<CopyRequest>, Caller, Reply<Operation>),
    Defragment(DefragmentRequest, Option<DeviceId>, Reply<Operation>),
    PlanLoads(Box<PlanLoads>, Reply<MemoryPlan>),
    PlanDefragment(DefragmentRequest, Option<DeviceId>, Reply<DefragmentPlans>),
    Attach(Box<AttachRequest>, Reply<Attachment>),
    /// The files of a model that was known from an earlier run were looked at.
    Inspected(ModelName, BTreeMap<ComponentName, Result<Arc<Plan>, Box<ApiError>>>),
    Clear(Box<ClearRequest>, Option<DeviceId>, Caller, Reply<Operation>),
    PlanClear(Box<ClearRequest>, Option<DeviceId>, Caller, Reply<Cleared>),
    /// One allocation of those that are cleared has been released.
    PartCleared {
        operation: OperationId,
        allocation: AllocationId,
        outcome: Result<Released, ApiError>,
    },
    Zeroed {
        operation: OperationId,
        allocation: AllocationId,
        device: DeviceId,
        outcome: Result<(), DeviceError>,
    },
    /// What the process that fills a reservation used before it.
    BaseMeasured {
        reservation: AllocationId,
        outcome: Result<Option<u64>, DeviceError>,
    },
    /// A connection closed.
    LeaseEnded(LeaseId),
    /// A reader has mapped the new place of what it has attached, or says why it cannot.
    MoveAnswered {
        lease: LeaseId,
        generation: u64,
        refused: Option<String>,
    },
    /// A copy has ended.
    Copied {
        copy: copies::CopyId,
        outcome: mover::Outcome,
    },
    /// What happened on each device since this was last asked.
    TakeCounts(Reply<BTreeMap<DeviceId, Counts>>),
    StartWorker(Box<Launch>, Reply<vramd_api::Worker>),
    JoinWorker(Box<Joining>, Reply<Task>),
    /// By its id or its name.
    StopWorker(String, Caller, Reply<vramd_api::Worker>),
    Worker(WorkerId, News),
    /// A worker has done what frees memory, or not.
    WorkerAsked(Box<relief::Asked>),
    /// One device, or all.
    Pressure(Option<DeviceId>, Reply<Vec<DevicePressure>>),
    OptimizeModels(DeviceId, Box<OptimizeModels>, Caller, Reply<ModelsOptimized>),
    /// The system says that tasks wait for memory.
    Stalled(Stall),
    /// The next pass of a defragmentation is planned.
    Planned {
        operation: OperationId,
        plan: plans::PassPlan,
    },
    /// What a defragmentation in quiet hours would do first.
    Surveyed {
        device: DeviceId,
        plan: plans::PassPlan,
    },
    SegmentCreated {
        device: DeviceId,
        segment: SegmentId,
        /// The segment that was to go first and did not.
        kept: Option<SegmentId>,
        /// Bytes per second, if its pages were made.
        outcome: Result<Option<f64>, DeviceError>,
    },
    SegmentDestroyed {
        device: DeviceId,
        segment: SegmentId,
        outcome: Result<(), DeviceError>,
    },
    /// A block was zeroed, or its segment given back.
    BlockReleased {
        allocation: AllocationId,
        /// Who still has its memory.
        outcome: Result<Vec<Holder>, DeviceError>,
    },
    LoadRead {
        operation: OperationId,
        /// The checksums of those parts that were read and summed.
        outcome: Result<Vec<Option<u64>>, LoadFailure>,
    },
    Measured {
        device: DeviceId,
        reports: Vec<Report>,
        /// What processes used that fill reservations, before all else was measured.
        used_by: BTreeMap<u32, u64>,
        outcome: Result<Sample, DeviceError>,
    },
    /// Which processes workers have, by the first of each.
    WorkersFound(BTreeMap<u32, Vec<u32>>),
    /// What workers' processes use of a device, and how long it took to look.
    WorkersMeasured(DeviceId, BTreeMap<u32, u64>, Duration),
    /// A lost device was tried again.
    Adopted {
        device: DeviceId,
        reports: Vec<Report>,
        outcome: Result<(), DeviceError>,
    },
    /// The journal wrote, or failed to write, what this was waiting for.
    Stored(Box<OnStored>, Result<(), StoreError>),
    Tick,
    Stop,
}

/// Why the bytes of a model did not arrive.
#[derive(Debug)]
pub enum LoadFailure {
    Cancelled,
    Device(DeviceId, DeviceError),
}

/// What goes on once the journal has written.
#[derive(Debug)]
pub enum OnStored {
    Activate(AllocationId, Box<allocations::Waiting>),
    Release(AllocationId, Reply<Released>),
    Forget(AllocationId, Reply<Released>),
    Limits(DeviceId, Box<SetLimits>, Reply<DeviceLimits>),
    Register(Box<Model>, Reply<vramd_api::Model>),
    Remove(ModelName, Reply<vramd_api::Model>),
    Pin(ModelName, bool, Reply<vramd_api::Model>),
    Touch(ModelName, KeepAlive, Reply<vramd_api::Model>),
    Copied(copies::CopyId, Option<u64>),
    /// Written for a restart only; a failure is logged.
    Nothing,
}
