//! Defragmentation in quiet hours, without being asked.
//!
//! At each tick within them, the next device that is due is looked at: a thread plans, and where there is something to
//! move, an operation begins, one device after another. Each is looked at once when the hours begin, then every
//! [`AGAIN_MS`] at most, and what was planned in vain is not begun again while the plan stays the same. When the hours are
//! over, the operation ends as at a bound.

use std::collections::BTreeMap;

use vramd_api::{DefragmentRequest, DeviceId, Priority};
use vramd_core::Tick;
use vramd_core::compaction::Bounds;
use vramd_core::ledger::Fixed;
use vramd_core::quiet_hours::QuietHours;

use super::copies::flow;
use super::defragment::Hours;
use super::operations::Running;
use super::plans::{self, PassPlan, Planned};
use super::{Event, State};
use crate::clock::LocalTime;

/// How long a device is left alone after it was looked at, or its defragmentation has ended.
const AGAIN_MS: u64 = 30 * 60 * 1000;

/// When to look at which device.
#[derive(Debug)]
pub struct Schedule {
    hours: Option<QuietHours>,
    local: LocalTime,
    /// A thread is planning.
    surveying: bool,
    /// In the quiet hours that are now.
    looks: BTreeMap<DeviceId, Look>,
}

/// The last look at a device.
#[derive(Debug)]
struct Look {
    at: Tick,
    planned: Vec<Planned>,
}

impl Schedule {
    /// Without hours it never begins anything.
    pub fn new(hours: Option<QuietHours>, local: LocalTime) -> Self {
        Self { hours, local, surveying: false, looks: BTreeMap::new() }
    }

    fn is_due(&self, device: &DeviceId, now: Tick) -> bool {
        self.looks.get(device).is_none_or(|look| look.at.0 + AGAIN_MS <= now.0)
    }

    /// Whether what is planned now is worth beginning.
    fn looked(&mut self, device: &DeviceId, planned: Vec<Planned>, now: Tick) -> bool {
        let before = self.looks.insert(device.clone(), Look { at: now, planned });
        let look = &self.looks[device];
        !look.planned.is_empty() && before.is_none_or(|before| before.planned != look.planned)
    }

    /// What was planned was not tried: it was not in vain.
    pub(super) fn forget_plan(&mut self, device: &DeviceId) {
        if let Some(look) = self.looks.get_mut(device) {
            look.planned.clear();
        }
    }

    /// A defragmentation of the device, whoever began it, has ended.
    pub(super) fn ended(&mut self, device: &DeviceId, now: Tick) {
        if let Some(look) = self.looks.get_mut(device) {
            look.at = now;
        }
    }
}

impl State {
    fn is_quiet(&self) -> bool {
        let hours = self.schedule.hours.as_ref();
        hours.is_some_and(|hours| hours.contain(self.schedule.local.at(self.now.wall)))
    }

    /// Looks at the next device, or ends what runs when the hours are over.
    pub(super) fn keep_quiet_hours(&mut self) {
        if !self.is_quiet() {
            self.schedule.looks.clear();
            return self.end_quiet_hours();
        }
        let scheduled = |running: &Running| matches!(running, Running::Defragment(running) if running.hours != Hours::Any);
        if self.stopping || self.schedule.surveying || self.operations.running.values().any(scheduled) {
            return;
        }
        let due = self.ledger.devices().map(|facts| &facts.device).find(|device| {
            self.schedule.is_due(device, self.now.tick)
                && !self.ledger.is_lost(device)
                && self.defragmenting(device).is_none()
        });
        if let Some(device) = due.cloned() {
            self.survey(device);
        }
    }

    fn end_quiet_hours(&mut self) {
        for (id, running) in &mut self.operations.running {
            if let Running::Defragment(running) = running
                && running.hours == Hours::Quiet
            {
                running.hours = Hours::Over;
                // What is paused has to run to its end.
                self.mover.pause(flow(*id), false);
            }
        }
    }

    /// Plans on a thread.
    fn survey(&mut self, device: DeviceId) {
        let fixed = self.fixed_on(&device);
        let groups = self.ledger.groups(&device, |id| fixed.contains_key(&id).then_some(Fixed::Busy));
        let sender = self.sender.clone();
        self.schedule.surveying = true;
        self.jobs += 1;
        tokio::task::spawn_blocking(move || {
            let plan = plans::pass_plan(&groups, Bounds::default());
            let _ = sender.blocking_send(Event::Surveyed { device, plan });
        });
    }

    pub(super) fn surveyed(&mut self, device: &DeviceId, plan: PassPlan) {
        self.schedule.surveying = false;
        if !self.is_quiet() || !self.schedule.looked(device, plan.moves, self.now.tick) {
            return;
        }
        let request = DefragmentRequest { priority: Some(Priority::Low), ..DefragmentRequest::default() };
        // It is refused where another has begun meanwhile, or the daemon stops.
        let begun = self.begin_defragment(request, vec![device.clone()], Hours::Quiet, "in quiet hours");
        if begun.is_err() {
            self.schedule.forget_plan(device);
        }
    }
}

#[cfg(test)]
mod tests {
    use vramd_api::AllocationId;
    use vramd_core::ledger::{NewPlace, SegmentId};

    use super::*;

    fn moves(bytes: u64) -> Vec<Planned> {
        let place = |segment| NewPlace { segment: SegmentId(segment), offset: 0 };
        vec![Planned { id: AllocationId(uuid::Uuid::nil()), from: place(1), to: place(2), bytes }]
    }

    fn schedule() -> (Schedule, DeviceId) {
        let schedule = Schedule::new(None, LocalTime::system());
        (schedule, "sim:0".parse().expect("a device"))
    }

    #[test]
    fn a_device_is_looked_at_once_and_then_after_half_an_hour() {
        let (mut schedule, device) = schedule();
        assert!(schedule.is_due(&device, Tick(0)));
        assert!(!schedule.looked(&device, Vec::new(), Tick(5)), "there is nothing to move");
        assert!(!schedule.is_due(&device, Tick(4 + AGAIN_MS)));
        assert!(schedule.is_due(&device, Tick(5 + AGAIN_MS)));
    }

    #[test]
    fn the_half_hour_counts_from_the_end_of_a_defragmentation() {
        let (mut schedule, device) = schedule();
        assert!(schedule.looked(&device, moves(1), Tick(0)));
        schedule.ended(&device, Tick(AGAIN_MS));
        assert!(!schedule.is_due(&device, Tick(AGAIN_MS)));
        assert!(schedule.is_due(&device, Tick(2 * AGAIN_MS)));
    }

    #[test]
    fn what_was_planned_in_vain_is_begun_again_once_the_plan_is_another() {
        let (mut schedule, device) = schedule();
        assert!(schedule.looked(&device, moves(1), Tick(0)));
        assert!(!schedule.looked(&device, moves(1), Tick(AGAIN_MS)));
        assert!(schedule.looked(&device, moves(2), Tick(2 * AGAIN_MS)));
    }
}
