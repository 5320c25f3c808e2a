//! The one binary: `vramd serve` is the daemon, every other command is a client of it.
//!
//! Owns the command line: arguments as typed ([`arguments`]), settings as resolved ([`settings`]), how
//! answers and errors are shown ([`output`], [`error`]) and one function for each command ([`commands`]). The
//! commands speak HTTP and the attach socket only; what the daemon does is the library's business.

mod arguments;
mod commands;
mod error;
mod output;
mod settings;
mod system;
mod worker_settings;

use std::process::ExitCode;

use clap::Parser;

/// Requests are many small pieces of memory, made on one thread and freed on another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments = arguments::Arguments::parse();
    let output = output::Output::new(&arguments.global);
    match commands::run(arguments, output) {
        Ok(code) => code,
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            error.exit_code()
        }
    }
}
