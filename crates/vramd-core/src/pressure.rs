//! How tight memory is on a device: a ratio, a level that does not flutter, where it is heading, and how much has to become free.
//!
//! What may go at once counts as available, as the page cache does in a system's own figures: a card full of idle models is in no
//! need. Need is what others take on top, or what is in use and cannot go without being asked.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;

use vramd_api::{PressureLevel, Trend};

use crate::Tick;

/// A level is entered at its threshold and left only this far below it.
const HYSTERESIS: f64 = 0.03;
/// Devices keep at most so much free for what others take all of a sudden.
const MOST_HEADROOM: u64 = 4 << 30;
/// Others have grown once they have so much more of a device than when something was last let in.
const GROWN: f64 = 0.005;
/// What is left at the present rate for less than this is as good as gone.
const EXHAUSTED_SECONDS: f64 = 1.0;
/// The trend is that of so long, in milliseconds.
const TREND_WINDOW: u64 = 3000;
/// Who has taken more so many times in a row goes on.
const INTERVALS: usize = 3;
/// Looks closer to each other than so many milliseconds say nothing of it.
const TREND_STEP: u64 = 50;
/// Less than this share of a device in a second is no trend.
const STEADY: f64 = 0.005;

/// The ratios at which levels begin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    pub moderate: f64,
    pub high: f64,
    pub critical: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { moderate: 0.70, high: 0.85, critical: 0.95 }
    }
}

impl FromStr for Thresholds {
    type Err = &'static str;
    /// `0.70,0.85,0.95`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const RULE: &str = "write three growing ratios between 0 and 1, such as 0.70,0.85,0.95";
        let all: Result<Vec<f64>, _> = text.split(',').map(|part| part.trim().parse()).collect();
        match all.as_deref() {
            Ok(&[moderate, high, critical])
                if 0.0 < moderate && moderate < high && high < critical && critical < 1.0 =>
            {
                Ok(Self { moderate, high, critical })
            }
            _ => Err(RULE),
        }
    }
}

impl fmt::Display for Thresholds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.moderate, self.high, self.critical)
    }
}

impl Thresholds {
    /// The level at `ratio` (0 to 1) for a device that was at `before`.
    fn level(self, ratio: f64, before: PressureLevel) -> PressureLevel {
        let all = [
            (PressureLevel::Critical, self.critical),
            (PressureLevel::High, self.high),
            (PressureLevel::Moderate, self.moderate),
        ];
        all.into_iter()
            .find(|(level, begins)| ratio >= if before >= *level { begins - HYSTERESIS } else { *begins })
            .map_or(PressureLevel::Normal, |(level, _)| level)
    }
}

/// What the system says of tasks that wait for memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stall {
    #[default]
    None,
    /// Some do.
    Some,
    /// All do.
    Full,
}

/// A device as it was measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// What of the rest may go at once: idle models, and what is held for nobody.
    pub idle_bytes: u64,
    /// What we hold.
    pub held_bytes: u64,
    /// What others have.
    pub others_bytes: u64,
    pub stall: Stall,
}

/// The pressure on one device, over time.
#[derive(Debug, Clone, Default)]
pub struct Gauge {
    level: PressureLevel,
    /// The level by the ratio alone.
    by_ratio: PressureLevel,
    ratio: f64,
    reading: Reading,
    thresholds: Thresholds,
    /// What others had when something was last let in, or since then at least.
    base_bytes: u64,
    is_tight: bool,
    /// What others did not have, the last seconds.
    seen: VecDeque<(Tick, u64)>,
}

impl Gauge {
    /// Takes a measurement in; answers the level before, if it is another now.
    pub fn read(&mut self, reading: Reading, thresholds: Thresholds, now: Tick) -> Option<PressureLevel> {
        let first = self.reading.total_bytes == 0;
        let grew = reading.held_bytes > self.reading.held_bytes;
        self.base_bytes =
            if first || grew { reading.others_bytes } else { self.base_bytes.min(reading.others_bytes) };
        (self.reading, self.thresholds) = (reading, thresholds);
        let available = reading.free_bytes.saturating_add(reading.idle_bytes);
        let not_others = reading.total_bytes.saturating_sub(reading.others_bytes);
        self.ratio = (1.0 - available as f64 / reading.total_bytes.max(1) as f64).clamp(0.0, 1.0);
        if self.seen.back().is_none_or(|(last, _)| last.0 + TREND_STEP <= now.0) {
            self.seen.push_back((now, not_others));
        }
        while self.seen.front().is_some_and(|(at, _)| at.0 + TREND_WINDOW < now.0) {
            self.seen.pop_front();
        }
        self.by_ratio = thresholds.level(self.ratio, self.by_ratio);
        if self.by_ratio < PressureLevel::Moderate {
            // Somebody waits at a limit of their own: memory itself is there.
            self.reading.stall = Stall::None;
        }
        let others_grew =
            reading.others_bytes.saturating_sub(self.base_bytes) as f64 > GROWN * reading.total_bytes as f64;
        let headroom = if self.is_tight { self.roomy() } else { self.headroom() };
        self.is_tight = others_grew && reading.free_bytes < headroom;
        let rate = self.keeps_growing_per_second();
        let soon_exhausted = self.by_ratio >= PressureLevel::Moderate
            && rate > 0.0
            && (self.available_bytes() as f64) < rate * EXHAUSTED_SECONDS;
        let at_least = match self.reading.stall {
            Stall::Full => PressureLevel::Critical,
            Stall::Some => PressureLevel::High,
            Stall::None if self.is_tight || soon_exhausted => PressureLevel::High,
            Stall::None => PressureLevel::Normal,
        };
        let before = std::mem::replace(&mut self.level, self.by_ratio.max(at_least));
        (before != self.level).then_some(before)
    }

