//! Use over time: an hour of samples of each device, one a second, and who and what it was for.
//!
//! Owns the rings, their folding into steps, and the sums over a window. Leaves out when samples are taken. A sample is
//! about 130 bytes, so an hour of one device is half a megabyte. Who held how much is kept more coarsely: the
//! [`NAMES`] largest owners and purposes, every [`SPLIT_SECONDS`] seconds, the rest as one. A second in which nothing was
//! sampled (the machine slept) is a gap, not a zero.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use vramd_api::{
    DeviceId, DeviceUsage, MAX_USAGE_POINTS, USAGE_SECONDS, UsageAverage, UsagePeak, UsageRates, UsageSample,
    UsageShare,
};

use crate::ledger::{Allocations, State, Usage};

/// How many owners, and how many purposes, are kept by name.
pub const NAMES: usize = 16;
/// How often it is looked at who holds how much.
pub const SPLIT_SECONDS: i64 = 10;
/// What the others together are called.
const OTHERS: &str = "(others)";

/// What happened on a device since the sample before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub allocations: u64,
    pub allocated_bytes: u64,
    pub releases: u64,
    pub released_bytes: u64,
    pub refusals: u64,
    /// The most that was used and given out at any moment since.
    pub peak_used_bytes: u64,
    pub peak_allocated_bytes: u64,
}

impl Counts {
    /// Takes in what happened in another stretch of time.
    fn add(&mut self, other: &Self) {
        self.allocations += other.allocations;
        self.allocated_bytes += other.allocated_bytes;
        self.releases += other.releases;
        self.released_bytes += other.released_bytes;
        self.refusals += other.refusals;
        self.peak_used_bytes = self.peak_used_bytes.max(other.peak_used_bytes);
        self.peak_allocated_bytes = self.peak_allocated_bytes.max(other.peak_allocated_bytes);
    }

    /// Takes the present use into the peaks.
    pub fn observe(&mut self, usage: &Usage) {
        self.peak_used_bytes = self.peak_used_bytes.max(usage.used_bytes);
        self.peak_allocated_bytes = self.peak_allocated_bytes.max(usage.allocated_bytes);
    }
}

/// One second of one device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Of the wall clock, in seconds.
    pub second: i64,
    pub usage: Usage,
    pub total_bytes: u64,
    pub counts: Counts,
}

/// Names, and the bytes that each holds.
type Holdings = Vec<(Arc<str>, u64)>;

/// Who and what held how much, the largest first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Split {
    pub second: i64,
    pub owners: Holdings,
    pub purposes: Holdings,
}

impl Split {
    /// Of what lies on `device` now.
    pub fn of(allocations: &Allocations, device: &DeviceId, second: i64) -> Self {
        let mut owners: BTreeMap<&str, u64> = BTreeMap::new();
        let mut purposes: BTreeMap<&str, u64> = BTreeMap::new();
        let here =
            |one: &&Arc<crate::ledger::Allocation>| one.device == *device && one.state != State::Reserved;
        for allocation in allocations.values().filter(here) {
            *owners.entry(allocation.request.owner.as_str()).or_default() += allocation.block_bytes;
            // The other place of one that moves is for what that is for.
            let whose = allocation.place_of.and_then(|of| allocations.get(&of)).unwrap_or(allocation);
            *purposes.entry(whose.request.purpose.as_str()).or_default() += allocation.block_bytes;
        }
        Self { second, owners: largest(owners), purposes: largest(purposes) }
    }
}

fn largest(all: BTreeMap<&str, u64>) -> Holdings {
    let mut all: Vec<(&str, u64)> = all.into_iter().collect();
    all.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    let others: u64 = all.iter().skip(NAMES).map(|(_, bytes)| bytes).sum();
    all.truncate(NAMES);
    all.extend((others > 0).then_some((OTHERS, others)));
    all.into_iter().map(|(name, bytes)| (name.into(), bytes)).collect()
}

#[derive(Debug, Clone, Default)]
struct Ring {
    samples: VecDeque<Sample>,
    splits: VecDeque<Split>,
}

/// The last hour of all devices.
#[derive(Debug, Clone, Default)]
pub struct History(BTreeMap<DeviceId, Ring>);

impl History {
    /// Takes a sample in. One of a second that was sampled already, or of an earlier one (the clock was put back), is
    /// counted to the last.
    pub fn push(&mut self, device: &DeviceId, sample: Sample) {
        let ring = self.0.entry(device.clone()).or_default();
        if let Some(last) = ring.samples.back_mut().filter(|last| last.second >= sample.second) {
            last.counts.add(&sample.counts);
            (last.usage, last.total_bytes) = (sample.usage, sample.total_bytes);
            return;
        }
        ring.samples.push_back(sample);
        let oldest = sample.second - USAGE_SECONDS.cast_signed();
        while ring.samples.front().is_some_and(|first| first.second <= oldest) {
            ring.samples.pop_front();
        }
    }

    pub fn push_split(&mut self, device: &DeviceId, split: Split) {
        let ring = self.0.entry(device.clone()).or_default();
        let oldest = split.second - USAGE_SECONDS.cast_signed();
        ring.splits.push_back(split);
        while ring.splits.front().is_some_and(|first| first.second <= oldest) {
            ring.splits.pop_front();
        }
    }

