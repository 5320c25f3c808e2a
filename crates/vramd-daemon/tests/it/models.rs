//! Models: registered, loaded with progress, cancelled, kept alive, unloaded, removed.

use serde_json::{Value, json};
use vramd_attach::read_at;
use vramd_device::Call;

use crate::support::{Daemon, MIB, caught, file_of, payload, wait_for, with_model, write_model};

/// The bytes of a component, as a process that attaches it reads them.
pub fn attached_bytes(daemon: &Daemon, request: &Value) -> Vec<u8> {
    let attachment = daemon.attach(request).expect("attached");
    let mut bytes = vec![0; attachment.attached.block.bytes as usize];
    read_at(&attachment.descriptors[0], attachment.attached.block.offset, &mut bytes).expect("read");
    bytes
}

#[test]
fn a_model_is_registered_loaded_and_unloaded() {
    let (daemon, payload) = with_model(&[64 * MIB], 3 << 20);
    let model = daemon.model("tiny");
    let component = &model["components"][0];
    assert_eq!(
        (&component["name"], &component["tensorCount"], &component["shardCount"]),
        (&json!("weights"), &json!(2), &json!(1))
    );
    assert_eq!(
        (&model["sizeBytes"], &model["keepAlive"], &component["residency"]),
        (&json!(payload.len()), &json!("5m"), &json!([]))
    );
    assert_eq!(daemon.get("/api/models").data(200)["models"], json!([model]));
    daemon.post("/api/models/tiny/unload", &json!({})).error("NOT_RESIDENT");

    let answer = daemon.post("/api/models/tiny/load?wait=30", &json!({})).data(200);
    assert_eq!(
        (&answer["state"], &answer["bytesDone"], &answer["bytesTotal"]),
        (&json!("Completed"), &json!(payload.len()), &json!(payload.len()))
    );
    let residency = daemon.residency("tiny");
    assert_eq!((&residency[0]["state"], &residency[0]["deviceId"]), (&json!("Resident"), &json!("sim:0")));
    assert_eq!(daemon.status("sim:0")["allocatedBytes"], residency[0]["bytes"]);
    assert_eq!(attached_bytes(&daemon, &json!({"model": "tiny"}))[..payload.len()], payload);

    let again = daemon.post("/api/models/tiny/load", &json!({})).data(200);
    assert_eq!((&again["state"], &again["result"]["loaded"]), (&json!("Completed"), &json!(false)));
    let weights = daemon.allocations()[0]["allocationId"].as_str().expect("an id").to_owned();
    daemon.release(&weights).error("CONFLICT");
    daemon.delete("/api/models/tiny").error("CONFLICT");
    daemon.unloaded("tiny");
    daemon.all_is_back("sim:0");
    assert!(daemon.residency("tiny").is_empty());
    daemon.delete("/api/models/tiny").data(200);
    daemon.get("/api/models/tiny").error("NOT_FOUND");
}

#[test]
fn a_sharded_model_is_one_component() {
    let daemon = Daemon::start(&[64 * MIB]);
    let models = daemon.home.path("models/sharded");
    std::fs::create_dir(&models).expect("a directory");
    let first = write_model(&models.join("one.safetensors"), "a", 5000);
    let second = write_model(&models.join("two.safetensors"), "b", 3000);
    let index = json!({"metadata": {"total_size": 8004}, "weight_map": {
        "a": "one.safetensors", "a.scale": "one.safetensors", "b": "two.safetensors", "b.scale": "two.safetensors"}});
    std::fs::write(models.join("model.safetensors.index.json"), index.to_string()).expect("a file");
    daemon.register("by-directory", "sharded");
    let model = daemon.register("by-index", "sharded/model.safetensors.index.json");
    assert_eq!(
        (&model["components"][0]["shardCount"], &model["components"][0]["tensorCount"]),
        (&json!(2), &json!(4))
    );
    for name in ["by-directory", "by-index"] {
        daemon.loaded(name, "sim:0");
        let attachment = daemon.attach(&json!({"model": name})).expect("attached");
        let bytes = attached_bytes(&daemon, &json!({"model": name}));
        for (tensor, expected) in [("a", &first[..5000]), ("b", &second[..3000])] {
            let found = attachment.tensors.iter().find(|found| found.name == tensor).expect("the tensor");
            assert_eq!(bytes[found.offset as usize..][..found.bytes as usize], *expected, "{tensor}");
        }
    }
}

