//! Two policies on trial: what each would have loaded on a device, had it decided alone.
//!
//! No guess of what is used next holds for every change of habits. So the same uses are also put to two memories that are only counted, of the
//! device's size: one from which what costs least goes, one from which what was used longest ago goes. What counts is the one that
//! would have loaded for less time lately.

use std::collections::BTreeMap;

use vramd_api::{EvictionPolicy, Priority};

use crate::Tick;
use crate::eviction::{self, Candidate, Popularity};

/// So much less does a second of loading count after each use.
const FADES: f64 = 0.995;
/// What is counted, in the order of their memories.
const POLICIES: [EvictionPolicy; 2] = [EvictionPolicy::LowestCost, EvictionPolicy::LeastRecentlyUsed];

/// What is used of a model on a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Use {
    pub bytes: u64,
    pub load_seconds: f64,
    pub priority: Priority,
}

#[derive(Debug, Clone)]
pub struct Trial<K> {
    entries: BTreeMap<K, Entry>,
    /// What is taken of each memory.
    taken: [u64; 2],
    /// What each would have loaded for lately.
    seconds: [f64; 2],
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    used: Use,
    last: Tick,
    popularity: Popularity,
    is_in: [bool; 2],
}

impl<K> Default for Trial<K> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), taken: [0; 2], seconds: [0.0; 2] }
    }
}

impl<K: Ord + Clone> Trial<K> {
    /// Something is used on a device of that size.
    pub fn used(&mut self, key: &K, used: Use, device_bytes: u64, now: Tick) {
        self.seconds = self.seconds.map(|seconds| seconds * FADES);
        let fresh = Entry { used, last: now, popularity: Popularity::default(), is_in: [false; 2] };
        let entry = self.entries.entry(key.clone()).or_insert(fresh);
        entry.popularity.record(now);
        entry.last = now;
        let before = std::mem::replace(&mut entry.used, used);
        let is_in = std::mem::replace(&mut entry.is_in, [used.bytes <= device_bytes; 2]);
        for (memory, policy) in POLICIES.into_iter().enumerate() {
            if is_in[memory] {
                self.taken[memory] -= before.bytes;
            } else {
                self.seconds[memory] += used.load_seconds;
            }
            if used.bytes <= device_bytes {
                self.taken[memory] += used.bytes;
                let over = self.taken[memory].saturating_sub(device_bytes);
                self.shrink(memory, policy, over, key, now);
            }
        }
    }

    /// Takes out of a memory what is too much for it.
    fn shrink(&mut self, memory: usize, policy: EvictionPolicy, over: u64, stays: &K, now: Tick) {
        if over == 0 {
            return;
        }
        let others = self.entries.iter().filter(|(key, entry)| entry.is_in[memory] && *key != stays);
        let (keys, candidates): (Vec<K>, Vec<Candidate>) = others
            .map(|(key, entry)| {
                let candidate = Candidate {
                    bytes: entry.used.bytes,
                    priority: entry.used.priority,
                    idle_seconds: now.0.saturating_sub(entry.last.0) as f64 / 1000.0,
                    uses_per_second: entry.popularity.uses_per_second(now),
                    reload_seconds: entry.used.load_seconds,
                };
                (key.clone(), candidate)
            })
            .unzip();
        for at in eviction::choose(&candidates, over, policy).unwrap_or_default() {
            self.taken[memory] -= candidates[at].bytes;
            if let Some(entry) = self.entries.get_mut(&keys[at]) {
                entry.is_in[memory] = false;
            }
        }
    }

    /// It is no more.
    pub fn forget(&mut self, key: &K) {
        if let Some(entry) = self.entries.remove(key) {
            for (taken, is_in) in self.taken.iter_mut().zip(entry.is_in) {
                *taken -= if is_in { entry.used.bytes } else { 0 };
            }
        }
    }

    /// The one that did better lately.
    pub fn better(&self) -> EvictionPolicy {
        let [cost, recent] = self.seconds;
        if recent < cost { EvictionPolicy::LeastRecentlyUsed } else { EvictionPolicy::LowestCost }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(trial: &mut Trial<&'static str>, key: &'static str, bytes: u64, load_seconds: f64, tick: u64) {
        let used = Use { bytes, load_seconds, priority: Priority::Normal };
        trial.used(&key, used, 10, Tick(tick * 1000));
        for memory in 0..2 {
            let held: u64 =
                trial.entries.values().filter(|it| it.is_in[memory]).map(|it| it.used.bytes).sum();
            assert!(held == trial.taken[memory] && held <= 10);
        }
    }

    #[test]
    fn the_policy_that_would_have_loaded_less_is_the_better_one() {
        let mut trial = Trial::default();
        assert_eq!(trial.better(), EvictionPolicy::LowestCost);
        // The dear one comes in between others that are cheap: who forgets what was used longest ago loads it each time.
        for round in 0..20 {
            for (at, (key, seconds)) in [("dear", 100.0), ("a", 1.0), ("b", 1.0)].into_iter().enumerate() {
                used(&mut trial, key, 5, seconds, round * 30 + at as u64 * 10);
            }
        }
        assert_eq!(trial.better(), EvictionPolicy::LowestCost);
        // Then nobody wants it any more, and two others would both fit, did it not stay.
        let mut trial = Trial::default();
        used(&mut trial, "dear", 5, 10_000.0, 0);
        for round in 1..1500 {
            used(&mut trial, ["a", "b"][round % 2], 5, 1.0, round as u64);
        }
        assert_eq!(trial.better(), EvictionPolicy::LeastRecentlyUsed);
        trial.forget(&"a");
        assert!(trial.taken[1] == 5);
    }

    #[test]
    fn what_is_larger_than_the_device_takes_nothing_and_one_may_grow() {
        let mut trial = Trial::default();
        used(&mut trial, "huge", 11, 1.0, 0);
        assert_eq!(trial.taken, [0; 2]);
        used(&mut trial, "a", 4, 1.0, 1);
        used(&mut trial, "a", 8, 1.0, 2);
        assert_eq!(trial.taken, [8; 2]);
        used(&mut trial, "b", 3, 1.0, 3);
        assert_eq!(trial.taken, [3; 2]);
    }
}
