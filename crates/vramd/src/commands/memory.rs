//! `vramd status`, `devices`.

use vramd_api::client::Client;
use vramd_api::{Bytes, DeviceCapabilities, DeviceStatus};

use crate::error::CommandError;
use crate::output::{Output, list, percent, table, time_since, word};

pub async fn status(client: &Client, device: Option<String>, output: Output) -> Result<(), CommandError> {
    if let Some(device) = device {
        let status = client.device_status(&device, &["fragmentation", "processes"]).await?;
        return output.data(&status, details);
    }
    let status = client.memory_status(&[]).await?;
    output.data(&status, |status| {
        let header = [
            "DEVICE",
            "TYPE",
            ">USED",
            ">ALLOCATED",
            ">AVAILABLE",
            ">TOTAL",
            ">LIMIT",
            "PRESSURE",
            ">HEALTH",
        ];
        table(
            header,
            status.devices.iter().map(|device| {
                [
                    device.device_id.to_string(),
                    word(device.memory_type),
                    Bytes::show(device.used_bytes),
                    Bytes::show(device.allocated_bytes),
                    Bytes::show(device.available_bytes),
                    Bytes::show(device.total_bytes),
                    Bytes::show(device.limit_bytes),
                    format!("{} {}", word(device.pressure.level), percent(device.pressure.ratio)),
                    device.health_score.to_string(),
                ]
            }),
        )
    })
}

fn details(status: &DeviceStatus) -> String {
    let size = |bytes| Bytes::show(bytes);
    let mut rows = vec![
        ("device", status.device_id.to_string()),
        ("uuid", status.uuid.clone()),
        ("name", status.name.clone()),
        ("memory", format!("{}, {}", word(status.memory_type), word(status.health))),
        ("total", size(status.total_bytes)),
        ("used", format!("{} ({})", size(status.used_bytes), percent(status.utilization))),
        (
            "  allocated",
            format!("{} in {} allocations", size(status.allocated_bytes), status.allocation_count),
        ),
        ("  pool", size(status.pool_free_bytes)),
        ("  reserved", size(status.reserved_bytes)),
        ("  workers", size(status.worker_bytes)),
        ("  foreign", size(status.foreign_bytes)),
        ("  unknown", size(status.unknown_bytes)),
        (
            "available",
            format!(
                "{}, at most {} in one piece",
                size(status.available_bytes),
                size(status.largest_free_bytes)
            ),
        ),
        ("  ready", size(status.ready_bytes)),
        ("limit", size(status.limit_bytes)),
        ("fragmentation", percent(status.fragmentation)),
        ("pressure", format!("{} {}", word(status.pressure.level), percent(status.pressure.ratio))),
        ("health", format!("{} of 100", status.health_score)),
        ("sampled", time_since(status.sampled_at)),
    ];
    if let Some(fragmentation) = &status.fragmentation_details {
        rows.push((
            "segments",
            format!("{}, {} holes", fragmentation.segment_count, fragmentation.hole_count),
        ));
    }
    for process in status.used_by.iter().flatten() {
        let used = process.used_bytes.map_or_else(|| "?".to_owned(), Bytes::show);
        rows.push(("used by", format!("{} {}, {used}", process.pid, process.command)));
    }
    for process in status.processes.iter().flatten() {
        rows.push(("attached", format!("{} {}", process.pid, process.command)));
    }
    list(&rows)
}

pub async fn devices(client: &Client, output: Output) -> Result<(), CommandError> {
    output.data(&client.devices().await?, |page| {
        let devices = table(
            ["DEVICE", "TYPE", ">TOTAL", "HEALTH", "CAN", "NAME"],
            page.devices.iter().map(|device| {
                [
                    device.device_id.to_string(),
                    word(device.memory_type),
                    Bytes::show(device.total_bytes),
                    word(device.health),
                    capabilities(device.capabilities),
                    device.name.clone(),
                ]
            }),
        );
        let notes = page
            .devices
            .iter()
            .flat_map(|device| device.notes.iter().map(move |note| format!("{}: {note}", device.device_id)));
        std::iter::once(devices).chain(notes).collect::<Vec<_>>().join("\n")
    })
}

fn capabilities(can: DeviceCapabilities) -> String {
    let all = [
        (can.handle.is_some(), "export"),
        (can.host_access, "host-access"),
        (can.remap, "remap"),
        (can.sparse, "sparse"),
        (can.peer_copy, "peer-copy"),
    ];
    let words: Vec<_> = all.into_iter().filter_map(|(can, word)| can.then_some(word)).collect();
    words.join(",")
}
