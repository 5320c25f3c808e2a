//! What was seen and heard of a worker over all its restarts: when it last sent something, its faults, and the last lines of what it said
//! that is no frame.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tokio::io::AsyncRead;
use vramd_api::worker_protocol::clip;
use vramd_api::{LogLine, WorkerFault};

use super::lines::{Line, Lines};
use crate::clock;

const MOST_LINES: usize = 200;
const MOST_LINE_BYTES: usize = 4096;

#[derive(Debug, Default)]
pub struct Log {
    lines: Mutex<VecDeque<LogLine>>,
    seen: Mutex<Seen>,
}

/// What was seen of a worker.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub last_heard: Option<jiff::Timestamp>,
    pub fault_count: u64,
    pub last_fault: Option<WorkerFault>,
}

impl Log {
    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn note_heard(&self) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).last_heard = Some(clock::wall());
    }

    pub fn note_fault(&self, message: &str) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.fault_count += 1;
        seen.last_fault = Some(WorkerFault { at: clock::wall(), message: clip(message) });
    }

    /// Keeps a line, cut to its bound and without what would move a terminal's cursor.
    pub fn push(&self, text: &[u8]) {
        let cut = &text[..text.len().min(MOST_LINE_BYTES)];
        let shown =
            String::from_utf8_lossy(cut).trim_end().replace(|c: char| c.is_control() && c != '\t', "?");
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == MOST_LINES {
            lines.pop_front();
        }
        lines.push_back(LogLine { at: clock::wall(), text: shown });
    }

    pub fn lines(&self) -> Vec<LogLine> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Keeps all that comes from a stream until it ends.
    pub async fn follow(&self, stream: impl AsyncRead + Unpin) {
        let mut lines = Lines::new(stream, MOST_LINE_BYTES);
        loop {
            match lines.next().await {
                Ok(Line::Whole(text) | Line::Half(text)) => self.push(text),
                Ok(Line::TooLong) => {
                    self.push(format!("(a line of more than {MOST_LINE_BYTES} bytes)").as_bytes());
                }
                Ok(Line::End) | Err(_) => return,
            }
        }
    }
}
