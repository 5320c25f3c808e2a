//! Moves and copies that meet something else: a load, a release, a cancel, a reader, a clearing.

use serde_json::{Value, json};
use vramd_device::Call;

use crate::moves::{all_released, contents, fill, fragmented};
use crate::support::{Daemon, Home, MIB, caught, payload, wait_for, with_model, write_model};

pub fn begun(daemon: &Daemon, body: &Value) -> String {
    let answer = daemon.post("/api/memory/transfer", body);
    // 200 if it has ended already.
    let status = if answer.status == 200 { 200 } else { 202 };
    answer.data(status)["operationId"].as_str().expect("an id").to_owned()
}

pub fn allocated_on(daemon: &Daemon, device: &str, body: &Value) -> String {
    let answer = daemon.post(&format!("/api/memory/allocations/allocate/{device}"), body).data(201);
    answer["allocationId"].as_str().expect("an id").to_owned()
}

#[test]
fn what_a_load_is_filling_is_not_moved() {
    let home = Home::new();
    let daemon = home.start(&[64 * MIB]);
    // Four fit into one segment; the fifth has one of its own, and would fit where the second was.
    let names = ["a", "b", "c", "d", "e"];
    for name in names {
        write_model(&home.path(&format!("models/{name}.safetensors")), "w", 900_000);
        daemon.register(name, &format!("{name}.safetensors"));
    }
    for name in &names[..4] {
        daemon.loaded(name, "sim:0");
    }
    let reads = daemon.faults[0].hold(Call::FillFromFile);
    let load = daemon.load("e", &json!({"deviceId": "sim:0"}));
    caught(&reads, Call::FillFromFile);
    daemon.unloaded("b");
    let packed = daemon.post("/api/memory/operations/defragment?wait=30", &json!({})).data(200);
    let device = &packed["result"]["devices"][0];
    assert_eq!((&packed["state"], &device["fixed"][0]["reason"]), (&json!("Completed"), &json!("written")));
    drop(reads);
    assert_eq!(daemon.ended(&load)["state"], "Completed");
    let reader = daemon.attach(&json!({"model": "e"})).expect("attached");
    let block = &reader.attached.block;
    assert_eq!(contents(&reader.descriptors[0], block.offset, 900_000), payload(900_002, 7)[..900_000]);
    drop(reader);
    // From then on it may.
    wait_for("it to be packed", || {
        let packed = daemon.post("/api/memory/operations/defragment?wait=30", &json!({})).data(200);
        (packed["result"]["devices"][0]["after"]["segmentCount"] == 1).then_some(())
    });
}

#[test]
fn a_load_that_fails_in_shared_segments_gives_all_of_them_back() {
    let (daemon, _) = with_model(&[64 * MIB], 900_000);
    let path = daemon.home.path("models/tiny.safetensors");
    let components = json!({"a": {"path": path}, "b": {"path": path}, "c": {"path": path}});
    daemon.post("/api/models", &json!({"name": "parts", "components": components})).data(201);
    daemon.faults[0].fail(Call::FillFromFile, 1, vramd_device::sim::Fault::Native);
    assert_eq!(daemon.ended(&daemon.load("parts", &json!({})))["state"], "Failed");
    daemon.all_is_back("sim:0");
    assert_eq!(daemon.ended(&daemon.load("parts", &json!({})))["state"], "Completed");
}

#[test]
fn a_cancel_reaches_what_becomes_ready_after_it() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let ids: Vec<_> =
        (0..2).map(|_| allocated_on(&daemon, "sim:0", &json!({"sizeBytes": 8 * MIB}))).collect();
    let items: Vec<_> = ids.iter().map(|id| json!({"allocationId": id})).collect();
    // The first piece goes at once; the next one would have its turn in twelve days.
    let body = json!({"items": items, "targetDeviceId": "sim:1", "maxBytesPerSecond": 1});
    let creates = daemon.faults[1].hold(Call::Create);
    let operation = begun(&daemon, &body);
    caught(&creates, Call::Create);
    daemon.delete(&format!("/api/memory/transfer/{operation}")).data(202);
    daemon.post(&format!("/api/operations/{operation}/pause"), &json!({})).error("CONFLICT");
    drop(creates);
    assert_eq!(daemon.ended(&operation)["state"], "Cancelled");
    daemon.all_is_back("sim:1");
    all_released(&daemon, &ids, "sim:0");
}

