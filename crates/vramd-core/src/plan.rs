//! What would become of several loads, tried one after the other on a copy of the books.

use vramd_api::{AllocationId, DeviceId, EvictionPolicy};

use crate::Now;
use crate::eviction::{self, Candidate};
use crate::ledger::{Ledger, Request};

/// Up to so many loads all sets are tried; of more, the smallest are taken first.
const EXACT: usize = 10;

/// One load: its blocks, which go to one device of `on` together.
#[derive(Debug, Clone)]
pub struct Ask {
    /// None, if it is there already.
    pub requests: Vec<Request>,
    /// The nearest memory that could hold them, if empty.
    pub on: Vec<DeviceId>,
}

/// A block that may go.
#[derive(Debug, Clone)]
pub struct Idle {
    pub allocation: AllocationId,
    pub device: DeviceId,
    pub candidate: Candidate,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// `goes`: the indexes of what goes for it.
    Fits { device: Option<DeviceId>, goes: Vec<usize> },
    /// `missing`: bytes too few on the device that comes closest, with all gone that may go. None: none could hold it even empty.
    No { missing: Option<u64> },
}

/// Tries all of `asks` in order, on books in which nothing is on its way back ([`Ledger::settle`]).
pub fn plan(
    mut ledger: Ledger,
    asks: &[&Ask],
    idle: &[Idle],
    policy: &dyn Fn(&DeviceId) -> EvictionPolicy,
    now: Now,
) -> Vec<Outcome> {
    let mut gone = vec![false; idle.len()];
    asks.iter().map(|ask| one(&mut ledger, ask, idle, &mut gone, policy, now)).collect()
}

fn one(
    ledger: &mut Ledger,
    ask: &Ask,
    idle: &[Idle],
    gone: &mut [bool],
    policy: &dyn Fn(&DeviceId) -> EvictionPolicy,
    now: Now,
) -> Outcome {
    let Some(first) = ask.requests.first() else {
        return Outcome::Fits { device: ask.on.first().cloned(), goes: Vec::new() };
    };
    let on = if ask.on.is_empty() { ledger.nearest(&ask.requests) } else { ask.on.clone() };
    if on.is_empty() || !ledger.could_fit_all(&ask.requests, &on) {
        return Outcome::No { missing: None };
    }
    if let Some(grants) = ledger.reserve_all(&ask.requests, &on, now) {
        let device = grants.first().map(|(_, grant)| grant.device.clone());
        return Outcome::Fits { device, goes: Vec::new() };
    }
    let mut best: Option<(f64, DeviceId, Vec<usize>)> = None;
    let mut missing: Option<u64> = None;
    for device in on {
        let Some(lacks) = ledger.lacks(&ask.requests, &device) else { continue };
        let may_go = |at: &usize| {
            let one = &idle[*at];
            !gone[*at] && one.device == device && one.candidate.priority <= first.priority
        };
        let mut here: Vec<usize> = (0..idle.len()).filter(may_go).collect();
        let blocks: Vec<_> =
            here.iter().map(|at| (idle[*at].allocation, idle[*at].candidate.loss())).collect();
        let mut may = ledger.above_reserves(&device, &blocks, first).into_iter();
        here.retain(|_| may.next().unwrap_or(true));
        let candidates: Vec<Candidate> = here.iter().map(|at| idle[*at].candidate).collect();
        let Some(chosen) = eviction::choose(&candidates, lacks, policy(&device)) else {
            let all = candidates.iter().fold(0_u64, |sum, one| sum.saturating_add(one.bytes));
            let short = lacks.saturating_sub(all);
            missing = Some(missing.map_or(short, |least| least.min(short)));
            continue;
        };
        let loss: f64 = chosen.iter().map(|at| candidates[*at].loss()).sum();
        if best.as_ref().is_none_or(|(least, ..)| loss < *least) {
            best = Some((loss, device, chosen.into_iter().map(|at| here[at]).collect()));
        }
    }
    let Some((_, device, goes)) = best else { return Outcome::No { missing: missing.or(Some(0)) } };
    let mut trial = ledger.clone();
    for at in &goes {
        trial.forget(idle[*at].allocation, now);
    }
    if trial.reserve_all(&ask.requests, std::slice::from_ref(&device), now).is_none() {
        return Outcome::No { missing: Some(0) };
    }
    *ledger = trial;
    for at in &goes {
        gone[*at] = true;
    }
    Outcome::Fits { device: Some(device), goes }
}

/// The indexes of most of `asks` that fit together; of as many, of those that take most.
pub fn largest_set(
    ledger: &Ledger,
    asks: &[Ask],
    idle: &[Idle],
    policy: &dyn Fn(&DeviceId) -> EvictionPolicy,
    now: Now,
) -> Vec<usize> {
    let bytes =
        |at: usize| asks[at].requests.iter().fold(0_u64, |sum, one| sum.saturating_add(one.size_bytes));
    let fits = |set: &[usize]| {
        let chosen: Vec<&Ask> = set.iter().map(|at| &asks[*at]).collect();
        let outcomes = plan(ledger.clone(), &chosen, idle, policy, now);
        outcomes.iter().all(|outcome| matches!(outcome, Outcome::Fits { .. }))
    };
    if asks.len() > EXACT {
        let mut order: Vec<usize> = (0..asks.len()).collect();
        order.sort_by_key(|at| bytes(*at));
        let mut set = Vec::new();
        for at in order {
            set.push(at);
            if !fits(&set) {
                set.pop();
            }
        }
        set.sort_unstable();
        return set;
    }
    let mut sets: Vec<(usize, u64, Vec<usize>)> = (1_u32..1 << asks.len())
        .map(|bits| {
            let set: Vec<usize> = (0..asks.len()).filter(|at| bits & 1 << at != 0).collect();
            (set.len(), set.iter().fold(0_u64, |sum, at| sum.saturating_add(bytes(*at))), set)
        })
        .collect();
    sets.sort_by_key(|(count, bytes, _)| std::cmp::Reverse((*count, *bytes)));
    sets.into_iter().map(|(_, _, set)| set).find(|set| fits(set)).unwrap_or_default()
}
