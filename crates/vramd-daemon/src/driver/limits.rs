//! Limits: set, kept over restarts, and kept to by having idle models go.

use vramd_api::{ApiError, DeviceId, DeviceLimits, EventKind, EvictedComponent, Priority, SetLimits};
use vramd_core::eviction::{self, Candidate};

use super::tiers::PROMOTE_LATER_SECONDS;
use super::{OnStored, Reply, State};
use crate::store::Change;

impl State {
    pub(super) fn set_limits(
        &mut self,
        device: DeviceId,
        limits: Box<SetLimits>,
        reply: Reply<DeviceLimits>,
    ) {
        let change = Change::SetLimits(device.clone(), limits.clone());
        self.store(change, OnStored::Limits(device, limits, reply));
    }

    pub(super) fn limits_stored(
        &mut self,
        device: &DeviceId,
        limits: SetLimits,
        reply: Reply<DeviceLimits>,
        stored: Result<(), ApiError>,
    ) {
        let answer = stored.and_then(|()| {
            self.ledger.set_limits(device, limits);
            let above = self.ledger.limit(device).map_or(0, |limit| self.ledger.above(device, limit));
            let evicted = self.shrink(device, above, "the limit");
            let limits = self.ledger.limits(device).ok_or_else(|| ApiError::not_found("device", device))?;
            let limits = limits.to_api(device, self.ledger.allocations());
            self.emit(EventKind::LimitsChanged, serde_json::json!(limits));
            Ok(DeviceLimits { evicted, ..limits })
        });
        self.answer(reply, answer);
        self.admit();
    }

    /// Has idle models go where more is held than is wanted, or allowed: what stayed when a limit was set may be idle now.
    pub(super) fn keep_limits(&mut self) {
        if self.stopping {
            return;
        }
        let devices: Vec<DeviceId> = self.ledger.devices().map(|facts| facts.device.clone()).collect();
        for device in devices {
            let above = self.ledger.limit(&device).map_or(0, |limit| self.ledger.above(&device, limit));
            let mut gone = self.shrink(&device, above, "the limit");
            gone.extend(self.shrink(&device, self.ledger.above_soft(&device), "the soft limit"));
            if !gone.is_empty() {
                self.promote_later(PROMOTE_LATER_SECONDS);
            }
        }
    }

    /// Has `bytes` of what is idle on a device go, the least worth first; all of it, if it is not as much.
    fn shrink(&mut self, device: &DeviceId, bytes: u64, why: &str) -> Vec<EvictedComponent> {
        if bytes == 0 {
            return Vec::new();
        }
        let mut idle = self.candidates(device, Priority::Critical, None);
        idle.retain(|idle| idle.stays <= self.now.tick);
        let candidates: Vec<Candidate> = idle.iter().map(|idle| idle.candidate).collect();
        let policy = self.policy_on(device);
        let chosen = eviction::choose(&candidates, bytes, policy);
        let chosen = chosen.unwrap_or_else(|| (0..candidates.len()).collect());
        let goes: Vec<_> = chosen.into_iter().flat_map(|at| idle[at].parts.clone()).collect();
        self.tell_evicted(&goes, policy, why, "a limit", &[]);
        self.unload_evicted(&goes, true);
        goes
    }
}
