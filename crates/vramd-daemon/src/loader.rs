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
/// Reads in flight. More do not help a disk that two can keep busy, and pages are faulted in before.
const THREADS: usize = 4;

/// A component, and the block that it goes to.
#[derive(Debug)]
pub struct Target {
    pub segment: SegmentId,
    pub offset: u64,
    pub plan: Arc<Plan>,
    pub from: From,
}

/// Where a component's bytes come from.
#[derive(Debug)]
pub enum From {
    Files(Prepared),
    /// A block on another device that has them.
    Block {
        device: Arc<Opened>,
        segment: SegmentId,
        offset: u64,
    },
}

/// One read.
struct Piece<'a> {
    from: &'a From,
    /// Of `From::Files`.
    file: usize,
    source_offset: u64,
    range: Range,
}

impl Piece<'_> {
    fn read(&self, device: &dyn Device, buffer: &mut Vec<u8>) -> Result<(), LoadFailure> {
        match self.from {
            From::Files(prepared) => device
                .fill_from_file(self.range, &prepared.files[self.file], self.source_offset)
                .map_err(|error| LoadFailure::Device(device.facts().device.clone(), error)),
            From::Block { device: from, segment, .. } => {
                let source = Range { segment: *segment, offset: self.source_offset, bytes: self.range.bytes };
                let copied = mover::copy((&*from.0, source), (device, self.range), buffer, &mut |_| {});
                copied.map(|_| ()).map_err(|failure| match failure {
                    CopyFailure::Device(device, error) => LoadFailure::Device(device, error),
                    CopyFailure::Cancelled | CopyFailure::Checksum(_) => LoadFailure::Cancelled,
                })
            }
        }
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
                    let what = format!("some of model {} is still being unloaded", load.model);
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

/// Reads all targets. Blocking. On an error the blocks' contents are undefined.
pub fn read(device: &dyn Device, targets: &[Target], progress: &Progress) -> Result<(), LoadFailure> {
    let pieces: Vec<Piece<'_>> = targets.iter().flat_map(pieces).collect();
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<LoadFailure>> = Mutex::new(None);
    let work = || {
        let mut buffer = Vec::new();
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = if progress.cancelled.load(Ordering::Relaxed) {
                Err(LoadFailure::Cancelled)
            } else {
                piece.read(device, &mut buffer)
            };
            if let Err(error) = outcome {
                failure.lock().expect("no thread panics while it holds this").get_or_insert(error);
                next.store(pieces.len(), Ordering::Relaxed);
                return;
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
    match failure.into_inner().expect("no thread panics while it holds this") {
        Some(failure) => Err(failure),
        None => targets.iter().try_for_each(|target| match &target.from {
            From::Files(prepared) => prepared.unchanged().map_err(|error| {
                LoadFailure::Device(device.facts().device.clone(), DeviceError::Source(error))
            }),
            From::Block { .. } => Ok(()),
        }),
    }
}

fn pieces(target: &Target) -> impl Iterator<Item = Piece<'_>> {
    target.plan.layout.spans.iter().flat_map(move |span| {
        (0..span.bytes.div_ceil(PIECE_BYTES)).map(move |index| {
            let start = index * PIECE_BYTES;
            let source_offset = match &target.from {
                From::Files(_) => span.source_offset + start,
                From::Block { offset, .. } => offset + span.block_offset + start,
            };
            Piece {
                from: &target.from,
                file: span.file,
                source_offset,
                range: Range {
                    segment: target.segment,
                    offset: target.offset + span.block_offset + start,
                    bytes: PIECE_BYTES.min(span.bytes - start),
                },
            }
        })
    })
}