#[test]
fn every_shape_of_the_format_is_loaded() {
    let daemon = Daemon::start(&[64 * MIB]);
    let files = daemon.home.path("models");
    let header = json!({
        "fp8": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]},
        "fp4": {"dtype": "F4", "shape": [2, 2], "data_offsets": [3, 5]},
        "none": {"dtype": "F32", "shape": [0, 7], "data_offsets": [5, 5]},
        "scalar": {"dtype": "F64", "shape": [], "data_offsets": [5, 13]},
        "__metadata__": {"made": "by hand"},
    });
    std::fs::write(files.join("kinds.safetensors"), file_of(&header.to_string(), &payload(13, 1)))
        .expect("a file");
    std::fs::write(files.join("empty.safetensors"), file_of("{}", b"")).expect("a file");
    for name in ["kinds", "empty"] {
        daemon.register(name, &format!("{name}.safetensors"));
        daemon.loaded(name, "sim:0");
    }
    let attachment = daemon.attach(&json!({"model": "kinds"})).expect("attached");
    assert_eq!(attachment.attached.metadata["made"], "by hand");
    let mut table: Vec<_> = attachment.tensors.iter().map(|t| (t.name.as_str(), t.offset, t.bytes)).collect();
    table.sort_unstable();
    assert_eq!(table, [("fp4", 3, 2), ("fp8", 0, 3), ("none", 5, 0), ("scalar", 5, 8)]);
    assert_eq!(attached_bytes(&daemon, &json!({"model": "kinds"}))[..13], payload(13, 1));
    assert!(daemon.attach(&json!({"model": "empty"})).expect("attached").tensors.is_empty());
}

#[test]
fn components_are_loaded_alone_or_together() {
    let daemon = Daemon::start(&[64 * MIB]);
    let files = daemon.home.path("models");
    for name in ["unet", "vae"] {
        write_model(&files.join(format!("{name}.safetensors")), name, 100_000);
    }
    let path = |name: &str| json!({"path": files.join(format!("{name}.safetensors"))});
    daemon
        .post("/api/models", &json!({"name": "sd", "components": {"unet": path("unet"), "vae": path("vae")}}))
        .data(201);
    daemon.post("/api/models/sd/load", &json!({"components": ["clip"]})).error("NOT_FOUND");
    daemon.post("/api/models/sd/load", &json!({"components": []})).refuses("components");
    let only = daemon.post("/api/models/sd/load?wait=30", &json!({"components": ["vae"]})).data(200);
    assert_eq!(only["result"]["components"], json!(["vae"]));
    let error = daemon.attach(&json!({"model": "sd", "component": "unet"})).expect_err("it is not resident");
    assert!(
        matches!(error, vramd_attach::AttachError::Api(error) if error.code == vramd_api::ErrorCode::NotResident)
    );
    let rest = daemon.post("/api/models/sd/load?wait=30", &json!({"deviceId": "sim:0"})).data(200);
    assert_eq!(rest["result"]["components"], json!(["unet"]));
    let one = daemon.attach(&json!({"model": "sd", "component": "unet"})).expect("attached");
    assert_eq!(one.attached.component.as_ref().expect("a component").as_str(), "unet");
    drop(one);
    wait_for("the lease's end", || {
        (daemon.post("/api/models/sd/unload?wait=30", &json!({})).status == 200).then_some(())
    });
    daemon.all_is_back("sim:0");
}

#[test]
fn what_is_registered_has_a_name_of_its_own_and_components() {
    let (daemon, _) = with_model(&[64 * MIB], 4096);
    let path = daemon.home.path("models/tiny.safetensors");
    let body = json!({"name": "tiny", "components": {"weights": {"path": path}}});
    daemon.post("/api/models", &body).error("CONFLICT");
    for (body, field) in [
        (json!({"name": "a/b", "components": {"weights": {"path": path}}}), "name"),
        (json!({"name": "x", "components": {}}), "components"),
        (json!({"name": "x"}), "components"),
        (
            json!({"name": "x", "components": {"weights": {"path": path, "url": "http://x"}}}),
            "components.weights.url",
        ),
        (json!({"name": "x", "components": {"weights": {"path": path}}, "keepAlive": "soon"}), "keepAlive"),
        (json!({"name": "x", "components": {"weights": {"path": path}}, "pin": true}), "pin"),
    ] {
        daemon.post("/api/models", &body).refuses(field);
    }
    assert_eq!(daemon.get("/api/models").data(200)["models"].as_array().expect("a list").len(), 1);
}

