//! Which resident components of models go when room is needed.
//!
//! Keeping a component is worth what it would cost to get it back, as often as that is likely to be needed: expected uses a second
//! × seconds to load it again. Among the sets that free enough, the one whose loss is least goes; not one by one,
//! since two small components may be dearer than a large one. Which components may go at all is the caller's business.

use vramd_api::{EvictionPolicy, Priority};

use crate::Tick;

/// As many uses are remembered.
const REMEMBERED: usize = 16;
/// Few uses in a short time are no habit yet: they count as if they were spread over so much more.
const FEW_SECONDS: f64 = 600.0;
/// Up to so many candidates all sets are compared; of more, good ones.
const EXACT: usize = 12;

/// When something was used, the last times.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Popularity {
    /// The oldest first.
    times: [Tick; REMEMBERED],
    count: usize,
}

impl Popularity {
    pub fn record(&mut self, now: Tick) {
        if self.count == REMEMBERED {
            self.times.rotate_left(1);
            self.times[REMEMBERED - 1] = now;
        } else {
            self.times[self.count] = now;
            self.count += 1;
        }
    }

    /// As often as it was used lately; once it has been idle for longer than there was between its uses, less by as much.
    pub fn uses_per_second(&self, now: Tick) -> f64 {
        let Some(last) = self.times[..self.count].last() else { return 0.0 };
        let seconds = |since: Tick| now.0.saturating_sub(since.0) as f64 / 1000.0;
        Self::rate(self.count as u64, seconds(self.times[0]), seconds(*last))
    }

    /// The same of something whose single uses nobody remembers: so many in so many seconds, the last of them so long ago.
    pub fn rate(count: u64, seconds: f64, idle_seconds: f64) -> f64 {
        let rate = count as f64 / (seconds + FEW_SECONDS);
        let gaps = idle_seconds * rate;
        rate / gaps.max(1.0)
    }
}

/// A component that may go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// What is free once it is gone.
    pub bytes: u64,
    pub priority: Priority,
    pub idle_seconds: f64,
    pub uses_per_second: f64,
    /// What it takes to get it back.
    pub reload_seconds: f64,
}

impl Candidate {
    /// The seconds of loading that its absence costs, per second.
    pub fn loss(&self) -> f64 {
        self.uses_per_second * self.reload_seconds * weight(self.priority)
    }
}

/// How much dearer a second of waiting is for a model of that priority.
fn weight(priority: Priority) -> f64 {
    match priority {
        Priority::Low => 0.1,
        Priority::Normal => 1.0,
        Priority::High => 10.0,
        Priority::Critical => 100.0,
    }
}

/// The candidates, by their indexes, that free `needed` bytes at the least loss; None if all of them do not free as much.
pub fn choose(candidates: &[Candidate], needed: u64, policy: EvictionPolicy) -> Option<Vec<usize>> {
    let freed = |set: &[usize]| set.iter().fold(0_u64, |sum, at| sum.saturating_add(candidates[*at].bytes));
    let all: Vec<usize> = (0..candidates.len()).collect();
    if freed(&all) < needed {
        return None;
    }
    if needed == 0 {
        return Some(Vec::new());
    }
    if policy == EvictionPolicy::LowestCost {
        return Some(cheapest(candidates, needed));
    }
    let mut order = all;
    order.sort_by(|a, b| {
        let (one, other) = (&candidates[*a], &candidates[*b]);
        let by_policy = match policy {
            EvictionPolicy::LeastRecentlyUsed | EvictionPolicy::LowestPriority => {
                other.idle_seconds.total_cmp(&one.idle_seconds)
            }
            EvictionPolicy::LeastFrequentlyUsed => one.uses_per_second.total_cmp(&other.uses_per_second),
            EvictionPolicy::LargestFirst => other.bytes.cmp(&one.bytes),
            EvictionPolicy::LowestCost => std::cmp::Ordering::Equal,
        };
        one.priority.cmp(&other.priority).then(by_policy).then(a.cmp(b))
    });
    let mut sum = 0_u64;
    let enough = order.iter().position(|at| {
        sum = sum.saturating_add(candidates[*at].bytes);
        sum >= needed
    });
    order.truncate(enough.map_or(order.len(), |last| last + 1));
    Some(order)
}

