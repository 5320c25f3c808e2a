//! Room beside the weights that processes fill, and what is learned from how much they took.

use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Daemon, Home, MIB, wait_for, write_model};

const PATH: &str = "/api/memory/reservations";

fn reserved(daemon: &Daemon, body: &Value) -> Value {
    daemon.post(PATH, body).data(201)
}

fn id(reservation: &Value) -> &str {
    reservation["allocationId"].as_str().expect("an id")
}

fn released(daemon: &Daemon, reservation: &Value, peak: Option<u64>) -> Value {
    let query = peak.map_or_else(String::new, |bytes| format!("?peakBytes={bytes}"));
    daemon.delete(&format!("/api/memory/allocations/{}{query}", id(reservation))).data(200)
}

fn figures(daemon: &Daemon, of: &[&str]) -> Vec<u64> {
    let status = daemon.status("sim:0");
    of.iter().map(|name| status[*name].as_u64().expect("bytes") / MIB).collect()
}

/// A process that does nothing until it is ended.
fn idler() -> Child {
    let waits = if cfg!(windows) { ("cmd", ["/c", "pause"]) } else { ("sh", ["-c", "read x"]) };
    Command::new(waits.0)
        .args(waits.1)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("a process")
}

#[test]
fn what_a_run_took_is_what_the_next_one_reserves() {
    let daemon = Daemon::start(&[64 * MIB]);
    let run = json!({"deviceId": "sim:0", "model": "sdxl", "shape": [1, 1024, 1024], "sizeBytes": 32 * MIB});
    let unknown = json!({"deviceId": "sim:0", "model": "sdxl", "shape": [1, 1024, 1024]});
    daemon.post(PATH, &unknown).refuses("sizeBytes");
    let first = reserved(&daemon, &run);
    assert_eq!(
        (&first["reservation"]["basis"], &first["blockBytes"]),
        (&json!("estimate"), &json!(32 * MIB))
    );
    assert_eq!(first["allocationType"], "Activation");
    assert_eq!(figures(&daemon, &["reservedBytes", "availableBytes", "allocatedBytes"]), [32, 32, 0]);
    // Nobody gets it meanwhile.
    daemon.allocate(&json!({"sizeBytes": 33 * MIB})).error("INSUFFICIENT_MEMORY");
    let learned = &released(&daemon, &first, Some(20 * MIB))["footprint"];
    assert_eq!((&learned["learnedBytes"], &learned["error"]), (&json!(20 * MIB), &json!(0.6)), "{learned:#}");
    assert_eq!(figures(&daemon, &["reservedBytes", "availableBytes"]), [0, 64]);
    // What was measured goes before what is said, and needs no word at all.
    for body in [&run, &unknown] {
        let next = reserved(&daemon, body);
        assert_eq!(
            (&next["reservation"]["basis"], &next["blockBytes"], &next["reservation"]["learnedBytes"]),
            (&json!("learned"), &json!(20 * MIB), &json!(20 * MIB))
        );
        let released = released(&daemon, &next, None);
        assert_eq!(released["footprint"], Value::Null, "nothing was told or measured");
    }
    // A shape that never ran, by one that did.
    let wide = json!({"deviceId": "sim:0", "model": "sdxl", "shape": [2, 1024, 1024]});
    let next = reserved(&daemon, &wide);
    assert_eq!(
        (&next["reservation"]["basis"], &next["blockBytes"]),
        (&json!("interpolated"), &json!(40 * MIB))
    );
    released(&daemon, &next, Some(50 * MIB));
    let all = daemon.get("/api/memory/footprints?model=sdxl").data(200);
    let learned: Vec<_> =
        all["footprints"].as_array().expect("a list").iter().map(|it| &it["learnedBytes"]).collect();
    assert_eq!(learned, [&json!(20 * MIB), &json!(50 * MIB)], "{all:#}");
    assert_eq!(all["footprints"][1]["error"], json!(-0.2));
    assert_eq!(daemon.get("/api/memory/footprints?model=other").data(200)["footprints"], json!([]));
    // It is known again after a restart.
    let daemon = daemon.stop().start(&[64 * MIB]);
    let again = daemon.get("/api/memory/footprints?model=sdxl").data(200);
    assert_eq!(again, all);
    // Nobody took more than there is.
    let room = reserved(&daemon, &wide);
    for query in ["?peakBytes=67108865", "?peakBytes=18446744073709551615"] {
        daemon.delete(&format!("/api/memory/allocations/{}{query}", id(&room))).refuses("peakBytes");
    }
    let renew = format!("/api/memory/allocation/{}/renew", id(&room));
    daemon.post(&renew, &json!({"usedBytes": 65 * MIB})).refuses("usedBytes");
    released(&daemon, &room, Some(0));
    assert_eq!(daemon.get("/api/memory/footprints?model=sdxl").data(200), all);
}

