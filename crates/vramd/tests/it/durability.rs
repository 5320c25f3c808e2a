//! A killed daemon forgets nothing that it had answered for.

use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::{Daemon, Ended, wait_for, write_model};

const ROUNDS: usize = 6;
/// Under Wine a client does not always notice that its daemon was killed, and would wait for ever.
const NOTICED: Option<Duration> = if cfg!(windows) { Some(Duration::from_secs(10)) } else { None };

/// Runs a command to its end, which a daemon that is gone brings about.
fn run(daemon: &Daemon, gone: &AtomicBool, arguments: &[&str]) -> Ended {
    let mut command = daemon.command(arguments);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
    let mut since: Option<Instant> = None;
    while child.try_wait().expect("a child of ours").is_none() {
        if gone.load(Ordering::SeqCst) {
            let since = since.get_or_insert_with(Instant::now);
            if NOTICED.is_some_and(|noticed| since.elapsed() > noticed) {
                child.kill().expect("a child of ours");
            }
        }
        std::thread::park_timeout(Duration::from_millis(2));
    }
    child.wait_with_output().expect("its output").into()
}

/// Each writer asks until the daemon is gone, and notes what was answered with success.
fn write_until_gone(
    daemon: &Daemon,
    gone: &AtomicBool,
    answered: &Mutex<Vec<String>>,
    ask: impl Fn(usize) -> Option<String>,
) {
    for number in 0.. {
        let Some(done) = ask(number) else {
            assert!(gone.load(Ordering::SeqCst), "a write failed before the kill:\n{}", daemon.log());
            return;
        };
        answered.lock().expect("no writer panicked").push(done);
    }
}

/// Kills the daemon when dropped, also when the test fails: the writers end by it.
struct Strike<'a> {
    daemon: &'a Daemon,
    gone: &'a AtomicBool,
}

impl Drop for Strike<'_> {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::SeqCst);
        self.daemon.kill();
    }
}

#[test]
fn what_was_answered_survives_a_kill_during_writes() {
    let mut daemon = Daemon::start();
    write_model(&daemon.home.path("models/tiny.safetensors"), 10);
    let (models, allocations) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    for round in 0..ROUNDS {
        let gone = AtomicBool::new(false);
        let count = || models.lock().expect("whole").len() + allocations.lock().expect("whole").len();
        let before = count();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                write_until_gone(&daemon, &gone, &models, |number| {
                    let name = format!("m{round}-{number}");
                    let ended = run(&daemon, &gone, &["models", "add", &name, "models/tiny.safetensors"]);
                    (ended.code == 0).then_some(name)
                });
            });
            scope.spawn(|| {
                write_until_gone(&daemon, &gone, &allocations, |_| {
                    let ended = run(&daemon, &gone, &["alloc", "4K", "--persistent", "--device", "sim:0"]);
                    (ended.code == 0).then(|| ended.stdout.trim().to_owned())
                });
            });
            let strike = Strike { daemon: &daemon, gone: &gone };
            // Both go on writing while the signal is on its way, so that it strikes anywhere in a write.
            wait_for("some writes", || (count() >= before + 2 + 3 * round).then_some(()));
            drop(strike);
        });
        daemon.reap();
        daemon.restart();
        let shown = daemon.run(&["models"]).expect(0).stdout;
        for name in models.lock().expect("whole").iter() {
            assert!(shown.contains(&format!("{name} ")), "{name} is forgotten:\n{shown}");
        }
        let shown = daemon.run(&["allocations", "--persistent"]).expect(0).stdout;
        for id in allocations.lock().expect("whole").iter() {
            assert!(shown.contains(id), "{id} is forgotten:\n{shown}");
        }
    }
}
