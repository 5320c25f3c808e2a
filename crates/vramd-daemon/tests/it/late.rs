//! What comes late: a release of what is being copied to, a reader that has not followed, a daemon that stops meanwhile.

use std::sync::Arc;

use serde_json::json;
use vramd_daemon::Devices;
use vramd_device::{Call, Device, cpu, sim};

use crate::meetings::{allocated_on, begun};
use crate::moves::{all_released, behind, contents, defragment};
use crate::support::{Daemon, Home, MIB, caught, wait_for, write_model};

const KIB: u64 = 1 << 10;

#[test]
fn a_copy_whose_target_is_released_is_given_up() {
    for persistent in [false, true] {
        let home = Home::new();
        let daemon = home.start(&[64 * MIB, 64 * MIB]);
        let id = allocated_on(&daemon, "sim:0", &json!({"sizeBytes": MIB, "persistent": persistent}));
        // All of its pieces are under way: it is too late to cancel it.
        let writes = daemon.faults[1].hold(Call::Write);
        let item = json!([{"allocationId": id}]);
        let operation = begun(&daemon, &json!({"items": item, "targetDeviceId": "sim:1", "mode": "copy"}));
        caught(&writes, Call::Write);
        let copy = wait_for("the copy to be shown", || {
            let all = daemon.allocations();
            let copy = all.iter().find(|one| one["deviceId"] == "sim:1")?;
            copy["allocationId"].as_str().map(str::to_owned)
        });
        std::thread::scope(|scope| {
            let release = scope.spawn(|| daemon.release(&copy));
            daemon.settle();
            drop(writes);
            release.join().expect("an answer").data(200);
        });
        let ended = daemon.ended(&operation);
        assert_eq!((&ended["state"], &ended["error"]["code"]), (&json!("Failed"), &json!("CONFLICT")));
        daemon.all_is_back("sim:1");
        daemon.release(&id).data(200);
        let daemon = daemon.stop().start(&[64 * MIB, 64 * MIB]);
        assert_eq!(daemon.allocations(), Vec::<serde_json::Value>::new());
    }
}

#[test]
fn what_has_moved_to_another_type_of_memory_is_there_after_a_restart() {
    let devices = || {
        let mut devices = Devices::default();
        let host = cpu::Device::open(cpu::Options::default()).expect("host memory");
        let simulated = sim::Device::open(sim::Spec::new(0, 64 * MIB)).expect("a device");
        for device in [Arc::new(host) as Arc<dyn Device>, Arc::new(simulated)] {
            devices.add(device, 64 * MIB);
        }
        devices
    };
    let home = Home::new();
    let daemon = home.start_on(devices(), Vec::new());
    let id = daemon.allocated(&json!({"sizeBytes": MIB, "persistent": true, "memoryType": "RAM"}));
    let moved = begun(&daemon, &json!({"items": [{"allocationId": id}], "targetDeviceId": "sim:0"}));
    assert_eq!(daemon.ended(&moved)["state"], "Completed");
    let daemon = daemon.stop().start_on(devices(), Vec::new());
    let shown = wait_for("it to be back", || {
        let answer = daemon.get(&format!("/api/memory/allocation/{id}"));
        (answer.status == 200).then(|| answer.data(200))
    });
    assert_eq!(shown["deviceId"], "sim:0");
    all_released(&daemon, &[id], "sim:0");
}

#[test]
fn what_a_reader_has_not_followed_is_not_written_to() {
    let daemon = Daemon::start(&[64 * MIB]);
    let (kept, last, written, reader) = behind(&daemon);
    defragment(&daemon, &json!({}));
    let pid = json!(std::process::id());
    let write = json!({"allocationId": last, "access": "write"});
    match daemon.attach(&write) {
        Err(vramd_attach::AttachError::Api(refused)) => {
            assert_eq!(
                (refused.code, &refused.details["holders"][0]["pid"]),
                (vramd_api::ErrorCode::Conflict, &pid)
            );
        }
        other => panic!("it was granted: {other:?}"),
    }
    let copy = json!({"sourceAllocationId": kept[0], "targetAllocationId": last, "sizeBytes": 1});
    assert_eq!(daemon.post("/api/memory/copy", &copy).error("CONFLICT")["details"]["holders"][0]["pid"], pid);
    let zero = json!({"what": "Zero", "allocationId": last, "force": true});
    assert_eq!(
        daemon.post("/api/memory/operations/clear", &zero).error("CONFLICT")["details"]["holders"][0]["pid"],
        pid
    );
    assert_eq!(contents(&reader.descriptors[0], reader.attached.block.offset, 300 * KIB), written);
    drop(reader);
    wait_for("the reader to be gone", || daemon.attach(&write).ok());
    all_released(&daemon, &kept, "sim:0");
}

#[test]
fn a_daemon_that_stops_leaves_what_is_mapped_as_it_is() {
    let daemon = Daemon::start(&[64 * MIB]);
    // One reads where it was, one where it is.
    let (_, last, written, old) = behind(&daemon);
    defragment(&daemon, &json!({}));
    let reader = daemon.attach(&json!({"allocationId": last})).expect("attached");
    assert_ne!(old.attached.generation, reader.attached.generation);
    // While anything is under way, the driver runs on.
    let samples = daemon.faults[0].hold(Call::Sample);
    caught(&samples, Call::Sample);
    let mut readers = [old, reader];
    std::thread::scope(|scope| {
        let stopped = scope.spawn(|| drop(daemon.stop()));
        for reader in &mut readers {
            // Moves that nobody answers, and then the end.
            while reader.next_move().expect("the connection ends").is_some() {}
        }
        // What the driver makes of that, it does now.
        std::thread::park_timeout(std::time::Duration::from_millis(200));
        drop(samples);
        stopped.join().expect("no panic");
    });
    for one in &readers {
        assert_eq!(contents(&one.descriptors[0], one.attached.block.offset, 300 * KIB), written);
    }
}

