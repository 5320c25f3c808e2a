//! `vramd load`, `unload`, `operations`, `pause`, `resume`, `cancel`: work that takes time, with a progress bar.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use vramd_api::client::{Client, ClientError};
use vramd_api::{
    Bytes, LoadRequest, ModelName, Operation, OperationId, OperationPage, OperationState, PrefetchRequest,
    UnloadRequest,
};

use crate::arguments::LoadArguments;
use crate::error::CommandError;
use crate::output::{Output, percent, span, table, time_since, word};
use crate::system::{Interrupts, interrupts};

/// One long poll; the daemon allows up to 600.
const WAIT_SECONDS: u32 = 60;
/// How often the bar moves.
const REFRESH: Duration = Duration::from_millis(100);

pub async fn load(client: &Client, arguments: LoadArguments, output: Output) -> Result<(), CommandError> {
    let request = LoadRequest {
        device_id: arguments.device,
        components: (!arguments.component.is_empty()).then_some(arguments.component),
        keep_alive: arguments.keep_alive,
        on_shortage: arguments.on_shortage,
        timeout_seconds: arguments.timeout_seconds,
        split: arguments.split,
        checksum: arguments.checksum,
    };
    if arguments.no_wait {
        let operation = client.load(&arguments.model, &request, 0).await?;
        return output.data(&operation, |operation| operation.operation_id.to_string());
    }
    // Heard before the load exists, so that there is no moment in which Ctrl-C would leave it running.
    let interrupts = interrupts()?;
    let operation = client.load(&arguments.model, &request, 0).await?;
    finish(client, operation, interrupts, output).await
}

pub async fn prefetch(
    client: &Client,
    model: &ModelName,
    device_id: Option<String>,
    output: Output,
) -> Result<(), CommandError> {
    let interrupts = interrupts()?;
    let operation = client.prefetch(model, &PrefetchRequest { device_id }, 0).await?;
    finish(client, operation, interrupts, output).await
}

pub async fn unload(
    client: &Client,
    model: &ModelName,
    device_id: Option<String>,
    output: Output,
) -> Result<(), CommandError> {
    let interrupts = interrupts()?;
    let operation = client.unload(model, &UnloadRequest { device_id }, 0).await?;
    finish(client, operation, interrupts, output).await
}

pub async fn operations(
    client: &Client,
    id: Option<OperationId>,
    state: Option<OperationState>,
    output: Output,
) -> Result<(), CommandError> {
    match id {
        Some(id) => {
            let operation = client.operation(id, 0).await?;
            output.data(&operation, |it| rows(std::slice::from_ref(it)))?;
            if let Some(error) = operation.error {
                output.say(&format!("{}: {}", error.code, error.message));
            }
            Ok(())
        }
        None => output.data(&client.operations(state).await?, |page: &OperationPage| rows(&page.operations)),
    }
}

pub async fn cancel(client: &Client, id: OperationId, output: Output) -> Result<(), CommandError> {
    output.data(&client.cancel(id).await?, |it| rows(std::slice::from_ref(it)))
}

pub async fn pause(client: &Client, id: OperationId, output: Output) -> Result<(), CommandError> {
    output.data(&client.pause(id).await?, |it| rows(std::slice::from_ref(it)))
}

pub async fn resume(client: &Client, id: OperationId, output: Output) -> Result<(), CommandError> {
    output.data(&client.resume(id).await?, |it| rows(std::slice::from_ref(it)))
}

/// Follows an operation to its end. Ctrl-C cancels it.
pub async fn finish(
    client: &Client,
    operation: Operation,
    interrupts: Interrupts,
    output: Output,
) -> Result<(), CommandError> {
    finish_with(client, operation, interrupts, output, ended).await
}

/// The same; `show` prints what it brought.
pub async fn finish_with(
    client: &Client,
    operation: Operation,
    interrupts: Interrupts,
    output: Output,
    show: impl FnOnce(&Operation) -> String,
) -> Result<(), CommandError> {
    let operation = if operation.state.ended() {
        operation
    } else {
        follow(client, operation, interrupts, output).await?
    };
    if let Some(error) = operation.error.clone() {
        return Err(CommandError::Operation(Box::new(error)));
    }
    // Where the parts of a model went.
    if let Some(reason) = operation.result.as_ref().and_then(|it| it["reason"].as_str()) {
        output.say(reason);
    }
    output.data(&operation, show)
}

