//! One connection to a worker: the handshake, then heartbeats and what it reports, until it ends or breaks the rules too often.

use std::sync::Mutex;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Map;
use serde_json::value::RawValue;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior};
use vramd_api::WorkerId;
use vramd_api::worker_protocol::{
    BadLine, Greeting, Hello, MAX_REPORT_BYTES, Message, ModelInfo, VERSION, WorkerError, decode, meant_for,
};

use super::News;
use super::lines::{Line, Lines};
use super::link::{Link, Writer};
use crate::driver::Event;

/// How long a worker may take to answer the handshake: frameworks take their time to start.
const HELLO_PATIENCE: Duration = Duration::from_mins(1);
/// How long it may take to say which models it has.
const REPORT_PATIENCE: Duration = Duration::from_secs(10);
/// After so many heartbeats in a row without an answer a worker counts as unresponsive, and after so many it is ended.
const MISSES: [u32; 2] = [2, 6];
/// How often a worker is asked which models it has, if it does not say so by itself.
const REPORT_EVERY: Duration = Duration::from_secs(30);
/// Reports and faults are passed on no more often.
const PASS_ON_EVERY: Duration = Duration::from_millis(100);
/// So many lines are read before others have their turn.
const LINES_IN_A_ROW: u64 = 64;
/// So many faults in a row, without one line that is none, are enough.
const MOST_FAULTS: u32 = 1000;

/// One connection, before it has begun.
#[derive(Debug)]
pub struct Session {
    pub id: WorkerId,
    pub hello: Hello,
    pub link: Link,
    pub driver: mpsc::Sender<Event>,
}

/// What was read and is to be passed on.
#[derive(Debug, Default)]
struct Inbox {
    report: Option<Box<RawValue>>,
    faults: u32,
}

impl Session {
    /// Speaks with a worker until its streams end, or says why that is not waited for.
    pub async fn run(
        &self,
        writer: Writer,
        lines: Lines<impl AsyncRead + Unpin>,
        writing: impl AsyncWrite + Send + 'static,
    ) -> Result<(), String> {
        let inbox = Mutex::new(Inbox::default());
        let news = Notify::new();
        let over = tokio::select! {
            over = self.read(lines, &inbox, &news) => over,
            why = self.converse() => Err(why),
            () = self.pass_on(&inbox, &news) => Ok(()),
            () = writer.run(writing) => Ok(()),
        };
        self.link.end();
        over
    }

    async fn read(
        &self,
        mut lines: Lines<impl AsyncRead + Unpin>,
        inbox: &Mutex<Inbox>,
        news: &Notify,
    ) -> Result<(), String> {
        let (mut in_a_row, mut lines_read) = (0, 0_u64);
        loop {
            // However much it prints, it is asked to end, and for signs of life, in between.
            lines_read += 1;
            if lines_read.is_multiple_of(LINES_IN_A_ROW) {
                tokio::task::yield_now().await;
            }
            let fault = match lines.next().await {
                Ok(Line::Whole(line)) if line.trim_ascii().is_empty() => continue,
                Ok(Line::Whole(line)) => match self.take(line, inbox, news) {
                    Ok(()) => {
                        self.link.log().note_heard();
                        in_a_row = 0;
                        continue;
                    }
                    Err(fault) => fault,
                },
                Ok(Line::TooLong) => BadLine::TooLong.to_string(),
                Ok(Line::Half(line)) => {
                    self.link.log().push(line);
                    self.fault("its output ended in the midst of a line", inbox, news);
                    return Ok(());
                }
                Ok(Line::End) => return Ok(()),
                Err(error) => return Err(format!("its output could not be read: {error}")),
            };
            self.fault(&fault, inbox, news);
            in_a_row += 1;
            if in_a_row >= MOST_FAULTS {
                return Err(format!("{MOST_FAULTS} lines in a row were no frames of the protocol"));
            }
        }
    }

    fn fault(&self, fault: &str, inbox: &Mutex<Inbox>, news: &Notify) {
        tracing::debug!(worker = %self.hello.name, fault, "a worker broke the protocol");
        self.link.log().note_fault(fault);
        inbox.lock().expect("nothing panics with it").faults += 1;
        news.notify_one();
    }

