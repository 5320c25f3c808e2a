//! `/api/memory/allocations` and `/api/memory/allocation`.

use std::cmp::Ordering;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use vramd_api::{
    AllocateRequest, Allocation, AllocationId, AllocationPage, AllocationStatus, AllocationType, ApiError,
    DeviceId, OwnerName, Released, RenewRequest, Success,
};

use crate::driver::{Caller, Event};
use crate::http::extract::{Body, NoParams, OptionalBody, Params, Path};
use crate::http::idempotency::IdempotencyKey;
use crate::http::reply::{Answer, Errors, created, ok};
use crate::http::{App, bad_path};
use crate::requests;

const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1000;

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[into_params(parameter_in = Query)]
pub struct ListParams {
    #[param(required = false, value_type = String)]
    owner: Option<OwnerName>,
    #[param(required = false)]
    purpose: Option<String>,
    #[param(required = false)]
    allocation_type: Option<AllocationType>,
    #[param(required = false)]
    status: Option<AllocationStatus>,
    #[param(required = false)]
    persistent: Option<bool>,
    /// Default: `createdAt`
    #[param(required = false)]
    sort: Option<Sort>,
    /// Default: 100
    #[param(required = false, minimum = 1, maximum = 1000)]
    page_size: Option<usize>,
    /// `nextPageToken` of the page before
    #[param(required = false, format = Uuid)]
    page_token: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Sort {
    #[default]
    #[serde(rename = "createdAt")]
    Oldest,
    #[serde(rename = "-createdAt")]
    Newest,
    #[serde(rename = "sizeBytes")]
    Smallest,
    #[serde(rename = "-sizeBytes")]
    Largest,
}

impl Sort {
    fn order(self, a: &Allocation, b: &Allocation) -> Ordering {
        let oldest = a.allocation_id.cmp(&b.allocation_id);
        match self {
            Self::Oldest => oldest,
            Self::Newest => oldest.reverse(),
            Self::Smallest => a.size_bytes.cmp(&b.size_bytes).then(oldest),
            Self::Largest => b.size_bytes.cmp(&a.size_bytes).then(oldest),
        }
    }
}

impl ListParams {
    fn page(&self, app: &App, device: Option<&DeviceId>) -> Result<AllocationPage, ApiError> {
        let size = self.page_size.unwrap_or(DEFAULT_PAGE);
        if !(1..=MAX_PAGE).contains(&size) {
            return Err(ApiError::invalid(
                "pageSize",
                format!("pageSize {size} is not from 1 to {MAX_PAGE}"),
            ));
        }
        let after: Option<AllocationId> =
            self.page_token.as_ref().map(|token| token.parse()).transpose().map_err(|_| {
                ApiError::invalid("pageToken", "pageToken is not one that a page carried")
                    .hint("begin again without it")
            })?;
        let snapshot = app.driver.snapshot();
        let sort = self.sort.unwrap_or_default();
        let is = |wanted: &Option<String>, text: &str| wanted.as_ref().is_none_or(|wanted| wanted == text);
        let mut found: Vec<Allocation> = snapshot
            .allocations
            .values()
            .filter(|allocation| device.is_none_or(|device| *device == allocation.device))
            .filter(|allocation| is(&self.purpose, &allocation.request.purpose))
            .filter(|allocation| self.owner.as_ref().is_none_or(|owner| *owner == allocation.request.owner))
            .filter_map(|allocation| allocation.to_api())
            .filter(|shown| self.allocation_type.is_none_or(|wanted| wanted == shown.allocation_type))
            .filter(|shown| self.status.is_none_or(|wanted| wanted == shown.status))
            .filter(|shown| self.persistent.is_none_or(|wanted| wanted == shown.persistent))
            .collect();
        found.sort_by(|a, b| sort.order(a, b));
        if let Some(after) = after {
            // The one that ended the last page may be gone: by age its id still says where to go on.
            let start = match sort {
                Sort::Oldest => found.partition_point(|shown| shown.allocation_id <= after),
                Sort::Newest => found.partition_point(|shown| shown.allocation_id >= after),
                Sort::Smallest | Sort::Largest => {
                    let at = found.iter().position(|shown| shown.allocation_id == after);
                    at.ok_or_else(|| {
                        ApiError::invalid("pageToken", "the allocation that the last page ended with is gone")
                            .hint("begin again without pageToken, or sort by createdAt")
                    })? + 1
                }
            };
            found.drain(..start);
        }
        let more = found.len() > size;
        found.truncate(size);
        let next_page_token = more.then(|| found.last().map(|last| last.allocation_id.to_string())).flatten();
        Ok(AllocationPage { allocations: found, next_page_token })
    }
}

fn id(text: &str) -> Result<AllocationId, ApiError> {
    text.parse().map_err(|error| bad_path("allocationId", &error))
}

/// All live allocations
#[utoipa::path(get, path = "/api/memory/allocations", tag = "memory", params(ListParams),
    responses((status = 200, body = Success<AllocationPage>), Errors))]
