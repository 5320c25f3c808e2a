//! Room for models: what goes for a load, in what order loads get it, and what never goes.

use serde_json::{Value, json};
use vramd_api::KeepAlive;
use vramd_device::Call;

use crate::support::{Daemon, Home, MIB, caught, wait_for, write_model};

/// A daemon with models of 20 MiB, of which three fit onto its device of 64 MiB.
fn with_models(names: &[&str]) -> Daemon {
    let daemon = Daemon::start(&[64 * MIB]);
    for name in names {
        add(&daemon, name, 20 * MIB, &json!({}));
    }
    daemon
}

fn add(daemon: &Daemon, name: &str, bytes: u64, more: &Value) {
    let path = daemon.home.path("models").join(format!("{name}.safetensors"));
    write_model(&path, "w", bytes as usize - 4096);
    let mut body = json!({"name": name, "components": {"weights": {"path": path}}});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    daemon.post("/api/models", &body).data(201);
}

fn is_resident(daemon: &Daemon, name: &str) -> bool {
    daemon.residency(name).iter().any(|residency| residency["state"] == "Resident")
}

fn resident(daemon: &Daemon, names: &[&str]) -> Vec<String> {
    names.iter().filter(|name| is_resident(daemon, name)).map(ToString::to_string).collect()
}

fn use_it(daemon: &Daemon, name: &str, times: usize) {
    for _ in 0..times {
        daemon.post(&format!("/api/models/{name}/touch"), &json!({})).data(200);
    }
}

fn state(daemon: &Daemon, operation: &str) -> Value {
    daemon.get(&format!("/api/operations/{operation}")).data(200)["state"].clone()
}

/// What no device has room for, since processes have it all attached.
fn all_attached(daemon: &Daemon, names: &[&str]) -> Vec<vramd_attach::Attachment> {
    names
        .iter()
        .map(|name| {
            daemon.loaded(name, "sim:0");
            daemon.attach(&json!({"model": name})).expect("attached")
        })
        .collect()
}

#[test]
fn the_model_whose_absence_costs_least_goes_for_one_that_is_loaded() {
    let names = ["a", "b", "c", "d"];
    let daemon = with_models(&names);
    for name in ["a", "b", "c"] {
        daemon.loaded(name, "sim:0");
    }
    // The one used longest ago is not the one used least.
    use_it(&daemon, "a", 9);
    use_it(&daemon, "c", 5);
    let begun = std::time::Instant::now();
    wait_for("all to be idle", || (begun.elapsed().as_millis() > 1200).then_some(()));
    let mut events = daemon.events(None);
    let operation = daemon.ended(&daemon.load("d", &json!({"deviceId": "sim:0"})));
    assert_eq!(operation["state"], "Completed", "{operation:#}");
    assert_eq!(resident(&daemon, &names), ["a", "c", "d"]);
    let [went] = operation["result"]["evicted"].as_array().expect("a list").as_slice() else {
        panic!("one went: {operation:#}")
    };
    assert_eq!(
        (&went["model"], &went["component"], &went["deviceId"]),
        (&json!("b"), &json!("weights"), &json!("sim:0"))
    );
    assert!(went["bytes"].as_u64() >= Some(20 * MIB - 4096) && went["usesPerHour"].is_number());
    let told = events.until("model.evicted");
    assert_eq!(
        (&told["evicted"]["model"], &told["for"], &told["policy"]),
        (&json!("b"), &json!("d"), &json!("LowestCost"))
    );
    let stayed: Vec<_> =
        told["stayed"].as_array().expect("a list").iter().map(|one| one["model"].clone()).collect();
    assert_eq!(stayed, ["c", "a"]);
    assert_eq!(events.until("model.unloaded")["model"], "b");
    // What is not needed does not go.
    daemon.unloaded("d");
    daemon.loaded("b", "sim:0");
    assert_eq!(resident(&daemon, &names), ["a", "b", "c"]);
    names.iter().filter(|name| is_resident(&daemon, name)).for_each(|name| daemon.unloaded(name));
    daemon.all_is_back("sim:0");
}

