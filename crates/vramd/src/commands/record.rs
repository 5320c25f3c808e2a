//! `vramd record`: what is allocated and released, as a trace.
//!
//! The stream is opened before the state is read, and ids that are known or unknown already say what came twice. Each
//! line is written whole and at once, so that a kill loses no more than the last. Where events were lost, the
//! trace has a gap, and what changed meanwhile follows from the state.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use vramd_api::client::{AllocationFilter, Client};
use vramd_api::{AllocationId, AllocationStatus, Event, EventKind};
use vramd_core::replay::recorded::{FORMAT, Header, Record, VERSION};

use crate::arguments::RecordArguments;
use crate::error::CommandError;
use crate::output::Output;
use crate::system::interrupts;

pub async fn record(client: &Client, arguments: RecordArguments, output: Output) -> Result<(), CommandError> {
    let mut interrupts = interrupts()?;
    // A name of the device in events is its id, whatever was typed.
    let device = match &arguments.device {
        Some(device) => Some(client.device(device).await?.device_id.to_string()),
        None => None,
    };
    let mut events = pin!(client.events(None).await?);
    let mut recording = Recording {
        client,
        device,
        started_at: Timestamp::now(),
        out: open(arguments.out.as_deref())?,
        live: BTreeMap::new(),
        counts: Counts::default(),
    };
    recording.begin().await?;
    output.say("recording; Ctrl-C ends it");
    let mut end = pin!(async {
        match arguments.seconds {
            Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
            None => std::future::pending().await,
        }
    });
    let result = loop {
        tokio::select! {
            () = &mut end => break Ok(()),
            _ = interrupts.recv() => break Ok(()),
            event = events.next() => match event {
                Some(Ok(event)) if event.event == EventKind::DaemonStopping => break Ok(()),
                Some(Ok(event)) => recording.take(&event).await?,
                Some(Err(error)) => break Err(error.into()),
                None => break Err(CommandError::Fault("the daemon ended the stream of events".to_owned())),
            },
        }
    };
    match &result {
        Ok(()) => recording.write(&Record::End { ms: recording.ms(Timestamp::now()) })?,
        Err(_) => recording.gap(Timestamp::now(), None)?,
    }
    let Counts { allocated, freed, gaps } = recording.counts;
    output.say(&format!("recorded {allocated} allocations, {freed} frees, {gaps} gaps"));
    result
}

fn open(path: Option<&Path>) -> Result<Box<dyn Write>, CommandError> {
    let Some(path) = path else { return Ok(Box::new(io::stdout())) };
    match File::create_new(path) {
        Ok(file) => Ok(Box::new(file)),
        Err(error) => Err(CommandError::Usage {
            message: format!("{} could not be made: {error}", path.display()),
            hint: "name a file that does not exist yet, in a directory that you may write to".to_owned(),
        }),
    }
}

#[derive(Default)]
struct Counts {
    allocated: u64,
    freed: u64,
    gaps: u64,
}

#[derive(Debug, Clone, PartialEq)]
struct Live {
    device: String,
    owner: String,
    purpose: String,
}

struct Recording<'a> {
    client: &'a Client,
    /// Only this one.
    device: Option<String>,
    started_at: Timestamp,
    out: Box<dyn Write>,
    /// What the trace says is allocated.
    live: BTreeMap<AllocationId, Live>,
    counts: Counts,
}

