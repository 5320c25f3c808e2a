//! What happened: a ring of the last events, and those who follow it.
//!
//! Nobody can slow the driver down: a follower reads the ring at its own pace, and one that falls more than the
//! ring behind is told how many events it missed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use tokio::sync::watch;
use vramd_api::EventKind;

/// How many events are kept for those who resume.
pub const KEPT: usize = 4096;

/// An event as it is kept: its data printed once, the rest when somebody reads it. In JSON a [`vramd_api::Event`].
#[derive(Debug, Serialize)]
pub struct Logged {
    pub id: String,
    pub event: EventKind,
    at: Timestamp,
    data: Box<RawValue>,
}

/// What the ring holds: a number is enough for an id.
#[derive(Debug)]
struct Kept {
    event: EventKind,
    at: Timestamp,
    data: Box<RawValue>,
}

/// The log of one run of the daemon.
#[derive(Debug)]
pub struct EventLog {
    /// Told apart from the ids of earlier runs.
    run: String,
    ring: Mutex<VecDeque<Arc<Kept>>>,
    /// The number of the last event; the first is 1.
    last: watch::Sender<u64>,
}

/// A follower's place in the log.
#[derive(Debug)]
pub struct Follower {
    log: Arc<EventLog>,
    seen: u64,
    news: watch::Receiver<u64>,
    /// With their numbers.
    pending: VecDeque<(u64, Arc<Kept>)>,
}

impl EventLog {
    pub fn new(run: String) -> Arc<Self> {
        Arc::new(Self { run, ring: Mutex::default(), last: watch::Sender::new(0) })
    }

    pub fn push(&self, event: EventKind, at: Timestamp, data: Box<RawValue>) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.len() == KEPT {
            ring.pop_front();
        }
        ring.push_back(Arc::new(Kept { event, at, data }));
        self.last.send_modify(|last| *last += 1);
    }

    /// Follows from now on, or from after `resume` on. An id that is too old or from another run begins with a
    /// `reset` event.
    pub fn follow(self: &Arc<Self>, resume: Option<&str>, at: Timestamp) -> Follower {
        let news = self.last.subscribe();
        let last = *news.borrow();
        let mut pending = VecDeque::new();
        let seen = match resume {
            None => last,
            Some(id) => {
                let number = id
                    .strip_prefix(self.run.as_str())
                    .and_then(|rest| rest.strip_prefix('-'))
                    .and_then(|number| number.parse::<u64>().ok())
                    .filter(|number| *number <= last && *number + KEPT as u64 >= last);
                number.unwrap_or_else(|| {
                    pending.push_back((
                        last,
                        own(EventKind::Reset, at, &serde_json::json!({ "lastEventId": id })),
                    ));
                    last
                })
            }
        };
        Follower { log: self.clone(), seen, news, pending }
    }
}

/// An event that only one follower sees.
fn own(event: EventKind, at: Timestamp, data: &serde_json::Value) -> Arc<Kept> {
    Arc::new(Kept { event, at, data: to_raw_value(data).expect("plain data prints") })
}

impl Follower {
    /// The next event; None when the log has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<Logged> {
        loop {
            if let Some((number, kept)) = self.pending.pop_front() {
                let id = format!("{}-{number}", self.log.run);
                return Some(Logged { id, event: kept.event, at: kept.at, data: kept.data.clone() });
            }
            self.catch_up();
            if self.pending.is_empty() && self.news.changed().await.is_err() {
                return None;
            }
        }
    }

    fn catch_up(&mut self) {
        let ring = self.log.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let last = *self.news.borrow_and_update();
        let first = last + 1 - ring.len() as u64;
        if self.seen + 1 < first {
            let missed = first - self.seen - 1;
            let at = ring.front().map_or(Timestamp::UNIX_EPOCH, |event| event.at);
            let data = serde_json::json!({ "missed": missed });
            self.pending.push_back((first - 1, own(EventKind::Lag, at, &data)));
            self.seen = first - 1;
        }
        let new = (last - self.seen) as usize;
        self.pending.extend((self.seen + 1..).zip(ring.iter().skip(ring.len() - new).cloned()));
        self.seen = last;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(log: &EventLog, count: usize) {
        for n in 0..count {
            log.push(EventKind::LeaseEnded, Timestamp::UNIX_EPOCH, to_raw_value(&n).expect("a number"));
        }
    }

    #[tokio::test]
    async fn a_follower_resumes_where_it_was() {
        let log = EventLog::new("run".into());
        push(&log, 3);
        let mut follower = log.follow(Some("run-1"), Timestamp::UNIX_EPOCH);
        assert_eq!(follower.next().await.expect("an event").id, "run-2");
        assert_eq!(follower.next().await.expect("an event").id, "run-3");
        push(&log, 1);
        assert_eq!(follower.next().await.expect("an event").id, "run-4");
    }

    #[tokio::test]
    async fn an_id_of_another_run_begins_with_a_reset() {
        let log = EventLog::new("new".into());
        push(&log, 2);
        for id in ["old-1", "new-99", "new-", "", "new-x"] {
            let mut follower = log.follow(Some(id), Timestamp::UNIX_EPOCH);
            assert_eq!(follower.next().await.expect("an event").event, EventKind::Reset, "{id}");
        }
    }

    #[tokio::test]
    async fn a_slow_follower_is_told_what_it_missed() {
        let log = EventLog::new("run".into());
        let mut follower = log.follow(None, Timestamp::UNIX_EPOCH);
        push(&log, KEPT + 10);
        let lag = follower.next().await.expect("an event");
        assert_eq!((lag.event, lag.data.get()), (EventKind::Lag, r#"{"missed":10}"#));
        assert_eq!(lag.id, "run-10");
        assert_eq!(follower.next().await.expect("an event").id, "run-11");
    }
}