#[test]
fn what_its_process_takes_of_it_is_charged_once() {
    let daemon = Daemon::start(&[64 * MIB]);
    let sim = daemon.faults[0].clone();
    let mut worker = idler();
    let pid = worker.id();
    sim.set_process_bytes(pid, 6 * MIB);
    let body = json!({"deviceId": "sim:0", "model": "sdxl", "sizeBytes": 32 * MIB, "pid": pid, "heldBytes": 2 * MIB});
    let room = reserved(&daemon, &body);
    // It fills it, beside what it had; a stranger takes some too.
    sim.set_process_bytes(pid, (4 + 20) * MIB);
    sim.set_foreign_bytes(3 * MIB);
    let status = daemon.status_when("sim:0", "20 MiB in use", |it| it["workerBytes"] == json!(20 * MIB));
    let shown =
        ["reservedBytes", "foreignBytes", "availableBytes", "usedBytes"].map(|name| status[name].as_u64());
    assert_eq!(shown, [12, 7, 25, 39].map(|mib| Some(mib * MIB)), "{status:#}");
    // More than it asked for is as foreign as anything.
    sim.set_process_bytes(pid, (4 + 40) * MIB);
    let status = daemon.status_when("sim:0", "all of it in use", |it| it["workerBytes"] == json!(32 * MIB));
    assert_eq!(status["foreignBytes"], json!((3 + 4 + 8) * MIB));
    sim.set_process_bytes(pid, 4 * MIB);
    daemon.status_when("sim:0", "none of it in use", |it| it["workerBytes"] == json!(0));
    let shown = daemon.get(&format!("/api/memory/allocation/{}", id(&room))).data(200);
    assert_eq!(shown["reservation"]["peakBytes"], json!(40 * MIB), "{shown:#}");
    let footprint = released(&daemon, &room, None)["footprint"].clone();
    assert_eq!((&footprint["learnedBytes"], &footprint["error"]), (&json!(40 * MIB), &json!(-0.2)));
    // What its process dies with is over, and nothing is learned from it.
    let room = reserved(&daemon, &body);
    assert_eq!(room["reservation"]["basis"], "learned");
    sim.set_process_bytes(pid, 64 * MIB);
    worker.kill().expect("it is ours");
    worker.wait().expect("it ends");
    sim.set_process_bytes(pid, 0);
    wait_for("the reservation to end", || daemon.allocations().is_empty().then_some(()));
    let footprint = daemon.get("/api/memory/footprints").data(200)["footprints"][0].clone();
    assert_eq!((&footprint["runCount"], &footprint["learnedBytes"]), (&json!(1), &json!(40 * MIB)));
    daemon.post(PATH, &body).refuses("pid");
}

