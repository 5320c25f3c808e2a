//! `vramd reserve`, `footprints`.

use vramd_api::client::Client;
use vramd_api::{Basis, Bytes, FootprintPage, ModelName, ReserveRequest};

use super::allocations::{dash, leases};
use crate::arguments::ReserveArguments;
use crate::error::CommandError;
use crate::output::{Output, table, time_since};

pub async fn reserve(
    client: &Client,
    arguments: ReserveArguments,
    output: Output,
) -> Result<(), CommandError> {
    let request = ReserveRequest {
        device_id: arguments.device,
        model: arguments.model,
        shape: arguments.shape.map(|shape| shape.0).unwrap_or_default(),
        size_bytes: arguments.size,
        pid: arguments.pid,
        held_bytes: arguments.held,
        allocation_type: arguments.allocation_type,
        purpose: arguments.terms.purpose,
        priority: arguments.terms.priority,
        timeout_seconds: arguments.terms.timeout_seconds,
        lease_seconds: arguments.lease_seconds,
        on_shortage: arguments.terms.on_shortage,
        owner: arguments.terms.owner,
    };
    let reserved = client.reserve(&request).await?;
    let why = reserved.reservation.as_ref().map_or("", |it| match it.basis {
        Basis::Estimate => "as was said",
        Basis::Learned => "as runs of that shape took",
        Basis::Interpolated => "by what runs of other shapes took",
    });
    let (size, device) = (Bytes::show(reserved.block_bytes), &reserved.device_id);
    output.say(&format!("{size} on {device}, {why}; lease {}", leases(&reserved)));
    output.data(&reserved, |reserved| reserved.allocation_id.to_string())
}

pub async fn footprints(
    client: &Client,
    model: Option<ModelName>,
    forget: bool,
    output: Output,
) -> Result<(), CommandError> {
    let page = match &model {
        Some(model) if forget => client.forget_footprints(model).await?,
        model => client.footprints(model.as_ref()).await?,
    };
    output.data(&page, shown)
}

fn shown(page: &FootprintPage) -> String {
    let percent = |share: f64| format!("{:+.0} %", share * 100.0);
    let rows = page.footprints.iter().map(|one| {
        let shape: Vec<_> = one.shape.iter().map(u64::to_string).collect();
        [
            one.model.to_string(),
            one.device_id.to_string(),
            dash(&shape.join("x")),
            one.estimate_bytes.map_or_else(|| "-".to_owned(), Bytes::show),
            Bytes::show(one.learned_bytes),
            percent(one.error),
            percent(one.mean_error).trim_start_matches('+').to_owned(),
            one.run_count.to_string(),
            time_since(one.updated_at),
        ]
    });
    let heads =
        ["MODEL", "DEVICE", "SHAPE", ">ESTIMATE", ">LEARNED", ">ERROR", ">MEAN ERROR", ">RUNS", "UPDATED"];
    table(heads, rows)
}