    /// The last `window` seconds up to `now`, in steps of `step` seconds, which divide the wall clock.
    pub fn show(&self, device: &DeviceId, now: i64, window: u64, step: u64) -> DeviceUsage {
        debug_assert!(step > 0 && window / step <= MAX_USAGE_POINTS);
        let ring = self.0.get(device);
        // The sample of this second may not have been taken yet.
        let last = ring.and_then(|ring| ring.samples.back()).map(|last| last.second);
        let now = last.filter(|last| last + 1 == now).unwrap_or(now);
        let since = now - window.cast_signed();
        let samples = || ring.into_iter().flat_map(|ring| &ring.samples).filter(|one| one.second > since);
        let mut steps: BTreeMap<i64, Vec<&Sample>> = BTreeMap::new();
        for sample in samples() {
            steps
                .entry(sample.second - sample.second.rem_euclid(step.cast_signed()))
                .or_default()
                .push(sample);
        }
        let splits: Vec<&Split> =
            ring.into_iter().flat_map(|ring| &ring.splits).filter(|split| split.second > since).collect();
        let all: Vec<&Sample> = samples().collect();
        DeviceUsage {
            device_id: device.clone(),
            window_seconds: window,
            step_seconds: step,
            sampled_seconds: all.len() as u64,
            peak: peak(&all),
            average: average(&all),
            rates: rates(&all),
            by_owner: shares(&splits, |split| &split.owners),
            by_purpose: shares(&splits, |split| &split.purposes),
            samples: steps.into_iter().map(|(begin, samples)| fold(begin, &samples)).collect(),
        }
    }
}

/// One step: averages of levels, maxima of peaks, sums of counts.
fn fold(begin: i64, samples: &[&Sample]) -> UsageSample {
    let sum = |of: fn(&Counts) -> u64| samples.iter().map(|sample| of(&sample.counts)).sum();
    let mean = |of: fn(&Usage) -> u64| {
        let sum: u128 = samples.iter().map(|sample| u128::from(of(&sample.usage))).sum();
        u64::try_from(sum / samples.len() as u128).unwrap_or(u64::MAX)
    };
    let peak = peak(samples).unwrap_or_default();
    UsageSample {
        at: jiff::Timestamp::from_second(begin).unwrap_or_default(),
        used_bytes: mean(|usage| usage.used_bytes),
        allocated_bytes: mean(|usage| usage.allocated_bytes),
        pool_free_bytes: mean(|usage| usage.pool_free_bytes),
        reserved_bytes: mean(|usage| usage.reserved_bytes),
        foreign_bytes: mean(|usage| usage.foreign_bytes),
        available_bytes: mean(|usage| usage.available_bytes),
        peak_used_bytes: peak.used_bytes,
        peak_allocated_bytes: peak.allocated_bytes,
        fragmentation: samples.iter().map(|sample| fragmentation(&sample.usage)).sum::<f64>()
            / samples.len() as f64,
        allocations: sum(|counts| counts.allocations),
        releases: sum(|counts| counts.releases),
        refusals: sum(|counts| counts.refusals),
    }
}

fn peak(samples: &[&Sample]) -> Option<UsagePeak> {
    let most = |of: fn(&Counts) -> u64, level: fn(&Usage) -> u64| {
        samples.iter().map(|sample| of(&sample.counts).max(level(&sample.usage))).max()
    };
    Some(UsagePeak {
        used_bytes: most(|counts| counts.peak_used_bytes, |usage| usage.used_bytes)?,
        allocated_bytes: most(|counts| counts.peak_allocated_bytes, |usage| usage.allocated_bytes)?,
    })
}

fn average(samples: &[&Sample]) -> Option<UsageAverage> {
    let first = samples.first()?;
    let whole = fold(first.second, samples);
    Some(UsageAverage {
        used_bytes: whole.used_bytes,
        allocated_bytes: whole.allocated_bytes,
        available_bytes: whole.available_bytes,
        utilization: (whole.used_bytes as f64 / first.total_bytes.max(1) as f64).clamp(0.0, 1.0),
        fragmentation: whole.fragmentation,
    })
}

fn rates(samples: &[&Sample]) -> Option<UsageRates> {
    let seconds = samples.len() as f64;
    let rate = |of: fn(&Counts) -> u64| {
        samples.iter().map(|sample| of(&sample.counts)).sum::<u64>() as f64 / seconds
    };
    (!samples.is_empty()).then(|| UsageRates {
        allocations_per_second: rate(|counts| counts.allocations),
        releases_per_second: rate(|counts| counts.releases),
        allocated_bytes_per_second: rate(|counts| counts.allocated_bytes),
        released_bytes_per_second: rate(|counts| counts.released_bytes),
        refusals_per_second: rate(|counts| counts.refusals),
    })
}