#[test]
fn what_a_process_with_several_takes_is_charged_once_and_learned_if_it_says_what_for() {
    let daemon = Daemon::start(&[64 * MIB]);
    let sim = daemon.faults[0].clone();
    let mut worker = idler();
    let pid = worker.id();
    let body = |size: u64| json!({"deviceId": "sim:0", "model": "sdxl", "shape": [size], "sizeBytes": size * MIB, "pid": pid});
    let one = reserved(&daemon, &body(16));
    sim.set_process_bytes(pid, 8 * MIB);
    daemon.status_when("sim:0", "8 MiB in use", |it| it["workerBytes"] == json!(8 * MIB));
    let two = reserved(&daemon, &body(24));
    sim.set_process_bytes(pid, 30 * MIB);
    let status = daemon.status_when("sim:0", "30 MiB in use", |it| it["workerBytes"] == json!(30 * MIB));
    let shown = ["foreignBytes", "reservedBytes", "availableBytes"].map(|name| status[name].as_u64());
    assert_eq!(shown, [0, 10, 24].map(|mib| Some(mib * MIB)), "{status:#}");
    // It takes more than both together.
    sim.set_process_bytes(pid, 45 * MIB);
    let status = daemon.status_when("sim:0", "both full", |it| it["workerBytes"] == json!(40 * MIB));
    assert_eq!(status["foreignBytes"], json!(5 * MIB));
    sim.set_process_bytes(pid, 30 * MIB);
    daemon.status_when("sim:0", "it to be less again", |it| it["foreignBytes"] == json!(0));
    // What is said of one is not charged to the other.
    let renew = format!("/api/memory/allocation/{}/renew", id(&two));
    daemon.post(&renew, &json!({"usedBytes": 20 * MIB})).data(200);
    daemon.status_when("sim:0", "it to be measured again", |it| it["workerBytes"] == json!(30 * MIB));
    daemon.settle();
    daemon.settle();
    let status = daemon.status("sim:0");
    assert_eq!(
        (&status["workerBytes"], &status["foreignBytes"]),
        (&json!(30 * MIB), &json!(0)),
        "{status:#}"
    );
    // How much was for which, nobody knows who is not told.
    assert_eq!(released(&daemon, &one, None)["footprint"], Value::Null);
    let learned = released(&daemon, &two, Some(12 * MIB))["footprint"]["learnedBytes"].clone();
    assert_eq!(learned, json!(12 * MIB));
    // One that is left when an older one has gone is charged what its process takes then.
    let old = reserved(&daemon, &body(8));
    sim.set_process_bytes(pid, 38 * MIB);
    daemon.status_when("sim:0", "the old one full", |it| it["workerBytes"] == json!(8 * MIB));
    let young = reserved(&daemon, &body(20));
    sim.set_process_bytes(pid, 30 * MIB);
    released(&daemon, &old, None);
    sim.set_process_bytes(pid, 36 * MIB);
    daemon.status_when("sim:0", "the young one in use", |it| it["workerBytes"] == json!(6 * MIB));
    released(&daemon, &young, None);
    worker.kill().expect("it is ours");
    worker.wait().expect("it ends");
    sim.set_process_bytes(pid, 0);
    daemon.all_is_back("sim:0");
}

