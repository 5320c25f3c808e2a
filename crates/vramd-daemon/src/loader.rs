//! Loads: headers read and checked, the driver asked, files read straight into device memory.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vramd_api::{ApiError, ComponentName, ErrorCode, Operation};
use vramd_device::{Device, DeviceError, Range, SegmentId};

use crate::driver::{Driver, Event, Load, LoadAnswer, Progress, Snapshot};
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
    pub segment: u64,
    pub offset: u64,
    pub prepared: Prepared,
}

/// One read.
struct Piece<'a> {
    target: &'a Target,
    file: usize,
    source_offset: u64,
    range: Range,
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

/// Reads all targets; `Err(None)` when it was cancelled. Blocking. On an error the blocks' contents are undefined.
pub fn read(device: &dyn Device, targets: &[Target], progress: &Progress) -> Result<(), Option<DeviceError>> {
    let pieces: Vec<Piece<'_>> = targets.iter().flat_map(pieces).collect();
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<Option<DeviceError>>> = Mutex::new(None);
    let work = || {
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = if progress.cancelled.load(Ordering::Relaxed) {
                Err(None)
            } else {
                let source = &piece.target.prepared.files[piece.file];
                device.fill_from_file(piece.range, source, piece.source_offset).map_err(Some)
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
        Some(error) => Err(error),
        None => targets
            .iter()
            .try_for_each(|target| target.prepared.unchanged())
            .map_err(|e| Some(DeviceError::Source(e))),
    }
}

fn pieces(target: &Target) -> impl Iterator<Item = Piece<'_>> {
    target.prepared.plan.layout.spans.iter().flat_map(move |span| {
        (0..span.bytes.div_ceil(PIECE_BYTES)).map(move |index| {
            let start = index * PIECE_BYTES;
            Piece {
                target,
                file: span.file,
                source_offset: span.source_offset + start,
                range: Range {
                    segment: SegmentId(target.segment),
                    offset: target.offset + span.block_offset + start,
                    bytes: PIECE_BYTES.min(span.bytes - start),
                },
            }
        })
    })
}
