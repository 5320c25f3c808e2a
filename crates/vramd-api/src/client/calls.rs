//! One method for each call.

use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Client, ClientError};
use crate::{
    AllocateRequest, Allocation, AllocationId, AllocationPage, AllocationStatus, AllocationType, CallWorker,
    ClearRequest, Cleared, CopyRequest, DefragmentPlans, DefragmentRequest, Device, DeviceLimits, DevicePage,
    DevicePressure, DeviceStatus, DeviceUsage, FootprintPage, Health, LimitsPage, LoadRequest, MemoryPlan,
    MemoryStatus, Model, ModelName, ModelPage, ModelStatus, ModelsOptimized, Operation, OperationId,
    OperationPage, OperationState, OptimizeModels, PlanRequest, PrefetchRequest, PressurePage, RegisterModel,
    Released, RenewRequest, ReserveRequest, SetLimits, StartWorker, TouchRequest, TransferRequest,
    UnloadRequest, UsagePage, Worker, WorkerAnswer, WorkerPage,
};

/// Which allocations to list, in which order, and from where on.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AllocationFilter {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub purpose: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocation_type: Option<AllocationType>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<AllocationStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
    /// `createdAt`, `sizeBytes`, or one of these with a minus before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sort: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_size: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_token: Option<String>,
}

/// Devices and memory. A device is named by its id or its uuid.
impl Client {
    pub async fn health(&self) -> Result<Health, ClientError> {
        self.get(&["healthz"]).await
    }

    pub async fn ready(&self) -> Result<Health, ClientError> {
        self.get(&["readyz"]).await
    }

    pub async fn devices(&self) -> Result<DevicePage, ClientError> {
        self.get(&["api", "devices"]).await
    }

    pub async fn device(&self, device: &str) -> Result<Device, ClientError> {
        self.get(&["api", "devices", device]).await
    }

    /// `include` may name `allocations`, `fragmentation` and `processes`.
    pub async fn memory_status(&self, include: &[&str]) -> Result<MemoryStatus, ClientError> {
        self.get_with(&["api", "memory", "status"], &include_query(include)).await
    }

    pub async fn device_status(&self, device: &str, include: &[&str]) -> Result<DeviceStatus, ClientError> {
        self.get_with(&["api", "memory", "status", device], &include_query(include)).await
    }

    /// Use over time; `window` and `step` are durations such as `15m`.
    pub async fn usage(&self, window: Option<&str>, step: Option<&str>) -> Result<UsagePage, ClientError> {
        self.get_with(&["api", "memory", "usage"], &span_query(window, step)).await
    }

    pub async fn device_usage(
        &self,
        device: &str,
        window: Option<&str>,
        step: Option<&str>,
    ) -> Result<DeviceUsage, ClientError> {
        self.get_with(&["api", "memory", "usage", device], &span_query(window, step)).await
    }

    /// One page; `device` narrows it to one device.
    pub async fn allocations(
        &self,
        device: Option<&str>,
        filter: &AllocationFilter,
    ) -> Result<AllocationPage, ClientError> {
        match device {
            Some(device) => self.get_with(&["api", "memory", "allocations", "device", device], filter).await,
            None => self.get_with(&["api", "memory", "allocations"], filter).await,
        }
    }

    /// All pages from `filter.page_token` on.
    pub async fn all_allocations(
        &self,
        device: Option<&str>,
        mut filter: AllocationFilter,
    ) -> Result<Vec<Allocation>, ClientError> {
        let mut all = Vec::new();
        loop {
            let page = self.allocations(device, &filter).await?;
            all.extend(page.allocations);
            filter.page_token = page.next_page_token;
            if filter.page_token.is_none() {
                return Ok(all);
            }
        }
    }

    pub async fn allocation(&self, id: AllocationId) -> Result<Allocation, ClientError> {
        self.get(&["api", "memory", "allocation", &id.to_string()]).await
    }

    /// Allocates on `device`, or on the best one.
    pub async fn allocate(
        &self,
        device: Option<&str>,
        request: &AllocateRequest,
    ) -> Result<Allocation, ClientError> {
        let mut path = vec!["api", "memory", "allocations", "allocate"];
        path.extend(device);
        self.post(&path, request).await
    }

    pub async fn renew(&self, id: AllocationId, request: &RenewRequest) -> Result<Allocation, ClientError> {
        self.post(&["api", "memory", "allocation", &id.to_string(), "renew"], request).await
    }

    /// `peak_bytes`: of a reservation, the most that was in use.
    pub async fn release(&self, id: AllocationId, peak_bytes: Option<u64>) -> Result<Released, ClientError> {
        let path = ["api", "memory", "allocations", &id.to_string()];
        let peak = peak_bytes.map(|bytes| ("peakBytes", bytes));
        self.send(self.request(Method::DELETE, &path).query(peak.as_slice())).await
    }

    /// Room for working memory.
    pub async fn reserve(&self, request: &ReserveRequest) -> Result<Allocation, ClientError> {
        self.post(&["api", "memory", "reservations"], request).await
    }

