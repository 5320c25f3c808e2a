//! The fuzz targets, where this machine can run them.

use anyhow::{Context, Result};

use crate::process::{cargo, command, root, run as run_command, succeeds, target_directory};

const TARGETS: &[&str] =
    &["safetensors_header", "safetensors_index", "gguf_header", "attach_frame", "ranges", "trace"];

/// Checks that the targets compile. Naming some libFuzzer keeps its own from being built, for which a machine
/// would need a C++ compiler; nothing is linked.
pub fn check() -> Result<()> {
    run_command(
        cargo()
            .args(["check", "--locked", "--manifest-path", "fuzz/Cargo.toml", "--target-dir"])
            .arg(target_directory()?.join("fuzz"))
            .env("CUSTOM_LIBFUZZER_PATH", "/nowhere/libfuzzer.a"),
    )
}

/// Runs each target for `seconds`; a crash is an error, a missing tool is said and no error.
pub fn run(seconds: u32) -> Result<()> {
    if let Some(missing) = missing() {
        eprintln!("SKIPPED: {missing}");
        return Ok(());
    }
    for target in TARGETS {
        let corpus = format!("fuzz/corpus/{target}");
        std::fs::create_dir_all(root().join(&corpus)).with_context(|| format!("could not make {corpus}"))?;
        let mut command = command("rustup");
        command
            .args(["run", "nightly", "cargo", "fuzz", "run", target, &corpus])
            .arg(format!("fuzz/seeds/{target}"))
            .args(["--", "-max_len=4096", "-print_final_stats=1"])
            .arg(format!("-max_total_time={seconds}"));
        run_command(&mut command)?;
    }
    Ok(())
}

fn missing() -> Option<&'static str> {
    let nightly = |arguments: &[&str]| succeeds(command("rustup").args(["run", "nightly"]).args(arguments));
    if !nightly(&["rustc", "--version"]) {
        return Some("the nightly compiler is missing; install it with: rustup toolchain install nightly");
    }
    if !nightly(&["cargo", "fuzz", "--version"]) {
        return Some("cargo-fuzz is missing; install it with: cargo install cargo-fuzz --locked");
    }
    None
}