    /// Takes one line in; says what is wrong with it.
    fn take(&self, line: &[u8], inbox: &Mutex<Inbox>, news: &Notify) -> Result<(), String> {
        match decode(line) {
            Ok(Message::Reply { request_id, outcome }) => self.link.answered(&request_id, outcome),
            Ok(Message::Event { event, data }) => {
                match event.as_str() {
                    "models" if data.is_some() => {
                        inbox.lock().expect("nothing panics with it").report = data;
                        news.notify_one();
                    }
                    "log" => {
                        #[derive(serde::Deserialize)]
                        struct Said {
                            text: String,
                        }
                        let said = data.and_then(|data| serde_json::from_str::<Said>(data.get()).ok());
                        self.link.log().push(said.map(|said| said.text).unwrap_or_default().as_bytes());
                    }
                    // Versions to come may send more.
                    _ => {}
                }
                Ok(())
            }
            Err(error) => {
                if let Some(id) = meant_for(line) {
                    let message = format!("its answer cannot be read: {error}");
                    let unreadable = WorkerError { message, ..WorkerError::default() };
                    let _ = self.link.answered(&id, Err(unreadable));
                }
                // Most likely somebody prints where only frames may go.
                self.link.log().push(line);
                Err(error.to_string())
            }
        }
    }

    /// Tells the driver what came, at a rate that no worker decides.
    async fn pass_on(&self, inbox: &Mutex<Inbox>, news: &Notify) {
        loop {
            news.notified().await;
            let Inbox { report, faults } =
                std::mem::take(&mut *inbox.lock().expect("nothing panics with it"));
            if let Some(report) = report {
                self.report(report.get()).await;
            }
            if faults > 0 {
                self.tell(News::Faulted).await;
            }
            tokio::time::sleep(PASS_ON_EVERY).await;
        }
    }

    async fn report(&self, report: &str) {
        // More is no report but an attack on whoever reads it.
        let read = if report.len() > MAX_REPORT_BYTES {
            Err(format!("it has {} bytes", report.len()))
        } else {
            let mut text = serde_json::Deserializer::from_str(report);
            serde_path_to_error::deserialize::<_, ModelInfo>(&mut text).map_err(|error| error.to_string())
        };
        match read {
            Ok(info) => self.tell(News::Models(info)).await,
            Err(error) => {
                self.link.log().note_fault(&format!("its report of models cannot be read: {error}"));
                self.tell(News::Faulted).await;
            }
        }
    }

    /// The daemon's side of the conversation.
    async fn converse(&self) -> String {
        let greeting = match self.link.call("hello", &self.hello, HELLO_PATIENCE).await {
            Ok(data) => read::<Greeting>(&data),
            Err(error) => return format!("the handshake failed: {error}"),
        };
        let greeting = match greeting {
            Ok(greeting) if greeting.version == VERSION => greeting,
            Ok(greeting) => return format!("it speaks version {}, not {VERSION}", greeting.version),
            Err(error) => return format!("its answer to the handshake cannot be read: {error}"),
        };
        let reports = greeting.actions.iter().any(|action| action == "memory.get_model_info");
        self.tell(News::Ready(Box::new(greeting.clipped()))).await;
        tokio::select! {
            why = self.keep_in_touch() => why,
            why = self.ask_for_reports(), if reports => why,
        }
    }

    async fn keep_in_touch(&self) -> String {
        let every = Duration::from_secs_f64(self.hello.heartbeat_seconds);
        let mut beats = tokio::time::interval_at(Instant::now() + every, every);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut missed = 0;
        loop {
            beats.tick().await;
            match self.link.call("ping", &Map::new(), every).await {
                Ok(_) if missed >= MISSES[0] => {
                    missed = 0;
                    self.tell(News::Responds(true)).await;
                }
                Ok(_) => missed = 0,
                Err(error) => {
                    missed += 1;
                    if missed == MISSES[0] {
                        self.link
                            .log()
                            .note_fault(&format!("it did not answer {missed} heartbeats: {error}"));
                        self.tell(News::Responds(false)).await;
                    }
                    if missed >= MISSES[1] {
                        return format!("it did not answer {missed} heartbeats: {error}");
                    }
                }
            }
        }
    }

    async fn ask_for_reports(&self) -> String {
        loop {
            match self.link.call("memory.get_model_info", &Map::new(), REPORT_PATIENCE).await {
                Ok(data) => self.report(data.get()).await,
                Err(error) => {
                    self.link.log().note_fault(&format!("it does not say which models it has: {error}"));
                    self.tell(News::Faulted).await;
                }
            }
            tokio::time::sleep(REPORT_EVERY).await;
        }
    }

    async fn tell(&self, news: News) {
        let _ = self.driver.send(Event::Worker(self.id, news)).await;
    }
}

fn read<T: DeserializeOwned>(data: &RawValue) -> Result<T, serde_path_to_error::Error<serde_json::Error>> {
    serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(data.get()))
}