    pub async fn forget_footprints(&self, model: &ModelName) -> Result<FootprintPage, ClientError> {
        self.delete(&["api", "memory", "footprints", model.as_str()]).await
    }

    pub async fn footprints(&self, model: Option<&ModelName>) -> Result<FootprintPage, ClientError> {
        let of: Vec<_> = model.map(|model| ("model", model.as_str())).into_iter().collect();
        self.get_with(&["api", "memory", "footprints"], &of).await
    }

    pub async fn limits(&self) -> Result<LimitsPage, ClientError> {
        self.get(&["api", "memory", "limits"]).await
    }

    pub async fn device_limits(&self, device: &str) -> Result<DeviceLimits, ClientError> {
        self.get(&["api", "memory", "limits", device]).await
    }

    pub async fn set_limits(&self, device: &str, limits: &SetLimits) -> Result<DeviceLimits, ClientError> {
        self.send(self.request(Method::PUT, &["api", "memory", "limits", device]).json(limits)).await
    }
}

/// Models.
impl Client {
    pub async fn models(&self) -> Result<ModelPage, ClientError> {
        self.get(&["api", "models"]).await
    }

    pub async fn register_model(&self, request: &RegisterModel) -> Result<Model, ClientError> {
        self.post(&["api", "models"], request).await
    }

    pub async fn model(&self, name: &ModelName) -> Result<Model, ClientError> {
        self.get(&["api", "models", name.as_str()]).await
    }

    pub async fn remove_model(&self, name: &ModelName) -> Result<Model, ClientError> {
        self.delete(&["api", "models", name.as_str()]).await
    }

    /// Waits up to `wait_seconds` for the end; the operation says whether it came.
    pub async fn load(
        &self,
        name: &ModelName,
        request: &LoadRequest,
        wait_seconds: u32,
    ) -> Result<Operation, ClientError> {
        self.model_operation(name, "load", request, wait_seconds).await
    }

    /// Waits up to `wait_seconds` for the end; the operation says whether it came.
    pub async fn unload(
        &self,
        name: &ModelName,
        request: &UnloadRequest,
        wait_seconds: u32,
    ) -> Result<Operation, ClientError> {
        self.model_operation(name, "unload", request, wait_seconds).await
    }

    /// Waits up to `wait_seconds` for the end; the operation says whether it came.
    pub async fn prefetch(
        &self,
        name: &ModelName,
        request: &PrefetchRequest,
        wait_seconds: u32,
    ) -> Result<Operation, ClientError> {
        self.model_operation(name, "prefetch", request, wait_seconds).await
    }

    async fn model_operation(
        &self,
        name: &ModelName,
        what: &str,
        body: &impl Serialize,
        wait_seconds: u32,
    ) -> Result<Operation, ClientError> {
        self.begin(&["api", "models", name.as_str(), what], body, wait_seconds).await
    }

    pub async fn plan(&self, request: &PlanRequest) -> Result<MemoryPlan, ClientError> {
        self.post(&["api", "memory", "plan"], request).await
    }

    pub async fn pin(&self, name: &ModelName) -> Result<Model, ClientError> {
        self.send(self.request(Method::POST, &["api", "models", name.as_str(), "pin"])).await
    }

    pub async fn unpin(&self, name: &ModelName) -> Result<Model, ClientError> {
        self.send(self.request(Method::POST, &["api", "models", name.as_str(), "unpin"])).await
    }

    pub async fn touch(&self, name: &ModelName, request: &TouchRequest) -> Result<Model, ClientError> {
        self.post(&["api", "models", name.as_str(), "touch"], request).await
    }
}

/// What moves bytes.
impl Client {
    /// Waits up to `wait_seconds` for the end; the operation says whether it came.
    pub async fn transfer(
        &self,
        body: &TransferRequest,
        wait_seconds: u32,
    ) -> Result<Operation, ClientError> {
        self.begin(&["api", "memory", "transfer"], body, wait_seconds).await
    }

    /// The same.
    pub async fn copy(&self, body: &CopyRequest, wait_seconds: u32) -> Result<Operation, ClientError> {
        self.begin(&["api", "memory", "copy"], body, wait_seconds).await
    }

    /// Defragments `device`, or all. The same.
    pub async fn defragment(
        &self,
        device: Option<&str>,
        body: &DefragmentRequest,
        wait_seconds: u32,
    ) -> Result<Operation, ClientError> {
        let body = DefragmentRequest { dry_run: false, ..body.clone() };
        self.begin(&on(&["api", "memory", "operations", "defragment"], device), &body, wait_seconds).await
    }

    /// What [`Self::defragment`] would do.
    pub async fn plan_defragment(
        &self,
        device: Option<&str>,
        body: &DefragmentRequest,
    ) -> Result<DefragmentPlans, ClientError> {
        let body = DefragmentRequest { dry_run: true, ..body.clone() };
        self.begin(&on(&["api", "memory", "operations", "defragment"], device), &body, 0).await
    }

