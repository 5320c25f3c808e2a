//! What a defragmentation would move, and what cannot move and why.
//!
//! A plan is made on a snapshot, on a thread; here is what goes into it and what comes out.

use std::collections::{BTreeMap, BTreeSet};

use vramd_api::{
    AllocationId, DefragmentPlan, DefragmentPlans, DefragmentRequest, DeviceId, FixedBlock, FixedReason,
    FragmentationFigures,
};
use vramd_core::compaction::{self, Bounds};
use vramd_core::ledger::{Fixed, Group, Lease, NewPlace, SegmentId, Usage};
use vramd_core::models::Residency;

use super::{Reply, State};

/// The most blocks that an answer lists.
pub(super) const LISTED: usize = 1000;

/// One move of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    pub(super) id: AllocationId,
    pub(super) from: NewPlace,
    pub(super) to: NewPlace,
    pub(super) bytes: u64,
}

/// What a thread has planned for a pass.
#[derive(Debug)]
pub struct PassPlan {
    pub(super) moves: Vec<Planned>,
    /// Nothing was left out because of a bound.
    pub(super) complete: bool,
}

impl State {
    /// Answers what a defragmentation would do; the planning is done on a thread.
    pub(super) fn plan_defragment(
        &mut self,
        request: &DefragmentRequest,
        device: Option<DeviceId>,
        reply: Reply<DefragmentPlans>,
    ) {
        let devices: Vec<DeviceId> = device.map_or_else(
            || self.ledger.devices().map(|facts| facts.device.clone()).collect(),
            |one| vec![one],
        );
        let snapshots: Vec<_> = devices
            .into_iter()
            .map(|device| {
                let fixed = self.fixed_on(&device);
                let blocks =
                    fixed.iter().map(|(id, reason)| self.fixed_block(*id, *reason)).collect::<Vec<_>>();
                let groups = self.ledger.groups(&device, |id| fixed.contains_key(&id).then_some(Fixed::Busy));
                let usage = self.ledger.usage(&device).unwrap_or_default();
                (self.rates.get(&device).copied(), device, groups, usage, blocks)
            })
            .collect();
        let bounds = bounds(request, 0, 0);
        tokio::task::spawn_blocking(move || {
            let plans = snapshots
                .into_iter()
                .map(|(rate, device, groups, usage, fixed)| {
                    dry_plan(device, &groups, usage, bounds, rate, fixed)
                })
                .collect();
            let _ = reply.send(Ok(DefragmentPlans { plans }));
        });
    }

    /// What cannot move on a device, and why.
    pub(super) fn fixed_on(&self, device: &DeviceId) -> BTreeMap<AllocationId, FixedReason> {
        let mut fixed = BTreeMap::new();
        let groups = self.ledger.groups(device, |_| None);
        fixed.extend(groups.iter().flat_map(|group| &group.fixed).map(|(id, why)| (*id, reason(*why))));
        let shared: BTreeSet<_> = groups.iter().flat_map(|group| &group.allocations).copied().collect();
        for model in self.models.iter().filter(|model| model.pinned) {
            let residencies =
                model.components.values().filter_map(|component| component.residency.get(device));
            let pinned = residencies.map(Residency::allocation).filter(|id| shared.contains(id));
            fixed.extend(pinned.map(|id| (id, FixedReason::Pinned)));
        }
        for (lease, reader) in self.attachments.iter().filter(|(_, reader)| reader.pending.is_some()) {
            let holds = reader.allocation;
            if shared.contains(&holds) {
                tracing::debug!(%lease, allocation = %holds, "a reader has not answered to a move");
                fixed.insert(holds, FixedReason::ReaderNotAnswering);
            }
        }
        fixed
    }

    /// With the processes because of which it stays.
    pub(super) fn fixed_block(&self, id: AllocationId, reason: FixedReason) -> FixedBlock {
        let is_why = |lease: &vramd_api::LeaseId, kept: &Lease| match reason {
            FixedReason::Written => kept.writes(),
            FixedReason::ReaderDoesNotFollow => matches!(kept, Lease::Connection { moves: false, .. }),
            FixedReason::ReaderNotAnswering => {
                self.attachments.get(lease).is_some_and(|reader| reader.pending.is_some())
            }
            FixedReason::Attached => true,
            FixedReason::Pinned | FixedReason::Busy | FixedReason::Stale | FixedReason::Failed => false,
        };
        let holders = self.ledger.allocation(id).into_iter().flat_map(|allocation| {
            let why = allocation.leases.iter().filter(|(lease, kept)| is_why(lease, kept));
            why.filter_map(|(_, kept)| kept.holder().cloned())
        });
        FixedBlock { allocation_id: id, reason, holders: holders.collect() }
    }

