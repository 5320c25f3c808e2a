//! Defragmentation: passes over one device after another.
//!
//! A pass plans on a snapshot (on a thread), moves what the plan names, several blocks at once, and waits until the old
//! places are free, or until the readers that keep them have had [`SETTLE_MS`] to answer. The next pass plans anew, so a
//! plan is never older than one pass, and a block that changed meanwhile is only left out. It ends when a pass has moved
//! nothing, or at a bound. What has moved stays moved, however it ends.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use vramd_api::{
    AllocationId, ApiError, DefragmentRequest, Defragmented, DeviceDefragmented, DeviceId, EndedBy,
    ErrorCode, EventKind, FixedReason, FragmentationFigures, LeaseId, Operation, OperationId, OperationKind,
    Priority,
};
use vramd_core::Tick;
use vramd_core::ledger::{Fixed, SegmentId};

use super::allocations::OnReleased;
use super::copies::{Copy, CopyError, CopyId, flow};
use super::operations::Running;
use super::plans::{LISTED, PassPlan, Planned, bounds, pass_plan, reason};
use super::{Event, Reply, State};

/// How long readers may take to answer to a move.
const SETTLE_MS: u64 = 1500;
/// Blocks that move at the same time.
const WINDOW: usize = 16;
/// After a shortage started one in vain, the next does not start another for this long.
const AGAIN_MS: u64 = 10_000;

/// A defragmentation under way.
#[derive(Debug)]
pub(super) struct Defragmenting {
    request: DefragmentRequest,
    pub(super) hours: Hours,
    began: Tick,
    devices: VecDeque<DeviceId>,
    current: Option<Pass>,
    ended: Vec<DeviceDefragmented>,
    moves: u64,
    bytes: u64,
    ended_by: EndedBy,
}

/// When it may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hours {
    Any,
    /// Only in quiet hours, which it now is.
    Quiet,
    /// The quiet hours that it was begun in are over.
    Over,
}

/// What it does on one device now.
#[derive(Debug)]
struct Pass {
    device: DeviceId,
    before: FragmentationFigures,
    planning: bool,
    planned: VecDeque<Planned>,
    copying: BTreeSet<CopyId>,
    /// Old places that are not free yet.
    left: BTreeSet<AllocationId>,
    /// Segments of which the pass moves every block.
    emptied: BTreeSet<SegmentId>,
    /// Our leases on the old places in those, until a segment can go back as a whole or the pass has nothing more to copy.
    held: BTreeMap<SegmentId, Held>,
    /// Segments of which something was let go since.
    look: BTreeSet<SegmentId>,
    settle_by: Tick,
    began: Tick,
    /// When the last copy ended.
    copied: Tick,
    /// It was paused, which says nothing about the device's rate.
    was_paused: bool,
    /// In this pass.
    moved_bytes: u64,
    moves: u64,
    bytes: u64,
    passes: u64,
    fixed: BTreeMap<AllocationId, FixedReason>,
}

/// What moves have left in one segment.
#[derive(Debug, Default)]
struct Held {
    leases: Vec<LeaseId>,
    bytes: u64,
}

impl Defragmenting {
    /// Why nothing more may begin.
    fn bound(&self, now: Tick) -> Option<EndedBy> {
        if self.hours == Hours::Over {
            return Some(EndedBy::QuietHoursEnded);
        }
        let late = self.request.max_milliseconds.is_some_and(|most| now.0 - self.began.0 >= most);
        late.then_some(EndedBy::MaxMilliseconds)
    }
}

impl State {
    pub(super) fn defragment(
        &mut self,
        request: DefragmentRequest,
        device: Option<DeviceId>,
        reply: Reply<Operation>,
    ) {
        let devices = device.map_or_else(
            || self.ledger.devices().map(|facts| facts.device.clone()).collect(),
            |one| vec![one],
        );
        let answer = self.begin_defragment(request, devices, Hours::Any, "asked for");
        self.answer(reply, answer);
    }

