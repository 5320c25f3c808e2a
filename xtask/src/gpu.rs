//! The tests that need an NVIDIA card: built here, and run here or packed for a machine that has the card and nothing else.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context, Result};

use crate::process::{cargo, command, output, python_tool, root, run, succeeds, target_directory};

/// What runs where the card is; what it needs lies beside it.
const RUN: &str = r#"#!/bin/sh
# The contract on the first NVIDIA card, then models on it by way of the daemon and Python, with figures.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
VRAMD_TEST_CUDA_CARD=1 "$here/contract" cuda
PYTHONPATH="$here/python" "${PYTHON:-python3}" "$here/gpu_check.py" "$here/vramd" --json "${OUT:-$here}/gpu.json"
"#;

/// Packs everything into a directory, and runs it unless `pack` says where that is.
pub fn test(pack: Option<&Path>) -> Result<()> {
    let target = target_directory()?;
    let here = target.join("gpu");
    let into = pack.unwrap_or(&here);
    fs::create_dir_all(into.join("python/vramd")).with_context(|| into.display().to_string())?;
    run(cargo().args(["build", "--release", "--package", "vramd", "--locked"]))?;
    let contract = contract()?;
    let contract = Path::new(&contract);
    let copy = |from: &Path, name: &str| {
        fs::copy(from, into.join(name)).with_context(|| format!("could not copy {}", from.display()))
    };
    for (from, name) in [
        (contract, "contract"),
        (&*contract.with_file_name("libvramd_fake_cuda.so"), "libvramd_fake_cuda.so"),
        (&*target.join("release/vramd"), "vramd"),
    ] {
        copy(from, name)?;
        // A third of the size, where the tool is.
        succeeds(command("strip").arg("--strip-debug").arg(into.join(name)));
    }
    copy(&root().join("tools/gpu_check.py"), "gpu_check.py")?;
    for file in fs::read_dir(root().join("python/src/vramd"))? {
        let file = file?;
        if file.file_type()?.is_file() {
            copy(&file.path(), &format!("python/vramd/{}", file.file_name().to_string_lossy()))?;
        }
    }
    let script = into.join("run");
    fs::write(&script, RUN)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    if pack.is_some() {
        println!("packed: {} runs it where the card is", script.display());
        return Ok(());
    }
    // That of the tests; the user's, which may have torch, by PYTHON.
    let python = python_tool("python")?.get_program().to_owned();
    run(command(script).env("PYTHON", std::env::var_os("PYTHON").unwrap_or(python)))
}

/// The program that holds the contract's tests.
fn contract() -> Result<String> {
    let built = output(
        cargo()
            .args(["test", "--package", "vramd-device", "--test", "it", "--no-run", "--locked"])
            .arg("--message-format=json"),
    )?;
    let executable = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        message["executable"].as_str().map(ToOwned::to_owned)
    };
    built.lines().rev().find_map(executable).context("Cargo names no program of the contract's tests")
}
