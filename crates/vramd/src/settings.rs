//! Settings of the daemon as resolved: flags, then `VRAMD_*`, then `vramd.toml`, then defaults, and where
//! each value came from.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};
use vramd_api::{Bytes, EvictionPolicy, KeepAlive};
#[cfg(unix)]
use vramd_daemon::LoaderCommand;
use vramd_daemon::{Adapters, CudaCards, QuietHours, Thresholds};

use crate::system;
use crate::worker_settings::{ConfiguredBridge, ConfiguredWorker, WorkerPrograms};

/// A setting as documents and `config show` name it.
#[derive(Debug)]
pub struct Setting {
    pub key: &'static str,
    pub flag: &'static str,
    pub variable: &'static str,
    pub default: &'static str,
    pub about: &'static str,
}

macro_rules! settings {
    ($($name:ident = $key:literal, $flag:literal, $variable:literal, $default:literal, $about:literal;)*) => {
        $(const $name: Setting =
            Setting { key: $key, flag: $flag, variable: $variable, default: $default, about: $about };)*
        /// Every setting, in the order of `config show`.
        pub const SETTINGS: &[Setting] = &[$($name,)*];
    };
}

settings! {
    LISTEN = "listen", "--listen", "VRAMD_LISTEN", "127.0.0.1:8726",
        "Where HTTP is served: an address and a port (0 picks one), or `none`.";
    SOCKET = "socket", "--socket", "VRAMD_SOCKET", "/run/vramd/vramd.sock for root, else $XDG_RUNTIME_DIR/vramd/vramd.sock; on Windows `\\\\.\\pipe\\vramd-USER`",
        "The local socket for HTTP and attach (on Windows a named pipe), or `none`.";
    STATE_DIR = "state_dir", "--state-dir", "VRAMD_STATE_DIR", "/var/lib/vramd for root, else $XDG_STATE_HOME/vramd; on Windows %LOCALAPPDATA%\\vramd",
        "The directory of the store.";
    MODEL_ROOTS = "model_roots", "--model-root", "VRAMD_MODEL_ROOT", "none",
        "Directories that models may lie in. The flag may repeat; the variable separates them by `:`, on Windows by `;`.";
    CPU_LIMIT = "cpu_limit", "--cpu-limit", "VRAMD_CPU_LIMIT", "80 % of the machine's memory",
        "The most host memory that the daemon may hold: `24GiB`, or a number of bytes.";
    SIM = "sim", "--sim", "VRAMD_SIM", "none",
        "Simulated devices by their sizes: `24GiB` or `24GiB,8GiB`.";
    CUDA = "cuda", "--cuda", "VRAMD_CUDA", "all",
        "NVIDIA cards to open as devices: `none`, or `all` that CUDA_VISIBLE_DEVICES leaves.";
    VULKAN = "vulkan", "--vulkan", "VRAMD_VULKAN", "none",
        "Vulkan adapters to open as devices: `none`, `hardware`, or `all`, which is software drivers too.";
    D3D12 = "d3d12", "--d3d12", "VRAMD_D3D12", "hardware",
        "On Windows, Direct3D 12 adapters to open as devices: `none`, `hardware`, or `all`, which is software drivers too.";
    READY_FILE = "ready_file", "--ready-file", "VRAMD_READY_FILE", "none",
        "A file to write the address, the socket and the pid to, once the daemon serves.";
    QUIET_HOURS = "quiet_hours", "--quiet-hours", "VRAMD_QUIET_HOURS", "none",
        "When devices are defragmented without being asked, in local time: `02:00-05:00`, `12:00-13:00,22:00-06:00`, or `none`.";
    EVICTION = "eviction", "--eviction", "VRAMD_EVICTION", "LowestCost",
        "By what idle models are chosen that go when room is needed: `LowestCost`, `LeastRecentlyUsed`, `LeastFrequentlyUsed`, `LargestFirst` or `LowestPriority`.";
    MINIMUM_STAY = "minimum_stay", "--minimum-stay", "VRAMD_MINIMUM_STAY", "0s",
        "How long a model that was loaded stays at least before it may go for others: `30s`, `5m`, or `-1` for ever.";
    PAGE_POOL = "page_pool", "--page-pool", "VRAMD_PAGE_POOL", "none",
        "Host memory whose pages are made ahead while it is quiet, so that loads need not wait for theirs: `16GiB`, or `none`. It goes when others need the memory. Linux only.";
    RAM_TIER = "ram_tier", "--ram-tier", "VRAMD_RAM_TIER", "half of the machine's memory",
        "The most host memory for idle models that had to go from a card and come back from there: `24GiB`, or `none`.";
    RAM_RESERVE = "ram_reserve", "--ram-reserve", "VRAMD_RAM_RESERVE", "a tenth of the machine's memory",
        "What is left to other programs: when less is free, models that had to go from a card go from host memory too: `4GiB`, or `none`.";
    PRESSURE_THRESHOLDS = "pressure_thresholds", "--pressure-thresholds", "VRAMD_PRESSURE_THRESHOLDS", "0.70,0.85,0.95",
        "The ratios at which pressure is `Moderate`, `High` and `Critical`, for all devices: from `High` on the daemon frees memory by itself.";
    WORKER_PROGRAMS = "worker_programs", "--worker-program", "VRAMD_WORKER_PROGRAM", "none",
        "Programs that may be run as workers, by name: `NAME=COMMAND`, its words separated by spaces. The flag may repeat; the variable separates them by `;`. In the file a list of words, or a table with `command` and the variables of its `environment` that callers may set.";
    WORKERS = "workers", "--worker", "VRAMD_WORKER", "none",
        "Workers that begin with the daemon: `NAME=PROGRAM`, or `NAME=PROGRAM@DEVICE`. The flag may repeat; the variable separates them by `;`. In the file `[[workers]]` with `name`, `program`, `device`, `memory_limit`, `environment`, `restart` and `heartbeat_seconds`.";
    BRIDGES = "bridges", "--bridge", "VRAMD_BRIDGE", "none",
        "Programs of others that are seen and asked to give way: `KIND=URL`, or `KIND=URL@DEVICE`; the kinds are `ollama`, `comfyui`, `vllm` and `llama-swap`. The flag may repeat; the variable separates them by `;`. In the file `[[bridges]]` with `kind`, `url`, `device`, `name` and `size` (what it takes, where it does not tell: vLLM and llama-swap).";
    LOG = "log", "--log", "VRAMD_LOG", "info",
        "What to log: a level, or a filter such as `info,vramd_daemon=debug`.";
}

