//! One policy over one trace, event by event.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};

use vramd_api::{EvictionPolicy, KeepAlive, Priority};

use super::ram::Ram;
use super::{Machine, Report, Request, Waits};
use crate::Tick;
use crate::eviction::{self, Candidate, Popularity};
use crate::trial::{Trial, Use};

/// When a model was on a device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    pub model: usize,
    pub device: usize,
    pub from: f64,
    pub to: f64,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    pub report: Report,
    pub intervals: Vec<Interval>,
    /// When the last request was done.
    pub end: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// A request is done with its model.
    Done(usize),
    Loaded(usize),
    /// A model may have been idle for as long as it is kept.
    Expires(usize),
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Event {
    time: f64,
    what: What,
}

impl Eq for Event {}

impl Ord for Event {
    fn cmp(&self, other: &Self) -> Ordering {
        self.time.total_cmp(&other.time).then(self.what.cmp(&other.what))
    }
}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Place {
    OnDisk,
    /// It waits for room.
    Waiting,
    Loading(usize),
    Resident(usize),
}

#[derive(Debug)]
pub(super) struct Model {
    pub bytes: u64,
    /// From its files.
    pub load_seconds: f64,
    pub priority: Priority,
    pub keep: Option<f64>,
    pub place: Place,
    /// RAM has it.
    pub is_cached: bool,
    /// Since it is on its device.
    since: f64,
    pub last_used: f64,
    pub popularity: Popularity,
    /// The requests that use it now.
    busy: usize,
    /// Those that wait for it: when they came, and how long they take.
    waiting: Vec<(f64, f64)>,
}

pub(super) struct Simulator {
    pub now: f64,
    policy: EvictionPolicy,
    events: BinaryHeap<Reverse<Event>>,
    pub models: Vec<Model>,
    pub ram: Option<Ram>,
    /// What is free, and of how much.
    devices: Vec<(u64, u64)>,
    residents: Vec<Vec<usize>>,
    trials: Vec<Trial<usize>>,
    queue: BTreeMap<(Reverse<Priority>, u64), usize>,
    queued: u64,
    waits: Vec<f64>,
    hits: u64,
    loads: u64,
    from_ram: u64,
    loaded_bytes: u64,
    load_seconds: f64,
    evictions: u64,
    intervals: Vec<Interval>,
    /// When the last request so far was done.
    done_at: f64,
}

/// Serves `trace`, which is in order of time and names models of the machine.
pub fn run(machine: &Machine, trace: &[Request], policy: EvictionPolicy) -> Run {
    let model = |model: &super::Model| Model {
        bytes: model.bytes.get(),
        load_seconds: machine.load_seconds(model),
        priority: model.priority,
        keep: match model.keep_alive {
            KeepAlive::Seconds(seconds) => Some(seconds as f64),
            KeepAlive::Forever => None,
        },
        place: Place::OnDisk,
        is_cached: false,
        since: 0.0,
        last_used: 0.0,
        popularity: Popularity::default(),
        busy: 0,
        waiting: Vec::new(),
    };
    let mut simulator = Simulator {
        now: 0.0,
        policy,
        events: BinaryHeap::new(),
        models: machine.models.iter().map(model).collect(),
        ram: machine
            .ram
            .as_ref()
            .map(|ram| Ram { free: ram.bytes.get(), bytes_per_second: ram.bytes_per_second.get() as f64 }),
        devices: machine.devices.iter().map(|device| (device.bytes.get(), device.bytes.get())).collect(),
        residents: vec![Vec::new(); machine.devices.len()],
        trials: vec![Trial::default(); machine.devices.len()],
        queue: BTreeMap::new(),
        queued: 0,
        waits: Vec::with_capacity(trace.len()),
        hits: 0,
        loads: 0,
        from_ram: 0,
        loaded_bytes: 0,
        load_seconds: 0.0,
        evictions: 0,
        intervals: Vec::new(),
        done_at: 0.0,
    };
    for request in trace {
        simulator.advance(request.time);
        simulator.now = request.time;
        simulator.arrive(request);
    }
    simulator.advance(f64::INFINITY);
    simulator.finish(trace.len() as u64)
}

