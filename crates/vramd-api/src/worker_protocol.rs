//! The frames between the daemon and a worker: one JSON object on each line. `protocol/worker.md` is its document.
//!
//! Owns the reading and writing of lines and the units of the worker's world: megabytes of 2^20 bytes and seconds ago
//! become bytes and times here and nowhere else.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::{ApiError, DeviceId, ErrorCode, OwnerName, Priority, WorkerModel, WorkerModelState, WorkerName};

/// The version that this crate speaks.
pub const VERSION: u32 = 1;
/// The longest line, its end included.
pub const MAX_LINE_BYTES: usize = 16 << 20;
/// The most models that a worker can report.
pub const MAX_MODELS: usize = 4096;
/// The longest report of models.
pub const MAX_REPORT_BYTES: usize = 2 << 20;
/// The most actions that are remembered of a worker, and the longest.
const MAX_ACTIONS: usize = 256;
const MAX_ACTION: usize = 128;
/// The longest text of a worker's that is shown.
const MAX_SHOWN: usize = 512;
/// The longest text in a report.
const MAX_TEXT: usize = 256;
const MEGABYTE: f64 = 1_048_576.0;

/// What the daemon sends.
#[derive(Debug, Serialize)]
pub struct Request<'a, T> {
    pub request_id: &'a str,
    pub action: &'a str,
    pub data: &'a T,
    /// How many milliseconds from now the answer is of use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
}

impl<T: Serialize> Request<'_, T> {
    /// The line, with its end.
    pub fn encode(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("requests are plain data");
        line.push(b'\n');
        line
    }
}

/// The action by which a worker is asked to let a model go.
pub const UNLOAD_MODEL: &str = "memory.unload_model";

/// What a worker sends.
#[derive(Debug)]
pub enum Message {
    Reply {
        request_id: String,
        /// An object, as it came: whoever asked reads it.
        outcome: Result<Box<RawValue>, WorkerError>,
    },
    /// What it says is read by whoever knows that event.
    Event { event: String, data: Option<Box<RawValue>> },
}

/// An error in a worker's own words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct WorkerError {
    pub code: String,
    pub message: String,
    pub hint: Option<String>,
}

impl From<WorkerError> for ApiError {
    /// One of our codes stays what it is; any other is in the details.
    fn from(error: WorkerError) -> Self {
        let code = serde_json::from_value(Value::String(error.code.clone()));
        // These are the daemon's to say.
        let own = code.ok().filter(|code| !matches!(code, ErrorCode::Internal | ErrorCode::Unavailable));
        let text = if error.message.is_empty() { "the worker gave no reason" } else { &error.message };
        let mut shown = Self::new(own.unwrap_or(ErrorCode::WorkerFailed), clip(text));
        shown.hint = error.hint.as_deref().map(clip);
        shown.detail("workerCode", clip(&error.code))
    }
}

/// Why a line is no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadLine {
    #[error("it is no JSON object: {0}")]
    NotJson(String),
    #[error("it is neither a reply (request_id, success) nor an event (event, data)")]
    Neither,
    #[error("it has more than {MAX_LINE_BYTES} bytes")]
    TooLong,
}

/// Reads one line of a worker's, without its end.
pub fn decode(line: &[u8]) -> Result<Message, BadLine> {
    #[derive(Deserialize)]
    struct Either<'a> {
        request_id: Option<String>,
        success: Option<bool>,
        #[serde(borrow)]
        data: Option<&'a RawValue>,
        error: Option<WorkerError>,
        event: Option<String>,
    }
    let not_json = |error: serde_json::Error| BadLine::NotJson(clip(&error.to_string()));
    if line.trim_ascii_start().first() != Some(&b'{') {
        return Err(BadLine::NotJson("it does not begin with {".to_owned()));
    }
    let either: Either = serde_json::from_slice(line).map_err(not_json)?;
    if either.data.is_some_and(|data| !data.get().starts_with('{')) {
        return Err(BadLine::NotJson("its data is no object".to_owned()));
    }
    let data = either.data.map(ToOwned::to_owned);
    let nothing = || RawValue::from_string("{}".to_owned()).expect("an object");
    match (either.request_id, either.success, either.event) {
        (Some(request_id), Some(true), None) => {
            Ok(Message::Reply { request_id, outcome: Ok(data.unwrap_or_else(nothing)) })
        }
        (Some(request_id), Some(false), None) => {
            Ok(Message::Reply { request_id, outcome: Err(either.error.unwrap_or_default()) })
        }
        (None, None, Some(event)) => Ok(Message::Event { event, data }),
        _ => Err(BadLine::Neither),
    }
}

