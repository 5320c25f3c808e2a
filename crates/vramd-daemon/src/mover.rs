//! Copies: a few threads that move bytes between blocks, piece by piece, in fair turns.
//!
//! A [`Job`] is one block's copy and belongs to a flow, its operation. While one piece is read from one device another is
//! written to the next, so a copy between two devices overlaps by itself. What is cancelled stops before its next
//! piece. A job ends by calling back, exactly once; on an error the target's contents are undefined and the source is
//! as it was.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crc_fast::CrcAlgorithm::Crc64Nvme;
use crc_fast::Digest;
use vramd_api::{DeviceId, Priority};
use vramd_core::turns::{Turn, Turns};
use vramd_device::{Device, DeviceError, Range};

use crate::driver::Progress;

/// What is moved in one turn by way of host memory: large enough that turns cost nothing, small enough to stay in a cache.
const PIECE_BYTES: u64 = 1 << 20;
/// What a device copies by itself in one turn: each is a call of its driver, which takes a while however little it copies.
const DEVICE_PIECE_BYTES: u64 = 32 << 20;
/// Two keep both ends of a copy busy; a few more let several devices work at once.
const THREADS: usize = 4;

/// One block to copy.
#[derive(Debug)]
pub struct Job {
    pub flow: u64,
    pub from: (Arc<Opened>, Range),
    pub to: (Arc<Opened>, Range),
    /// Compare what arrived with what was sent.
    pub checksum: bool,
    /// Its rate is bounded: it goes in small steps.
    pub bounded: bool,
    /// The operation's: counts bytes, and stops all of its jobs.
    pub progress: Arc<Progress>,
    /// Stops this one.
    pub cancelled: Arc<AtomicBool>,
}

/// A device by its own name for `Debug`.
pub struct Opened(pub Arc<dyn Device>);

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.facts().device.as_str())
    }
}

/// What is called when a job has ended.
type Done = Box<dyn FnOnce(Outcome) + Send>;

/// The checksum of the bytes, if it was asked for.
pub type Outcome = Result<Option<u64>, CopyFailure>;

/// Why the bytes did not arrive.
#[derive(Debug)]
pub enum CopyFailure {
    Cancelled,
    Device(DeviceId, DeviceError),
    /// What arrived is not what was sent.
    Checksum(DeviceId),
}

/// The threads; dropped, they end once they have finished their pieces.
pub struct Mover(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    began: Instant,
}

#[derive(Default)]
struct State {
    turns: Turns,
    jobs: BTreeMap<u64, Active>,
    /// The jobs of each flow that have pieces nobody has taken.
    waiting: BTreeMap<u64, VecDeque<u64>>,
    last_job: u64,
    /// Jobs may have been cancelled that still wait for their turn.
    sweep: bool,
    stopping: bool,
}

struct Active {
    job: Arc<Job>,
    done: Done,
    /// The first byte that nobody has taken.
    next: u64,
    in_flight: usize,
    failed: Option<CopyFailure>,
    /// By offset: the checksums of the pieces.
    sums: BTreeMap<u64, (u64, u64)>,
}

impl Mover {
    pub fn start() -> std::io::Result<Self> {
        let state = Mutex::new(State::default());
        let shared = Arc::new(Shared { state, changed: Condvar::new(), began: Instant::now() });
        for number in 0..THREADS {
            let shared = shared.clone();
            std::thread::Builder::new().name(format!("vramd-mover-{number}")).spawn(move || shared.run())?;
        }
        Ok(Self(shared))
    }

    /// A flow whose jobs take turns with those of others.
    pub fn join(&self, flow: u64, priority: Priority, bytes_per_second: Option<u64>) {
        self.0.state().turns.join(flow, priority, bytes_per_second);
    }

    pub fn leave(&self, flow: u64) {
        self.0.state().turns.leave(flow);
    }

    pub fn pause(&self, flow: u64, paused: bool) {
        self.0.state().turns.pause(flow, paused);
        self.0.changed.notify_all();
    }

    /// Jobs were cancelled: they end now, and not at their next turn, which a bound on their rate may put far off.
    pub fn sweep(&self) {
        self.0.state().sweep = true;
        self.0.changed.notify_all();
    }

    /// Lines a job up behind the others of its flow; `done` is called once it has ended.
    pub fn submit(&self, job: Job, done: Done) {
        let mut guard = self.0.state();
        let state = &mut *guard;
        state.last_job += 1;
        let (id, flow) = (state.last_job, job.flow);
        let (job, sums) = (Arc::new(job), BTreeMap::new());
        // Its turn may be far off.
        state.sweep |= job.is_cancelled();
        state.jobs.insert(id, Active { job, done, next: 0, in_flight: 0, failed: None, sums });
        state.waiting.entry(flow).or_default().push_back(id);
        drop(guard);
        self.0.changed.notify_all();
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.0.state().stopping = true;
        self.0.changed.notify_all();
    }
}

