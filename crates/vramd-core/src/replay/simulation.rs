//! A trace in a pool: one address space under the daemon's own rule, lowest offset first.
//!
//! A request that finds no room is refused, its free is left out, and the history goes on.

use serde::Serialize;

use super::trace::{DeviceTrace, Irregularities, Step};
use crate::Ranges;

/// A pool that no trace fills: the smallest one is looked for in it.
const ENDLESS_BYTES: u64 = 1 << 62;
/// How many refusals a report names.
const NAMED_REFUSALS: usize = 100;
/// How many samples of the state a report has, at most.
const SAMPLES: usize = 240;

#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The pool's size; None for the smallest in which nothing is refused.
    pub pool_bytes: Option<u64>,
    /// Sizes are rounded up to it; a power of two.
    pub alignment: u64,
}

/// The trace needs more at once than any pool has.
#[derive(Debug, thiserror::Error)]
#[error("at event {event} the trace holds more than any pool has ({ENDLESS_BYTES} bytes)")]
pub struct PoolTooSmall {
    pub event: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub device: String,
    pub events: usize,
    pub allocations: u64,
    pub frees: u64,
    pub live_at_end: u64,
    pub milliseconds: f64,
    pub pool_bytes: u64,
    /// The pool is the smallest in which nothing is refused.
    pub smallest_pool: bool,
    pub alignment: u64,
    /// The most that was asked for at one time, refused or not.
    pub peak_live_bytes: u64,
    /// One above the highest byte that was ever given out.
    pub peak_address_bytes: u64,
    /// What the pool has above the live peak, as a share of that.
    pub overhead: f64,
    pub fragmentation: Fragmentation,
    pub refusals: Refusals,
    /// None if the trace has no times, or nothing was freed.
    pub lifetimes: Option<Lifetimes>,
    /// How often the traced allocator itself had failed.
    pub traced_failures: u64,
    pub irregularities: Irregularities,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fragmentation {
    pub peak: f64,
    /// Over all events.
    pub mean: f64,
    pub samples: Vec<Sample>,
}

/// The pool after an event.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sample {
    pub event: usize,
    pub milliseconds: f64,
    pub used_bytes: u64,
    pub free_bytes: u64,
    pub largest_free_bytes: u64,
    pub hole_count: usize,
    pub fragmentation: f64,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusals {
    pub count: u64,
    /// Refused although as much was free, only not in one piece.
    pub by_fragmentation: u64,
    /// The first of them.
    pub first: Vec<Refusal>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    pub event: usize,
    pub milliseconds: f64,
    pub bytes: u64,
    pub free_bytes: u64,
    pub largest_free_bytes: u64,
}

/// Of the blocks that were freed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Lifetimes {
    pub median_milliseconds: f64,
    pub p99_milliseconds: f64,
}

/// Where a block was, and from which event up to which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    pub begin: usize,
    pub end: usize,
    pub offset: u64,
    pub bytes: u64,
}

#[derive(Debug)]
pub struct Replay {
    pub report: Report,
    pub placed: Vec<Placed>,
    /// The events that were refused.
    pub refused: Vec<usize>,
}

/// Replays a device's history.
pub fn replay(trace: &DeviceTrace, options: Options) -> Result<Replay, PoolTooSmall> {
    let pool = match options.pool_bytes {
        Some(bytes) => bytes.min(ENDLESS_BYTES),
        None => smallest_pool(trace, options.alignment)?,
    };
    let mut pool = Pool::new(trace, pool, options.alignment);
    let mut demand = Demand::default();
    let mut report = Report {
        device: trace.name.clone(),
        events: trace.events.len(),
        allocations: trace.blocks.len() as u64,
        frees: 0,
        live_at_end: 0,
        milliseconds: milliseconds(trace.events.last().map_or(0, |event| event.at_micros)),
        pool_bytes: pool.ranges.bytes(),
        smallest_pool: options.pool_bytes.is_none(),
        alignment: options.alignment,
        peak_live_bytes: 0,
        peak_address_bytes: 0,
        overhead: 0.0,
        fragmentation: Fragmentation { peak: 0.0, mean: 0.0, samples: Vec::new() },
        refusals: Refusals::default(),
        lifetimes: None,
        traced_failures: 0,
        irregularities: trace.irregularities,
    };
    let mut born = vec![0; trace.blocks.len()];
    let (mut lifetimes, mut refused) = (Vec::new(), Vec::new());
    let stride = trace.events.len().div_ceil(SAMPLES).max(1);
    for (number, event) in trace.events.iter().enumerate() {
        match event.step {
            Step::Allocate(block) => {
                let bytes = trace.blocks[block as usize];
                demand.add(bytes);
                born[block as usize] = event.at_micros;
                if !pool.allocate(number, block) {
                    refused.push(number);
                    report.refusals.count += 1;
                    report.refusals.by_fragmentation += u64::from(bytes <= pool.ranges.free());
                    if report.refusals.first.len() < NAMED_REFUSALS {
                        report.refusals.first.push(Refusal {
                            event: number,
                            milliseconds: milliseconds(event.at_micros),
                            bytes,
                            free_bytes: pool.ranges.free(),
                            largest_free_bytes: pool.ranges.largest_free(),
                        });
                    }
                }
            }
            Step::Free(block) => {
                report.frees += 1;
                demand.live -= u128::from(trace.blocks[block as usize]);
                lifetimes.push(event.at_micros - born[block as usize]);
                pool.free(number, block);
            }
            Step::Failed(_) => report.traced_failures += 1,
            Step::Gap => {}
        }
        let sample = pool.sample(number, event.at_micros);
        report.fragmentation.peak = report.fragmentation.peak.max(sample.fragmentation);
        report.fragmentation.mean += sample.fragmentation / trace.events.len() as f64;
        if number % stride == stride - 1 || number + 1 == trace.events.len() {
            report.fragmentation.samples.push(sample);
        }
    }
    report.live_at_end = report.allocations - report.frees;
    report.peak_live_bytes = u64::try_from(demand.peak).unwrap_or(u64::MAX);
    report.peak_address_bytes = pool.peak_address;
    if demand.peak > 0 {
        report.overhead = report.pool_bytes as f64 / demand.peak as f64 - 1.0;
    }
    if report.milliseconds > 0.0 {
        report.lifetimes = Lifetimes::of(lifetimes);
    }
    Ok(Replay { report, placed: pool.finish(trace.events.len()), refused })
}

