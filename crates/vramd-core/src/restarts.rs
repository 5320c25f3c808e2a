//! When a worker that has ended is started again: after pauses that double, and no more once it has ended too often.

use vramd_api::{RestartPolicy, WorkerState};

use crate::Tick;

/// The first pause, in milliseconds.
const FIRST_PAUSE: u64 = 500;
const LONGEST_PAUSE: u64 = 30_000;
/// Who was ready for so many seconds has got over what was wrong.
const STEADY_SECONDS: u64 = 60;
/// So many ends in a row, none of them after a steady time, are a crash loop.
pub const MOST_ENDS: u32 = 5;

/// How often a worker ended in a row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restarts {
    ends: u32,
}

/// What becomes of a worker that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    StartAt(Tick),
    /// That is its state from now on.
    Stay(WorkerState),
}

impl Restarts {
    /// Decides after an end at `now`, of a worker that became ready at `ready`, if it did, and ended `well` or not.
    pub fn after_end(&mut self, policy: RestartPolicy, ready: Option<Tick>, well: bool, now: Tick) -> Next {
        // Who never was ready was of no use, whatever it says.
        let well = well && ready.is_some();
        let again = match policy {
            RestartPolicy::Never => false,
            RestartPolicy::OnFailure => !well,
            RestartPolicy::Always => true,
        };
        if !again {
            return Next::Stay(WorkerState::Exited);
        }
        if ready.is_some_and(|ready| ready.after_seconds(STEADY_SECONDS) <= now) {
            self.ends = 0;
        }
        self.ends += 1;
        if self.ends >= MOST_ENDS {
            return Next::Stay(WorkerState::Failed);
        }
        let pause = (FIRST_PAUSE << (self.ends - 1)).min(LONGEST_PAUSE);
        Next::StartAt(Tick(now.0 + pause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_ends_at_once_again_and_again_is_given_up() {
        let mut restarts = Restarts::default();
        let mut now = Tick(0);
        let mut pauses = Vec::new();
        while let Next::StartAt(at) = restarts.after_end(RestartPolicy::OnFailure, None, true, now) {
            pauses.push(at.0 - now.0);
            now = at;
        }
        assert_eq!(pauses, [500, 1000, 2000, 4000]);
    }

    #[test]
    fn who_was_steady_begins_anew() {
        let mut restarts = Restarts::default();
        for _ in 0..100 {
            let next = restarts.after_end(RestartPolicy::Always, Some(Tick(0)), false, Tick(60_000));
            assert_eq!(next, Next::StartAt(Tick(60_500)));
        }
    }

    #[test]
    fn who_ended_well_stays_ended_unless_it_is_always_to_run() {
        let after = |policy| Restarts::default().after_end(policy, Some(Tick(0)), true, Tick(5));
        assert_eq!(after(RestartPolicy::OnFailure), Next::Stay(WorkerState::Exited));
        assert_eq!(after(RestartPolicy::Never), Next::Stay(WorkerState::Exited));
        assert_eq!(after(RestartPolicy::Always), Next::StartAt(Tick(505)));
    }
}
