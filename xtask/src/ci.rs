//! The steps of CI, in order; the first that fails ends the run.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::process::{cargo, command, files, python_tool, root, run, succeeds, target_directory};
use crate::{deps, fuzz, generate, tidy};

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
            let examples = ["demo.py", "embed_worker.py", "minilm.py"];
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
        ("Rust tests", || run(cargo().args(["test", "--workspace", "--locked"]))),
        ("Python tests", || {
            run(cargo().args(["build", "--package", "vramd", "--locked"]))?;
            run(python_tool("pytest")?
                .arg("python")
                .env("VRAMD_BINARY", target_directory()?.join("debug/vramd")))
        }),
        ("the API against its document", fuzz_api),
        ("the soak, a minute of it", || soak(60, None)),
        ("the demonstration", demonstration),
    ])
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