/// `none`, or a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Switch<T> {
    Off,
    On(T),
}

impl<T> Switch<T> {
    pub fn on(self) -> Option<T> {
        match self {
            Self::Off => None,
            Self::On(value) => Some(value),
        }
    }

    fn shown(&self, show: impl Fn(&T) -> Value) -> Value {
        match self {
            Self::Off => json!("none"),
            Self::On(value) => show(value),
        }
    }
}

impl FromStr for Switch<SocketAddr> {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self::Off),
            _ => text
                .parse()
                .map(Self::On)
                .map_err(|_| "write an address and a port such as 127.0.0.1:8726, or none"),
        }
    }
}

impl FromStr for Switch<PathBuf> {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" => Err("write a path, or none"),
            "none" => Ok(Self::Off),
            _ => Ok(Self::On(text.into())),
        }
    }
}

impl FromStr for Switch<Bytes> {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self::Off),
            _ => text.parse().map(Self::On).map_err(|_| "write a size such as 24GiB, or none"),
        }
    }
}

impl FromStr for Switch<QuietHours> {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self::Off),
            _ => text.parse().map(Self::On),
        }
    }
}

impl<'de, T> Deserialize<'de> for Switch<T>
where
    Self: FromStr<Err = &'static str>,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A size in a file: a text with a unit, or a number of bytes.
