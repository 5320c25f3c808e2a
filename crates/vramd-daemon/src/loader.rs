//! Loads: headers read and checked, the driver asked, files read straight into device memory.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vramd_api::{ApiError, ComponentName, ErrorCode, Operation};
use vramd_core::models::Plan;
use vramd_device::{Device, DeviceError, Range, SegmentId};

use crate::driver::{Driver, Event, Load, LoadAnswer, LoadFailure, Progress, Snapshot};
use crate::mover::{self, CopyFailure, Opened};
use crate::source::{Prepared, Roots};

/// Bytes in one piece: what one thread reads before it looks at the cancel flag and the next piece.
const PIECE_BYTES: u64 = 4 << 20;
/// How long a load waits for what is on its way out.
const GOING: Duration = Duration::from_secs(10);
/// Reads in flight. Two keep a disk busy, while others make pages; more load no faster, and are in the way of other calls.
const THREADS: usize = 4;

/// A component, and the block that it goes to.
#[derive(Debug)]
pub struct Target {
    pub segment: SegmentId,
    pub offset: u64,
    pub plan: Arc<Plan>,
    pub from: From,
    /// Sum what has arrived.
    pub checksum: bool,
}

/// Where a component's bytes come from.
#[derive(Debug)]
pub enum From {
    Files(Prepared),
    /// A block on another device that has them; `files` in case that it cannot be read.
    Block {
        device: Arc<Opened>,
        segment: SegmentId,
        offset: u64,
        files: Prepared,
    },
}

/// One read.
struct Piece<'a> {
    /// Which target it is of.
    target: usize,
    from: &'a From,
    checksum: bool,
    file: usize,
    file_offset: u64,
    /// In `From::Block`.
    block_offset: u64,
    range: Range,
}

impl Piece<'_> {
    fn read(&self, device: &dyn Device, buffer: &mut Vec<u8>) -> Result<(), LoadFailure> {
        match self.from {
            From::Files(prepared) => device
                .fill_from_file(self.range, &prepared.files[self.file], self.file_offset)
                .map_err(|error| LoadFailure::Device(device.facts().device.clone(), error)),
            From::Block { device: from, segment, files, .. } => {
                let source = Range { segment: *segment, offset: self.block_offset, bytes: self.range.bytes };
                let to = &device.facts().device;
                match mover::copy((&*from.0, source), (device, self.range), buffer, &mut |_| {}) {
                    Ok(_) => Ok(()),
                    Err(CopyFailure::Device(on, error)) if on != *to => {
                        tracing::warn!(device = %on, %error, "what another device has cannot be copied: its files are read");
                        let read =
                            device.fill_from_file(self.range, &files.files[self.file], self.file_offset);
                        read.map_err(|error| LoadFailure::Device(to.clone(), error))
                    }
                    Err(CopyFailure::Device(on, error)) => Err(LoadFailure::Device(on, error)),
                    Err(CopyFailure::Cancelled | CopyFailure::Checksum(_)) => Err(LoadFailure::Cancelled),
                }
            }
        }
    }

    /// The checksum of what has arrived, if it is wanted.
    fn sum(&self, device: &dyn Device, buffer: &mut Vec<u8>) -> Result<Option<mover::Sum>, LoadFailure> {
        if !self.checksum {
            return Ok(None);
        }
        let sum = mover::Sum::of(device, self.range, buffer);
        sum.map(Some).map_err(|error| LoadFailure::Device(device.facts().device.clone(), error))
    }
}

/// Starts a load, or joins the one under way; answers its operation.
pub async fn begin(driver: &Driver, roots: &Arc<Roots>, load: &Load) -> Result<Operation, ApiError> {
    let mut prepared = None;
    loop {
        match driver.ask(|reply| Event::Load(load.clone(), prepared.take(), reply)).await? {
            LoadAnswer::Operation(operation) => return Ok(*operation),
            LoadAnswer::Prepare(sources) => prepared = Some(prepare(roots, sources).await?),
            LoadAnswer::After(operation) => {
                let mut snapshots = driver.snapshots();
                let ended = |snapshot: &Arc<Snapshot>| {
                    snapshot.operations.get(&operation).is_none_or(|entry| entry.state().ended())
                };
                let gone = tokio::time::timeout(GOING, snapshots.wait_for(ended)).await;
                if !matches!(gone, Ok(Ok(_))) {
                    let what = format!("some of model {} is still being loaded or unloaded", load.model);
                    return Err(ApiError::new(ErrorCode::Conflict, what)
                        .hint("wait for that operation, then load again")
                        .detail("operationId", operation.to_string()));
                }
            }
        }
    }
}

