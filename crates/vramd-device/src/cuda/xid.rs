//! The numbers by which NVIDIA's driver reports faults of a card. <https://docs.nvidia.com/deploy/xid-errors/>

use crate::Report;

/// After these a card does nothing more before it was reset.
const FATAL: [u64; 4] = [79, 95, 119, 120];

/// NVML says that there was one, and not which.
pub(super) const UNKNOWN: u64 = 999;

pub(super) fn is_fatal(code: u64) -> bool {
    FATAL.contains(&code)
}

pub(super) fn report(code: u64) -> Report {
    let meaning = match code {
        13 => "a program made the card compute what it cannot",
        31 => "a program used memory of the card that is not mapped",
        43 => "a program's work on the card was stopped",
        45 => "a program ended while the card worked for it",
        48 => "memory of the card had an error that cannot be corrected",
        63 => "faulty memory of the card was marked to be replaced",
        64 => "faulty memory of the card could not be marked to be replaced",
        74 => "a link to another card failed",
        79 => "the card has fallen off the bus",
        92 => "memory of the card had many errors that were corrected",
        94 => "memory of the card had an error that ended the program which used it",
        95 => "memory of the card had an error that nothing on the card outlives",
        119 | 120 => "the card's own processor does not answer",
        _ => return Report { kind: "Xid", code, meaning: None },
    };
    Report { kind: "Xid", code, meaning: Some(meaning) }
}
