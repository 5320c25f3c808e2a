//! Machines that serve traces: what is counted, and what the policies come to side by side.

use std::io::Cursor;

use vramd_api::EvictionPolicy;
use vramd_core::simulation::{Machine, Report, Request, Run, SimulationError, draw, run};

fn machine(device_bytes: u64, models: &[(u64, f64)]) -> Machine {
    let models: Vec<_> = models
        .iter()
        .enumerate()
        .map(|(at, (bytes, seconds))| {
            serde_json::json!({"name": format!("m{at}"), "bytes": bytes, "loadSeconds": seconds, "keepAlive": -1})
        })
        .collect();
    let devices = serde_json::json!([{"deviceId": "sim:0", "bytes": device_bytes}]);
    Machine::read(&serde_json::json!({"devices": devices, "models": models}).to_string()).unwrap()
}

fn served(machine: &Machine, trace: &str, policy: EvictionPolicy) -> Run {
    run(machine, &machine.trace(Cursor::new(trace)).unwrap(), policy)
}

#[test]
fn hits_loads_and_waits_are_those_of_the_story() {
    let two = machine(10, &[(6, 2.0), (6, 4.0)]);
    // m0 loads in 2 s and serves until 3; the second request finds it there. m1 waits until m0 is idle, at 11, and loads in 4 s; the
    // last request comes with the one before it.
    let run = served(
        &two,
        "time,model,seconds\n0,m0,1\n10,m0,1\n\n10.5,m1,1\n11, m1, 1\n",
        EvictionPolicy::LowestCost,
    );
    let report = &run.report;
    assert_eq!((report.requests, report.loads, report.evictions, report.loaded_bytes), (4, 2, 1, 12));
    assert!((report.hit_rate - 0.25).abs() < 1e-9 && (report.load_seconds - 6.0).abs() < 1e-9);
    assert!((report.waits.max_seconds - 4.5).abs() < 1e-6, "{:?}", report.waits);
    assert!((run.end - 16.0).abs() < 1e-9);
    let intervals: Vec<_> = run.intervals.iter().map(|one| (one.model, one.from, one.to)).collect();
    assert_eq!(intervals, [(0, 2.0, 11.0), (1, 15.0, 16.0)]);
}

#[test]
fn an_idle_model_goes_when_its_time_is_over_and_not_while_it_is_busy() {
    let text = r#"{"devices": [{"deviceId": "sim:0", "bytes": "1GiB"}], "bytesPerSecond": "512MiB",
        "models": [{"name": "a", "bytes": "1GiB", "keepAlive": "10s"}]}"#;
    let one = Machine::read(text).unwrap();
    let report = served(&one, "0,a,30\n20,a,1\n35,a,1\n47,a,1\n", EvictionPolicy::LeastRecentlyUsed).report;
    // Busy until 32, used until 36, gone at 46.
    assert_eq!((report.loads, report.evictions), (2, 0));
    assert!((report.hit_rate - 0.5).abs() < 1e-9);
}

