//! Workers: processes that hold model memory of their own and speak the worker protocol.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Bytes, DeviceId, ModelName, Priority, WorkerId, WorkerName};

/// A worker to be started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StartWorker {
    /// One of the programs that the daemon's configuration allows.
    pub program: WorkerName,
    /// Default: the program's name, with a number if it is taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<WorkerName>,
    /// The device that it is to use: an id or uuid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
    /// Variables for its environment; the program's configuration says which may be set.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// The most host memory that its processes may take. How strictly that holds, its `limit` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit_bytes: Option<Bytes>,
    #[serde(default)]
    pub restart: RestartPolicy,
    /// How often it has to show that it is alive. Default 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 3600)]
    pub heartbeat_seconds: Option<u64>,
}

/// Whether a worker that has ended is started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum RestartPolicy {
    Never,
    /// If it ended with an error, by a signal, or before it was ready.
    #[default]
    OnFailure,
    Always,
}

/// `Starting → Ready ⇄ Unresponsive → Exited`; from any of them to `Stopping → Exited`. A started one that ended by itself waits as
/// `Restarting`, and is `Failed` once it has ended too often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub enum WorkerState {
    /// Its process is there, or its connection; it has not answered the handshake.
    Starting,
    Ready,
    /// It has not answered its last heartbeats.
    Unresponsive,
    /// It was asked to end.
    Stopping,
    /// It has ended and is started again at `nextStartAt`.
    Restarting,
    /// It has ended.
    Exited,
    /// It ended too often in a short time, or could not be started.
    Failed,
}

impl WorkerState {
    /// Whether a process or a connection is behind it.
    pub const fn is_there(self) -> bool {
        matches!(self, Self::Starting | Self::Ready | Self::Unresponsive | Self::Stopping)
    }
}

/// A worker, and what is known of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Worker {
    pub worker_id: WorkerId,
    pub name: WorkerName,
    pub state: WorkerState,
    /// The program that the daemon started; absent for one that joined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<WorkerName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The user that it runs as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<DeviceId>,
    /// What it calls itself: `vramd 0.1.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub implementation: Option<String>,
    /// What it computes with: `torch 2.9.1`, `numpy 2.4.6`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub framework: Option<String>,
    /// What it can be asked to do.
    pub actions: Vec<String>,
    /// The bytes that are its own, by device.
    pub memory: Vec<WorkerMemory>,
    /// The models that it says it has.
    pub models: Vec<WorkerModel>,
    /// When it last said which models it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_synchronized: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<WorkerLimit>,
    /// Absent for one that joined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<RestartPolicy>,
    pub restart_count: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_start_at: Option<Timestamp>,
    pub started_at: Timestamp,
    /// When it last sent anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_heard_at: Option<Timestamp>,
    /// How it last ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<WorkerExit>,
    /// How often it did what the protocol forbids.
    pub fault_count: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_fault: Option<WorkerFault>,
    /// What it wrote to its standard error, and what it printed that is no frame: the last 200 lines. Only of one worker, with
    /// `?include=logs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logs: Option<Vec<LogLine>>,
}

/// What a worker has on a device beside the weights that it has attached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerMemory {
    pub device_id: DeviceId,
    /// What the system or the driver says of its process and of all that it started; absent where neither tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured_bytes: Option<u64>,
    /// What the worker says that its models take of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported_bytes: Option<u64>,
}

/// A model that a worker says it has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerModel {
    pub name: String,
    /// `unet`, `vae`, `encoder`, or whatever the worker calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_type: Option<String>,
    pub device_id: DeviceId,
    pub state: WorkerModelState,
    /// The bytes that are the worker's own.
    pub own_bytes: u64,
    /// The bytes of the daemon's that it has attached: these are counted as the daemon's.
    pub attached_bytes: u64,
    /// The registered model that these are of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached_model: Option<String>,
    /// It computes with it now.
    pub busy: bool,
    pub priority: Priority,
    pub use_count: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
    /// How long it took to load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_seconds: Option<f64>,
}

impl WorkerModel {
    /// Whether it is a registered model, or a component of one, attached.
    pub fn is_of(&self, registered: &ModelName) -> bool {
        let attached = self.attached_model.as_deref().unwrap_or_default();
        attached.split('/').next() == Some(registered.as_str())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum WorkerModelState {
    Loaded,
    /// Its bytes are in host memory, from where it can be restored.
    Offloaded,
}

/// What keeps a worker's processes to their limit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerLimit {
    pub kind: LimitKind,
    pub bytes: u64,
    /// Why nothing stricter is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum LimitKind {
    /// A control group holds all its processes together.
    ControlGroup,
    /// The system refuses each of its processes more private memory (`RLIMIT_DATA`).
    DataSegment,
    /// Nothing enforces it.
    None,
}

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerExit {
    pub at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// In words: `exit code 1`, `killed by signal 9`, `the connection closed`, `it could not be started: …`.
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerFault {
    pub at: Timestamp,
    pub message: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LogLine {
    pub at: Timestamp,
    pub text: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerPage {
    pub workers: Vec<Worker>,
}

/// Something that a worker is to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CallWorker {
    /// One of its `actions`.
    #[schema(max_length = 128, example = "memory.get_status")]
    pub action: String,
    /// As the worker protocol has it: in snake case, with megabytes of 2^20 bytes.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub data: serde_json::Map<String, serde_json::Value>,
    /// How long it may take. Default 30.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 3600)]
    pub timeout_seconds: Option<u64>,
}

/// What a worker answered.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerAnswer {
    pub worker_id: WorkerId,
    pub action: String,
    /// As the worker sent it.
    #[schema(value_type = Object)]
    pub data: Box<serde_json::value::RawValue>,
    pub milliseconds: f64,
}
