//! Operations: what takes time, its progress and its end.
//!
//! `Running → Completed | Failed | Cancelled`. Bytes are counted by the thread that moves them, in a
//! [`Progress`] that readers look at without asking the driver. Ended operations are kept for a day, a thousand
//! at most.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use imbl::OrdMap;
use jiff::Timestamp;
use uuid::Uuid;
use vramd_api::{
    ApiError, Bytes, ComponentName, DeviceId, ErrorCode, EventKind, EvictedComponent as Evicted, Holder,
    ModelName, Operation, OperationId, OperationKind, OperationState, Priority,
};
use vramd_core::{Now, Tick};

use super::clear::Clearing;
use super::copies::flow;
use super::defragment::Defragmenting;
use super::relief::Relief;
use super::split::Splitting;
use super::transfers::Transferring;
use super::{Part, Reply, State};
use crate::clock;
use crate::source::Prepared;

const KEPT: usize = 1000;
const KEPT_SECONDS: i64 = 24 * 60 * 60;

/// What the thread that moves bytes shares with everybody who looks.
#[derive(Debug, Default)]
pub struct Progress {
    pub done: AtomicU64,
    pub cancelled: AtomicBool,
}

/// An operation and its live progress.
#[derive(Debug, Clone)]
pub struct Entry {
    operation: Operation,
    progress: Arc<Progress>,
    /// The bound on its rate.
    most_per_second: Option<u64>,
    paused_since: Option<Timestamp>,
    /// Before that.
    paused_seconds: f64,
}

/// A load under way.
#[derive(Debug)]
pub(super) struct Loading {
    pub model: ModelName,
    pub device: DeviceId,
    pub parts: Vec<Part>,
    pub prepared: Vec<Prepared>,
    /// Parts whose segments are still being made.
    pub unready: usize,
    /// Parts that are being given back.
    pub releasing: usize,
    pub failed: Option<ApiError>,
    pub began: Tick,
    /// What went for it.
    pub evicted: Vec<Evicted>,
    /// The devices that had no room for it, if it is in host memory instead.
    pub spilled_from: Vec<DeviceId>,
    /// Nobody asked for it.
    pub unasked: bool,
    /// It is kept in RAM for that device.
    pub cache_for: Option<DeviceId>,
}

/// An unload under way.
#[derive(Debug)]
pub(super) struct Unloading {
    pub model: ModelName,
    pub devices: Vec<DeviceId>,
    /// What goes, and from where.
    pub parts: Vec<(ComponentName, DeviceId)>,
    pub releasing: usize,
    pub bytes: u64,
    /// Processes that still have its memory.
    pub held_by: BTreeSet<Holder>,
    /// What is kept in RAM.
    pub cached: BTreeSet<ComponentName>,
}

#[derive(Debug)]
pub(super) enum Running {
    Load(Loading),
    Unload(Unloading),
    Transfer(Transferring),
    Defragment(Defragmenting),
    Clear(Clearing),
    Split(Splitting),
    Relief(Box<Relief>),
}

#[derive(Debug, Default)]
pub(super) struct Operations {
    entries: OrdMap<OperationId, Arc<Entry>>,
    pub running: HashMap<OperationId, Running>,
}

impl Entry {
    /// The operation with the bytes as they are now.
    pub fn operation(&self) -> Operation {
        let mut operation = self.operation.clone();
        if operation.state == OperationState::Running {
            // The end of a file's header is read along with its payload.
            operation.bytes_done = self.progress.done.load(Ordering::Relaxed).min(operation.bytes_total);
        }
        let until = operation.finished_at.unwrap_or_else(clock::wall);
        let seconds = until.duration_since(operation.started_at).as_secs_f64();
        let paused = self.paused_since.map_or(0.0, |since| until.duration_since(since).as_secs_f64());
        let seconds = seconds - self.paused_seconds - paused;
        if operation.bytes_done > 0 && seconds > 0.0 {
            let rate = operation.bytes_done as f64 / seconds;
            operation.bytes_per_second = Some(rate as u64);
            if operation.state == OperationState::Running && !operation.paused {
                // Its first bytes went before the bound took hold.
                let rate = self.most_per_second.map_or(rate, |most| rate.min(most as f64));
                let left = operation.bytes_total.saturating_sub(operation.bytes_done) as f64 / rate;
                operation.seconds_left = Some((left * 1000.0).round() / 1000.0);
            }
        }
        operation
    }

    pub fn state(&self) -> OperationState {
        self.operation.state
    }
}

impl Operations {
    pub fn entries(&self) -> &OrdMap<OperationId, Arc<Entry>> {
        &self.entries
    }