#[test]
fn a_load_shows_its_progress_and_a_second_one_joins_it() {
    let (daemon, payload) = with_model(&[64 * MIB], 4 << 20);
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let answer = daemon.post("/api/models/tiny/load?wait=0", &json!({"deviceId": "sim:0"}));
    let operation = answer.data(202);
    caught(&held, Call::FillFromFile);
    let id = operation["operationId"].as_str().expect("an id");
    assert_eq!((&operation["state"], &operation["bytesTotal"]), (&json!("Running"), &json!(payload.len())));
    assert_eq!(daemon.load("tiny", &json!({"deviceId": "sim:0"})), id);
    assert_eq!(daemon.load("tiny", &json!({})), id);
    let residency = daemon.residency("tiny");
    assert_eq!((&residency[0]["state"], &residency[0]["operationId"]), (&json!("Loading"), &json!(id)));
    assert_eq!(daemon.get("/api/operations?state=Running").data(200)["operations"][0]["operationId"], id);
    daemon.post("/api/models/tiny/unload", &json!({})).error("CONFLICT");
    daemon.delete("/api/models/tiny").error("CONFLICT");
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| daemon.ended(id));
        drop(held);
        waiting.join().expect("an operation")
    });
    assert_eq!((&waiting["state"], &waiting["bytesDone"]), (&json!("Completed"), &json!(payload.len())));
    daemon.delete(&format!("/api/operations/{id}")).error("CONFLICT");
}

#[test]
fn a_cancelled_load_leaves_nothing() {
    let (daemon, _) = with_model(&[128 * MIB], 40 << 20);
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let id = daemon.load("tiny", &json!({}));
    caught(&held, Call::FillFromFile);
    let cancelled = daemon.delete(&format!("/api/operations/{id}"));
    assert_eq!(cancelled.status, 202);
    drop(held);
    let operation = daemon.ended(&id);
    assert_eq!(
        (&operation["state"], &operation["error"]["code"]),
        (&json!("Cancelled"), &json!("CANCELLED"))
    );
    assert!(daemon.residency("tiny").is_empty());
    daemon.all_is_back("sim:0");
    daemon.loaded("tiny", "sim:0");
}

