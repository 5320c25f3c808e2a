//! REST: the routes, what every request passes through, and the OpenAPI document that comes out of both.

mod devices;
mod events;
mod extract;
mod guard;
mod health;
mod idempotency;
mod memory;
mod models;
mod operations;
mod reply;
mod workers;

use std::ops::Deref;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use vramd_api::ApiError;

pub use extract::Peer;

use self::reply::Refusal;
use crate::driver::Driver;
use crate::source::Roots;
use crate::usage::UsageHistory;
use crate::workers::Programs;

/// The largest body of a request.
const MAX_BODY_BYTES: usize = 1 << 20;

/// What the handlers share; every request has a copy.
#[derive(Debug, Clone)]
pub struct App(Arc<Shared>);

#[derive(Debug)]
pub struct Shared {
    pub driver: Driver,
    pub roots: Arc<Roots>,
    pub programs: Arc<Programs>,
    pub usage: UsageHistory,
    pub(crate) idempotency: idempotency::Keys,
    pub(crate) event_streams: Arc<tokio::sync::Semaphore>,
    /// The port that an `Origin` has to name.
    pub(crate) port: Option<u16>,
}

impl App {
    pub fn new(
        driver: Driver,
        roots: Arc<Roots>,
        programs: Arc<Programs>,
        usage: UsageHistory,
        port: Option<u16>,
    ) -> Self {
        Self(Arc::new(Shared {
            driver,
            roots,
            programs,
            usage,
            idempotency: idempotency::Keys::default(),
            event_streams: Arc::new(tokio::sync::Semaphore::new(events::MAX_STREAMS)),
            port,
        }))
    }
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "vramd",
        description = "The memory daemon for AI inference machines. Sizes are bytes, times RFC 3339 in UTC. Every \
                       answer is an envelope: `success`, `requestId`, and `data` or `error`."
    ),
    // Those that no body or answer names by its type.
    components(schemas(memory::allocations::Sort, vramd_api::ComponentSource, vramd_api::Failure)),
    tags(
        (name = "devices", description = "Places that memory can be"),
        (name = "memory", description = "Status, allocations, leases and limits"),
        (name = "models", description = "Registered models and where they are resident"),
        (name = "operations", description = "What takes time"),
        (name = "workers", description = "Processes with model memory of their own"),
        (name = "events", description = "What happened"),
        (name = "daemon", description = "The daemon itself"),
    )
)]
struct Document;

fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(devices::list))
        .routes(routes!(devices::get))
        .routes(routes!(memory::status::all))
        .routes(routes!(memory::status::one))
        .routes(routes!(memory::usage::all))
        .routes(routes!(memory::usage::one))
        .routes(routes!(memory::allocations::list))
        .routes(routes!(memory::allocations::list_on))
        .routes(routes!(memory::allocations::get))
        .routes(routes!(memory::allocations::renew))
        .routes(routes!(memory::allocations::allocate))
        .routes(routes!(memory::allocations::allocate_on))
        .routes(routes!(memory::allocations::release))
        .routes(routes!(memory::transfers::begin))
        .routes(routes!(memory::transfers::get, memory::transfers::cancel))
        .routes(routes!(memory::transfers::copy))
        .routes(routes!(memory::clear::all))
        .routes(routes!(memory::clear::one))
        .routes(routes!(memory::defragment::all))
        .routes(routes!(memory::defragment::one))
        .routes(routes!(memory::plan::plan))
        .routes(routes!(memory::pressure::all))
        .routes(routes!(memory::pressure::one))
        .routes(routes!(memory::pressure::model_status))
        .routes(routes!(memory::pressure::optimize))
        .routes(routes!(memory::reservations::reserve))
        .routes(routes!(memory::reservations::footprints))
        .routes(routes!(memory::reservations::forget))
        .routes(routes!(memory::limits::list))
        .routes(routes!(memory::limits::get, memory::limits::put))
        .routes(routes!(models::list, models::register))
        .routes(routes!(models::get, models::remove))
        .routes(routes!(models::load))
        .routes(routes!(models::prefetch))
        .routes(routes!(models::unload))
        .routes(routes!(models::pin))
        .routes(routes!(models::unpin))
        .routes(routes!(models::touch))
        .routes(routes!(operations::list))
        .routes(routes!(operations::get, operations::cancel))
        .routes(routes!(operations::pause))
        .routes(routes!(operations::resume))
        .routes(routes!(workers::list, workers::start))
        .routes(routes!(workers::get, workers::stop))
        .routes(routes!(workers::call))
        .routes(routes!(events::stream))
        .routes(routes!(health::healthz))
        .routes(routes!(health::readyz))
}

/// The OpenAPI document, pretty-printed, as `openapi/vramd.json` holds it.
pub fn openapi_json() -> String {
    let mut text = routes().into_openapi().to_pretty_json().expect("the document is plain data");
    text.push('\n');
    text
}

/// The whole service: the routes, and what every request passes through before them.
///
/// That is no layer of the router: axum boxes every layer around every route, and copies the pile for each request.
#[derive(Debug)]
pub struct Service {
    app: App,
    router: Router,
}

impl Service {
    pub fn new(app: App) -> Self {
        let (router, document) = routes().split_for_parts();
        let docs = utoipa_swagger_ui::SwaggerUi::new("/docs").url("/api/openapi.json", document);
        let router = router
            .merge(docs)
            .fallback(reply::not_found)
            .method_not_allowed_fallback(reply::method_not_allowed)
            .with_state(app.clone());
        Self { app, router }
    }

    /// Answers one request.
    pub async fn answer(&self, request: Request) -> Response {
        reply::with_request_id(request, async |request| match guard::check(&request, self.app.port) {
            Ok(()) => idempotency::once(&self.app, request, self.router.clone()).await,
            Err(error) => Refusal(error).into_response(),
        })
        .await
    }
}

/// A name in a path that is none.
fn bad_path(field: &str, error: &vramd_api::BadName) -> ApiError {
    ApiError::invalid(field, error.to_string())
}
