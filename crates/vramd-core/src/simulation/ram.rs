//! The RAM tier of a simulated machine: what has to go is kept where that pays ([`crate::tiers`]), and comes back from there.

use vramd_api::EvictionPolicy;

use super::run::{Model, Place, Simulator};
use crate::eviction::{self, Candidate};
use crate::tiers::Prospect;

/// Host memory for models that had to go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ram {
    pub free: u64,
    pub bytes_per_second: f64,
}

impl Ram {
    fn copy_seconds(self, model: &Model) -> f64 {
        model.bytes as f64 / self.bytes_per_second
    }
}

impl Simulator {
    /// How long a model takes to come back: from RAM, if that has it and is faster.
    pub(super) fn seconds_to_load(&self, at: usize) -> f64 {
        let model = &self.models[at];
        let from_ram = self.ram.filter(|_| model.is_cached).map(|ram| ram.copy_seconds(model));
        from_ram.map_or(model.load_seconds, |seconds| seconds.min(model.load_seconds))
    }

    /// Keeps a model that has to go in RAM, if that pays and RAM has room, or has it by letting go of what is worth less. Answers how
    /// long those who wait for its place wait for that.
    pub(super) fn keep(&mut self, at: usize) -> f64 {
        let (tick, model) = (self.tick(), &self.models[at]);
        let Some(ram) = self.ram.filter(|_| !model.is_cached) else { return 0.0 };
        let seconds = ram.copy_seconds(model);
        let idle = self.now - model.last_used;
        let prospect = Prospect {
            uses_per_second: model.popularity.uses_per_second(tick),
            kept_seconds: model.keep.map_or(f64::INFINITY, |keep| (keep - idle).max(0.0)),
            read_seconds: model.load_seconds,
            return_seconds: seconds,
            leave_seconds: seconds,
        };
        if !prospect.pays() {
            return 0.0;
        }
        let (bytes, worth) = (model.bytes, self.cached(at).loss());
        if bytes > ram.free {
            let others: Vec<usize> = (0..self.models.len()).filter(|one| self.may_leave_ram(*one)).collect();
            let candidates: Vec<Candidate> = others.iter().map(|one| self.cached(*one)).collect();
            let chosen = eviction::choose(&candidates, bytes - ram.free, EvictionPolicy::LowestCost);
            let lost = |chosen: &Vec<usize>| chosen.iter().map(|one| candidates[*one].loss()).sum::<f64>();
            let Some(chosen) = chosen.filter(|chosen| lost(chosen) < worth) else { return 0.0 };
            for one in chosen {
                self.forget(others[one]);
            }
        }
        self.models[at].is_cached = true;
        if let Some(ram) = &mut self.ram {
            ram.free -= bytes;
        }
        seconds
    }

    /// RAM lets go of a model, if it has it.
    pub(super) fn forget(&mut self, at: usize) {
        let model = &mut self.models[at];
        if let Some(ram) = self.ram.as_mut().filter(|_| std::mem::take(&mut model.is_cached)) {
            ram.free += model.bytes;
        }
    }

    /// It is there, and nobody is copying from it.
    fn may_leave_ram(&self, at: usize) -> bool {
        let model = &self.models[at];
        model.is_cached && !matches!(model.place, Place::Loading(_))
    }

    /// What its place in RAM is worth: the seconds that it saves. A model that is on its device needs none until it has to go.
    fn cached(&self, at: usize) -> Candidate {
        let model = &self.models[at];
        let saves = self.ram.map_or(0.0, |ram| (model.load_seconds - ram.copy_seconds(model)).max(0.0));
        let is_there = model.is_cached && matches!(model.place, Place::Resident(_));
        Candidate {
            bytes: model.bytes,
            priority: model.priority,
            idle_seconds: self.now - model.last_used,
            uses_per_second: model.popularity.uses_per_second(self.tick()),
            reload_seconds: if is_there { 0.0 } else { saves },
        }
    }
}
