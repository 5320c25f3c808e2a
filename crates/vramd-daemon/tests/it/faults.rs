//! Devices that fail: each fault is told by its code, and the books close to the byte.

use serde_json::{Value, json};
use vramd_device::Call;
use vramd_device::sim::Fault;

use crate::support::{Daemon, MIB, caught, wait_for, with_model};

/// Loads, expects the failure, and that nothing of it is left.
fn fails(daemon: &Daemon, code: &str) -> Value {
    let operation = daemon.ended(&daemon.load("tiny", &json!({"deviceId": "sim:0"})));
    assert_eq!(
        (&operation["state"], &operation["error"]["code"]),
        (&json!("Failed"), &json!(code)),
        "{operation:#}"
    );
    assert!(operation["error"]["hint"].is_string(), "{operation:#}");
    assert!(daemon.residency("tiny").is_empty());
    operation
}

#[test]
fn a_load_that_the_device_refuses_leaves_nothing() {
    let (daemon, _) = with_model(&[128 * MIB], 40 << 20);
    let faults = &daemon.faults[0];
    faults.fail(Call::Create, 0, Fault::OutOfMemory);
    fails(&daemon, "INSUFFICIENT_MEMORY");
    daemon.all_is_back("sim:0");
    for (call, after) in
        [(Call::Create, 0), (Call::FillFromFile, 0), (Call::FillFromFile, 1), (Call::FillFromFile, 2)]
    {
        faults.fail(call, after, Fault::Native);
        fails(&daemon, "DEVICE_LOST");
        daemon.all_is_back("sim:0");
    }
    daemon.loaded("tiny", "sim:0");
    daemon.unloaded("tiny");
    daemon.all_is_back("sim:0");
}

#[test]
fn one_component_that_fails_takes_the_others_with_it() {
    let (daemon, _) = with_model(&[64 * MIB], 2 << 20);
    let path = daemon.home.path("models/tiny.safetensors");
    let components: serde_json::Map<_, _> =
        ["a", "b", "c"].into_iter().map(|name| (name.to_owned(), json!({"path": path}))).collect();
    daemon.post("/api/models", &json!({"name": "parts", "components": components})).data(201);
    for (call, after) in [(Call::Create, 1), (Call::Create, 2), (Call::FillFromFile, 1)] {
        daemon.faults[0].fail(call, after, Fault::OutOfMemory);
        let operation = daemon.ended(&daemon.load("parts", &json!({})));
        assert_eq!(operation["state"], "Failed", "{operation:#}");
        for component in daemon.model("parts")["components"].as_array().expect("a list") {
            assert_eq!(component["residency"], json!([]));
        }
        daemon.all_is_back("sim:0");
    }
}

#[test]
fn an_allocation_that_the_device_refuses_leaves_nothing() {
    let daemon = Daemon::start(&[64 * MIB]);
    for (fault, code) in [(Fault::OutOfMemory, "INSUFFICIENT_MEMORY"), (Fault::Native, "DEVICE_LOST")] {
        for size in [4096, 4 * MIB] {
            daemon.faults[0].fail(Call::Create, 0, fault);
            daemon.allocate(&json!({"sizeBytes": size})).error(code);
            daemon.all_is_back("sim:0");
        }
    }
    daemon.allocated(&json!({"sizeBytes": 4 * MIB}));
}

#[test]
fn requests_that_share_a_segment_fail_together_when_it_cannot_be_made() {
    let daemon = Daemon::start(&[64 * MIB]);
    let held = daemon.faults[0].hold(Call::Create);
    let path = "/api/memory/allocations/allocate";
    let waiting: Vec<_> = (0..4).map(|_| daemon.begin(path, &[], &json!({"sizeBytes": 4096}))).collect();
    caught(&held, Call::Create);
    daemon.status_when("sim:0", "the reservations", |status| {
        status["reservedBytes"].as_u64() >= Some(4 * 4096)
    });
    daemon.faults[0].fail(Call::Create, 0, Fault::OutOfMemory);
    drop(held);
    for pending in waiting {
        pending.answer().error("INSUFFICIENT_MEMORY");
    }
    daemon.all_is_back("sim:0");
}

