//! What happened, as `/api/events` tells it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The kinds of events; the SSE `event:` line carries the same word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub enum EventKind {
    #[serde(rename = "daemon.started")]
    DaemonStarted,
    #[serde(rename = "daemon.stopping")]
    DaemonStopping,
    #[serde(rename = "allocation.created")]
    AllocationCreated,
    #[serde(rename = "allocation.released")]
    AllocationReleased,
    /// It has another place; `data.generation` is the new one.
    #[serde(rename = "allocation.moved")]
    AllocationMoved,
    #[serde(rename = "lease.ended")]
    LeaseEnded,
    #[serde(rename = "model.registered")]
    ModelRegistered,
    #[serde(rename = "model.removed")]
    ModelRemoved,
    #[serde(rename = "model.loaded")]
    ModelLoaded,
    #[serde(rename = "model.unloaded")]
    ModelUnloaded,
    /// Parts of a model go to make room: `for` whom, by what, and what stays though it could have gone.
    #[serde(rename = "model.evicted")]
    ModelEvicted,
    #[serde(rename = "model.changed")]
    ModelChanged,
    #[serde(rename = "attachment.opened")]
    AttachmentOpened,
    #[serde(rename = "attachment.closed")]
    AttachmentClosed,
    #[serde(rename = "operation.changed")]
    OperationChanged,
    #[serde(rename = "device.lost")]
    DeviceLost,
    /// One that was lost is in use again, empty.
    #[serde(rename = "device.returned")]
    DeviceReturned,
    /// The driver reported a fault by itself; if the device does not outlive it, `device.lost` comes with it.
    #[serde(rename = "device.fault")]
    DeviceFault,
    #[serde(rename = "pressure.changed")]
    PressureChanged,
    /// Something was done about it: what was asked for, acknowledged and measured.
    #[serde(rename = "pressure.step")]
    PressureStep,
    /// What was done about it has ended: with what was needed and what is free.
    #[serde(rename = "pressure.relieved")]
    PressureRelieved,
    /// A worker is there; its process was started, or it joined.
    #[serde(rename = "worker.started")]
    WorkerStarted,
    /// It has answered the handshake.
    #[serde(rename = "worker.ready")]
    WorkerReady,
    /// It does not answer its heartbeats, or does again.
    #[serde(rename = "worker.changed")]
    WorkerChanged,
    /// It did what the protocol forbids: `data.fault` says what.
    #[serde(rename = "worker.fault")]
    WorkerFault,
    /// Its process or its connection has ended; `data` says how, and whether it is started again.
    #[serde(rename = "worker.exited")]
    WorkerExited,
    #[serde(rename = "limits.changed")]
    LimitsChanged,
    /// This subscriber was too slow: `data.missed` events were dropped for it.
    #[serde(rename = "lag")]
    Lag,
    /// The id to resume from is too old or from another run: read the state anew.
    #[serde(rename = "reset")]
    Reset,
}

impl std::fmt::Display for EventKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// One event. Ids grow; give the last one back as `Last-Event-ID` to resume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    pub id: String,
    pub event: EventKind,
    pub at: Timestamp,
    #[schema(value_type = Object)]
    pub data: serde_json::Value,
}
