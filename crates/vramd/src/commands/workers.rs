//! `vramd workers`.

use jiff::Timestamp;
use vramd_api::client::Client;
use vramd_api::{Bytes, CallWorker, StartWorker, Worker, WorkerMemory, WorkerModel, WorkerModelState};

use super::allocations::dash;
use crate::arguments::{StartArguments, WorkersCommand};
use crate::error::CommandError;
use crate::output::{Output, list, table, time_since, time_until, word};

pub async fn workers(
    client: &Client,
    command: Option<WorkersCommand>,
    output: Output,
) -> Result<(), CommandError> {
    match command {
        None => output.data(&client.workers().await?, |page| summary(&page.workers)),
        Some(WorkersCommand::Start(arguments)) => start(client, arguments, output).await,
        Some(WorkersCommand::Show { worker }) => output.data(&client.worker(&worker, &[]).await?, details),
        Some(WorkersCommand::Logs { worker }) => {
            let worker = client.worker(&worker, &["logs"]).await?;
            let logs = worker.logs.unwrap_or_default();
            output.data(&logs, |logs| {
                let lines = logs.iter().map(|line| format!("{}  {}", line.at, line.text));
                lines.collect::<Vec<_>>().join("\n")
            })
        }
        Some(WorkersCommand::Stop { worker }) => {
            let stopped = client.stop_worker(&worker).await?;
            let how = stopped.last_exit.as_ref().map_or("it had ended", |exit| &exit.reason).to_owned();
            output.data(&stopped, |worker| format!("{} has ended: {how}", worker.name))
        }
        Some(WorkersCommand::Call { worker, action, data, timeout_seconds }) => {
            let data = serde_json::from_str(&data).map_err(|error| CommandError::Usage {
                message: format!("{data:?} is no JSON object: {error}"),
                hint: "write it in quotes: '{\"device_id\": \"cpu:0\"}'".to_owned(),
            })?;
            let body = CallWorker { action, data, timeout_seconds: Some(timeout_seconds) };
            output.data(&client.call_worker(&worker, &body).await?, |answer| {
                serde_json::to_string_pretty(&answer.data).expect("an answer is plain data")
            })
        }
    }
}

async fn start(client: &Client, arguments: StartArguments, output: Output) -> Result<(), CommandError> {
    let body = StartWorker {
        program: arguments.program,
        name: arguments.name,
        device_id: arguments.device,
        environment: arguments.environment.into_iter().collect(),
        memory_limit_bytes: arguments.memory_limit,
        restart: arguments.restart.unwrap_or_default(),
        heartbeat_seconds: arguments.heartbeat_seconds,
    };
    let worker = client.start_worker(&body).await?;
    output.say("it is being started; `vramd workers` shows when it is ready");
    output.data(&worker, |worker| worker.name.to_string())
}

fn summary(workers: &[Worker]) -> String {
    let heads = [
        "WORKER",
        "STATE",
        ">PID",
        "DEVICE",
        "FRAMEWORK",
        ">MEMORY",
        ">MODELS",
        ">RESTARTS",
        ">FAULTS",
        "SINCE",
    ];
    let rows = workers.iter().map(|worker| {
        [
            worker.name.to_string(),
            state(worker),
            worker.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            worker.device_id.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
            dash(worker.framework.as_deref().unwrap_or_default()),
            memory(&worker.memory),
            worker.models.len().to_string(),
            worker.restart_count.to_string(),
            worker.fault_count.to_string(),
            time_since(
                worker.last_exit.as_ref().map_or(worker.started_at, |exit| exit.at.max(worker.started_at)),
            ),
        ]
    });
    table(heads, rows)
}

/// Its state, with what explains it.
fn state(worker: &Worker) -> String {
    let exit = worker.last_exit.as_ref().filter(|_| !worker.state.is_there());
    let next = worker.next_start_at.map(|at| format!("again {}", time_until(at)));
    let why: Vec<String> = exit.map(|exit| exit.reason.clone()).into_iter().chain(next).collect();
    if why.is_empty() { word(worker.state) } else { format!("{} ({})", word(worker.state), why.join("; ")) }
}

fn memory(memory: &[WorkerMemory]) -> String {
    let shown = memory.iter().filter_map(|one| {
        let bytes = one.measured_bytes.or(one.reported_bytes).filter(|bytes| *bytes > 0)?;
        Some(format!("{} {}", Bytes::show(bytes), one.device_id))
    });
    dash(&shown.collect::<Vec<_>>().join(", "))
}

fn details(worker: &Worker) -> String {
    let when = |at: Option<Timestamp>| at.map_or_else(|| "never".to_owned(), time_since);
    let fault = worker
        .last_fault
        .as_ref()
        .map(|fault| format!("{}, the last: {}", worker.fault_count, fault.message));
    let exit = worker.last_exit.as_ref().map(|exit| format!("{}, {}", exit.reason, time_since(exit.at)));
    let limit = worker.limit.as_ref().map(|limit| {
        let note = limit.note.as_ref().map_or_else(String::new, |note| format!(" ({note})"));
        format!("{} by {}{note}", Bytes::show(limit.bytes), word(limit.kind))
    });
    let rows = [
        ("worker", worker.name.to_string()),
        ("id", worker.worker_id.to_string()),
        ("state", state(worker)),
        ("program", worker.program.as_ref().map_or_else(|| "it joined".to_owned(), ToString::to_string)),
        ("pid", worker.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string())),
        ("device", worker.device_id.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string)),
        ("implementation", dash(worker.implementation.as_deref().unwrap_or_default())),
        ("framework", dash(worker.framework.as_deref().unwrap_or_default())),
        ("memory", memory(&worker.memory)),
        ("limit", limit.unwrap_or_else(|| "-".to_owned())),
        ("restarts", worker.restart_count.to_string()),
        ("last end", exit.unwrap_or_else(|| "-".to_owned())),
        ("heard", when(worker.last_heard_at)),
        ("models told", when(worker.last_synchronized)),
        ("faults", fault.unwrap_or_else(|| "0".to_owned())),
        ("actions", dash(&worker.actions.join(" "))),
    ];
    let models =
        if worker.models.is_empty() { String::new() } else { format!("\n{}", models(&worker.models)) };
    format!("{}{models}", list(&rows))
}

fn models(models: &[WorkerModel]) -> String {
    let rows = models.iter().map(|model| {
        let state = match model.state {
            WorkerModelState::Loaded if model.busy => "busy".to_owned(),
            state => word(state),
        };
        [
            model.name.clone(),
            model.device_id.to_string(),
            state,
            Bytes::show(model.own_bytes),
            Bytes::show(model.attached_bytes),
            model.use_count.to_string(),
            model.last_used_at.map_or_else(|| "never".to_owned(), time_since),
        ]
    });
    table(["MODEL", "DEVICE", "STATE", ">OWN", ">ATTACHED", ">USES", "USED"], rows)
}
