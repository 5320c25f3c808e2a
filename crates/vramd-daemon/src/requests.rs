//! Requests as the driver takes them: checked across fields, every default filled in.

use uuid::Uuid;
use vramd_api::{
    AllocateRequest, AllocationId, AllocationType, ApiError, Basis, Bytes, DeviceId, ErrorCode,
    MAX_DIMENSIONS, OnShortage, OwnerName, ReserveRequest, StartWorker, WorkerName,
};
use vramd_core::ledger::{Request, Room};

use crate::devices::Devices;
use crate::driver::{self, Allocate, Caller, Launch};
use crate::workers::Programs;

/// Bytes that any request is aligned to when it names no alignment.
const DEFAULT_ALIGNMENT: u64 = 256;
const MAX_ALIGNMENT: u64 = 2 << 20;
const MAX_PURPOSE: usize = 128;
pub const DEFAULT_LEASE_SECONDS: u64 = 300;
const MAX_LEASE_SECONDS: u64 = 365 * 24 * 3600;
const DEFAULT_WAIT_SECONDS: u64 = 30;
const MAX_WAIT_SECONDS: u64 = 24 * 3600;
pub const DEFAULT_HEARTBEAT_SECONDS: u64 = 5;
const MAX_HEARTBEAT_SECONDS: u64 = 3600;

/// Checks a request for memory by `caller`.
pub fn allocate(
    mut body: AllocateRequest,
    on: Option<DeviceId>,
    caller: Caller,
) -> Result<Allocate, ApiError> {
    let alignment = body.alignment.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(ApiError::invalid(
            "alignment",
            format!("alignment {alignment} is not a power of two up to {MAX_ALIGNMENT}"),
        )
        .hint(format!("use {DEFAULT_ALIGNMENT}, 4096 or {MAX_ALIGNMENT}, or leave it out")));
    }
    if body.purpose.chars().any(char::is_control) {
        return Err(ApiError::invalid("purpose", "purpose has control characters"));
    }
    if body.purpose.chars().count() > MAX_PURPOSE {
        return Err(ApiError::invalid("purpose", format!("purpose is longer than {MAX_PURPOSE} characters")));
    }
    let lease_seconds = match (body.persistent, body.lease_seconds) {
        (true, Some(_)) => {
            return Err(ApiError::invalid("leaseSeconds", "a persistent allocation has no lease that ends")
                .hint("leave out one of persistent and leaseSeconds"));
        }
        (true, None) => None,
        (false, seconds) => Some(lease_seconds(seconds.unwrap_or(DEFAULT_LEASE_SECONDS))?),
    };
    let shortage = shortage(body.on_shortage, body.timeout_seconds)?;
    let owner = owner(body.owner.take(), caller)?;
    body.owner = Some(owner.clone());
    body.alignment = Some(alignment);
    let request = request(AllocationId(Uuid::now_v7()), &body, owner);
    Ok(Allocate { request, on, reason: None, lease_seconds, shortage, body })
}

/// Checks a request for room that a process of its owner's fills.
pub fn reserve(body: ReserveRequest, on: Option<DeviceId>, caller: Caller) -> Result<Allocate, ApiError> {
    check_shape(&body.shape)?;
    if body.model.is_none() && !body.shape.is_empty() {
        let hint = "what is learned is learned for a model, device and shape";
        return Err(ApiError::invalid("model", "shape is of a model").hint(hint));
    }
    if body.model.is_none() && body.size_bytes.is_none() {
        return Err(ApiError::invalid("sizeBytes", "without a model, sizeBytes says how much to reserve"));
    }
    if let Some(pid) = body.pid.filter(|pid| !crate::platform::lives(*pid)) {
        let what = format!("no process {pid} is seen from here");
        return Err(
            ApiError::invalid("pid", what).hint("leave pid out where the daemon runs in another container")
        );
    }
    if let (Some(pid), Some(uid)) = (body.pid, caller.uid)
        && !caller.is_admin()
        && crate::platform::uid_of(pid) != Some(uid)
    {
        let error = ApiError::new(ErrorCode::PermissionDenied, format!("process {pid} is another user's"));
        return Err(error.hint("name a process of your own").detail("field", "pid"));
    }
    // Without one, how much it comes to is decided by what is known when it is its turn.
    let size = body.size_bytes.or(Bytes::new(1)).expect("1 is a size");
    let asked = AllocateRequest {
        allocation_type: body.allocation_type.unwrap_or(AllocationType::Activation),
        purpose: body.purpose,
        priority: body.priority,
        timeout_seconds: body.timeout_seconds,
        lease_seconds: body.lease_seconds,
        on_shortage: body.on_shortage,
        owner: body.owner,
        ..AllocateRequest::new(size)
    };
    let mut checked = allocate(asked, on, caller)?;
    checked.request.room = Some(Box::new(Room {
        model: body.model,
        shape: body.shape,
        basis: Basis::Estimate,
        estimate_bytes: body.size_bytes.map(Bytes::get),
        learned_bytes: None,
        pid: body.pid,
        held_bytes: body.held_bytes,
        base_bytes: None,
        used_bytes: 0,
        peak_bytes: None,
    }));
    Ok(checked)
}

/// Checks what the memory of a run depends on.
pub fn check_shape(shape: &[u64]) -> Result<(), ApiError> {
    if shape.len() > MAX_DIMENSIONS {
        let what = format!("shape has {} numbers, {MAX_DIMENSIONS} at most are known", shape.len());
        return Err(ApiError::invalid("shape", what));
    }
    if shape.contains(&0) {
        return Err(ApiError::invalid("shape", "shape has a 0").hint("leave out what a run has none of"));
    }
    Ok(())
}

