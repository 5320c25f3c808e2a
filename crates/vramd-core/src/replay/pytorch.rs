//! PyTorch's memory snapshot: of each device, what its allocator did.
//!
//! A block counts as gone when its free is completed: until then its stream may still use it. Segments are left out:
//! they are the traced allocator's own way to get memory, and the replay has another.

use std::io::BufRead;

use super::pickle::{self, Pickle, Value, Word};
use super::trace::Builder;
use super::{Format, Trace, TraceError};

pub fn read(reader: &mut impl BufRead) -> Result<Trace, TraceError> {
    let pickle = pickle::read(reader)?;
    let mut builder = Builder::default();
    build(&pickle, &mut builder).map_err(TraceError::Content)?;
    Ok(builder.finish(Format::Pytorch, false))
}

fn build(pickle: &Pickle, builder: &mut Builder) -> Result<(), String> {
    let traces = pickle
        .get(pickle.root, Word::DeviceTraces)
        .and_then(|traces| pickle.list(traces))
        .ok_or("it is a pickle without `device_traces`, and so no memory snapshot")?;
    for (ordinal, trace) in traces.iter().enumerate() {
        let entries = pickle.list(*trace).ok_or_else(|| format!("`device_traces[{ordinal}]` is no list"))?;
        if entries.is_empty() {
            continue;
        }
        // One list may stand in it many times: what is read is counted, not only what comes of it.
        builder.read(entries.len())?;
        let device = builder.device(&format!("cuda:{ordinal}"))?;
        for (number, entry) in entries.iter().enumerate() {
            add(pickle, *entry, device, builder)
                .map_err(|problem| format!("`device_traces[{ordinal}][{number}]`: {problem}"))?;
        }
    }
    Ok(())
}

fn add(pickle: &Pickle, entry: Value, device: usize, builder: &mut Builder) -> Result<(), String> {
    let number = |key, name: &str| match pickle.get(entry, key) {
        Some(Value::Int(number)) => {
            u64::try_from(number).map_err(|_| format!("its `{name}` is {number}, below zero"))
        }
        _ => Err(format!("it has no number as its `{name}`")),
    };
    let address = || number(Word::Address, "addr").map(u128::from);
    // Snapshots before PyTorch 2.1 have no times.
    let micros = number(Word::TimeMicros, "time_us").unwrap_or(0);
    match pickle.get(entry, Word::Action) {
        Some(Value::Word(Word::Alloc)) => {
            builder.allocate(device, micros, address()?, number(Word::Size, "size")?)
        }
        Some(Value::Word(Word::FreeCompleted)) => builder.free(device, micros, address()?),
        Some(Value::Word(Word::OutOfMemory)) => builder.failed(device, micros, number(Word::Size, "size")?),
        Some(_) => Ok(()),
        None => Err("it has no `action`".to_owned()),
    }
}
