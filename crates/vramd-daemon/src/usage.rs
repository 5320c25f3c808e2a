//! Takes a sample of every device once a second, for `/api/memory/usage`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vramd_core::usage::{History, SPLIT_SECONDS, Sample, Split};

use crate::clock;
use crate::driver::{Driver, Event};

const EVERY: Duration = Duration::from_secs(1);

/// The last hour. Only those who ask for it, and the sampler, hold the lock.
#[derive(Debug, Clone, Default)]
pub struct UsageHistory(Arc<Mutex<History>>);

impl UsageHistory {
    pub fn with<T>(&self, look: impl FnOnce(&mut History) -> T) -> T {
        // No change of it can be left half done.
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Samples until the driver ends.
pub async fn sample(driver: Driver, history: UsageHistory) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last_split = i64::MIN;
    loop {
        ticks.tick().await;
        let Ok(counts) = driver.ask(Event::TakeCounts).await else { return };
        let (snapshot, second) = (driver.snapshot(), clock::wall().as_second());
        let split = last_split.saturating_add(SPLIT_SECONDS) <= second;
        if split {
            last_split = second;
        }
        for view in snapshot.devices.iter().filter(|view| view.sampled_at.is_some() && !view.lost) {
            let total = driver.devices.get(&view.device).map_or(0, |device| device.facts().total_bytes);
            let counts = counts.get(&view.device).copied().unwrap_or_default();
            let sample = Sample { second, usage: view.usage, total_bytes: total, counts };
            let split = split.then(|| Split::of(&snapshot.allocations, &view.device, second));
            history.with(|history| {
                history.push(&view.device, sample);
                if let Some(split) = split {
                    history.push_split(&view.device, split);
                }
            });
        }
    }
}
