//! The daemon of vramd, as a library: [`serve`] runs it until it is told to stop.
//!
//! Owns the driver (all state), REST and events, the attach socket, the reading of model files and the journal. It
//! leaves decisions to `vramd-core` and memory to `vramd-device`. It holds no unsafe code and no global state.

mod attach;
mod bridges;
mod clock;
mod devices;
mod driver;
mod event_log;
mod http;
mod loader;
mod mover;
mod platform;
mod requests;
mod server;
mod source;
mod stalls;
mod store;
mod usage;
mod workers;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::TryLockError;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_util::sync::CancellationToken;
use vramd_api::{
    ApiError, ComponentName, DeviceId, ErrorCode, EvictionPolicy, KeepAlive, ModelName, ReadyFile,
    StartWorker,
};

pub use bridges::{Bridge, BridgeKind};
pub use clock::LocalTime;
pub use devices::{Adapters, CudaCards, Devices, cuda_cards, d3d12_adapters, directml, vulkan_adapters};
use driver::{Driver, Event, Home, Launch, Load, OnShortage, Rules, Schedule, Tiers};
pub use http::openapi_json;
use platform::LocalListener;
use server::{RemoveOnDrop, Server};
use source::Roots;
use store::{Store, StoreError};
pub use vramd_core::pressure::Thresholds;
pub use vramd_core::quiet_hours::QuietHours;
#[cfg(unix)]
pub use vramd_device::cuda::{LoaderCommand, serve as serve_loader};
pub use workers::{Program, Programs, link as worker_link};

/// How long the driver may take to end what runs when the daemon stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// What usually follows is prefetched so long after what it follows.
const PREFETCH_PAUSE: Duration = Duration::from_secs(1);

/// Settings, resolved.
#[derive(Debug, Clone)]
pub struct Config {
    /// None: no TCP.
    pub listen: Option<SocketAddr>,
    /// None: no Unix socket, and nothing can be attached.
    pub socket: Option<PathBuf>,
    pub state_dir: PathBuf,
    pub model_roots: Vec<PathBuf>,
    /// The most that the daemon may hold in RAM; default 80 % of it.
    pub cpu_limit_bytes: Option<u64>,
    /// Simulated devices: `24GiB,8GiB`.
    pub sim: Option<String>,
    /// Cards to open for CUDA.
    pub cuda: CudaCards,
    /// Vulkan adapters to open.
    pub vulkan: Adapters,
    /// Direct3D 12 adapters to open, on Windows.
    pub d3d12: Adapters,
    /// How to start the process that uses CUDA.
    #[cfg(unix)]
    pub loader: LoaderCommand,
    /// When devices are defragmented without being asked.
    pub quiet_hours: Option<QuietHours>,
    /// By what models are chosen that go when room is needed.
    pub eviction: EvictionPolicy,
    /// How long what was loaded stays at least before it may go for others.
    pub minimum_stay: KeepAlive,
    /// Host memory whose pages are made ahead.
    pub page_pool_bytes: u64,
    /// The most that models take in RAM that had to go from a card; unset: half of it.
    pub ram_tier_bytes: Option<u64>,
    /// What of RAM is left to other programs before such models go from there too; unset: a tenth of it.
    pub ram_reserve_bytes: Option<u64>,
    /// The ratios at which levels of pressure begin.
    pub pressure_thresholds: Thresholds,
    /// The programs that may be run as workers.
    pub worker_programs: Programs,
    /// The workers that begin with the daemon.
    pub workers: Vec<StartWorker>,
    /// Programs of others that are asked to give way.
    pub bridges: Vec<Bridge>,
    /// Written once the daemon serves.
    pub ready_file: Option<PathBuf>,
}

/// Why the daemon could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{0} is not a loopback address")]
    NotLoopback(SocketAddr),
    #[error("neither a TCP address nor a Unix socket is configured")]
    NoListener,
    #[error("the daemon cannot listen on {what}")]
    Listen { what: String, source: io::Error },
    #[error("the state directory {path} cannot be used", path = .path.display())]
    StateDir { path: PathBuf, source: io::Error },
    #[error("another daemon uses the state directory {path}", path = .path.display())]
    InUse { path: PathBuf },
    #[error("the model root {path} cannot be opened", path = .path.display())]
    ModelRoot { path: PathBuf, source: io::Error },
    #[error("{0}")]
    Devices(String),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the worker {name} of the configuration cannot be started")]
    Worker { name: String, source: Box<ApiError> },
    #[error("the ready file {path} cannot be written", path = .path.display())]
    ReadyFile { path: PathBuf, source: io::Error },
    #[error("no threads could be started")]
    Threads(#[source] io::Error),
    #[error("the driver ended: a bug in vramd")]
    Driver,
}