impl Simulator {
    /// Lets happen what is due until then, requests that come at that very time not yet among it.
    fn advance(&mut self, until: f64) {
        while let Some(Reverse(event)) = self.events.peek().copied() {
            if event.time > until {
                return;
            }
            self.events.pop();
            self.now = event.time;
            match event.what {
                What::Done(model) => self.done(model),
                What::Loaded(model) => self.loaded(model),
                What::Expires(model) => self.expire(model),
            }
        }
    }

    pub(super) fn tick(&self) -> Tick {
        Tick((self.now * 1000.0) as u64)
    }

    fn at(&mut self, time: f64, what: What) {
        self.events.push(Reverse(Event { time, what }));
    }

    fn arrive(&mut self, request: &Request) {
        let (now, tick) = (self.now, self.tick());
        let model = &mut self.models[request.model];
        model.popularity.record(tick);
        model.last_used = now;
        match model.place {
            Place::Resident(device) => {
                self.hits += 1;
                self.try_policies(request.model, device);
                self.start(request.model, now, request.seconds);
            }
            Place::Loading(_) | Place::Waiting => model.waiting.push((now, request.seconds)),
            Place::OnDisk => {
                model.waiting.push((now, request.seconds));
                model.place = Place::Waiting;
                let key = (Reverse(model.priority), self.queued);
                self.queued += 1;
                self.queue.insert(key, request.model);
                self.admit();
            }
        }
    }

    fn try_policies(&mut self, at: usize, device: usize) {
        let (model, tick) = (&self.models[at], self.tick());
        let used = Use { bytes: model.bytes, load_seconds: model.load_seconds, priority: model.priority };
        self.trials[device].used(&at, used, self.devices[device].1, tick);
    }

    fn start(&mut self, at: usize, came: f64, seconds: f64) {
        self.waits.push(self.now - came);
        self.models[at].busy += 1;
        self.at(self.now + seconds, What::Done(at));
    }

    fn done(&mut self, at: usize) {
        let now = self.now;
        let model = &mut self.models[at];
        self.done_at = now;
        model.busy -= 1;
        model.last_used = now;
        if model.busy > 0 {
            return;
        }
        if let Some(keep) = model.keep {
            self.at(now + keep, What::Expires(at));
        }
        self.admit();
    }

    fn expire(&mut self, at: usize) {
        let model = &self.models[at];
        let idle = model.busy == 0 && model.keep.is_some_and(|keep| model.last_used + keep <= self.now);
        match model.place {
            Place::Resident(device) if idle => {
                self.forget(at);
                self.unload(at, device);
                self.admit();
            }
            Place::OnDisk if idle => self.forget(at),
            _ => {}
        }
    }

    fn loaded(&mut self, at: usize) {
        let now = self.now;
        let model = &mut self.models[at];
        let Place::Loading(device) = model.place else { return };
        model.place = Place::Resident(device);
        model.since = now;
        for (came, seconds) in std::mem::take(&mut model.waiting) {
            self.start(at, came, seconds);
        }
        self.residents[device].push(at);
    }

    /// Gives those who wait their room, in order, until one cannot have it.
    fn admit(&mut self) {
        while let Some((key, at)) = self.queue.first_key_value().map(|(key, at)| (*key, *at)) {
            let Some((device, made_in)) = self.room(at) else { return };
            self.queue.remove(&key);
            let seconds = self.seconds_to_load(at);
            let model = &mut self.models[at];
            model.place = Place::Loading(device);
            let bytes = model.bytes;
            self.from_ram += u64::from(seconds < model.load_seconds);
            self.try_policies(at, device);
            self.devices[device].0 -= bytes;
            self.loads += 1;
            self.loaded_bytes += bytes;
            self.load_seconds += seconds;
            self.at(self.now + made_in + seconds, What::Loaded(at));
        }
    }