#[test]
fn what_is_told_goes_before_what_is_measured() {
    let daemon = Daemon::start(&[64 * MIB]);
    let body = json!({"deviceId": "sim:0", "model": "sdxl", "sizeBytes": 32 * MIB, "heldBytes": 4 * MIB});
    let room = reserved(&daemon, &body);
    let renew = |mib: u64| {
        let path = format!("/api/memory/allocation/{}/renew", id(&room));
        daemon.post(&path, &json!({"usedBytes": mib * MIB})).data(200)
    };
    daemon.status_when("sim:0", "what it held", |it| it["workerBytes"] == json!(4 * MIB));
    renew(20);
    daemon.status_when("sim:0", "20 MiB in use", |it| it["workerBytes"] == json!(20 * MIB));
    // Less is true at once: what is free meanwhile is not given out twice.
    assert_eq!(renew(6)["reservation"]["usedBytes"], json!(6 * MIB));
    assert_eq!(renew(6)["reservation"]["peakBytes"], json!(20 * MIB));
    assert_eq!(released(&daemon, &room, None)["footprint"]["learnedBytes"], json!(20 * MIB));
    // What was told wrongly can be forgotten, and what cannot be had goes by what is said.
    released(&daemon, &reserved(&daemon, &body), Some(64 * MIB));
    daemon.put("/api/memory/limits/sim:0", &json!({"limitBytes": 48 * MIB})).data(200);
    let next = reserved(&daemon, &body);
    assert_eq!((&next["reservation"]["basis"], &next["sizeBytes"]), (&json!("estimate"), &json!(32 * MIB)));
    released(&daemon, &next, None);
    let forgotten = daemon.delete("/api/memory/footprints/sdxl").data(200);
    assert_eq!(forgotten["footprints"].as_array().map(Vec::len), Some(1));
    daemon.delete("/api/memory/footprints/sdxl").error("NOT_FOUND");
    daemon.delete("/api/memory/footprints/a%20b").refuses("model");
    assert_eq!(reserved(&daemon, &body)["reservation"]["basis"], "estimate");
}

#[test]
fn a_reservation_that_nobody_releases_teaches_nothing() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let body = json!({"deviceId": "sim:0", "model": "sdxl", "sizeBytes": 8 * MIB, "heldBytes": MIB, "leaseSeconds": 1});
    reserved(&daemon, &body);
    wait_for("its lease to end", || daemon.allocations().is_empty().then_some(()));
    // Nor does one on a device that is lost: it ends with that, so that the device can come back.
    let mut lasting = body.clone();
    (lasting["deviceId"], lasting["leaseSeconds"]) = (json!("sim:1"), json!(600));
    reserved(&daemon, &lasting);
    daemon.faults[1].lose("on demand");
    wait_for("the reservation to end", || daemon.allocations().is_empty().then_some(()));
    daemon.faults[1].come_back();
    wait_for("the device to be back", || {
        (daemon.get("/api/devices/sim:1").data(200)["health"] == "Healthy").then_some(())
    });
    assert_eq!(daemon.get("/api/memory/footprints").data(200)["footprints"], json!([]));
    reserved(&daemon, &lasting);
}

#[test]
fn one_whose_client_hangs_up_or_whose_daemon_stops_before_it_is_there_leaves_nothing() {
    let daemon = Daemon::start(&[64 * MIB]);
    let other = daemon.allocated(&json!({"sizeBytes": 60 * MIB}));
    let body =
        json!({"deviceId": "sim:0", "sizeBytes": 32 * MIB, "pid": std::process::id(), "onShortage": "wait"});
    let waits = daemon.begin(PATH, &[], &body);
    daemon.settle();
    waits.hang_up();
    let stays = daemon.begin(PATH, &[], &body);
    daemon.settle();
    daemon.release(&other).data(200);
    let room = stays.answer().data(201);
    assert_eq!(figures(&daemon, &["reservedBytes", "availableBytes"]), [32, 32]);
    released(&daemon, &room, None);
    daemon.all_is_back("sim:0");
    let full = daemon.allocated(&json!({"sizeBytes": 60 * MIB, "persistent": true}));
    let _waits = daemon.begin(PATH, &[], &body);
    daemon.settle();
    let daemon = daemon.stop().start(&[64 * MIB]);
    daemon.release(&full).data(200);
    daemon.all_is_back("sim:0");
}