    pub(super) fn figures(&self, device: &DeviceId) -> FragmentationFigures {
        self.ledger.usage(device).map(figures).unwrap_or_default()
    }

    pub(super) fn fixed_now(&self, id: AllocationId) -> Option<FixedReason> {
        let leases = self.ledger.allocation(id).into_iter().flat_map(|allocation| allocation.leases.keys());
        let mut readers = leases.filter_map(|lease| self.attachments.get(lease));
        if readers.any(|reader| reader.pending.is_some()) {
            Some(FixedReason::ReaderNotAnswering)
        } else {
            self.ledger.fixed(id).map(reason)
        }
    }
}

pub(super) fn reason(fixed: Fixed) -> FixedReason {
    match fixed {
        Fixed::Written => FixedReason::Written,
        Fixed::Reader => FixedReason::ReaderDoesNotFollow,
        Fixed::Busy => FixedReason::Busy,
    }
}

fn figures(usage: Usage) -> FragmentationFigures {
    FragmentationFigures {
        largest_free_bytes: usage.largest_free_bytes,
        pool_free_bytes: usage.pool_free_bytes,
        hole_count: usage.hole_count,
        segment_count: usage.segment_count,
    }
}

/// What is left of a request's bounds.
pub(super) fn bounds(request: &DefragmentRequest, bytes: u64, moves: u64) -> Bounds {
    Bounds {
        bytes: request.max_bytes.map(|most| most.get().saturating_sub(bytes)),
        moves: request
            .max_moves
            .map(|most| usize::try_from(most.saturating_sub(moves)).unwrap_or(usize::MAX)),
    }
}

/// Plans group after group within what is left of the bounds.
fn plan_groups(groups: &[Group], mut bounds: Bounds) -> Vec<compaction::Plan> {
    groups
        .iter()
        .map(|group| {
            let plan = compaction::plan(&group.pools, bounds);
            bounds.bytes = bounds.bytes.map(|left| left - plan.bytes);
            bounds.moves = bounds.moves.map(|left| left - plan.moves.len());
            plan
        })
        .collect()
}

/// The first pass of a plan.
pub(super) fn pass_plan(groups: &[Group], bounds: Bounds) -> PassPlan {
    let plans = plan_groups(groups, bounds);
    let complete = bounds == Bounds::default() || plans == plan_groups(groups, Bounds::default());
    let place = |place: compaction::Place| NewPlace { segment: SegmentId(place.pool), offset: place.offset };
    let moves = groups
        .iter()
        .zip(&plans)
        .flat_map(|(group, plan)| {
            plan.moves.iter().filter(|one| one.pass == 0).map(|one| Planned {
                id: group.allocations[one.block as usize],
                from: place(one.from),
                to: place(one.to),
                bytes: one.bytes,
            })
        })
        .collect();
    PassPlan { moves, complete }
}

fn dry_plan(
    device: DeviceId,
    groups: &[Group],
    usage: Usage,
    bounds: Bounds,
    rate: Option<f64>,
    fixed: Vec<FixedBlock>,
) -> DefragmentPlan {
    let plans = plan_groups(groups, bounds);
    let before = figures(usage);
    let sum = |of: fn(&compaction::Plan) -> u64| plans.iter().map(of).sum::<u64>();
    let bytes = sum(|plan| plan.bytes);
    let emptied_of =
        |plan: &compaction::Plan| plan.after.empty_pools.saturating_sub(plan.before.empty_pools) as u64;
    let emptied_count: u64 = plans.iter().map(emptied_of).sum();
    let emptied: u64 = groups
        .iter()
        .zip(&plans)
        .map(|(group, plan)| group.pools.first().map_or(0, |pool| pool.bytes) * emptied_of(plan))
        .sum();
    let after = FragmentationFigures {
        largest_free_bytes: before.largest_free_bytes.max(usage.largest_new_bytes + emptied),
        pool_free_bytes: before.pool_free_bytes - emptied,
        hole_count: (before.hole_count + sum(|plan| plan.after.hole_count as u64))
            .saturating_sub(sum(|plan| plan.before.hole_count as u64) + emptied_count),
        segment_count: before.segment_count - emptied_count,
    };
    DefragmentPlan {
        device_id: device,
        moves: sum(|plan| plan.moves.len() as u64),
        bytes,
        expected_seconds: rate.filter(|rate| *rate > 0.0).map(|rate| bytes as f64 / rate),
        passes: plans
            .iter()
            .flat_map(|plan| &plan.moves)
            .map(|one| u64::from(one.pass) + 1)
            .max()
            .unwrap_or(0),
        reclaimed_bytes: emptied,
        before,
        after,
        fixed_count: fixed.len() as u64,
        fixed: fixed.into_iter().take(LISTED).collect(),
    }
}