    pub fn begin(&mut self, kind: OperationKind, subject: String, bytes_total: u64, now: Now) -> OperationId {
        let id = OperationId(Uuid::now_v7());
        let operation = Operation {
            operation_id: id,
            kind,
            subject,
            state: OperationState::Running,
            paused: false,
            bytes_done: 0,
            bytes_total,
            bytes_per_second: None,
            seconds_left: None,
            started_at: now.wall,
            finished_at: None,
            error: None,
            result: None,
        };
        let entry = Entry {
            operation,
            progress: Arc::default(),
            most_per_second: None,
            paused_since: None,
            paused_seconds: 0.0,
        };
        self.entries.insert(id, Arc::new(entry));
        id
    }

    /// The same, of one that waits for its turn.
    pub fn line_up(
        &mut self,
        kind: OperationKind,
        subject: String,
        bytes_total: u64,
        now: Now,
    ) -> OperationId {
        let id = self.begin(kind, subject, bytes_total, now);
        if let Some(entry) = self.entries.get_mut(&id) {
            Arc::make_mut(entry).operation.state = OperationState::Queued;
        }
        id
    }

    /// It is its turn. What it waited does not count for its rate.
    pub fn start(&mut self, id: OperationId, subject: String, now: Now) {
        if let Some(entry) = self.entries.get_mut(&id).map(Arc::make_mut) {
            entry.paused_seconds += now.wall.duration_since(entry.operation.started_at).as_secs_f64();
            entry.operation.state = OperationState::Running;
            entry.operation.subject = subject;
        }
    }

    pub fn show(&self, id: OperationId) -> Result<Operation, ApiError> {
        self.entries
            .get(&id)
            .map(|entry| entry.operation())
            .ok_or_else(|| ApiError::not_found("operation", id))
    }

    pub fn progress(&self, id: OperationId) -> Option<Arc<Progress>> {
        self.entries.get(&id).map(|entry| entry.progress.clone())
    }

    fn end(
        &mut self,
        id: OperationId,
        outcome: Result<serde_json::Value, ApiError>,
        now: Now,
    ) -> Option<Operation> {
        self.running.remove(&id);
        let entry = Arc::make_mut(self.entries.get_mut(&id)?);
        let operation = &mut entry.operation;
        operation.finished_at = Some(now.wall);
        operation.paused = false;
        let since = entry.paused_since.take();
        entry.paused_seconds += since.map_or(0.0, |since| now.wall.duration_since(since).as_secs_f64());
        match outcome {
            Ok(result) => {
                operation.state = OperationState::Completed;
                operation.bytes_done = operation.bytes_total;
                operation.result = Some(result);
            }
            Err(error) => {
                operation.bytes_done = entry.progress.done.load(Ordering::Relaxed).min(operation.bytes_total);
                operation.state = if error.code == ErrorCode::Cancelled {
                    OperationState::Cancelled
                } else {
                    OperationState::Failed
                };
                operation.error = Some(error);
            }
        }
        Some(entry.operation())
    }

    pub fn cancelled(&self, id: OperationId) -> bool {
        self.progress(id).is_some_and(|progress| progress.cancelled.load(Ordering::Relaxed))
    }

    /// What an operation will move turned out to be another number of bytes.
    pub fn set_total(&mut self, id: OperationId, bytes: u64) {
        if let Some(entry) = self.entries.get_mut(&id) {
            Arc::make_mut(entry).operation.bytes_total = bytes;
        }
    }

    fn set_paused(&mut self, id: OperationId, paused: bool, now: Now) {
        if let Some(entry) = self.entries.get_mut(&id).map(Arc::make_mut) {
            entry.operation.paused = paused;
            let since = std::mem::replace(&mut entry.paused_since, paused.then_some(now.wall));
            let seconds = since.map_or(0.0, |since| now.wall.duration_since(since).as_secs_f64());
            entry.paused_seconds += seconds;
        }
    }

