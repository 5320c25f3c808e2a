//! The decisions of vramd: facts in, decisions out.
//!
//! Owns the ledger, placement, what goes when room is needed and what of it is kept in RAM, what runs take beside the weights, plans of loads and of moves, how components are spread over devices, the queue of requests that wait, quiet hours, pressure, when workers are started again, the registry of models and the reading
//! of model headers, the replay of traces, and a simulator of machines. Leaves out everything that touches the world: no IO, no clock, no async, no randomness, no
//! ids of its own making beyond counters. The same code runs in the daemon and in property tests over random
//! histories.

pub mod compaction;
pub mod eviction;
pub mod footprints;
pub mod layout;
pub mod ledger;
pub mod models;
pub mod placement;
pub mod plan;
pub mod pressure;
pub mod queue;
pub mod quiet_hours;
mod ranges;
pub mod replay;
pub mod restarts;
pub mod simulation;
pub mod split;
pub mod succession;
pub mod tiers;
pub mod trial;
pub mod turns;
pub mod usage;

use jiff::Timestamp;

pub use ranges::Ranges;

/// A moment of a clock that never goes back, in milliseconds since the daemon started. Deadlines are kept in it,
/// so that a corrected wall clock ends no lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tick(pub u64);

impl Tick {
    #[must_use]
    pub fn after_seconds(self, seconds: u64) -> Self {
        Self(self.0.saturating_add(seconds.saturating_mul(1000)))
    }
}

/// Both clocks, read once at the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    pub tick: Tick,
    /// For people: what answers and events show.
    pub wall: Timestamp,
}

impl Now {
    /// What the wall clock will show in `seconds`, as far as it can be written.
    pub fn wall_after(self, seconds: u64) -> Timestamp {
        i64::try_from(seconds)
            .ok()
            .and_then(|seconds| self.wall.checked_add(jiff::SignedDuration::from_secs(seconds)).ok())
            .unwrap_or(Timestamp::MAX)
    }
}
