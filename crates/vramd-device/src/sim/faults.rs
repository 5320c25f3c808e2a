//! Faults on demand: what a test tells a simulated device to do wrong.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{Call, DeviceError, Process};

/// `EIO`, which drivers answer when the hardware did not.
const EIO: i32 = 5;

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The call is refused as on a full device.
    OutOfMemory,
    /// The driver fails with `EIO`.
    Native,
    /// The disk fails with `EIO` under a read of a file.
    Disk,
    /// The device is lost by this call.
    Lost,
}

/// The switchboard of one simulated device. Clones are the same switchboard.
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lost: Option<String>,
    back: bool,
    planned: Vec<Planned>,
    holds: HashMap<Call, Hold>,
    foreign_bytes: u64,
    processes: BTreeMap<u32, u64>,
}

#[derive(Debug)]
struct Planned {
    call: Call,
    /// How many calls of this kind still succeed before it.
    after: u32,
    fault: Fault,
}

#[derive(Debug, Default)]
struct Hold {
    /// How many guards hold the calls.
    guards: usize,
    /// How many calls are held.
    caught: usize,
}

impl Faults {
    /// Lets `after` calls of this kind succeed and fails the one that follows, once.
    pub fn fail(&self, call: Call, after: u32, fault: Fault) {
        self.state().planned.push(Planned { call, after, fault });
    }

    /// Loses the device: from now on every call but `destroy` fails, those under way included where they notice.
    pub fn lose(&self, reason: &str) {
        let mut state = self.state();
        state.back = false;
        state.lost.get_or_insert_with(|| reason.to_owned());
    }

    /// Ends the loss: the device can be adopted again.
    pub fn come_back(&self) {
        self.state().back = true;
    }

    pub(super) fn adopt(&self) -> Result<(), DeviceError> {
        let mut state = self.state();
        if state.back {
            state.lost = None;
        }
        state.check_lost()
    }

    /// Stops every call of this kind at its start until the guard is dropped.
    #[must_use = "calls are held for as long as the guard lives"]
    pub fn hold(&self, call: Call) -> Held {
        self.state().hold(call).guards += 1;
        Held { faults: self.clone(), call }
    }

    /// Has other processes hold that much of the device. What is created already stays, even beyond the total.
    pub fn set_foreign_bytes(&self, bytes: u64) {
        self.state().foreign_bytes = bytes;
    }

    /// Has a process hold that much of the device, beside those of [`set_foreign_bytes`](Self::set_foreign_bytes).
    pub fn set_process_bytes(&self, pid: u32, bytes: u64) {
        self.state().processes.insert(pid, bytes);
    }

    pub(super) fn foreign_bytes(&self) -> u64 {
        let state = self.state();
        state.processes.values().fold(state.foreign_bytes, |sum, bytes| sum.saturating_add(*bytes))
    }

    pub(super) fn processes(&self) -> Vec<Process> {
        let shown = |(pid, bytes): (&u32, &u64)| Process { pid: *pid, used_bytes: Some(*bytes) };
        self.state().processes.iter().map(shown).collect()
    }

    /// What happens to a call that begins now: it may wait, go through or fail. An injected refusal names
    /// `requested` bytes.
    pub(super) fn enter(&self, call: Call, requested: u64) -> Result<(), DeviceError> {
        let mut state = self.state();
        if state.hold(call).guards > 0 {
            state.hold(call).caught += 1;
            self.0.changed.notify_all();
            state = self
                .0
                .changed
                .wait_while(state, |state| state.hold(call).guards > 0)
                .unwrap_or_else(PoisonError::into_inner);
            state.hold(call).caught -= 1;
        }
        state.check_lost()?;
        match state.due(call) {
            None => Ok(()),
            Some(Fault::OutOfMemory) => Err(DeviceError::OutOfMemory { requested, available: 0 }),
            Some(Fault::Native) => Err(DeviceError::Native {
                call,
                native: "a simulated driver call",
                source: io::Error::from_raw_os_error(EIO),
            }),
            Some(Fault::Disk) => Err(DeviceError::Source(io::Error::from_raw_os_error(EIO))),
            Some(Fault::Lost) => {
                state.lost = Some(format!("lost on demand in {call:?}"));
                state.check_lost()
            }
        }
    }

    /// Whether the device was lost while a call was under way.
    pub(super) fn check_lost(&self) -> Result<(), DeviceError> {
        self.state().check_lost()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn check_lost(&self) -> Result<(), DeviceError> {
        self.lost.as_ref().map_or(Ok(()), |reason| Err(DeviceError::Lost { reason: reason.clone() }))
    }

    fn hold(&mut self, call: Call) -> &mut Hold {
        self.holds.entry(call).or_default()
    }

    /// Counts one call of a kind and takes out the fault that is due with it.
    fn due(&mut self, call: Call) -> Option<Fault> {
        let due = self.planned.iter().position(|planned| planned.call == call && planned.after == 0);
        for planned in self.planned.iter_mut().filter(|planned| planned.call == call) {
            planned.after = planned.after.saturating_sub(1);
        }
        due.map(|index| self.planned.remove(index).fault)
    }
}

/// Holds calls of one kind back; dropped, it lets them go on.
#[derive(Debug)]
pub struct Held {
    faults: Faults,
    call: Call,
}

impl Held {
    /// Waits until `count` calls are held at once. False when that did not happen in time.
    pub fn wait_until_caught(&self, count: usize, timeout: Duration) -> bool {
        let (_state, waited) = self
            .faults
            .0
            .changed
            .wait_timeout_while(self.faults.state(), timeout, |state| state.hold(self.call).caught < count)
            .unwrap_or_else(PoisonError::into_inner);
        !waited.timed_out()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.faults.state().hold(self.call).guards -= 1;
        self.faults.0.changed.notify_all();
    }
}
