//! Requests to a worker and their answers: many in flight, in any order, each with its deadline.
//!
//! A caller writes its request itself and waits for its own answer; nobody waits for another's. What a worker does not read
//! is kept up to a bound, and refused beyond it.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{mpsc, oneshot};
use vramd_api::worker_protocol::{MAX_LINE_BYTES, Request, WorkerError};
use vramd_api::{ApiError, ErrorCode};

use super::log::Log;

/// The most bytes that wait to be read by a worker, but for one request however long.
const MOST_UNREAD_BYTES: usize = 32 << 20;
/// The most requests that wait for an answer.
const MOST_OPEN: usize = 16_384;
/// So many requests that nobody waits for any more are remembered, since their answers may still come.
const MOST_ABANDONED: usize = 16_384;
/// So much is written at once.
const WRITE_BYTES: usize = 256 << 10;

/// The way to a worker, for any number of callers.
#[derive(Debug, Clone)]
pub struct Link {
    shared: Arc<Shared>,
    outgoing: mpsc::UnboundedSender<Vec<u8>>,
}

/// What is to be written, for [`Writer::run`].
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    outgoing: mpsc::UnboundedReceiver<Vec<u8>>,
}

#[derive(Debug)]
struct Shared {
    last_id: AtomicU64,
    unread_bytes: AtomicUsize,
    open: Mutex<Open>,
    log: Arc<Log>,
}

#[derive(Debug, Default)]
struct Open {
    waiting: HashMap<u64, oneshot::Sender<Result<Value, WorkerError>>>,
    abandoned: VecDeque<u64>,
    is_over: bool,
}

impl Link {
    pub fn new(log: Arc<Log>) -> (Self, Writer) {
        let shared = Arc::new(Shared {
            last_id: AtomicU64::new(0),
            unread_bytes: AtomicUsize::new(0),
            open: Mutex::default(),
            log,
        });
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self { shared: shared.clone(), outgoing: sender }, Writer { shared, outgoing: receiver })
    }

    /// Asks, and waits for the answer. Who drops this tells the worker that nobody waits any more.
    pub async fn call(
        &self,
        action: &str,
        data: &impl Serialize,
        patience: Duration,
    ) -> Result<Value, ApiError> {
        let id = self.shared.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let deadline_ms = u64::try_from(patience.as_millis()).ok();
        let line = Request { request_id: &id.to_string(), action, data, deadline_ms }.encode();
        if line.len() > MAX_LINE_BYTES {
            let what = format!("the request has {} bytes", line.len());
            return Err(ApiError::new(ErrorCode::PayloadTooLarge, what).detail("limitBytes", MAX_LINE_BYTES));
        }
        let unread = self.shared.unread_bytes.load(Ordering::Acquire);
        if unread > 0 && unread + line.len() > MOST_UNREAD_BYTES {
            let what = format!("the worker does not read: {unread} bytes wait for it");
            return Err(unavailable(what));
        }
        let (sender, answer) = oneshot::channel();
        {
            let mut open = self.shared.open();
            if open.is_over {
                return Err(gone());
            }
            if open.waiting.len() >= MOST_OPEN {
                let what = format!("{MOST_OPEN} requests to the worker are open already");
                return Err(ApiError::new(ErrorCode::TooManyRequests, what).detail("limit", MOST_OPEN));
            }
            open.waiting.insert(id, sender);
        }
        let waiting = Waiting { link: self, id };
        self.send(line);
        match tokio::time::timeout(patience, answer).await {
            Ok(Ok(outcome)) => outcome.map_err(ApiError::from),
            Ok(Err(_)) => Err(gone()),
            Err(_) => {
                drop(waiting);
                let what =
                    format!("the worker did not answer {action} within {} seconds", patience.as_secs_f64());
                Err(ApiError::new(ErrorCode::Timeout, what)
                    .hint("`vramd workers` shows whether it answers at all"))
            }
        }
    }

    fn send(&self, line: Vec<u8>) {
        self.shared.unread_bytes.fetch_add(line.len(), Ordering::AcqRel);
        // If nobody writes any more, the link is over, or is about to be.
        let _ = self.outgoing.send(line);
    }

    /// An answer has come; says why it cannot be one.
    pub fn answered(&self, request_id: &str, outcome: Result<Value, WorkerError>) -> Result<(), String> {
        let mut open = self.shared.open();
        let id: Option<u64> = request_id.parse().ok();
        if let Some(waiting) = id.and_then(|id| open.waiting.remove(&id)) {
            let _ = waiting.send(outcome);
            return Ok(());
        }
        if let Some(at) = id.and_then(|id| open.abandoned.iter().position(|it| *it == id)) {
            open.abandoned.remove(at);
            return Ok(());
        }
        let shown: String = request_id.chars().take(40).collect();
        Err(format!("it answers the request {shown:?}, which was never asked or is answered already"))
    }

    /// Whoever waits is told that the worker is gone, and nobody can ask any more.
    pub fn end(&self) {
        let mut open = self.shared.open();
        open.is_over = true;
        open.waiting.clear();
    }

    pub fn log(&self) -> &Log {
        &self.shared.log
    }
}

/// A request that somebody waits for.
struct Waiting<'a> {
    link: &'a Link,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut open = self.link.shared.open();
        if open.waiting.remove(&self.id).is_none() {
            return;
        }
        if open.abandoned.len() == MOST_ABANDONED {
            open.abandoned.pop_front();
        }
        open.abandoned.push_back(self.id);
        let over = open.is_over;
        drop(open);
        if !over {
            let (request_id, data) = (self.id.to_string(), serde_json::json!({}));
            let cancel =
                Request { request_id: &request_id, action: "cancel", data: &data, deadline_ms: None };
            self.link.send(cancel.encode());
        }
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    /// Writes what is asked until the worker reads no more, or nobody can ask.
    pub async fn run(mut self, mut stream: impl AsyncWrite + Unpin) {
        let mut bytes = Vec::new();
        while let Some(line) = self.outgoing.recv().await {
            bytes.clear();
            bytes.extend_from_slice(&line);
            while bytes.len() < WRITE_BYTES {
                let Ok(line) = self.outgoing.try_recv() else { break };
                bytes.extend_from_slice(&line);
            }
            if stream.write_all(&bytes).await.is_err() {
                return;
            }
            self.shared.unread_bytes.fetch_sub(bytes.len(), Ordering::AcqRel);
            bytes.shrink_to(WRITE_BYTES);
        }
    }
}

fn gone() -> ApiError {
    unavailable("the worker has ended".to_owned())
}

fn unavailable(what: String) -> ApiError {
    ApiError::new(ErrorCode::Unavailable, what).hint("`vramd workers` shows how it is")
}