pub fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Bytes>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a size such as \"24GiB\", or a number of bytes")]
    enum Written {
        Bytes(Bytes),
        Text(String),
    }
    match Written::deserialize(deserializer)? {
        Written::Bytes(bytes) => Ok(Some(bytes)),
        Written::Text(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

/// One of a few words in a file.
fn word<'de, D: Deserializer<'de>, T: FromStr<Err = &'static str>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    String::deserialize(deserializer)?.parse().map(Some).map_err(serde::de::Error::custom)
}

/// What one source says; what it leaves out is left to weaker ones.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    pub listen: Option<Switch<SocketAddr>>,
    pub socket: Option<Switch<PathBuf>>,
    pub state_dir: Option<PathBuf>,
    pub model_roots: Option<Vec<PathBuf>>,
    #[serde(default, deserialize_with = "size")]
    pub cpu_limit: Option<Bytes>,
    pub sim: Option<String>,
    #[serde(default, deserialize_with = "word")]
    pub cuda: Option<CudaCards>,
    #[serde(default, deserialize_with = "word")]
    pub vulkan: Option<Adapters>,
    #[serde(default, deserialize_with = "word")]
    pub d3d12: Option<Adapters>,
    pub ready_file: Option<PathBuf>,
    pub quiet_hours: Option<Switch<QuietHours>>,
    pub eviction: Option<EvictionPolicy>,
    pub minimum_stay: Option<KeepAlive>,
    pub page_pool: Option<Switch<Bytes>>,
    pub ram_tier: Option<Switch<Bytes>>,
    pub ram_reserve: Option<Switch<Bytes>>,
    #[serde(default, deserialize_with = "word")]
    pub pressure_thresholds: Option<Thresholds>,
    pub worker_programs: Option<WorkerPrograms>,
    pub workers: Option<Vec<ConfiguredWorker>>,
    pub bridges: Option<Vec<ConfiguredBridge>>,
    pub log: Option<String>,
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Flag(&'static str),
    Variable(&'static str),
    File(PathBuf),
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) => write!(f, "flag {name}"),
            Self::Variable(name) => write!(f, "environment {name}"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sourced<T> {
    pub value: T,
    pub origin: Origin,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub listen: Sourced<Switch<SocketAddr>>,
    pub socket: Sourced<Switch<PathBuf>>,
    pub state_dir: Sourced<PathBuf>,
    pub model_roots: Sourced<Vec<PathBuf>>,
    pub cpu_limit: Sourced<Option<Bytes>>,
    pub sim: Sourced<Option<String>>,
    pub cuda: Sourced<CudaCards>,
    pub vulkan: Sourced<Adapters>,
    pub d3d12: Sourced<Adapters>,
    pub ready_file: Sourced<Option<PathBuf>>,
    pub quiet_hours: Sourced<Switch<QuietHours>>,
    pub eviction: Sourced<EvictionPolicy>,
    pub minimum_stay: Sourced<KeepAlive>,
    pub page_pool: Sourced<Switch<Bytes>>,
    pub ram_tier: Sourced<Option<Switch<Bytes>>>,
    pub ram_reserve: Sourced<Option<Switch<Bytes>>>,
    pub pressure_thresholds: Sourced<Thresholds>,
    pub worker_programs: Sourced<WorkerPrograms>,
    pub workers: Sourced<Vec<ConfiguredWorker>>,
    pub bridges: Sourced<Vec<ConfiguredBridge>>,
    pub log: Sourced<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// The reason has the line, the column and the line itself.
    #[error("{} is not right: {}", path.display(), reason.to_string().trim_end())]
    File { path: PathBuf, reason: Box<toml::de::Error> },
    #[error("{} is not right: {key} has the relative path {}", path.display(), relative.display())]
    Relative { path: PathBuf, key: &'static str, relative: PathBuf },
    #[error("{variable} has the value {text:?}: {reason}")]
    Variable { variable: &'static str, text: String, reason: String },
    #[error("neither HOME nor {0} is set, so there is no default for {1}")]
    NoHome(&'static str, &'static str),
}

impl SettingsError {
    pub fn hint(&self) -> String {
        match self {
            Self::Read { .. } => "--config and VRAMD_CONFIG name a file that must be there".to_owned(),
            Self::File { .. } | Self::Variable { .. } => {
                "`vramd serve --help` says what each setting takes".to_owned()
            }
            Self::Relative { .. } => "write paths in a file from the root: /…".to_owned(),
            Self::NoHome(_, flag) => format!("give {flag}"),
        }
    }
}

/// The part of the environment that matters, as a value: tests bring their own.
pub type Environment = BTreeMap<String, OsString>;

pub fn environment() -> Environment {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value))).collect()
}

/// Resolves every setting. `config` replaces the search for files.
pub fn resolve(
    flags: Layer,
    config: Option<&Path>,
    environment: &Environment,
) -> Result<Settings, SettingsError> {
    let mut layers = vec![(Source::Flags, flags), (Source::Environment, from_environment(environment)?)];
    for (path, must_exist) in files(config, environment) {
        if let Some(layer) = from_file(&path, must_exist)? {
            layers.push((Source::File(path), layer));
        }
    }
    let pick = Layers(layers);
    let address = vramd_api::DEFAULT_ADDRESS.parse().expect("the default is an address");
    let socket = vramd_attach::default_socket();
    Ok(Settings {
        listen: pick.value(&LISTEN, |layer| layer.listen.clone()).or_default(Switch::On(address)),
        socket: pick.value(&SOCKET, |layer| layer.socket.clone()).or_default(Switch::On(socket)),
        state_dir: match pick.value(&STATE_DIR, |layer| layer.state_dir.clone()) {
            Found(Some(found)) => found,
            Found(None) => Sourced {
                value: system::state_dir(environment)
                    .ok_or(SettingsError::NoHome(system::HOME, STATE_DIR.flag))?,
                origin: Origin::Default,
            },
        },
        model_roots: pick.value(&MODEL_ROOTS, |layer| layer.model_roots.clone()).or_default(Vec::new()),
        cpu_limit: pick.value(&CPU_LIMIT, |layer| layer.cpu_limit.map(Some)).or_default(None),
        sim: pick.value(&SIM, |layer| layer.sim.clone().map(Some)).or_default(None),
        cuda: pick.value(&CUDA, |layer| layer.cuda).or_default(CudaCards::All),
        vulkan: pick.value(&VULKAN, |layer| layer.vulkan).or_default(Adapters::None),
        d3d12: pick.value(&D3D12, |layer| layer.d3d12).or_default(Adapters::Hardware),
        ready_file: pick.value(&READY_FILE, |layer| layer.ready_file.clone().map(Some)).or_default(None),
        eviction: pick.value(&EVICTION, |layer| layer.eviction).or_default(EvictionPolicy::default()),
        minimum_stay: pick.value(&MINIMUM_STAY, |layer| layer.minimum_stay).or_default(KeepAlive::Seconds(0)),
        page_pool: pick.value(&PAGE_POOL, |layer| layer.page_pool.clone()).or_default(Switch::Off),
        ram_tier: pick.value(&RAM_TIER, |layer| layer.ram_tier.clone().map(Some)).or_default(None),
        ram_reserve: pick.value(&RAM_RESERVE, |layer| layer.ram_reserve.clone().map(Some)).or_default(None),
        quiet_hours: pick.value(&QUIET_HOURS, |layer| layer.quiet_hours.clone()).or_default(Switch::Off),
        pressure_thresholds: pick
            .value(&PRESSURE_THRESHOLDS, |layer| layer.pressure_thresholds)
            .or_default(Thresholds::default()),
        worker_programs: pick
            .value(&WORKER_PROGRAMS, |layer| layer.worker_programs.clone())
            .or_default(WorkerPrograms::default()),
        workers: pick.value(&WORKERS, |layer| layer.workers.clone()).or_default(Vec::new()),
        bridges: pick.value(&BRIDGES, |layer| layer.bridges.clone()).or_default(Vec::new()),
        log: pick.value(&LOG, |layer| layer.log.clone()).or_default(LOG.default.to_owned()),
    })
}

enum Source {
    Flags,
    Environment,
    File(PathBuf),
}

/// The strongest first.
struct Layers(Vec<(Source, Layer)>);

impl Layers {
    fn value<T>(&self, setting: &Setting, get: impl Fn(&Layer) -> Option<T>) -> Found<T> {
        Found(self.0.iter().find_map(|(source, layer)| {
            let origin = match source {
                Source::Flags => Origin::Flag(setting.flag),
                Source::Environment => Origin::Variable(setting.variable),
                Source::File(path) => Origin::File(path.clone()),
            };
            get(layer).map(|value| Sourced { value, origin })
        }))
    }
}

/// What the layers say, if any does.
struct Found<T>(Option<Sourced<T>>);

impl<T> Found<T> {
    fn or_default(self, value: T) -> Sourced<T> {
        self.0.unwrap_or(Sourced { value, origin: Origin::Default })
    }
}

/// The files to read, the strongest first, and whether each must exist.
fn files(config: Option<&Path>, environment: &Environment) -> Vec<(PathBuf, bool)> {
    let named = config.map(Path::to_owned).or_else(|| set(environment, "VRAMD_CONFIG").map(PathBuf::from));
    if let Some(path) = named {
        return vec![(path, true)];
    }
    system::config_files(environment).into_iter().map(|path| (path, false)).collect()
}

fn from_file(path: &Path, must_exist: bool) -> Result<Option<Layer>, SettingsError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => return Ok(None),
        Err(source) => return Err(SettingsError::Read { path: path.to_owned(), source }),
    };
    let layer: Layer = toml::from_str(&text)
        .map_err(|reason| SettingsError::File { path: path.to_owned(), reason: Box::new(reason) })?;
    let socket = layer.socket.clone().and_then(Switch::on);
    let named = [
        (SOCKET.key, socket.as_ref()),
        (STATE_DIR.key, layer.state_dir.as_ref()),
        (READY_FILE.key, layer.ready_file.as_ref()),
    ];
    let roots = layer.model_roots.iter().flatten().map(|root| (MODEL_ROOTS.key, Some(root)));
    for (key, value) in named.into_iter().chain(roots) {
        if let Some(relative) = value.filter(|value| value.is_relative()) {
            let (path, relative) = (path.to_owned(), relative.clone());
            return Err(SettingsError::Relative { path, key, relative });
        }
    }
    Ok(Some(layer))
}

