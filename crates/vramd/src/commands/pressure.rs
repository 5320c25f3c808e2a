//! `vramd pressure`, `optimize`, and `models --device`.

use std::process::ExitCode;

use vramd_api::client::Client;
use vramd_api::{
    Bytes, DevicePressure, ModelStatus, ModelsOptimized, OptimizeModels, PressurePage, RecommendedAction,
};

use crate::arguments::OptimizeArguments;
use crate::error::CommandError;
use crate::output::{Output, list, percent, table, time_since, word};

pub async fn pressure(client: &Client, device: Option<&str>, output: Output) -> Result<(), CommandError> {
    match device {
        Some(device) => output.data(&client.device_pressure(device).await?, details),
        None => output.data(&client.pressure().await?, summary),
    }
}

fn summary(page: &PressurePage) -> String {
    let rows = page.devices.iter().map(|one| {
        [
            one.device_id.to_string(),
            word(one.pressure_level),
            percent(one.ratio),
            Bytes::show(one.available_memory),
            Bytes::show(one.total_memory),
            trend(one),
            if one.needed_bytes > 0 { Bytes::show(one.needed_bytes) } else { "-".to_owned() },
        ]
    });
    table(["DEVICE", "PRESSURE", ">RATIO", ">AVAILABLE", ">TOTAL", "TREND", ">NEEDED"], rows)
}

fn trend(one: &DevicePressure) -> String {
    match one.seconds_to_exhaustion {
        Some(seconds) => format!("{}, {seconds:.0} s left", word(one.trend)),
        None => word(one.trend),
    }
}

fn details(one: &DevicePressure) -> String {
    let rows = [
        ("device", one.device_id.to_string()),
        ("pressure", word(one.pressure_level)),
        ("ratio", percent(one.ratio)),
        ("available", Bytes::show(one.available_memory)),
        ("free", Bytes::show(one.free_memory)),
        ("total", Bytes::show(one.total_memory)),
        ("stalled", if one.stalled { "tasks wait for it" } else { "no" }.to_owned()),
        ("trend", trend(one)),
        ("needed", Bytes::show(one.needed_bytes)),
    ];
    format!("{}{}", list(&rows), recommendations(&one.recommended_actions))
}

fn recommendations(all: &[RecommendedAction]) -> String {
    if all.is_empty() {
        return String::new();
    }
    let rows = all.iter().map(|one| [Bytes::show(one.bytes), one.reason.clone(), one.call.clone()]);
    format!("\n{}", table([">WOULD FREE", "WHY", "CALL"], rows))
}

/// Exits 1 if what was asked for could not be freed.
pub async fn optimize(
    client: &Client,
    arguments: OptimizeArguments,
    output: Output,
) -> Result<ExitCode, CommandError> {
    let body = OptimizeModels {
        strategy: arguments.strategy,
        target_pressure_level: arguments.target,
        max_models_to_unload: arguments.max_models,
        min_memory_to_free: arguments.free,
        force_optimization: arguments.force,
        exclude_models: arguments.exclude,
        max_optimization_time_ms: arguments.timeout_seconds.map(|seconds| seconds.saturating_mul(1000)),
    };
    let done = client.optimize_models(&arguments.device, &body).await?;
    output.data(&done, optimized)?;
    let short = done.memory_freed < done.needed_bytes && done.optimization_triggered;
    Ok(if short { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn optimized(done: &ModelsOptimized) -> String {
    let rows = done.models_unloaded.iter().map(|one| {
        [
            one.component.as_ref().map_or_else(|| one.model.clone(), |part| format!("{}/{part}", one.model)),
            one.worker.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
            Bytes::show(one.asked_bytes),
            Bytes::show(one.acknowledged_bytes),
            Bytes::show(one.measured_bytes),
        ]
    });
    let models = if done.models_unloaded.is_empty() {
        String::new()
    } else {
        format!("{}\n", table(["MODEL", "WORKER", ">ASKED", ">ACKNOWLEDGED", ">MEASURED"], rows))
    };
    let errors = done.workers.iter().flat_map(|worker| worker.errors.iter().map(move |it| (worker, it)));
    let errors: Vec<_> = errors.map(|(worker, error)| format!("\n{}: {error}", worker.name)).collect();
    let errors = errors.concat();
    format!(
        "{models}{} ({} ms); pressure is {}{errors}",
        done.message,
        done.optimization_time_ms,
        word(done.new_pressure_level)
    )
}

/// All models of a device.
pub fn models(status: &ModelStatus) -> String {
    let rows = status.loaded_models.iter().map(|model| {
        [
            model.name.clone(),
            model.worker.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
            Bytes::show(model.bytes),
            if model.busy { "busy" } else { "idle" }.to_owned(),
            model.attached_count.to_string(),
            model.last_used_at.map_or_else(|| "never".to_owned(), time_since),
        ]
    });
    let heads = ["MODEL", "WORKER", ">SIZE", "STATE", ">ATTACHED", "USED"];
    let totals = [
        ("models", Bytes::show(status.model_memory.resident_bytes)),
        ("workers", Bytes::show(status.total_memory_usage - status.model_memory.resident_bytes)),
        ("available", Bytes::show(status.available_for_models)),
        ("pressure", word(status.pressure_level)),
    ];
    let notes: Vec<_> = status.worker_memory.notes.iter().map(|note| format!("\n{note}")).collect();
    let notes = notes.concat();
    format!("{}\n{}{notes}", table(heads, rows), list(&totals))
}
