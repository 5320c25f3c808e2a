//! Models of several components: loaded in parts, one after another and at once.

use serde_json::{Value, json};
use vramd_api::ErrorCode;
use vramd_device::Call;

use crate::attach::refused;
use crate::support::{Daemon, MIB, caught, with_model};

/// A daemon with a model `parts` of the components `a` and `b`.
fn with_parts(sizes: &[u64]) -> Daemon {
    let (daemon, _) = with_model(sizes, 2 << 20);
    let path = daemon.home.path("models/tiny.safetensors");
    let components = json!({"a": {"path": path}, "b": {"path": path}});
    daemon.post("/api/models", &json!({"name": "parts", "components": components})).data(201);
    daemon
}

/// The allocation of each component that is resident.
fn residents(daemon: &Daemon) -> Vec<(String, Value)> {
    daemon.model("parts")["components"]
        .as_array()
        .expect("a list")
        .iter()
        .flat_map(|component| {
            let name = component["name"].as_str().expect("a name").to_owned();
            let residency = component["residency"].as_array().expect("a list").clone();
            residency.into_iter().map(move |entry| (name.clone(), entry["allocationId"].clone()))
        })
        .collect()
}

#[test]
fn a_load_of_the_rest_keeps_what_is_resident() {
    let daemon = with_parts(&[64 * MIB, 64 * MIB]);
    let first = daemon.ended(&daemon.load("parts", &json!({"components": ["a"], "deviceId": "sim:1"})));
    assert_eq!(first["state"], "Completed");
    let before = residents(&daemon);
    assert_eq!(before.len(), 1);
    let rest = daemon.ended(&daemon.load("parts", &json!({})));
    assert_eq!((&rest["state"], &rest["result"]["components"]), (&json!("Completed"), &json!(["b"])));
    assert_eq!(rest["result"]["deviceId"], "sim:1", "the rest goes to where the first part is");
    let after = residents(&daemon);
    assert_eq!((after.len(), &after[0]), (2, &before[0]));
    daemon.unloaded("parts");
    daemon.all_is_back("sim:0");
    daemon.all_is_back("sim:1");
}

#[test]
fn a_load_is_joined_only_by_those_that_it_brings_all_to() {
    let daemon = with_parts(&[64 * MIB]);
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let running = daemon.load("parts", &json!({"components": ["a"]}));
    caught(&held, Call::FillFromFile);
    assert_eq!(daemon.load("parts", &json!({"components": ["a"]})), running);
    let refused = daemon.post("/api/models/parts/load", &json!({})).error("CONFLICT");
    assert_eq!(refused["details"]["operationId"], running.as_str());
    drop(held);
    assert_eq!(daemon.ended(&running)["state"], "Completed");
    assert_eq!(daemon.ended(&daemon.load("parts", &json!({})))["state"], "Completed");
    assert_eq!(residents(&daemon).len(), 2);
}

#[test]
fn parts_that_do_not_fit_under_a_lowered_limit_are_refused_and_the_daemon_goes_on() {
    let daemon = with_parts(&[64 * MIB]);
    // Leaves a spare segment, which is more than the limit.
    let id = daemon.allocated(&json!({"sizeBytes": 1000}));
    daemon.release(&id).data(200);
    daemon.put("/api/memory/limits/sim:0", &json!({"limitBytes": 1})).data(200);
    daemon.post("/api/models/parts/load", &json!({"deviceId": "sim:0"})).error("INSUFFICIENT_MEMORY");
    daemon.put("/api/memory/limits/sim:0", &json!({"limitBytes": null})).data(200);
    assert_eq!(daemon.ended(&daemon.load("parts", &json!({})))["state"], "Completed");
}

#[test]
fn a_part_that_is_still_loading_cannot_be_attached_by_its_allocation() {
    let daemon = with_parts(&[64 * MIB]);
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let running = daemon.load("parts", &json!({}));
    caught(&held, Call::FillFromFile);
    let (_, allocation) = residents(&daemon).remove(0);
    assert_eq!(refused(&daemon, &json!({"allocationId": allocation})).code, ErrorCode::Conflict);
    daemon.delete(&format!("/api/operations/{running}")).data(202);
    drop(held);
    assert_eq!(daemon.ended(&running)["state"], "Cancelled");
    daemon.all_is_back("sim:0");
}

#[test]
fn what_was_on_a_lost_device_is_loaded_on_another() {
    let daemon = with_parts(&[64 * MIB, 64 * MIB]);
    assert_eq!(daemon.ended(&daemon.load("parts", &json!({"deviceId": "sim:0"})))["state"], "Completed");
    daemon.faults[0].lose("pulled out");
    daemon.status_when("sim:0", "the loss", |status| status["health"] == "Lost");
    let again = daemon.ended(&daemon.load("parts", &json!({})));
    assert_eq!((&again["state"], &again["result"]["deviceId"]), (&json!("Completed"), &json!("sim:1")));
}
