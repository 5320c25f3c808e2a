//! Commands and their arguments as typed. How single values are written is in [`values`]; what settings mean together with files and
//! the environment is for [`crate::settings`].
#![expect(clippy::doc_markdown, reason = "these texts are shown on a terminal as they stand")]

mod values;
mod workers;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ColorChoice, Parser, Subcommand, ValueEnum};
use vramd_api::{
    AllocationId, AllocationType, Bytes, ClearTarget, ComponentName, EvictionPolicy, KeepAlive, MemoryType,
    ModelName, OnShortage, OperationId, OperationState, OwnerName, PlanItem, Priority,
};
use vramd_core::ledger::BLOCK_QUANTUM;
use vramd_core::replay::Format;
use vramd_daemon::{Adapters, CudaCards, QuietHours, Thresholds};

use values::{
    ALLOCATION_TYPES, CLEAR_TARGETS, MEMORY_TYPES, ON_SHORTAGE, OPERATION_STATES, PRIORITIES, TRACE_FORMATS,
    parse_alignment, parse_bytes, parse_component, parse_limit, parse_movable, parse_plan_item, parse_shape,
    parse_share, parse_target, words,
};
pub use values::{EVICTION_POLICIES, Limit, Movable, Shape, Share, Target};
pub use workers::{OptimizeArguments, StartArguments, WorkersCommand};

use crate::settings::{Layer, Switch};
use crate::worker_settings::{ConfiguredBridge, ConfiguredWorker, NamedProgram};