/// Which request a line that cannot be read was meant to answer.
pub fn meant_for(line: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Id {
        request_id: String,
    }
    serde_json::from_slice(line).ok().map(|it: Id| it.request_id)
}

/// The data of `hello`, by which the daemon begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Those that the daemon speaks.
    pub versions: Vec<u32>,
    pub worker_id: String,
    pub name: WorkerName,
    /// As what it is to allocate over REST: what it has not asked to keep goes with it.
    pub owner: OwnerName,
    /// Where the daemon serves HTTP; absent if only over the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// The local socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<DeviceId>,
    /// All devices by their ids, with what they are called whatever a process counts them as.
    pub device_uuids: BTreeMap<DeviceId, String>,
    /// The most host memory that its processes may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit_mb: Option<f64>,
    /// How often it is asked whether it is alive.
    pub heartbeat_seconds: f64,
    pub max_line_bytes: usize,
}

/// What a worker answers to `hello`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Greeting {
    pub version: u32,
    /// Which actions it has.
    pub actions: Vec<String>,
    #[serde(default)]
    pub implementation: Option<String>,
    #[serde(default)]
    pub framework: Option<String>,
}

impl Greeting {
    /// The same with nothing in it that is longer than it has to be.
    #[must_use]
    pub fn clipped(mut self) -> Self {
        self.actions.truncate(MAX_ACTIONS);
        self.actions.retain(|action| action.len() <= MAX_ACTION);
        self.implementation = self.implementation.as_deref().map(clip);
        self.framework = self.framework.as_deref().map(clip);
        self
    }
}

/// A text of a worker's, without what moves a cursor and cut to what somebody would read.
pub fn clip(text: &str) -> String {
    text.chars().take(MAX_SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The data of the event `join`, by which a worker that the daemon did not start begins.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Join {
    pub name: WorkerName,
    #[serde(default)]
    pub device_id: Option<String>,
}

/// What a worker answers to `memory.get_model_info`, and the data of its event `models`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ModelInfo {
    pub loaded_models: Vec<ModelReport>,
}

/// One model that a worker has.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ModelReport {
    pub name: String,
    #[serde(default, rename = "type")]
    pub model_type: Option<String>,
    #[serde(default)]
    pub device_id: Option<DeviceId>,
    #[serde(default)]
    pub offloaded: bool,
    #[serde(default)]
    pub memory_mb: f64,
    #[serde(default)]
    pub attached_mb: f64,
    #[serde(default)]
    pub attached_model: Option<String>,
    #[serde(default)]
    pub busy: bool,
    #[serde(default)]
    pub priority: Priority,
    #[serde(default)]
    pub use_count: u64,
    #[serde(default)]
    pub idle_seconds: Option<f64>,
    #[serde(default)]
    pub load_seconds: Option<f64>,
}

impl ModelInfo {
    /// The models in the daemon's words. `totals` has what each device holds: more than that nobody can have.
    pub fn models(
        &self,
        own_device: &DeviceId,
        totals: &BTreeMap<DeviceId, u64>,
        now: Timestamp,
    ) -> Result<Vec<WorkerModel>, String> {
        if self.loaded_models.len() > MAX_MODELS {
            return Err(format!("it reports {} models, {MAX_MODELS} at most", self.loaded_models.len()));
        }
        let mut sums: BTreeMap<&DeviceId, u64> = BTreeMap::new();
        let mut models = Vec::with_capacity(self.loaded_models.len());
        for report in &self.loaded_models {
            let device = report.device_id.as_ref().unwrap_or(own_device);
            let (device, total) = totals
                .get_key_value(device)
                .ok_or_else(|| format!("it reports a model on {device}, which is no device here"))?;
            let model = report.model(device, now)?;
            let sum = sums.entry(device).or_default();
            *sum = sum.saturating_add(model.own_bytes);
            if *sum > *total || model.attached_bytes > *total {
                let claim = (*sum).max(model.attached_bytes);
                return Err(format!("it claims {claim} bytes on {device}, which has {total}"));
            }
            models.push(model);
        }
        Ok(models)
    }
}