    pub fn level(&self) -> PressureLevel {
        self.level
    }

    /// The share of the device that is not available, 0 to 1.
    pub fn ratio(&self) -> f64 {
        self.ratio
    }

    pub fn reading(&self) -> &Reading {
        &self.reading
    }

    /// What is free or may go at once.
    pub fn available_bytes(&self) -> u64 {
        self.reading.free_bytes.saturating_add(self.reading.idle_bytes).min(self.reading.total_bytes)
    }

    /// How fast others take more, in bytes a second; negative where they give back. What we hold, we have let in.
    pub fn shrinks_per_second(&self) -> f64 {
        let (Some((first, before)), Some((last, now))) = (self.seen.front(), self.seen.back()) else {
            return 0.0;
        };
        let seconds = last.0.saturating_sub(first.0) as f64 / 1000.0;
        if seconds <= 0.0 { 0.0 } else { (*before as f64 - *now as f64) / seconds }
    }

    /// The least of it over each of the last intervals: a single large allocation is no trend.
    fn keeps_growing_per_second(&self) -> f64 {
        if self.seen.len() <= INTERVALS {
            return 0.0;
        }
        let latest = self.seen.range(self.seen.len() - INTERVALS - 1..);
        let pairs = latest.clone().zip(latest.skip(1));
        let rates = pairs.map(|((before, had), (after, has))| {
            let seconds = after.0.saturating_sub(before.0).max(1) as f64 / 1000.0;
            (*had as f64 - *has as f64) / seconds
        });
        let least = rates.fold(f64::INFINITY, f64::min);
        if least > STEADY * self.reading.total_bytes as f64 { least } else { 0.0 }
    }

    pub fn trend(&self) -> Trend {
        let share = self.shrinks_per_second() / self.reading.total_bytes.max(1) as f64;
        if share > STEADY {
            Trend::Rising
        } else if share < -STEADY {
            Trend::Falling
        } else {
            Trend::Steady
        }
    }

    /// When nothing would be available any more at the present rate.
    pub fn seconds_to_exhaustion(&self) -> Option<f64> {
        let rate = self.shrinks_per_second();
        (self.trend() == Trend::Rising).then(|| self.available_bytes() as f64 / rate)
    }

    /// How much is kept free for what others take all of a sudden.
    fn headroom(&self) -> u64 {
        (self.share(1.0 - self.thresholds.critical)).min(MOST_HEADROOM)
    }

    /// Above it the device is tight no more.
    fn roomy(&self) -> u64 {
        self.headroom().saturating_add(self.headroom() / 4)
    }

    fn share(&self, share: f64) -> u64 {
        (self.reading.total_bytes as f64 * share).round() as u64
    }

    /// How many bytes have to become free for the level to fall below `target`, as far as that is ours to bring about.
    pub fn needs_below(&self, target: PressureLevel) -> u64 {
        let begins = match target {
            PressureLevel::Normal => return 0,
            PressureLevel::Moderate => self.thresholds.moderate,
            PressureLevel::High => self.thresholds.high,
            PressureLevel::Critical => self.thresholds.critical,
        };
        // A little more than to the threshold: it has to be left, not touched.
        self.share(1.0 - begins + HYSTERESIS).saturating_add(1).saturating_sub(self.reading.free_bytes)
    }

    /// How many bytes have to become free now; 0 below `High`.
    pub fn needs(&self) -> u64 {
        if self.level < PressureLevel::High {
            return 0;
        }
        let below_high = self.needs_below(PressureLevel::High);
        let by_ratio = if self.by_ratio >= PressureLevel::High { below_high } else { 0 };
        let tight = if self.is_tight { self.roomy().saturating_sub(self.reading.free_bytes) } else { 0 };
        let stalled = if self.reading.stall > Stall::None { below_high.min(self.share(0.05)) } else { 0 };
        let next_second = (self.keeps_growing_per_second() as u64).saturating_sub(self.reading.free_bytes);
        by_ratio.max(tight).max(stalled).max(next_second)
    }
}

