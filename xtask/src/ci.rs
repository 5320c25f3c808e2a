//! The steps of CI, in order; the first that fails ends the run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::process::{cargo, command, files, python_tool, root, run, succeeds, target_directory};
use crate::{deps, fuzz, generate, tidy, windows};

type Step = (&'static str, fn() -> Result<()>);

/// Everything but the tests.
pub fn check() -> Result<()> {
    steps(&[
        ("formats", || {
            run(cargo().args(["fmt", "--all", "--check"]))?;
            run(cargo().args(["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))
        }),
        ("house rules", tidy::run),
        ("arrows between crates", deps::run),
        ("clippy", || {
            run(cargo().args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))
        }),
        ("fuzz targets", fuzz::check),
        ("references", generate::check),
        ("licences, bans and sources", deny),
        ("Python: lints", || ruff(&["check"])),
        ("Python: formats", || ruff(&["format", "--check"])),
        ("Python: types", || {
            run(python_tool("mypy")?.current_dir(root().join("python")))?;
            let examples = ["demo.py", "embed_worker.py", "minilm.py", "model_server.py"];
            run(python_tool("mypy")?
                .args(["--config-file", "../python/pyproject.toml"])
                .args(examples)
                .current_dir(root().join("examples")))
        }),
    ])
}

/// All tests.
pub fn test() -> Result<()> {
    steps(&[
        ("Rust tests", || run(with_vulkan(cargo().args(["test", "--workspace", "--locked"]))?)),
        ("Python tests", || {
            run(cargo().args(["build", "--package", "vramd", "--locked"]))?;
            run(python_tool("pytest")?
                .arg("python")
                .env("VRAMD_BINARY", target_directory()?.join("debug/vramd")))
        }),
        ("Python tests with PyTorch", torch),
        ("the API against its document", fuzz_api),
        ("the soak, a minute of it", || soak(60, None)),
        ("the demonstration", demonstration),
        ("Windows: tests under Wine", windows::test),
        ("Windows: what compiles for Microsoft's toolchain", windows::check_msvc),
    ])
}

/// The tests that use PyTorch, on the CPU, with the system's own. In CI it may not be missing.
fn torch() -> Result<()> {
    let made = command(root().join("tools/torch.sh")).status().context("tools/torch.sh did not start")?;
    if made.code() == Some(3) && std::env::var_os("CI").is_none() {
        eprintln!("SKIPPED: what needs PyTorch");
        return Ok(());
    }
    if !made.success() {
        bail!("tools/torch.sh failed");
    }
    run(command(root().join("target/venv-torch/bin/python"))
        .args(["-m", "pytest", "-k", "torch or worker or pressure", "python"])
        .env("VRAMD_BINARY", target_directory()?.join("debug/vramd")))
}

/// Vulkan drivers that need no card: two different devices beside each other. The loader finds the first by itself.
const VULKAN_DRIVERS: [(&str, &str, &str); 2] = [
    ("lavapipe", "/usr/share/vulkan/icd.d/lvp_icd.x86_64.json", "libvulkan1 mesa-vulkan-drivers"),
    ("SwiftShader", "/usr/lib/chromium/vk_swiftshader_icd.json", "chromium-common"),
];

/// Has the tests find these drivers beside those of the machine's cards. In CI none may be missing.
fn with_vulkan(command: &mut Command) -> Result<&mut Command> {
    let mut all = true;
    for (name, path, packages) in VULKAN_DRIVERS {
        if Path::new(path).exists() {
            continue;
        }
        let what = format!("the Vulkan driver {name} is missing; on Debian: apt install {packages}");
        if std::env::var_os("CI").is_some() {
            bail!(what);
        }
        eprintln!("SKIPPED: {what}");
        all = false;
    }
    if all {
        command.env("VRAMD_TEST_VULKAN", "1");
    }
    Ok(command.env("VK_ADD_DRIVER_FILES", VULKAN_DRIVERS[1].1))
}

/// What `make run` shows, with the binary of the tests.
fn demonstration() -> Result<()> {
    run(command(root().join("tools/venv.sh")).arg("--model"))?;
    run(python_tool("python")?
        .args(["examples/demo.py", "--vramd"])
        .arg(target_directory()?.join("debug/vramd")))
}

/// Schemathesis against a daemon of its own; bounded, and the same requests each time.
pub fn fuzz_api() -> Result<()> {
    run(cargo().args(["build", "--package", "vramd", "--locked"]))?;
    run(python_tool("python")?.arg("tools/api_fuzz.py").arg(target_directory()?.join("debug/vramd")))
}

/// A daemon under everything at once; the ledger has to add up, and all memory to be back.
pub fn soak(seconds: u32, seed: Option<u32>) -> Result<()> {
    run(cargo().args(["build", "--package", "vramd", "--locked"]))?;
    let mut command = python_tool("python")?;
    command.arg("tools/soak.py").arg(target_directory()?.join("debug/vramd"));
    command.args(["--seconds", &seconds.to_string()]);
    if let Some(seed) = seed {
        command.args(["--seed", &seed.to_string()]);
    }
    run(&mut command)
}

pub fn fmt() -> Result<()> {
    run(cargo().args(["fmt", "--all"]))?;
    run(cargo().args(["fmt", "--manifest-path", "fuzz/Cargo.toml"]))?;
    ruff(&["check", "--fix"])?;
    ruff(&["format"])
}

fn steps(steps: &[Step]) -> Result<()> {
    for (name, step) in steps {
        eprintln!("\n==> {name}");
        let started = Instant::now();
        step().with_context(|| format!("the step {name:?} failed"))?;
        eprintln!("    {name}: {:.1} s", started.elapsed().as_secs_f64());
    }
    Ok(())
}

/// Ruff with the package's settings over every Python file of the repository.
fn ruff(arguments: &[&str]) -> Result<()> {
    let python =
        files()?.into_iter().filter(|file| file.extension().is_some_and(|extension| extension == "py"));
    let places: BTreeSet<_> = python.filter_map(|file| file.iter().next().map(PathBuf::from)).collect();
    run(python_tool("ruff")?.args(arguments).args(["--config", "python/pyproject.toml"]).args(places))
}

/// cargo-deny is a program of its own: CI installs it, and a developer may do without.
fn deny() -> Result<()> {
    const INSTALL: &str = "cargo install cargo-deny --locked";
    if !succeeds(cargo().args(["deny", "--version"])) {
        if std::env::var_os("CI").is_some() {
            bail!("cargo-deny is missing; install it with: {INSTALL}");
        }
        eprintln!("SKIPPED: cargo-deny is missing; install it with: {INSTALL}");
        return Ok(());
    }
    run(cargo().args(["deny", "--locked", "check", "bans", "licenses", "sources"]))
}