#[test]
fn what_is_attached_pinned_or_more_important_never_goes() {
    let daemon = with_models(&["a", "b", "d"]);
    add(&daemon, "dear", 20 * MIB, &json!({"priority": "High"}));
    for name in ["a", "b", "dear"] {
        daemon.loaded(name, "sim:0");
    }
    let reader = daemon.attach(&json!({"model": "a"})).expect("attached");
    daemon.post("/api/models/b/pin", &json!({})).data(200);
    let refused =
        daemon.post("/api/models/d/load", &json!({"deviceId": "sim:0"})).error("INSUFFICIENT_MEMORY");
    assert_eq!(refused["details"]["requestedBytes"].as_u64().map(|bytes| bytes / MIB), Some(20));
    assert_eq!(resident(&daemon, &["a", "b", "dear"]).len(), 3);
    // One as important may.
    add(&daemon, "dearer", 20 * MIB, &json!({"priority": "High"}));
    daemon.loaded("dearer", "sim:0");
    assert_eq!(resident(&daemon, &["a", "b", "dear", "dearer"]), ["a", "b", "dearer"]);
    drop(reader);
    wait_for("the reader to be gone", || (daemon.residency("a")[0]["attachedCount"] == 0).then_some(()));
    daemon.loaded("d", "sim:0");
    assert!(!is_resident(&daemon, "a"));
}

#[test]
fn a_refusal_counts_on_nothing_that_may_not_go() {
    let daemon = Daemon::start(&[48 * MIB]);
    add(&daemon, "a", 20 * MIB, &json!({}));
    add(&daemon, "b", 20 * MIB, &json!({}));
    daemon.loaded("a", "sim:0");
    daemon.loaded("b", "sim:0");
    let body = json!({"sizeBytes": 24 * MIB, "onShortage": "fail"});
    let largest = |daemon: &Daemon| {
        let refused = daemon.allocate(&body).error("INSUFFICIENT_MEMORY");
        refused["details"]["largestAfterEvictionBytes"].as_u64().expect("bytes") / MIB
    };
    assert_eq!(largest(&daemon), 48);
    daemon.post("/api/models/a/pin", &json!({})).data(200);
    assert_eq!(largest(&daemon), 28);
    let _reader = daemon.attach(&json!({"model": "b"})).expect("attached");
    assert_eq!(largest(&daemon), 8);
}

#[test]
fn a_load_waits_for_what_processes_have_attached_as_long_as_it_was_told() {
    let daemon = with_models(&["a", "b", "c", "d", "e"]);
    let mut readers = all_attached(&daemon, &["a", "b", "c"]);
    let late = daemon.load("e", &json!({"deviceId": "sim:0", "timeoutSeconds": 1}));
    let waits = daemon.load("d", &json!({"deviceId": "sim:0", "timeoutSeconds": 60}));
    assert_eq!(state(&daemon, &waits), "Queued");
    // Whoever asks for the same waits with it.
    assert_eq!(daemon.load("d", &json!({})), waits);
    daemon.delete("/api/models/d").error("CONFLICT");
    let ended = daemon.ended(&late);
    assert_eq!((&ended["state"], &ended["error"]["code"]), (&json!("Failed"), &json!("TIMEOUT")));
    drop(readers.remove(1));
    let ended = daemon.ended(&waits);
    assert_eq!(ended["state"], "Completed", "{ended:#}");
    assert_eq!(ended["result"]["evicted"][0]["model"], "b");
    drop(readers);
}

#[test]
fn a_load_that_waits_can_be_cancelled_and_leaves_nothing() {
    let daemon = with_models(&["a", "b", "c", "d"]);
    let readers = all_attached(&daemon, &["a", "b", "c"]);
    let waits = daemon.load("d", &json!({"deviceId": "sim:0", "onShortage": "wait", "timeoutSeconds": 600}));
    let cancelled = daemon.delete(&format!("/api/operations/{waits}"));
    assert!(matches!(cancelled.status, 200 | 202), "{cancelled:?}");
    assert_eq!(state(&daemon, &waits), "Cancelled");
    drop(readers);
    for name in ["a", "b", "c"] {
        wait_for("the reader to be gone", || (daemon.residency(name)[0]["attachedCount"] == 0).then_some(()));
        daemon.unloaded(name);
    }
    daemon.all_is_back("sim:0");
    daemon.delete("/api/models/d").data(200);
}

