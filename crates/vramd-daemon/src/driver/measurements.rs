//! What devices say of themselves: how full they are, what broke, and whether a lost one is back.

use std::collections::BTreeMap;

use vramd_api::{DeviceId, EventKind};
use vramd_core::ledger::Measured;
use vramd_device::{DeviceError, Report, Sample};

use super::{Event, State};

/// When a lost device is tried again; then after twice as long each time, up to the second: a try may leave something with
/// a driver that hangs.
const ADOPT_SECONDS: std::ops::RangeInclusive<u64> = 2..=300;

impl State {
    /// Tries devices again that are lost and have nothing of ours left.
    pub(super) fn adopt(&mut self) {
        let all = self.devices.iter().map(|device| device.facts().device.clone());
        let lost: Vec<_> = all.filter(|device| self.ledger.is_lost(device)).collect();
        for id in lost {
            // Who frees all on it does not know of the spare one.
            if let Some((segment, _)) = self.ledger.spare(&id)
                && let Some(work) = self.ledger.release_spare(&id, segment)
            {
                self.perform(work);
            }
            let (due, pause) =
                self.tries.get(&id).copied().unwrap_or((self.now.tick, *ADOPT_SECONDS.start()));
            if self.now.tick >= due && self.ledger.is_closed(&id) && !self.measuring.contains_key(&id) {
                let next = (pause * 2).min(*ADOPT_SECONDS.end());
                self.tries.insert(id.clone(), (self.now.tick.after_seconds(pause), next));
                self.measuring.insert(id.clone(), self.now.tick);
                let device = id.clone();
                self.spawn(&id, move |on| {
                    let reports = on.reports();
                    Event::Adopted { device, reports, outcome: on.adopt() }
                });
            }
        }
    }

    pub(super) fn adopted(&mut self, device: &DeviceId, outcome: &Result<(), DeviceError>) {
        self.measuring.remove(device);
        match outcome {
            Ok(()) if self.ledger.regain(device) => {
                tracing::info!(%device, "a lost device is back");
                self.tries.remove(device);
                self.emit(EventKind::DeviceReturned, serde_json::json!({ "deviceId": device }));
            }
            Ok(()) => {}
            Err(error) => tracing::debug!(%device, %error, "a lost device is not back"),
        }
    }

    pub(super) fn measure(&mut self) {
        let idle: Vec<_> = self
            .devices
            .iter()
            .map(|device| device.facts().device.clone())
            .filter(|device| !self.measuring.contains_key(device) && !self.ledger.is_lost(device))
            .collect();
        for id in idle {
            self.measuring.insert(id.clone(), self.now.tick);
            let (device, followed) = (id.clone(), self.followed(&id));
            self.spawn(&id, move |on| {
                let reports = on.reports();
                let used_by = || on.used_by(&followed).unwrap_or_default();
                // The less of before and after: what a process gave back meanwhile is free already.
                let before = if followed.is_empty() { BTreeMap::new() } else { used_by() };
                let outcome = on.sample();
                let after = if followed.is_empty() { BTreeMap::new() } else { used_by() };
                let less = |(pid, before): (u32, u64)| Some((pid, before.min(*after.get(&pid)?)));
                let used_by = before.into_iter().filter_map(less).collect();
                Event::Measured { device, reports, used_by, outcome }
            });
        }
    }

    pub(super) fn measured(
        &mut self,
        device: &DeviceId,
        used_by: &BTreeMap<u32, u64>,
        outcome: Result<Sample, DeviceError>,
    ) {
        let began = self.measuring.remove(device).unwrap_or_default();
        match outcome {
            Ok(Sample { used_bytes, available_bytes, held_bytes, ready_bytes }) => {
                let measured = Measured { used_bytes, available_bytes, held_bytes, ready_bytes };
                self.ledger.observe(device, measured);
                self.fill_reservations(device, used_by, began);
                self.samples.insert(device.clone(), self.now.wall);
                self.watch_pressure(device);
                self.measured_since(device, began);
                self.measured_for_relief(device, began);
            }
            Err(error) => {
                self.note_failure(device, Some(&error));
                self.not_measured(device);
            }
        }
        self.admit();
    }

    pub(super) fn note_reports(&mut self, device: &DeviceId, reports: &[Report]) {
        for report in reports {
            tracing::warn!(%device, %report, "the driver reports a fault");
            let Report { kind, code, .. } = report;
            let data = serde_json::json!({
                "deviceId": device, "kind": kind, "code": code, "reason": report.to_string(),
            });
            self.emit(EventKind::DeviceFault, data);
        }
    }

    /// Remembers a device that is lost. Its allocations stay in the books until they are released.
    pub(super) fn note_failure(&mut self, device: &DeviceId, error: Option<&DeviceError>) {
        let Some(error) = error else { return };
        tracing::warn!(%device, error = error as &dyn std::error::Error, "a device call failed");
        if matches!(error, DeviceError::Lost { .. }) && self.ledger.lose(device) {
            self.emit(
                EventKind::DeviceLost,
                serde_json::json!({ "deviceId": device, "reason": error.to_string() }),
            );
        }
    }
}
