//! A process group, and a descriptor that tells when its leader has ended.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout};
use vramd_api::{Bytes, WorkerExit, WorkerLimit};

use super::limits::{Limits, ROUNDS};
use super::{Command, MARK_VARIABLE};
use crate::clock;

/// How long that is waited for.
const SWEEP_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Group {
    mark: String,
    started: Option<u64>,
    child: Child,
    pub pid: u32,
    leader: Pid,
    ended: Receiver,
    limits: Limits,
    is_reaped: bool,
}

impl Group {
    /// Starts a process in a group of its own, with pipes to its three streams.
    pub fn start(command: &Command, id: &str) -> io::Result<(Self, ChildStdin, ChildStdout, ChildStderr)> {
        let mut process = tokio::process::Command::new(&command.program);
        process
            .args(&command.arguments)
            .envs(&command.environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let mut child = process.spawn()?;
        let pid = child.id().expect("nobody has waited for it");
        let leader = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process has a number");
        let ended = watch(leader)?;
        let limits = Limits::set(command.limit_bytes, leader, &format!("{}-{id}", command.home_mark));
        let streams = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = streams else {
            return Err(io::Error::other("a pipe to the process is missing"));
        };
        Ok((
            Self {
                mark: command.mark.clone(),
                started: started(leader),
                child,
                pid,
                leader,
                ended,
                limits,
                is_reaped: false,
            },
            stdin,
            stdout,
            stderr,
        ))
    }

    pub fn limit(&self) -> Option<WorkerLimit> {
        self.limits.shown()
    }

    /// Until the first of its processes has ended. Its number is nobody else's before [`Self::reap`].
    pub async fn ended(&self) {
        let _ = self.ended.readable().await;
    }

    /// Asks all of its processes to end.
    pub fn terminate(&self) {
        let _ = kill_process_group(self.leader, Signal::TERM);
    }

    fn kill(&self) {
        let _ = kill_process_group(self.leader, Signal::KILL);
        self.limits.kill();
    }

    /// Ends all that is left of it.
    pub async fn reap(mut self) -> WorkerExit {
        // Before its leader is waited for: then the group's number cannot be another's yet.
        self.kill();
        // Those that left the group too. One process that cannot be looked at holds up nobody for long.
        let (mark, since) = (format!("{MARK_VARIABLE}={}", self.mark), self.started);
        let killed = tokio::task::spawn_blocking(move || kill_marked(&mark, since));
        let _ = tokio::time::timeout(SWEEP_PATIENCE, killed).await;
        let status = self.child.wait().await;
        self.is_reaped = true;
        let reached = self.limits.reached();
        self.limits.end();
        let mut exit = WorkerExit { at: clock::wall(), code: None, signal: None, reason: String::new() };
        match status {
            Ok(status) => tell(status, &mut exit),
            Err(error) => exit.reason = format!("how it ended is not known: {error}"),
        }
        if let Some(bytes) = reached {
            let limit = Bytes::show(bytes);
            exit.reason = format!("{}: its processes reached their limit of {limit}", exit.reason);
        }
        exit
    }
}

impl Drop for Group {
    /// Whatever becomes of its task, its group ends; what left that is for the next run.
    fn drop(&mut self) {
        if !self.is_reaped {
            self.kill();
        }
    }
}

fn tell(status: ExitStatus, exit: &mut WorkerExit) {
    (exit.code, exit.signal) = (status.code(), status.signal());
    exit.reason = match (exit.code, exit.signal) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "it ended".to_owned(),
    };
}

/// Readable once a process has ended.
fn watch(process: Pid) -> io::Result<Receiver> {
    // Not a pipe, but it is polled like one, and nothing is read from it.
    Receiver::from_owned_fd_unchecked(pidfd_open(process, PidfdFlags::NONBLOCK)?)
}

/// Until a process that somebody else started has ended; for ever where nobody knows which.
pub async fn ended(pid: Option<u32>) {
    let Some(process) = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) else {
        return std::future::pending().await;
    };
    match watch(process) {
        Ok(watch) => drop(watch.readable().await),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {}
        Err(_) => std::future::pending().await,
    }
}

/// Ends what an earlier run of this daemon left: the processes that it marked, whatever group they are in.
pub fn sweep(mark: &str) {
    let count = kill_marked(&format!("{}={mark}:", super::MARK_VARIABLE), None);
    if count > 0 {
        tracing::info!(count, "processes of workers that an earlier run left are ended");
    }
    super::limits::sweep(mark);
}

/// Ends all processes that have a variable in their environment that begins like this, of those that started no earlier; says
/// how many there were. Those that fork meanwhile are met the next time round.
fn kill_marked(wanted: &str, since: Option<u64>) -> usize {
    let mut all = 0;
    for _ in 0..ROUNDS {
        let count = kill_marked_once(wanted, since);
        all += count;
        if count == 0 {
            break;
        }
    }
    all
}

fn kill_marked_once(wanted: &str, since: Option<u64>) -> usize {
    let mut count = 0;
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?)) else {
            continue;
        };
        let is_own = pid == rustix::process::getpid();
        if is_own || since.is_some_and(|since| started(pid).is_none_or(|at| at < since)) {
            continue;
        }
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment.split(|byte| *byte == 0).any(|one| one.starts_with(wanted.as_bytes())) {
            count += usize::from(kill_process(pid, Signal::KILL).is_ok());
        }
    }
    count
}

/// When a process was started, in ticks since the machine was.
fn started(pid: Pid) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // Its name, in brackets, may hold anything; after it come the third field and those that follow.
    stat.rsplit_once(") ")?.1.split(' ').nth(22 - 3)?.parse().ok()
}
