//! Requests to a worker and their answers: many in flight, in any order, each with its deadline.
//!
//! A caller writes its request itself, as far as the worker takes it at once, and waits for its own answer; nobody waits for
//! another's. What a worker does not read is kept up to a bound, and refused beyond it.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use serde::Serialize;
use serde_json::value::RawValue;
use tokio::io::AsyncWrite;
use tokio::sync::{Notify, oneshot};
use vramd_api::worker_protocol::{MAX_LINE_BYTES, Request, WorkerError};
use vramd_api::{ApiError, ErrorCode};

use super::log::Log;

/// The most bytes that wait to be read by a worker, but for one request however long.
const MOST_UNREAD_BYTES: usize = 32 << 20;
/// The most requests that wait for an answer.
const MOST_OPEN: usize = 16_384;
/// So many requests that nobody waits for any more are remembered, since their answers may still come.
const MOST_ABANDONED: usize = 16_384;
/// A buffer beyond this is given back once it is written.
const KEPT_BYTES: usize = 256 << 10;

/// The way to a worker, for any number of callers.
#[derive(Debug, Clone)]
pub struct Link {
    shared: Arc<Shared>,
}

/// Writes what no caller could, see [`Writer::run`].
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    last_id: AtomicU64,
    outgoing: Mutex<Outgoing>,
    /// Bytes are left that the worker did not take at once.
    left: Notify,
    open: Mutex<Open>,
    log: Arc<Log>,
}

#[derive(Default)]
struct Outgoing {
    /// From [`Writer::run`]'s beginning to its end.
    stream: Option<Pin<Box<dyn AsyncWrite + Send>>>,
    /// What the worker has not read yet. If there is none, whoever asks writes; else the writer does.
    unread: VecDeque<u8>,
}

#[derive(Debug, Default)]
struct Open {
    waiting: HashMap<u64, oneshot::Sender<Result<Box<RawValue>, WorkerError>>>,
    abandoned: VecDeque<u64>,
    is_over: bool,
}

impl Link {
    pub fn new(log: Arc<Log>) -> (Self, Writer) {
        let shared = Arc::new(Shared {
            last_id: AtomicU64::new(0),
            outgoing: Mutex::default(),
            left: Notify::new(),
            open: Mutex::default(),
            log,
        });
        (Self { shared: shared.clone() }, Writer { shared })
    }

    /// Asks, and waits for the answer. Who drops this tells the worker that nobody waits any more.
    pub async fn call(
        &self,
        action: &str,
        data: &impl Serialize,
        patience: Duration,
    ) -> Result<Box<RawValue>, ApiError> {
        let id = self.shared.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let deadline_ms = u64::try_from(patience.as_millis()).ok();
        let line = Request { request_id: &id.to_string(), action, data, deadline_ms }.encode();
        if line.len() > MAX_LINE_BYTES {
            let what = format!("the request has {} bytes", line.len());
            return Err(ApiError::new(ErrorCode::PayloadTooLarge, what).detail("limitBytes", MAX_LINE_BYTES));
        }
        let unread = self.shared.outgoing().unread.len();
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
        self.send(&line);
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

    fn send(&self, line: &[u8]) {
        let mut outgoing = self.shared.outgoing();
        let written = if outgoing.unread.is_empty() { outgoing.write_now(line) } else { 0 };
        if written < line.len() {
            outgoing.unread.extend(&line[written..]);
            drop(outgoing);
            self.shared.left.notify_one();
        }
    }

    /// An answer has come; says why it cannot be one.
    pub fn answered(
        &self,
        request_id: &str,
        outcome: Result<Box<RawValue>, WorkerError>,
    ) -> Result<(), String> {
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
            self.link.send(&cancel.encode());
        }
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outgoing(&self) -> MutexGuard<'_, Outgoing> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outgoing {
    /// How much of it the worker took at once. A stream that fails takes nothing: its writer learns why.
    fn write_now(&mut self, line: &[u8]) -> usize {
        let Some(stream) = &mut self.stream else { return 0 };
        match stream.as_mut().poll_write(&mut Context::from_waker(Waker::noop()), line) {
            Poll::Ready(Ok(written)) => written,
            Poll::Ready(Err(_)) | Poll::Pending => 0,
        }
    }

    /// Writes what is left; says whether the worker reads at all.
    fn poll_written(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(false) };
        while !self.unread.is_empty() {
            match ready!(stream.as_mut().poll_write(context, self.unread.as_slices().0)) {
                Ok(0) | Err(_) => return Poll::Ready(false),
                Ok(written) => drop(self.unread.drain(..written)),
            }
        }
        self.unread.shrink_to(KEPT_BYTES);
        Poll::Ready(true)
    }
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} bytes", self.unread.len())
    }
}

impl Writer {
    /// Lets callers write, and writes what they could not, until the worker reads no more or this is dropped.
    pub async fn run(self, stream: impl AsyncWrite + Send + 'static) {
        self.shared.outgoing().stream = Some(Box::pin(stream));
        while poll_fn(|context| self.shared.outgoing().poll_written(context)).await {
            self.shared.left.notified().await;
        }
    }
}

impl Drop for Writer {
    /// The end of its input tells a worker to end.
    fn drop(&mut self) {
        *self.shared.outgoing() = Outgoing::default();
    }
}

fn gone() -> ApiError {
    unavailable("the worker has ended".to_owned())
}

fn unavailable(what: String) -> ApiError {
    ApiError::new(ErrorCode::Unavailable, what).hint("`vramd workers` shows how it is")
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncBufReadExt as _;

    use super::*;

    /// However little the worker takes at once, each line arrives whole, and each caller gets its own answer.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn lines_stay_whole_through_a_stream_that_takes_little_at_once() {
        let (ours, theirs) = tokio::io::duplex(64);
        let (link, writer) = Link::new(Arc::default());
        let writing = tokio::spawn(writer.run(ours));
        let callers = (0..200_usize).map(|number| {
            let link = link.clone();
            tokio::spawn(async move {
                let text = "x".repeat(number * 7 % 500);
                let answer = link.call("echo", &text, Duration::from_mins(1)).await.expect("an answer");
                assert_eq!(answer.get(), format!("\"{text}\""));
            })
        });
        let callers: Vec<_> = callers.collect();
        let mut lines = tokio::io::BufReader::new(theirs).lines();
        for _ in 0..callers.len() {
            let read = lines.next_line().await.expect("it is open").expect("a line");
            let request: serde_json::Value = serde_json::from_str(&read).expect("a whole request");
            let data = serde_json::value::to_raw_value(&request["data"]).expect("plain data");
            link.answered(request["request_id"].as_str().expect("an id"), Ok(data)).expect("it was asked");
        }
        for caller in callers {
            caller.await.expect("it had its answer");
        }
        assert!(link.shared.outgoing().unread.is_empty());
        writing.abort();
    }
}