#[test]
fn others_go_for_a_reservation_and_never_the_model_that_it_is_for() {
    let daemon = Daemon::start(&[64 * MIB]);
    for name in ["a", "b"] {
        write_model(&daemon.home.path("models").join(format!("{name}.safetensors")), "w", (24 << 20) - 4096);
        daemon.register(name, &format!("{name}.safetensors"));
    }
    // By use alone it would be `a` that goes.
    daemon.loaded("a", "sim:0");
    daemon.loaded("b", "sim:0");
    for _ in 0..5 {
        daemon.post("/api/models/b/touch", &json!({})).data(200);
    }
    let body = json!({"model": "a", "sizeBytes": 32 * MIB, "onShortage": "evict"});
    let room = reserved(&daemon, &body);
    assert_eq!(room["deviceId"], "sim:0", "beside its weights");
    assert_eq!((daemon.residency("a").len(), daemon.residency("b").len()), (1, 0));
    let more = json!({"model": "a", "sizeBytes": 32 * MIB, "onShortage": "evict", "priority": "Critical"});
    daemon.post(PATH, &more).error("INSUFFICIENT_MEMORY");
    assert_eq!(daemon.residency("a").len(), 1);
    // A load waits for it like for anything.
    let load = daemon.load("b", &json!({"deviceId": "sim:0", "onShortage": "wait", "timeoutSeconds": 60}));
    released(&daemon, &room, None);
    assert_eq!(daemon.ended(&load)["state"], "Completed");
}

#[test]
fn without_a_device_it_goes_to_where_it_has_room_and_is_known() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let full =
        daemon.post("/api/memory/allocations/allocate/sim:0", &json!({"sizeBytes": 40 * MIB})).data(201);
    let run = json!({"model": "sdxl", "shape": [1], "sizeBytes": 8 * MIB});
    let room = reserved(&daemon, &run);
    assert_eq!(room["deviceId"], "sim:1");
    let reason = room["placement"]["reason"].as_str().expect("words");
    assert!(reason.contains("the emptiest that has room"), "{reason}");
    released(&daemon, &room, Some(32 * MIB));
    // What is known of one device says nothing of another.
    let (mut here, mut there) = (run.clone(), run.clone());
    here["deviceId"] = json!("sim:1");
    there["deviceId"] = json!("sim:0");
    for (body, bytes) in [(&here, 32), (&there, 8), (&run, 32)] {
        let room = reserved(&daemon, body);
        assert_eq!(room["sizeBytes"], json!(bytes * MIB), "{room:#}");
        released(&daemon, &room, None);
    }
    daemon.release(full["allocationId"].as_str().expect("an id")).data(200);
    // Beside the weights, on whichever of their devices has room.
    let folder = daemon.home.path("models");
    let mut components = json!({});
    for (name, mib) in [("unet", 48), ("vae", 24)] {
        let path = folder.join(format!("{name}.safetensors"));
        write_model(&path, name, (mib << 20) - 4096);
        components[name] = json!({ "path": path });
    }
    daemon.post("/api/models", &json!({"name": "sdxl", "components": components})).data(201);
    assert_eq!(daemon.ended(&daemon.load("sdxl", &json!({"split": true})))["state"], "Completed");
    let vae = daemon.model("sdxl")["components"][1]["residency"][0]["deviceId"].clone();
    let room = reserved(&daemon, &json!({"model": "sdxl", "shape": [9], "sizeBytes": 30 * MIB}));
    assert_eq!(room["deviceId"], vae);
    assert!(room["placement"]["reason"].as_str().is_some_and(|it| it.contains("whose weights are there")));
}

#[test]
fn a_refusal_counts_on_nothing_that_others_have_in_reserve() {
    let daemon = Daemon::start(&[64 * MIB]);
    let limits = json!({"limitBytes": 32 * MIB, "owners": {"them": {"reserveBytes": 20 * MIB}}});
    daemon.put("/api/memory/limits/sim:0", &limits).data(200);
    let refused =
        daemon.post(PATH, &json!({"deviceId": "sim:0", "sizeBytes": 13 * MIB})).error("INSUFFICIENT_MEMORY");
    for figure in ["availableBytes", "largestFreeBytes", "largestAfterEvictionBytes"] {
        assert_eq!(refused["details"][figure], json!(12 * MIB), "{refused:#}");
    }
    reserved(&daemon, &json!({"deviceId": "sim:0", "sizeBytes": 12 * MIB}));
}