impl StartError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::NotLoopback(_) => {
                "vramd has no TLS and no tokens yet; listen on 127.0.0.1 or [::1] and forward the port over SSH"
            }
            Self::NoListener => "set --listen or --socket",
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                "is vramd running already? `vramd status` asks it; choose another with --listen or --socket"
            }
            Self::Listen { .. } => "choose another with --listen or --socket",
            Self::StateDir { .. } => "choose a directory that can be written to with --state-dir",
            Self::InUse { .. } => "stop that daemon, or choose another directory with --state-dir",
            Self::ModelRoot { .. } => "make the directory, or leave out its --model-root",
            Self::Worker { source, .. } => {
                return source
                    .hint
                    .clone()
                    .or_else(|| Some("mend `workers` in vramd.toml, or --worker".to_owned()));
            }
            Self::Threads(_) => "raise the limit on threads (ulimit -u)",
            Self::Devices(_) => "`vramd doctor` says what works on this machine",
            Self::Store(StoreError::TooNew { .. }) => "run the newer vramd, or choose another --state-dir",
            Self::Store(_) => {
                "free space on the disk, or move the damaged file away to begin with an empty journal"
            }
            Self::ReadyFile { .. } => "choose another path with --ready-file",
            Self::Driver => "start it again: it recovers from its journal; please report this with the log",
        };
        Some(hint.to_owned())
    }
}

/// Opens the configured devices and serves until `shutdown` completes; returns after a clean stop.
pub async fn serve(
    config: Config,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), StartError> {
    let devices = Devices::open(&config).map_err(StartError::Devices)?;
    serve_on(config, devices, LocalTime::system(), shutdown).await
}