#[test]
fn a_persistent_allocation_that_is_deleted_while_it_moves_stays_deleted() {
    let home = Home::new();
    let daemon = home.start(&[64 * MIB, 64 * MIB]);
    for _ in 0..40 {
        let id = allocated_on(&daemon, "sim:0", &json!({"sizeBytes": 4 * MIB, "persistent": true}));
        let body = json!({"items": [{"allocationId": id}], "targetDeviceId": "sim:1"});
        let operation = begun(&daemon, &body);
        // Before, during or after its move, by how busy the machine is.
        daemon.release(&id).data(200);
        daemon.ended(&operation);
    }
    daemon.all_is_back("sim:0");
    daemon.all_is_back("sim:1");
    let daemon = daemon.stop().start(&[64 * MIB, 64 * MIB]);
    assert_eq!(daemon.allocations(), Vec::<Value>::new());
}

#[test]
fn moving_one_component_leaves_the_others_known_after_a_restart() {
    let home = Home::new();
    let daemon = home.start(&[64 * MIB, 64 * MIB]);
    let path = home.path("models/tiny.safetensors");
    write_model(&path, "w", 100_000);
    let components = json!({"unet": {"path": path}, "vae": {"path": path}});
    daemon.post("/api/models", &json!({"name": "sdxl", "components": components})).data(201);
    daemon.loaded("sdxl", "sim:0");
    let item = json!([{"model": "sdxl", "component": "unet"}]);
    let moved = daemon.ended(&begun(&daemon, &json!({"items": item, "targetDeviceId": "sim:1"})));
    assert_eq!(moved["state"], "Completed", "{moved:#}");
    let daemon = daemon.stop().start(&[64 * MIB, 64 * MIB]);
    wait_for("both to be back where they were", || {
        let components = daemon.model("sdxl")["components"].clone();
        let on = |at: usize| {
            let residency = &components[at]["residency"];
            (residency.as_array()?.len() == 1 && residency[0]["state"] == "Resident")
                .then(|| residency[0]["deviceId"].clone())
        };
        (on(0)? == "sim:1" && on(1)? == "sim:0").then_some(())
    });
}

#[test]
fn a_component_that_is_attached_while_it_moves_stays_where_it_is() {
    let (daemon, _) = with_model(&[64 * MIB, 64 * MIB], 3 << 20);
    daemon.loaded("tiny", "sim:0");
    let writes = daemon.faults[1].hold(Call::Write);
    let operation = begun(&daemon, &json!({"items": [{"model": "tiny"}], "targetDeviceId": "sim:1"}));
    caught(&writes, Call::Write);
    let reader = daemon.attach(&json!({"model": "tiny", "deviceId": "sim:0"})).expect("attached");
    drop(writes);
    let ended = daemon.ended(&operation);
    assert_eq!((&ended["state"], &ended["error"]["code"]), (&json!("Failed"), &json!("CONFLICT")));
    let residency = daemon.residency("tiny");
    assert_eq!((residency.len(), &residency[0]["deviceId"]), (1, &json!("sim:0")), "{residency:#?}");
    daemon.all_is_back("sim:1");
    drop(reader);
}

#[test]
fn the_time_of_a_copy_begins_when_it_is_whole() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let id = allocated_on(&daemon, "sim:0", &json!({"sizeBytes": 8 * MIB, "leaseSeconds": 100}));
    let writes = daemon.faults[1].hold(Call::Write);
    let item = json!([{"allocationId": id}]);
    let operation = begun(&daemon, &json!({"items": item, "targetDeviceId": "sim:1", "mode": "copy"}));
    caught(&writes, Call::Write);
    daemon.settle();
    drop(writes);
    let ended = daemon.ended(&operation);
    let copy = ended["result"]["items"][0]["copyAllocationId"].as_str().expect("an id");
    let shown = daemon.get(&format!("/api/memory/allocation/{copy}")).data(200);
    let time = |at: &Value| at.as_str().expect("a time").parse::<jiff::Timestamp>().expect("a time");
    let left = time(&shown["leases"][0]["expiresAt"]).duration_since(time(&ended["finishedAt"]));
    assert_eq!(left.as_secs(), 100, "{shown:#}");
}

