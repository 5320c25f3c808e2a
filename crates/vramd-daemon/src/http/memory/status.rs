//! `/api/memory/status`.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::State;
use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};
use utoipa::IntoParams;
use vramd_api::{ApiError, DeviceProcess, DeviceStatus, MemoryStatus, Success};
use vramd_device::{Device, Process};

use crate::driver::{Snapshot, memory_status};
use crate::http::App;
use crate::http::extract::{Params, Path};
use crate::http::memory::usage;
use crate::http::reply::{Answer, Errors, ok};
use crate::platform;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct StatusParams {
    /// What to add to each device, separated by commas: `allocations`, `usage`, `fragmentation`, `processes`
    #[param(
        required = false,
        pattern = "^((allocations|usage|fragmentation|processes)(,(allocations|usage|fragmentation|processes))*)?$"
    )]
    include: Option<String>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // what is asked for, in any combination
struct Include {
    allocations: bool,
    usage: bool,
    fragmentation: bool,
    processes: bool,
}

impl Include {
    fn nothing(self) -> bool {
        self == Self::default()
    }
}

impl StatusParams {
    fn parse(&self) -> Result<Include, ApiError> {
        let mut include = Include::default();
        for word in self.include.iter().flat_map(|text| text.split(',')).filter(|word| !word.is_empty()) {
            match word {
                "allocations" => include.allocations = true,
                "usage" => include.usage = true,
                "fragmentation" => include.fragmentation = true,
                "processes" => include.processes = true,
                _ => {
                    return Err(ApiError::invalid(
                        "include",
                        format!("there is nothing called {word:?} to include"),
                    )
                    .hint(
                        "include takes allocations, usage, fragmentation and processes, separated by commas",
                    ));
                }
            }
        }
        Ok(include)
    }
}

/// All devices, and their sum
#[utoipa::path(get, path = "/api/memory/status", tag = "memory", params(StatusParams),
    responses((status = 200, body = Success<MemoryStatus>), Errors))]
pub async fn all(State(app): State<App>, Params(params): Params<StatusParams>) -> Answer<Arc<RawValue>> {
    let include = params.parse()?;
    let snapshot = app.driver.snapshot();
    let mut used_by = HashMap::new();
    if include.processes {
        for device in app.driver.devices.iter() {
            used_by.insert(device.facts().device.clone(), processes(device).await);
        }
    }
    let print = || {
        let devices = app.driver.devices.iter().filter_map(|device| {
            let used_by = used_by.get(&device.facts().device).cloned().flatten();
            Some(DeviceStatus { used_by, ..status(&app, &snapshot, device.as_ref(), include)? })
        });
        let status = to_raw_value(&memory_status(devices.collect())).expect("figures and names always print");
        Arc::from(status)
    };
    // Monitors ask for nothing else, many times between two snapshots.
    ok(if include.nothing() { snapshot.status_printed.get_or_init(print).clone() } else { print() })
}

/// One device
#[utoipa::path(get, path = "/api/memory/status/{deviceId}", tag = "memory",
    params(("deviceId" = String, Path, description = "A device's id or uuid"), StatusParams),
    responses((status = 200, body = Success<DeviceStatus>), Errors))]
pub async fn one(
    State(app): State<App>,
    Path(name): Path,
    Params(params): Params<StatusParams>,
) -> Answer<DeviceStatus> {
    let include = params.parse()?;
    let device = app.driver.devices.named(&name)?;
    let used_by = if include.processes { processes(device).await } else { None };
    let status = status(&app, &app.driver.snapshot(), device.as_ref(), include);
    let status = status.ok_or_else(|| ApiError::not_found("device", &name))?;
    ok(DeviceStatus { used_by, ..status })
}

/// Who uses a device, by its driver's word.
async fn processes(device: &Arc<dyn Device>) -> Option<Vec<DeviceProcess>> {
    let device = device.clone();
    let asked = tokio::task::spawn_blocking(move || {
        let found = device.processes().inspect_err(|error| {
            tracing::debug!(device = %device.facts().device, %error, "the driver does not say who uses it");
        });
        let named =
            |Process { pid, used_bytes }| DeviceProcess { pid, command: platform::command(pid), used_bytes };
        Some(found.ok()??.into_iter().map(named).collect())
    });
    asked.await.ok().flatten()
}

fn status(app: &App, snapshot: &Snapshot, device: &dyn Device, include: Include) -> Option<DeviceStatus> {
    let id = &device.facts().device;
    let view = snapshot.device(id)?;
    let mut status = view.status(device);
    if include.allocations {
        let on_device = snapshot.allocations.values().filter(|allocation| allocation.device == *id);
        status.allocations = Some(on_device.filter_map(|allocation| allocation.to_api()).collect());
    }
    if include.usage {
        status.usage = Some(usage::show(app, id, usage::HOUR));
    }
    if include.fragmentation {
        status.fragmentation_details = Some(view.fragmentation());
    }
    if include.processes {
        status.processes = Some(snapshot.processes(id));
    }
    Some(status)
}
