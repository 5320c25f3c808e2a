//! The allocator's tests in Miri, where this machine has it.

use anyhow::Result;

use crate::process::{command, run as run_command, succeeds};

pub fn run() -> Result<()> {
    if !succeeds(command("rustup").args(["run", "nightly", "cargo", "miri", "--version"])) {
        eprintln!("SKIPPED: Miri is missing; install it with: rustup component add miri --toolchain nightly");
        return Ok(());
    }
    // Tests find their directory, and proptest its seeds, in the world outside.
    run_command(
        command("rustup")
            .args(["run", "nightly", "cargo", "miri", "test", "--package", "vramd-core", "ranges"])
            .env("MIRIFLAGS", "-Zmiri-disable-isolation"),
    )
}
