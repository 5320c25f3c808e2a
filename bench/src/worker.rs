//! Round trips of a message to a worker by the daemon's own link, beside those of bare echoes over pipes.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

const PATIENCE: Duration = Duration::from_secs(10);
/// Requests under way at once, for the rate.
const IN_FLIGHT: usize = 64;
const ECHO: &str = "import sys\nout = sys.stdout.buffer\nfor line in sys.stdin.buffer:\n    out.write(line)\n    out.flush()\n";

/// On a processor of its own: whether a scheduler puts the two ends of a pipe on one processor or on two makes more of a
/// difference than all else.
fn start(processor: usize, program: &Path, arguments: &[&str]) -> anyhow::Result<Child> {
    Command::new("taskset")
        .args(["--cpu-list", &processor.to_string()])
        .arg(program)
        .args(arguments)
        .env("VRAMD_WORKER", "stdio")
        .env("VRAMD_WORKER_FRAMEWORK", "numpy")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| program.display().to_string())
}

/// In turns, so that what else the machine does hits all of them.
pub async fn run(python: &Path, processor: usize, messages: usize, rounds: usize) -> anyhow::Result<Value> {
    let text = "x".repeat(960);
    let data = json!({ "text": text });
    let mut worker = start(processor, python, &["-m", "vramd.worker"])?;
    let (stdin, stdout) = (worker.stdin.take().context("a pipe")?, worker.stdout.take().context("a pipe")?);
    let link = vramd_daemon::worker_link(stdout, stdin);
    let mut python_echo = Echo::start(processor, python, &["-c", ECHO])?;
    let mut c_echo = Echo::start(processor, Path::new("cat"), &[])?;
    let line = format!("{}\n", json!({ "request_id": "1", "action": "ping", "data": data }));
    let (mut of_worker, mut of_python, mut of_c, mut rates) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let mut micros = Vec::with_capacity(messages);
        for _ in 0..messages {
            let begun = Instant::now();
            link.call("ping", &data, PATIENCE).await?;
            micros.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        let (python_micros, c_micros) =
            (python_echo.round(&line, messages).await?, c_echo.round(&line, messages).await?);
        let begun = Instant::now();
        let mut flight = JoinSet::new();
        for number in 0..messages {
            if number >= IN_FLIGHT {
                flight.join_next().await.context("one is under way")???;
            }
            let (link, data) = (link.clone(), data.clone());
            flight.spawn(async move { link.call("ping", &data, PATIENCE).await.map(drop) });
        }
        while let Some(ended) = flight.join_next().await {
            ended??;
        }
        // The first round is to warm up.
        if round > 0 {
            rates.push(messages as f64 / begun.elapsed().as_secs_f64());
            of_worker.push(micros);
            of_python.push(python_micros);
            of_c.push(c_micros);
        }
    }
    rates.sort_by(f64::total_cmp);
    Ok(json!({
        "worker": shown(of_worker), "pythonEcho": shown(of_python), "cEcho": shown(of_c),
        "perSecond": rates[rates.len() / 2],
    }))
}

/// The medians over rounds of each round's p50 and p99.
fn shown(rounds: Vec<Vec<f64>>) -> Value {
    let at = |share: f64| {
        let mut all: Vec<f64> = rounds
            .iter()
            .map(|round| {
                let mut sorted = round.clone();
                sorted.sort_by(f64::total_cmp);
                sorted[((sorted.len() - 1) as f64 * share) as usize]
            })
            .collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    json!({ "p50Micros": at(0.5), "p99Micros": at(0.99) })
}

/// A process that sends back what it reads.
struct Echo {
    _child: Child,
    stdin: tokio::process::ChildStdin,
    stdout: BufReader<tokio::process::ChildStdout>,
}

impl Echo {
    fn start(processor: usize, program: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut child = start(processor, program, arguments)?;
        let (stdin, stdout) = (child.stdin.take().context("a pipe")?, child.stdout.take().context("a pipe")?);
        Ok(Self { _child: child, stdin, stdout: BufReader::new(stdout) })
    }

    async fn round(&mut self, line: &str, messages: usize) -> anyhow::Result<Vec<f64>> {
        let mut micros = Vec::with_capacity(messages);
        let mut answer = Vec::new();
        for _ in 0..messages {
            let begun = Instant::now();
            self.stdin.write_all(line.as_bytes()).await?;
            answer.clear();
            self.stdout.read_until(b'\n', &mut answer).await?;
            micros.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        Ok(micros)
    }
}