    pub(super) fn begin_defragment(
        &mut self,
        request: DefragmentRequest,
        devices: Vec<DeviceId>,
        hours: Hours,
        why: &str,
    ) -> Result<Operation, ApiError> {
        if self.stopping {
            return Err(ApiError::new(ErrorCode::Unavailable, "the daemon is stopping"));
        }
        for device in &devices {
            if let Some(id) = self.defragmenting(device) {
                return Err(ApiError::new(
                    ErrorCode::Conflict,
                    format!("{device} is being defragmented already"),
                )
                .hint("wait for that operation, or cancel it: `vramd cancel ID`")
                .detail("operationId", id.to_string()));
            }
        }
        let names: Vec<_> = devices.iter().map(DeviceId::as_str).collect();
        let subject = format!("{}, {why}", names.join(", "));
        let id = self.operations.begin(OperationKind::Defragment, subject, 0, self.now);
        self.join_turns(id, request.priority.unwrap_or(Priority::Low), request.max_bytes_per_second);
        let running = Defragmenting {
            request,
            hours,
            began: self.now.tick,
            devices: devices.into(),
            current: None,
            ended: Vec::new(),
            moves: 0,
            bytes: 0,
            ended_by: EndedBy::Done,
        };
        self.operations.running.insert(id, Running::Defragment(running));
        let shown = self.operations.show(id)?;
        self.emit(EventKind::OperationChanged, serde_json::json!(shown));
        self.go_on(id);
        Ok(shown)
    }

    /// The defragmentation under way that has this device before it.
    pub(super) fn defragmenting(&self, device: &DeviceId) -> Option<OperationId> {
        self.operations.running.iter().find_map(|(id, running)| match running {
            Running::Defragment(running) => {
                let current = running.current.as_ref().map(|pass| &pass.device);
                (current == Some(device) || running.devices.contains(device)).then_some(*id)
            }
            Running::Load(_)
            | Running::Unload(_)
            | Running::Transfer(_)
            | Running::Clear(_)
            | Running::Split(_)
            | Running::Relief(_) => None,
        })
    }

    /// A request was refused that would fit if the device were packed: pack it.
    pub(super) fn defragment_for(&mut self, device: &DeviceId) -> Option<OperationId> {
        if let Some(running) = self.defragmenting(device) {
            return Some(running);
        }
        if !self.may_defragment_for(device) {
            return None;
        }
        let request = DefragmentRequest { priority: Some(Priority::High), ..DefragmentRequest::default() };
        let why = "for a request that needs room";
        let begun = self.begin_defragment(request, vec![device.clone()], Hours::Any, why);
        begun.ok().map(|operation| operation.operation_id)
    }

    /// The last one was not in vain, or some time ago.
    pub(super) fn may_defragment_for(&self, device: &DeviceId) -> bool {
        self.defragmented_at.get(device).is_none_or(|at| at.0 + AGAIN_MS <= self.now.tick.0)
    }

    /// Plans the next pass on a thread.
    fn plan_pass(&mut self, id: OperationId, device: &DeviceId) {
        let mut fixed = self.fixed_on(device);
        let Some(Running::Defragment(running)) = self.operations.running.get_mut(&id) else { return };
        let bounds = bounds(&running.request, running.bytes, running.moves);
        if let Some(pass) = &mut running.current {
            pass.planning = true;
            // What failed once is not tried again by this one.
            pass.fixed.retain(|_, reason| *reason == FixedReason::Failed);
            let failed = std::mem::replace(&mut pass.fixed, fixed);
            pass.fixed.extend(failed);
            fixed = pass.fixed.clone();
        }
        let groups = self.ledger.groups(device, |id| fixed.contains_key(&id).then_some(Fixed::Busy));
        let sender = self.sender.clone();
        self.jobs += 1;
        tokio::task::spawn_blocking(move || {
            let plan = pass_plan(&groups, bounds);
            let _ = sender.blocking_send(Event::Planned { operation: id, plan });
        });
    }