/// Serves on devices that the caller opened, by a clock of the caller's.
pub async fn serve_on(
    config: Config,
    devices: Devices,
    local: LocalTime,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), StartError> {
    if let Some(address) = config.listen.filter(|address| !address.ip().is_loopback()) {
        return Err(StartError::NotLoopback(address));
    }
    if config.listen.is_none() && config.socket.is_none() {
        return Err(StartError::NoListener);
    }
    let _lock = lock(&config.state_dir)?;
    let (store, stored) = Store::open(&config.state_dir, None)?;
    let roots =
        Roots::open(&config.model_roots).map_err(|(path, source)| StartError::ModelRoot { path, source })?;
    let roots = Arc::new(roots);
    let tcp = match config.listen {
        Some(address) => Some(
            TcpListener::bind(address)
                .await
                .map_err(|source| StartError::Listen { what: address.to_string(), source })?,
        ),
        None => None,
    };
    let address = tcp.as_ref().and_then(|listener| listener.local_addr().ok());
    let listener = match &config.socket {
        Some(path) => Some(
            LocalListener::bind(path)
                .map_err(|source| StartError::Listen { what: path.display().to_string(), source })?,
        ),
        None => None,
    };
    // A pipe goes with its last handle.
    let _socket = config.socket.clone().filter(|_| cfg!(unix)).map(RemoveOnDrop);

    let known: Vec<ModelName> = stored.models.iter().map(|model| model.name.clone()).collect();
    let residents = stored.residents.clone();
    let run = uuid::Uuid::now_v7().simple().to_string();
    let schedule = Schedule::new(config.quiet_hours, local);
    let ram = devices.iter().find(|device| device.facts().memory_type == vramd_api::MemoryType::Ram);
    let ram_bytes = ram.map_or(0, |ram| ram.facts().total_bytes);
    let tiers = Tiers {
        ram_bytes: config.ram_tier_bytes.unwrap_or(ram_bytes / 2),
        reserve_bytes: config.ram_reserve_bytes.unwrap_or(ram_bytes / 10),
    };
    let minimum_stay = match config.minimum_stay {
        KeepAlive::Seconds(seconds) => seconds,
        KeepAlive::Forever => u64::MAX,
    };
    let socket = config.socket.as_ref().map(|path| path.display().to_string());
    let server = address.map(|address| format!("http://{address}"));
    let local = socket.as_ref().map(|path| format!("{}:{path}", if cfg!(windows) { "pipe" } else { "unix" }));
    let place = config.state_dir.canonicalize().unwrap_or_else(|_| config.state_dir.clone());
    let mark = blake3::hash(place.as_os_str().as_encoded_bytes()).to_hex()[..16].to_owned();
    let home = Home { server: server.or(local), socket, mark };
    let launches = config
        .workers
        .iter()
        .map(|worker| {
            let name = worker.name.as_ref().unwrap_or(&worker.program).to_string();
            requests::start_worker(worker.clone(), &config.worker_programs, &devices)
                .map_err(|source| StartError::Worker { name, source: Box::new(source) })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut names = BTreeSet::new();
    if let Some(twice) = launches.iter().filter_map(|one| one.name.as_ref()).find(|name| !names.insert(*name))
    {
        let error = ApiError::new(ErrorCode::Conflict, "the configuration has two workers of that name");
        let source = Box::new(error.hint("give each a name of its own"));
        return Err(StartError::Worker { name: twice.to_string(), source });
    }
    let thresholds = config.pressure_thresholds;
    let bridges = config
        .bridges
        .iter()
        .map(|bridge| {
            // Such programs use cards, where there are any.
            let card =
                devices.iter().find(|device| device.facts().memory_type == vramd_api::MemoryType::Vram);
            let card = card.map_or("cpu:0", |card| card.facts().device.as_str());
            let device = bridge.device.as_deref().unwrap_or(card);
            let source =
                |source| StartError::Worker { name: bridge.name.to_string(), source: Box::new(source) };
            Ok((bridge.clone(), devices.id(device).map_err(source)?))
        })
        .collect::<Result<Vec<_>, StartError>>()?;
    let rules = Rules { schedule, eviction: config.eviction, minimum_stay, tiers, home, thresholds };
    let (unasked, to_load) = tokio::sync::mpsc::unbounded_channel();
    let (driver, mut task) =
        Driver::start(devices, store, stored, run, rules, unasked).map_err(StartError::Threads)?;
    let stopping = CancellationToken::new();
    // Before anybody else could take their names.
    if let Err(error) = start_workers(&driver, launches).await {
        driver.stop().await;
        let _ = tokio::time::timeout(STOP_TIMEOUT, task).await;
        return Err(error);
    }
    stalls::watch(driver.clone(), stopping.clone());
    let usage = usage::UsageHistory::default();
    let sampler = tokio::spawn(usage::sample(driver.clone(), usage.clone()));
    let port = address.map(|address| address.port());
    let programs = Arc::new(config.worker_programs);
    let app = http::App::new(driver.clone(), roots.clone(), programs, usage, port);
    let server = tokio::spawn(
        Server::new(http::Service::new(app), driver.clone(), stopping.clone()).run(tcp, listener),
    );
    for (bridge, device) in bridges {
        tokio::spawn(bridges::keep(bridge, device, driver.clone(), stopping.clone()));
    }
    let restore = tokio::spawn(restore(driver.clone(), roots.clone(), known, residents));
    let prefetcher = tokio::spawn(load_unasked(driver.clone(), roots, to_load));

    let ready = ReadyFile {
        address: address.map(|address| address.to_string()),
        socket: config.socket.clone(),
        pid: std::process::id(),
        version: vramd_api::VERSION.to_owned(),
    };
    let outcome = tokio::select! {
        () = shutdown => Ok(()),
        Err(error) = announce(&driver, config.ready_file.as_deref(), ready) => Err(error),
        _ = &mut task => Err(StartError::Driver),
    };
    tracing::info!("vramd stops");
    restore.abort();
    prefetcher.abort();
    sampler.abort();
    // First the driver, so that whoever follows the events hears of it and what waits is answered.
    driver.stop().await;
    stopping.cancel();
    let _ = server.await;
    drop(driver);
    if outcome.is_ok() && tokio::time::timeout(STOP_TIMEOUT, task).await.is_err() {
        tracing::warn!("the driver did not end in time; what it did is recovered at the next start");
    }
    outcome
}

async fn start_workers(driver: &Driver, launches: Vec<Launch>) -> Result<(), StartError> {
    for launch in launches {
        let name = launch.name.as_ref().unwrap_or(&launch.program).to_string();
        let started = driver.ask(|reply| Event::StartWorker(Box::new(launch), reply)).await;
        started.map_err(|source| StartError::Worker { name, source: Box::new(source) })?;
    }
    Ok(())
}

/// Says that the daemon serves, once it does, and goes on saying so until it is dropped. Returns only an error.
async fn announce(driver: &Driver, path: Option<&Path>, ready: ReadyFile) -> Result<(), StartError> {
    let mut snapshots = driver.snapshots();
    if snapshots.wait_for(|snapshot| snapshot.ready()).await.is_ok() {
        let _file = write_ready_file(path, &ready)?;
        tracing::info!(address = ready.address, socket = ?ready.socket, "vramd serves");
        std::future::pending::<()>().await;
    }
    std::future::pending().await
}

/// Begins the loads that nobody asked for: what usually follows, and what comes back once there is room.
async fn load_unasked(driver: Driver, roots: Arc<Roots>, mut loads: UnboundedReceiver<Load>) {
    while let Some(load) = loads.recv().await {
        if load.cache_for.is_some() {
            // What it follows has the disk first.
            tokio::time::sleep(PREFETCH_PAUSE).await;
        }
        if let Err(error) = loader::begin(&driver, &roots, &load).await {
            tracing::debug!(model = %load.model, %error, "a load that nobody asked for does not begin");
        }
    }
}

/// The components that were resident, by model and device.
type Residents = BTreeMap<(ModelName, DeviceId), Vec<ComponentName>>;

/// Looks at the files of the models that were known before, and loads again what was resident.
async fn restore(driver: Driver, roots: Arc<Roots>, known: Vec<ModelName>, residents: Residents) {
    for ((model, device), components) in residents {
        let shortage = OnShortage { evict: false, spill: false, wait_seconds: None };
        let (device, components) = (Some(device), Some(components));
        let load = Load {
            model,
            device,
            components,
            keep_alive: None,
            shortage,
            split: false,
            checksum: false,
            unasked: false,
            cache_for: None,
        };
        if let Err(error) = loader::begin(&driver, &roots, &load).await {
            tracing::warn!(model = %load.model, %error, "a model that was resident cannot be loaded again");
        }
    }
    for name in known {
        let snapshot = driver.snapshot();
        let Some(model) = snapshot.models.get(&name) else { continue };
        let unread = model.components.iter().filter(|(_, component)| component.plan.is_err());
        let sources: Vec<(ComponentName, String)> =
            unread.map(|(name, component)| (name.clone(), component.path.clone())).collect();
        let roots = roots.clone();
        let read = move || {
            let mut plans = BTreeMap::new();
            for (name, path) in sources {
                let source = BTreeMap::from([(name.clone(), path)]);
                let plan = roots.prepare(&source).map_err(Box::new).map(|mut read| read.remove(&name));
                if let Some(plan) = plan.transpose() {
                    plans.insert(name, plan.map(|prepared| prepared.plan));
                }
            }
            plans
        };
        let Ok(plans) = tokio::task::spawn_blocking(read).await else { return };
        driver.tell(Event::Inspected(name, plans)).await;
    }
}

/// Holds the state directory for this process, and makes it if it is not there.
fn lock(directory: &Path) -> Result<std::fs::File, StartError> {
    let fault = |source| StartError::StateDir { path: directory.to_owned(), source };
    platform::make_private_directory(directory).map_err(fault)?;
    let file = std::fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(directory.join("vramd.lock"))
        .map_err(fault)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StartError::InUse { path: directory.to_owned() }),
        Err(TryLockError::Error(error)) => Err(fault(error)),
    }
}

/// Writes the ready file whole or not at all; it is removed when the answer is dropped.
fn write_ready_file(path: Option<&Path>, ready: &ReadyFile) -> Result<Option<RemoveOnDrop>, StartError> {
    let Some(path) = path else { return Ok(None) };
    let fault = |source| StartError::ReadyFile { path: path.to_owned(), source };
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let text = serde_json::to_string(ready).expect("paths of the command line print");
    std::fs::write(&beside, text + "\n").map_err(fault)?;
    std::fs::rename(&beside, path).map_err(fault)?;
    Ok(Some(RemoveOnDrop(path.to_owned())))
}
