//! A trace in any format: it is an error, or it replays with figures that add up, and can be drawn.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vramd_core::replay::{self, Format, Options, picture};

fuzz_target!(|bytes: &[u8]| {
    for format in [Format::Vramd, Format::Rmm, Format::Pytorch] {
        let Ok(trace) = replay::read(&mut &bytes[..], Some(format)) else { continue };
        for device in &trace.devices {
            for pool_bytes in [None, Some(4096)] {
                let Ok(replayed) = replay::replay(device, Options { pool_bytes, alignment: 256 }) else {
                    continue;
                };
                let report = &replayed.report;
                assert!(report.peak_address_bytes <= report.pool_bytes);
                assert!(pool_bytes.is_some() || report.refusals.count == 0);
                assert_eq!(report.allocations - report.frees, report.live_at_end);
                let _ = picture::draw(device, &replayed, "fuzz");
            }
        }
    }
});
