//! Which programs may be run as workers, which workers begin with the daemon, and which programs of others are asked to give way, as
//! configured.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vramd_api::{Bytes, RestartPolicy, StartWorker, WorkerName};
use vramd_daemon::{Bridge, BridgeKind, Program, Programs};

use crate::settings::size;

/// The programs by their names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkerPrograms(BTreeMap<WorkerName, ConfiguredProgram>);

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct ConfiguredProgram {
    command: Vec<String>,
    environment: Vec<String>,
}

impl<'de> Deserialize<'de> for ConfiguredProgram {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a list of words, or a table with command and environment")]
        enum Written {
            Words(Vec<String>),
            Table {
                command: Vec<String>,
                #[serde(default)]
                environment: Vec<String>,
            },
        }
        let (command, environment) = match Written::deserialize(deserializer)? {
            Written::Words(command) => (command, Vec::new()),
            Written::Table { command, environment } => (command, environment),
        };
        if command.first().is_none_or(String::is_empty) {
            return Err(serde::de::Error::custom("a program has to be named"));
        }
        Ok(Self { command, environment })
    }
}

/// `NAME=COMMAND`.
#[derive(Debug, Clone)]
pub struct NamedProgram(WorkerName, ConfiguredProgram);

impl FromStr for NamedProgram {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, command) = text.split_once('=').ok_or("write NAME=COMMAND")?;
        let command: Vec<String> = command.split_whitespace().map(ToOwned::to_owned).collect();
        if command.is_empty() {
            return Err("write NAME=COMMAND".to_owned());
        }
        let name = name.parse().map_err(|error: vramd_api::BadName| error.to_string())?;
        Ok(Self(name, ConfiguredProgram { command, environment: Vec::new() }))
    }
}

impl FromIterator<NamedProgram> for WorkerPrograms {
    fn from_iter<I: IntoIterator<Item = NamedProgram>>(all: I) -> Self {
        Self(all.into_iter().map(|NamedProgram(name, program)| (name, program)).collect())
    }
}

impl WorkerPrograms {
    pub fn daemon(self) -> Programs {
        let program = |it: ConfiguredProgram| Program { command: it.command, environment: it.environment };
        self.0.into_iter().map(|(name, it)| (name, program(it))).collect()
    }
}

/// A worker that begins with the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfiguredWorker {
    pub name: WorkerName,
    pub program: WorkerName,
    #[serde(default)]
    pub device: Option<String>,
    #[serde(default, deserialize_with = "size")]
    pub memory_limit: Option<Bytes>,
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    #[serde(default)]
    pub restart: RestartPolicy,
    #[serde(default)]
    pub heartbeat_seconds: Option<u64>,
}

impl FromStr for ConfiguredWorker {
    type Err = String;
    /// `NAME=PROGRAM`, or `NAME=PROGRAM@DEVICE`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('=').ok_or("write NAME=PROGRAM or NAME=PROGRAM@DEVICE")?;
        let (program, device) = match rest.split_once('@') {
            Some((program, device)) => (program, Some(device.to_owned())),
            None => (rest, None),
        };
        let bad = |error: vramd_api::BadName| error.to_string();
        Ok(Self {
            name: name.parse().map_err(bad)?,
            program: program.parse().map_err(bad)?,
            device,
            memory_limit: None,
            environment: BTreeMap::new(),
            restart: RestartPolicy::default(),
            heartbeat_seconds: None,
        })
    }
}

impl ConfiguredWorker {
    pub fn daemon(self) -> StartWorker {
        StartWorker {
            program: self.program,
            name: Some(self.name),
            device_id: self.device,
            environment: self.environment,
            memory_limit_bytes: self.memory_limit,
            restart: self.restart,
            heartbeat_seconds: self.heartbeat_seconds,
        }
    }
}

/// A program of somebody else's that is asked to give way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfiguredBridge {
    kind: Kind,
    #[serde(deserialize_with = "address")]
    url: String,
    /// Default: the kind.
    #[serde(default)]
    name: Option<WorkerName>,
    #[serde(default)]
    device: Option<String>,
    /// What it takes, where it does not tell.
    #[serde(default, deserialize_with = "size")]
    size: Option<Bytes>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Ollama,
    #[serde(rename = "comfyui")]
    ComfyUi,
    Vllm,
    LlamaSwap,
}

/// An address that can be asked.
fn checked(url: String) -> Result<String, String> {
    match url.strip_prefix("http://") {
        Some(host) if !host.is_empty() && !host.starts_with('/') => Ok(url),
        _ => Err(format!("{url} is no address such as http://127.0.0.1:11434")),
    }
}

fn address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

impl FromStr for ConfiguredBridge {
    type Err = String;
    /// `KIND=URL`, or `KIND=URL@DEVICE`.
    fn from_str(text: &str) -> Result<Self, String> {
        const RULE: &str =
            "write KIND=URL or KIND=URL@DEVICE, with ollama, comfyui, vllm or llama-swap as the kind";
        let (kind, rest) = text.split_once('=').ok_or(RULE)?;
        let kind: Kind = serde_json::from_value(kind.into()).map_err(|_| RULE)?;
        let (url, device) = match rest.split_once('@') {
            Some((url, device)) => (url, Some(device.to_owned())),
            None => (rest, None),
        };
        Ok(Self { kind, url: checked(url.to_owned())?, name: None, device, size: None })
    }
}

impl ConfiguredBridge {
    pub fn daemon(self) -> Bridge {
        let (kind, name) = match self.kind {
            Kind::Ollama => (BridgeKind::Ollama, "ollama"),
            Kind::ComfyUi => (BridgeKind::ComfyUi, "comfyui"),
            Kind::Vllm => (BridgeKind::Vllm, "vllm"),
            Kind::LlamaSwap => (BridgeKind::LlamaSwap, "llama-swap"),
        };
        let name = self.name.unwrap_or_else(|| name.parse().expect("a short plain name"));
        Bridge { name, kind, url: self.url, device: self.device, size_bytes: self.size.map(Bytes::get) }
    }
}