#[test]
fn room_has_no_bytes_that_could_be_read_moved_or_attached() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let room = reserved(&daemon, &json!({"deviceId": "sim:0", "sizeBytes": 8 * MIB, "owner": "me"}));
    let room = id(&room);
    let move_it = json!({"items": [{"allocationId": room}], "targetDeviceId": "sim:1"});
    daemon.post("/api/memory/transfer", &move_it).error("CONFLICT");
    let zero = json!({"what": "Zero", "allocationId": room});
    daemon.post("/api/memory/operations/clear", &zero).error("CONFLICT");
    let other = daemon.allocated(&json!({"sizeBytes": 8 * MIB}));
    for (from, to) in [(room, other.as_str()), (other.as_str(), room)] {
        let copy = json!({"sourceAllocationId": from, "targetAllocationId": to});
        daemon.post("/api/memory/copy", &copy).error("CONFLICT");
    }
    assert!(daemon.attach(&json!({"allocationId": room})).is_err());
    daemon.delete(&format!("/api/memory/allocations/{other}?peakBytes=1")).refuses("peakBytes");
    let renew = format!("/api/memory/allocation/{other}/renew");
    daemon.post(&renew, &json!({"usedBytes": 1})).refuses("usedBytes");
    // A lease that is not renewed ends, and with it the room.
    let short = reserved(&daemon, &json!({"deviceId": "sim:1", "sizeBytes": 8 * MIB, "leaseSeconds": 1}));
    assert_eq!(short["status"], "Active");
    wait_for("its lease to end", || (daemon.status("sim:1")["reservedBytes"] == 0).then_some(()));
    let cleared = json!({"what": "Allocations", "owner": "me"});
    daemon.post("/api/memory/operations/clear?wait=10", &cleared).data(200);
    daemon.release(&other).data(200);
    daemon.all_is_back("sim:0");
}

#[test]
fn bad_reservations_are_refused_and_leave_nothing() {
    let daemon = Home::new().start(&[64 * MIB]);
    for (field, body) in [
        ("sizeBytes", json!({})),
        ("sizeBytes", json!({"sizeBytes": 0})),
        ("model", json!({"sizeBytes": 1, "shape": [1]})),
        ("shape", json!({"sizeBytes": 1, "model": "a", "shape": [1, 0]})),
        ("shape", json!({"sizeBytes": 1, "model": "a", "shape": [1, 1, 1, 1, 1, 1, 1, 1, 1]})),
        ("pid", json!({"sizeBytes": 1, "pid": 4_000_000_000_u32})),
        ("leaseSeconds", json!({"sizeBytes": 1, "leaseSeconds": 0})),
        ("timeoutSeconds", json!({"sizeBytes": 1, "timeoutSeconds": 5})),
        ("purpose", json!({"sizeBytes": 1, "purpose": "\u{7}"})),
        ("heldBytes", json!({"sizeBytes": 1, "heldBytes": 65 * MIB})),
    ] {
        daemon.post(PATH, &body).refuses(field);
    }
    daemon.post(PATH, &json!({"sizeBytes": 1, "deviceId": "sim:9"})).error("NOT_FOUND");
    daemon.post(PATH, &json!({"sizeBytes": 1, "model": "a b"})).error("INVALID_ARGUMENT");
    daemon.post(PATH, &json!({"sizeBytes": 1, "persistent": true})).error("INVALID_ARGUMENT");
    let refused =
        daemon.post(PATH, &json!({"deviceId": "sim:0", "sizeBytes": 65 * MIB})).error("INSUFFICIENT_MEMORY");
    assert_eq!(refused["retryable"], false);
    daemon.all_is_back("sim:0");
    assert_eq!(daemon.get("/api/memory/footprints").data(200)["footprints"], json!([]));
}