/// A piece that a thread has taken: an offset in the job's block, and its bytes.
struct Piece {
    id: u64,
    job: Arc<Job>,
    offset: u64,
    bytes: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut buffer = Vec::new();
        while let Some(piece) = self.take() {
            let outcome =
                if piece.job.is_cancelled() { Err(CopyFailure::Cancelled) } else { piece.copy(&mut buffer) };
            self.finish(&piece, outcome);
        }
    }

    /// Waits for a piece; None at the end.
    fn take(&self) -> Option<Piece> {
        let mut state = self.state();
        loop {
            if let Some(piece) = state.cancelled_piece() {
                return Some(piece);
            }
            let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
            let turn = state.turns.next(now, |flow| state.waiting.contains_key(&flow));
            state = match turn {
                Turn::Flow(flow) => return Some(state.piece_of(flow, now)),
                _ if state.stopping => return None,
                Turn::Nobody => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Turn::NotBefore(then) => {
                    let wait = Duration::from_nanos(then - now);
                    self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn finish(&self, piece: &Piece, outcome: Result<Option<u64>, CopyFailure>) {
        let mut state = self.state();
        let active = state.jobs.get_mut(&piece.id).expect("a job stays until its last piece is back");
        active.in_flight -= 1;
        match outcome {
            Ok(sum) => {
                piece.job.progress.done.fetch_add(piece.bytes, Ordering::Relaxed);
                active.sums.extend(sum.map(|sum| (piece.offset, (sum, piece.bytes))));
            }
            Err(failure) => {
                active.failed.get_or_insert(failure);
                let whole = active.job.from.1.bytes;
                if std::mem::replace(&mut active.next, whole) < whole {
                    let flow = active.job.flow;
                    state.unwait(flow, piece.id);
                }
            }
        }
        let active = state.jobs.get(&piece.id).expect("it was there above");
        if active.in_flight > 0 || active.next < active.job.from.1.bytes {
            return;
        }
        let ended = state.jobs.remove(&piece.id).expect("it was there above");
        drop(state);
        ended.end();
    }
}

impl Job {
    fn is_on_one_device(&self) -> bool {
        self.from.0.0.facts().device == self.to.0.0.facts().device
    }

    /// By way of host memory.
    fn is_staged(&self) -> bool {
        !self.is_on_one_device() && !self.to.0.0.reaches(&*self.from.0.0)
    }

    fn piece_bytes(&self) -> u64 {
        if self.is_staged() || self.checksum || self.bounded { PIECE_BYTES } else { DEVICE_PIECE_BYTES }
    }

    fn is_cancelled(&self) -> bool {
        let stopped = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        stopped(&self.progress.cancelled) || stopped(&self.cancelled)
    }
}

impl State {
    /// All that is left of a job that was cancelled while it waited.
    fn cancelled_piece(&mut self) -> Option<Piece> {
        if !self.sweep {
            return None;
        }
        let mut waiting = self.waiting.values().flatten();
        let Some(id) = waiting.find(|id| self.jobs[*id].job.is_cancelled()).copied() else {
            self.sweep = false;
            return None;
        };
        let active = self.jobs.get_mut(&id).expect("what waits is there");
        let (offset, job) = (active.next, active.job.clone());
        let bytes = job.from.1.bytes - offset;
        active.next = job.from.1.bytes;
        active.in_flight += 1;
        self.unwait(job.flow, id);
        Some(Piece { id, job, offset, bytes })
    }

    fn piece_of(&mut self, flow: u64, now: u64) -> Piece {
        let id = self.waiting[&flow][0];
        let active = self.jobs.get_mut(&id).expect("what waits is there");
        let (offset, whole) = (active.next, active.job.from.1.bytes);
        let bytes = active.job.piece_bytes().min(whole - offset);
        active.next += bytes;
        active.in_flight += 1;
        let job = active.job.clone();
        if offset + bytes == whole {
            self.unwait(flow, id);
        }
        self.turns.charge(flow, bytes, now);
        Piece { id, job, offset, bytes }
    }

    /// A job has no pieces left to take.
    fn unwait(&mut self, flow: u64, id: u64) {
        if let Some(waiting) = self.waiting.get_mut(&flow) {
            waiting.retain(|other| *other != id);
            if waiting.is_empty() {
                self.waiting.remove(&flow);
            }
        }
    }
}

impl Active {
    fn end(self) {
        let sums = self.sums.into_values().map(|(value, bytes)| Sum { value, bytes });
        let sum = sums.reduce(Sum::then).map(|sum| sum.value);
        let outcome = self.failed.map_or(Ok(sum), Err);
        (self.done)(outcome);
    }
}

impl Piece {
    fn copy(&self, buffer: &mut Vec<u8>) -> Outcome {
        let ((from, source), (to, target)) = (&self.job.from, &self.job.to);
        let of = |range: &Range| Range {
            segment: range.segment,
            offset: range.offset + self.offset,
            bytes: self.bytes,
        };
        let (from, source) = (&*from.0, of(source));
        let (to, target) = (&*to.0, of(target));
        let mut sent = self.job.checksum.then(|| Digest::new(Crc64Nvme));
        let note = &mut |part: &[u8]| sent.iter_mut().for_each(|sum| sum.update(part));
        let straight = copy((from, source), (to, target), buffer, note)?;
        let Some(mut sent) = sent else { return Ok(None) };
        if straight {
            read(from, source, buffer, &mut sent)?;
        }
        let mut arrived = Digest::new(Crc64Nvme);
        read(to, target, buffer, &mut arrived)?;
        if arrived.finalize() != sent.finalize() {
            return Err(CopyFailure::Checksum(to.facts().device.clone()));
        }
        Ok(Some(sent.finalize()))
    }
}

/// Copies a range to one of the same size; false if it went by way of host memory, where `note` has seen it.
pub fn copy(
    (from, source): (&dyn Device, Range),
    (to, target): (&dyn Device, Range),
    buffer: &mut Vec<u8>,
    note: &mut dyn FnMut(&[u8]),
) -> Result<bool, CopyFailure> {
    if from.facts().device == to.facts().device {
        return to.copy(source, target.segment, target.offset).map(|()| true).map_err(on(to));
    }
    if to.reaches(from) {
        match to.copy_from(from, source, target.segment, target.offset) {
            Err(error) if !matches!(error, DeviceError::Lost { .. }) => {
                let (from, to) = (&from.facts().device, &to.facts().device);
                tracing::debug!(%from, %to, %error, "a copy from card to card goes through host memory instead");
            }
            copied => return copied.map(|()| true).map_err(on(to)),
        }
    }
    // Whether the other end failed than the one that was called.
    let mut other_end = false;
    let copied = if to.facts().capabilities.host_access {
        let take = &mut |at, part: &[u8]| {
            note(part);
            to.write(target.segment, target.offset + at, part).inspect_err(|_| other_end = true)
        };
        from.read_into(source, buffer, take).map_err(|error| (from, to, error))
    } else {
        let fill = &mut |at, part: &mut [u8]| {
            let read = from.read(source.segment, source.offset + at, part);
            read.inspect_err(|_| other_end = true)?;
            note(part);
            Ok(())
        };
        to.write_from(target, buffer, fill).map_err(|error| (to, from, error))
    };
    copied.map(|()| false).map_err(|(called, other, error)| on(if other_end { other } else { called })(error))
}

/// The checksum of some bytes, which can be joined with that of those after them.
#[derive(Debug, Clone, Copy)]
pub struct Sum {
    pub value: u64,
    bytes: u64,
}

impl Sum {
    /// Of a range.
    pub fn of(device: &dyn Device, range: Range, buffer: &mut Vec<u8>) -> Result<Self, DeviceError> {
        let mut digest = Digest::new(Crc64Nvme);
        let take = &mut |_, part: &[u8]| {
            digest.update(part);
            Ok(())
        };
        device.read_into(range, buffer, take)?;
        Ok(Self { value: digest.finalize(), bytes: range.bytes })
    }

    pub fn then(self, next: Self) -> Self {
        let value = crc_fast::checksum_combine(Crc64Nvme, self.value, next.value, next.bytes);
        Self { value, bytes: self.bytes + next.bytes }
    }
}

/// Reads what is there into a checksum.
fn read(
    device: &dyn Device,
    range: Range,
    buffer: &mut Vec<u8>,
    sum: &mut Digest,
) -> Result<(), CopyFailure> {
    let take = &mut |_, part: &[u8]| {
        sum.update(part);
        Ok(())
    };
    device.read_into(range, buffer, take).map_err(on(device))
}

fn on(device: &dyn Device) -> impl FnOnce(DeviceError) -> CopyFailure {
    let id = device.facts().device.clone();
    move |error| CopyFailure::Device(id, error)
}
