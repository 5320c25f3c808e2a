//! A machine that serves a trace of requests: what would have been loaded, gone and waited for, by each policy.
//!
//! Owns the description of a machine, the trace, the run and its picture. The choice of what goes and how use is counted are the
//! daemon's own ([`crate::eviction`], [`crate::trial`]). Simpler than there: a model is one component; a load takes its seconds whatever else is loaded; bytes that
//! go are free at once, or once they are in RAM, from where nothing comes back unasked; those who wait are served by priority, then age, and nobody passes them.

mod picture;
mod ram;
mod run;

use std::collections::HashMap;
use std::io::BufRead;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use vramd_api::{Bytes, DeviceId, EvictionPolicy, KeepAlive, ModelName, Priority};

pub use picture::draw;
pub use run::{Interval, Run, run};

/// What is simulated.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Machine {
    pub devices: Vec<Device>,
    /// How fast models load that do not say it themselves.
    #[serde(default = "default_rate", deserialize_with = "size")]
    pub bytes_per_second: Bytes,
    /// Host memory that keeps models which had to go from a device, as `--ram-tier` does. None if left out.
    #[serde(default)]
    pub ram: Option<Ram>,
    pub models: Vec<Model>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ram {
    #[serde(deserialize_with = "size")]
    pub bytes: Bytes,
    /// How fast models are copied from a device and back.
    #[serde(default = "default_copy_rate", deserialize_with = "size")]
    pub bytes_per_second: Bytes,
}

fn default_copy_rate() -> Bytes {
    Bytes::new(4_000_000_000).expect("a size")
}

fn default_rate() -> Bytes {
    Bytes::new(1_000_000_000).expect("a size")
}

/// A number of bytes, or a text such as `24GiB`.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Size {
        Number(u64),
        Text(String),
    }
    let size = match Size::deserialize(deserializer)? {
        Size::Number(bytes) => Bytes::new(bytes).ok_or("it is not from 1 to 2^63 - 1".to_owned()),
        Size::Text(text) => text.parse().map_err(|error: vramd_api::BadSize| error.to_string()),
    };
    size.map_err(D::Error::custom)
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    pub device_id: DeviceId,
    /// What models may have of it.
    #[serde(deserialize_with = "size")]
    pub bytes: Bytes,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Model {
    pub name: ModelName,
    #[serde(deserialize_with = "size")]
    pub bytes: Bytes,
    /// Default: its bytes by the machine's rate.
    #[serde(default)]
    pub load_seconds: Option<f64>,
    #[serde(default)]
    pub priority: Priority,
    #[serde(default)]
    pub keep_alive: KeepAlive,
}

/// One request: a model is used from then on for so many seconds, once it is there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Request {
    /// Since the trace began.
    pub time: f64,
    /// An index of the machine's models.
    pub model: usize,
    pub seconds: f64,
}

/// What a policy came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub policy: EvictionPolicy,
    pub requests: u64,
    /// Those whose model never found room, since more important ones stayed; the rest of the figures leaves their waits out.
    pub unserved: u64,
    /// The share of requests whose model was resident.
    pub hit_rate: f64,
    pub loads: u64,
    /// Those of them that were copied from RAM.
    pub from_ram: u64,
    pub evictions: u64,
    pub loaded_bytes: u64,
    /// The sum over all loads.
    pub load_seconds: f64,
    /// How long requests waited for their model.
    pub waits: Waits,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Waits {
    pub mean_seconds: f64,
    pub p50_seconds: f64,
    pub p99_seconds: f64,
    pub max_seconds: f64,
}

/// Why a machine or a trace cannot be simulated.
#[derive(Debug, thiserror::Error)]
pub enum SimulationError {
    #[error("the machine is malformed: {0}")]
    Machine(String),
    #[error("line {line}: {problem}")]
    Line { line: u64, problem: String },
    #[error("the trace has no request")]
    Empty,
    #[error("the trace could not be read: {0}")]
    Read(#[from] std::io::Error),
}

impl Machine {
    /// Reads a description, which is JSON.
    pub fn read(text: &str) -> Result<Self, SimulationError> {
        let bad = |problem: String| SimulationError::Machine(problem);
        let machine: Self = serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
        let largest = machine.devices.iter().map(|device| device.bytes.get()).max();
        let Some(largest) = largest else { return Err(bad("it has no device".to_owned())) };
        let mut names = std::collections::BTreeSet::new();
        for model in &machine.models {
            let name = &model.name;
            if !names.insert(name) {
                return Err(bad(format!("the model {name} is there twice")));
            }
            if model.bytes.get() > largest {
                return Err(bad(format!("the model {name} fits onto no device")));
            }
            if model.load_seconds.is_some_and(|seconds| !seconds.is_finite() || seconds < 0.0) {
                return Err(bad(format!("the loadSeconds of {name} are no time")));
            }
        }
        Ok(machine)
    }

    fn load_seconds(&self, model: &Model) -> f64 {
        let by_rate = || model.bytes.get() as f64 / self.bytes_per_second.get() as f64;
        model.load_seconds.unwrap_or_else(by_rate)
    }

    /// Reads a trace: lines of `time,model,seconds`, in order of their times, which are seconds; a first line of these words is
    /// passed over, empty ones are.
    pub fn trace(&self, reader: impl BufRead) -> Result<Vec<Request>, SimulationError> {
        let names: HashMap<&str, usize> =
            self.models.iter().enumerate().map(|(at, model)| (model.name.as_str(), at)).collect();
        let mut requests: Vec<Request> = Vec::new();
        for (line, text) in (1..).zip(reader.lines()) {
            let text = text?;
            let text = text.trim();
            if text.is_empty() || (line == 1 && text.replace(' ', "") == "time,model,seconds") {
                continue;
            }
            let bad = |problem: &str| SimulationError::Line { line, problem: problem.to_owned() };
            let fields: Vec<&str> = text.split(',').map(str::trim).collect();
            let [time, model, seconds] = fields[..] else {
                return Err(bad("it is not `time,model,seconds`"));
            };
            let number =
                |text: &str| text.parse().ok().filter(|it: &f64| it.is_finite() && (0.0..=1e12).contains(it));
            let time = number(time).ok_or_else(|| bad("its time is no number of seconds"))?;
            let seconds = number(seconds).ok_or_else(|| bad("its length is no number of seconds"))?;
            let Some(model) = names.get(model).copied() else {
                return Err(bad(&format!("the machine has no model {model:?}")));
            };
            if requests.last().is_some_and(|before| before.time > time) {
                return Err(bad("it is earlier than the line before it"));
            }
            requests.push(Request { time, model, seconds });
        }
        if requests.is_empty() { Err(SimulationError::Empty) } else { Ok(requests) }
    }
}