/// The memory daemon for AI inference machines.
#[derive(Debug, Parser)]
#[command(name = "vramd", version, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 done, 1 refused by the daemon, 2 wrong use or a fault.")]
pub struct Arguments {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct Global {
    /// The daemon to talk to: http://HOST:PORT or unix:PATH (on Windows pipe:NAME)
    #[arg(long, global = true, value_name = "URL", env = "VRAMD_SERVER", hide_env_values = true)]
    #[arg(default_value = "http://127.0.0.1:8726", help_heading = "Global options")]
    pub server: String,
    /// Print the answer as JSON
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// When to use colors; NO_COLOR turns them off too
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto", help_heading = "Global options")]
    pub color: ColorChoice,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon
    Serve(ServeArguments),
    #[command(flatten)]
    Ask(Question),
    /// Check what works on this machine, and say why not; exits 1 on a warning and 2 on a fault
    Doctor(ServeArguments),
    /// Show the settings that `vramd serve` would start with here, and where each comes from
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Run a trace of allocations through a pool, with no daemon and no device
    Replay(ReplayArguments),
    /// Serve a trace of requests on a machine that need not be there: what each policy loads and waits for
    Simulate(SimulateArguments),
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
    /// Print a reference page of the documentation
    #[command(hide = true)]
    Generate { page: Page },
    /// Use CUDA for a daemon, which starts this with a socket as its standard input
    #[command(hide = true)]
    #[cfg(unix)]
    Loader { library: PathBuf, card: String },
}

/// The commands that ask a daemon.
#[derive(Debug, Subcommand)]
pub enum Question {
    /// Show how much memory is used, free and held by whom
    Status {
        /// One device, in detail: its id or uuid
        device: Option<String>,
    },
    /// Show how much was used over time, and for whom
    Usage {
        /// Only this device: its id or uuid
        device: Option<String>,
        /// How far back, such as 90s or 15m; an hour at most [default: 1h]
        #[arg(long, value_name = "TIME")]
        window: Option<String>,
        /// The length of one step [default: a sixtieth of the window]
        #[arg(long, value_name = "TIME")]
        step: Option<String>,
    },
    /// List the devices and what they can do
    Devices,
    /// Allocate memory; prints the id of the allocation
    Alloc(AllocArguments),
    /// Release allocations
    Free {
        /// As `vramd allocations` shows them
        #[arg(required = true, value_name = "ID")]
        ids: Vec<AllocationId>,
        /// Of one reservation: the most that was in use, to be learned
        #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
        peak: Option<u64>,
    },
    /// Reserve room for what a run takes beside the weights; prints the id of the reservation
    Reserve(ReserveArguments),
    /// Show what runs of models were measured to take beside the weights
    Footprints {
        /// Only those of this model
        model: Option<ModelName>,
        /// Forget them: the next run says again how much to reserve
        #[arg(long, requires = "model")]
        forget: bool,
    },
    /// Renew the lease of an allocation
    Renew {
        /// The allocation, as `vramd allocations` shows it
        #[arg(value_name = "ID")]
        id: AllocationId,
        /// The new time to live, from now [default: the length that the lease had]
        #[arg(long, value_name = "SECONDS")]
        lease_seconds: Option<u64>,
        /// Of a reservation: what is in use now
        #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
        used: Option<u64>,
    },
    /// List the live allocations
    Allocations(AllocationsArguments),
    /// List the registered models, or change the list
    Models {
        /// All models on this device, the daemon's and the workers': its id or uuid
        #[arg(long, value_name = "DEVICE")]
        device: Option<String>,
        #[command(subcommand)]
        command: Option<ModelsCommand>,
    },
    /// Load a model into memory; Ctrl-C cancels
    Load(LoadArguments),
    /// Bring a model to host memory before it is used on a card; Ctrl-C cancels
    Prefetch {
        model: ModelName,
        /// Where it will be used: a device's id or uuid [default: the first card that could hold it]
        #[arg(long, value_name = "DEVICE")]
        device: Option<String>,
    },
    /// Take a model out of memory
    Unload {
        model: ModelName,
        /// Only from this device: its id or uuid [default: all]
        #[arg(long, value_name = "DEVICE")]
        device: Option<String>,
    },
    /// Show what loads would come to: where models would go, what would go for them, how long it would take
    Plan {
        /// Their names, with +SHAPE or +SIZE for a run beside the weights (1x1024x1024, 2GiB); tried in this order, each beside those before
        #[arg(required = true, value_name = "MODEL[@DEVICE][+RUN]", value_parser = parse_plan_item)]
        models: Vec<PlanItem>,
        /// Where those go that name no device: its id or uuid [default: as for a load]
        #[arg(long, value_name = "DEVICE")]
        device: Option<String>,
    },
    /// Keep a model resident until it is unpinned
    Pin {
        /// Its name
        model: ModelName,
    },
    /// Let a model expire again when it is idle
    Unpin {
        /// Its name
        model: ModelName,
    },
    /// Count a model as used now
    Touch {
        model: ModelName,
        /// The new time that it stays when idle: 90s, 5m, 1h30m, 0, or -1 for ever
        #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
        keep_alive: Option<KeepAlive>,
    },
    /// Attach a resident model and print its tensor table
    Attach(AttachArguments),
    /// Show who holds what
    Ps {
        /// Only on this device: its id or uuid
        #[arg(long, value_name = "DEVICE")]
        device: Option<String>,
    },
    /// Show how tight memory is, and what would help
    Pressure {
        /// Only this device, in detail: its id or uuid
        device: Option<String>,
    },
    /// Have idle models go from a device, the daemon's and the workers', what costs least first
    Optimize(OptimizeArguments),
    /// List the workers, or start, ask and end them
    Workers {
        #[command(subcommand)]
        command: Option<WorkersCommand>,
    },
    /// List operations, or show one
    Operations {
        /// Only this one, with its error
        #[arg(value_name = "ID")]
        id: Option<OperationId>,
        /// Only those in this state
        #[arg(long, conflicts_with = "id", ignore_case = true, value_parser = words(OPERATION_STATES))]
        state: Option<OperationState>,
    },
    /// Move or copy allocations and models to another device; Ctrl-C cancels
    Transfer(TransferArguments),
    /// Copy bytes from one allocation into another; Ctrl-C cancels
    Copy(CopyArguments),
    /// Pack what shares segments, and give back what is empty then; Ctrl-C cancels
    Defrag(DefragArguments),
    /// Give memory back: the free pool, what is unused, an owner's allocations; or zero one
    Clear(ClearArguments),
    /// Hold an operation that moves bytes
    Pause {
        /// Its id, as `vramd operations` shows it
        #[arg(value_name = "ID")]
        id: OperationId,
    },
    /// Let a paused operation go on
    Resume {
        /// Its id, as `vramd operations` shows it
        #[arg(value_name = "ID")]
        id: OperationId,
    },
    /// Cancel an operation
    Cancel {
        /// Its id, as `vramd operations` shows it
        #[arg(value_name = "ID")]
        id: OperationId,
    },
    /// Show the limits, or change those of a device
    Limits(LimitsArguments),
    /// Follow what happens, line by line
    Events {
        /// Begin just after this event
        #[arg(long, value_name = "ID")]
        since: Option<String>,
        /// End after so many events
        #[arg(long, value_name = "NUMBER")]
        count: Option<u64>,
    },
    /// Write a trace of what is allocated and released, until Ctrl-C; `vramd replay` reads it
    Record(RecordArguments),
}

/// The settings of the daemon as flags; `docs/config.md` has them all.
#[derive(Debug, Default, Args)]
pub struct ServeArguments {
    /// The settings file [default: vramd/vramd.toml in $XDG_CONFIG_HOME, then /etc/vramd/vramd.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where to serve HTTP; port 0 picks one [default: 127.0.0.1:8726]
    #[arg(long, value_name = "ADDRESS:PORT|none")]
    listen: Option<Switch<SocketAddr>>,
    /// The local socket for HTTP and attach [default: vramd/vramd.sock in /run or $XDG_RUNTIME_DIR]
    #[arg(long, value_name = "PATH|none")]
    socket: Option<Switch<PathBuf>>,
    /// The directory of the store [default: vramd in /var/lib or $XDG_STATE_HOME]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// A directory that models may lie in; may repeat
    #[arg(long, value_name = "DIR")]
    model_root: Vec<PathBuf>,
    /// The most host memory that the daemon may hold, such as 24GiB
    #[arg(long, value_name = "SIZE")]
    cpu_limit: Option<Bytes>,
    /// Simulated devices by their sizes: 24GiB or 24GiB,8GiB
    #[arg(long, value_name = "SPEC")]
    sim: Option<String>,
    /// NVIDIA cards to open as devices [default: all]
    #[arg(long, value_name = "none|all")]
    cuda: Option<CudaCards>,
    /// Vulkan adapters to open as devices [default: none]
    #[arg(long, value_name = "none|hardware|all")]
    vulkan: Option<Adapters>,
    /// On Windows, Direct3D 12 adapters to open as devices [default: hardware]
    #[arg(long, value_name = "none|hardware|all")]
    d3d12: Option<Adapters>,
    /// Write the address, the socket and the pid to this file once the daemon serves
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// When to defragment without being asked, in local time: 02:00-05:00 or 12:00-13:00,22:00-06:00 [default: none]
    #[arg(long, value_name = "HOURS|none")]
    quiet_hours: Option<Switch<QuietHours>>,
    /// By what idle models are chosen that go when room is needed [default: LowestCost]
    #[arg(long, value_name = "POLICY", ignore_case = true, value_parser = words(EVICTION_POLICIES))]
    eviction: Option<EvictionPolicy>,
    /// How long a model that was loaded stays at least before it may go for others [default: 0s]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    minimum_stay: Option<KeepAlive>,
    /// Host memory whose pages are made ahead, such as 8GiB, so that loads need not wait for theirs [default: none]
    #[arg(long, value_name = "SIZE|none")]
    page_pool: Option<Switch<Bytes>>,
    /// The most host memory for models that had to go from a card, such as 24GiB [default: half of it]
    #[arg(long, value_name = "SIZE|none")]
    ram_tier: Option<Switch<Bytes>>,
    /// What is left to other programs before such models go from host memory too [default: a tenth of it]
    #[arg(long, value_name = "SIZE|none")]
    ram_reserve: Option<Switch<Bytes>>,
    /// The ratios at which pressure is Moderate, High and Critical [default: 0.70,0.85,0.95]
    #[arg(long, value_name = "RATIOS")]
    pressure_thresholds: Option<Thresholds>,
    /// A program that may be run as a worker, its words separated by spaces; may repeat
    #[arg(long, value_name = "NAME=COMMAND")]
    worker_program: Vec<NamedProgram>,
    /// A worker that begins with the daemon; may repeat
    #[arg(long, value_name = "NAME=PROGRAM[@DEVICE]")]
    worker: Vec<ConfiguredWorker>,
    /// A program of others that is asked to give way: ollama, comfyui, vllm or llama-swap; may repeat
    #[arg(long, value_name = "KIND=URL[@DEVICE]")]
    bridge: Vec<ConfiguredBridge>,
    /// What to log: a level or a filter [default: info]
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

impl ServeArguments {
    /// The settings that were typed.
    pub fn layer(self) -> Layer {
        Layer {
            listen: self.listen,
            socket: self.socket,
            state_dir: self.state_dir,
            model_roots: (!self.model_root.is_empty()).then_some(self.model_root),
            cpu_limit: self.cpu_limit,
            sim: self.sim,
            cuda: self.cuda,
            vulkan: self.vulkan,
            d3d12: self.d3d12,
            ready_file: self.ready_file,
            quiet_hours: self.quiet_hours,
            eviction: self.eviction,
            minimum_stay: self.minimum_stay,
            page_pool: self.page_pool,
            ram_tier: self.ram_tier,
            ram_reserve: self.ram_reserve,
            pressure_thresholds: self.pressure_thresholds,
            worker_programs: (!self.worker_program.is_empty())
                .then(|| self.worker_program.into_iter().collect()),
            workers: (!self.worker.is_empty()).then_some(self.worker),
            bridges: (!self.bridge.is_empty()).then_some(self.bridge),
            log: self.log,
        }
    }
}

#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct AllocArguments {
    /// How much: 512, 8K, 1.5GiB (powers of 1024) or 8MB (powers of 1000)
    pub size: Bytes,
    /// Where: a device's id or uuid [default: the best]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// A power of two up to 2MiB [default: 256]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub alignment: Option<u64>,
    /// What the bytes are for
    #[arg(long = "type", value_name = "TYPE", default_value = "Buffer", ignore_case = true)]
    #[arg(value_parser = words(ALLOCATION_TYPES))]
    pub allocation_type: AllocationType,
    /// Only devices with this type of memory
    #[arg(long, value_name = "TYPE", ignore_case = true, value_parser = words(MEMORY_TYPES))]
    pub memory_type: Option<MemoryType>,
    /// Keep it until it is freed, over restarts too
    #[arg(long, conflicts_with = "lease_seconds")]
    pub persistent: bool,
    /// Release it when it was not renewed for so long [default: 300]
    #[arg(long, value_name = "SECONDS")]
    pub lease_seconds: Option<u64>,
    #[command(flatten)]
    pub terms: Terms,
}

/// For whom room is, and what becomes of the request without it.
#[derive(Debug, Args)]
pub struct Terms {
    /// Free text for people and statistics
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub purpose: String,
    /// Who goes first when several wait
    #[arg(long, default_value = "Normal", ignore_case = true, value_parser = words(PRIORITIES))]
    pub priority: Priority,
    /// What to do when there is no room
    #[arg(long, default_value = "fail", ignore_case = true, value_parser = words(ON_SHORTAGE))]
    pub on_shortage: OnShortage,
    /// How long to wait for room; with evict, once what goes for it is gone [default: 30 with wait]
    #[arg(long, value_name = "SECONDS")]
    pub timeout_seconds: Option<u64>,
    /// For whom: a label
    #[arg(long, value_name = "NAME")]
    pub owner: Option<OwnerName>,
}

#[derive(Debug, Args)]
pub struct ReserveArguments {
    /// What it is expected to take, until runs were measured: 512MiB, 1.5GiB
    #[arg(required_unless_present = "model")]
    pub size: Option<Bytes>,
    /// Whose run it is: what runs of it took is reserved, and this one is learned from
    #[arg(long)]
    pub model: Option<ModelName>,
    /// What the memory depends on, such as batch, height and width: 1x1024x1024
    #[arg(long, requires = "model", value_parser = parse_shape)]
    pub shape: Option<Shape>,
    /// Where: a device's id or uuid [default: where the model is, or the best]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// The process that fills it: it is followed, and the reservation ends with it
    #[arg(long)]
    pub pid: Option<u32>,
    /// What of it the process holds already
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "0", hide_default_value = true)]
    pub held: u64,
    /// What it is for [default: Activation]
    #[arg(long = "type", value_name = "TYPE", ignore_case = true, value_parser = words(ALLOCATION_TYPES))]
    pub allocation_type: Option<AllocationType>,
    /// Give it up when it was not renewed for so long [default: 300]
    #[arg(long, value_name = "SECONDS")]
    pub lease_seconds: Option<u64>,
    #[command(flatten)]
    pub terms: Terms,
}

