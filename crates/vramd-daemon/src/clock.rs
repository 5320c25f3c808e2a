//! The one place that reads clocks.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use jiff::civil::Time;
use jiff::tz::TimeZone;
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

/// The time of day where the daemon runs. Tests bring one of their own.
#[derive(Clone)]
pub struct LocalTime(Arc<dyn Fn(Timestamp) -> Time + Send + Sync>);

impl LocalTime {
    /// In the machine's time zone, or what `TZ` names, as it is now; summer time is followed.
    pub fn system() -> Self {
        let zone = TimeZone::system();
        Self::of(move |at| zone.to_datetime(at).time())
    }

    pub fn of(time: impl Fn(Timestamp) -> Time + Send + Sync + 'static) -> Self {
        Self(Arc::new(time))
    }

    pub fn at(&self, at: Timestamp) -> Time {
        (self.0)(at)
    }
}

impl fmt::Debug for LocalTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LocalTime")
    }
}

/// What the wall clock shows, to the millisecond.
pub fn wall() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}
