//! Traces: every format, what is wrong with them, and replays against a dull model.

use std::fmt::Write;

use proptest::prelude::*;
use vramd_core::replay::{self, Format, Irregularities, Options, Replay, Trace, TraceError, picture};

const HEADER: &str = "Thread,Time,Action,Pointer,Size,Stream\n";

fn read(bytes: &[u8]) -> Result<Trace, TraceError> {
    replay::read(&mut &bytes[..], None)
}

fn rmm(calls: &[(&str, u64, u64)]) -> Trace {
    let mut log = HEADER.to_owned();
    for (number, (action, pointer, size)) in calls.iter().enumerate() {
        writeln!(log, "1,10:00:00.{number:06},{action},0x{pointer:x},{size},0x0").expect("a string");
    }
    read(log.as_bytes()).expect("a log")
}

fn replayed(trace: &Trace, pool_bytes: Option<u64>, alignment: u64) -> Replay {
    replay::replay(&trace.devices[0], Options { pool_bytes, alignment }).expect("it fits")
}

#[test]
fn the_lowest_place_is_taken_and_the_peaks_are_told() {
    let trace = rmm(&[
        ("allocate", 1, 100),
        ("allocate", 2, 300),
        ("free", 1, 100),
        ("allocate", 3, 256),
        ("free", 2, 300),
        ("free", 3, 256),
    ]);
    let replay = replayed(&trace, None, 256);
    let places: Vec<_> = replay.placed.iter().map(|it| (it.offset, it.bytes, it.begin, it.end)).collect();
    assert_eq!(places, [(0, 256, 0, 2), (256, 512, 1, 4), (0, 256, 3, 5)]);
    let report = replay.report;
    assert_eq!((report.pool_bytes, report.peak_live_bytes, report.peak_address_bytes), (768, 556, 768));
    assert_eq!((report.allocations, report.frees, report.live_at_end), (3, 3, 0));
    assert_eq!(
        report.lifetimes.map(|it| (it.median_milliseconds, it.p99_milliseconds)),
        Some((0.002, 0.002))
    );
}

#[test]
fn what_finds_no_room_is_refused_with_the_figures_of_that_moment() {
    let trace = rmm(&[
        ("allocate", 1, 256),
        ("allocate", 2, 256),
        ("allocate", 3, 256),
        ("allocate", 4, 256),
        ("free", 1, 0),
        ("free", 3, 0),
        ("allocate", 5, 512),
        ("free", 5, 512),
        ("allocate", 6, 2048),
    ]);
    let report = replayed(&trace, Some(1024), 256).report;
    assert_eq!((report.refusals.count, report.refusals.by_fragmentation), (2, 1));
    let first = &report.refusals.first[0];
    assert_eq!((first.event, first.bytes, first.free_bytes, first.largest_free_bytes), (6, 512, 512, 256));
    assert_eq!((report.fragmentation.peak, report.peak_live_bytes), (0.5, 2560));
}

#[test]
fn what_does_not_fit_together_is_counted_and_left_out() {
    let trace = rmm(&[
        ("free", 9, 1),
        ("allocate", 1, 256),
        ("allocate", 1, 256),
        ("free", 1, 256),
        ("free", 1, 256),
        ("allocate failure", 0, 4096),
        ("allocate", 2, 0),
    ]);
    let report = replayed(&trace, None, 256).report;
    let expected = Irregularities {
        double_frees: 1,
        unknown_frees: 1,
        overlapping_allocations: 1,
        gaps: 0,
        missed_events: 0,
    };
    assert_eq!(report.irregularities, expected);
    assert_eq!((report.traced_failures, report.pool_bytes, report.live_at_end), (1, 256, 1));
}

#[test]
fn a_log_may_pass_midnight() {
    let log = format!("{HEADER}1,23:59:59.999999,allocate,0x1,8,0x0\n1,00:00:00.000001,free,0x1,8,0x0\n");
    assert_eq!(read(log.as_bytes()).expect("a log").devices[0].events[1].at_micros, 2);
}

const RECORDED: &str = r#"{"format":"vramd-trace","version":1,"startedAt":"2026-11-20T10:00:00Z"}
{"event":"allocate","ms":0,"id":"0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f","device":"sim:0","bytes":512,"owner":"me","purpose":""}
{"event":"gap","ms":1.5,"missed":7}
{"event":"free","ms":2,"id":"0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f","device":"sim:0"}
"#;

#[test]
fn a_trace_that_a_kill_cut_off_is_read_up_to_there() {
    let whole = read(RECORDED.as_bytes()).expect("a trace");
    assert!(!whole.torn);
    assert_eq!((whole.devices[0].events.len(), whole.devices[0].irregularities.missed_events), (3, 7));
    let last_line = RECORDED.trim_end().rfind('\n').expect("lines") + 1;
    for cut in last_line + 1..RECORDED.len() - 1 {
        let torn = read(&RECORDED.as_bytes()[..cut]).expect("a trace");
        assert!(torn.torn && torn.devices[0].events.len() == 2, "cut at {cut}");
    }
}