async fn follow(
    client: &Client,
    operation: Operation,
    mut interrupts: Interrupts,
    output: Output,
) -> Result<Operation, CommandError> {
    let id = operation.operation_id;
    let bar = bar(&operation);
    let mut refresh = tokio::time::interval(REFRESH);
    let mut end = Box::pin(wait_for_end(client, id));
    let mut cancelled = false;
    let operation = loop {
        tokio::select! {
            operation = &mut end => break operation?,
            _ = interrupts.recv(), if !cancelled => {
                cancelled = true;
                bar.suspend(|| output.say(&format!("cancelling {} …", operation.subject)));
                match client.cancel(id).await {
                    // It ended before the cancel came: the end itself says how.
                    Err(error) if error.api().is_some() => {}
                    other => { other?; }
                }
            }
            _ = refresh.tick(), if !bar.is_hidden() => show(&bar, &client.operation(id, 0).await?),
        }
    };
    bar.finish_and_clear();
    Ok(operation)
}

async fn wait_for_end(client: &Client, id: OperationId) -> Result<Operation, ClientError> {
    loop {
        let operation = client.operation(id, WAIT_SECONDS).await?;
        if operation.state.ended() {
            return Ok(operation);
        }
    }
}

/// Hidden by itself where standard error is no terminal.
fn bar(operation: &Operation) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
    )
    .expect("the template is a constant");
    let bar = ProgressBar::new(operation.bytes_total).with_style(style.progress_chars("=> "));
    bar.set_message(operation.subject.clone());
    bar
}

fn show(bar: &ProgressBar, operation: &Operation) {
    let waits = operation.state == OperationState::Queued;
    bar.set_message(if waits {
        format!("{} waits for room", operation.subject)
    } else {
        operation.subject.clone()
    });
    bar.set_length(operation.bytes_total);
    bar.set_position(operation.bytes_done);
}

pub fn ended(operation: &Operation) -> String {
    let seconds =
        operation.finished_at.map_or(0.0, |end| end.duration_since(operation.started_at).as_secs_f64());
    let speed =
        operation.bytes_per_second.map_or_else(String::new, |speed| format!(", {}/s", Bytes::show(speed)));
    let bytes = Bytes::show(operation.bytes_done);
    let went = went(operation);
    format!(
        "{} {} {}: {bytes} in {seconds:.2} s{speed}{went}",
        word(operation.kind),
        operation.subject,
        word(operation.state)
    )
}

/// What was unloaded for a load.
fn went(operation: &Operation) -> String {
    let evicted = operation.result.as_ref().and_then(|result| result["evicted"].as_array());
    let names: Vec<_> = evicted
        .into_iter()
        .flatten()
        .map(|one| {
            format!("{}/{}", one["model"].as_str().unwrap_or("?"), one["component"].as_str().unwrap_or("?"))
        })
        .collect();
    if names.is_empty() { String::new() } else { format!("\nunloaded for it: {}", names.join(", ")) }
}

fn rows(operations: &[Operation]) -> String {
    table(
        ["OPERATION", "KIND", "SUBJECT", "STATE", ">DONE", ">TOTAL", "LEFT", "STARTED"],
        operations.iter().map(|operation| {
            let done = operation.bytes_done as f64 / operation.bytes_total.max(1) as f64;
            [
                operation.operation_id.to_string(),
                word(operation.kind),
                operation.subject.clone(),
                if operation.paused { "paused".to_owned() } else { word(operation.state) },
                percent(if operation.bytes_total == 0 && operation.state.ended() { 1.0 } else { done }),
                Bytes::show(operation.bytes_total),
                operation.seconds_left.map_or_else(|| "-".to_owned(), |left| span(left.ceil() as i64)),
                time_since(operation.started_at),
            ]
        }),
    )
}