/// 0 to 100: 100 − 70 × ratio² − 30 × fragmentation, both from 0 to 1; 0 for a lost device.
pub fn health_score(ratio: f64, fragmentation: f64, lost: bool) -> u8 {
    if lost {
        return 0;
    }
    let (ratio, fragmentation) = (ratio.clamp(0.0, 1.0), fragmentation.clamp(0.0, 1.0));
    (100.0 - 70.0 * ratio * ratio - 30.0 * fragmentation).round().clamp(0.0, 100.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use PressureLevel::{Critical, High, Moderate, Normal};

    /// A device of 1000 bytes.
    fn reading(free: u64, idle: u64, held: u64) -> Reading {
        Reading {
            total_bytes: 1000,
            free_bytes: free,
            idle_bytes: idle,
            held_bytes: held,
            others_bytes: 1000 - free - held,
            stall: Stall::None,
        }
    }

    /// Reads far enough apart that nothing is a trend.
    fn after(readings: &[Reading]) -> Gauge {
        let mut gauge = Gauge::default();
        for (number, reading) in (0..).zip(readings) {
            gauge.read(*reading, Thresholds::default(), Tick(number * 10_000));
        }
        gauge
    }

    #[test]
    fn a_level_is_left_later_than_it_is_entered() {
        let level = |ratio, before| Thresholds::default().level(ratio, before);
        assert_eq!(level(0.849, Moderate), Moderate);
        assert_eq!(level(0.85, Moderate), High);
        assert_eq!(level(0.83, High), High);
        assert_eq!(level(0.81, High), Moderate);
        assert_eq!(level(0.99, Normal), Critical);
        assert_eq!(level(0.10, Critical), Normal);
    }

    #[test]
    fn a_card_full_of_idle_models_needs_nothing() {
        let gauge = after(&[reading(1000, 0, 0), reading(10, 950, 990)]);
        assert_eq!((gauge.level(), gauge.needs()), (Normal, 0));
    }

    #[test]
    fn what_others_take_on_top_makes_it_tight_though_all_the_rest_is_idle() {
        let gauge = after(&[reading(100, 900, 900), reading(40, 900, 900)]);
        assert_eq!(gauge.level(), High);
        assert_eq!(gauge.needs(), 62 - 40);
        // It stays so a little above where it began, and ends above that.
        let gauge = after(&[reading(100, 900, 900), reading(40, 900, 900), reading(60, 880, 880)]);
        assert_eq!((gauge.level(), gauge.needs()), (High, 2));
        let gauge = after(&[reading(100, 900, 900), reading(40, 900, 900), reading(63, 877, 877)]);
        assert_eq!((gauge.level(), gauge.needs()), (Normal, 0));
    }

    #[test]
    fn what_is_in_use_has_to_be_asked_for_until_the_level_falls() {
        let gauge = after(&[reading(140, 0, 500)]);
        assert_eq!((gauge.level(), gauge.needs()), (High, 181 - 140));
        let gauge = after(&[reading(140, 0, 500), reading(181, 0, 459)]);
        assert_eq!((gauge.level(), gauge.needs()), (Moderate, 0));
        assert_eq!(after(&[reading(20, 0, 0)]).level(), Critical);
    }

    #[test]
    fn stalls_count_where_memory_is_scarce_and_nothing_goes_in_vain() {
        let stalled = |free, stall| after(&[Reading { stall, ..reading(free, 0, 0) }]);
        assert_eq!(stalled(900, Stall::Full).level(), Normal, "somebody is at a limit of their own");
        assert_eq!(stalled(290, Stall::Some).level(), High);
        assert_eq!(stalled(290, Stall::Full).level(), Critical);
        assert_eq!(stalled(290, Stall::Full).needs(), 0);
        assert_eq!(stalled(160, Stall::Some).needs(), 21);
    }

    #[test]
    fn where_it_is_heading_is_seen_before_it_is_there() {
        let mut gauge = Gauge::default();
        for number in 0..10 {
            gauge.read(reading(740 - number * 60, 0, 0), Thresholds::default(), Tick(number * 100));
        }
        assert_eq!(gauge.trend(), Trend::Rising);
        assert!((gauge.shrinks_per_second() - 600.0).abs() < 1.0);
        let left = gauge.seconds_to_exhaustion().expect("it will be");
        assert!((left - 0.33).abs() < 0.01, "{left}");
        assert_eq!((gauge.level(), gauge.needs()), (High, 400));
        // As fast, but far from it.
        let mut gauge = Gauge::default();
        for number in 0..5 {
            gauge.read(reading(740 - number * 60, 0, 0), Thresholds::default(), Tick(number * 100));
        }
        assert_eq!((gauge.level(), gauge.needs()), (Normal, 0));
    }

    #[test]
    fn thresholds_grow_between_0_and_1() {
        assert_eq!("0.70,0.85,0.95".parse(), Ok(Thresholds::default()));
        for bad in
            ["", "0.7,0.8", "0.7,0.7,0.9", "0.9,0.8,0.95", "0.7,0.8,1.0", "0,0.5,0.6", "a,b,c", "0.7,0.8,NaN"]
        {
            assert!(bad.parse::<Thresholds>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn health_falls_with_pressure_and_fragmentation() {
        assert_eq!(health_score(0.0, 0.0, false), 100);
        assert_eq!(health_score(1.0, 1.0, false), 0);
        assert_eq!(health_score(0.0, 0.0, true), 0);
        assert!(health_score(0.5, 0.0, false) > health_score(0.9, 0.0, false));
    }
}