#[derive(Debug, Args)]
pub struct AllocationsArguments {
    /// Only on this device: its id or uuid
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Only those of this owner
    #[arg(long, value_name = "NAME")]
    pub owner: Option<String>,
    /// Only those with this purpose
    #[arg(long, value_name = "TEXT")]
    pub purpose: Option<String>,
    /// Only those of this type
    #[arg(long = "type", value_name = "TYPE", ignore_case = true, value_parser = words(ALLOCATION_TYPES))]
    pub allocation_type: Option<AllocationType>,
    /// Only persistent ones
    #[arg(long)]
    pub persistent: bool,
    /// In which order
    #[arg(long, allow_hyphen_values = true)]
    #[arg(value_parser = ["createdAt", "-createdAt", "sizeBytes", "-sizeBytes"])]
    pub sort: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Register a model by its files
    Add(AddModelArguments),
    /// Forget a model; its files stay
    Rm {
        /// Its name
        model: ModelName,
    },
    /// Show one model with its components
    Show {
        /// Its name
        model: ModelName,
    },
}

#[derive(Debug, Args)]
pub struct AddModelArguments {
    pub model: ModelName,
    /// A .safetensors or .gguf file (the first of several), a .safetensors.index.json, or a directory with one of these
    #[arg(required_unless_present = "component", conflicts_with = "component")]
    pub path: Option<PathBuf>,
    /// A part of the model, as in unet=PATH; may repeat
    #[arg(long, value_name = "NAME=PATH", value_parser = parse_component)]
    pub component: Vec<(ComponentName, PathBuf)>,
    /// How long it stays when idle: 90s, 5m, 1h30m, 0, or -1 for ever [default: 5m]
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub keep_alive: Option<KeepAlive>,
    /// Once resident, keep it so until it is unpinned
    #[arg(long)]
    pub pin: bool,
    /// How dear its absence is beside that of others, and whose loads go first
    #[arg(long, default_value = "Normal", ignore_case = true, value_parser = words(PRIORITIES))]
    pub priority: Priority,
}