#[test]
fn a_request_is_packed_for_where_that_helps_and_whoever_waits_elsewhere() {
    let daemon = Daemon::start(&[12 * MIB, 6 * MIB]);
    let whole = allocated_on(&daemon, "sim:1", &json!({"sizeBytes": 6 * MIB}));
    let allocate = |device: Option<&str>, bytes: u64| {
        let device = device.map_or_else(String::new, |device| format!("/{device}"));
        let body = json!({"sizeBytes": bytes, "onShortage": "wait", "timeoutSeconds": 60});
        daemon.begin(&format!("/api/memory/allocations/allocate{device}"), &[], &body)
    };
    let first = allocate(Some("sim:1"), 6 * MIB);
    daemon.settle();
    let body = json!({"sizeBytes": 300 * KIB});
    let fragment = || {
        let ids: Vec<_> = (0..39).map(|_| allocated_on(&daemon, "sim:0", &body)).collect();
        let (kept, gone): (Vec<_>, Vec<_>) =
            ids.into_iter().enumerate().partition(|(number, _)| number % 4 == 0);
        for (_, id) in gone {
            daemon.release(&id).data(200);
        }
        kept.into_iter().map(|(_, id)| id).collect::<Vec<_>>()
    };
    let mut kept = fragment();
    // Another waits, for another device.
    let second = allocate(Some("sim:0"), 8 * MIB).answer().data(201);
    assert!(!first.is_answered());
    drop(daemon.release(&whole).data(200));
    let first = first.answer().data(201);
    all_released(&daemon, &[first["allocationId"].as_str().expect("an id").to_owned()], "sim:1");
    kept.push(second["allocationId"].as_str().expect("an id").to_owned());
    all_released(&daemon, &kept, "sim:0");
    // The one with the most in one piece is not the one that packing helps.
    let mut kept = fragment();
    let third = allocate(None, 8 * MIB).answer().data(201);
    assert_eq!(third["deviceId"], "sim:0");
    kept.push(third["allocationId"].as_str().expect("an id").to_owned());
    all_released(&daemon, &kept, "sim:0");
}

#[test]
fn what_is_loaded_beside_an_unload_is_there_after_a_restart() {
    let home = Home::new();
    let daemon = home.start(&[64 * MIB, 64 * MIB]);
    let path = home.path("models/tiny.safetensors");
    write_model(&path, "w", 3_000_000);
    let components = json!({"unet": {"path": path}, "text": {"path": path}});
    daemon.post("/api/models", &json!({"name": "sdxl", "components": components})).data(201);
    let load =
        |component: &str| daemon.load("sdxl", &json!({"deviceId": "sim:0", "components": [component]}));
    assert_eq!(daemon.ended(&load("unet"))["state"], "Completed");
    let writes = daemon.faults[1].hold(Call::Write);
    let item = json!([{"model": "sdxl", "component": "unet"}]);
    let copied = begun(&daemon, &json!({"items": item, "targetDeviceId": "sim:1", "mode": "copy"}));
    wait_for("all of its pieces to be under way", || {
        writes.wait_until_caught(3, std::time::Duration::ZERO).then_some(())
    });
    let unload = daemon.post("/api/models/sdxl/unload", &json!({"deviceId": "sim:0"})).data(202);
    assert_eq!(daemon.ended(&load("text"))["state"], "Completed");
    drop(writes);
    assert_eq!(daemon.ended(&copied)["state"], "Completed", "all of its pieces were under way");
    assert_eq!(daemon.ended(unload["operationId"].as_str().expect("an id"))["state"], "Completed");
    let daemon = daemon.stop().start(&[64 * MIB, 64 * MIB]);
    let residency = |name: &str| {
        let model = daemon.model("sdxl");
        let components = model["components"].as_array().expect("a list");
        let found = components.iter().find(|one| one["name"] == name);
        found.expect("the component")["residency"].as_array().expect("a list").clone()
    };
    wait_for("the text encoder to be back", || {
        residency("text").first().is_some_and(|one| one["state"] == "Resident").then_some(())
    });
    assert_eq!(residency("unet").len(), 1);
    assert_eq!(residency("unet")[0]["deviceId"], "sim:1");
}

#[test]
fn an_empty_segment_that_did_not_go_for_another_goes_later() {
    let daemon = Daemon::start(&[8 * MIB]);
    let small = daemon.allocated(&json!({"sizeBytes": 1000}));
    daemon.release(&small).data(200);
    daemon.status_when("sim:0", "the spare segment", |status| status["usedBytes"] == 4 * MIB);
    daemon.faults[0].fail(Call::Destroy, 0, sim::Fault::Native);
    let whole = json!({"sizeBytes": 8 * MIB});
    daemon.allocate(&whole).error("DEVICE_LOST");
    let id = wait_for("its bytes to be free", || {
        let answer = daemon.allocate(&whole);
        (answer.status == 201)
            .then(|| answer.json()["data"]["allocationId"].as_str().expect("an id").to_owned())
    });
    all_released(&daemon, &[id], "sim:0");
}