impl ModelReport {
    fn model(&self, device: &DeviceId, now: Timestamp) -> Result<WorkerModel, String> {
        let texts = [Some(&self.name), self.model_type.as_ref(), self.attached_model.as_ref()];
        let bad =
            |text: &&String| text.is_empty() || text.len() > MAX_TEXT || text.chars().any(char::is_control);
        if let Some(text) = texts.into_iter().flatten().find(bad) {
            let shown: String = text.chars().take(40).collect();
            return Err(format!("it reports a model with the bad name {shown:?}"));
        }
        let seconds = |what: &str, seconds: Option<f64>| match seconds {
            Some(seconds) if !(0.0..=1e9).contains(&seconds) => {
                Err(format!("it reports {what} {seconds} of {}", self.name))
            }
            seconds => Ok(seconds),
        };
        let idle = seconds("idle_seconds", self.idle_seconds)?;
        Ok(WorkerModel {
            name: self.name.clone(),
            model_type: self.model_type.clone(),
            device_id: device.clone(),
            state: if self.offloaded { WorkerModelState::Offloaded } else { WorkerModelState::Loaded },
            own_bytes: bytes_of(self.memory_mb)
                .ok_or_else(|| format!("it reports memory_mb {} of {}", self.memory_mb, self.name))?,
            attached_bytes: bytes_of(self.attached_mb)
                .ok_or_else(|| format!("it reports attached_mb {} of {}", self.attached_mb, self.name))?,
            attached_model: self.attached_model.clone(),
            busy: self.busy,
            priority: self.priority,
            use_count: self.use_count,
            last_used_at: idle.and_then(|idle| now.checked_sub(SignedDuration::from_secs_f64(idle)).ok()),
            load_seconds: seconds("load_seconds", self.load_seconds)?,
        })
    }
}

/// Bytes of so many megabytes; None if that cannot be.
pub fn bytes_of(megabytes: f64) -> Option<u64> {
    let bytes = megabytes * MEGABYTE;
    (0.0..9.2e18).contains(&bytes).then(|| bytes.round() as u64)
}

/// Megabytes of so many bytes.
pub fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / MEGABYTE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals() -> (DeviceId, BTreeMap<DeviceId, u64>) {
        let device: DeviceId = "cpu:0".parse().expect("a device");
        (device.clone(), BTreeMap::from([(device, 1 << 30)]))
    }

    #[test]
    fn impossible_figures_are_refused_by_name() {
        let (device, totals) = totals();
        let now = Timestamp::UNIX_EPOCH;
        let refused = |text: &str| {
            let info: ModelInfo = serde_json::from_str(text).expect("a report");
            info.models(&device, &totals, now).expect_err(text)
        };
        for (report, why) in [
            (r#"{"loaded_models":[{"name":"a","memory_mb":-1}]}"#, "memory_mb -1"),
            (r#"{"loaded_models":[{"name":"a","memory_mb":1e300}]}"#, "memory_mb 1"),
            (r#"{"loaded_models":[{"name":"a","memory_mb":600},{"name":"b","memory_mb":600}]}"#, "claims"),
            (r#"{"loaded_models":[{"name":"a","attached_mb":5000}]}"#, "claims"),
            (r#"{"loaded_models":[{"name":"","memory_mb":1}]}"#, "bad name"),
            (r#"{"loaded_models":[{"name":"a\u001b[2J"}]}"#, "bad name"),
            (r#"{"loaded_models":[{"name":"a","device_id":"cuda:9"}]}"#, "no device"),
            (r#"{"loaded_models":[{"name":"a","idle_seconds":-3}]}"#, "idle_seconds"),
        ] {
            let error = refused(report);
            assert!(error.contains(why), "{report}: {error}");
        }
    }

    #[test]
    fn megabytes_become_bytes_and_seconds_ago_become_times() {
        let (device, totals) = totals();
        let now: Timestamp = "2026-01-01T00:00:10Z".parse().expect("a time");
        let text = r#"{"loaded_models":[{"name":"a","memory_mb":1.5,"idle_seconds":4,"unknown":1}]}"#;
        let info: ModelInfo = serde_json::from_str(text).expect("a report");
        let models = info.models(&device, &totals, now).expect("figures that can be");
        assert_eq!(models[0].own_bytes, 1_572_864);
        assert_eq!(models[0].last_used_at, "2026-01-01T00:00:06Z".parse().ok());
    }

    #[test]
    fn a_workers_error_keeps_our_codes_and_names_its_own() {
        let error = |code: &str| ApiError::from(WorkerError { code: code.into(), ..WorkerError::default() });
        assert_eq!(error("INSUFFICIENT_MEMORY").code, ErrorCode::InsufficientMemory);
        assert_eq!(error("INTERNAL").code, ErrorCode::WorkerFailed);
        assert_eq!(error("CudaOutOfMemory").details["workerCode"], "CudaOutOfMemory");
    }
}