#[derive(Debug, Args)]
pub struct LoadArguments {
    pub model: ModelName,
    /// Where to: a device's id or uuid [default: the best device]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Only this component; may repeat [default: all]
    #[arg(long, value_name = "NAME")]
    pub component: Vec<ComponentName>,
    /// How long it stays when idle: 90s, 5m, 1h30m, 0, or -1 for ever
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub keep_alive: Option<KeepAlive>,
    /// What to do when there is no room [default: evict]
    #[arg(long, ignore_case = true, value_parser = words(ON_SHORTAGE))]
    pub on_shortage: Option<OnShortage>,
    /// How long to wait for room; with evict, once what goes for it is gone [default: 30 with wait]
    #[arg(long, value_name = "SECONDS")]
    pub timeout_seconds: Option<u64>,
    /// Its components may go to different devices, if none has room for all of them
    #[arg(long, conflicts_with = "device")]
    pub split: bool,
    /// Sum the bytes that arrive; later loads of the same files are held to that
    #[arg(long)]
    pub checksum: bool,
    /// Start it and return at once
    #[arg(long)]
    pub no_wait: bool,
}

/// How fast bytes may move, and before whom.
#[derive(Debug, Args)]
pub struct Pace {
    /// Its share when several operations move bytes: each step up is four times the share
    #[arg(long, ignore_case = true, value_parser = words(PRIORITIES))]
    pub priority: Option<Priority>,
    /// The most to move in a second, such as 500MiB
    #[arg(long, value_name = "SIZE")]
    pub max_rate: Option<Bytes>,
    /// Start it and return at once
    #[arg(long)]
    pub no_wait: bool,
}