/// Exactly the highest end of a block in a pool without an end: as long as nothing is refused, the lowest place that
/// fits does not depend on where the pool ends.
fn smallest_pool(trace: &DeviceTrace, alignment: u64) -> Result<u64, PoolTooSmall> {
    let mut pool = Pool::new(trace, ENDLESS_BYTES, alignment);
    for (number, event) in trace.events.iter().enumerate() {
        match event.step {
            Step::Allocate(block) if !pool.allocate(number, block) => {
                return Err(PoolTooSmall { event: number });
            }
            Step::Free(block) => pool.free(number, block),
            Step::Allocate(_) | Step::Failed(_) | Step::Gap => {}
        }
    }
    Ok(pool.peak_address)
}

#[derive(Default)]
struct Demand {
    live: u128,
    peak: u128,
}

impl Demand {
    fn add(&mut self, bytes: u64) {
        self.live += u128::from(bytes);
        self.peak = self.peak.max(self.live);
    }
}

struct Pool<'a> {
    trace: &'a DeviceTrace,
    ranges: Ranges,
    alignment: u64,
    peak_address: u64,
    /// By block; None before it is placed, and for good if it is refused. `end` is 0 while it lives.
    placed: Vec<Option<Placed>>,
}

impl<'a> Pool<'a> {
    fn new(trace: &'a DeviceTrace, bytes: u64, alignment: u64) -> Self {
        let placed = vec![None; trace.blocks.len()];
        Self { trace, ranges: Ranges::new(bytes), alignment, peak_address: 0, placed }
    }

    /// False if it is refused. A block of no bytes takes no place.
    fn allocate(&mut self, event: usize, block: u32) -> bool {
        let asked = self.trace.blocks[block as usize];
        if asked == 0 {
            return true;
        }
        let Some(bytes) = asked.checked_next_multiple_of(self.alignment) else { return false };
        let Some(offset) = self.ranges.take(bytes, self.alignment) else { return false };
        self.peak_address = self.peak_address.max(offset + bytes);
        self.placed[block as usize] = Some(Placed { begin: event, end: 0, offset, bytes });
        true
    }

    fn free(&mut self, event: usize, block: u32) {
        if let Some(placed) = &mut self.placed[block as usize] {
            placed.end = event;
            self.ranges.give(placed.offset, placed.bytes);
        }
    }

    fn sample(&self, event: usize, at_micros: u64) -> Sample {
        Sample {
            event,
            milliseconds: milliseconds(at_micros),
            used_bytes: self.ranges.bytes() - self.ranges.free(),
            free_bytes: self.ranges.free(),
            largest_free_bytes: self.ranges.largest_free(),
            hole_count: self.ranges.hole_count(),
            fragmentation: self.ranges.fragmentation(),
        }
    }

    fn finish(self, events: usize) -> Vec<Placed> {
        let mut placed: Vec<Placed> = self.placed.into_iter().flatten().collect();
        for block in placed.iter_mut().filter(|block| block.end == 0) {
            block.end = events;
        }
        placed
    }
}

impl Lifetimes {
    fn of(mut micros: Vec<u64>) -> Option<Self> {
        micros.sort_unstable();
        let last = micros.len().checked_sub(1)?;
        let quantile = |percent: usize| milliseconds(micros[last * percent / 100]);
        Some(Self { median_milliseconds: quantile(50), p99_milliseconds: quantile(99) })
    }
}

fn milliseconds(micros: u64) -> f64 {
    micros as f64 / 1000.0
}
