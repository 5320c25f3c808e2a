//! Development tasks: everything that `make` and CI run, so that both run the same.

mod ci;
mod deps;
mod fuzz;
mod generate;
mod gpu;
mod miri;
mod process;
mod tidy;
mod windows;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Development tasks of vramd.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Exactly what CI runs: `check`, then `test`.
    Ci,
    /// Everything but the tests: formats, lints, house rules, references, licences, types.
    Check,
    /// All tests, Rust and Python.
    Test,
    /// Formats everything.
    Fmt,
    /// The house rules that no compiler knows.
    Tidy,
    /// Which of our crates may use which.
    Deps,
    /// Writes the references that come from the code: openapi/vramd.json and docs/.
    Gen {
        /// Only compare; fail where one differs.
        #[arg(long)]
        check: bool,
    },
    /// Holds a running daemon to its OpenAPI document with requests of every kind.
    FuzzApi,
    /// Runs a daemon under everything at once for a while: the ledger adds up, and all memory is back.
    Soak {
        #[arg(long, default_value_t = 600)]
        seconds: u32,
        /// Default: drawn, and printed.
        #[arg(long)]
        seed: Option<u32>,
    },
    /// Runs each fuzz target for a while, where the nightly compiler and cargo-fuzz are.
    Fuzz {
        /// For each target.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// The tests that need an NVIDIA card, with figures.
    TestGpu {
        /// Only put what they need into this directory, for the machine that has the card; `run` there runs them.
        #[arg(long)]
        pack: Option<PathBuf>,
    },
    /// All tests of the daemon on Windows, under Wine; says so and succeeds where that is missing.
    TestWindows,
    /// Compiles everything for Microsoft's toolchain, of which nothing is needed for that.
    CheckMsvc,
    /// Runs the allocator's tests in Miri, where the nightly compiler has it; says so and succeeds where not.
    Miri,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Ci => ci::check().and_then(|()| ci::test()),
        Task::Check => ci::check(),
        Task::Test => ci::test(),
        Task::Fmt => ci::fmt(),
        Task::Tidy => tidy::run(),
        Task::Deps => deps::run(),
        Task::Gen { check: true } => generate::check(),
        Task::Gen { check: false } => generate::write(),
        Task::FuzzApi => ci::fuzz_api(),
        Task::Soak { seconds, seed } => ci::soak(seconds, seed),
        Task::Fuzz { seconds } => fuzz::run(seconds),
        Task::TestGpu { pack } => gpu::test(pack.as_deref()),
        Task::TestWindows => windows::test(),
        Task::CheckMsvc => windows::check_msvc(),
        Task::Miri => miri::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for cause in error.chain() {
                eprintln!("error: {cause}");
            }
            ExitCode::FAILURE
        }
    }
}