#[test]
fn a_load_is_cancelled_while_its_memory_is_made() {
    let (daemon, _) = with_model(&[64 * MIB], 2 << 20);
    let held = daemon.faults[0].hold(Call::Create);
    let id = daemon.load("tiny", &json!({}));
    caught(&held, Call::Create);
    daemon.delete(&format!("/api/operations/{id}"));
    drop(held);
    assert_eq!(daemon.ended(&id)["state"], "Cancelled");
    daemon.all_is_back("sim:0");
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_figures() {
    let (daemon, _) = with_model(&[8 * MIB], 12 << 20);
    let error = daemon.post("/api/models/tiny/load", &json!({})).error("INSUFFICIENT_MEMORY");
    assert!(error["details"]["requestedBytes"].as_u64() >= Some(12 << 20), "{error:#}");
    assert_eq!(error["details"]["availableBytes"], 8 * MIB);
    daemon.post("/api/models/tiny/load", &json!({"deviceId": "sim:3"})).error("NOT_FOUND");
    daemon.all_is_back("sim:0");
}

#[test]
fn an_attached_model_stays_and_its_holders_are_named() {
    let (daemon, _) = with_model(&[64 * MIB], 4096);
    daemon.loaded("tiny", "sim:0");
    let attachment = daemon.attach(&json!({"model": "tiny"})).expect("attached");
    let error = daemon.post("/api/models/tiny/unload", &json!({})).error("CONFLICT");
    let holder = &error["details"]["holders"][0];
    assert_eq!(holder["pid"], std::process::id());
    let status = daemon.get("/api/memory/status/sim:0?include=processes").data(200);
    assert_eq!(status["processes"], json!([holder]));
    assert_eq!(daemon.residency("tiny")[0]["attachedCount"], 1);
    daemon.delete("/api/models/tiny").error("CONFLICT");
    drop(attachment);
    wait_for("the lease's end", || (daemon.residency("tiny")[0]["attachedCount"] == 0).then_some(()));
    daemon.unloaded("tiny");
}

#[test]
fn a_pinned_model_stays_until_it_is_unpinned() {
    let (daemon, _) = with_model(&[64 * MIB], 4096);
    assert_eq!(daemon.send("POST", "/api/models/tiny/pin", &[], b"").data(200)["pinned"], true);
    let operation = daemon.load("tiny", &json!({"keepAlive": 0}));
    assert_eq!(daemon.ended(&operation)["state"], "Completed");
    assert_eq!(daemon.model("tiny")["expiresAt"], Value::Null);
    daemon.post("/api/models/tiny/unload", &json!({})).error("CONFLICT");
    assert_eq!(daemon.residency("tiny")[0]["state"], "Resident");
    // Nothing keeps it any more: it was to stay for no time at all.
    assert_eq!(daemon.send("POST", "/api/models/tiny/unpin", &[], b"").data(200)["pinned"], false);
    wait_for("the model to go", || daemon.residency("tiny").is_empty().then_some(()));
    daemon.all_is_back("sim:0");
}

#[test]
fn an_idle_model_goes_when_its_time_is_over() {
    let (daemon, _) = with_model(&[64 * MIB], 4096);
    let mut events = daemon.events(None);
    let operation = daemon.load("tiny", &json!({"keepAlive": "1s"}));
    daemon.ended(&operation);
    let attachment = daemon.attach(&json!({"model": "tiny"})).expect("attached");
    assert_eq!(daemon.model("tiny")["expiresAt"], Value::Null);
    drop(attachment);
    events.until("attachment.closed");
    wait_for("its end to be known", || daemon.model("tiny")["expiresAt"].is_string().then_some(()));
    assert_eq!(events.until("model.unloaded")["model"], "tiny");
    daemon.all_is_back("sim:0");
}

#[test]
fn a_touch_begins_the_time_anew() {
    let (daemon, _) = with_model(&[64 * MIB], 4096);
    daemon.loaded("tiny", "sim:0");
    let ends = |model: &Value| -> jiff::Timestamp {
        model["expiresAt"].as_str().expect("an end").parse().expect("a time")
    };
    let before = ends(&daemon.model("tiny"));
    wait_for("a later end", || {
        let touched = daemon.send("POST", "/api/models/tiny/touch", &[], b"").data(200);
        (ends(&touched) > before).then_some(())
    });
    let touched = daemon.post("/api/models/tiny/touch", &json!({"keepAlive": -1})).data(200);
    assert_eq!((&touched["keepAlive"], &touched["expiresAt"]), (&json!("-1"), &Value::Null));
    daemon.post("/api/models/tiny/touch", &json!({"keepAlive": "1x"})).refuses("keepAlive");
    daemon.post("/api/models/tiny/touch", &json!({"keepAlive": 0})).data(200);
    wait_for("the model to go", || daemon.residency("tiny").is_empty().then_some(()));
}

#[test]
fn a_model_may_be_resident_on_several_devices() {
    let (daemon, payload) = with_model(&[64 * MIB, 64 * MIB], 5000);
    daemon.loaded("tiny", "sim:0");
    daemon.loaded("tiny", "sim:1");
    let error = daemon.attach(&json!({"model": "tiny"})).expect_err("which device?");
    assert!(matches!(error, vramd_attach::AttachError::Api(error) if error.details["field"] == "deviceId"));
    for device in ["sim:0", "sim:1"] {
        let bytes = attached_bytes(&daemon, &json!({"model": "tiny", "deviceId": device}));
        assert_eq!(bytes[..payload.len()], payload);
    }
    wait_for("the leases to end", || {
        let answer = daemon.post("/api/models/tiny/unload?wait=30", &json!({"deviceId": "sim:0"}));
        (answer.status == 200).then_some(())
    });
    daemon.all_is_back("sim:0");
    assert_eq!(daemon.residency("tiny")[0]["deviceId"], "sim:1");
}

#[test]
fn a_load_is_held_to_the_checksum_of_those_before() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let path = daemon.home.path("models/a.safetensors");
    write_model(&path, "w", 9 << 20);
    daemon.register("a", "a.safetensors");
    let load = |device: &str| daemon.ended(&daemon.load("a", &json!({"deviceId": device, "checksum": true})));
    assert_eq!(load("sim:0")["state"], "Completed");
    let sum = daemon.model("a")["components"][0]["checksum"].clone();
    assert_eq!(sum["value"].as_str().map(str::len), Some(16), "{sum:#}");
    // Copied or read, it is the same.
    assert_eq!(load("sim:1")["result"]["copiedFrom"], json!(["sim:0"]));
    assert_eq!(daemon.model("a")["components"][0]["checksum"], sum);
    daemon.unloaded("a");
    assert_eq!(load("sim:0")["state"], "Completed");
    daemon.unloaded("a");
    // A byte changes, as on a failing disk: neither size nor time tell.
    let modified = std::fs::metadata(&path).expect("a file").modified().expect("a time");
    let mut bytes = std::fs::read(&path).expect("read");
    bytes[5 << 20] ^= 1;
    let file = std::fs::OpenOptions::new().write(true).open(&path).expect("opened");
    std::io::Write::write_all(&mut &file, &bytes).expect("written");
    file.set_times(std::fs::FileTimes::new().set_modified(modified)).expect("set");
    drop(file);
    let failed = daemon.ended(&daemon.load("a", &json!({"deviceId": "sim:0"})));
    let error = &failed["error"];
    assert_eq!((&failed["state"], &error["code"]), (&json!("Failed"), &json!("CHECKSUM_MISMATCH")));
    assert_eq!(error["details"]["before"], sum, "{error:#}");
    daemon.all_is_back("sim:0");
    // Written anew it is another file.
    let file = std::fs::OpenOptions::new().write(true).open(&path).expect("opened");
    file.set_times(std::fs::FileTimes::new().set_modified(std::time::SystemTime::now())).expect("set");
    drop(file);
    assert_eq!(load("sim:0")["state"], "Completed");
    assert_ne!(daemon.model("a")["components"][0]["checksum"], sum);
}