    pub(super) fn planned(&mut self, id: OperationId, plan: PassPlan) {
        let tick = self.now.tick;
        let Some(Running::Defragment(running)) = self.operations.running.get_mut(&id) else { return };
        let Some(pass) = &mut running.current else { return };
        pass.planning = false;
        let bytes: u64 = plan.moves.iter().map(|planned| planned.bytes).sum();
        if plan.moves.is_empty() && !plan.complete {
            let moves = running.request.max_moves.is_some_and(|most| running.moves >= most);
            running.ended_by = if moves { EndedBy::MaxMoves } else { EndedBy::MaxBytes };
        }
        (pass.began, pass.copied, pass.was_paused, pass.moved_bytes) = (tick, tick, false, 0);
        pass.passes += u64::from(!plan.moves.is_empty());
        let mut leaving: BTreeMap<SegmentId, u64> = BTreeMap::new();
        for planned in &plan.moves {
            *leaving.entry(planned.from.segment).or_default() += planned.bytes;
        }
        leaving.retain(|segment, bytes| self.ledger.holds_only(&pass.device, *segment, *bytes));
        pass.emptied = leaving.into_keys().collect();
        pass.planned = plan.moves.into();
        let total = running.bytes + bytes;
        self.operations.set_total(id, total);
        if bytes == 0 {
            return self.end_device(id);
        }
        self.go_on(id);
    }

    /// Gives back the segments in which nothing is but what the pass has left there.
    fn empty_segments(&mut self, id: OperationId) {
        let Some(pass) = self.pass(id) else { return };
        let device = pass.device.clone();
        for segment in std::mem::take(&mut pass.look) {
            let Some(held) = self.pass(id).and_then(|pass| pass.held.remove(&segment)) else { continue };
            match self.ledger.empty_segment(&device, segment, &held.leases, held.bytes, self.now) {
                Some(places) => {
                    for place in places {
                        self.bytes_back(place, Vec::new());
                    }
                }
                None => {
                    if let Some(pass) = self.pass(id) {
                        pass.held.insert(segment, held);
                    }
                }
            }
        }
    }

    /// Lets go of old places: of those in segments where other blocks are, or of all.
    fn let_go(&mut self, id: OperationId, all: bool) {
        let Some(pass) = self.pass(id) else { return };
        let device = pass.device.clone();
        for (segment, held) in std::mem::take(&mut pass.held) {
            if all || !self.ledger.holds_only(&device, segment, held.bytes) {
                for lease in held.leases {
                    self.finish_lease(lease);
                }
            } else if let Some(pass) = self.pass(id) {
                pass.held.insert(segment, held);
            }
        }
    }

    fn pass(&mut self, id: OperationId) -> Option<&mut Pass> {
        match self.operations.running.get_mut(&id) {
            Some(Running::Defragment(running)) => running.current.as_mut(),
            _ => None,
        }
    }

