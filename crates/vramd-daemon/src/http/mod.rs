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

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use vramd_api::ApiError;

pub use extract::Peer;

use crate::driver::Driver;
use crate::source::Roots;

/// The largest body of a request.
const MAX_BODY_BYTES: usize = 1 << 20;

/// What the handlers share.
#[derive(Debug, Clone)]
pub struct App {
    pub driver: Driver,
    pub roots: Arc<Roots>,
    pub(crate) idempotency: Arc<idempotency::Keys>,
    pub(crate) event_streams: Arc<tokio::sync::Semaphore>,
    /// The port that an `Origin` has to name.
    pub(crate) port: Option<u16>,
}

impl App {
    pub fn new(driver: Driver, roots: Arc<Roots>, port: Option<u16>) -> Self {
        Self {
            driver,
            roots,
            idempotency: Arc::default(),
            event_streams: Arc::new(tokio::sync::Semaphore::new(events::MAX_STREAMS)),
            port,
        }
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
        .routes(routes!(memory::allocations::list))
        .routes(routes!(memory::allocations::list_on))
        .routes(routes!(memory::allocations::get))
        .routes(routes!(memory::allocations::renew))
        .routes(routes!(memory::allocations::allocate))
        .routes(routes!(memory::allocations::allocate_on))
        .routes(routes!(memory::allocations::release))
        .routes(routes!(memory::limits::list))
        .routes(routes!(memory::limits::get, memory::limits::put))
        .routes(routes!(models::list, models::register))
        .routes(routes!(models::get, models::remove))
        .routes(routes!(models::load))
        .routes(routes!(models::unload))
        .routes(routes!(models::pin))
        .routes(routes!(models::unpin))
        .routes(routes!(models::touch))
        .routes(routes!(operations::list))
        .routes(routes!(operations::get, operations::cancel))
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

/// The whole service.
pub fn router(app: App) -> Router {
    let (router, document) = routes().split_for_parts();
    let docs = utoipa_swagger_ui::SwaggerUi::new("/docs").url("/api/openapi.json", document);
    router
        .merge(docs)
        .fallback(reply::not_found)
        .method_not_allowed_fallback(reply::method_not_allowed)
        .layer(middleware::from_fn_with_state(app.clone(), idempotency::layer))
        .layer(middleware::from_fn_with_state(app.clone(), guard::layer))
        .layer(middleware::from_fn(reply::with_request_id))
        .layer(DefaultBodyLimit::disable())
        .with_state(app)
}

/// A name in a path that is none.
fn bad_path(field: &str, error: &vramd_api::BadName) -> ApiError {
    ApiError::invalid(field, error.to_string())
}
