//! Pages made ahead: one memory file whose pages are there before anybody needs them.
//!
//! A thread makes it while no segment was made for a while, and gives it back when other programs are short of memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::host::Host;
use crate::segment::{Ahead, Backing};
use crate::{Call, DeviceError};

/// What is made between two looks at who wants it and what the machine has.
const STEP_BYTES: u64 = 16 << 20;
/// Loads have the machine for themselves, and this long after.
const PAUSE: Duration = Duration::from_secs(2);
/// How often the machine is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// The share of the machine that is left to other programs.
const LEFT: u64 = 10;

#[derive(Debug)]
pub(super) struct Reserve {
    host: Host,
    bytes: u64,
    backing: Backing,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    ahead: Option<Ahead>,
    /// Nothing is made before.
    not_before: Instant,
}

impl Reserve {
    /// Begins to make `bytes`, on a thread that ends with what this answers.
    pub(super) fn start(host: Host, bytes: u64, backing: Backing) -> Result<Arc<Self>, DeviceError> {
        let state = State { ahead: None, not_before: Instant::now() };
        let reserve = Arc::new(Self { host, bytes, backing, state: Mutex::new(state) });
        let weak = Arc::downgrade(&reserve);
        let thread = std::thread::Builder::new().name("vramd-pages".to_owned());
        let started = thread.spawn(move || run(&weak));
        started.map(|_| reserve).map_err(|source| DeviceError::Native {
            call: Call::Create,
            native: "pthread_create",
            source,
        })
    }

    /// What has its pages.
    pub(super) fn populated(&self) -> u64 {
        self.state().ahead.as_ref().map_or(0, Ahead::populated)
    }

    /// All that is ready; more is made once it is quiet.
    pub(super) fn take(&self) -> Option<Ahead> {
        let mut state = self.state();
        state.not_before = Instant::now() + PAUSE;
        state.ahead.take().filter(|ahead| ahead.populated() > 0)
    }

    /// Something is read into memory: nothing is made beside it.
    pub(super) fn rest(&self) {
        self.state().not_before = Instant::now() + PAUSE;
    }

    /// Makes some, or gives it back; answers how long to rest.
    fn step(&self) -> Duration {
        let Ok(free) = self.host.free_bytes() else { return LOOK };
        let left = (self.host.total_bytes() / LEFT).max(2 * self.host.headroom_bytes());
        let mut state = self.state();
        let now = Instant::now();
        if free < left {
            let goes = state.ahead.take();
            state.not_before = now + 10 * LOOK;
            drop(state);
            // Takes a while, in which others may look.
            drop(goes);
            return 10 * LOOK;
        }
        if state.not_before > now {
            return state.not_before - now;
        }
        let ahead = match &mut state.ahead {
            Some(ahead) if ahead.is_complete() => return LOOK,
            Some(ahead) => ahead,
            none => match Ahead::create("vramd pages ahead", self.bytes, self.backing) {
                Ok(made) => none.insert(made),
                Err(failed) => {
                    tracing::warn!(native = failed.native, error = %failed.source, "no pages are made ahead");
                    return 60 * LOOK;
                }
            },
        };
        if free < left + STEP_BYTES || ahead.populate_next(STEP_BYTES).is_err() {
            return LOOK;
        }
        Duration::ZERO
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn run(reserve: &Weak<Reserve>) {
    while let Some(reserve) = reserve.upgrade() {
        let rest = reserve.step();
        // Not held while it rests, or the device would never go.
        drop(reserve);
        if rest > Duration::ZERO {
            std::thread::park_timeout(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const MIB: u64 = 1 << 20;

    /// A machine of 1 GiB with that much free.
    fn machine(free: u64) -> (tempfile::TempDir, Arc<Reserve>) {
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir(tree.path().join("proc")).unwrap();
        set_free(&tree, free);
        let host = Host::at(tree.path()).unwrap();
        let state = State { ahead: None, not_before: Instant::now() };
        let (bytes, backing, state) = (40 * MIB, Backing::SmallPages, Mutex::new(state));
        let reserve = Arc::new(Reserve { host, bytes, backing, state });
        (tree, reserve)
    }

    fn set_free(tree: &tempfile::TempDir, free: u64) {
        let meminfo = format!("MemTotal: 1048576 kB\nMemAvailable: {} kB\n", free >> 10);
        fs::write(tree.path().join("proc/meminfo"), meminfo).unwrap();
    }

    #[test]
    fn pages_are_made_ahead_step_by_step_and_taken_whole() {
        let (_tree, reserve) = machine(900 * MIB);
        for made in [16, 32, 40] {
            assert_eq!(reserve.step(), Duration::ZERO);
            assert_eq!(reserve.populated(), made * MIB);
        }
        assert_eq!(reserve.step(), LOOK);
        assert_eq!(reserve.take().map(|ahead| ahead.populated()), Some(40 * MIB));
        // Whoever took it loads first.
        assert!(reserve.step() > Duration::ZERO);
        assert_eq!((reserve.populated(), reserve.take().is_none()), (0, true));
    }

    #[test]
    fn it_goes_when_others_need_the_memory() {
        let (tree, reserve) = machine(900 * MIB);
        reserve.step();
        set_free(&tree, 80 * MIB);
        assert!(reserve.step() > LOOK);
        assert_eq!(reserve.populated(), 0);
    }
}