#[test]
fn what_cannot_be_simulated_is_named() {
    let bad = |text: &str| Machine::read(text).unwrap_err().to_string();
    assert!(bad("{}").contains("devices"));
    assert!(bad(r#"{"devices": [], "models": []}"#).contains("no device"));
    let with = |model: &str| {
        format!(r#"{{"devices": [{{"deviceId": "sim:0", "bytes": 10}}], "models": [{model}]}}"#)
    };
    assert!(bad(&with(r#"{"name": "a", "bytes": 11}"#)).contains("fits onto no device"));
    assert!(bad(&with(r#"{"name": "a", "bytes": 1, "loadSeconds": -1}"#)).contains("loadSeconds"));
    assert!(bad(&with(r#"{"name": "a", "bytes": "1 parsec"}"#)).contains("size"));
    assert!(bad(&with(r#"{"name": "a", "bytes": 1}, {"name": "a", "bytes": 1}"#)).contains("twice"));
    assert!(bad(&with(r#"{"name": "a", "bytes": 1, "colour": 1}"#)).contains("colour"));
    let machine = machine(10, &[(1, 1.0)]);
    for (trace, expected) in [
        ("0,m0\n", "line 1: it is not"),
        ("0,m0,1\n-1,m0,1\n", "line 2: its time"),
        ("0,m0,nan\n", "line 1: its length"),
        ("0,m1,1\n", "has no model \"m1\""),
        ("5,m0,1\n4,m0,1\n", "line 2: it is earlier"),
        ("\n\n", "no request"),
    ] {
        let error = machine.trace(Cursor::new(trace)).unwrap_err().to_string();
        assert!(error.contains(expected), "{trace:?}: {error}");
    }
    assert!(matches!(machine.trace(Cursor::new(b"\xff\n")), Err(SimulationError::Read(_))));
}

#[test]
fn a_picture_has_a_line_for_each_model() {
    let two = machine(10, &[(6, 2.0), (6, 4.0)]);
    let run = served(&two, "0,m0,1\n10,m1,1\n", EvictionPolicy::LowestCost);
    let picture = draw(&two, &run, "a < b");
    assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n") && picture.contains("a &lt; b"));
    assert!(picture.contains(">m0<") && picture.contains(">m1<") && picture.contains(">sim:0<"));
}

/// Numbers from 0 to 1 that look like chance.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }
}

const MODELS: usize = 16;

/// Models from 1 to 40 GB, from disks of several speeds, of which a third fits.
fn fleet(dice: &mut Dice) -> Machine {
    let models: Vec<_> = (0..MODELS)
        .map(|_| {
            let bytes = 1e9 * 40_f64.powf(dice.roll());
            let rate = [0.5e9, 2e9, 3e9][(dice.roll() * 3.0) as usize];
            (bytes as u64, bytes / rate + 1.0)
        })
        .collect();
    machine(80_000_000_000, &models)
}

/// One of the first models more often than one of the last.
fn skewed(dice: &mut Dice) -> usize {
    ((MODELS as f64 + 1.0).powf(dice.roll()) - 1.0) as usize % MODELS
}

/// A trace in which the model of request `at` is `choose`n, about every `gap` seconds.
fn requests(dice: &mut Dice, gap: f64, mut choose: impl FnMut(&mut Dice, usize) -> usize) -> Vec<Request> {
    let mut time = 0.0;
    (0..3000)
        .map(|at| {
            time += -gap * (1.0 - dice.roll()).ln();
            let model = choose(dice, at);
            Request { time, model, seconds: 0.5 + 4.0 * dice.roll() }
        })
        .collect()
}

#[test]
fn what_costs_least_loads_for_a_fifth_less_time_where_use_is_skewed_and_is_never_much_worse() {
    let mut ratios = Vec::new();
    for seed in 0..3 {
        for gap in [30.0, 300.0] {
            let mut dice = Dice(seed * 7919 + gap as u64);
            let fleet = fleet(&mut dice);
            let (mut current, mut shift) = (0, 0);
            let traces = [
                ("skewed", requests(&mut dice, gap, |dice, _| skewed(dice))),
                ("even", requests(&mut dice, gap, |dice, _| (dice.roll() * MODELS as f64) as usize)),
                ("in turn", requests(&mut dice, gap, |_, at| at % MODELS)),
                (
                    "shifting",
                    requests(&mut dice, gap, |dice, at| {
                        shift += usize::from(at % 500 == 0) * 5;
                        (skewed(dice) + shift) % MODELS
                    }),
                ),
                (
                    "in bursts",
                    requests(&mut dice, gap, |dice, _| {
                        if dice.roll() < 0.1 {
                            current = skewed(dice);
                        }
                        current
                    }),
                ),
                (
                    "by day and night",
                    requests(&mut dice, gap, |dice, at| {
                        let half = MODELS / 2;
                        skewed(dice) % half + if at / 600 % 2 == 0 { 0 } else { half }
                    }),
                ),
            ];
            for (kind, trace) in traces {
                let seconds = |policy| {
                    let Report { load_seconds, .. } = run(&fleet, &trace, policy).report;
                    load_seconds
                };
                let ratio = seconds(EvictionPolicy::LowestCost) / seconds(EvictionPolicy::LeastRecentlyUsed);
                assert!(ratio <= 1.08, "{kind} of {seed} every {gap} s: {ratio:.3}");
                ratios.push((kind, ratio));
            }
        }
    }
    let of_kind: Vec<f64> =
        ratios.iter().filter(|(kind, _)| *kind == "skewed").map(|(_, ratio)| ratio.ln()).collect();
    let mean = (of_kind.iter().sum::<f64>() / of_kind.len() as f64).exp();
    assert!(mean <= 0.8, "{mean:.3}: {ratios:?}");
}

/// Two models of 6 GB that take turns on 10 GB, a minute each: 12 s from the disk, 2 s to RAM or back.
fn taking_turns(ram: &str) -> Report {
    let text = format!(
        r#"{{"devices": [{{"deviceId": "sim:0", "bytes": 10000000000}}], "bytesPerSecond": 500000000{ram},
        "models": [{{"name": "a", "bytes": 6000000000}}, {{"name": "b", "bytes": 6000000000}}]}}"#
    );
    let machine = Machine::read(&text).unwrap();
    let trace: Vec<_> = (0..40).map(|at| format!("{},{},1", at * 60, ["a", "b"][at % 2])).collect();
    served(&machine, &trace.join("\n"), EvictionPolicy::LowestCost).report
}

#[test]
fn what_has_to_go_comes_back_from_ram_where_that_pays() {
    let (without, with) =
        (taking_turns(""), taking_turns(r#", "ram": {"bytes": "16GB", "bytesPerSecond": 3000000000}"#));
    assert_eq!((without.loads, without.from_ram, with.loads), (40, 0, 40));
    // Each was read once and copied to RAM at most once; all that RAM had came from there.
    assert_eq!(with.from_ram, 38, "{with:?}");
    assert!(
        (with.load_seconds - (2.0 * 12.0 + 38.0 * 2.0)).abs() < 1e-6
            && (without.load_seconds - 480.0).abs() < 1e-6
    );
    assert!(with.waits.p50_seconds < 2.5 && with.waits.max_seconds < 14.5, "{:?}", with.waits);
    // There is room in RAM for one: the other is read each time.
    let one = taking_turns(r#", "ram": {"bytes": "7GB", "bytesPerSecond": 3000000000}"#);
    assert!(one.from_ram > 0 && one.from_ram < 38, "{one:?}");
    // RAM that is no faster than the disk keeps nothing.
    assert_eq!(taking_turns(r#", "ram": {"bytes": "16GB", "bytesPerSecond": 500000000}"#), without);
    assert!(
        Machine::read(r#"{"devices": [{"deviceId": "sim:0", "bytes": 1}], "models": [], "ram": {}}"#)
            .is_err()
    );
}
