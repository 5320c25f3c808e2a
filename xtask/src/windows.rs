//! The daemon on Windows, from Linux: its tests under Wine with Direct3D 12 on a software driver, and a compile check for the
//! compiler that ships with Windows.
//!
//! Debian's own Rust builds the standard library for both from source, so that no other toolchain is needed.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::{command, root, run, succeeds, target_directory};

const CARGO: &str = "/usr/bin/cargo";
const RUSTC: &str = "/usr/bin/rustc";
const WINE: &str = "/usr/lib/wine/wine64";
const WINE_SERVER: &str = "/usr/lib/wine/wineserver64";
const LAVAPIPE: &str = "/usr/share/vulkan/icd.d/lvp_icd.x86_64.json";
/// A test that hangs under Wine must not hang those who wait for it.
const SECONDS: &str = "1500";

/// What each part needs: a file, and the packages that bring it.
const COMPILER: &[(&str, &str)] = &[
    (CARGO, "cargo-web"),
    (RUSTC, "rustc-web"),
    ("/usr/bin/x86_64-w64-mingw32-gcc", "gcc-mingw-w64-x86-64"),
];
const RUNNER: &[(&str, &str)] = &[
    (WINE, "wine64"),
    ("/usr/bin/Xvfb", "xvfb"),
    (LAVAPIPE, "mesa-vulkan-drivers"),
    ("/usr/lib/x86_64-linux-gnu/libvulkan.so.1", "libvulkan1"),
];

/// Every crate but the core, whose tests are the same everywhere and many.
const CRATES: &[&str] =
    &["vramd-api", "vramd-windows", "vramd-device", "vramd-attach", "vramd-daemon", "vramd"];

/// All tests of the daemon under Wine.
pub fn test() -> Result<()> {
    if !(are_there(COMPILER)? && are_there(RUNNER)?) {
        return Ok(());
    }
    let prefix = target_directory()?.join("wine");
    let screen = Screen::start()?;
    let wine = Wine { prefix: &prefix, display: format!(":{}", screen.number) };
    wine.prepare()?;
    // Two at a time: a machine of two processors runs the server of Wine and a software driver besides.
    let tested = run(wine
        .set(build("test", "x86_64-pc-windows-gnu")?.arg("--all-targets"))
        .args(["--no-fail-fast", "--", "--test-threads", "2"])
        .env("CARGO_TARGET_X86_64_PC_WINDOWS_GNU_RUNNER", WINE)
        .env("VRAMD_TEST_D3D12", "1"));
    // Whatever runs in there still.
    succeeds(wine.set(command(WINE_SERVER).arg("--kill")));
    tested
}

/// Whether everything compiles, tests included, for the compiler of Windows itself; nothing is linked.
pub fn check_msvc() -> Result<()> {
    if !are_there(COMPILER)? {
        return Ok(());
    }
    // No C is compiled: there is nothing here that could, and nobody links.
    let nothing = root().join("tools/msvc/clang-cl");
    run(build("check", "x86_64-pc-windows-msvc")?
        .arg("--all-targets")
        .env("CC_x86_64_pc_windows_msvc", &nothing)
        .env("CXX_x86_64_pc_windows_msvc", &nothing)
        .env("AR_x86_64_pc_windows_msvc", &nothing))
}

/// Whether all is there; what is not is named. In CI nothing may be missing.
fn are_there(needed: &[(&str, &str)]) -> Result<bool> {
    let missing: Vec<_> =
        needed.iter().filter(|(path, _)| !Path::new(path).exists()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(true);
    }
    let what = format!(
        "tests for Windows need more; on Debian: apt install --no-install-recommends rust-web-src {}",
        missing.join(" ")
    );
    if std::env::var_os("CI").is_some() {
        bail!(what);
    }
    eprintln!("SKIPPED: {what}");
    Ok(false)
}

/// Debian's Cargo on our crates for that target, with a standard library of its own making.
fn build(what: &str, target: &str) -> Result<Command> {
    let mut cargo = command("timeout");
    cargo.args(["--kill-after=10", SECONDS, CARGO, what, "--locked", "--target", target]);
    cargo.args(["-Zbuild-std=std,panic_abort,panic_unwind,test"]);
    cargo.args(CRATES.iter().flat_map(|name| ["--package", name]));
    // What another toolchain has set.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO") && text != "CARGO_HOME" && text != "CARGO_TERM_COLOR"
            || text.starts_with("RUST")
            || text == "LD_LIBRARY_PATH"
        {
            cargo.env_remove(name);
        }
    }
    cargo.env("RUSTC", RUSTC).env("RUSTDOC", "/usr/bin/rustdoc").env("RUSTC_BOOTSTRAP", "1");
    cargo.env("CARGO_TARGET_DIR", target_directory()?.join("windows")).env("CARGO_INCREMENTAL", "0");
    Ok(cargo)
}

/// Where Windows programs run.
struct Wine<'a> {
    prefix: &'a PathBuf,
    display: String,
}

impl Wine<'_> {
    fn set<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command
            .env("WINEPREFIX", self.prefix)
            .env("WINEDEBUG", "-all")
            .env("DISPLAY", &self.display)
            .env("VK_ICD_FILENAMES", LAVAPIPE)
    }

    /// Makes a prefix of our own: nothing of the user's is in it.
    fn prepare(&self) -> Result<()> {
        std::fs::create_dir_all(self.prefix).with_context(|| self.prefix.display().to_string())?;
        run(self.set(command(WINE).args(["wineboot", "--init"])))?;
        let library = self.prefix.join("drive_c/windows/system32/bcryptprimitives.dll");
        run(command("x86_64-w64-mingw32-gcc")
            .args(["-shared", "-O1", "-o"])
            .arg(library)
            .arg(root().join("tools/wine/process_prng.c"))
            .arg("-ladvapi32"))?;
        for (key, name, value) in [
            (r"HKCU\Software\Wine", "Version", "win10"),
            (r"HKCU\Software\Wine\Direct3D", "renderer", "vulkan"),
            // A test that crashes ends; no debugger waits for somebody.
            (r"HKLM\Software\Microsoft\Windows NT\CurrentVersion\AeDebug", "Debugger", "none"),
        ] {
            let add = ["reg", "add", key, "/v", name, "/d", value, "/f"];
            if !succeeds(self.set(command(WINE).args(add))) {
                bail!("Wine's registry takes no {name}");
            }
        }
        Ok(())
    }
}

/// An X display that shows nothing, which Wine cannot do without; it ends with this.
struct Screen {
    server: Child,
    number: u32,
}

impl Screen {
    fn start() -> Result<Self> {
        let mut server = command("Xvfb")
            .args(["-displayfd", "1", "-screen", "0", "640x480x24", "-nolisten", "tcp"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("could not start Xvfb")?;
        let mut line = String::new();
        let said = BufReader::new(server.stdout.take().context("piped")?).read_line(&mut line);
        match said.map(|_| line.trim().parse()) {
            Ok(Ok(number)) => Ok(Self { server, number }),
            other => {
                let _ = server.kill();
                let _ = server.wait();
                bail!("Xvfb named no display: {other:?}")
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
