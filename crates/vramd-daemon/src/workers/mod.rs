//! Workers: their processes, the conversation with each, and what is known of it between two looks of the driver.
//!
//! The driver owns which workers there are and when one is started again. Here is what takes time: starting a process, speaking with
//! it and ending it, in one task for each. Nothing that a worker prints, or fails to read, holds up anybody else.

mod lines;
mod link;
mod log;
mod process;
mod session;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use vramd_api::worker_protocol::{Greeting, Hello, Join, MAX_LINE_BYTES, Message, ModelInfo, clip, decode};
use vramd_api::{ApiError, WorkerExit, WorkerId, WorkerLimit, WorkerName};

use self::lines::{Line, Lines};
use self::process::Group;
use self::session::Session;
use crate::clock;
use crate::driver::Event;

pub use self::link::{Link, Writer};
pub use self::log::Log;
pub use self::process::{Command, MARK_VARIABLE, sweep};

/// How long a worker may take to end when it is asked to, and then when it is told by a signal.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(5);
const SIGNAL_PATIENCE: Duration = Duration::from_secs(2);
/// How long a process may outlive its output.
const EXIT_PATIENCE: Duration = Duration::from_millis(500);
/// How long the last output of an ended process may take to be read: its death is to be settled within 100 ms.
const LAST_WORDS: Duration = Duration::from_millis(50);
/// How long a connection may take for its first line.
const JOIN_PATIENCE: Duration = Duration::from_secs(5);
const JOIN_BYTES: usize = 64 << 10;

/// A program that may be run as a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Its file, or its name on `PATH`, and its arguments.
    pub command: Vec<String>,
    /// The variables that a caller may set, or with a `*` at the end how they begin.
    pub environment: Vec<String>,
}

/// Those that the configuration allows.
pub type Programs = BTreeMap<WorkerName, Program>;

/// What becomes of a worker, told to the driver.
#[derive(Debug)]
pub enum News {
    Started {
        pid: u32,
        limit: Option<WorkerLimit>,
    },
    Ready(Box<Greeting>),
    /// Whether it answers its heartbeats.
    Responds(bool),
    Models(ModelInfo),
    /// It did what the protocol forbids; its log says what.
    Faulted,
    /// And whether that was its own way and no fault.
    Ended(WorkerExit, bool),
}

/// What a worker's task is given.
#[derive(Debug)]
pub struct Task {
    pub id: WorkerId,
    /// Of one that has joined, if anybody knows.
    pub pid: Option<u32>,
    pub hello: Hello,
    pub link: Link,
    pub writer: Writer,
    pub driver: mpsc::Sender<Event>,
    /// It is to end.
    pub stop: CancellationToken,
}

/// A link to whatever answers on a stream, without a handshake or a daemon: for measuring what one costs.
pub fn link(
    reading: impl AsyncRead + Unpin + Send + 'static,
    writing: impl AsyncWrite + Send + 'static,
) -> Link {
    let (link, writer) = Link::new(Arc::default());
    let answered = link.clone();
    tokio::spawn(writer.run(writing));
    tokio::spawn(async move {
        let mut lines = Lines::new(reading, MAX_LINE_BYTES);
        while let Ok(Line::Whole(line)) = lines.next().await {
            if let Ok(Message::Reply { request_id, outcome }) = decode(line) {
                let _ = answered.answered(&request_id, outcome);
            }
        }
        answered.end();
    });
    link
}

/// Runs a worker's process until it has ended.
pub async fn supervise(task: Task, command: Command) {
    let Task { id, pid: _, hello, link, writer, driver, stop } = task;
    let tell = async |news| drop(driver.send(Event::Worker(id, news)).await);
    let (group, stdin, stdout, stderr) = match Group::start(&command, &id.to_string()) {
        Ok(started) => started,
        Err(error) => {
            link.end();
            let reason = format!("it could not be started: {}: {error}", command.program);
            let exit = WorkerExit { at: clock::wall(), code: None, signal: None, reason };
            tell(News::Ended(exit, false)).await;
            return;
        }
    };
    let (pid, limit) = (group.pid, group.limit());
    tell(News::Started { pid, limit }).await;
    let said = {
        let link = link.clone();
        tokio::spawn(async move { link.log().follow(stderr).await })
    };
    let session = Session { id, hello, link: link.clone(), driver: driver.clone() };
    let mut why = tokio::select! {
        over = session.run(writer, Lines::new(stdout, MAX_LINE_BYTES), stdin) => over.err(),
        why = end_politely(&link, &stop) => Some(why),
        () = ended_and_read(&group) => None,
    };
    link.end();
    // One that closed its output, or was asked to end, is most likely about to.
    if tokio::time::timeout(EXIT_PATIENCE, group.ended()).await.is_err() {
        why.get_or_insert_with(|| "it closed its input or output and did not end".to_owned());
        group.terminate();
        let _ = tokio::time::timeout(SIGNAL_PATIENCE, group.ended()).await;
    }
    let mut exit = group.reap().await;
    let well = exit.code == Some(0) && why.is_none();
    if let Some(why) = why {
        exit.reason = clip(&format!("{why}; {}", exit.reason));
    }
    tell(News::Ended(exit, well)).await;
    // What it wrote last may still be in the pipe; a process that left the group may hold that open for ever.
    let abort = said.abort_handle();
    if tokio::time::timeout(EXIT_PATIENCE, said).await.is_err() {
        abort.abort();
    }
}

