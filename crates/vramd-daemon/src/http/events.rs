//! `/api/events`: server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event as Sse, KeepAlive, Sse as Stream};
use axum::response::{IntoResponse, Response};
use vramd_api::{ApiError, ErrorCode, Event, EventKind};

use super::App;
use super::extract::{NoParams, Params};
use super::reply::{Errors, Refusal};
use crate::clock;

/// The most streams at one time.
pub const MAX_STREAMS: usize = 64;
const HEARTBEAT: Duration = Duration::from_secs(10);

/// What happens, as it happens
///
/// Each event has an `id`, its kind as `event`, and an `Event` as `data`. With `Last-Event-ID` the stream goes on
/// after that event; when that is no longer possible it begins with `reset`. A reader that is too slow gets a
/// `lag` event with the number of events that it missed. A comment comes every ten seconds.
/// `daemon.stopping` is the last event.
#[utoipa::path(get, path = "/api/events", tag = "events",
    params(("Last-Event-ID" = Option<String>, Header, description = "The id of the last event that was seen")),
    responses((status = 200, body = Event, content_type = "text/event-stream"), Errors))]
pub async fn stream(State(app): State<App>, headers: HeaderMap, _: Params<NoParams>) -> Response {
    let Ok(place) = app.event_streams.clone().try_acquire_owned() else {
        let error =
            ApiError::new(ErrorCode::TooManyRequests, format!("{MAX_STREAMS} clients follow events already"))
                .hint("close one of them, then try again")
                .detail("limit", MAX_STREAMS);
        return Refusal(error).into_response();
    };
    let resume = headers.get("last-event-id").map(|id| id.to_str().unwrap_or_default());
    let follower = app.driver.log.follow(resume, clock::wall());
    let events =
        futures_util::stream::unfold((follower, place, false), |(mut follower, place, last)| async move {
            if last {
                return None;
            }
            let event = follower.next().await?;
            let sse = Sse::default()
                .id(event.id.as_str())
                .event(event.event.to_string())
                .data(serde_json::to_string(&event).expect("events are plain data"));
            let last = event.event == EventKind::DaemonStopping;
            Some((Ok::<_, Infallible>(sse), (follower, place, last)))
        });
    Stream::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT).text("heartbeat")).into_response()
}
