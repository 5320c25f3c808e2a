//! A home without settings, the binary in it, and a daemon that ends with its test.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

#[cfg(unix)]
pub use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// Far above what anything here takes, also on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

/// Looks again until `look` has found something.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// How a command ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {self:#?}"))
    }

    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// An empty home: nothing of the machine's own settings reaches the command.
pub struct Home {
    pub dir: TempDir,
}

impl Home {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vramd"));
        command.args(arguments).current_dir(self.dir.path()).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("VRAMD_") || name.to_string_lossy().starts_with("XDG_") {
                command.env_remove(name);
            }
        }
        command.env("HOME", self.dir.path()).env("XDG_CONFIG_HOME", self.path("config"));
        command.env("LOCALAPPDATA", self.path("local")).env("APPDATA", self.path("config"));
        command
    }

    /// The local socket of a daemon in this home.
    pub fn socket(&self) -> String {
        if cfg!(windows) {
            let name = self.dir.path().file_name().expect("a name").to_string_lossy();
            return format!(r"\\.\pipe\vramd-test-{name}");
        }
        self.path("socket").to_str().expect("UTF-8").to_owned()
    }

    /// The same, as a server.
    pub fn local_server(&self) -> String {
        format!("{}:{}", if cfg!(windows) { "pipe" } else { "unix" }, self.socket())
    }

    pub fn run(&self, arguments: &[&str]) -> Ended {
        self.command(arguments).output().expect("the binary runs").into()
    }
}

/// `vramd serve` with a small device of each kind, killed by its own pid when the test ends.
pub struct Daemon {
    pub home: Home,
    child: Option<Child>,
    pub server: String,
    simulated: &'static str,
}

/// What a program has put out. Wine fails to start one now and then, for a reason of its own.
fn output(command: &mut Command) -> std::process::Output {
    const INTERNAL_ERROR: i32 = 1359;
    let mut tries = 0;
    loop {
        tries += 1;
        match command.output() {
            Err(error) if cfg!(windows) && error.raw_os_error() == Some(INTERNAL_ERROR) && tries < 5 => {}
            ended => return ended.expect("the binary runs"),
        }
    }
}

impl Daemon {
    pub fn start() -> Self {
        Self::start_with("64MiB,32MiB")
    }

    pub fn start_with(simulated: &'static str) -> Self {
        let home = Home::new();
        std::fs::create_dir(home.path("models")).expect("a directory");
        let mut daemon = Self { home, child: None, server: String::new(), simulated };
        daemon.restart();
        daemon
    }

    /// Starts it on the same store; what ran before has ended.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let ready = self.home.path("ready.json");
        let _ = std::fs::remove_file(&ready);
        let log = File::options().create(true).append(true).open(self.home.path("log")).expect("a file");
        let socket = self.home.socket();
        let paths = ["state", "models", "ready.json"].map(|name| self.home.path(name));
        let [state, models, file] = paths.each_ref().map(|path| path.to_str().expect("UTF-8"));
        let mut child = self
            .home
            .command(&["serve", "--listen", "127.0.0.1:0", "--sim", self.simulated, "--cpu-limit", "128MiB"])
            .args(["--socket", &socket, "--state-dir", state, "--model-root", models, "--ready-file", file])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the binary runs");
        let ready: Value = wait_for("the ready file", || {
            if let Some(status) = child.try_wait().expect("a child") {
                panic!("the daemon ended with {status}:\n{}", self.log());
            }
            serde_json::from_slice(&std::fs::read(&ready).ok()?).ok()
        });
        assert_eq!(ready["pid"], child.id());
        self.server = format!("http://{}", ready["address"].as_str().expect("an address"));
        self.child = Some(child);
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.home.command(arguments);
        command.env("VRAMD_SERVER", &self.server).env("VRAMD_SOCKET", self.home.socket());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Ended {
        output(&mut self.command(arguments)).into()
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        Ended::from(output(self.command(arguments).arg("--json"))).expect(0).json()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.home.path("log")).unwrap_or_default()
    }

    /// Kills it without warning, while others may still be asking it.
    pub fn kill(&self) {
        kill(self.child.as_ref().expect("it runs"), Signal::KILL);
    }

    /// Waits for its end; the exit code, if it had one.
    pub fn reap(&mut self) -> Option<i32> {
        let mut child = self.child.take().expect("it runs");
        wait_for("the daemon's end", || child.try_wait().expect("a child")).code()
    }

    pub fn end(&mut self, signal: Signal) -> Option<i32> {
        kill(self.child.as_ref().expect("it runs"), signal);
        self.reap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            kill(&child, Signal::KILL);
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
    }
}

#[cfg(unix)]
pub fn kill(child: &Child, signal: Signal) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, signal).expect("a signal to our own child");
}

/// Windows knows of no other signal that one process can send to another.
#[cfg(windows)]
pub enum Signal {
    KILL,
}

#[cfg(windows)]
pub fn kill(child: &Child, _: Signal) {
    let process = vramd_windows::Process::open_to_end(child.id()).expect("our own child");
    process.end().expect("our own child");
}

/// A model file with one tensor of `count` 32-bit floats and a scalar.
pub fn write_model(path: &Path, count: usize) {
    let bytes = 4 * count;
    let header = format!(
        r#"{{"__metadata__":{{"format":"pt"}},"a":{{"dtype":"F32","shape":[{count}],"data_offsets":[0,{bytes}]}},"b":{{"dtype":"BF16","shape":[],"data_offsets":[{bytes},{}]}}}}"#,
        bytes + 2
    );
    let mut file = File::create(path).expect("a file");
    file.write_all(&(header.len() as u64).to_le_bytes()).expect("written");
    file.write_all(header.as_bytes()).expect("written");
    // A hole reads as zeros and takes no room.
    file.set_len((8 + header.len() + bytes + 2) as u64).expect("its length");
}
