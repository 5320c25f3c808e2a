//! The one link between a simulated device and the host: transfers share its speed and take their turns.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Link {
    bytes_per_second: Option<u64>,
    /// When the transfers that have their turn already will be through.
    free_at: Mutex<Option<Instant>>,
}

impl Link {
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(None) }
    }

    /// Takes a turn for `bytes` and returns when it is over.
    #[allow(clippy::disallowed_methods, reason = "the time that a transfer takes is what is simulated here")]
    pub(super) fn transfer(&self, bytes: u64) {
        let Some(speed) = self.bytes_per_second else { return };
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(speed);
        let takes = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let now = Instant::now();
        let through = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let through =
                free_at.map_or(now, |free_at| free_at.max(now)) + takes.min(Duration::from_hours(1));
            *free_at = Some(through);
            through
        };
        thread::sleep(through.saturating_duration_since(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfers_at_the_same_time_share_the_link() {
        let link = Link::new(Some(1 << 20));
        let begun = Instant::now();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| link.transfer(8 << 10));
            }
        });
        assert!(begun.elapsed() >= Duration::from_micros(31_250), "{:?}", begun.elapsed());
    }
}