#[test]
fn a_client_that_goes_away_while_its_memory_is_made_leaves_nothing() {
    let daemon = Daemon::start(&[64 * MIB]);
    let held = daemon.faults[0].hold(Call::Create);
    let pending = daemon.begin("/api/memory/allocations/allocate", &[], &json!({"sizeBytes": 8 * MIB}));
    caught(&held, Call::Create);
    daemon.status_when("sim:0", "the reservation", |status| status["reservedBytes"] == 8 * MIB);
    pending.hang_up();
    daemon.settle();
    drop(held);
    daemon.all_is_back("sim:0");
}

#[test]
fn a_lost_device_closes_its_books_and_the_others_go_on() {
    let (daemon, _) = with_model(&[64 * MIB, 64 * MIB], 2 << 20);
    let on = |device: &str, size: u64| {
        let path = format!("/api/memory/allocations/allocate/{device}");
        daemon.post(&path, &json!({"sizeBytes": size})).data(201)["allocationId"]
            .as_str()
            .expect("an id")
            .to_owned()
    };
    let (large, small, other) = (on("sim:0", 4 * MIB), on("sim:0", 4096), on("sim:1", 4 * MIB));
    daemon.loaded("tiny", "sim:0");
    let attachment = daemon.attach(&json!({"model": "tiny"})).expect("attached");
    let mut events = daemon.events(None);
    daemon.faults[0].lose("it fell off the bus");
    let event = events.until("device.lost");
    assert_eq!(event["deviceId"], "sim:0");

    let status = daemon.status("sim:0");
    assert_eq!((&status["health"], &status["healthScore"]), (&json!("Lost"), &json!(0)));
    assert_eq!(daemon.get("/api/devices/sim:0").data(200)["health"], "Lost");
    let path = "/api/memory/allocations/allocate/sim:0";
    daemon.post(path, &json!({"sizeBytes": 4096})).error("DEVICE_LOST");
    daemon.post(path, &json!({"sizeBytes": 4096, "onShortage": "wait"})).error("DEVICE_LOST");
    daemon.post("/api/models/tiny/load", &json!({"deviceId": "sim:0", "components": ["weights"]})).data(200);
    let error = daemon.attach(&json!({"model": "tiny"})).expect_err("it is lost");
    assert!(
        matches!(error, vramd_attach::AttachError::Api(error) if error.code == vramd_api::ErrorCode::DeviceLost)
    );

    // What is on the others is untouched, and new requests go there.
    assert_eq!(daemon.allocate(&json!({"sizeBytes": 4 * MIB})).data(201)["deviceId"], "sim:1");
    daemon.release(&other).data(200);
    drop(attachment);
    events.until("attachment.closed");
    for id in [large, small] {
        daemon.release(&id).data(200);
    }
    daemon.unloaded("tiny");
    daemon.status_when("sim:0", "the books to close", |status| {
        ["allocatedBytes", "reservedBytes", "poolFreeBytes", "allocationCount"]
            .iter()
            .all(|figure| status[figure] == 0)
    });
    daemon.loaded("tiny", "sim:1");

    // It is tried now and then, and taken again when it is back, with nothing on it.
    let mut events = daemon.events(None);
    daemon.faults[0].come_back();
    assert_eq!(events.until("device.returned")["deviceId"], "sim:0");
    daemon.status_when("sim:0", "its figures", |status| {
        status["health"] == "Healthy" && status["availableBytes"] == 64 * MIB
    });
    on("sim:0", 4 * MIB);
    daemon.loaded("tiny", "sim:0");
}

