//! `/api/memory/plan`.

use std::collections::BTreeMap;

use axum::extract::State;
use vramd_api::{ApiError, ComponentName, MAX_PLANNED, MemoryPlan, ModelName, PlanRequest, Success};

use crate::driver::{Event, PlanLoads, PlannedLoad};
use crate::http::App;
use crate::http::extract::{Body, NoParams, Params};
use crate::http::reply::{Answer, Errors, ok};
use crate::{loader, requests};

/// What loads would come to
///
/// Nothing is loaded, reserved or evicted. Each model is tried beside those before it, on a copy of the books: where it would go, what
/// would go for it, and how long it would take. What a running operation changes meanwhile is not foreseen.
#[utoipa::path(post, path = "/api/memory/plan", tag = "memory", request_body = PlanRequest,
    responses((status = 200, body = Success<MemoryPlan>), Errors))]
pub async fn plan(
    State(app): State<App>,
    _: Params<NoParams>,
    Body(body): Body<PlanRequest>,
) -> Answer<MemoryPlan> {
    if body.models.is_empty() || body.models.len() > MAX_PLANNED {
        let what = format!("a plan is of 1 to {MAX_PLANNED} models, not of {}", body.models.len());
        return Err(ApiError::invalid("models", what).into());
    }
    let named = |device: &Option<String>| device.as_ref().map(|name| app.driver.devices.id(name)).transpose();
    let everywhere = named(&body.device_id)?;
    let mut models: Vec<PlannedLoad> = Vec::new();
    for (index, item) in body.models.into_iter().enumerate() {
        if models.iter().any(|other| other.model == item.model) {
            let what = format!("models[{index}] names {} a second time", item.model);
            return Err(ApiError::invalid("models", what).into());
        }
        if item.components.as_ref().is_some_and(Vec::is_empty) {
            let what = format!("models[{index}] names no component");
            return Err(ApiError::invalid("models", what).hint("leave out components for all").into());
        }
        let device = named(&item.device_id)?.or_else(|| everywhere.clone());
        let run = item.working_memory;
        run.as_ref().map_or(Ok(()), |run| requests::check_shape(&run.shape))?;
        models.push(PlannedLoad { model: item.model, components: item.components, device, run });
    }
    read_headers(&app, models.iter().map(|one| &one.model)).await?;
    let request = Box::new(PlanLoads { models });
    ok(app.driver.ask(|reply| Event::PlanLoads(request, reply)).await?)
}

/// Models of an earlier run: how large they are was not read yet.
async fn read_headers(app: &App, names: impl Iterator<Item = &ModelName>) -> Result<(), ApiError> {
    let snapshot = app.driver.snapshot();
    for name in names {
        let Some(model) = snapshot.models.get(name) else { continue };
        let unread = model.components.iter().filter(|(_, entry)| entry.plan.is_err());
        let unread: BTreeMap<ComponentName, String> =
            unread.map(|(component, entry)| (component.clone(), entry.path.clone())).collect();
        if !unread.is_empty() {
            let prepared = loader::prepare(&app.roots, unread).await?;
            let plans = prepared.into_iter().map(|(component, one)| (component, Ok(one.plan))).collect();
            app.driver.tell(Event::Inspected(name.clone(), plans)).await;
        }
    }
    Ok(())
}