/// Opens files and reads their headers on a thread where that may block.
pub async fn prepare(
    roots: &Arc<Roots>,
    sources: BTreeMap<ComponentName, String>,
) -> Result<BTreeMap<ComponentName, Prepared>, ApiError> {
    // A hostile header takes hundreds of megabytes to read: not many at one time.
    let _turn = roots.turns.acquire().await;
    let at = roots.clone();
    tokio::task::spawn_blocking(move || at.prepare(&sources)).await.map_err(|_| {
        ApiError::new(ErrorCode::Internal, "reading the model's headers failed; see the daemon's log")
    })?
}

/// Reads all targets; answers the checksum of each that was to be summed. Blocking. On an error the blocks' contents are undefined.
pub fn read(
    device: &dyn Device,
    targets: &[Target],
    progress: &Progress,
) -> Result<Vec<Option<u64>>, LoadFailure> {
    let pieces: Vec<Piece<'_>> = targets.iter().enumerate().flat_map(pieces).collect();
    let next = AtomicUsize::new(0);
    let sums: Mutex<BTreeMap<usize, (usize, mover::Sum)>> = Mutex::default();
    let failure: Mutex<Option<LoadFailure>> = Mutex::new(None);
    let work = || {
        let mut buffer = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(piece) = pieces.get(number) else { return };
            let outcome = if progress.cancelled.load(Ordering::Relaxed) {
                Err(LoadFailure::Cancelled)
            } else {
                piece.read(device, &mut buffer).and_then(|()| piece.sum(device, &mut buffer))
            };
            match outcome {
                Err(error) => {
                    failure.lock().expect(HELD).get_or_insert(error);
                    next.store(pieces.len(), Ordering::Relaxed);
                    return;
                }
                Ok(None) => {}
                Ok(Some(sum)) => {
                    sums.lock().expect(HELD).insert(number, (piece.target, sum));
                }
            }
            progress.done.fetch_add(piece.range.bytes, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..THREADS.min(pieces.len()) {
            scope.spawn(work);
        }
        work();
    });
    if let Some(failure) = failure.into_inner().expect(HELD) {
        return Err(failure);
    }
    for target in targets {
        let (From::Files(prepared) | From::Block { files: prepared, .. }) = &target.from;
        let unchanged = prepared.unchanged().map_err(DeviceError::Source);
        unchanged.map_err(|error| LoadFailure::Device(device.facts().device.clone(), error))?;
    }
    let mut joined: Vec<Option<mover::Sum>> = vec![None; targets.len()];
    for (target, sum) in sums.into_inner().expect(HELD).into_values() {
        joined[target] = Some(joined[target].map_or(sum, |before| before.then(sum)));
    }
    Ok(joined.into_iter().map(|sum| sum.map(|sum| sum.value)).collect())
}

/// Why a lock is never poisoned.
const HELD: &str = "no thread panics while it holds this";

fn pieces((number, target): (usize, &Target)) -> impl Iterator<Item = Piece<'_>> {
    target.plan.layout.spans.iter().flat_map(move |span| {
        (0..span.bytes.div_ceil(PIECE_BYTES)).map(move |index| {
            let start = index * PIECE_BYTES;
            let within = match &target.from {
                From::Files(_) => 0,
                From::Block { offset, .. } => *offset,
            };
            Piece {
                target: number,
                from: &target.from,
                checksum: target.checksum,
                file: span.file,
                file_offset: span.source_offset + start,
                block_offset: within + span.block_offset + start,
                range: Range {
                    segment: target.segment,
                    offset: target.offset + span.block_offset + start,
                    bytes: PIECE_BYTES.min(span.bytes - start),
                },
            }
        })
    })
}
