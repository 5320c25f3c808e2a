//! Workers: their lives, and everything that they can do wrong.

use std::io::{BufRead, BufReader, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vramd_api::{StartWorker, WorkerName};
use vramd_attach::Stream;
use vramd_daemon::Program;

use crate::support::{Daemon, Home, MIB, PATIENCE, wait_for};

const MODES: [&str; 21] = [
    "good",
    "says",
    "garbage",
    "floods",
    "huge",
    "half",
    "twice",
    "unknown",
    "impossible",
    "negative",
    "silent",
    "deaf",
    "forks",
    "exits",
    "dies",
    "hangs",
    "newer",
    "holds",
    "shares",
    "chatters",
    "misshapen",
];

fn name(text: &str) -> WorkerName {
    text.parse().expect("a name")
}

/// A daemon that may start `rogue.py` in each of its modes.
fn daemon() -> Daemon {
    daemon_in(&Home::new(), Vec::new())
}

fn daemon_in(home: &Home, workers: Vec<StartWorker>) -> Daemon {
    let rogue = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/rogue.py");
    let mut programs: Vec<_> = MODES
        .iter()
        .map(|mode| {
            let command = ["python3", rogue, mode].map(ToOwned::to_owned).to_vec();
            (name(mode), Program { command, environment: vec!["MODEL_*".to_owned(), "LEVEL".to_owned()] })
        })
        .collect();
    let missing = Program { command: vec!["/there/is/no/such/program".to_owned()], environment: Vec::new() };
    programs.push((name("missing"), missing));
    // As `uv run` and its like do.
    let script = format!("python3 {rogue} shares; exit $?");
    let wrapped = ["sh".to_owned(), "-c".to_owned(), script].to_vec();
    programs.push((name("wrapped"), Program { command: wrapped, environment: Vec::new() }));
    home.start_workers(&[64 * MIB], |config| {
        config.worker_programs = programs.into_iter().collect();
        config.workers = workers;
    })
}

fn start(daemon: &Daemon, program: &str) -> Value {
    daemon.post("/api/workers", &json!({ "program": program, "heartbeatSeconds": 1 })).data(201)
}

fn worker(daemon: &Daemon, name: &str) -> Value {
    daemon.get(&format!("/api/workers/{name}?include=logs")).data(200)
}

/// The worker, once it is so.
#[track_caller]
fn when(daemon: &Daemon, name: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    wait_for(&format!("{name} to be {what}"), || Some(worker(daemon, name)).filter(&is))
}

fn ready(daemon: &Daemon, program: &str) -> Value {
    start(daemon, program);
    when(daemon, program, "ready", |worker| {
        worker["state"] == "Ready" && !worker["lastSynchronized"].is_null()
    })
}

fn call(daemon: &Daemon, worker: &str, data: &Value) -> Value {
    let body = json!({ "action": "echo", "data": data });
    daemon.post(&format!("/api/workers/{worker}/call"), &body).data(200)["data"].clone()
}

fn lives(pid: &Value) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[test]
fn a_worker_is_started_asked_and_ended() {
    let daemon = daemon();
    let started = start(&daemon, "good");
    assert_eq!((&started["state"], &started["restart"]), (&json!("Starting"), &json!("OnFailure")));
    let there = when(&daemon, "good", "ready", |it| it["models"][0]["name"] == "own");
    assert_eq!(there["implementation"], "rogue");
    assert_eq!(there["models"][0]["ownBytes"], 8 * MIB);
    let echoed = call(&daemon, "good", &json!({ "text": "ü", "number": 1.5 }));
    assert_eq!((&echoed["text"], &echoed["number"]), (&json!("ü"), &json!(1.5)));
    assert_eq!(echoed["environment"]["VRAMD_OWNER"], "worker:good");
    assert_eq!(echoed["environment"]["VRAMD_SERVER"], format!("http://{}", daemon.address));
    assert_eq!(daemon.get("/api/workers").data(200)["workers"].as_array().map(Vec::len), Some(1));
    let stopped = daemon.delete("/api/workers/good").data(200);
    assert_eq!((&stopped["state"], &stopped["lastExit"]["code"]), (&json!("Exited"), &json!(0)));
    assert!(!lives(&there["pid"]));
    daemon.get("/api/workers/good").error("NOT_FOUND");
}

#[test]
fn bad_requests_are_refused_by_field() {
    let daemon = daemon();
    let refused = |body: Value, field: &str| daemon.post("/api/workers", &body).refuses(field);
    let error = refused(json!({ "program": "rm" }), "program");
    assert!(error["hint"].as_str().is_some_and(|hint| hint.contains("good")), "{error}");
    refused(json!({ "program": "good", "heartbeatSeconds": 0 }), "heartbeatSeconds");
    refused(json!({ "program": "good", "environment": { "LD_PRELOAD": "x" } }), "environment");
    refused(json!({ "program": "good", "environment": { "MODEL_A=B": "x" } }), "environment");
    refused(json!({ "program": "good", "command": "rm" }), "command");
    daemon.post("/api/workers", &json!({ "program": "good", "deviceId": "cuda:7" })).error("NOT_FOUND");
    assert_eq!(daemon.get("/api/workers").data(200)["workers"], json!([]));

    let body = json!({ "program": "good", "environment": { "MODEL_NAME": "a", "LEVEL": "b" } });
    daemon.post("/api/workers", &body).data(201);
    when(&daemon, "good", "ready", |it| it["state"] == "Ready");
    assert_eq!(call(&daemon, "good", &json!({}))["environment"]["MODEL_NAME"], "a");
    daemon.post("/api/workers", &json!({ "program": "good", "name": "good" })).error("CONFLICT");
    assert_eq!(start(&daemon, "good")["name"], "good-2");
    for (body, field) in [
        (json!({ "action": "hello" }), "action"),
        (json!({ "action": "shutdown" }), "action"),
        (json!({ "action": "none of them" }), "action"),
        (json!({ "action": "" }), "action"),
        (json!({ "action": "echo", "timeoutSeconds": 0 }), "timeoutSeconds"),
        (json!({ "action": "echo", "data": [1] }), "data"),
    ] {
        daemon.post("/api/workers/good/call", &body).refuses(field);
    }
    daemon.post("/api/workers/nobody/call", &json!({ "action": "echo" })).error("NOT_FOUND");
    daemon.get("/api/workers/good?include=secrets").refuses("include");
    daemon.delete("/api/workers/nobody").error("NOT_FOUND");
}

#[test]
fn a_workers_own_error_and_a_late_answer_are_told_apart() {
    let daemon = daemon();
    ready(&daemon, "good");
    let error = daemon
        .post("/api/workers/good/call", &json!({ "action": "echo", "data": { "fail": true } }))
        .error("WORKER_FAILED");
    assert_eq!(error["details"]["workerCode"], "CudaOutOfMemory");
    let body = json!({ "action": "slow", "timeoutSeconds": 1 });
    daemon.post("/api/workers/good/call", &body).error("TIMEOUT");
    // Its late answer is no fault: it was asked to give up, and did.
    let said = |it: &Value| {
        it["logs"].as_array().is_some_and(|lines| {
            lines.iter().any(|line| line["text"].as_str().is_some_and(|text| text.starts_with("cancelled")))
        })
    };
    let after = when(&daemon, "good", "told that nobody waits", said);
    assert_eq!(after["faultCount"], 0);
    assert_eq!(call(&daemon, "good", &json!({ "a": 1 }))["a"], 1);
}

#[test]
fn what_a_worker_prints_is_contained_and_named() {
    let daemon = daemon();
    for (mode, faults, why) in [
        ("garbage", 5, "expected a string"),
        ("huge", 1, "more than 16777216 bytes"),
        ("twice", 1, "answered already"),
        ("unknown", 1, "never asked"),
        ("impossible", 1, "claims"),
        ("negative", 1, "memory_mb"),
    ] {
        start(&daemon, mode);
        when(&daemon, mode, "ready", |it| it["state"] == "Ready");
        assert_eq!(call(&daemon, mode, &json!({ "a": 1 }))["a"], 1, "{mode} goes on");
        let found = when(&daemon, mode, "named", |it| it["faultCount"].as_u64() >= Some(faults));
        let fault = found["lastFault"]["message"].as_str().expect("a fault");
        assert!(fault.contains(why), "{mode}: {fault}");
        assert_eq!(
            found["models"].as_array().map_or(0, Vec::len) == 0,
            matches!(mode, "impossible" | "negative")
        );
    }
    start(&daemon, "says");
    let is_there = |it: &Value| it["logs"].as_array().is_some_and(|lines| lines.len() == 2);
    let found = when(&daemon, "says", "heard", is_there);
    assert_eq!(found["logs"][0]["text"], "one?[2J line");
    assert!(worker(&daemon, "garbage")["logs"].to_string().contains("loading model"));
}

#[test]
fn one_that_prints_all_the_while_is_asked_to_end_all_the_same() {
    let daemon = daemon();
    ready(&daemon, "chatters");
    when(&daemon, "chatters", "at it", |it| it["faultCount"].as_u64() > Some(10_000));
    let ended = daemon.delete("/api/workers/chatters").data(200);
    assert_eq!(ended["lastExit"]["code"], 0, "it was asked before it was killed: {ended}");
}

#[test]
fn an_answer_that_cannot_be_read_is_an_answer() {
    let daemon = daemon();
    ready(&daemon, "misshapen");
    let body = json!({ "action": "echo", "data": {}, "timeoutSeconds": 60 });
    let error = daemon.post("/api/workers/misshapen/call", &body).error("WORKER_FAILED");
    assert!(error["message"].as_str().is_some_and(|it| it.contains("no object")), "{error}");
    assert_eq!(worker(&daemon, "misshapen")["faultCount"], 1);
}

#[test]
fn one_that_joined_ends_with_its_process_whatever_it_forked() {
    let daemon = daemon();
    let script = "import os, socket, sys, time\n\
        s = socket.socket(socket.AF_UNIX)\n\
        s.connect(sys.argv[1])\n\
        s.sendall(b'{\"event\":\"join\",\"data\":{\"name\":\"forked\"}}\\n')\n\
        s.recv(1)\n\
        parent = os.getpid()\n\
        if os.fork() == 0:\n    print(os.getpid(), flush=True)\n    os.kill(parent, 9)\n    time.sleep(600)\n\
        time.sleep(600)\n";
    let mut process = std::process::Command::new("python3")
        .args(["-c", script])
        .arg(daemon.socket())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("python3");
    let mut child = String::new();
    BufReader::new(process.stdout.take().expect("a pipe")).read_line(&mut child).expect("a line");
    process.wait().expect("it was killed");
    let ended = when(&daemon, "forked", "ended", |it| it["state"] == "Exited");
    assert_eq!(ended["lastExit"]["reason"], "its process ended");
    let child = rustix::process::Pid::from_raw(child.trim().parse().expect("a pid")).expect("a pid");
    rustix::process::kill_process(child, rustix::process::Signal::KILL).expect("it is there still");
}

#[test]
fn a_worker_that_only_prints_is_ended() {
    let daemon = daemon();
    start(&daemon, "floods");
    let found = when(&daemon, "floods", "ended", |it| !it["lastExit"].is_null());
    assert!(found["lastExit"]["reason"].as_str().is_some_and(|it| it.contains("no frames")), "{found}");
}

#[test]
fn a_worker_that_ends_too_often_is_given_up() {
    let daemon = daemon();
    for mode in ["exits", "half", "newer", "missing", "dies"] {
        daemon.post("/api/workers", &json!({ "program": mode })).data(201);
    }
    let failed = |it: &Value| it["state"] == "Failed";
    let found = when(&daemon, "exits", "given up", failed);
    assert_eq!((&found["lastExit"]["code"], &found["restartCount"]), (&json!(0), &json!(4)));
    assert_eq!(when(&daemon, "dies", "given up", failed)["lastExit"]["signal"], 9);
    let found = when(&daemon, "missing", "given up", failed);
    let reason = found["lastExit"]["reason"].as_str().expect("a reason");
    assert!(reason.contains("could not be started: /there/is/no/such/program"), "{reason}");
    assert!(when(&daemon, "half", "given up", failed)["lastFault"]["message"].to_string().contains("midst"));
    let found = when(&daemon, "newer", "given up", failed);
    assert!(found["lastExit"]["reason"].as_str().is_some_and(|it| it.contains("version 99")), "{found}");
    daemon.delete("/api/workers/exits").data(200);
    daemon.get("/api/workers/exits").error("NOT_FOUND");
}

#[test]
fn one_that_never_answers_or_reads_is_unresponsive_and_then_ended() {
    let daemon = daemon();
    for mode in ["silent", "deaf"] {
        let started = json!({ "program": mode, "heartbeatSeconds": 1, "restart": "Never" });
        daemon.post("/api/workers", &started).data(201);
    }
    when(&daemon, "deaf", "ready", |it| it["state"] == "Ready");
    // What it does not read is kept up to a bound, and nobody else notices.
    let much = json!({ "action": "echo", "data": { "text": "x".repeat(900_000) }, "timeoutSeconds": 1 });
    daemon.post("/api/workers/deaf/call", &much).error("TIMEOUT");
    when(&daemon, "silent", "unresponsive", |it| it["state"] == "Unresponsive");
    assert_eq!(call(&daemon, "silent", &json!({ "a": 1 }))["a"], 1);
    for mode in ["silent", "deaf"] {
        let found = when(&daemon, mode, "ended", |it| it["state"] == "Exited");
        let reason = found["lastExit"]["reason"].as_str().expect("a reason");
        assert!(reason.contains("did not answer 6 heartbeats"), "{reason}");
    }
}

#[test]
fn one_that_hangs_when_it_is_to_end_is_killed_with_all_that_it_started() {
    let daemon = daemon();
    let there = ready(&daemon, "hangs");
    call(&daemon, "hangs", &json!({ "fork": true }));
    let children = format!("/proc/{0}/task/{0}/children", there["pid"]);
    let child: Value = std::fs::read_to_string(children).expect("children").trim().parse().expect("one");
    assert!(lives(&child));
    let stopped = daemon.delete("/api/workers/hangs").data(200);
    assert_eq!(stopped["lastExit"]["signal"], 9, "{stopped}");
    assert!(stopped["lastExit"]["reason"].as_str().is_some_and(|it| it.contains("asked to")), "{stopped}");
    wait_for("its child to be gone", || (!lives(&child)).then_some(()));
}

#[test]
fn one_that_forks_and_dies_leaves_nothing() {
    let daemon = daemon();
    ready(&daemon, "forks");
    let there = worker(&daemon, "forks");
    let children = format!("/proc/{0}/task/{0}/children", there["pid"]);
    let child: Value = std::fs::read_to_string(children).expect("children").trim().parse().expect("one");
    let body = json!({ "action": "echo", "data": { "end": 3 } });
    daemon.post("/api/workers/forks/call", &body).error("UNAVAILABLE");
    let after = when(&daemon, "forks", "ended", |it| !it["lastExit"].is_null());
    assert_eq!(after["lastExit"]["code"], 3);
    wait_for("its child to be gone", || (!lives(&child)).then_some(()));
}

#[test]
fn the_death_of_a_worker_frees_what_it_held() {
    let daemon = daemon();
    let there = ready(&daemon, "good");
    let owner = "worker:good";
    let mine = daemon.allocated(&json!({ "sizeBytes": MIB, "owner": owner, "leaseSeconds": 3600 }));
    let kept = daemon.allocated(&json!({ "sizeBytes": MIB, "owner": owner, "persistent": true }));
    let others = daemon.allocated(&json!({ "sizeBytes": MIB, "owner": "worker:goodness" }));
    let reservation = json!({ "sizeBytes": MIB, "pid": there["pid"], "deviceId": "sim:0" });
    let room = daemon.post("/api/memory/reservations", &reservation).data(201)["allocationId"].clone();
    let mut events = daemon.events(None);
    let pid = there["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a pid");
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("killed");
    let killed = Instant::now();
    let mut ended = Vec::new();
    let exited = loop {
        let (_, kind, data) = events.next().expect("an event");
        match kind.as_str() {
            "lease.ended" => ended.push(data["data"]["allocationId"].clone()),
            "worker.exited" => break data,
            _ => {}
        }
    };
    // No figure, but far from any timer: nothing here waits for a tick.
    assert!(killed.elapsed() < Duration::from_secs(10));
    assert_eq!(exited["data"]["exit"]["signal"], 9, "{exited}");
    assert_eq!(exited["data"]["state"], "Restarting");
    assert!(ended.contains(&json!(mine)) && ended.contains(&room), "{ended:?}");
    let left: Vec<_> = daemon.allocations().iter().map(|it| it["allocationId"].clone()).collect();
    assert!(left.contains(&json!(kept)) && left.contains(&json!(others)), "{left:?}");
    when(&daemon, "good", "back", |it| it["state"] == "Ready" && it["restartCount"] == 1);
}

#[test]
fn a_worker_is_held_to_its_limit() {
    let daemon = daemon();
    let body = json!({ "program": "good", "memoryLimitBytes": 512 * MIB });
    daemon.post("/api/workers", &body).data(201);
    let there = when(&daemon, "good", "ready", |it| it["state"] == "Ready");
    let limit = &there["limit"];
    assert_eq!(limit["bytes"], 512 * MIB);
    match limit["kind"].as_str() {
        Some("DataSegment") => {
            let limits = std::fs::read_to_string(format!("/proc/{}/limits", there["pid"])).expect("limits");
            let line = limits.lines().find(|line| line.starts_with("Max data size")).expect("that limit");
            assert!(line.contains(&(512 * MIB).to_string()) && limit["note"].is_string(), "{line}");
        }
        Some("ControlGroup") => {
            let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", there["pid"])).expect("groups");
            assert!(groups.contains("vramd-worker-"), "{groups}");
        }
        _ => panic!("nothing holds it: {limit}"),
    }
    let body = json!({ "program": "holds", "memoryLimitBytes": 40 * MIB, "restart": "Never" });
    daemon.post("/api/workers", &body).data(201);
    let ended = when(&daemon, "holds", "ended", |it| it["lastExit"].is_object());
    if limit["kind"] == "ControlGroup" {
        let reason = ended["lastExit"]["reason"].as_str().expect("a reason");
        assert!(reason.ends_with("its processes reached their limit of 40.0 MiB"), "{reason}");
    }
}

#[test]
fn a_configuration_with_two_workers_of_one_name_is_refused_before_any_begins() {
    let home = Home::new();
    let one: StartWorker =
        serde_json::from_value(json!({ "program": "good", "name": "one" })).expect("a worker");
    let refused = std::panic::catch_unwind(|| daemon_in(&home, vec![one.clone(), one]));
    assert!(refused.is_err(), "it does not start");
}

#[test]
fn a_worker_joins_over_the_socket_and_its_connection_is_its_life() {
    let daemon = daemon();
    let join = |text: &str| {
        let mut stream = Stream::connect(daemon.socket()).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        writeln!(stream, "{text}").expect("written");
        BufReader::new(stream)
    };
    let line = |stream: &mut BufReader<Stream>| -> Value {
        let mut line = String::new();
        stream.read_line(&mut line).expect("a line");
        serde_json::from_str(&line).unwrap_or(Value::Null)
    };
    for bad in [
        "{\"event\": \"join\"}",
        "{\"event\": \"join\", \"data\": {\"name\": \"a b\"}}",
        "{\"event\": \"join\", \"data\": {\"name\": \"a\", \"device_id\": \"cuda:9\"}}",
        "{\"request_id\": \"1\", \"success\": true}",
        "{ no json",
    ] {
        let mut stream = join(bad);
        let told = line(&mut stream);
        assert_eq!(told["event"], "refused", "{bad}: {told}");
        assert!(told["data"]["hint"].is_string(), "{bad}: {told}");
        assert_eq!(line(&mut stream), Value::Null, "{bad}: it is closed");
    }
    assert_eq!(daemon.get("/api/workers").data(200)["workers"], json!([]));

    let greet = |stream: &mut BufReader<Stream>| {
        let hello = line(stream);
        assert_eq!((&hello["action"], &hello["data"]["versions"]), (&json!("hello"), &json!([1])), "{hello}");
        let data = json!({ "version": 1, "actions": ["ping"], "framework": "none 1.0" });
        let reply = json!({ "request_id": hello["request_id"], "success": true, "data": data });
        writeln!(stream.get_mut(), "{reply}").expect("written");
        hello["data"].clone()
    };
    let mut first = join("{\"event\": \"join\", \"data\": {\"name\": \"mine\", \"device_id\": \"sim:0\"}}");
    let hello = greet(&mut first);
    assert_eq!((&hello["name"], &hello["device_id"]), (&json!("mine"), &json!("sim:0")));
    let there = when(&daemon, "mine", "ready", |it| it["state"] == "Ready");
    assert_eq!((&there["pid"], &there["program"]), (&json!(std::process::id()), &Value::Null));
    assert_eq!(there["framework"], "none 1.0");
    let mut second = join("{\"event\": \"join\", \"data\": {\"name\": \"mine\"}}");
    assert_eq!(greet(&mut second)["name"], "mine-2");
    drop(first);
    let ended = when(&daemon, "mine", "ended", |it| it["state"] == "Exited");
    assert_eq!(ended["lastExit"]["reason"], "it closed the connection");
    // It comes back as itself.
    let mut again = join("{\"event\": \"join\", \"data\": {\"name\": \"mine\"}}");
    greet(&mut again);
    when(&daemon, "mine", "back", |it| it["state"] == "Ready");
    assert_eq!(daemon.get("/api/workers").data(200)["workers"].as_array().map(Vec::len), Some(2));
}

#[test]
fn configured_workers_begin_with_the_daemon_and_end_with_it() {
    let home = Home::new();
    let one: StartWorker = serde_json::from_value(json!({
        "program": "good", "name": "one", "environment": { "ANYTHING": "set by who configures" },
    }))
    .expect("a worker");
    let daemon = daemon_in(&home, vec![one]);
    let there = when(&daemon, "one", "ready", |it| it["state"] == "Ready");
    drop(daemon);
    assert!(!lives(&there["pid"]), "it ends with the daemon");
}

#[test]
fn what_a_worker_takes_is_charged_to_it_once() {
    let daemon = daemon();
    ready(&daemon, "holds");
    let mine = |it: &Value| {
        it["memory"].as_array().and_then(|all| all.iter().find(|one| one["deviceId"] == "cpu:0").cloned())
    };
    let has = |it: &Value| mine(it).is_some_and(|one| one["measuredBytes"].as_u64() >= Some(64 * MIB));
    when(&daemon, "holds", "measured", has);
    let status = daemon
        .status_when("cpu:0", "its bytes to be workers'", |it| it["workerBytes"].as_u64() >= Some(64 * MIB));
    let sum: u64 = ["foreignBytes", "workerBytes", "allocatedBytes", "poolFreeBytes", "reservedBytes"]
        .iter()
        .filter_map(|figure| status[*figure].as_u64())
        .sum();
    assert_eq!(status["usedBytes"], sum, "{status}");
    daemon.delete("/api/workers/holds").data(200);
    assert_eq!(daemon.status("cpu:0")["workerBytes"], 0);
}

#[test]
fn what_a_worker_started_is_measured_with_it_and_what_they_share_once() {
    let daemon = daemon();
    ready(&daemon, "wrapped");
    let measured = |it: &Value| it["memory"][0]["measuredBytes"].as_u64();
    let seen = when(&daemon, "wrapped", "measured", |it| measured(it) >= Some(64 * MIB));
    assert!(measured(&seen) < Some(112 * MIB), "{seen}");
    daemon.delete("/api/workers/wrapped").data(200);
    assert_eq!(daemon.status("cpu:0")["workerBytes"], 0);
}