#[derive(Debug, Args)]
pub struct TransferArguments {
    /// Allocations by their ids, models, or MODEL/COMPONENT
    #[arg(required = true, value_name = "WHAT", value_parser = parse_movable)]
    pub items: Vec<Movable>,
    /// Where to: a device's id or uuid
    #[arg(long, value_name = "DEVICE")]
    pub to: String,
    /// Where models are taken from, if they are resident on several devices
    #[arg(long, value_name = "DEVICE")]
    pub from: Option<String>,
    /// Leave the old one where it is
    #[arg(long)]
    pub copy: bool,
    /// Read back what arrived and compare
    #[arg(long)]
    pub checksum: bool,
    #[command(flatten)]
    pub pace: Pace,
}

#[derive(Debug, Args)]
pub struct CopyArguments {
    /// The allocation to copy from
    pub source: AllocationId,
    /// The allocation to copy into
    pub target: AllocationId,
    /// From where in the source, such as 4096 or 1MiB
    #[arg(long, value_name = "SIZE", default_value_t = 0, value_parser = parse_bytes)]
    pub source_offset: u64,
    /// To where in the target
    #[arg(long, value_name = "SIZE", default_value_t = 0, value_parser = parse_bytes)]
    pub target_offset: u64,
    /// How much [default: to the end of the source]
    #[arg(long, value_name = "SIZE")]
    pub size: Option<Bytes>,
    /// Read back what arrived and compare
    #[arg(long)]
    pub checksum: bool,
    #[command(flatten)]
    pub pace: Pace,
}

