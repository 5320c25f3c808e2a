//! Requests that wait for room: by priority, then by age.
//!
//! Among those who wait nobody overtakes for the same memory: while a request cannot be granted, the devices that it
//! could go to are closed to those behind it. Requests that do not wait are not held up by those that do.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use vramd_api::{AllocationId, DeviceId, Priority};

use crate::ledger::{Grant, Ledger, Request};
use crate::{Now, Tick};

/// The most requests that wait at one time.
pub const MAX_WAITING: usize = 1000;

#[derive(Debug, Clone, PartialEq)]
pub struct Waiting {
    pub request: Request,
    /// The devices it may go to; all if empty.
    pub on: Vec<DeviceId>,
    pub deadline: Tick,
}

#[derive(Debug, Clone, Default)]
pub struct Queue {
    entries: BTreeMap<(Reverse<Priority>, u64), Waiting>,
    last: u64,
}

impl Queue {
    /// Lines a request up; false when the queue is full.
    pub fn push(&mut self, waiting: Waiting) -> bool {
        if self.entries.len() >= MAX_WAITING {
            return false;
        }
        self.last += 1;
        self.entries.insert((Reverse(waiting.request.priority), self.last), waiting);
        true
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Grants what can be granted now, in order.
    pub fn admit(&mut self, ledger: &mut Ledger, now: Now) -> Vec<(AllocationId, Grant)> {
        let mut granted = Vec::new();
        let mut closed: BTreeSet<DeviceId> = BTreeSet::new();
        self.entries.retain(|_, waiting| {
            let open = open_to(waiting, ledger, &closed);
            if open.is_empty() {
                return true;
            }
            if let Ok(grant) = ledger.reserve(waiting.request.clone(), &open, now) {
                granted.push((waiting.request.id, grant));
                return false;
            }
            closed.extend(open);
            true
        });
        granted
    }

    /// Those who are next, and the devices on which they are.
    pub fn next_on(&self, ledger: &Ledger) -> Vec<(&Request, Vec<DeviceId>)> {
        let mut closed = BTreeSet::new();
        let next = |waiting| {
            let open = open_to(waiting, ledger, &closed);
            closed.extend(open.iter().cloned());
            (!open.is_empty()).then_some((&waiting.request, open))
        };
        self.entries.values().filter_map(next).collect()
    }

    /// Takes out the requests whose time is over.
    pub fn expired(&mut self, tick: Tick) -> Vec<Waiting> {
        self.entries
            .extract_if(.., |_, waiting| waiting.deadline <= tick)
            .map(|(_, waiting)| waiting)
            .collect()
    }

    /// Takes out the requests that nobody waits for any more.
    pub fn retain(&mut self, mut wanted: impl FnMut(AllocationId) -> bool) {
        self.entries.retain(|_, waiting| wanted(waiting.request.id));
    }
}

/// The devices that a request may go to and that nobody before it waits for.
fn open_to(waiting: &Waiting, ledger: &Ledger, closed: &BTreeSet<DeviceId>) -> Vec<DeviceId> {
    let mut open = ledger.devices_for(&waiting.request, &waiting.on);
    open.retain(|device| !closed.contains(device) && !ledger.is_lost(device));
    open
}