fn from_environment(environment: &Environment) -> Result<Layer, SettingsError> {
    fn parse<T: FromStr>(environment: &Environment, setting: &Setting) -> Result<Option<T>, SettingsError>
    where
        T::Err: fmt::Display,
    {
        let Some(value) = set(environment, setting.variable) else { return Ok(None) };
        let text = value.to_string_lossy();
        text.parse().map(Some).map_err(|reason: T::Err| SettingsError::Variable {
            variable: setting.variable,
            text: text.clone().into_owned(),
            reason: reason.to_string(),
        })
    }
    fn list<T: FromStr>(environment: &Environment, setting: &Setting) -> Result<Option<Vec<T>>, SettingsError>
    where
        T::Err: fmt::Display,
    {
        let Some(value) = set(environment, setting.variable) else { return Ok(None) };
        let text = value.to_string_lossy();
        let parts = text.split(';').map(str::trim).filter(|part| !part.is_empty());
        let parsed: Result<Vec<T>, T::Err> = parts.map(str::parse).collect();
        parsed.map(Some).map_err(|reason| SettingsError::Variable {
            variable: setting.variable,
            text: text.clone().into_owned(),
            reason: reason.to_string(),
        })
    }
    let path = |setting: &Setting| set(environment, setting.variable).map(PathBuf::from);
    Ok(Layer {
        listen: parse(environment, &LISTEN)?,
        socket: parse(environment, &SOCKET)?,
        state_dir: path(&STATE_DIR),
        model_roots: set(environment, MODEL_ROOTS.variable)
            .map(|roots| std::env::split_paths(roots).filter(|root| !root.as_os_str().is_empty()).collect()),
        cpu_limit: parse(environment, &CPU_LIMIT)?,
        sim: parse(environment, &SIM)?,
        cuda: parse(environment, &CUDA)?,
        vulkan: parse(environment, &VULKAN)?,
        d3d12: parse(environment, &D3D12)?,
        ready_file: path(&READY_FILE),
        quiet_hours: parse(environment, &QUIET_HOURS)?,
        eviction: parse(environment, &EVICTION)?,
        minimum_stay: parse(environment, &MINIMUM_STAY)?,
        page_pool: parse(environment, &PAGE_POOL)?,
        ram_tier: parse(environment, &RAM_TIER)?,
        ram_reserve: parse(environment, &RAM_RESERVE)?,
        pressure_thresholds: parse(environment, &PRESSURE_THRESHOLDS)?,
        worker_programs: list(environment, &WORKER_PROGRAMS)?.map(|list| list.into_iter().collect()),
        workers: list(environment, &WORKERS)?,
        bridges: list(environment, &BRIDGES)?,
        log: parse(environment, &LOG)?,
    })
}

