//! Refusals, in words and figures.

use serde_json::json;
use vramd_api::{AllocationId, ApiError, Bytes, ErrorCode, OperationId, OwnerName};
use vramd_core::ledger::Shortage;
use vramd_core::queue::MAX_WAITING;

use super::Caller;

/// On the Unix socket an ordinary user frees, renews and attaches only what carries their own uid.
pub(super) fn owned(id: AllocationId, owner: &OwnerName, caller: Caller) -> Result<(), ApiError> {
    let Some(uid) = caller.uid else { return Ok(()) };
    let mine = format!("uid:{uid}");
    let same =
        owner.as_str().strip_prefix(&mine).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if same || caller.is_admin() {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::PermissionDenied,
        format!("allocation {id} belongs to {owner}, not to {mine}"),
    ))
}

pub(super) fn too_many_wait() -> ApiError {
    let what = format!("{MAX_WAITING} requests wait for memory already");
    ApiError::new(ErrorCode::TooManyRequests, what)
        .hint("try again later, or ask with onShortage=fail")
        .detail("limit", MAX_WAITING)
}

pub(super) fn being_released(id: AllocationId) -> ApiError {
    ApiError::new(ErrorCode::Conflict, format!("allocation {id} is being released already"))
        .hint("its bytes are back in a moment")
}

/// Something cannot go because processes are attached to it.
pub(super) fn attached(what: &str, holders: &[vramd_api::Holder]) -> ApiError {
    let names: Vec<_> =
        holders.iter().take(3).map(|holder| format!("{} ({})", holder.command, holder.pid)).collect();
    let more = holders.len().saturating_sub(names.len());
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    ApiError::new(ErrorCode::Conflict, format!("{what} is attached by {}{more}", names.join(", ")))
        .hint("it can go once these processes have closed it")
        .detail("holders", json!(holders))
}

/// A refusal that began a defragmentation.
pub(super) fn refused(shortage: &Shortage, packing: Option<OperationId>) -> ApiError {
    let error = refusal(shortage);
    match packing {
        None => error,
        Some(operation) => error
            .hint("the device is being defragmented for it: try again in a moment, or wait with onShortage=wait")
            .detail("operationId", operation.to_string()),
    }
}

/// A request that was not admitted, in words and figures.
pub(super) fn refusal(shortage: &Shortage) -> ApiError {
    if shortage.lost {
        return ApiError::new(ErrorCode::DeviceLost, "the device is lost")
            .hint("other devices go on working; restart the daemon once the device is back");
    }
    let holders: Vec<_> =
        shortage.holders.iter().map(|(owner, bytes)| json!({ "owner": owner, "bytes": bytes })).collect();
    let largest = shortage.largest_free_bytes;
    let hint = if shortage.limited_by.is_some() {
        "release some of it, or raise that limit: PUT /api/memory/limits/DEVICE"
    } else if !shortage.could_fit && shortage.placement.considered.len() == 1 {
        "that device could not hold it, even empty: ask for less, or name another"
    } else if !shortage.could_fit {
        "no device could hold it, even empty: ask for less"
    } else if shortage.requested_bytes <= shortage.largest_after_eviction_bytes {
        "it would fit once idle models are unloaded: `vramd ps` shows which, `vramd unload` unloads"
    } else if shortage.requested_bytes <= shortage.largest_after_compaction_bytes {
        "it would fit once the device is defragmented: `vramd defrag`"
    } else if shortage.requested_bytes <= shortage.available_bytes {
        "there is enough in all, but not in one piece"
    } else {
        "`vramd ps` shows who holds memory; ask for less, wait with onShortage=wait, or raise the limit"
    };
    let figures = [shortage.requested_bytes, shortage.available_bytes, largest];
    let mut shown = figures.map(Bytes::show);
    // Rounded, what lacks may not be seen.
    if shown[0] == shown[1] || shown[0] == shown[2] {
        shown = figures.map(|bytes| format!("{bytes} B"));
    }
    let [asked, available, piece] = shown;
    let what = match &shortage.limited_by {
        Some(limit) => format!("{asked} asked, and {limit}"),
        None => format!("{asked} asked, {available} available to it, the largest piece is {piece}"),
    };
    let mut error = ApiError::new(ErrorCode::InsufficientMemory, what);
    error.retryable = shortage.could_fit;
    error
        .hint(hint)
        .detail("requestedBytes", shortage.requested_bytes)
        .detail("availableBytes", shortage.available_bytes)
        .detail("largestFreeBytes", largest)
        .detail("largestAfterEvictionBytes", shortage.largest_after_eviction_bytes)
        .detail("largestAfterDefragmentationBytes", shortage.largest_after_compaction_bytes)
        .detail("holders", holders)
        .detail("considered", json!(shortage.placement.considered))
}

/// What only its owner's process can do with a reservation.
pub(super) fn only_room(id: AllocationId) -> ApiError {
    ApiError::new(ErrorCode::Conflict, format!("allocation {id} is only room: vramd has no bytes of it"))
        .hint("the process that it is reserved for makes them")
        .detail("allocationId", json!(id))
}

/// The refusal of one that had no idle model in its way.
pub(super) fn nothing_to_evict(error: ApiError) -> ApiError {
    if error.code != ErrorCode::InsufficientMemory || !error.retryable {
        return error;
    }
    error.hint("no idle models that may go are enough: `vramd ps` shows who holds memory; ask for less, or wait with timeoutSeconds")
}

/// The refusal of one whose time is over.
pub(super) fn timed_out(mut error: ApiError) -> ApiError {
    if error.code == ErrorCode::InsufficientMemory {
        error.code = ErrorCode::Timeout;
        error.status = error.code.status();
        error.message = format!("no room came up in time: {}", error.message);
    }
    error
}
