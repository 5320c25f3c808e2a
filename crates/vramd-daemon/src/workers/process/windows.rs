//! A job object: all that a worker starts is in it, and ends with it.

use std::io;
use std::process::Stdio;

use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout};
use tokio::sync::Mutex;
use vramd_api::{LimitKind, WorkerExit, WorkerLimit};
use vramd_windows::job::Job;

use super::Command;
use crate::clock;

#[derive(Debug)]
pub struct Group {
    child: Mutex<Child>,
    pub pid: u32,
    job: Job,
    limit_bytes: Option<u64>,
}

impl Group {
    pub fn start(command: &Command, _id: &str) -> io::Result<(Self, ChildStdin, ChildStdout, ChildStderr)> {
        let mut process = tokio::process::Command::new(&command.program);
        process
            .args(&command.arguments)
            .envs(&command.environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let job = Job::new(command.limit_bytes)?;
        let mut child = process.spawn()?;
        let pid = child.id().expect("nobody has waited for it");
        job.take_in(pid)?;
        let streams = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = streams else {
            return Err(io::Error::other("a pipe to the process is missing"));
        };
        let group = Self { child: Mutex::new(child), pid, job, limit_bytes: command.limit_bytes };
        Ok((group, stdin, stdout, stderr))
    }

    pub fn limit(&self) -> Option<WorkerLimit> {
        self.limit_bytes.map(|bytes| WorkerLimit { kind: LimitKind::ControlGroup, bytes, note: None })
    }

    /// Until the first of its processes has ended.
    pub async fn ended(&self) {
        let _ = self.child.lock().await.wait().await;
    }

    /// There is no gentle way.
    pub fn terminate(&self) {
        self.job.end();
    }

    pub async fn reap(self) -> WorkerExit {
        self.job.end();
        let code = self.child.into_inner().wait().await.ok().and_then(|status| status.code());
        let reason = code.map_or_else(|| "it ended".to_owned(), |code| format!("exit code {code}"));
        WorkerExit { at: clock::wall(), code, signal: None, reason }
    }
}

/// The system is not asked: the connection of a process ends with it.
pub async fn ended(_pid: Option<u32>) {
    std::future::pending().await
}

/// Jobs end with the daemon: nothing is left over.
pub fn sweep(_mark: &str) {}