    /// Does what can be done now.
    pub(super) fn go_on(&mut self, id: OperationId) {
        self.empty_segments(id);
        loop {
            let cancelled = self.operations.cancelled(id);
            let paused = self.operations.is_paused(id);
            let tick = self.now.tick;
            let Some(Running::Defragment(running)) = self.operations.running.get_mut(&id) else { return };
            let bound = running.bound(tick);
            let Some(pass) = &mut running.current else {
                match (running.devices.pop_front(), bound) {
                    (Some(device), None) if !cancelled => return self.begin_device(id, &device),
                    (Some(_), Some(bound)) => running.ended_by = bound,
                    (Some(_) | None, _) => {}
                }
                return self.end_defragment(id);
            };
            if pass.planning {
                return;
            }
            if let Some(bound) = bound.filter(|_| !pass.planned.is_empty()) {
                running.ended_by = bound;
            }
            if cancelled || bound.is_some() {
                pass.planned.clear();
            }
            pass.was_paused |= paused;
            if pass.copying.len() < WINDOW
                && !paused
                && let Some(planned) = pass.planned.pop_front()
            {
                self.begin_planned(id, planned);
                continue;
            }
            if !pass.copying.is_empty() || !pass.planned.is_empty() {
                if pass.copying.is_empty() {
                    // It is paused, for nobody knows how long.
                    self.let_go(id, true);
                }
                return;
            }
            let settled = tick >= pass.settle_by;
            if !pass.held.is_empty() {
                self.let_go(id, settled);
            }
            let Some(pass) = self.pass(id) else { return };
            let device = pass.device.clone();
            if !settled && (!pass.left.is_empty() || self.ledger.gives_back(&device)) {
                return;
            }
            let Some(Running::Defragment(running)) = self.operations.running.get_mut(&id) else { return };
            let Some(pass) = &mut running.current else { return };
            let moved = pass.moved_bytes;
            let took = (pass.copied.0 - pass.began.0).max(1);
            let free = running.request.max_bytes_per_second.is_none() && !pass.was_paused;
            if moved >= 8 << 20 && free {
                self.rates.insert(device.clone(), moved as f64 * 1000.0 / took as f64);
            }
            if let Some(bound) = bound.filter(|_| moved > 0) {
                // The next pass might have found more to do.
                running.ended_by = bound;
            }
            if cancelled || bound.is_some() || moved == 0 {
                return self.end_device(id);
            }
            if !paused {
                self.plan_pass(id, &device);
            }
            return;
        }
    }

    fn begin_device(&mut self, id: OperationId, device: &DeviceId) {
        let before = self.figures(device);
        let tick = self.now.tick;
        let Some(Running::Defragment(running)) = self.operations.running.get_mut(&id) else { return };
        running.current = Some(Pass {
            device: device.clone(),
            before,
            planning: false,
            planned: VecDeque::new(),
            copying: BTreeSet::new(),
            left: BTreeSet::new(),
            emptied: BTreeSet::new(),
            held: BTreeMap::new(),
            look: BTreeSet::new(),
            settle_by: tick,
            began: tick,
            copied: tick,
            was_paused: false,
            moved_bytes: 0,
            moves: 0,
            bytes: 0,
            passes: 0,
            fixed: BTreeMap::new(),
        });
        self.plan_pass(id, device);
    }

    /// Begins one move of a plan, if the plan still holds.
    fn begin_planned(&mut self, id: OperationId, planned: Planned) {
        let stands = self.ledger.allocation(planned.id).is_some_and(|allocation| {
            (allocation.segment, allocation.offset) == (planned.from.segment, planned.from.offset)
        });
        let why = self.fixed_now(planned.id);
        let copy = if stands && why.is_none() { self.begin_move(id, planned.id, planned.to) } else { None };
        let Some(Running::Defragment(running)) = self.operations.running.get_mut(&id) else { return };
        let Some(pass) = &mut running.current else { return };
        match copy {
            Some(copy) => {
                pass.copying.insert(copy);
            }
            // One that is gone is no block that stays.
            None if !stands && self.ledger.allocation(planned.id).is_none() => {}
            None => {
                pass.fixed.insert(planned.id, why.unwrap_or(FixedReason::Stale));
            }
        }
    }

    /// A block has its new place, or keeps its old one.
    pub(super) fn block_moved(
        &mut self,
        id: OperationId,
        copy: CopyId,
        outcome: Result<(&mut Copy, Option<u64>), (&Copy, CopyError)>,
    ) {
        let settle_by = Tick(self.now.tick.0 + SETTLE_MS);
        let Some(Running::Defragment(running)) = self.operations.running.get_mut(&id) else { return };
        let Some(pass) = &mut running.current else { return };
        pass.copying.remove(&copy);
        pass.copied = self.now.tick;
        match outcome {
            Ok((copy, _)) => {
                pass.moves += 1;
                pass.bytes += copy.bytes;
                pass.moved_bytes += copy.bytes;
                running.moves += 1;
                running.bytes += copy.bytes;
                pass.left.insert(copy.target);
                pass.settle_by = settle_by;
                let left = copy.target;
                let old = self.ledger.allocation(left).filter(|old| pass.emptied.contains(&old.segment));
                if let Some(place) = old
                    && let Some(lease) = copy.target_lease.take()
                {
                    let held = pass.held.entry(place.segment).or_default();
                    held.leases.push(lease);
                    held.bytes += place.block_bytes;
                    pass.look.insert(place.segment);
                }
                self.await_release(id, left);
            }
            Err((copy, CopyError::Stale(fixed))) => {
                pass.fixed.insert(copy.source, reason(fixed));
            }
            Err((copy, CopyError::Failed(error))) => {
                if error.code != ErrorCode::Cancelled {
                    tracing::warn!(allocation = %copy.source, %error, "a block could not be moved");
                }
                pass.fixed.insert(copy.source, FixedReason::Failed);
            }
        }
        self.now_or_later(id);
    }