#[test]
fn a_lost_device_that_is_back_waits_until_what_was_on_it_is_released() {
    let daemon = Daemon::start(&[64 * MIB]);
    let id = daemon.allocated(&json!({"sizeBytes": 4096}));
    let mut events = daemon.events(None);
    daemon.faults[0].lose("it fell off the bus");
    events.until("device.lost");
    daemon.faults[0].come_back();
    assert_eq!(daemon.status("sim:0")["health"], "Lost");
    assert_eq!(daemon.allocations().len(), 1);
    daemon.release(&id).data(200);
    events.until("device.returned");
    daemon.all_is_back("sim:0");
}

#[test]
fn a_device_that_is_lost_during_a_load_ends_the_load() {
    let (daemon, _) = with_model(&[128 * MIB, 64 * MIB], 40 << 20);
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let operation = daemon.load("tiny", &json!({"deviceId": "sim:0"}));
    caught(&held, Call::FillFromFile);
    daemon.faults[0].lose("it fell off the bus");
    drop(held);
    let operation = daemon.ended(&operation);
    assert_eq!((&operation["state"], &operation["error"]["code"]), (&json!("Failed"), &json!("DEVICE_LOST")));
    assert!(daemon.residency("tiny").is_empty());
    let status = daemon.status("sim:0");
    assert_eq!((&status["allocatedBytes"], &status["reservedBytes"]), (&json!(0), &json!(0)));
    daemon.loaded("tiny", "sim:1");
}

#[test]
fn a_file_that_shrinks_while_it_is_read_fails_the_load() {
    let (daemon, _) = with_model(&[128 * MIB], 40 << 20);
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let operation = daemon.load("tiny", &json!({}));
    caught(&held, Call::FillFromFile);
    let file = std::fs::File::options()
        .write(true)
        .open(daemon.home.path("models/tiny.safetensors"))
        .expect("the file");
    file.set_len(1 << 20).expect("cut");
    drop(held);
    let operation = daemon.ended(&operation);
    assert_eq!(
        (&operation["state"], &operation["error"]["code"]),
        (&json!("Failed"), &json!("INVALID_MODEL_FILE"))
    );
    daemon.all_is_back("sim:0");
}

#[test]
fn a_disk_that_fails_under_a_read_fails_the_load_and_no_other() {
    // More than one read, so that others are in flight when one of them fails.
    let (daemon, _) = with_model(&[128 * MIB], 40 << 20);
    for after in [0, 3] {
        daemon.faults[0].fail(Call::FillFromFile, after, Fault::Disk);
        let ended = daemon.ended(&daemon.load("tiny", &json!({})));
        let error = &ended["error"];
        assert_eq!((&ended["state"], &error["code"]), (&json!("Failed"), &json!("MODEL_READ_FAILED")));
        assert!(error["hint"].as_str().is_some_and(|hint| hint.contains("dmesg")), "{error:#}");
        daemon.all_is_back("sim:0");
        assert_eq!(
            daemon.get("/api/devices/sim:0").data(200)["health"],
            "Healthy",
            "it is not the card's fault"
        );
    }
    daemon.loaded("tiny", "sim:0");
}

#[test]
fn a_disk_that_answers_later_than_anybody_waits_holds_up_nobody_else() {
    let (daemon, _) = with_model(&[128 * MIB, 64 * MIB], 40 << 20);
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let begun = daemon.post("/api/models/tiny/load?wait=1", &json!({"deviceId": "sim:0"})).data(202);
    assert_eq!((&begun["state"], &begun["bytesDone"]), (&json!("Running"), &json!(0)));
    daemon.loaded("tiny", "sim:1");
    drop(daemon.attach(&json!({"model": "tiny", "deviceId": "sim:1"})).expect("attached"));
    let id = daemon.allocated(&json!({"sizeBytes": MIB}));
    daemon.release(&id).data(200);
    // It is cancelled at once, and ends when the disk has answered.
    let operation = begun["operationId"].as_str().expect("an id");
    daemon.delete(&format!("/api/operations/{operation}")).data(202);
    assert_eq!(daemon.get(&format!("/api/operations/{operation}")).data(200)["state"], "Running");
    drop(held);
    assert_eq!(daemon.ended(operation)["state"], "Cancelled");
    daemon.all_is_back("sim:0");
}