/// Each name's bytes now, its peak and its average over the splits; the largest average first.
fn shares(splits: &[&Split], of: fn(&Split) -> &Holdings) -> Vec<UsageShare> {
    let mut names: BTreeMap<&str, (u64, u64, u128)> = BTreeMap::new();
    for (number, split) in splits.iter().enumerate() {
        for (name, bytes) in of(split) {
            let (now, peak, sum) = names.entry(name).or_default();
            if number + 1 == splits.len() {
                *now = *bytes;
            }
            *peak = (*peak).max(*bytes);
            *sum += u128::from(*bytes);
        }
    }
    let mut shares: Vec<UsageShare> = names
        .into_iter()
        .map(|(name, (bytes, peak_bytes, sum))| UsageShare {
            name: name.to_owned(),
            bytes,
            peak_bytes,
            average_bytes: u64::try_from(sum / splits.len() as u128).unwrap_or(u64::MAX),
        })
        .collect();
    shares.sort_by(|a, b| b.average_bytes.cmp(&a.average_bytes).then_with(|| a.name.cmp(&b.name)));
    shares
}

/// 1 − largest free / free; 0 when nothing is free.
pub fn fragmentation(usage: &Usage) -> f64 {
    if usage.available_bytes == 0 {
        return 0.0;
    }
    (1.0 - usage.largest_free_bytes as f64 / usage.available_bytes as f64).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn device() -> DeviceId {
        "sim:0".parse().unwrap()
    }

    fn sample(second: i64, used: u64, peak: u64, allocations: u64) -> Sample {
        let usage = Usage { used_bytes: used, allocated_bytes: used / 2, ..Usage::default() };
        let counts = Counts { allocations, peak_used_bytes: peak, ..Counts::default() };
        Sample { second, usage, total_bytes: 1 << 20, counts }
    }

    proptest! {
        /// Against keeping everything and folding it naively.
        #[test]
        fn what_is_shown_is_what_was_sampled(
            seconds in prop::collection::vec((1i64..40, 0u64..1000, 0u64..2000, 0u64..5), 0..300),
            window in 1u64..=3600, step in 1u64..600,
        ) {
            let mut history = History::default();
            let (mut now, mut all) = (1_000_000, Vec::new());
            for (gap, used, peak, allocations) in seconds {
                now += gap;
                all.push(sample(now, used, peak, allocations));
                history.push(&device(), all[all.len() - 1]);
            }
            let step = step.min(window).max(window.div_ceil(MAX_USAGE_POINTS));
            let shown = history.show(&device(), now, window, step);
            let kept: Vec<_> = all.iter().filter(|one| one.second > now - window.cast_signed()).collect();
            prop_assert_eq!(shown.sampled_seconds, kept.len() as u64);
            let most = kept.iter().map(|one| one.usage.used_bytes.max(one.counts.peak_used_bytes)).max();
            prop_assert_eq!(shown.peak.map(|peak| peak.used_bytes), most);
            let made: u64 = kept.iter().map(|one| one.counts.allocations).sum();
            prop_assert_eq!(shown.samples.iter().map(|one| one.allocations).sum::<u64>(), made);
            for one in &shown.samples {
                let begin = one.at.as_second();
                let inside: Vec<_> =
                    kept.iter().filter(|it| (begin..begin + step.cast_signed()).contains(&it.second)).collect();
                prop_assert!(!inside.is_empty(), "a step without samples is a gap");
                let used = inside.iter().map(|it| it.usage.used_bytes).sum::<u64>() / inside.len() as u64;
                prop_assert_eq!(one.used_bytes, used);
            }
        }
    }

    #[test]
    fn an_hour_is_kept_and_no_more() {
        let mut history = History::default();
        for second in 0..10_000 {
            history.push(&device(), sample(second, 1, 1, 1));
            history.push_split(&device(), Split { second, ..Split::default() });
        }
        let ring = &history.0[&device()];
        assert_eq!((ring.samples.len(), ring.splits.len()), (3600, 3600));
        // A clock that is put back adds no second, and what happened is not lost.
        history.push(&device(), sample(5, 1, 1, 1));
        assert_eq!(history.0[&device()].samples.len(), 3600);
        // Neither is the last second, when the present one was not sampled yet.
        let shown = history.show(&device(), 10_000, 1, 1);
        assert_eq!((shown.sampled_seconds, shown.samples[0].allocations), (1, 2));
    }

    #[test]
    fn many_names_become_few_and_the_rest() {
        let names: Vec<String> = (0..100).map(|number| format!("name {number:03}")).collect();
        let all = names.iter().zip(1..).map(|(name, bytes)| (name.as_str(), bytes)).collect();
        let kept = largest(all);
        assert_eq!(kept.len(), NAMES + 1);
        assert_eq!(&*kept[0].0, "name 099");
        assert_eq!(&*kept[NAMES].0, OTHERS);
        assert_eq!(kept.iter().map(|(_, bytes)| bytes).sum::<u64>(), 5050);
    }

    #[test]
    fn a_device_that_was_never_sampled_has_no_figures_rather_than_zeros() {
        let shown = History::default().show(&device(), 100, 60, 1);
        assert!(shown.peak.is_none() && shown.average.is_none() && shown.rates.is_none());
        assert!(shown.samples.is_empty() && shown.by_owner.is_empty());
    }
}