    /// Whether its rate has a bound.
    pub fn is_bounded(&self, id: OperationId) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.most_per_second.is_some())
    }

    pub fn is_paused(&self, id: OperationId) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.operation.paused)
    }

    pub fn cancel_all(&self) {
        for id in self.running.keys() {
            if let Some(progress) = self.progress(*id) {
                progress.cancelled.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Forgets the oldest of those that have ended.
    pub fn prune(&mut self) {
        let oldest = clock::wall().as_second() - KEPT_SECONDS;
        while let Some((id, entry)) = self.entries.iter().find(|(_, entry)| entry.operation.state.ended()) {
            let too_old = entry.operation.finished_at.is_some_and(|at| at.as_second() < oldest);
            let ended = self.entries.values().filter(|entry| entry.operation.state.ended()).count();
            if !too_old && ended <= KEPT {
                break;
            }
            let id = *id;
            self.entries.remove(&id);
        }
    }
}

impl State {
    pub(super) fn end_operation(&mut self, id: OperationId, outcome: Result<serde_json::Value, ApiError>) {
        if let Some(operation) = self.operations.end(id, outcome, self.now) {
            if let (OperationState::Failed, Some(error)) = (operation.state, &operation.error) {
                let Operation { kind, subject, .. } = &operation;
                tracing::warn!(operation = %id, ?kind, ?subject, error = ?error.message, code = %error.code, "an operation failed");
            }
            self.emit(EventKind::OperationChanged, serde_json::json!(operation));
        }
        // A clearing or a load over several devices may have waited for it.
        let waits = |running: &Running| matches!(running, Running::Clear(_) | Running::Split(_));
        let waiting = self.operations.running.iter().filter(|(_, running)| waits(running));
        self.to_go_on.extend(waiting.map(|(id, _)| *id));
        self.unloaded_for_relief(id);
    }

    /// The operation's copies take turns with those of others.
    pub(super) fn join_turns(&mut self, id: OperationId, priority: Priority, most_per_second: Option<Bytes>) {
        let most_per_second = most_per_second.map(Bytes::get);
        self.mover.join(flow(id), priority, most_per_second);
        if let Some(entry) = self.operations.entries.get_mut(&id) {
            Arc::make_mut(entry).most_per_second = most_per_second;
        }
    }

    /// Asks an operation to stop. It ends once what it had is back.
    pub(super) fn cancel(&mut self, id: OperationId, reply: Reply<Operation>) {
        let answer = self.operations.show(id).and_then(|operation| {
            if operation.state.ended() {
                let hint = match (operation.state, operation.kind) {
                    (OperationState::Completed, OperationKind::Load) => {
                        "what it brought is there: unload it instead"
                    }
                    (OperationState::Completed, _) => "what it did is done",
                    _ => "it has left nothing that could be cancelled",
                };
                return Err(ApiError::new(ErrorCode::Conflict, format!("operation {id} has ended already"))
                    .hint(hint)
                    .detail("state", serde_json::json!(operation.state)));
            }
            if matches!(self.operations.running.get(&id), Some(Running::Unload(_) | Running::Clear(_))) {
                return Err(ApiError::new(ErrorCode::Conflict, "what gives memory back cannot be cancelled")
                    .hint("it ends in a moment; load the model or allocate again afterwards"));
            }
            self.begin_cancel(id);
            self.operations.show(id)
        });
        self.answer(reply, answer);
    }

    pub(super) fn begin_cancel(&mut self, id: OperationId) {
        if self.waiting_loads.contains_key(&id) {
            let error = ApiError::new(ErrorCode::Cancelled, "the load was cancelled while it waited");
            return self.end_waiting_load(id, error);
        }
        if let Some(progress) = self.operations.progress(id) {
            progress.cancelled.store(true, Ordering::Relaxed);
        }
        // What is paused has to run to its end.
        self.mover.pause(flow(id), false);
        self.mover.sweep();
        self.to_go_on.insert(id);
    }

    /// Holds an operation that moves bytes, or lets it go on.
    pub(super) fn pause(&mut self, id: OperationId, paused: bool, reply: Reply<Operation>) {
        let answer = self.operations.show(id).and_then(|operation| {
            let ended = operation.state.ended();
            match self.operations.running.get(&id) {
                Some(Running::Transfer(_) | Running::Defragment(_)) if self.operations.cancelled(id) => {
                    return Err(ApiError::new(
                        ErrorCode::Conflict,
                        format!("operation {id} was cancelled and ends in a moment"),
                    ));
                }
                Some(Running::Transfer(_) | Running::Defragment(_)) => {}
                _ if ended => {
                    return Err(ApiError::new(
                        ErrorCode::Conflict,
                        format!("operation {id} has ended already"),
                    )
                    .detail("state", serde_json::json!(operation.state)));
                }
                _ => {
                    return Err(ApiError::new(ErrorCode::Conflict, "only what copies bytes can be paused")
                        .hint("a load can be cancelled and begun again; the rest ends in a moment"));
                }
            }
            self.mover.pause(flow(id), paused);
            self.operations.set_paused(id, paused, self.now);
            self.to_go_on.insert(id);
            self.operations.show(id)
        });
        if let Ok(operation) = &answer {
            self.emit(EventKind::OperationChanged, serde_json::json!(operation));
        }
        self.answer(reply, answer);
    }
}
