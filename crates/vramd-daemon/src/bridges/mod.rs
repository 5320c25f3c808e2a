//! Bridges to programs that people already run: each is a worker like any other, whose answers come over that program's own HTTP.
//!
//! What such a program says it has is seen in the ledger; asked to give way, it is believed once the memory is measured as free.

mod programs;

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream};
use tokio::sync::{Mutex, Notify};
use tokio_util::sync::CancellationToken;
use vramd_api::worker_protocol::{UNLOAD_MODEL, VERSION};
use vramd_api::{ApiError, DeviceId, WorkerName};

use self::programs::Program;
use crate::driver::{Driver, Event, Joining};
use crate::platform;
use crate::workers;

const RESTORE: &str = "memory.restore_model";
/// How often a program is asked what it has, and how soon one that was gone is looked for again.
const LOOK_EVERY: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_secs(3);

/// A program that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BridgeKind {
    Ollama,
    ComfyUi,
    Vllm,
    LlamaSwap,
}

/// A program as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    pub name: WorkerName,
    pub kind: BridgeKind,
    /// Where it serves: `http://127.0.0.1:11434`.
    pub url: String,
    /// The device that it uses: an id or uuid.
    pub device: Option<String>,
    /// What it takes, where it does not tell.
    pub size_bytes: Option<u64>,
}

/// Keeps a worker for a program until the daemon stops.
pub async fn keep(bridge: Bridge, device: DeviceId, driver: Driver, stopping: CancellationToken) {
    let program = match Program::new(&bridge, &device) {
        Ok(program) => Arc::new(program),
        Err(error) => {
            tracing::error!(bridge = %bridge.name, error, "a bridge cannot be used");
            return;
        }
    };
    let joining = Joining { name: bridge.name, device: Some(device), pid: None, uid: platform::own_uid() };
    while !stopping.is_cancelled() {
        if let Err(error) = be_worker(&driver, &joining, &program).await {
            tracing::debug!(bridge = %joining.name, %error, "a bridge cannot join");
        }
        tokio::select! {
            () = until_there(&program) => {}
            () = stopping.cancelled() => return,
        }
    }
}

/// Waits until a program that was gone answers.
async fn until_there(program: &Program) {
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        match program.look().await {
            Ok(()) => return,
            Err(error) => tracing::debug!(program = program.shown(), error, "a program does not answer"),
        }
    }
}

/// One conversation, from joining to the end.
async fn be_worker(driver: &Driver, joining: &Joining, program: &Arc<Program>) -> Result<(), ApiError> {
    let task = driver.ask(|reply| Event::JoinWorker(Box::new(joining.clone()), reply)).await?;
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let speaking = tokio::spawn(speak(ours, program.clone()));
    workers::host(task, workers::Joined::within(theirs, joining.name.clone())).await;
    speaking.abort();
    Ok(())
}

/// The worker's side of the protocol.
async fn speak(stream: DuplexStream, program: Arc<Program>) {
    let (reading, writing) = tokio::io::split(stream);
    let writing = Arc::new(Mutex::new(writing));
    let send = async |message: Value| {
        let line = format!("{message}\n");
        // Whether the daemon is there shows when reading ends.
        let _ = writing.lock().await.write_all(line.as_bytes()).await;
    };
    let mut lines = BufReader::new(reading).lines();
    let changed = Arc::new(Notify::new());
    let tell = async {
        let mut told = Value::Null;
        loop {
            // After what was asked for, at once.
            let _ = tokio::time::timeout(LOOK_EVERY, changed.notified()).await;
            if let Ok(models) = program.models().await.map(Value::from)
                && models != told
            {
                send(json!({ "event": "models", "data": { "loaded_models": models } })).await;
                told = models;
            }
        }
    };
    let answer = async {
        while let Ok(Some(line)) = lines.next_line().await {
            let Ok(request) = serde_json::from_str::<Value>(&line) else { return };
            if request["action"] == "shutdown" {
                return;
            }
            let (program, writing, changed) = (program.clone(), writing.clone(), changed.clone());
            tokio::spawn(async move {
                let Some(reply) = reply(&program, &request).await else { return };
                let _ = writing.lock().await.write_all(format!("{reply}\n").as_bytes()).await;
                if request["action"] == UNLOAD_MODEL || request["action"] == RESTORE {
                    changed.notify_one();
                }
            });
        }
    };
    tokio::select! {
        () = tell => {}
        () = answer => {}
    }
}

/// The answer to a request; `cancel` has none.
async fn reply(program: &Program, request: &Value) -> Option<Value> {
    let (id, action) = (&request["request_id"], request["action"].as_str().unwrap_or_default());
    let name = request["data"]["name"].as_str().unwrap_or_default();
    let outcome = match action {
        "cancel" => return None,
        // Who does not answer is known, with the reason.
        "hello" => program.look().await.map(|()| {
            json!({ "version": VERSION, "actions": program.actions(), "implementation": program.shown() })
        }),
        "ping" => program.look().await.map(|()| json!({})),
        "memory.get_model_info" => program.models().await.map(|models| json!({ "loaded_models": models })),
        UNLOAD_MODEL => program.unload(name).await,
        RESTORE => program.restore(name).await,
        other => Err(format!("there is no action {other}")),
    };
    Some(match outcome {
        Ok(data) => json!({ "request_id": id, "success": true, "data": data }),
        Err(message) => {
            let error = json!({ "code": "WORKER_FAILED", "message": message });
            json!({ "request_id": id, "success": false, "error": error })
        }
    })
}