#[test]
fn a_second_release_leaves_the_first_one_its_answer() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let id = allocated_on(&daemon, "sim:0", &json!({"sizeBytes": 8 * MIB}));
    let writes = daemon.faults[1].hold(Call::Write);
    let operation = begun(&daemon, &json!({"items": [{"allocationId": id}], "targetDeviceId": "sim:1"}));
    caught(&writes, Call::Write);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| daemon.release(&id));
        wait_for("the release to be under way", || {
            let shown = daemon.get(&format!("/api/memory/allocation/{id}")).data(200);
            shown["leases"].as_array()?.iter().all(|lease| lease["kind"] == "operation").then_some(())
        });
        daemon.release(&id).error("CONFLICT");
        drop(writes);
        first.join().expect("an answer").data(200);
    });
    assert_eq!(daemon.ended(&operation)["state"], "Failed");
    daemon.all_is_back("sim:0");
}

#[test]
fn what_only_a_process_keeps_is_cleared_by_force() {
    let daemon = Daemon::start(&[64 * MIB]);
    let id = daemon.allocated(&json!({"sizeBytes": 2 * MIB, "owner": "one", "leaseSeconds": 1}));
    let reader = daemon.attach(&json!({"allocationId": id})).expect("attached");
    wait_for("its time to be over", || {
        let shown = daemon.get(&format!("/api/memory/allocation/{id}")).data(200);
        (shown["leases"].as_array()?.len() == 1).then_some(())
    });
    let body = json!({"what": "Allocations", "owner": "one", "force": true});
    let cleared = daemon.post("/api/memory/operations/clear?wait=30", &body).data(200);
    assert_eq!(
        (&cleared["state"], &cleared["result"]["acknowledgedBytes"]),
        (&json!("Completed"), &json!(2 * MIB)),
        "{cleared:#}"
    );
    daemon.all_is_back("sim:0");
    drop(reader);
}

#[test]
fn a_waiting_request_has_the_device_packed_once_its_room_has_come_up_in_pieces() {
    // Three shared segments, and no room for 8 MiB even if they were packed.
    let daemon = Daemon::start(&[12 * MIB]);
    let ids: Vec<_> = (0..39).map(|_| daemon.allocated(&json!({"sizeBytes": 300 << 10}))).collect();
    let waiting = daemon.begin(
        "/api/memory/allocations/allocate",
        &[],
        &json!({"sizeBytes": 8 * MIB, "onShortage": "wait", "timeoutSeconds": 60}),
    );
    daemon.settle();
    assert!(!waiting.is_answered());
    let mut kept = Vec::new();
    for (number, id) in ids.into_iter().enumerate() {
        if number % 4 == 0 { kept.push(id) } else { drop(daemon.release(&id).data(200)) }
    }
    let id = waiting.answer().data(201)["allocationId"].as_str().expect("an id").to_owned();
    kept.push(id);
    all_released(&daemon, &kept, "sim:0");
}

#[test]
fn allocations_and_releases_add_up_whatever_moves_and_loads() {
    let (daemon, _) = with_model(&[64 * MIB, 64 * MIB], 900_000);
    let mut events = daemon.events(None);
    let kept = fragmented(&daemon, 2);
    let written = payload(300 << 10, 1);
    fill(&daemon, &kept[0], &written);
    daemon.post("/api/memory/operations/defragment?wait=30", &json!({})).data(200);
    daemon.loaded("tiny", "sim:0");
    daemon.ended(&begun(&daemon, &json!({"items": [{"model": "tiny"}], "targetDeviceId": "sim:1"})));
    daemon.unloaded("tiny");
    all_released(&daemon, &kept, "sim:0");
    daemon.delete("/api/models/tiny").data(200);
    let (mut live, mut told) = (std::collections::BTreeSet::new(), 0);
    loop {
        let (_, kind, event) = events.next().expect("an event");
        let id = event["data"]["allocationId"].as_str().unwrap_or_default().to_owned();
        match kind.as_str() {
            "allocation.created" => assert!(live.insert(id), "{event:#}"),
            "allocation.released" => assert!(live.remove(&id), "{event:#}"),
            "allocation.moved" => assert!(live.contains(&id), "{event:#}"),
            "model.removed" => break,
            _ => continue,
        }
        told += 1;
    }
    assert_eq!((live.len(), told > 56), (0, true), "{live:?} {told}");
}