#[derive(Debug, Args)]
pub struct DefragArguments {
    /// Only this device: its id or uuid [default: all, one after another]
    pub device: Option<String>,
    /// Only show what it would do
    #[arg(long)]
    pub dry_run: bool,
    /// The most to copy
    #[arg(long, value_name = "SIZE")]
    pub max_bytes: Option<Bytes>,
    /// The most blocks to move
    #[arg(long, value_name = "NUMBER")]
    pub max_moves: Option<u64>,
    /// Begin no move after so long
    #[arg(long, value_name = "MILLISECONDS")]
    pub max_milliseconds: Option<u64>,
    #[command(flatten)]
    pub pace: Pace,
}

#[derive(Debug, Args)]
pub struct ClearArguments {
    /// What to clear
    #[arg(ignore_case = true, value_parser = words(CLEAR_TARGETS))]
    pub what: ClearTarget,
    /// With Allocations: whose
    #[arg(long, value_name = "NAME")]
    pub owner: Option<OwnerName>,
    /// With Zero: which
    #[arg(long, value_name = "ID")]
    pub allocation: Option<AllocationId>,
    /// Only on this device: its id or uuid [default: all]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Only show what would be cleared
    #[arg(long)]
    pub dry_run: bool,
    /// With Allocations and Zero: also what processes have attached
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct RecordArguments {
    /// The file to write, which must not exist yet [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// End after so long
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<u64>,
    /// Only on this device: its id or uuid
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
}

#[derive(Debug, Args)]
pub struct ReplayArguments {
    /// The trace: of `vramd record`, RMM's CSV log, or PyTorch's memory snapshot
    pub file: PathBuf,
    /// What it is written in [default: what its first bytes say]
    #[arg(long, value_name = "FORMAT", value_parser = words(TRACE_FORMATS))]
    pub format: Option<Format>,
    /// Which device of the trace [default: the only one]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// The size of the pool [default: the smallest in which nothing is refused]
    #[arg(long, value_name = "SIZE")]
    pub pool: Option<Bytes>,
    /// A power of two: sizes are rounded up to it
    #[arg(long, value_name = "SIZE", default_value_t = BLOCK_QUANTUM, value_parser = parse_alignment)]
    pub alignment: u64,
    /// Draw the address space over time into this file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct SimulateArguments {
    /// The trace: lines of `time,model,seconds`
    pub trace: PathBuf,
    /// The machine: JSON with its devices and models
    #[arg(long, value_name = "FILE")]
    pub machine: PathBuf,
    /// By what models are chosen that go [default: all, side by side]
    #[arg(long, value_name = "POLICY", ignore_case = true, value_parser = words(EVICTION_POLICIES))]
    pub policy: Option<EvictionPolicy>,
    /// Draw when which model was where into this file, for the first policy
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct AttachArguments {
    /// The model, with /COMPONENT when it has more than one
    #[arg(value_name = "MODEL[/COMPONENT]", value_parser = parse_target)]
    pub target: Target,
    /// Where it is resident: a device's id or uuid
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// The daemon's Unix socket [default: that of --server, else that of `vramd serve`]
    #[arg(long, value_name = "PATH", env = "VRAMD_SOCKET", hide_env_values = true)]
    pub socket: Option<PathBuf>,
    /// Keep it attached until Ctrl-C
    #[arg(long)]
    pub hold: bool,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Show each setting, its value and where that came from
    Show(ServeArguments),
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Page {
    Openapi,
    Cli,
    Config,
    Errors,
}

#[derive(Debug, Args)]
pub struct LimitsArguments {
    /// The device's id or uuid
    pub device: Option<String>,
    /// The most that the daemon may hold there, such as 24GiB, or default for the configured limit
    #[arg(value_name = "SIZE|default", value_parser = parse_limit)]
    pub limit: Option<Limit>,
    /// Above it idle models go, without anybody asking for room; default for none
    #[arg(long, value_name = "SIZE|default", value_parser = parse_limit, requires = "device")]
    pub soft: Option<Limit>,
    /// What is left to other programs; default for none
    #[arg(long, value_name = "SIZE|default", value_parser = parse_limit, requires = "device")]
    pub reserve: Option<Limit>,
    /// The most that an owner may have, and what is reserved for them: NAME=24GiB, NAME=24GiB,8GiB, or NAME= for none; may repeat
    #[arg(long, value_name = "NAME=SIZES", value_parser = parse_share::<OwnerName>, requires = "device")]
    pub owner: Vec<Share<OwnerName>>,
    /// The same for a purpose, or all that begin as NAME*; a component's is MODEL/COMPONENT; may repeat
    #[arg(long, value_name = "NAME=SIZES", value_parser = parse_share::<String>, requires = "device")]
    pub purpose: Vec<Share<String>>,
}

impl LimitsArguments {
    pub fn changes(&self) -> bool {
        self.limit.is_some()
            || self.soft.is_some()
            || self.reserve.is_some()
            || !self.owner.is_empty()
            || !self.purpose.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn words_are_taken_in_any_case() {
        let arguments =
            Arguments::try_parse_from(["vramd", "alloc", "1K", "--type", "kvcache"]).expect("parsed");
        let Command::Ask(Question::Alloc(alloc)) = arguments.command else { panic!("another command") };
        assert_eq!(alloc.allocation_type, AllocationType::KvCache);
    }

    #[test]
    fn every_setting_has_its_flag() {
        let command = Arguments::command();
        let serve = command.find_subcommand("serve").expect("serve");
        for setting in crate::settings::SETTINGS {
            let flag = setting.flag.trim_start_matches('-');
            assert!(serve.get_arguments().any(|argument| argument.get_long() == Some(flag)), "{flag}");
        }
    }
}
