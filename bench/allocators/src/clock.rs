//! Single calls timed, in nanoseconds, with the clock's own cost taken off.

use std::time::{Duration, Instant};

pub struct Clock {
    nanoseconds_per_tick: f64,
    /// Of a reading right after a reading.
    cost: u64,
}

impl Clock {
    pub fn new() -> Self {
        let (ticks, instant) = (now(), Instant::now());
        while instant.elapsed() < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        let nanoseconds_per_tick = instant.elapsed().as_nanos() as f64 / (now() - ticks) as f64;
        let mut costs: Vec<u64> = (0..10_000).map(|_| now().abs_diff(now())).collect();
        costs.sort_unstable();
        Self { nanoseconds_per_tick, cost: costs[costs.len() / 2] }
    }

    #[inline]
    pub fn time<T>(&self, into: &mut Vec<u32>, call: impl FnOnce() -> T) -> T {
        let start = now();
        let result = call();
        into.push((now() - start).saturating_sub(self.cost) as u32);
        result
    }

    /// Median and 99th percentile.
    pub fn figures(&self, mut ticks: Vec<u32>) -> (f64, f64) {
        ticks.sort_unstable();
        let at = |share: f64| f64::from(ticks[((ticks.len() - 1) as f64 * share) as usize]);
        (at(0.5) * self.nanoseconds_per_tick, at(0.99) * self.nanoseconds_per_tick)
    }
}

/// The processor's counter; the fences keep the call between its two readings.
#[cfg(target_arch = "x86_64")]
fn now() -> u64 {
    // SAFETY: every processor of this architecture has both instructions.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        let ticks = std::arch::x86_64::_rdtsc();
        std::arch::x86_64::_mm_lfence();
        ticks
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn now() -> u64 {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    START.elapsed().as_nanos() as u64
}
