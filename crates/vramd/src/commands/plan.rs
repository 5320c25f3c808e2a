//! `vramd plan`.

use std::process::ExitCode;

use vramd_api::client::Client;
use vramd_api::{Bytes, DeviceId, EvictedComponent, MemoryPlan, PlanItem, PlanRequest, PlannedModel};

use crate::error::CommandError;
use crate::output::{Output, table, word};

pub async fn plan(
    client: &Client,
    models: Vec<PlanItem>,
    device_id: Option<String>,
    output: Output,
) -> Result<ExitCode, CommandError> {
    let plan = client.plan(&PlanRequest { models, device_id }).await?;
    output.data(&plan, show)?;
    Ok(if plan.fits { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn show(plan: &MemoryPlan) -> String {
    let rows = table(
        ["MODEL", "OUTCOME", "DEVICE", ">TAKES", ">SECONDS", "FROM", "FOR IT GOES"],
        plan.models.iter().map(|one| {
            [
                one.model.to_string(),
                outcome(one),
                one.device_id.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
                Bytes::show(one.bytes),
                format!("{:.2}", one.seconds),
                from(one),
                evicted(&one.evicted),
            ]
        }),
    );
    let end = if plan.fits {
        format!("\nall fit; {:.2} s in all", plan.seconds)
    } else if plan.largest_set.is_empty() {
        "\nnone of them fits".to_owned()
    } else {
        let names: Vec<_> = plan.largest_set.iter().map(ToString::to_string).collect();
        format!("\nnot all fit; together would: {}", names.join(", "))
    };
    rows + &end
}

fn outcome(one: &PlannedModel) -> String {
    match one.missing_bytes {
        Some(bytes) if bytes > 0 => format!("{}, lacks {}", word(one.outcome), Bytes::show(bytes)),
        _ => word(one.outcome),
    }
}

fn from(one: &PlannedModel) -> String {
    if one.bytes == 0 || one.device_id.is_none() {
        return "-".to_owned();
    }
    let places: Vec<_> = one.copied_from.iter().map(DeviceId::as_str).collect();
    if places.is_empty() { "disk".to_owned() } else { places.join(", ") }
}

fn evicted(all: &[EvictedComponent]) -> String {
    let names: Vec<_> = all.iter().map(|one| format!("{}/{}", one.model, one.component)).collect();
    if names.is_empty() { "-".to_owned() } else { names.join(", ") }
}