/// A variable that is set to nothing counts as not set.
pub fn set<'a>(environment: &'a Environment, name: &str) -> Option<&'a OsString> {
    environment.get(name).filter(|value| !value.is_empty())
}

impl Settings {
    /// Key, value and origin of each setting, in the order of [`SETTINGS`].
    pub fn rows(&self) -> [(&'static str, Value, &Origin); 21] {
        let path = |path: &PathBuf| json!(path.display().to_string());
        let roots: Vec<_> = self.model_roots.value.iter().map(path).collect();
        let shown =
            |size: Option<&Switch<Bytes>>| json!(size.map(|size| size.shown(|bytes| json!(bytes.get()))));
        [
            (LISTEN.key, self.listen.value.shown(|address| json!(address.to_string())), &self.listen.origin),
            (SOCKET.key, self.socket.value.shown(path), &self.socket.origin),
            (STATE_DIR.key, path(&self.state_dir.value), &self.state_dir.origin),
            (MODEL_ROOTS.key, roots.into(), &self.model_roots.origin),
            (CPU_LIMIT.key, json!(self.cpu_limit.value.map(Bytes::get)), &self.cpu_limit.origin),
            (SIM.key, json!(self.sim.value), &self.sim.origin),
            (CUDA.key, json!(self.cuda.value.to_string()), &self.cuda.origin),
            (VULKAN.key, json!(self.vulkan.value.to_string()), &self.vulkan.origin),
            (D3D12.key, json!(self.d3d12.value.to_string()), &self.d3d12.origin),
            (READY_FILE.key, json!(self.ready_file.value.as_ref().map(path)), &self.ready_file.origin),
            (
                QUIET_HOURS.key,
                self.quiet_hours.value.shown(|hours| json!(hours.to_string())),
                &self.quiet_hours.origin,
            ),
            (EVICTION.key, json!(self.eviction.value), &self.eviction.origin),
            (MINIMUM_STAY.key, json!(self.minimum_stay.value), &self.minimum_stay.origin),
            (PAGE_POOL.key, self.page_pool.value.shown(|bytes| json!(bytes.get())), &self.page_pool.origin),
            (RAM_TIER.key, shown(self.ram_tier.value.as_ref()), &self.ram_tier.origin),
            (RAM_RESERVE.key, shown(self.ram_reserve.value.as_ref()), &self.ram_reserve.origin),
            (
                PRESSURE_THRESHOLDS.key,
                json!(self.pressure_thresholds.value.to_string()),
                &self.pressure_thresholds.origin,
            ),
            (WORKER_PROGRAMS.key, json!(self.worker_programs.value), &self.worker_programs.origin),
            (WORKERS.key, json!(self.workers.value), &self.workers.origin),
            (BRIDGES.key, json!(self.bridges.value), &self.bridges.origin),
            (LOG.key, json!(self.log.value), &self.log.origin),
        ]
    }

    /// What the daemon needs to know. Paths are made absolute, from the working directory.
    pub fn daemon(self) -> io::Result<vramd_daemon::Config> {
        let absolute = |path: Option<PathBuf>| path.map(std::path::absolute).transpose();
        Ok(vramd_daemon::Config {
            listen: self.listen.value.on(),
            socket: absolute(self.socket.value.on())?,
            state_dir: std::path::absolute(self.state_dir.value)?,
            model_roots: self.model_roots.value.iter().map(std::path::absolute).collect::<io::Result<_>>()?,
            cpu_limit_bytes: self.cpu_limit.value.map(Bytes::get),
            sim: self.sim.value,
            cuda: self.cuda.value,
            vulkan: self.vulkan.value,
            d3d12: self.d3d12.value,
            // Whatever becomes of the file meanwhile: the same program.
            #[cfg(unix)]
            loader: LoaderCommand { program: "/proc/self/exe".into(), arguments: vec!["loader".into()] },
            quiet_hours: self.quiet_hours.value.on(),
            eviction: self.eviction.value,
            minimum_stay: self.minimum_stay.value,
            page_pool_bytes: self.page_pool.value.on().map_or(0, Bytes::get),
            ram_tier_bytes: self.ram_tier.value.map(|it| it.on().map_or(0, Bytes::get)),
            ram_reserve_bytes: self.ram_reserve.value.map(|it| it.on().map_or(0, Bytes::get)),
            pressure_thresholds: self.pressure_thresholds.value,
            worker_programs: self.worker_programs.value.daemon(),
            workers: self.workers.value.into_iter().map(ConfiguredWorker::daemon).collect(),
            bridges: self.bridges.value.into_iter().map(ConfiguredBridge::daemon).collect(),
            ready_file: absolute(self.ready_file.value)?,
        })
    }
}