#[test]
fn each_bad_text_says_what_is_wrong_and_where() {
    let line = |line: &str| format!("{HEADER}{line}\n");
    let recorded = |line: &str| format!("{}\n{line}\n", RECORDED.lines().next().expect("a header"));
    for (text, said) in [
        (String::new(), "it is empty"),
        ("hello".into(), "no trace"),
        ("Thread,Time,Action\n".into(), "line 1: it is not `Thread"),
        (line("1,2,3"), "line 2: it has 3 fields and not 6"),
        (line("1,noon,allocate,0x1,8,0x0"), "\"noon\" is no time"),
        (line("1,10:00:00.000000,allocate,1,8,0x0"), "\"1\" is no pointer"),
        (line("1,10:00:00.000000,allocate,0x1,-8,0x0"), "\"-8\" is no number of bytes"),
        (line("1,10:00:00.000000,allocate,0x1,99999999999999999999,0x0"), "is no number of bytes"),
        (line("1,10:00:00.000000,borrow,0x1,8,0x0"), "\"borrow\" is no action"),
        (line(&"x".repeat(2 << 20)), "line 2: it is longer than"),
        ("{}\n".into(), "line 1: missing field"),
        (RECORDED.replace(":1,\"st", ":2,\"st"), "line 1: it is version 2"),
        (RECORDED.replace("vramd-trace", "other"), "its format is \"other\""),
        (recorded("{\"event\":\"end\"}"), "line 2: missing field `ms`"),
        (recorded("{\"event\":\"gap\",\"ms\":-1}"), "before the recording began"),
        (recorded("{\"event\":\"borrow\",\"ms\":1}"), "line 2: unknown variant `borrow`"),
        (recorded(&"[".repeat(100_000)), "line 2:"),
    ] {
        let error = read(text.as_bytes()).expect_err(said).to_string();
        assert!(error.contains(said), "{error} and not {said}");
    }
}

/// A pickle of protocol 4 around `body`.
fn pickle(body: &[u8]) -> Vec<u8> {
    [b"\x80\x04", body].concat()
}

