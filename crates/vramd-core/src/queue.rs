//! Requests that wait for room: by priority, then by age.
//!
//! Among those who wait nobody overtakes for the same memory: while a request cannot be granted, the devices that it
//! could go to are closed to those behind it, unless it waits for a limit of its own, but for the room that these have made themselves and claimed ([`Ledger::claim`]). Requests that
//! do not wait are not held up by those that do, and cannot have what is claimed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use vramd_api::{AllocationId, DeviceId, Priority};

use crate::ledger::{Grant, Ledger, Request};
use crate::{Now, Tick};

/// The most requests that wait at one time.
pub const MAX_WAITING: usize = 1000;

/// Blocks that are granted together, on one device, or not at all.
#[derive(Debug, Clone, PartialEq)]
pub struct Waiting {
    /// One at least; the first one's id names them all.
    pub requests: Vec<Request>,
    /// The devices they may go to; all if empty.
    pub on: Vec<DeviceId>,
    pub deadline: Tick,
}

impl Waiting {
    pub fn id(&self) -> AllocationId {
        self.requests[0].id
    }
}

#[derive(Debug, Clone, Default)]
pub struct Queue {
    entries: BTreeMap<(Reverse<Priority>, u64), Waiting>,
    last: u64,
}

impl Queue {
    /// Lines requests up; false when the queue is full.
    pub fn push(&mut self, waiting: Waiting) -> bool {
        if self.is_full() {
            return false;
        }
        self.last += 1;
        self.entries.insert((Reverse(waiting.requests[0].priority), self.last), waiting);
        true
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Grants what can be granted now, in order; what was granted is under the id of its first request.
    pub fn admit(
        &mut self,
        ledger: &mut Ledger,
        now: Now,
    ) -> Vec<(AllocationId, Vec<(AllocationId, Grant)>)> {
        let mut granted = Vec::new();
        let mut closed: BTreeSet<DeviceId> = BTreeSet::new();
        self.entries.retain(|_, waiting| {
            let open = open_to(waiting, ledger, &closed);
            if open.is_empty() {
                return true;
            }
            // Its own is not in its way.
            let claim = ledger.give_up_claim(waiting.id());
            if let Some(grants) = ledger.reserve_all(&waiting.requests, &open, now) {
                granted.push((waiting.id(), grants));
                return false;
            }
            if let Some((device, bytes)) = claim {
                ledger.claim(waiting.id(), &device, bytes);
            }
            closed.extend(kept_from_others(waiting, ledger, open));
            true
        });
        granted
    }

    pub fn is_full(&self) -> bool {
        self.entries.len() >= MAX_WAITING
    }

    /// All who wait, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Waiting> {
        self.entries.values()
    }

    /// Those who are next, and the devices on which they are.
    pub fn next_on(&self, ledger: &Ledger) -> Vec<(&Waiting, Vec<DeviceId>)> {
        let mut closed = BTreeSet::new();
        let next = |waiting| {
            let open = open_to(waiting, ledger, &closed);
            closed.extend(kept_from_others(waiting, ledger, open.clone()));
            (!open.is_empty()).then_some((waiting, open))
        };
        self.entries.values().filter_map(next).collect()
    }

    /// Lets one wait longer.
    pub fn extend(&mut self, id: AllocationId, deadline: Tick) {
        if let Some(waiting) = self.entries.values_mut().find(|waiting| waiting.id() == id) {
            waiting.deadline = waiting.deadline.max(deadline);
        }
    }

    /// Takes out the requests whose time is over.
    pub fn expired(&mut self, tick: Tick) -> Vec<Waiting> {
        self.entries
            .extract_if(.., |_, waiting| waiting.deadline <= tick)
            .map(|(_, waiting)| waiting)
            .collect()
    }

    /// Takes out the requests that nobody waits for any more; answers their ids.
    pub fn retain(&mut self, mut wanted: impl FnMut(AllocationId) -> bool) -> Vec<AllocationId> {
        let unwanted = self.entries.extract_if(.., |_, waiting| !wanted(waiting.id()));
        unwanted.map(|(_, waiting)| waiting.id()).collect()
    }
}

/// The devices that are closed to those behind: not where it is a limit of their own that requests wait for.
fn kept_from_others(waiting: &Waiting, ledger: &Ledger, mut open: Vec<DeviceId>) -> Vec<DeviceId> {
    open.retain(|device| !ledger.is_limited(&waiting.requests, device));
    open
}

/// The devices that requests may go to and that nobody before them waits for, or where room was made for them: nobody would
/// have that otherwise.
fn open_to(waiting: &Waiting, ledger: &Ledger, closed: &BTreeSet<DeviceId>) -> Vec<DeviceId> {
    let mut open = ledger.devices_for(&waiting.requests[0], &waiting.on);
    let claimed = ledger.claimed_on(waiting.id());
    open.retain(|device| (!closed.contains(device) || claimed == Some(device)) && !ledger.is_lost(device));
    open
}