#[test]
fn nobody_takes_the_room_that_is_made_for_another() {
    let daemon = with_models(&["a", "b", "c", "d"]);
    for name in ["a", "b", "c"] {
        daemon.loaded(name, "sim:0");
    }
    let held = daemon.faults[0].hold(Call::Destroy);
    let load = daemon.load("d", &json!({"deviceId": "sim:0"}));
    caught(&held, Call::Destroy);
    assert_eq!(state(&daemon, &load), "Queued");
    daemon.allocate(&json!({"sizeBytes": 20 * MIB})).error("INSUFFICIENT_MEMORY");
    drop(held);
    // Who asks at every moment from then on gets nothing of it.
    while state(&daemon, &load) == "Queued" {
        let refused = daemon.allocate(&json!({"sizeBytes": 20 * MIB}));
        assert_eq!(refused.status, 507, "{refused:?}");
    }
    assert_eq!(daemon.ended(&load)["state"], "Completed");
}

#[test]
fn a_hundred_loads_of_one_model_are_one() {
    let daemon = with_models(&["a", "b", "c", "d"]);
    for name in ["a", "b", "c"] {
        daemon.loaded(name, "sim:0");
    }
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let first = daemon.load("d", &json!({"deviceId": "sim:0"}));
    for _ in 0..99 {
        assert_eq!(daemon.load("d", &json!({"deviceId": "sim:0"})), first);
    }
    drop(held);
    assert_eq!(daemon.ended(&first)["state"], "Completed");
    assert_eq!(resident(&daemon, &["a", "b", "c"]).len(), 2);
}

#[test]
fn an_allocation_may_have_idle_models_go_for_it() {
    let daemon = with_models(&["a", "b", "c"]);
    for name in ["a", "b", "c"] {
        daemon.loaded(name, "sim:0");
    }
    let body = |how: &str| json!({"sizeBytes": 30 * MIB, "onShortage": how, "purpose": "cache"});
    let refused = daemon.allocate(&body("fail")).error("INSUFFICIENT_MEMORY");
    assert!(refused["hint"].as_str().is_some_and(|hint| hint.contains("idle models")), "{refused:#}");
    let id = daemon.allocated(&body("evict"));
    assert_eq!(resident(&daemon, &["a", "b", "c"]).len(), 1);
    // What no model is in the way of is refused at once.
    daemon.allocate(&json!({"sizeBytes": 50 * MIB, "onShortage": "evict"})).error("INSUFFICIENT_MEMORY");
    assert_eq!(resident(&daemon, &["a", "b", "c"]).len(), 1);
    daemon.release(&id).data(200);
}

#[test]
fn what_no_device_could_hold_evicts_nothing() {
    let daemon = with_models(&["a"]);
    add(&daemon, "huge", 80 * MIB, &json!({}));
    daemon.loaded("a", "sim:0");
    for how in ["evict", "wait", "fail"] {
        let body = json!({"deviceId": "sim:0", "onShortage": how});
        daemon.post("/api/models/huge/load", &body).error("INSUFFICIENT_MEMORY");
    }
    assert!(is_resident(&daemon, "a"));
    for (field, wrong) in
        [("onShortage", json!("burn")), ("timeoutSeconds", json!(86401)), ("timeoutSeconds", json!(-1))]
    {
        daemon.post("/api/models/a/load", &json!({field: wrong})).refuses(field);
    }
}

#[test]
fn a_load_that_waits_when_the_daemon_stops_is_forgotten() {
    let daemon = with_models(&["a", "b", "c", "d"]);
    let readers = all_attached(&daemon, &["a", "b", "c"]);
    daemon.load("d", &json!({"deviceId": "sim:0", "timeoutSeconds": 600}));
    let home = daemon.stop();
    drop(readers);
    let daemon = home.start(&[64 * MIB]);
    wait_for("the others to be back", || (resident(&daemon, &["a", "b", "c"]).len() == 3).then_some(()));
    assert_eq!(daemon.residency("d"), Vec::<Value>::new());
}