/// Of sets that free enough the one with the least loss, then that which takes least.
fn cheapest(candidates: &[Candidate], needed: u64) -> Vec<usize> {
    if candidates.len() <= EXACT {
        return cheapest_of_all(candidates, needed);
    }
    // By loss a byte; each that would complete the set is tried as its last, and not kept: the best of these costs twice the least
    // at most.
    let density = |at: usize| candidates[at].loss() / candidates[at].bytes.max(1) as f64;
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by(|a, b| density(*a).total_cmp(&density(*b)).then(a.cmp(b)));
    let (mut bytes, mut loss) = (0_u64, 0.0);
    let mut taken = Vec::new();
    let mut best: Option<(f64, Vec<usize>)> = None;
    for at in order {
        let one = &candidates[at];
        if bytes.saturating_add(one.bytes) < needed {
            bytes += one.bytes;
            loss += one.loss();
            taken.push(at);
        } else if best.as_ref().is_none_or(|(least, _)| loss + one.loss() < *least) {
            best = Some((loss + one.loss(), taken.iter().copied().chain([at]).collect()));
        }
    }
    let (_, mut chosen) = best.expect("all of them together are enough");
    let mut freed = chosen.iter().fold(0_u64, |sum, at| sum.saturating_add(candidates[*at].bytes));
    // Without those that the others make needless, the dearest first.
    chosen.sort_by(|a, b| candidates[*b].loss().total_cmp(&candidates[*a].loss()).then(a.cmp(b)));
    chosen.retain(|at| {
        let needless = freed - candidates[*at].bytes >= needed;
        freed -= if needless { candidates[*at].bytes } else { 0 };
        !needless
    });
    chosen.sort_unstable();
    chosen
}

