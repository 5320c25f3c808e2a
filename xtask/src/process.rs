//! Running other programs from the root of the workspace.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The root of the workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root of the workspace")
}

/// A command that starts in the root of the workspace.
pub fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

pub fn cargo() -> Command {
    command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// A program of the Python environment, which `tools/venv.sh` makes or brings up to date first.
pub fn python_tool(name: &str) -> Result<Command> {
    run(&mut command(root().join("tools/venv.sh")))?;
    Ok(command(root().join("target/venv/bin").join(name)))
}

/// Shows and runs a command; an error unless it succeeds.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = show(command);
    eprintln!("$ {shown}");
    let status = command.status().with_context(|| format!("could not start: {shown}"))?;
    if !status.success() {
        bail!("failed ({status}): {shown}");
    }
    Ok(())
}

/// What a command prints to its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let output =
        command.stderr(Stdio::inherit()).output().with_context(|| format!("could not start: {shown}"))?;
    if !output.status.success() {
        bail!("failed ({}): {shown}", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("not UTF-8: what {shown} printed"))
}

/// Whether a command is there and succeeds; what it prints is dropped.
pub fn succeeds(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// The files that are, or could be, committed, relative to the root.
pub fn files() -> Result<Vec<PathBuf>> {
    let list = output(command("git").args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]))?;
    let mut files: Vec<PathBuf> =
        list.split_terminator('\0').map(PathBuf::from).filter(|file| root().join(file).is_file()).collect();
    files.sort_unstable();
    Ok(files)
}

/// What Cargo knows about the workspace and its members, without their dependencies.
pub fn metadata() -> Result<Value> {
    let metadata = output(cargo().args(["metadata", "--format-version", "1", "--no-deps", "--locked"]))?;
    serde_json::from_str(&metadata).context("cargo metadata is not JSON")
}

/// Where Cargo puts what it builds.
pub fn target_directory() -> Result<PathBuf> {
    metadata()?["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .context("cargo metadata shows no target directory")
}

fn show(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| Path::new(word).strip_prefix(root()).unwrap_or(Path::new(word)).display().to_string())
        .collect();
    words.join(" ")
}
