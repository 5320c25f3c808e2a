//! Whose turn it is to move bytes: fair shares by priority, and a bound on the rate of each.
//!
//! Start-time fair queueing: a flow that has moved fewer bytes for its weight goes first. One that is new, or had nothing to
//! move, or was held, starts where the last turn began, so that it neither waits for the past of others nor makes them
//! wait for its own. Nobody starves: a low priority gets a small share, not none.

use std::collections::BTreeMap;

use vramd_api::Priority;

/// Bytes are counted by this for each unit of weight, so that a share is a whole number.
const SCALE: u128 = 64;

#[derive(Debug, Clone)]
struct Flow {
    weight: u128,
    /// The bytes it has moved, by its weight.
    spent: u128,
    bytes_per_second: Option<u64>,
    /// In nanoseconds of the caller's clock: when its rate allows the next piece.
    not_before: u64,
    paused: bool,
}

/// Who moves next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Flow(u64),
    /// All that could go are held by their rates until then.
    NotBefore(u64),
    Nobody,
}

#[derive(Debug, Clone, Default)]
pub struct Turns {
    flows: BTreeMap<u64, Flow>,
    /// Where the last turn began: nobody starts before it.
    stand: u128,
}

/// The share of a priority.
fn weight(priority: Priority) -> u128 {
    match priority {
        Priority::Low => 1,
        Priority::Normal => 4,
        Priority::High => 16,
        Priority::Critical => 64,
    }
}

impl Turns {
    pub fn join(&mut self, id: u64, priority: Priority, bytes_per_second: Option<u64>) {
        let flow =
            Flow { weight: weight(priority), spent: 0, bytes_per_second, not_before: 0, paused: false };
        self.flows.insert(id, flow);
    }

    pub fn leave(&mut self, id: u64) {
        self.flows.remove(&id);
    }

    pub fn pause(&mut self, id: u64, paused: bool) {
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.paused = paused;
        }
    }

    /// Whose turn it is among those that have something to move.
    pub fn next(&self, now: u64, has_work: impl Fn(u64) -> bool) -> Turn {
        let waiting = || self.flows.iter().filter(|(id, flow)| !flow.paused && has_work(**id));
        let open = waiting().filter(|(_, flow)| flow.not_before <= now);
        if let Some((id, _)) = open.min_by_key(|(id, flow)| (flow.spent.max(self.stand), **id)) {
            return Turn::Flow(*id);
        }
        waiting().map(|(_, flow)| flow.not_before).min().map_or(Turn::Nobody, Turn::NotBefore)
    }

    /// A flow takes a piece.
    pub fn charge(&mut self, id: u64, bytes: u64, now: u64) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        self.stand = self.stand.max(flow.spent);
        flow.spent = self.stand + u128::from(bytes) * SCALE / flow.weight;
        if let Some(rate) = flow.bytes_per_second {
            let takes = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
            let takes = u64::try_from(takes).unwrap_or(u64::MAX);
            flow.not_before = flow.not_before.max(now).saturating_add(takes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Moves `rounds` pieces of `bytes`; how many bytes each flow got.
    fn run(turns: &mut Turns, rounds: usize, bytes: u64) -> BTreeMap<u64, u64> {
        let mut moved = BTreeMap::new();
        for _ in 0..rounds {
            let Turn::Flow(id) = turns.next(0, |_| true) else { break };
            turns.charge(id, bytes, 0);
            *moved.entry(id).or_default() += bytes;
        }
        moved
    }

    #[test]
    fn equals_share_evenly_and_a_higher_priority_gets_more_but_not_all() {
        let mut turns = Turns::default();
        turns.join(1, Priority::Normal, None);
        turns.join(2, Priority::Normal, None);
        turns.join(3, Priority::High, None);
        let moved = run(&mut turns, 600, 1 << 20);
        assert_eq!((moved[&1], moved[&2], moved[&3]), (100 << 20, 100 << 20, 400 << 20));
    }

    #[test]
    fn who_comes_late_neither_catches_up_nor_waits() {
        let mut turns = Turns::default();
        turns.join(1, Priority::Normal, None);
        run(&mut turns, 1000, 1 << 20);
        turns.join(2, Priority::Normal, None);
        let moved = run(&mut turns, 100, 1 << 20);
        assert_eq!((moved[&1], moved[&2]), (50 << 20, 50 << 20));
    }

    #[test]
    fn a_bounded_flow_waits_while_others_go_on() {
        let mut turns = Turns::default();
        turns.join(1, Priority::Critical, Some(1 << 20));
        turns.join(2, Priority::Low, None);
        assert_eq!(turns.next(0, |_| true), Turn::Flow(1));
        turns.charge(1, 1 << 20, 0);
        assert_eq!(turns.next(0, |_| true), Turn::Flow(2));
        assert_eq!(turns.next(0, |id| id == 1), Turn::NotBefore(1_000_000_000));
        assert_eq!(turns.next(1_000_000_000, |id| id == 1), Turn::Flow(1));
    }

    #[test]
    fn who_was_held_for_long_neither_catches_up_nor_lets_others_do_so() {
        let mut turns = Turns::default();
        turns.join(1, Priority::Normal, None);
        turns.join(2, Priority::Normal, Some(1));
        turns.join(3, Priority::Normal, None);
        turns.charge(2, 1 << 20, 0);
        turns.pause(3, true);
        run(&mut turns, 1000, 1 << 20);
        turns.pause(3, false);
        turns.join(4, Priority::Normal, None);
        let moved = run(&mut turns, 90, 1 << 20);
        assert_eq!((moved[&1], moved.get(&2), moved[&3], moved[&4]), (30 << 20, None, 30 << 20, 30 << 20));
    }

    #[test]
    fn a_paused_flow_gets_no_turn() {
        let mut turns = Turns::default();
        turns.join(1, Priority::Normal, None);
        turns.pause(1, true);
        assert_eq!(turns.next(0, |_| true), Turn::Nobody);
        turns.pause(1, false);
        assert_eq!(turns.next(0, |_| true), Turn::Flow(1));
        turns.leave(1);
        assert_eq!(turns.next(0, |_| true), Turn::Nobody);
    }

    proptest! {
        /// Between two flows that always have work, the one with less for its weight is never more than a piece behind.
        #[test]
        fn shares_are_fair_at_every_moment(
            priorities in prop::collection::vec(0usize..4, 2..6),
            pieces in prop::collection::vec(1u64..5_000_000, 1..300),
        ) {
            const ALL: [Priority; 4] = [Priority::Low, Priority::Normal, Priority::High, Priority::Critical];
            let mut turns = Turns::default();
            for (id, priority) in priorities.iter().enumerate() {
                turns.join(id as u64, ALL[*priority], None);
            }
            for bytes in pieces {
                let Turn::Flow(id) = turns.next(0, |_| true) else { panic!("all have work") };
                turns.charge(id, bytes, 0);
                let spent = || turns.flows.values().map(|flow| flow.spent);
                let apart = spent().max().unwrap() - spent().min().unwrap();
                prop_assert!(apart <= 5_000_000 * SCALE, "{apart} apart");
            }
        }
    }
}
