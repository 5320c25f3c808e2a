//! `vramd replay` on traces of every format, and `vramd record` beside a running daemon.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Stdio};

use serde_json::{Value, json};

#[cfg(unix)]
use crate::support::wait_for;
use crate::support::{Daemon, Ended, Home, Signal, kill};

fn fixture(name: &str) -> String {
    format!("{}/tests/fixtures/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn one_history_in_each_format_has_one_replay() {
    let home = Home::new();
    for (name, device, failures, lifetime) in [
        ("rmm.csv", "rmm", 1, 0.02),
        ("vramd.jsonl", "sim:0", 0, 0.02),
        ("pytorch_2.pickle", "cuda:0", 1, 0.03),
        ("pytorch_4.pickle", "cuda:0", 1, 0.03),
    ] {
        let report = home.run(&["replay", &fixture(name), "--json"]).expect(0).json();
        assert_eq!(report["device"], device, "{name}");
        assert_eq!(report["poolBytes"], 12 << 20, "{name}");
        assert_eq!(report["peakLiveBytes"], 12 << 20, "{name}");
        assert_eq!(report["allocations"], 3, "{name}");
        assert_eq!(report["liveAtEnd"], 1, "{name}");
        assert_eq!(report["tracedFailures"], failures, "{name}");
        assert_eq!(report["lifetimes"]["medianMilliseconds"], lifetime, "{name}");
    }
    let said = home.run(&["replay", &fixture("rmm.csv")]).expect(0).stdout;
    assert!(said.starts_with("rmm needs at least 12.0 MiB; live peak 12.0 MiB, so 0.0 % overhead"), "{said}");
}

#[test]
fn a_smaller_pool_refuses_and_the_picture_shows_it() {
    let home = Home::new();
    let ended = home.run(&["replay", &fixture("rmm.csv"), "--pool", "8MiB", "--svg", "a.svg"]).expect(0);
    assert!(ended.stdout.starts_with("rmm: 1 refused in 8.0 MiB"), "{ended:?}");
    assert!(ended.stdout.contains("event 1, 4.0 MiB: 0 B were free"), "{ended:?}");
    let svg = std::fs::read_to_string(home.path("a.svg")).expect("a picture");
    assert!(svg.contains("rmm.csv, rmm") && svg.contains("1 refused"), "{svg}");
}

#[test]
fn a_machine_is_simulated_by_every_policy_with_no_daemon() {
    let home = Home::new();
    let models: Vec<_> = ["a", "b", "c"].map(|name| json!({"name": name, "bytes": "6GB"})).to_vec();
    let machine = json!({"devices": [{"deviceId": "cuda:0", "bytes": "13GB"}], "bytesPerSecond": "2GB", "models": models});
    std::fs::write(home.path("machine.json"), machine.to_string()).expect("written");
    let lines =
        (0..60).map(|at| format!("{},{},1\n", at * 20, if at % 5 == 4 { ["b", "c"][at % 2] } else { "a" }));
    std::fs::write(home.path("trace.csv"), lines.collect::<String>()).expect("written");
    let run =
        |more: &[&str]| home.run(&[&["simulate", "trace.csv", "--machine", "machine.json"], more].concat());
    let all = run(&["--json", "--svg", "a.svg"]).expect(0).json();
    let policies: Vec<_> =
        all["policies"].as_array().expect("a list").iter().map(|it| it["policy"].clone()).collect();
    assert_eq!(
        policies,
        ["LowestCost", "LeastRecentlyUsed", "LeastFrequentlyUsed", "LargestFirst", "LowestPriority"]
    );
    assert_eq!((&all["policies"][0]["requests"], &all["policies"][0]["loads"]), (&json!(60), &json!(13)));
    let svg = std::fs::read_to_string(home.path("a.svg")).expect("a picture");
    assert!(svg.contains("LowestCost: 60 requests"), "{svg}");
    let said = run(&["--policy", "largestfirst"]).expect(0).stdout;
    assert!(said.contains("LargestFirst") && !said.contains("LowestCost"), "{said}");
    std::fs::write(home.path("trace.csv"), "0,z,1\n").expect("written");
    let refused = run(&[]).expect(2);
    assert!(refused.stderr.contains("no model \"z\"") && refused.stderr.contains("hint"), "{refused:?}");
    std::fs::write(home.path("machine.json"), "{}").expect("written");
    assert!(run(&[]).expect(2).stderr.contains("machine is malformed"));
    std::fs::remove_file(home.path("trace.csv")).expect("removed");
    home.run(&["simulate", "none.csv", "--machine", "none.json"]).expect(2);
}

#[test]
fn what_cannot_be_replayed_says_why_and_what_to_do() {
    let home = Home::new();
    for (name, text) in [
        ("empty", &b""[..]),
        ("text", b"hello"),
        ("none.csv", b"Thread,Time,Action,Pointer,Size,Stream\n"),
        ("bad.csv", b"Thread,Time,Action,Pointer,Size,Stream\n1,2\n"),
        ("code.pickle", b"\x80\x04cos\nsystem\n."),
        ("bare.pickle", b"\x80\x04}\x8c\x0ddevice_traces](]]es."),
    ] {
        std::fs::write(home.path(name), text).expect("written");
    }
    let rmm = fixture("rmm.csv");
    for (arguments, message, hint) in [
        (&["missing"][..], "missing could not be opened", "vramd record --out"),
        // Windows does not even open a directory.
        if cfg!(unix) {
            (&["."][..], "it could not be read", "a file that you may read")
        } else {
            (&["."][..], "could not be opened", "vramd record --out")
        },
        (&["empty"], "it is empty", "vramd record --out"),
        (&["text"], "it is no trace", "--format"),
        (&["none.csv"], "holds no allocations", "log while"),
        (&["bad.csv"], "line 2: it has 2 fields", "that line"),
        (&["code.pickle"], "byte 2: opcode 0x63 asks for code to be run", "_dump_snapshot"),
        (&["bare.pickle"], "holds no allocations", "_record_memory_history"),
        (&[&rmm, "--format", "pytorch"], "byte 0: it does not begin as a pickle", "_dump_snapshot"),
        (&[&rmm, "--device", "cuda:3"], "has no device \"cuda:3\"", "it has rmm"),
        (&[&rmm, "--svg", "no/where.svg"], "could not be written", "another file"),
        (&[&rmm, "--alignment", "48"], "no power of two", ""),
        (&[&rmm, "--format", "tar"], "pytorch", ""),
    ] {
        let ended = home.run(&[&["replay"], arguments].concat()).expect(2);
        assert!(ended.stderr.contains(message), "{arguments:?} said {}", ended.stderr);
        assert!(ended.stderr.contains(hint), "{arguments:?} said {}", ended.stderr);
    }
}

fn start(daemon: &Daemon, arguments: &[&str]) -> Child {
    let mut command = daemon.command(&[&["record"], arguments].concat());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
    let mut said = String::new();
    let mut stderr = BufReader::with_capacity(1, child.stderr.as_mut().expect("piped"));
    stderr.read_line(&mut said).expect("a line");
    assert_eq!(said, "recording; Ctrl-C ends it\n");
    child
}

#[cfg(unix)]
fn lines(daemon: &Daemon, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(daemon.home.path(name)).expect("a trace");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn alloc(daemon: &Daemon, size: &str, device: &str) -> String {
    let ended = daemon.run(&["alloc", size, "--device", device, "--purpose", "test"]).expect(0);
    ended.stdout.trim().to_owned()
}

#[cfg(unix)]
#[test]
fn a_recording_begins_with_what_lives_and_replays() {
    let daemon = Daemon::start();
    let before = alloc(&daemon, "1MiB", "sim:0");
    let child = start(&daemon, &["--out", "a.jsonl", "--device", "sim:0"]);
    let during = alloc(&daemon, "2MiB", "sim:0");
    alloc(&daemon, "4MiB", "sim:1");
    daemon.run(&["free", &before]).expect(0);
    wait_for("the free", || (lines(&daemon, "a.jsonl").len() == 4).then_some(()));
    kill(&child, Signal::INT);
    let ended = Ended::from(child.wait_with_output().expect("it ended")).expect(0);
    assert!(ended.stderr.contains("recorded 2 allocations, 1 frees, 0 gaps"), "{ended:?}");

    let lines = lines(&daemon, "a.jsonl");
    let told: Vec<_> = lines[1..].iter().map(|line| (&line["event"], &line["id"], &line["bytes"])).collect();
    let null = &Value::Null;
    assert_eq!(
        told,
        [
            (&Value::from("allocate"), &Value::from(before.as_str()), &Value::from(1 << 20)),
            (&Value::from("allocate"), &Value::from(during.as_str()), &Value::from(2 << 20)),
            (&Value::from("free"), &Value::from(before.as_str()), null),
            (&Value::from("end"), null, null),
        ]
    );
    assert_eq!(lines[2]["purpose"], "test");
    let report = daemon.json(&["replay", "a.jsonl"]);
    assert_eq!((&report["poolBytes"], &report["liveAtEnd"]), (&Value::from(3 << 20), &Value::from(1)));
    let again = daemon.run(&["record", "--out", "a.jsonl"]).expect(2);
    assert!(again.stderr.contains("hint: name a file that does not exist yet"), "{again:?}");
}

/// A daemon that tells these events once and then stops; each look at its state shows the next of `states`.
fn told(events: &[(&str, Value)], states: Vec<Value>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let mut stream = String::new();
    for (number, (kind, data)) in events.iter().enumerate() {
        let event =
            json!({"id": format!("r-{number}"), "event": kind, "at": "2026-01-01T00:00:00Z", "data": data});
        stream.extend([
            "id: r-",
            &number.to_string(),
            "\nevent: ",
            kind,
            "\ndata: ",
            &event.to_string(),
            "\n\n",
        ]);
    }
    let mut states = states.into_iter();
    std::thread::spawn(move || {
        // As many connections as there are looks, and the one of the stream.
        for _ in 0..=states.len() {
            let (mut connection, _) = listener.accept().expect("a client");
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                connection.read_exact(&mut byte).expect("a request");
                head.push(byte[0]);
            }
            let (kind, body) = if head.starts_with(b"GET /api/events") {
                ("text/event-stream", stream.clone())
            } else {
                let allocations = states.next().expect("a state");
                let body = json!({"success": true, "requestId": "r", "data": {"allocations": allocations}});
                ("application/json", body.to_string())
            };
            let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n");
            connection.write_all(&[head.as_bytes(), body.as_bytes()].concat()).expect("sent");
        }
    });
    format!("http://{address}")
}

/// An allocation as the daemon shows it.
fn shown(id: &str, purpose: &str, more: &Value) -> Value {
    let mut allocation = json!({
        "allocationId": id, "deviceId": "sim:0", "sizeBytes": 4096, "blockBytes": 4096, "alignment": 256,
        "allocationType": "Buffer", "purpose": purpose, "priority": "Normal", "persistent": false, "status": "Active",
        "owner": "one", "generation": 1, "leases": [], "createdAt": "2026-01-01T00:00:00Z",
    });
    for (name, value) in more.as_object().expect("an object") {
        allocation[name] = value.clone();
    }
    allocation
}

#[test]
fn gaps_and_moves_are_in_the_recording() {
    let ids = ["a", "b", "c", "d"].map(|last| format!("0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5{last}"));
    let [one, two, three, place] = &ids;
    let moved =
        |device: &str| json!({"allocationId": one, "generation": 2, "deviceId": device, "sizeBytes": 4096});
    let released = json!({"allocationId": three});
    let events = [
        // Within its device, which is no news; then to another.
        ("allocation.moved", moved("sim:0")),
        ("allocation.moved", moved("sim:1")),
        ("lag", json!({"missed": 7})),
        ("allocation.released", released),
        ("reset", json!({"lastEventId": "old-1"})),
        ("daemon.stopping", json!({})),
    ];
    let moved_on = shown(one, "kept", &json!({"deviceId": "sim:1", "generation": 2}));
    let states = vec![
        json!([
            shown(one, "kept", &json!({})),
            shown(two, "gone meanwhile", &json!({})),
            shown(place, "new place", &json!({"placeOf": one, "status": "Moving"})),
        ]),
        json!([moved_on, shown(three, "new meanwhile", &json!({}))]),
        // It has moved back in the gap.
        json!([shown(one, "kept", &json!({"generation": 3}))]),
    ];
    let home = Home::new();
    let ended = home.run(&["record", "--server", &told(&events, states)]).expect(0);
    assert!(ended.stderr.contains("recorded 5 allocations, 4 frees, 2 gaps"), "{ended:?}");
    let lines: Vec<Value> =
        ended.stdout.lines().skip(1).map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let told: Vec<_> =
        lines.iter().map(|line| [&line["event"], &line["id"], &line["device"], &line["purpose"]]).collect();
    let null = &Value::Null;
    let [allocate, free, gap] = ["allocate", "free", "gap"].map(Value::from);
    let [one, two, three] = [one, two, three].map(|id| Value::from(id.as_str()));
    let [first, second] = ["sim:0", "sim:1"].map(Value::from);
    let [kept, gone, new] = ["kept", "gone meanwhile", "new meanwhile"].map(Value::from);
    assert_eq!(
        told,
        [
            [&allocate, &one, &first, &kept],
            [&allocate, &two, &first, &gone],
            [&free, &one, &first, null],
            [&allocate, &one, &second, &kept],
            [&gap, null, null, null],
            [&free, &two, &first, null],
            [&allocate, &three, &first, &new],
            [&free, &three, &first, null],
            [&gap, null, null, null],
            [&free, &one, &second, null],
            [&allocate, &one, &first, &kept],
            [&"end".into(), null, null, null],
        ]
    );
    assert_eq!((&lines[4]["missed"], &lines[8]["missed"]), (&Value::from(7), null));
}

#[test]
fn a_recording_survives_kills_of_itself_and_of_the_daemon() {
    let mut daemon = Daemon::start();
    alloc(&daemon, "1MiB", "sim:0");
    let (one, other) = (start(&daemon, &["--out", "a.jsonl"]), start(&daemon, &["--out", "b.jsonl"]));
    kill(&one, Signal::KILL);
    one.wait_with_output().expect("it ended");
    assert_eq!(daemon.json(&["replay", "a.jsonl"])["allocations"], 1);
    daemon.kill();
    daemon.reap();
    let ended = Ended::from(other.wait_with_output().expect("it ended")).expect(2);
    assert!(ended.stderr.contains("1 gaps") && ended.stderr.contains("error: "), "{ended:?}");
    let report = Home::new().run(&["replay", daemon.home.path("b.jsonl").to_str().expect("UTF-8"), "--json"]);
    assert_eq!(report.expect(0).json()["irregularities"]["gaps"], 1);
}

#[cfg(unix)]
#[test]
fn a_recording_ends_when_its_time_is_over_or_the_daemon_stops() {
    let mut daemon = Daemon::start();
    let ended = daemon.run(&["record", "--seconds", "0"]).expect(0);
    let last = ended.stdout.lines().last().expect("lines");
    assert!(last.starts_with(r#"{"event":"end""#), "{ended:?}");
    let child = start(&daemon, &[]);
    daemon.end(Signal::TERM);
    Ended::from(child.wait_with_output().expect("it ended")).expect(0);
}