    /// Clears on `device`, or on all. Waits up to `wait_seconds` for the end.
    pub async fn clear(
        &self,
        device: Option<&str>,
        body: &ClearRequest,
        wait_seconds: u32,
    ) -> Result<Operation, ClientError> {
        let body = ClearRequest { dry_run: false, ..body.clone() };
        self.begin(&on(&["api", "memory", "operations", "clear"], device), &body, wait_seconds).await
    }

    /// What [`Self::clear`] would clear.
    pub async fn plan_clear(
        &self,
        device: Option<&str>,
        body: &ClearRequest,
    ) -> Result<Cleared, ClientError> {
        let body = ClearRequest { dry_run: true, ..body.clone() };
        self.begin(&on(&["api", "memory", "operations", "clear"], device), &body, 0).await
    }

    async fn begin<T: DeserializeOwned>(
        &self,
        path: &[&str],
        body: &impl Serialize,
        wait_seconds: u32,
    ) -> Result<T, ClientError> {
        self.send(self.request(Method::POST, path).query(&[("wait", wait_seconds)]).json(body)).await
    }
}

/// Pressure and models in one view.
impl Client {
    pub async fn pressure(&self) -> Result<PressurePage, ClientError> {
        self.get(&["api", "memory", "pressure"]).await
    }

    pub async fn device_pressure(&self, device: &str) -> Result<DevicePressure, ClientError> {
        self.get(&["api", "memory", "pressure", device]).await
    }

    /// The daemon's models and the workers' on a device.
    pub async fn model_status(&self, device: &str) -> Result<ModelStatus, ClientError> {
        self.get(&["api", "memory", "model", "status", device]).await
    }

    /// Has models go; answers once enough is free, or nothing more can go.
    pub async fn optimize_models(
        &self,
        device: &str,
        body: &OptimizeModels,
    ) -> Result<ModelsOptimized, ClientError> {
        self.post(&["api", "memory", "model", "optimize", device], body).await
    }
}

/// Workers, each by its name or id.
impl Client {
    pub async fn workers(&self) -> Result<WorkerPage, ClientError> {
        self.get(&["api", "workers"]).await
    }

    /// `include` may name `logs`.
    pub async fn worker(&self, worker: &str, include: &[&str]) -> Result<Worker, ClientError> {
        self.get_with(&["api", "workers", worker], &include_query(include)).await
    }

    pub async fn start_worker(&self, body: &StartWorker) -> Result<Worker, ClientError> {
        self.post(&["api", "workers"], body).await
    }

    /// Answers once it has ended.
    pub async fn stop_worker(&self, worker: &str) -> Result<Worker, ClientError> {
        self.delete(&["api", "workers", worker]).await
    }

    pub async fn call_worker(&self, worker: &str, body: &CallWorker) -> Result<WorkerAnswer, ClientError> {
        self.post(&["api", "workers", worker, "call"], body).await
    }
}

/// Operations.
impl Client {
    pub async fn pause(&self, id: OperationId) -> Result<Operation, ClientError> {
        self.send(self.request(Method::POST, &["api", "operations", &id.to_string(), "pause"])).await
    }

    pub async fn resume(&self, id: OperationId) -> Result<Operation, ClientError> {
        self.send(self.request(Method::POST, &["api", "operations", &id.to_string(), "resume"])).await
    }

    pub async fn operations(&self, state: Option<OperationState>) -> Result<OperationPage, ClientError> {
        let query: Vec<_> = state.map(|state| ("state", state)).into_iter().collect();
        self.get_with(&["api", "operations"], &query).await
    }

    /// Waits up to `wait_seconds` for the end.
    pub async fn operation(&self, id: OperationId, wait_seconds: u32) -> Result<Operation, ClientError> {
        self.get_with(&["api", "operations", &id.to_string()], &[("wait", wait_seconds)]).await
    }

    pub async fn cancel(&self, id: OperationId) -> Result<Operation, ClientError> {
        self.delete(&["api", "operations", &id.to_string()]).await
    }

    /// The `OpenAPI` document, which has no envelope.
    pub async fn openapi(&self) -> Result<serde_json::Value, ClientError> {
        let request = self.request(Method::GET, &["api", "openapi.json"]);
        let response = request.send().await.map_err(|error| self.transport(error))?;
        let status = response.status();
        let body = response.bytes().await.map_err(|error| self.transport(error))?;
        if !status.is_success() {
            return Err(self.refusal(status, &body));
        }
        serde_json::from_slice(&body).map_err(|error| self.protocol(error.to_string()))
    }
}

/// A path with the device at its end, if one is named.
fn on<'a>(path: &[&'a str], device: Option<&'a str>) -> Vec<&'a str> {
    path.iter().copied().chain(device).collect()
}

fn span_query<'a>(window: Option<&'a str>, step: Option<&'a str>) -> Vec<(&'static str, &'a str)> {
    window.map(|window| ("window", window)).into_iter().chain(step.map(|step| ("step", step))).collect()
}

fn include_query(include: &[&str]) -> Vec<(&'static str, String)> {
    if include.is_empty() { Vec::new() } else { vec![("include", include.join(","))] }
}
