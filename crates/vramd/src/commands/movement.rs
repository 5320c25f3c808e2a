//! `vramd transfer`, `copy`, `defrag`, `clear`.

use vramd_api::client::Client;
use vramd_api::{
    Bytes, ClearRequest, Cleared, CopyRequest, DefragmentPlan, DefragmentRequest, Defragmented,
    DeviceDefragmented, FixedBlock, Operation, TransferItem, TransferMode, TransferRequest, Transferred,
};

use super::operations::{ended, finish_with};
use crate::arguments::{ClearArguments, CopyArguments, DefragArguments, Movable, TransferArguments};
use crate::error::CommandError;
use crate::output::{Output, list, span, table, word};
use crate::system::interrupts;

pub async fn transfer(
    client: &Client,
    arguments: TransferArguments,
    output: Output,
) -> Result<(), CommandError> {
    let from = arguments.from;
    let items = arguments
        .items
        .into_iter()
        .map(|item| match item {
            Movable::Allocation(id) => TransferItem { allocation_id: Some(id), ..TransferItem::default() },
            Movable::Model(target) => TransferItem {
                model: Some(target.model),
                component: target.component,
                source_device_id: from.clone(),
                ..TransferItem::default()
            },
        })
        .collect();
    let request = TransferRequest {
        items,
        target_device_id: arguments.to,
        mode: if arguments.copy { TransferMode::Copy } else { TransferMode::Move },
        checksum: arguments.checksum,
        priority: arguments.pace.priority.unwrap_or_default(),
        max_bytes_per_second: arguments.pace.max_rate,
    };
    let interrupts = interrupts()?;
    let operation = client.transfer(&request, 0).await?;
    if arguments.pace.no_wait {
        return output.data(&operation, |operation| operation.operation_id.to_string());
    }
    finish_with(client, operation, interrupts, output, transferred).await
}

pub async fn copy(client: &Client, arguments: CopyArguments, output: Output) -> Result<(), CommandError> {
    let request = CopyRequest {
        source_allocation_id: arguments.source,
        target_allocation_id: arguments.target,
        source_offset: arguments.source_offset,
        target_offset: arguments.target_offset,
        size_bytes: arguments.size,
        checksum: arguments.checksum,
        priority: arguments.pace.priority.unwrap_or_default(),
        max_bytes_per_second: arguments.pace.max_rate,
    };
    let interrupts = interrupts()?;
    let operation = client.copy(&request, 0).await?;
    if arguments.pace.no_wait {
        return output.data(&operation, |operation| operation.operation_id.to_string());
    }
    finish_with(client, operation, interrupts, output, ended).await
}

pub async fn defrag(client: &Client, arguments: DefragArguments, output: Output) -> Result<(), CommandError> {
    let request = DefragmentRequest {
        dry_run: arguments.dry_run,
        max_bytes: arguments.max_bytes,
        max_moves: arguments.max_moves,
        max_milliseconds: arguments.max_milliseconds,
        max_bytes_per_second: arguments.pace.max_rate,
        priority: arguments.pace.priority,
    };
    let device = arguments.device.as_deref();
    if arguments.dry_run {
        let plans = client.plan_defragment(device, &request).await?;
        return output.data(&plans, |plans| planned(&plans.plans));
    }
    let interrupts = interrupts()?;
    let operation = client.defragment(device, &request, 0).await?;
    if arguments.pace.no_wait {
        return output.data(&operation, |operation| operation.operation_id.to_string());
    }
    finish_with(client, operation, interrupts, output, defragmented).await
}

pub async fn clear(client: &Client, arguments: ClearArguments, output: Output) -> Result<(), CommandError> {
    let request = ClearRequest {
        what: arguments.what,
        owner: arguments.owner,
        allocation_id: arguments.allocation,
        dry_run: arguments.dry_run,
        force: arguments.force,
    };
    let device = arguments.device.as_deref();
    if arguments.dry_run {
        let cleared = client.plan_clear(device, &request).await?;
        return output.data(&cleared, show_cleared);
    }
    let interrupts = interrupts()?;
    let operation = client.clear(device, &request, 0).await?;
    finish_with(client, operation, interrupts, output, |operation| {
        result::<Cleared>(operation).map_or_else(|| ended(operation), |cleared| show_cleared(&cleared))
    })
    .await
}