pub async fn list(State(app): State<App>, Params(params): Params<ListParams>) -> Answer<AllocationPage> {
    ok(params.page(&app, None)?)
}

/// The live allocations of one device
#[utoipa::path(get, path = "/api/memory/allocations/device/{deviceId}", tag = "memory",
    params(("deviceId" = String, Path, description = "A device's id or uuid"), ListParams),
    responses((status = 200, body = Success<AllocationPage>), Errors))]
pub async fn list_on(
    State(app): State<App>,
    Path(name): Path,
    Params(params): Params<ListParams>,
) -> Answer<AllocationPage> {
    let device = app.driver.devices.id(&name)?;
    ok(params.page(&app, Some(&device))?)
}

/// One allocation, with its history
#[utoipa::path(get, path = "/api/memory/allocation/{allocationId}", tag = "memory",
    params(("allocationId" = AllocationId, Path)),
    responses((status = 200, body = Success<Allocation>), Errors))]
pub async fn get(State(app): State<App>, Path(text): Path, _: Params<NoParams>) -> Answer<Allocation> {
    let id = id(&text)?;
    let snapshot = app.driver.snapshot();
    let mut shown = snapshot.allocation(id).ok_or_else(|| ApiError::not_found("allocation", id))?;
    shown.history = snapshot.allocations.get(&id).map(|found| found.history.iter().cloned().collect());
    ok(shown)
}

/// Allocate on the best device
///
/// The reply says which device was chosen, why, and how the others stood. The memory is kept while its lease is
/// renewed, while a process has it attached, or until it is deleted if it is persistent.
#[utoipa::path(post, path = "/api/memory/allocations/allocate", tag = "memory", request_body = AllocateRequest,
    params(IdempotencyKey),
    responses((status = 201, body = Success<Allocation>), Errors))]
pub async fn allocate(
    State(app): State<App>,
    caller: Caller,
    _: Params<NoParams>,
    Body(body): Body<AllocateRequest>,
) -> Answer<Allocation> {
    let allocate = requests::allocate(body, None, caller)?;
    created(app.driver.ask(|reply| Event::Allocate(Box::new(allocate), reply)).await?)
}

/// Allocate on one device
#[utoipa::path(post, path = "/api/memory/allocations/allocate/{deviceId}", tag = "memory", request_body = AllocateRequest,
    params(("deviceId" = String, Path, description = "A device's id or uuid"),
        IdempotencyKey),
    responses((status = 201, body = Success<Allocation>), Errors))]
pub async fn allocate_on(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path,
    _: Params<NoParams>,
    Body(body): Body<AllocateRequest>,
) -> Answer<Allocation> {
    let device = app.driver.devices.id(&name)?;
    let allocate = requests::allocate(body, Some(device), caller)?;
    created(app.driver.ask(|reply| Event::Allocate(Box::new(allocate), reply)).await?)
}

/// Renew the lease of an allocation
#[utoipa::path(post, path = "/api/memory/allocation/{allocationId}/renew", tag = "memory",
    request_body = Option<RenewRequest>, params(("allocationId" = AllocationId, Path)),
    responses((status = 200, body = Success<Allocation>), Errors))]
pub async fn renew(
    State(app): State<App>,
    caller: Caller,
    Path(text): Path,
    _: Params<NoParams>,
    OptionalBody(body): OptionalBody<RenewRequest>,
) -> Answer<Allocation> {
    let id = id(&text)?;
    body.lease_seconds.map(requests::lease_seconds).transpose()?;
    ok(app.driver.ask(|reply| Event::Renew(id, body, caller, reply)).await?)
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[into_params(parameter_in = Query)]
pub struct ReleaseParams {
    /// Of a reservation: the most that was in use, which goes before what was measured; 0 teaches nothing
    #[param(required = false)]
    peak_bytes: Option<u64>,
}

/// Release an allocation
///
/// Answers when its bytes are back with the device. While processes have it attached it is refused with 409, which
/// names them.
#[utoipa::path(delete, path = "/api/memory/allocations/{allocationId}", tag = "memory",
    params(("allocationId" = AllocationId, Path), ReleaseParams),
    responses((status = 200, body = Success<Released>), Errors))]
pub async fn release(
    State(app): State<App>,
    caller: Caller,
    Path(text): Path,
    Params(params): Params<ReleaseParams>,
) -> Answer<Released> {
    let id = id(&text)?;
    ok(app.driver.ask(|reply| Event::Release(id, params.peak_bytes, caller, reply)).await?)
}
