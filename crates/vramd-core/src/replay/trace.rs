//! The history that every format is turned into: for each device, blocks that come and go.
//!
//! Pointers and ids are resolved here, once: an event names its block by number. What does not fit together (a block
//! freed twice, a pointer that was never given out) is counted and left out.

use std::collections::HashMap;

use serde::Serialize;

use super::Format;

/// More than any history that a person looks at, and a bound on what a file can make of a few bytes.
const MOST_EVENTS: usize = 1 << 25;
const MOST_DEVICES: usize = 256;

#[derive(Debug)]
pub struct Trace {
    pub format: Format,
    pub devices: Vec<DeviceTrace>,
    /// The last line was cut off, as a kill leaves it; it is left out.
    pub torn: bool,
}

#[derive(Debug, Default)]
pub struct DeviceTrace {
    pub name: String,
    pub events: Vec<Event>,
    /// The bytes of each block, as asked for.
    pub blocks: Vec<u64>,
    pub irregularities: Irregularities,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Since the first event of the trace; never less than in the event before.
    pub at_micros: u64,
    pub step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The block with this number, each once.
    Allocate(u32),
    /// A block that was allocated before and not freed since.
    Free(u32),
    /// The traced allocator could not serve so many bytes.
    Failed(u64),
    /// Something is missing here.
    Gap,
}

/// What a trace holds that no sound history would.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Irregularities {
    pub double_frees: u64,
    /// Frees of what was never allocated, or before the trace began.
    pub unknown_frees: u64,
    /// Allocations at a place that was still taken; what was there counts as freed.
    pub overlapping_allocations: u64,
    pub gaps: u64,
    /// Events that are known to be missing.
    pub missed_events: u64,
}

#[derive(Debug, Default)]
pub struct Builder {
    devices: Vec<Building>,
    numbers: HashMap<String, usize>,
    events: usize,
    entries: usize,
    first_micros: Option<u64>,
}

#[derive(Debug, Default)]
struct Building {
    trace: DeviceTrace,
    /// By pointer or id: its last block, and whether that lives.
    known: HashMap<u128, (u32, bool)>,
}

type Result<T> = std::result::Result<T, String>;

impl Builder {
    /// The number of the device with this name.
    pub fn device(&mut self, name: &str) -> Result<usize> {
        if let Some(number) = self.numbers.get(name) {
            return Ok(*number);
        }
        let number = self.devices.len();
        if number == MOST_DEVICES {
            return Err(format!("it has more than {MOST_DEVICES} devices"));
        }
        let trace = DeviceTrace { name: name.to_owned(), ..DeviceTrace::default() };
        self.devices.push(Building { trace, ..Building::default() });
        self.numbers.insert(name.to_owned(), number);
        Ok(number)
    }

    /// So many entries are about to be read.
    pub fn read(&mut self, entries: usize) -> Result<()> {
        self.entries = self.entries.saturating_add(entries);
        if self.entries > MOST_EVENTS {
            return Err(format!("it has more than {MOST_EVENTS} entries"));
        }
        Ok(())
    }

    pub fn allocate(&mut self, device: usize, micros: u64, key: u128, bytes: u64) -> Result<()> {
        let building = &mut self.devices[device];
        let block = building.trace.blocks.len() as u32;
        if let Some((old, true)) = building.known.insert(key, (block, true)) {
            building.trace.irregularities.overlapping_allocations += 1;
            self.push(device, micros, Step::Free(old))?;
        }
        self.devices[device].trace.blocks.push(bytes);
        self.push(device, micros, Step::Allocate(block))
    }

    pub fn free(&mut self, device: usize, micros: u64, key: u128) -> Result<()> {
        let building = &mut self.devices[device];
        match building.known.get_mut(&key) {
            Some((block, live @ true)) => {
                *live = false;
                let block = *block;
                self.push(device, micros, Step::Free(block))
            }
            Some((_, false)) => {
                building.trace.irregularities.double_frees += 1;
                Ok(())
            }
            None => {
                building.trace.irregularities.unknown_frees += 1;
                Ok(())
            }
        }
    }

    pub fn failed(&mut self, device: usize, micros: u64, bytes: u64) -> Result<()> {
        self.push(device, micros, Step::Failed(bytes))
    }

    /// So many events are missing on all devices, if that is known.
    pub fn gap(&mut self, micros: u64, missed: Option<u64>) -> Result<()> {
        for device in 0..self.devices.len() {
            let irregularities = &mut self.devices[device].trace.irregularities;
            irregularities.gaps += 1;
            irregularities.missed_events = irregularities.missed_events.saturating_add(missed.unwrap_or(0));
            self.push(device, micros, Step::Gap)?;
        }
        Ok(())
    }

    pub fn finish(self, format: Format, torn: bool) -> Trace {
        Trace { format, torn, devices: self.devices.into_iter().map(|building| building.trace).collect() }
    }

    fn push(&mut self, device: usize, micros: u64, step: Step) -> Result<()> {
        if self.events == MOST_EVENTS {
            return Err(format!("it has more than {MOST_EVENTS} events"));
        }
        self.events += 1;
        let first = *self.first_micros.get_or_insert(micros);
        let events = &mut self.devices[device].trace.events;
        let before = events.last().map_or(0, |event| event.at_micros);
        events.push(Event { at_micros: micros.saturating_sub(first).max(before), step });
        Ok(())
    }
}
