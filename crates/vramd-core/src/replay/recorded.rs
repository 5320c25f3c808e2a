//! What `vramd record` writes: JSON lines, a header and then events.

use std::io::BufRead;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vramd_api::AllocationId;

use super::trace::Builder;
use super::{Format, Trace, TraceError, lines};

pub const FORMAT: &str = "vramd-trace";
pub const VERSION: u32 = 1;

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Header {
    pub format: String,
    pub version: u32,
    pub started_at: Timestamp,
}

/// Every further line.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "camelCase")]
pub enum Record {
    /// Bytes as asked for. What lived already when the recording began comes first, at 0 ms.
    Allocate {
        ms: f64,
        id: AllocationId,
        device: String,
        bytes: u64,
        owner: String,
        purpose: String,
    },
    Free {
        ms: f64,
        id: AllocationId,
        device: String,
    },
    /// Events were lost; what changed meanwhile follows, without its order and times.
    Gap {
        ms: f64,
        missed: Option<u64>,
    },
    /// The recording ended as it should.
    End {
        ms: f64,
    },
}

pub fn read(reader: &mut impl BufRead) -> Result<Trace, TraceError> {
    let mut builder = Builder::default();
    let torn = lines::each(reader, |line, text| {
        if line == 1 {
            return header(text);
        }
        match serde_json::from_str(text).map_err(|error| error.to_string())? {
            Record::Allocate { ms, id, device, bytes, .. } => {
                let device = builder.device(&device)?;
                builder.allocate(device, micros(ms)?, id.0.as_u128(), bytes)
            }
            Record::Free { ms, id, device } => {
                let device = builder.device(&device)?;
                builder.free(device, micros(ms)?, id.0.as_u128())
            }
            Record::Gap { ms, missed } => builder.gap(micros(ms)?, missed),
            Record::End { .. } => Ok(()),
        }
    })?;
    Ok(builder.finish(Format::Vramd, torn))
}

fn header(text: &str) -> Result<(), String> {
    let header: Header = serde_json::from_str(text).map_err(|error| error.to_string())?;
    match (header.format.as_str(), header.version) {
        (FORMAT, VERSION) => Ok(()),
        (FORMAT, version) => Err(format!("it is version {version} and this vramd reads {VERSION}")),
        (other, _) => Err(format!("its format is {other:?} and not {FORMAT:?}")),
    }
}

fn micros(ms: f64) -> Result<u64, String> {
    if ms < 0.0 {
        Err(format!("{ms} ms is before the recording began"))
    } else {
        Ok((ms * 1000.0).round() as u64)
    }
}