/// A model of two components.
fn add_pair(daemon: &Daemon, name: &str) {
    let path = |part: &str| daemon.home.path("models").join(format!("{name}-{part}.safetensors"));
    for part in ["x", "y"] {
        write_model(&path(part), "w", 20 * MIB as usize - 4096);
    }
    let components = json!({"x": {"path": path("x")}, "y": {"path": path("y")}});
    daemon.post("/api/models", &json!({"name": name, "components": components})).data(201);
}

fn parts_on(daemon: &Daemon, name: &str) -> Vec<String> {
    let model = daemon.model(name);
    let components = model["components"].as_array().expect("a list");
    let resident = |one: &&Value| {
        one["residency"].as_array().is_some_and(|on| on.iter().any(|it| it["state"] == "Resident"))
    };
    components.iter().filter(resident).map(|one| one["name"].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn what_a_load_counts_on_does_not_go_while_it_waits() {
    let daemon = with_models(&["a", "b"]);
    add_pair(&daemon, "pair");
    let body = json!({"deviceId": "sim:0", "components": ["x"]});
    assert_eq!(daemon.ended(&daemon.load("pair", &body))["state"], "Completed");
    let readers = all_attached(&daemon, &["a", "b"]);
    let waits = daemon.load("pair", &json!({"deviceId": "sim:0", "timeoutSeconds": 60}));
    assert_eq!(state(&daemon, &waits), "Queued");
    // Its other half is idle, and nobody gets it: by eviction, unloading or clearing.
    daemon.allocate(&json!({"sizeBytes": 20 * MIB, "onShortage": "evict"})).error("INSUFFICIENT_MEMORY");
    daemon.post("/api/models/pair/unload", &json!({})).error("CONFLICT");
    let cleared = daemon.post("/api/memory/operations/clear?wait=30", &json!({"what": "Unused"}));
    assert_eq!(cleared.data(200)["state"], "Completed");
    assert_eq!(parts_on(&daemon, "pair"), ["x"]);
    // What is there is there; and who wants all of it waits with the first.
    let there = daemon.ended(&daemon.load("pair", &body));
    assert_eq!(there["result"]["loaded"], false);
    assert_eq!(daemon.load("pair", &json!({"deviceId": "sim:0"})), waits);
    drop(readers);
    assert_eq!(daemon.ended(&waits)["state"], "Completed");
    assert_eq!(parts_on(&daemon, "pair"), ["x", "y"]);
}

#[test]
fn a_load_of_what_is_just_going_comes_after_it() {
    let daemon = with_models(&["a"]);
    daemon.loaded("a", "sim:0");
    let held = daemon.faults[0].hold(Call::Destroy);
    daemon.post("/api/models/a/unload", &json!({})).data(202);
    caught(&held, Call::Destroy);
    let loads = [json!({"deviceId": "sim:0"}), json!({})]
        .map(|body| daemon.begin("/api/models/a/load?wait=30", &[], &body));
    daemon.settle();
    assert!(loads.iter().all(|load| !load.is_answered()));
    drop(held);
    for load in loads {
        assert_eq!(load.answer().data(200)["state"], "Completed");
    }
    assert!(is_resident(&daemon, "a"));
}

#[test]
fn who_joins_a_load_that_waits_makes_it_as_patient_as_both_and_may_have_models_go_for_it() {
    let daemon = with_models(&["a", "b", "c", "d"]);
    for name in ["a", "b", "c"] {
        daemon.loaded(name, "sim:0");
    }
    let waits = daemon.load("d", &json!({"deviceId": "sim:0", "onShortage": "wait", "timeoutSeconds": 5}));
    assert_eq!(state(&daemon, &waits), "Queued");
    let refused = daemon.post("/api/models/d/load", &json!({"deviceId": "sim:0", "onShortage": "fail"}));
    assert_eq!(refused.error("INSUFFICIENT_MEMORY")["details"]["operationId"], json!(waits));
    assert_eq!(daemon.load("d", &json!({"deviceId": "sim:0"})), waits);
    assert_eq!(daemon.ended(&waits)["state"], "Completed");
}

#[test]
fn loads_that_come_at_once_all_get_their_turn() {
    let names = ["a", "b", "c", "d", "e", "f"];
    let daemon = with_models(&names);
    let loads: Vec<_> = names.iter().map(|name| daemon.load(name, &json!({"deviceId": "sim:0"}))).collect();
    for load in loads {
        let ended = daemon.ended(&load);
        assert_eq!(ended["state"], "Completed", "{ended:#}");
    }
    assert_eq!(resident(&daemon, &names).len(), 3);
}

#[test]
fn who_waits_behind_one_that_cannot_be_helped_has_models_go_too() {
    let daemon = with_models(&["a", "b", "c", "d"]);
    let readers = all_attached(&daemon, &["a", "b"]);
    daemon.loaded("c", "sim:0");
    let first = daemon.load("d", &json!({"deviceId": "sim:0"}));
    // It wants more than will come free.
    let line = daemon.begin(
        "/api/memory/allocations/allocate",
        &[],
        &json!({"sizeBytes": 60 * MIB, "onShortage": "wait", "timeoutSeconds": 600, "priority": "Critical"}),
    );
    assert_eq!(daemon.ended(&first)["state"], "Completed");
    let next = daemon.ended(&daemon.load("c", &json!({"deviceId": "sim:0"})));
    assert_eq!((&next["state"], &next["result"]["evicted"][0]["model"]), (&json!("Completed"), &json!("d")));
    assert!(!line.is_answered());
    line.hang_up();
    drop(readers);
}

#[test]
fn who_does_not_wait_gets_room_that_nobody_before_can_use() {
    let daemon = with_models(&["a", "b", "c", "d"]);
    let mut readers = all_attached(&daemon, &["a", "b"]);
    daemon.loaded("c", "sim:0");
    // It was just loaded for somebody: this one is lined up until they had their time.
    let load = daemon.load("d", &json!({"deviceId": "sim:0"}));
    let line = daemon.begin(
        "/api/memory/allocations/allocate",
        &[],
        &json!({"sizeBytes": 60 * MIB, "onShortage": "wait", "timeoutSeconds": 600, "priority": "Critical"}),
    );
    daemon.settle();
    drop(readers.remove(0));
    wait_for("the reader to be gone", || (daemon.residency("a")[0]["attachedCount"] == 0).then_some(()));
    daemon.post("/api/models/a/unload?wait=30", &json!({}));
    assert_eq!(daemon.ended(&load)["state"], "Completed");
    assert!(!line.is_answered());
    line.hang_up();
    drop(readers);
}

#[test]
fn what_was_loaded_stays_as_long_as_it_is_configured_to() {
    let start = |minimum_stay| {
        let daemon = Home::new().start_staying(&[32 * MIB], minimum_stay);
        add(&daemon, "a", 20 * MIB, &json!({}));
        add(&daemon, "b", 20 * MIB, &json!({}));
        daemon.loaded("a", "sim:0");
        // Somebody came, so that it is nobody's any more but for its stay.
        drop(daemon.attach(&json!({"model": "a"})).expect("attached"));
        daemon
    };
    let daemon = start(KeepAlive::Forever);
    daemon.post("/api/models/b/load", &json!({})).error("INSUFFICIENT_MEMORY");
    assert!(is_resident(&daemon, "a"));
    daemon.unloaded("a");
    daemon.loaded("b", "sim:0");
    let daemon = start(KeepAlive::Seconds(2));
    let waits = daemon.load("b", &json!({}));
    daemon.settle();
    assert!(is_resident(&daemon, "a"), "its stay is not over");
    assert_eq!(daemon.ended(&waits)["state"], "Completed");
    assert!(!is_resident(&daemon, "a"));
}