    /// A device with room for a model, which idle ones may go for, and how long it takes to bring these to RAM.
    fn room(&mut self, at: usize) -> Option<(usize, f64)> {
        let bytes = self.models[at].bytes;
        let fits = (0..self.devices.len()).filter(|device| self.devices[*device].0 >= bytes);
        let emptiest = |device: &usize| {
            let (free, of) = self.devices[*device];
            ((free - bytes) as f64 / of as f64, Reverse(*device))
        };
        let best = fits.max_by(|a, b| {
            let (one, other) = (emptiest(a), emptiest(b));
            one.0.total_cmp(&other.0).then(one.1.cmp(&other.1))
        });
        if let Some(device) = best {
            return Some((device, 0.0));
        }
        let tick = self.tick();
        let mut cheapest: Option<(f64, usize, Vec<usize>)> = None;
        for device in 0..self.devices.len() {
            let (free, of) = self.devices[device];
            if of < bytes {
                continue;
            }
            let (mut idle, mut candidates) = (Vec::new(), Vec::new());
            for other in self.residents[device].iter().copied() {
                let model = &self.models[other];
                if model.busy > 0 || model.priority > self.models[at].priority {
                    continue;
                }
                idle.push(other);
                candidates.push(Candidate {
                    bytes: model.bytes,
                    priority: model.priority,
                    idle_seconds: self.now - model.last_used,
                    uses_per_second: model.popularity.uses_per_second(tick),
                    reload_seconds: self.seconds_to_load(other),
                });
            }
            let policy = match self.policy {
                EvictionPolicy::LowestCost => self.trials[device].better(),
                other => other,
            };
            let Some(chosen) = eviction::choose(&candidates, bytes - free, policy) else { continue };
            let loss = chosen.iter().map(|one| candidates[*one].loss()).sum();
            if cheapest.as_ref().is_none_or(|(least, ..)| loss < *least) {
                cheapest = Some((loss, device, chosen.into_iter().map(|one| idle[one]).collect()));
            }
        }
        let (_, device, chosen) = cheapest?;
        let mut made_in = 0.0;
        for other in chosen {
            self.evictions += 1;
            made_in += self.keep(other);
            self.unload(other, device);
        }
        Some((device, made_in))
    }

    fn unload(&mut self, at: usize, device: usize) {
        let model = &mut self.models[at];
        model.place = Place::OnDisk;
        self.devices[device].0 += model.bytes;
        self.residents[device].retain(|other| *other != at);
        self.intervals.push(Interval { model: at, device, from: model.since, to: self.now });
    }

    fn finish(mut self, requests: u64) -> Run {
        let (end, served) = (self.done_at, self.waits.len() as u64);
        self.now = self.now.min(end);
        for at in 0..self.models.len() {
            if let Place::Resident(device) = self.models[at].place {
                self.unload(at, device);
            }
        }
        let waits = &mut self.waits;
        waits.sort_unstable_by(f64::total_cmp);
        let quantile = |share: f64| {
            let at = (share * (waits.len() as f64 - 1.0)).round() as usize;
            waits.get(at).copied().unwrap_or(0.0)
        };
        let waits = Waits {
            mean_seconds: waits.iter().sum::<f64>() / waits.len().max(1) as f64,
            p50_seconds: quantile(0.5),
            p99_seconds: quantile(0.99),
            max_seconds: quantile(1.0),
        };
        let report = Report {
            policy: self.policy,
            requests,
            unserved: requests - served,
            hit_rate: self.hits as f64 / requests.max(1) as f64,
            loads: self.loads,
            from_ram: self.from_ram,
            evictions: self.evictions,
            loaded_bytes: self.loaded_bytes,
            load_seconds: self.load_seconds,
            waits,
        };
        Run { report, intervals: self.intervals, end }
    }
}
