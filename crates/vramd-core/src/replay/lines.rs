//! Lines of bounded length, with their numbers, and the one that was cut off.

use std::io::{BufRead, Read};

use super::TraceError;

/// Far above any line of a trace.
const MOST_BYTES: u64 = 1 << 20;

/// Hands each line to `take`. Answers whether the last one was cut off: it has no end, and is not understood.
pub fn each(
    reader: &mut impl BufRead,
    mut take: impl FnMut(u64, &str) -> Result<(), String>,
) -> Result<bool, TraceError> {
    let mut buffer = Vec::new();
    for line in 1.. {
        buffer.clear();
        let read = reader.by_ref().take(MOST_BYTES).read_until(b'\n', &mut buffer)?;
        let problem = |problem: String| TraceError::Line { line, problem };
        if read == 0 {
            break;
        }
        if buffer.last() != Some(&b'\n') && read as u64 == MOST_BYTES {
            return Err(problem(format!("it is longer than {MOST_BYTES} bytes")));
        }
        let text = str::from_utf8(&buffer).map_err(|_| "it is not UTF-8 text".to_owned());
        let taken = text.and_then(|text| match text.trim() {
            "" => Ok(()),
            text => take(line, text),
        });
        match taken {
            Err(_) if buffer.last() != Some(&b'\n') && line > 1 => return Ok(true),
            other => other.map_err(problem)?,
        }
    }
    Ok(false)
}
