//! A server that does what vramd does less all work: the same library and paths, request bodies read into the
//! same types, answers of the same bytes, made once.

use std::path::Path;

use anyhow::Context as _;
use axum::Router;
use axum::body::Bytes;
use axum::extract::Json;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{delete, get, post};
use tokio::net::TcpListener;
use vramd_api::AllocateRequest;

pub async fn serve(status: &Path, allocated: &Path, released: &Path) -> anyhow::Result<()> {
    let status = body(status)?;
    let allocated = body(allocated)?;
    let released = body(released)?;
    let router = Router::new()
        .route("/api/memory/status", get(async move || json(StatusCode::OK, status.clone())))
        .route(
            "/api/memory/allocations/allocate/{device}",
            post(async move |Json(_): Json<AllocateRequest>| json(StatusCode::CREATED, allocated.clone())),
        )
        .route("/api/memory/allocations/{id}", delete(async move || json(StatusCode::OK, released.clone())));
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    println!("{}", listener.local_addr()?);
    axum::serve(
        axum::serve::ListenerExt::tap_io(listener, |stream| {
            let _ = stream.set_nodelay(true);
        }),
        router,
    )
    .await?;
    Ok(())
}

fn body(path: &Path) -> anyhow::Result<Bytes> {
    Ok(std::fs::read(path).with_context(|| path.display().to_string())?.into())
}

fn json(status: StatusCode, body: Bytes) -> impl IntoResponse {
    (status, [(header::CONTENT_TYPE, "application/json")], body)
}