#[test]
fn a_hostile_pickle_is_an_error_and_runs_nothing() {
    let deep = |opcode: u8| pickle(&vec![opcode; 28 << 20]);
    let traces = b"}\x8c\x0ddevice_traces";
    let with = |value: &[u8]| pickle(&[traces, value, b"s."].concat());
    // A list of a million, a thousand times: each item costs two bytes of the file and nothing more.
    let bomb = [&b"]\x94(}\x8c\x06action\x8c\x05allocs"[..], &b"\x32".repeat(1000), b"e"].concat();
    for (bytes, said) in [
        (pickle(b"cos\nsystem\n(S'true'\ntR."), "asks for code to be run"),
        (pickle(b"\x8c\x02os\x8c\x06system\x93."), "asks for code to be run"),
        (pickle(b"N)R."), "asks for code to be run"),
        (pickle(b"P1\n."), "asks for code to be run"),
        (b"\x80\x09.".to_vec(), "its protocol is 9"),
        (pickle(b""), "it ends in the middle"),
        (pickle(b"]"), "it ends in the middle"),
        (pickle(b"."), "takes a value where there is none"),
        (pickle(b"(."), "takes a value where there is none"),
        (pickle(b"NN."), "values left over"),
        (pickle(b"e"), "closes a mark where there is none"),
        (pickle(b"NNa"), "appends to what is no list"),
        (pickle(b"](NNu"), "what is no dictionary"),
        (pickle(b"}(Nu"), "a key without a value"),
        (pickle(b"h\x05"), "recalls 5"),
        (pickle(b"\xff"), "opcode 0xff has no place"),
        (pickle(b"X\xff\xff\xff\xff"), "it ends in the middle"),
        (pickle(b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff"), "it ends in the middle"),
        (pickle(b"\x8b\xff\xff\xff\xff"), "it ends in the middle"),
        (deep(b']'), "its values take more than"),
        (deep(b'('), "its values take more than"),
        (pickle(b"N."), "without `device_traces`"),
        (with(b"N"), "without `device_traces`"),
        (with(b"]Na"), "`device_traces[0]` is no list"),
        (with(b"]]}aa"), "`device_traces[0][0]`: it has no `action`"),
        (with(b"]]}(\x8c\x06action\x8c\x05allocuaa"), "no number as its `addr`"),
        (
            with(b"]]}(\x8c\x06action\x8c\x05alloc\x8c\x04addrJ\xff\xff\xff\xffuaa"),
            "`addr` is -1, below zero",
        ),
        (with(&bomb), "is no list"),
    ] {
        let error = read(&bytes).expect_err(said).to_string();
        assert!(error.contains(said), "{error} and not {said}");
    }
}

#[test]
fn a_list_that_holds_itself_is_no_endless_trace() {
    let error = read(&pickle(b"}\x8c\x0ddevice_traces]\x94h\x00as.")).expect_err("no entries").to_string();
    assert!(error.contains("`device_traces[0][0]`: it has no `action`"), "{error}");
}

#[test]
fn one_entry_that_is_told_without_end_is_bounded() {
    // 8,192 lists that are one list of 8,192 entries that are one entry.
    let entry = b"}\x94(\x8c\x06action\x8c\x05alloc\x8c\x04addrK\x01\x8c\x04sizeK\x01u";
    let entries = [&b"]\x94("[..], entry, &b"h\x01".repeat(8191), b"e"].concat();
    let body = [&b"}\x8c\x0ddevice_traces]("[..], &entries, &b"h\x00".repeat(8191), b"es."].concat();
    let error = read(&pickle(&body)).expect_err("too many").to_string();
    assert!(error.contains("it has more than 256 devices"), "{error}");
}

#[test]
fn the_picture_of_a_long_trace_stays_small() {
    let mut calls = Vec::new();
    for number in 0..50_000 {
        calls.push(("allocate", number + 1, 256 + number % 4096));
        if number >= 2000 {
            calls.push(("free", number - 1999, 0));
        }
    }
    let trace = rmm_raw(&calls);
    let replay = replayed(&trace, Some(2 << 20), 256);
    assert!(replay.report.refusals.count > 0);
    let svg = picture::draw(&trace.devices[0], &replay, "a <long> & narrow trace");
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    assert!(svg.contains("a &lt;long&gt; &amp; narrow trace"));
    assert!(svg.len() < 4 << 20, "{} bytes", svg.len());
}

fn rmm_raw(calls: &[(&'static str, u64, u64)]) -> Trace {
    let mut log = HEADER.to_owned();
    for (action, pointer, size) in calls {
        writeln!(log, "1,10:00:00.000000,{action},0x{pointer:x},{size},0x0").expect("a string");
    }
    read(log.as_bytes()).expect("a log")
}

proptest! {
    #[test]
    fn any_bytes_are_a_trace_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for format in [Format::Vramd, Format::Rmm, Format::Pytorch] {
            let _ = replay::read(&mut &bytes[..], Some(format));
        }
    }

    #[test]
    fn a_history_replays_as_the_dull_model_says(
        steps in prop::collection::vec((0u64..20, 0u64..2000, any::<bool>()), 1..200),
        pool in 1u64..64,
    ) {
        const QUANTUM: u64 = 64;
        let calls: Vec<_> = steps
            .iter()
            .map(|(pointer, size, free)| (if *free { "free" } else { "allocate" }, *pointer, *size))
            .collect();
        let trace = rmm(&calls);
        for pool in [None, Some(pool * QUANTUM)] {
            let replay = replayed(&trace, pool, QUANTUM);
            let dull = dull(&calls, replay.report.pool_bytes, QUANTUM);
            let report = replay.report;
            prop_assert_eq!(report.peak_live_bytes, dull.peak_live);
            prop_assert_eq!(report.refusals.count, dull.refused);
            prop_assert_eq!(report.peak_address_bytes, dull.peak_address);
            prop_assert_eq!(report.live_at_end, dull.live_at_end);
            if pool.is_none() {
                prop_assert_eq!(report.refusals.count, 0);
                if report.pool_bytes > 0 {
                    let smaller = replayed(&trace, Some(report.pool_bytes - QUANTUM), QUANTUM);
                    prop_assert!(smaller.report.refusals.count > 0);
                }
            }
        }
    }
}

struct Dull {
    peak_live: u64,
    peak_address: u64,
    refused: u64,
    live_at_end: u64,
}

/// A flag for each quantum, and a list of what lives.
fn dull(calls: &[(&str, u64, u64)], pool: u64, quantum: u64) -> Dull {
    let mut flags = vec![false; (pool / quantum) as usize];
    let mut live: Vec<(u64, u64, Option<std::ops::Range<usize>>)> = Vec::new();
    let mut dull = Dull { peak_live: 0, peak_address: 0, refused: 0, live_at_end: 0 };
    for (action, pointer, size) in calls {
        if let Some(index) = live.iter().position(|(other, ..)| other == pointer) {
            let (.., place) = live.remove(index);
            flags[place.unwrap_or(0..0)].fill(false);
        }
        if *action == "allocate" {
            let quanta = size.div_ceil(quantum) as usize;
            let place = (0..(flags.len() + 1).saturating_sub(quanta))
                .map(|begin| begin..begin + quanta)
                .find(|range| flags[range.clone()].iter().all(|taken| !taken))
                .filter(|_| quanta > 0);
            if let Some(place) = &place {
                flags[place.clone()].fill(true);
                dull.peak_address = dull.peak_address.max(place.end as u64 * quantum);
            }
            dull.refused += u64::from(place.is_none() && quanta > 0);
            live.push((*pointer, *size, place));
            dull.peak_live = dull.peak_live.max(live.iter().map(|(_, size, _)| size).sum());
        }
    }
    dull.live_at_end = live.len() as u64;
    dull
}
