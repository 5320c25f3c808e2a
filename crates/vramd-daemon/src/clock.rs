//! The one place that reads clocks.

use std::time::Instant;

use jiff::Timestamp;
use vramd_core::{Now, Tick};

/// Counts from the moment the daemon started.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    pub fn start() -> Self {
        Self(Instant::now())
    }

    pub fn now(self) -> Now {
        let tick = u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX);
        Now { tick: Tick(tick), wall: wall() }
    }
}

/// What the wall clock shows, to the millisecond.
pub fn wall() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}
