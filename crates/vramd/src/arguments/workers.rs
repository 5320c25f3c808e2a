//! `vramd workers`, `optimize`.

use clap::{Args, Subcommand};
use vramd_api::{Bytes, EvictionPolicy, PressureLevel, RestartPolicy, WorkerName};

use super::values::{EVICTION_POLICIES, PRESSURE_LEVELS, RESTART_POLICIES, parse_variable, words};

#[derive(Debug, Subcommand)]
pub enum WorkersCommand {
    /// Start a program that the daemon's configuration allows
    Start(StartArguments),
    /// Show one worker with its memory, its models and its faults
    Show {
        /// Its name or its id
        worker: String,
    },
    /// Print the last lines that a worker wrote
    Logs {
        /// Its name or its id
        worker: String,
    },
    /// End a worker and all that it started; one that has ended leaves the list
    Stop {
        /// Its name or its id
        worker: String,
    },
    /// Ask a worker to do something, and print what it answers
    Call {
        /// Its name or its id
        worker: String,
        /// One of its actions, such as memory.get_status: `vramd workers show` lists them
        action: String,
        /// A JSON object that goes with it
        #[arg(default_value = "{}", value_name = "JSON")]
        data: String,
        /// How long it may take
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        timeout_seconds: u64,
    },
}

#[derive(Debug, Args)]
pub struct StartArguments {
    /// Its name in the daemon's configuration
    pub program: WorkerName,
    /// What the worker is called [default: the program's name]
    #[arg(long)]
    pub name: Option<WorkerName>,
    /// The device that it is to use: its id or uuid
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// A variable for its environment; may repeat
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub environment: Vec<(String, String)>,
    /// The most host memory that its processes may take, such as 8GiB
    #[arg(long, value_name = "SIZE")]
    pub memory_limit: Option<Bytes>,
    /// Whether it is started again when it has ended [default: OnFailure]
    #[arg(long, value_name = "POLICY", ignore_case = true, value_parser = words(RESTART_POLICIES))]
    pub restart: Option<RestartPolicy>,
    /// How often it has to show that it is alive [default: 5]
    #[arg(long, value_name = "SECONDS")]
    pub heartbeat_seconds: Option<u64>,
}

#[derive(Debug, Args)]
pub struct OptimizeArguments {
    /// Its id or uuid
    pub device: String,
    /// By what those are chosen that go [default: the daemon's own policy]
    #[arg(long, value_name = "STRATEGY", ignore_case = true, value_parser = words(EVICTION_POLICIES))]
    pub strategy: Option<EvictionPolicy>,
    /// The level that pressure is to fall to [default: Moderate]
    #[arg(long, value_name = "LEVEL", ignore_case = true, value_parser = words(PRESSURE_LEVELS))]
    pub target: Option<PressureLevel>,
    /// How much is to become free, whatever the level
    #[arg(long, value_name = "SIZE")]
    pub free: Option<Bytes>,
    /// The most models that go
    #[arg(long, value_name = "COUNT")]
    pub max_models: Option<u32>,
    /// A model that stays; may repeat
    #[arg(long, value_name = "MODEL")]
    pub exclude: Vec<String>,
    /// Have all that is idle go
    #[arg(long)]
    pub force: bool,
    /// How long it may take [default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub timeout_seconds: Option<u64>,
}