impl Recording<'_> {
    async fn begin(&mut self) -> Result<(), CommandError> {
        let header = Header { format: FORMAT.to_owned(), version: VERSION, started_at: self.started_at };
        self.write(&header)?;
        self.read_state(self.started_at).await
    }

    async fn take(&mut self, event: &Event) -> Result<(), CommandError> {
        let (at, data) = (event.at, &event.data);
        match event.event {
            // Room for what others allocate is no memory of the daemon's.
            EventKind::AllocationCreated if data["isReservation"] == true => Ok(()),
            EventKind::AllocationCreated => {
                let (id, bytes) = (id(data)?, number(data, "sizeBytes")?);
                let text = |name| text(data, name).map(str::to_owned);
                let live =
                    Live { device: text("deviceId")?, owner: text("owner")?, purpose: text("purpose")? };
                self.allocate(at, id, bytes, live)
            }
            EventKind::AllocationReleased => self.free(at, id(data)?),
            EventKind::AllocationMoved => {
                let (id, device) = (id(data)?, text(data, "deviceId")?.to_owned());
                // What came from a device that is not recorded has no labels: the event names none.
                let before = self.live.get(&id).cloned();
                if before.as_ref().is_some_and(|before| before.device == device) {
                    return Ok(());
                }
                let (owner, purpose) = before.map(|live| (live.owner, live.purpose)).unwrap_or_default();
                self.free(at, id)?;
                self.allocate(at, id, number(data, "sizeBytes")?, Live { device, owner, purpose })
            }
            EventKind::Lag => {
                self.gap(at, data.get("missed").and_then(Value::as_u64))?;
                self.read_state(at).await
            }
            EventKind::Reset => {
                self.gap(at, None)?;
                self.read_state(at).await
            }
            _ => Ok(()),
        }
    }

    /// Writes what differs between the trace and the daemon.
    async fn read_state(&mut self, at: Timestamp) -> Result<(), CommandError> {
        let now = self.client.all_allocations(self.device.as_deref(), AllocationFilter::default()).await?;
        let there: BTreeSet<_> = now.iter().map(|allocation| allocation.allocation_id).collect();
        let gone: Vec<_> = self.live.keys().filter(|id| !there.contains(*id)).copied().collect();
        for id in gone {
            self.free(at, id)?;
        }
        for allocation in now {
            let is_none = allocation.place_of.is_some() || allocation.reservation.is_some();
            if allocation.status == AllocationStatus::Releasing || is_none {
                continue;
            }
            let live = Live {
                device: allocation.device_id.to_string(),
                owner: allocation.owner.to_string(),
                purpose: allocation.purpose,
            };
            self.allocate(at, allocation.allocation_id, allocation.size_bytes, live)?;
        }
        Ok(())
    }

    fn allocate(
        &mut self,
        at: Timestamp,
        id: AllocationId,
        bytes: u64,
        live: Live,
    ) -> Result<(), CommandError> {
        let known = self.live.get(&id).is_some_and(|known| known.device == live.device);
        if known || self.device.as_ref().is_some_and(|only| *only != live.device) {
            return Ok(());
        }
        // It has moved in a gap.
        self.free(at, id)?;
        self.live.insert(id, live.clone());
        self.counts.allocated += 1;
        let Live { device, owner, purpose } = live;
        self.write(&Record::Allocate { ms: self.ms(at), id, device, bytes, owner, purpose })
    }

    fn free(&mut self, at: Timestamp, id: AllocationId) -> Result<(), CommandError> {
        let Some(Live { device, .. }) = self.live.remove(&id) else { return Ok(()) };
        self.counts.freed += 1;
        self.write(&Record::Free { ms: self.ms(at), id, device })
    }

    fn gap(&mut self, at: Timestamp, missed: Option<u64>) -> Result<(), CommandError> {
        self.counts.gaps += 1;
        self.write(&Record::Gap { ms: self.ms(at), missed })
    }

    fn ms(&self, at: Timestamp) -> f64 {
        let micros = at.duration_since(self.started_at).as_micros().max(0);
        micros as f64 / 1000.0
    }

    fn write(&mut self, record: &impl Serialize) -> Result<(), CommandError> {
        let mut line = serde_json::to_vec(record).map_err(io::Error::from)?;
        line.push(b'\n');
        self.out.write_all(&line)?;
        Ok(self.out.flush()?)
    }
}

fn id(data: &Value) -> Result<AllocationId, CommandError> {
    text(data, "allocationId")?.parse().map_err(|_| unreadable("allocationId"))
}

fn text<'a>(data: &'a Value, name: &str) -> Result<&'a str, CommandError> {
    data.get(name).and_then(Value::as_str).ok_or_else(|| unreadable(name))
}

fn number(data: &Value, name: &str) -> Result<u64, CommandError> {
    data.get(name).and_then(Value::as_u64).ok_or_else(|| unreadable(name))
}

fn unreadable(name: &str) -> CommandError {
    CommandError::Fault(format!("an event of the daemon has no readable `{name}`"))
}