/// Until a process has ended, and what it wrote last was read: that ends by itself, unless another process holds its output.
async fn ended_and_read(group: &Group) {
    group.ended().await;
    tokio::time::sleep(LAST_WORDS).await;
}

/// Speaks with a worker that somebody else started, until the connection ends.
pub async fn host<S: AsyncRead + AsyncWrite + Send + 'static>(task: Task, joined: Joined<S>) {
    let Task { id, pid, hello, link, writer, driver, stop } = task;
    let session = Session { id, hello, link: link.clone(), driver: driver.clone() };
    let why = tokio::select! {
        over = session.run(writer, joined.lines, joined.writing) => over.err(),
        why = end_politely(&link, &stop) => Some(why),
        // What it forked may hold the connection open.
        () = process::ended(pid) => Some("its process ended".to_owned()),
    };
    link.end();
    let well = why.is_none();
    let reason = why.map_or_else(|| "it closed the connection".to_owned(), |why| clip(&why));
    let exit = WorkerExit { at: clock::wall(), code: None, signal: None, reason };
    let _ = driver.send(Event::Worker(id, News::Ended(exit, well))).await;
}

/// Once it is to end, asks a worker to; answers if it does not in time.
async fn end_politely(link: &Link, stop: &CancellationToken) -> String {
    stop.cancelled().await;
    let end = tokio::time::Instant::now() + SHUTDOWN_PATIENCE;
    let answered = link.call("shutdown", &serde_json::json!({}), SHUTDOWN_PATIENCE).await;
    tokio::time::sleep_until(end).await;
    match answered {
        Ok(_) => "it did not end though it said so".to_owned(),
        Err(error) => format!("it did not end when it was asked to: {error}"),
    }
}

/// A connection whose first line asked to join.
#[derive(Debug)]
pub struct Joined<S> {
    pub join: Join,
    lines: Lines<ReadHalf<S>>,
    writing: WriteHalf<S>,
}

/// Reads the first line of a connection. None is answered where it is no join: the peer was told so.
pub async fn join<S: AsyncRead + AsyncWrite>(stream: S) -> Option<Joined<S>> {
    let (reading, mut writing) = tokio::io::split(stream);
    let mut lines = Lines::new(reading, JOIN_BYTES);
    let first = tokio::time::timeout(JOIN_PATIENCE, lines.next()).await;
    let read = match first {
        Ok(Ok(Line::Whole(line))) => read_join(line),
        Ok(_) => Err("no whole line came".to_owned()),
        Err(_) => Err(format!("no line came within {} seconds", JOIN_PATIENCE.as_secs())),
    };
    match read {
        Ok(join) => {
            lines.allow(MAX_LINE_BYTES);
            Some(Joined { join, lines, writing })
        }
        Err(what) => {
            let hint = "begin with {\"event\": \"join\", \"data\": {\"name\": \"…\"}}";
            refuse(&mut writing, &ApiError::invalid("join", what).hint(hint)).await;
            None
        }
    }
}

fn read_join(line: &[u8]) -> Result<Join, String> {
    match decode(line) {
        Ok(Message::Event { event, data }) if event == "join" => {
            let data = data.map_or_else(|| "{}".to_owned(), |data| data.get().to_owned());
            let mut text = serde_json::Deserializer::from_str(&data);
            serde_path_to_error::deserialize(&mut text).map_err(|error| error.to_string())
        }
        Ok(_) => Err("the first line is no join".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

impl<S: AsyncRead + AsyncWrite> Joined<S> {
    /// One of the daemon's own.
    pub fn within(stream: S, name: WorkerName) -> Self {
        let (reading, writing) = tokio::io::split(stream);
        let join = Join { name, device_id: None };
        Self { join, lines: Lines::new(reading, MAX_LINE_BYTES), writing }
    }

    /// It cannot join; it is told why.
    pub async fn refuse(mut self, error: &ApiError) {
        refuse(&mut self.writing, error).await;
    }
}

/// Sends the event `refused`, the last line of a connection.
async fn refuse(stream: &mut (impl AsyncWrite + Unpin), error: &ApiError) {
    let mut line = serde_json::to_vec(&serde_json::json!({
        "event": "refused",
        "data": { "code": error.code, "message": error.message, "hint": error.hint },
    }))
    .expect("an error is plain data");
    line.push(b'\n');
    let _ = tokio::time::timeout(JOIN_PATIENCE, stream.write_all(&line)).await;
    let _ = stream.shutdown().await;
}
