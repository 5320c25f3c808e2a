//! A process group, and a descriptor that tells when its leader has ended.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout};
use vramd_api::{WorkerExit, WorkerLimit};

use super::Command;
use super::limits::Limits;
use crate::clock;

#[derive(Debug)]
pub struct Group {
    child: Child,
    pub pid: u32,
    leader: Pid,
    ended: Receiver,
    limits: Limits,
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
        // Not a pipe, but it is polled like one, and nothing is read from it.
        let ended = Receiver::from_owned_fd_unchecked(pidfd_open(leader, PidfdFlags::NONBLOCK)?)?;
        let limits = Limits::set(command.limit_bytes, leader, id);
        let streams = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = streams else {
            return Err(io::Error::other("a pipe to the process is missing"));
        };
        Ok((Self { child, pid, leader, ended, limits }, stdin, stdout, stderr))
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

    /// Ends all that is left of it.
    pub async fn reap(mut self) -> WorkerExit {
        // Before its leader is waited for: then the group's number cannot be another's yet.
        let _ = kill_process_group(self.leader, Signal::KILL);
        self.limits.end();
        let status = self.child.wait().await;
        let mut exit = WorkerExit { at: clock::wall(), code: None, signal: None, reason: String::new() };
        match status {
            Ok(status) => tell(status, &mut exit),
            Err(error) => exit.reason = format!("how it ended is not known: {error}"),
        }
        exit
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

/// When a process was started, in the system's own count: with its number it names one process only.
pub fn started_at(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Its name, in brackets, may hold anything; what follows begins with the third field.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

/// Ends the group of a process that an earlier run of the daemon left.
pub fn end_left_over(pid: u32, started: u64) {
    let leader = i32::try_from(pid).ok().and_then(Pid::from_raw);
    // The count begins anew when the machine does: its environment says that it was ours.
    let is_ours = || {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let mark = super::ID_VARIABLE.as_bytes();
        started_at(pid) == Some(started)
            && environment.split(|byte| *byte == 0).any(|one| one.starts_with(mark))
    };
    if let Some(leader) = leader.filter(|_| is_ours()) {
        tracing::info!(pid, "a worker that an earlier run left is ended");
        let _ = kill_process_group(leader, Signal::KILL);
    }
}