/// The same of few, by looking at every set.
fn cheapest_of_all(candidates: &[Candidate], needed: u64) -> Vec<usize> {
    // What a set frees and loses is that of the set without its lowest member, and of that member.
    let mut sums = vec![(0.0, 0_u64); 1 << candidates.len()];
    let mut best: Option<(f64, u64, usize)> = None;
    for set in 1..sums.len() {
        let (loss, bytes) = sums[set & (set - 1)];
        let lowest = &candidates[set.trailing_zeros() as usize];
        let (loss, bytes) = (loss + lowest.loss(), bytes.saturating_add(lowest.bytes));
        sums[set] = (loss, bytes);
        let better =
            |(least, fewest, _): &(f64, u64, usize)| loss.total_cmp(least).then(bytes.cmp(fewest)).is_lt();
        if bytes >= needed && best.as_ref().is_none_or(better) {
            best = Some((loss, bytes, set));
        }
    }
    let (.., set) = best.expect("all of them together are enough");
    (0..candidates.len()).filter(|at| set & 1 << at != 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(bytes: u64, uses: f64, reload_seconds: f64) -> Candidate {
        Candidate {
            bytes,
            priority: Priority::Normal,
            idle_seconds: 0.0,
            uses_per_second: uses,
            reload_seconds,
        }
    }

    #[test]
    fn what_is_seldom_used_and_quickly_back_goes_first() {
        let all = [candidate(10, 0.5, 10.0), candidate(10, 0.1, 10.0), candidate(10, 0.1, 1.0)];
        assert_eq!(choose(&all, 10, EvictionPolicy::LowestCost), Some(vec![2]));
        assert_eq!(choose(&all, 11, EvictionPolicy::LowestCost), Some(vec![1, 2]));
        assert_eq!(choose(&all, 0, EvictionPolicy::LowestCost), Some(vec![]));
        assert_eq!(choose(&all, 31, EvictionPolicy::LowestCost), None);
        assert_eq!(choose(&[], 0, EvictionPolicy::LowestCost), Some(vec![]));
    }

    #[test]
    fn one_large_one_may_be_cheaper_than_two_small_ones() {
        let all = [candidate(5, 1.0, 4.0), candidate(5, 1.0, 4.0), candidate(10, 1.0, 5.0)];
        assert_eq!(choose(&all, 10, EvictionPolicy::LowestCost), Some(vec![2]));
    }

    #[test]
    fn more_important_models_go_last_whatever_the_policy() {
        let mut all = [candidate(10, 0.0, 1.0), candidate(10, 1.0, 1.0)];
        all[0].priority = Priority::High;
        all[0].idle_seconds = 100.0;
        all[0].bytes = 20;
        for policy in [
            EvictionPolicy::LeastRecentlyUsed,
            EvictionPolicy::LeastFrequentlyUsed,
            EvictionPolicy::LargestFirst,
        ] {
            assert_eq!(choose(&all, 10, policy), Some(vec![1]), "{policy}");
        }
        all[0].uses_per_second = 0.2;
        assert_eq!(choose(&all, 10, EvictionPolicy::LowestCost), Some(vec![1]));
    }

    #[test]
    fn policies_go_by_what_their_names_say() {
        let mut all = [candidate(10, 3.0, 1.0), candidate(20, 2.0, 1.0), candidate(30, 1.0, 100.0)];
        all[0].idle_seconds = 9.0;
        assert_eq!(choose(&all, 1, EvictionPolicy::LeastRecentlyUsed), Some(vec![0]));
        assert_eq!(choose(&all, 1, EvictionPolicy::LeastFrequentlyUsed), Some(vec![2]));
        assert_eq!(choose(&all, 31, EvictionPolicy::LargestFirst), Some(vec![2, 1]));
        assert_eq!(choose(&all, 1, EvictionPolicy::LowestCost), Some(vec![1]));
    }

    #[test]
    fn what_is_used_often_counts_until_it_is_idle_for_longer_than_between_its_uses() {
        let mut popularity = Popularity::default();
        let rate = |popularity: &Popularity, seconds: u64| popularity.uses_per_second(Tick(seconds * 1000));
        assert!(rate(&popularity, 5) < f64::EPSILON);
        // Every hundred seconds, more often than is remembered.
        for number in 0..40 {
            popularity.record(Tick(number * 100_000));
        }
        let steady = rate(&popularity, 3900);
        assert!((steady - 16.0 / 2100.0).abs() < 1e-9, "{steady}");
        assert!(rate(&popularity, 4000) > steady * 0.9);
        assert!(rate(&popularity, 4900) < steady * 0.15);
        // One use alone is no habit, and none that ends.
        let mut once = Popularity::default();
        once.record(Tick(0));
        assert!((rate(&once, 600) - 1.0 / 1200.0).abs() < 1e-9);
    }

    #[test]
    fn one_that_completes_the_set_is_not_kept_for_the_next() {
        let mut all = vec![candidate(10, 1.0, 1.0), candidate(49, 90.0, 1.0)];
        all.extend(vec![candidate(1, 2.0, 1.0); 11]);
        let chosen = choose(&all, 11, EvictionPolicy::LowestCost).expect("there is enough");
        let loss: f64 = chosen.iter().map(|at| all[*at].loss()).sum();
        assert!((loss - 3.0).abs() < 1e-9, "{chosen:?}");
    }

    proptest! {
        /// Of many candidates too what goes is enough, nothing in it is needless, and it is no more than twice the best.
        #[test]
        fn good_sets_are_near_the_best(
            all in prop::collection::vec((1u64..50, 1u32..100), EXACT + 1..EXACT + 4),
            share in 1u64..100,
        ) {
            let all: Vec<_> =
                all.into_iter().map(|(bytes, loss)| candidate(bytes, f64::from(loss), 1.0)).collect();
            let whole: u64 = all.iter().map(|one| one.bytes).sum();
            let needed = (whole * share / 100).max(1);
            let chosen = choose(&all, needed, EvictionPolicy::LowestCost).expect("there is enough");
            let freed: u64 = chosen.iter().map(|at| all[*at].bytes).sum();
            prop_assert!(freed >= needed);
            prop_assert!(chosen.iter().all(|at| freed - all[*at].bytes < needed));
            prop_assert!(chosen.is_sorted());
            let loss: f64 = chosen.iter().map(|at| all[*at].loss()).sum();
            let sums = (0_u32..1 << all.len()).filter_map(|set| {
                let members = || (0..all.len()).filter(move |at| set & 1 << at != 0);
                let bytes: u64 = members().map(|at| all[at].bytes).sum();
                (bytes >= needed).then(|| members().map(|at| all[at].loss()).sum::<f64>())
            });
            let best = sums.min_by(f64::total_cmp).expect("there is enough");
            prop_assert!(loss <= best * 2.0 + 1e-9, "{loss} against {best}");
        }
    }
}