/// What an operation brought, if it is of that shape.
fn result<T: serde::de::DeserializeOwned>(operation: &Operation) -> Option<T> {
    serde_json::from_value(operation.result.clone()?).ok()
}

fn transferred(operation: &Operation) -> String {
    let items: Vec<Transferred> = operation
        .result
        .as_ref()
        .and_then(|result| serde_json::from_value(result.get("items")?.clone()).ok())
        .unwrap_or_default();
    let rows = table(
        ["WHAT", "FROM", "TO", ">BYTES", "CHECKSUM", "COPY"],
        items.iter().map(|item| {
            let what = match (&item.model, &item.component) {
                (Some(model), Some(component)) => format!("{model}/{component}"),
                _ => item.allocation_id.to_string(),
            };
            [
                what,
                item.source_device_id.to_string(),
                item.target_device_id.to_string(),
                Bytes::show(item.bytes),
                item.checksum.as_ref().map_or_else(|| "-".to_owned(), |sum| sum.value.clone()),
                item.copy_allocation_id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
            ]
        }),
    );
    format!("{}\n{rows}", ended(operation))
}

fn planned(plans: &[DefragmentPlan]) -> String {
    let rows = table(
        ["DEVICE", ">MOVES", ">BYTES", "TIME", ">RECLAIMED", ">LARGEST NOW", ">LARGEST THEN", ">FIXED"],
        plans.iter().map(|plan| {
            [
                plan.device_id.to_string(),
                plan.moves.to_string(),
                Bytes::show(plan.bytes),
                plan.expected_seconds.map_or_else(|| "-".to_owned(), |left| span(left.ceil() as i64)),
                Bytes::show(plan.reclaimed_bytes),
                Bytes::show(plan.before.largest_free_bytes),
                Bytes::show(plan.after.largest_free_bytes),
                plan.fixed_count.to_string(),
            ]
        }),
    );
    plans.iter().fold(rows, |text, plan| text + &stays(&plan.fixed))
}

fn defragmented(operation: &Operation) -> String {
    let Some(result) = result::<Defragmented>(operation) else { return ended(operation) };
    let rows = table(
        ["DEVICE", ">MOVES", ">BYTES", ">PASSES", ">SEGMENTS", ">LARGEST BEFORE", ">LARGEST NOW", ">FIXED"],
        result.devices.iter().map(|device: &DeviceDefragmented| {
            [
                device.device_id.to_string(),
                device.moves.to_string(),
                Bytes::show(device.bytes),
                device.passes.to_string(),
                format!("{} to {}", device.before.segment_count, device.after.segment_count),
                Bytes::show(device.before.largest_free_bytes),
                Bytes::show(device.after.largest_free_bytes),
                device.fixed_count.to_string(),
            ]
        }),
    );
    let rows = result.devices.iter().fold(rows, |text, device| text + &stays(&device.fixed));
    format!("{}, ended by {}\n{rows}", ended(operation), word(result.ended_by))
}

/// What does not move, and why.
fn stays(fixed: &[FixedBlock]) -> String {
    if fixed.is_empty() {
        return String::new();
    }
    let rows = table(
        ["STAYS", "BECAUSE", "OF"],
        fixed.iter().map(|block| {
            let holders: Vec<_> =
                block.holders.iter().map(|holder| format!("{} ({})", holder.command, holder.pid)).collect();
            let holders = if holders.is_empty() { "-".to_owned() } else { holders.join(", ") };
            [block.allocation_id.to_string(), word(block.reason), holders]
        }),
    );
    format!("\n{rows}")
}

fn show_cleared(cleared: &Cleared) -> String {
    let names: Vec<_> = cleared.models.iter().map(ToString::to_string).collect();
    let mut rows = vec![("asked", Bytes::show(cleared.asked_bytes))];
    if !cleared.dry_run {
        rows.push(("acknowledged", Bytes::show(cleared.acknowledged_bytes)));
        let measured = cleared.measured_bytes.map_or_else(|| "unknown".to_owned(), Bytes::show);
        rows.push(("measured", measured));
    }
    rows.push(("allocations", cleared.allocations.len().to_string()));
    rows.push(("models", if names.is_empty() { "-".to_owned() } else { names.join(", ") }));
    list(&rows) + &stays(&cleared.kept)
}