/// Checks what a caller would set in a worker's environment: what its program's configuration leaves to callers.
pub fn environment(body: &StartWorker, programs: &Programs) -> Result<(), ApiError> {
    let allowed = programs.get(&body.program).map(|program| &*program.environment).unwrap_or_default();
    for (name, value) in &body.environment {
        let may = |one: &String| match one.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => name == one,
        };
        let field = |what: String| ApiError::invalid("environment", what);
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(field(format!("the variable {name:?} cannot be set")));
        }
        if !allowed.iter().any(may) {
            let hint = if allowed.is_empty() {
                format!(
                    "no variable may: list it as worker_programs.{}.environment in vramd.toml",
                    body.program
                )
            } else {
                format!("those that may be set are: {}", allowed.join(", "))
            };
            return Err(field(format!("{name} may not be set for {}", body.program)).hint(hint));
        }
    }
    Ok(())
}

/// Checks a request to start a worker, by somebody who may.
pub fn start_worker(body: StartWorker, programs: &Programs, devices: &Devices) -> Result<Launch, ApiError> {
    let Some(program) = programs.get(&body.program) else {
        let known: Vec<_> = programs.keys().map(WorkerName::as_str).collect();
        let hint = if known.is_empty() {
            "none is: name them with --worker-program or in vramd.toml".to_owned()
        } else {
            format!("those that may are: {}", known.join(", "))
        };
        let what = format!("{} is no program that may be started", body.program);
        return Err(ApiError::invalid("program", what).hint(hint));
    };
    let heartbeat_seconds = body.heartbeat_seconds.unwrap_or(DEFAULT_HEARTBEAT_SECONDS);
    if !(1..=MAX_HEARTBEAT_SECONDS).contains(&heartbeat_seconds) {
        let what = format!("heartbeatSeconds {heartbeat_seconds} is not from 1 to {MAX_HEARTBEAT_SECONDS}");
        return Err(ApiError::invalid("heartbeatSeconds", what));
    }
    Ok(Launch {
        program: body.program,
        name: body.name,
        command: program.command.clone(),
        environment: body.environment,
        device: body.device_id.map(|name| devices.id(&name)).transpose()?,
        limit_bytes: body.memory_limit_bytes.map(Bytes::get),
        restart: body.restart,
        heartbeat_seconds,
    })
}

/// What becomes of a request without room.
pub fn shortage(what: OnShortage, timeout_seconds: Option<u64>) -> Result<driver::OnShortage, ApiError> {
    if let Some(timeout) = timeout_seconds.filter(|timeout| *timeout > MAX_WAIT_SECONDS) {
        let what = format!("timeoutSeconds {timeout} is more than {MAX_WAIT_SECONDS}");
        return Err(ApiError::invalid("timeoutSeconds", what));
    }
    if let (OnShortage::Fail | OnShortage::Spill, Some(timeout @ 1..)) = (what, timeout_seconds) {
        let what = format!("timeoutSeconds {timeout} is for those who wait");
        return Err(
            ApiError::invalid("timeoutSeconds", what).hint("say onShortage=wait or evict, or leave it out")
        );
    }
    let wait_seconds = match what {
        OnShortage::Fail | OnShortage::Spill => None,
        OnShortage::Wait => Some(timeout_seconds.unwrap_or(DEFAULT_WAIT_SECONDS)),
        OnShortage::Evict => timeout_seconds,
    };
    Ok(driver::OnShortage {
        evict: what == OnShortage::Evict,
        spill: what == OnShortage::Spill,
        wait_seconds,
    })
}

/// The ledger's request for a checked body.
pub fn request(id: AllocationId, body: &AllocateRequest, owner: OwnerName) -> Request {
    Request {
        id,
        size_bytes: body.size_bytes.get(),
        alignment: body.alignment.unwrap_or(DEFAULT_ALIGNMENT),
        allocation_type: body.allocation_type,
        memory_type: body.memory_type,
        purpose: body.purpose.clone(),
        priority: body.priority,
        owner,
        persistent: body.persistent,
        generation: 1,
        sealed: false,
        room: None,
    }
}

/// A request for memory that would give the same allocation again.
pub fn body(request: &Request) -> AllocateRequest {
    AllocateRequest {
        alignment: Some(request.alignment),
        allocation_type: request.allocation_type,
        purpose: request.purpose.clone(),
        priority: request.priority,
        persistent: request.persistent,
        owner: Some(request.owner.clone()),
        ..AllocateRequest::new(Bytes::new(request.size_bytes).expect("it was asked for as one"))
    }
}

/// Checks the length of a lease.
pub fn lease_seconds(seconds: u64) -> Result<u64, ApiError> {
    if (1..=MAX_LEASE_SECONDS).contains(&seconds) {
        return Ok(seconds);
    }
    Err(ApiError::invalid(
        "leaseSeconds",
        format!("leaseSeconds {seconds} is not from 1 to {MAX_LEASE_SECONDS}"),
    ))
}

/// On the Unix socket an ordinary user owns only what carries their own uid; the daemon's user and root may use
/// any label.
fn owner(asked: Option<OwnerName>, caller: Caller) -> Result<OwnerName, ApiError> {
    let Some(uid) = caller.uid else {
        return Ok(asked.unwrap_or_else(|| "local".parse().expect("a valid owner")));
    };
    let mine = format!("uid:{uid}");
    let trusted = caller.is_admin();
    let name = match asked {
        None => mine,
        Some(label) if trusted => return Ok(label),
        Some(label) if label.as_str() == mine || label.as_str().starts_with(&format!("{mine}/")) => {
            return Ok(label);
        }
        Some(label) => format!("{mine}/{label}"),
    };
    name.parse().map_err(|error: vramd_api::BadName| ApiError::invalid("owner", error.to_string()))
}
