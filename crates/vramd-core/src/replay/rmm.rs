//! RMM's log: `Thread,Time,Action,Pointer,Size,Stream`, a line for each call.
//!
//! Times are of the day (`14:03:59.123456`, older ones with a colon before the fraction) and begin anew at midnight.

use std::io::BufRead;

use super::trace::Builder;
use super::{Format, Trace, TraceError, lines};

const HEADER: &str = "Thread,Time,Action,Pointer,Size,Stream";
const DAY_MICROS: u64 = 24 * 3600 * 1_000_000;

pub fn read(reader: &mut impl BufRead) -> Result<Trace, TraceError> {
    let mut builder = Builder::default();
    let device = builder.device("rmm").map_err(TraceError::Content)?;
    let (mut midnight, mut before) = (0, 0);
    let torn = lines::each(reader, |line, text| {
        if line == 1 {
            return if text == HEADER { Ok(()) } else { Err(format!("it is not `{HEADER}`")) };
        }
        let fields: Vec<&str> = text.split(',').collect();
        let [_, time, action, pointer, size, _] = fields[..] else {
            return Err(format!("it has {} fields and not 6", fields.len()));
        };
        let time = micros(time).ok_or_else(|| format!("{time:?} is no time such as 14:03:59.123456"))?;
        // Threads may be a little out of order; half a day back is midnight.
        if time + DAY_MICROS / 2 < before {
            midnight += DAY_MICROS;
        }
        before = time;
        let at = midnight + time;
        let bytes = size.parse().map_err(|_| format!("{size:?} is no number of bytes"));
        match action {
            "allocate" => builder.allocate(device, at, address(pointer)?, bytes?),
            "free" => builder.free(device, at, address(pointer)?),
            "allocate failure" => builder.failed(device, at, bytes?),
            _ => Err(format!("{action:?} is no action: allocate, allocate failure or free")),
        }
    })?;
    Ok(builder.finish(Format::Rmm, torn))
}

fn address(text: &str) -> Result<u128, String> {
    text.strip_prefix("0x")
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .or((text == "(nil)").then_some(0))
        .map(u128::from)
        .ok_or_else(|| format!("{text:?} is no pointer such as 0x7f00"))
}

fn micros(text: &str) -> Option<u64> {
    let (hours, rest) = text.split_once(':')?;
    let (minutes, rest) = rest.split_once(':')?;
    let (seconds, fraction) = rest.split_once(['.', ':'])?;
    let number = |text: &str, below: u64| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u64>().ok().filter(|number| digits && *number < below)
    };
    let seconds = (number(hours, 24)? * 60 + number(minutes, 60)?) * 60 + number(seconds, 61)?;
    Some(seconds * 1_000_000 + number(fraction, 1_000_000).filter(|_| fraction.len() == 6)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_day_are_read_in_both_spellings() {
        assert_eq!(micros("00:00:01.000002"), Some(1_000_002));
        assert_eq!(micros("23:59:59:999999"), Some(DAY_MICROS - 1));
        for text in ["", "1:2", "24:00:00.000000", "00:61:00.000000", "00:00:00.+00001", "00:00:00.5"] {
            assert_eq!(micros(text), None, "{text}");
        }
    }
}