    /// Goes on once this batch's event has been dealt with: the copy that just ended still holds its leases.
    fn now_or_later(&mut self, id: OperationId) {
        self.to_go_on.insert(id);
    }

    /// A reader has let go of an old place, which something else still keeps.
    pub(super) fn place_let_go(&mut self, place: AllocationId) {
        let Some(OnReleased::Operation(id)) = self.releasing.get(&place) else { return };
        let (id, segment) = (*id, self.ledger.allocation(place).map(|place| place.segment));
        if let (Some(pass), Some(segment)) = (self.pass(id), segment) {
            pass.look.insert(segment);
            self.now_or_later(id);
        }
    }

    /// The bytes that a move has left behind are free.
    pub(super) fn place_freed(&mut self, id: OperationId, place: AllocationId) {
        let settle_by = Tick(self.now.tick.0 + SETTLE_MS);
        if let Some(Running::Defragment(running)) = self.operations.running.get_mut(&id)
            && let Some(pass) = &mut running.current
        {
            pass.left.remove(&place);
            // Slow readers are not silent ones.
            pass.settle_by = settle_by;
            self.now_or_later(id);
        }
    }

    fn end_device(&mut self, id: OperationId) {
        let Some(Running::Defragment(running)) = self.operations.running.get_mut(&id) else { return };
        let Some(pass) = running.current.take() else { return };
        let after = self.figures(&pass.device);
        if after.largest_free_bytes <= pass.before.largest_free_bytes {
            self.defragmented_at.insert(pass.device.clone(), self.now.tick);
        }
        self.schedule.ended(&pass.device, self.now.tick);
        if pass.moves == 0 && self.operations.cancelled(id) {
            self.schedule.forget_plan(&pass.device);
        }
        let fixed: Vec<_> = pass
            .fixed
            .iter()
            .filter(|(id, _)| self.ledger.allocation(**id).is_some())
            .map(|(id, reason)| self.fixed_block(*id, *reason))
            .collect();
        let fixed_count = fixed.len() as u64;
        let ended = DeviceDefragmented {
            device_id: pass.device,
            moves: pass.moves,
            bytes: pass.bytes,
            passes: pass.passes,
            before: pass.before,
            after,
            fixed: fixed.into_iter().take(LISTED).collect(),
            fixed_count,
        };
        if let Some(Running::Defragment(running)) = self.operations.running.get_mut(&id) {
            running.ended.push(ended);
        }
        self.admit();
        self.go_on(id);
    }

    fn end_defragment(&mut self, id: OperationId) {
        let Some(Running::Defragment(running)) = self.operations.running.remove(&id) else { return };
        self.mover.leave(flow(id));
        if self.operations.cancelled(id) {
            let moved = running.moves;
            let error = ApiError::new(
                ErrorCode::Cancelled,
                format!(
                    "the defragmentation was cancelled; the {moved} blocks that had moved stay where they are"
                ),
            );
            return self.end_operation(id, Err(error));
        }
        let result = Defragmented {
            devices: running.ended,
            moves: running.moves,
            bytes: running.bytes,
            milliseconds: self.now.tick.0 - running.began.0,
            ended_by: running.ended_by,
        };
        self.operations.set_total(id, result.bytes);
        self.end_operation(id, Ok(serde_json::json!(result)));
    }
}
