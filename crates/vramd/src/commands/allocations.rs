//! `vramd alloc`, `free`, `renew`, `allocations`, `ps`.

use std::process::ExitCode;

use serde::Serialize;
use vramd_api::client::{AllocationFilter, Client};
use vramd_api::{
    AllocateRequest, Allocation, AllocationId, AllocationPage, Bytes, DeviceId, Lease, LeaseKind, OwnerName,
    Released, RenewRequest, Reservation,
};

use crate::arguments::{AllocArguments, AllocationsArguments};
use crate::error::CommandError;
use crate::output::{Output, table, time_since, time_until, word};

pub async fn alloc(client: &Client, arguments: AllocArguments, output: Output) -> Result<(), CommandError> {
    let request = AllocateRequest {
        size_bytes: arguments.size,
        alignment: arguments.alignment,
        allocation_type: arguments.allocation_type,
        memory_type: arguments.memory_type,
        purpose: arguments.terms.purpose,
        priority: arguments.terms.priority,
        persistent: arguments.persistent,
        timeout_seconds: arguments.terms.timeout_seconds,
        lease_seconds: arguments.lease_seconds,
        on_shortage: arguments.terms.on_shortage,
        owner: arguments.terms.owner,
    };
    let allocation = client.allocate(arguments.device.as_deref(), &request).await?;
    let leases = leases(&allocation);
    let reason = allocation.placement.as_ref().map_or_else(String::new, |it| format!(": {}", it.reason));
    output.say(&format!(
        "{} on {}{reason}; lease {leases}",
        Bytes::show(allocation.block_bytes),
        allocation.device_id
    ));
    output.data(&allocation, |allocation| allocation.allocation_id.to_string())
}

/// Releases as many as it can, and fails as the worst of them did.
pub async fn free(
    client: &Client,
    ids: &[AllocationId],
    peak: Option<u64>,
    output: Output,
) -> Result<ExitCode, CommandError> {
    #[derive(Serialize)]
    struct Page {
        released: Vec<Released>,
    }
    if peak.is_some() && ids.len() > 1 {
        let message = "--peak is of one reservation".to_owned();
        return Err(CommandError::Usage { message, hint: "free them one by one".to_owned() });
    }
    let mut page = Page { released: Vec::new() };
    let mut failed = None;
    for id in ids {
        match client.release(*id, peak).await {
            Ok(released) => page.released.push(released),
            Err(error) if error.api().is_some() => {
                let error = CommandError::from(error);
                output.error(&error);
                failed = Some(error.exit_code());
            }
            Err(error) => return Err(error.into()),
        }
    }
    if !page.released.is_empty() {
        output.data(&page, |page| {
            let rows = page.released.iter().map(|released| {
                [
                    released.allocation_id.to_string(),
                    released.device_id.to_string(),
                    Bytes::show(released.released_bytes),
                ]
            });
            table(["RELEASED", "DEVICE", ">SIZE"], rows)
        })?;
    }
    Ok(failed.unwrap_or(ExitCode::SUCCESS))
}

pub async fn renew(
    client: &Client,
    id: AllocationId,
    request: &RenewRequest,
    output: Output,
) -> Result<(), CommandError> {
    let allocation = client.renew(id, request).await?;
    output.data(&allocation, |allocation| format!("{id}   lease {}", leases(allocation)))
}

pub async fn list(
    client: &Client,
    arguments: AllocationsArguments,
    output: Output,
) -> Result<(), CommandError> {
    let filter = AllocationFilter {
        owner: arguments.owner,
        purpose: arguments.purpose,
        allocation_type: arguments.allocation_type,
        persistent: arguments.persistent.then_some(true),
        sort: arguments.sort,
        ..AllocationFilter::default()
    };
    let allocations = client.all_allocations(arguments.device.as_deref(), filter).await?;
    output.data(&AllocationPage { allocations, next_page_token: None }, |page| {
        table(
            ["ALLOCATION", "DEVICE", ">SIZE", "TYPE", "OWNER", "PURPOSE", "CREATED", "LEASE"],
            page.allocations.iter().map(|allocation| {
                [
                    allocation.allocation_id.to_string(),
                    allocation.device_id.to_string(),
                    Bytes::show(allocation.block_bytes),
                    word(allocation.allocation_type),
                    allocation.owner.to_string(),
                    dash(&allocation.purpose),
                    time_since(allocation.created_at),
                    format!("{}{}", room(allocation.reservation.as_ref()), leases(allocation)),
                ]
            }),
        )
    })
}

/// One lease on one allocation: who holds what.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Holding<'a> {
    allocation_id: AllocationId,
    device_id: &'a DeviceId,
    block_bytes: u64,
    owner: &'a OwnerName,
    purpose: &'a str,
    lease: &'a Lease,
    #[serde(skip_serializing_if = "Option::is_none")]
    reservation: Option<&'a Reservation>,
}

pub async fn holders(client: &Client, device: Option<String>, output: Output) -> Result<(), CommandError> {
    #[derive(Serialize)]
    struct Page<'a> {
        holders: Vec<Holding<'a>>,
    }
    let filter = AllocationFilter { sort: Some("-sizeBytes".to_owned()), ..AllocationFilter::default() };
    let allocations = client.all_allocations(device.as_deref(), filter).await?;
    let holders = allocations.iter().flat_map(|allocation| {
        allocation.leases.iter().map(|lease| Holding {
            allocation_id: allocation.allocation_id,
            device_id: &allocation.device_id,
            block_bytes: allocation.block_bytes,
            owner: &allocation.owner,
            purpose: &allocation.purpose,
            lease,
            reservation: allocation.reservation.as_ref(),
        })
    });
    output.data(&Page { holders: holders.collect() }, |page| {
        table(
            [">PID", "COMMAND", "OWNER", "DEVICE", ">SIZE", "PURPOSE", "LEASE", "ALLOCATION"],
            page.holders.iter().map(|holding| {
                let process = holding.lease.holder.as_ref();
                let reserved_for = holding.reservation.and_then(|it| it.pid);
                [
                    process
                        .map(|it| it.pid)
                        .or(reserved_for)
                        .map_or_else(|| "-".to_owned(), |it| it.to_string()),
                    process.map_or_else(|| "-".to_owned(), |it| it.command.clone()),
                    holding.owner.to_string(),
                    holding.device_id.to_string(),
                    Bytes::show(holding.block_bytes),
                    dash(holding.purpose),
                    format!("{}{}", room(holding.reservation), lease(holding.lease)),
                    holding.allocation_id.to_string(),
                ]
            }),
        )
    })
}

pub(super) fn dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

pub(super) fn leases(allocation: &Allocation) -> String {
    let all: Vec<_> = allocation.leases.iter().map(lease).collect();
    dash(&all.join(", "))
}

/// What an allocation without bytes of its own is.
fn room(reservation: Option<&Reservation>) -> &'static str {
    if reservation.is_some() { "reservation, " } else { "" }
}

fn lease(lease: &Lease) -> String {
    match (lease.kind, lease.expires_at) {
        (LeaseKind::TimeToLive, Some(end)) => format!("expires {}", time_until(end)),
        (LeaseKind::TimeToLive, None) => "expires".to_owned(),
        (LeaseKind::Connection, _) => "connection".to_owned(),
        (LeaseKind::Persistent, _) => "persistent".to_owned(),
        (LeaseKind::Model, _) => "model".to_owned(),
        (LeaseKind::Operation, _) => "operation".to_owned(),
    }
}