#[test]
fn a_request_waits_until_a_release_that_the_device_takes_its_time_for() {
    let daemon = Daemon::start(&[64 * MIB]);
    let full = daemon.allocated(&json!({"sizeBytes": 64 * MIB}));
    let held = daemon.faults[0].hold(Call::Destroy);
    let releasing = std::thread::scope(|scope| {
        let releasing = scope.spawn(|| daemon.release(&full));
        caught(&held, Call::Destroy);
        // Its bytes are not free before the device has given them back.
        assert_eq!(daemon.status("sim:0")["availableBytes"], 0);
        wait_for("it to be shown as releasing", || {
            let shown = daemon.get(&format!("/api/memory/allocation/{full}")).data(200);
            (shown["status"] == "Releasing").then_some(())
        });
        daemon.release(&full).error("CONFLICT");
        daemon.allocate(&json!({"sizeBytes": 4096})).error("INSUFFICIENT_MEMORY");
        drop(held);
        releasing.join().expect("an answer")
    });
    releasing.data(200);
    daemon.all_is_back("sim:0");
}

#[test]
fn a_daemon_stops_in_the_middle_of_a_load() {
    let (daemon, _) = with_model(&[128 * MIB], 40 << 20);
    let held = daemon.faults[0].hold(Call::FillFromFile);
    daemon.load("tiny", &json!({}));
    caught(&held, Call::FillFromFile);
    let waiting = daemon.begin(
        "/api/memory/allocations/allocate",
        &[],
        &json!({"sizeBytes": 100 * MIB, "onShortage": "wait", "timeoutSeconds": 60}),
    );
    daemon.settle();
    let mut events = daemon.events(None);
    let stopped = std::thread::spawn(move || daemon.stop());
    events.until("daemon.stopping");
    waiting.answer().error("UNAVAILABLE");
    drop(held);
    stopped.join().expect("a clean stop");
}

#[test]
fn bytes_that_the_device_does_not_give_back_stay_charged_until_it_does() {
    let daemon = Daemon::start(&[64 * MIB]);
    let id = daemon.allocated(&json!({"sizeBytes": 8 * MIB}));
    daemon.faults[0].fail(Call::Destroy, 0, Fault::Native);
    let error = daemon.release(&id).error("DEVICE_LOST");
    assert!(error["hint"].as_str().expect("a hint").contains("charged"), "{error:#}");
    // It is asked again by itself.
    daemon.all_is_back("sim:0");
    assert!(daemon.allocations().is_empty());
}

#[test]
fn a_block_that_could_not_be_zeroed_is_not_given_to_anybody() {
    let daemon = Daemon::start(&[64 * MIB]);
    let id = daemon.allocated(&json!({"sizeBytes": 4096}));
    // Attached once: what is in it now is anybody's guess.
    drop(daemon.attach(&json!({"allocationId": id, "access": "write"})).expect("it is there"));
    daemon.faults[0].fail(Call::Zero, 0, Fault::Native);
    let released = wait_for("the lease to end", || {
        let answer = daemon.release(&id);
        (answer.status != 409).then_some(answer)
    });
    released.error("DEVICE_LOST");
    daemon.all_is_back("sim:0");
}

#[test]
fn a_persistent_allocation_whose_client_went_away_leaves_nothing() {
    let daemon = Daemon::start(&[64 * MIB]);
    let held = daemon.faults[0].hold(Call::Create);
    let body = json!({"sizeBytes": 8 * MIB, "persistent": true});
    let pending = daemon.begin("/api/memory/allocations/allocate", &[], &body);
    caught(&held, Call::Create);
    pending.hang_up();
    daemon.settle();
    drop(held);
    daemon.all_is_back("sim:0");
    let home = daemon.stop();
    assert!(home.start(&[64 * MIB]).allocations().is_empty());
}
