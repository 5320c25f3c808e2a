//! RAM as a tier: what had to go from a card waits there, comes back from there, and is held once.

use std::time::Duration;

use serde_json::{Value, json};
use vramd_api::ErrorCode;
use vramd_attach::AttachError;
use vramd_device::Call;

use crate::models::attached_bytes;
use crate::support::{Daemon, Home, MIB, payload, wait_for, write_model};

const CARD: u64 = 72 * MIB;

/// A card for three of the models of 20 MiB and some to spare, and host memory that keeps up to `ram_tier` of what has to go.
fn with_ram(ram_tier: u64, names: &[&str]) -> Daemon {
    let daemon = Home::new().start_tiers(&[CARD], ram_tier, 0);
    for name in names {
        write_model(&daemon.home.path("models").join(format!("{name}.safetensors")), "w", 20 << 20);
        daemon.register(name, &format!("{name}.safetensors"));
    }
    daemon
}

/// Loads a model as if its disk were slow, so that it pays to keep it.
fn loaded_slowly(daemon: &Daemon, name: &str) {
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let operation = daemon.load(name, &json!({"deviceId": "sim:0"}));
    assert!(held.wait_until_caught(1, Duration::from_secs(30)));
    let begun = std::time::Instant::now();
    wait_for("some time", || (begun.elapsed().as_millis() > 900).then_some(()));
    drop(held);
    assert_eq!(daemon.ended(&operation)["state"], "Completed");
}

/// Has `name` go from the card for another model, with all others pinned; answers that other one's load.
fn evicted(daemon: &Daemon, name: &str, others: &[&str], by: &str) -> Value {
    for other in others {
        daemon.loaded(other, "sim:0");
        daemon.post(&format!("/api/models/{other}/pin"), &json!({})).data(200);
    }
    let operation = daemon.ended(&daemon.load(by, &json!({"deviceId": "sim:0"})));
    assert_eq!(operation["state"], "Completed", "{operation:#}");
    assert_eq!(operation["result"]["evicted"][0]["model"], name, "{operation:#}");
    operation
}

/// Where a model is resident, and from where it had to go.
fn places(daemon: &Daemon, name: &str) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let all = daemon.residency(name);
    let there = all.iter().filter(|it| it["state"] == "Resident");
    there.map(|it| (text(&it["deviceId"]), text(&it["cachedFrom"]))).collect()
}

fn of(places: &[(&str, &str)]) -> Vec<(String, String)> {
    places.iter().map(|(on, from)| ((*on).to_owned(), (*from).to_owned())).collect()
}

#[test]
fn what_has_to_go_from_a_card_waits_in_ram_and_comes_back_without_the_disk() {
    let daemon = with_ram(64 * MIB, &["a", "b", "c", "d"]);
    loaded_slowly(&daemon, "a");
    let mut events = daemon.events(None);
    evicted(&daemon, "a", &["b", "c"], "d");
    let gone = events.until("model.unloaded");
    assert_eq!((&gone["model"], &gone["cached"]), (&json!("a"), &json!(["weights"])));
    assert_eq!(places(&daemon, "a"), of(&[("cpu:0", "sim:0")]));
    // Nobody gets the slow memory who did not ask for it.
    let Err(AttachError::Api(error)) = daemon.attach(&json!({"model": "a"})) else { panic!("refused") };
    assert_eq!(error.code, ErrorCode::NotResident);
    assert!(error.hint.as_deref().is_some_and(|hint| hint.contains("vramd load a")), "{error:?}");
    let on_cpu = daemon.attach(&json!({"model": "a", "deviceId": "cpu:0"})).expect("attached");
    drop(on_cpu);
    // The file is not needed.
    for name in ["b", "c"] {
        daemon.post(&format!("/api/models/{name}/unpin"), &json!({})).data(200);
    }
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let back = daemon.ended(&daemon.load("a", &json!({})));
    assert_eq!(back["state"], "Completed", "{back:#}");
    assert_eq!(
        (&back["result"]["copiedFrom"], &back["result"]["deviceId"]),
        (&json!(["cpu:0"]), &json!("sim:0"))
    );
    drop(held);
    assert_eq!(places(&daemon, "a"), of(&[("cpu:0", "sim:0"), ("sim:0", "")]));
    let bytes = attached_bytes(&daemon, &json!({"model": "a"}));
    assert_eq!(bytes[..20 << 20], payload((20 << 20) + 2, 7)[..20 << 20]);
    // Who asks for it in RAM has it there.
    daemon.loaded("a", "cpu:0");
    assert_eq!(places(&daemon, "a"), of(&[("cpu:0", ""), ("sim:0", "")]));
    ["a", "b", "c", "d"]
        .iter()
        .filter(|name| !places(&daemon, name).is_empty())
        .for_each(|name| daemon.unloaded(name));
    daemon.all_is_back("sim:0");
    daemon.status_when("cpu:0", "all to be back", |status| status["allocatedBytes"] == 0);
}

#[test]
fn what_had_to_go_comes_back_by_itself_once_there_is_room() {
    let daemon = with_ram(64 * MIB, &["a", "b", "c", "d"]);
    loaded_slowly(&daemon, "a");
    evicted(&daemon, "a", &["b", "c"], "d");
    wait_for("a to wait in RAM", || (places(&daemon, "a") == of(&[("cpu:0", "sim:0")])).then_some(()));
    let last_used = daemon.model("a")["lastUsedAt"].clone();
    daemon.unloaded("d");
    let both = of(&[("cpu:0", "sim:0"), ("sim:0", "")]);
    wait_for("a to be back", || (places(&daemon, "a") == both).then_some(()));
    assert_eq!(daemon.model("a")["lastUsedAt"], last_used, "that is no use of it");
    wait_for("it to be there", || daemon.attach(&json!({"model": "a"})).ok());
    // It goes at once then, since RAM still has it.
    wait_for("the reader to be gone", || {
        daemon.residency("a").iter().all(|it| it["attachedCount"] == 0).then_some(())
    });
    let reads = daemon.faults[0].hold(Call::Read);
    evicted(&daemon, "a", &[], "d");
    drop(reads);
    assert_eq!(places(&daemon, "a"), of(&[("cpu:0", "sim:0")]));
}

#[test]
fn what_has_no_place_in_ram_goes() {
    let daemon = with_ram(19 * MIB, &["a", "b", "c", "d"]);
    loaded_slowly(&daemon, "a");
    evicted(&daemon, "a", &["b", "c"], "d");
    assert_eq!(places(&daemon, "a"), []);
}

#[test]
fn of_what_waits_in_ram_what_is_worth_least_goes_for_what_is_worth_more() {
    let daemon = with_ram(30 * MIB, &["a", "b", "c", "d", "e"]);
    loaded_slowly(&daemon, "a");
    evicted(&daemon, "a", &["b", "c"], "d");
    assert_eq!(places(&daemon, "a"), of(&[("cpu:0", "sim:0")]));
    // It took as long, and is used more.
    daemon.unloaded("d");
    wait_for("a to be back", || (places(&daemon, "a").len() == 2).then_some(()));
    daemon.unloaded("a");
    loaded_slowly(&daemon, "d");
    for _ in 0..9 {
        daemon.post("/api/models/d/touch", &json!({})).data(200);
    }
    evicted(&daemon, "d", &[], "a");
    assert_eq!(places(&daemon, "d"), of(&[("cpu:0", "sim:0")]));
    daemon.post("/api/models/a/touch", &json!({})).data(200);
    let begun = std::time::Instant::now();
    wait_for("a to be nobody's", || (begun.elapsed().as_millis() > 1200).then_some(()));
    evicted(&daemon, "a", &[], "e");
    assert_eq!(places(&daemon, "a"), [], "what waits there is worth more");
    assert_eq!(places(&daemon, "d"), of(&[("cpu:0", "sim:0")]));
}

#[test]
fn a_card_that_cannot_be_read_gives_its_room_all_the_same() {
    let daemon = with_ram(64 * MIB, &["a", "b", "c", "d"]);
    loaded_slowly(&daemon, "a");
    daemon.faults[0].fail(Call::Read, 3, vramd_device::sim::Fault::Native);
    evicted(&daemon, "a", &["b", "c"], "d");
    assert_eq!(places(&daemon, "a"), []);
    daemon.status_when("cpu:0", "RAM to be back", |status| status["allocatedBytes"] == 0);
}

#[test]
fn other_programs_get_the_memory_back() {
    let home = Home::new();
    let daemon = home.start_tiers(&[CARD], 64 * MIB, u64::MAX / 2);
    for name in ["a", "b", "c", "d"] {
        write_model(&home.path("models").join(format!("{name}.safetensors")), "w", 20 << 20);
        daemon.register(name, &format!("{name}.safetensors"));
    }
    loaded_slowly(&daemon, "a");
    evicted(&daemon, "a", &["b", "c"], "d");
    assert_eq!(places(&daemon, "a"), [], "less is free than is to be left to others");
}

#[test]
fn a_file_that_was_replaced_is_read_anew() {
    let daemon = with_ram(64 * MIB, &["a", "b", "c", "d"]);
    loaded_slowly(&daemon, "a");
    evicted(&daemon, "a", &["b", "c"], "d");
    let path = daemon.home.path("models/a.safetensors");
    std::fs::remove_file(&path).expect("removed");
    write_model(&path, "other", 20 << 20);
    daemon.post("/api/models/b/unpin", &json!({})).data(200);
    let back = daemon.ended(&daemon.load("a", &json!({"deviceId": "sim:0"})));
    assert_eq!((&back["state"], &back["result"]["copiedFrom"]), (&json!("Completed"), &json!([])));
    let attached = daemon.attach(&json!({"model": "a", "deviceId": "sim:0"})).expect("attached");
    assert!(attached.tensors.iter().any(|tensor| tensor.name == "other"));
}

/// Two models of three components each, of which two are the same files.
fn with_pair(daemon: &Daemon) {
    let files = daemon.home.path("models");
    for name in ["unet-a", "unet-b", "vae", "encoder"] {
        write_model(&files.join(format!("{name}.safetensors")), name, 6 << 20);
    }
    std::fs::hard_link(files.join("vae.safetensors"), files.join("vae-again.safetensors")).expect("a link");
    for (model, unet, vae) in [("a", "unet-a", "vae"), ("b", "unet-b", "vae-again")] {
        let path = |name: &str| json!({"path": files.join(format!("{name}.safetensors"))});
        let components = json!({"unet": path(unet), "vae": path(vae), "encoder": path("encoder")});
        daemon.post("/api/models", &json!({"name": model, "components": components})).data(201);
    }
}

fn part(daemon: &Daemon, model: &str, component: &str) -> Value {
    let model = daemon.model(model);
    let components = model["components"].as_array().expect("a list");
    let found = components.iter().find(|one| one["name"] == component).expect("a component");
    found["residency"][0].clone()
}

#[test]
fn what_is_of_the_same_files_is_held_once_and_goes_with_the_last_model() {
    let daemon = Daemon::start(&[64 * MIB]);
    with_pair(&daemon);
    daemon.loaded("a", "sim:0");
    let one = daemon.status("sim:0")["allocatedBytes"].as_u64().expect("bytes");
    let second = daemon.ended(&daemon.load("b", &json!({"deviceId": "sim:0"})));
    assert_eq!(second["result"]["shared"], json!(["encoder", "vae"]));
    let both = daemon.status("sim:0")["allocatedBytes"].as_u64().expect("bytes");
    assert!(both - one < 7 * MIB, "{one} {both}");
    for component in ["vae", "encoder"] {
        let (first, second) = (part(&daemon, "a", component), part(&daemon, "b", component));
        assert_eq!((&first["allocationId"], &first["shared"]), (&second["allocationId"], &json!(true)));
    }
    assert!(part(&daemon, "a", "unet")["shared"].is_null());
    // Its bytes are another's too: they are not moved away under it, and its readers hold up only their own model.
    let moved =
        json!({"items": [{"model": "a", "component": "vae"}], "targetDeviceId": "sim:0", "mode": "move"});
    daemon.post("/api/memory/transfer", &moved).refuses("targetDeviceId");
    let reader = daemon.attach(&json!({"model": "b", "component": "vae"})).expect("attached");
    daemon.post("/api/models/b/unload", &json!({})).error("CONFLICT");
    daemon.unloaded("a");
    assert!(part(&daemon, "b", "vae")["shared"].is_null());
    assert_eq!(
        attached_bytes(&daemon, &json!({"model": "b", "component": "vae"}))[..6 << 20],
        payload(6 << 20, 7)
    );
    // And again the other way round.
    daemon.loaded("a", "sim:0");
    drop(reader);
    wait_for("the reader to be gone", || (part(&daemon, "b", "vae")["attachedCount"] == 0).then_some(()));
    daemon.unloaded("b");
    daemon.unloaded("a");
    daemon.all_is_back("sim:0");
}

#[test]
fn a_load_of_which_all_is_there_for_another_model_reads_nothing() {
    let daemon = Daemon::start(&[64 * MIB]);
    let path = daemon.home.path("models/one.safetensors");
    write_model(&path, "w", 8 << 20);
    for name in ["one", "same"] {
        daemon.register(name, "one.safetensors");
    }
    daemon.loaded("one", "sim:0");
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let second = daemon.ended(&daemon.load("same", &json!({})));
    assert_eq!((&second["state"], &second["result"]["bytes"]), (&json!("Completed"), &json!(0)));
    drop(held);
    // Both are idle, or none is.
    let reader = daemon.attach(&json!({"model": "one"})).expect("attached");
    let large = json!({"sizeBytes": 60 * MIB, "leaseSeconds": 60, "onShortage": "evict"});
    let begun = std::time::Instant::now();
    wait_for("both to be nobody's", || (begun.elapsed().as_millis() > 1200).then_some(()));
    daemon.allocate(&large).error("INSUFFICIENT_MEMORY");
    drop(reader);
    wait_for("the reader to be gone", || (daemon.residency("one")[0]["attachedCount"] == 0).then_some(()));
    let allocation = daemon.allocated(&large);
    assert!(daemon.residency("one").is_empty() && daemon.residency("same").is_empty());
    daemon.release(&allocation).data(200);
    daemon.all_is_back("sim:0");
}

#[test]
fn a_load_that_fails_leaves_what_it_shares_to_the_other() {
    let daemon = Daemon::start(&[64 * MIB]);
    with_pair(&daemon);
    daemon.loaded("a", "sim:0");
    daemon.faults[0].fail(Call::FillFromFile, 0, vramd_device::sim::Fault::Native);
    let failed = daemon.ended(&daemon.load("b", &json!({"deviceId": "sim:0"})));
    assert_eq!(failed["state"], "Failed");
    assert!(daemon.residency("b").is_empty());
    assert!(part(&daemon, "a", "vae")["shared"].is_null());
    daemon.unloaded("a");
    daemon.all_is_back("sim:0");
}

#[test]
fn who_may_spill_gets_host_memory_and_is_told() {
    let daemon = with_ram(0, &["a", "b", "c", "d"]);
    for name in ["a", "b", "c"] {
        daemon.loaded(name, "sim:0");
    }
    let spilled = daemon.ended(&daemon.load("d", &json!({"deviceId": "sim:0", "onShortage": "spill"})));
    assert_eq!(
        (&spilled["result"]["deviceId"], &spilled["result"]["spilledFrom"]),
        (&json!("cpu:0"), &json!(["sim:0"]))
    );
    assert_eq!(spilled["result"]["evicted"], json!([]));
    let body =
        json!({"sizeBytes": 20 * MIB, "memoryType": "VRAM", "onShortage": "spill", "leaseSeconds": 60});
    let made = daemon.allocate(&body).data(201);
    assert_eq!((&made["deviceId"], &made["placement"]["spilledFrom"]), (&json!("cpu:0"), &json!(["sim:0"])));
    // With room it stays where it was asked for.
    daemon.unloaded("a");
    let made = daemon.post("/api/memory/allocations/allocate/sim:0", &body).data(201);
    assert_eq!((&made["deviceId"], &made["placement"]["spilledFrom"]), (&json!("sim:0"), &Value::Null));
    // More than there is anywhere.
    let large = json!({"sizeBytes": 2_u64 << 30, "memoryType": "VRAM", "onShortage": "spill"});
    daemon.allocate(&large).error("INSUFFICIENT_MEMORY");
    let late = json!({"sizeBytes": 1, "onShortage": "spill", "timeoutSeconds": 1});
    daemon.allocate(&late).refuses("timeoutSeconds");
}

#[test]
fn a_load_without_a_device_falls_to_no_slower_memory_unasked() {
    let daemon = with_ram(0, &["a", "b", "c", "d"]);
    for name in ["a", "b", "c", "d"] {
        let loaded = daemon.ended(&daemon.load(name, &json!({})));
        assert_eq!(loaded["result"]["deviceId"], "sim:0", "{loaded:#}");
    }
    // What no card could hold goes where it can be.
    write_model(&daemon.home.path("models/large.safetensors"), "w", 80 << 20);
    daemon.register("large", "large.safetensors");
    let loaded = daemon.ended(&daemon.load("large", &json!({})));
    assert_eq!(loaded["result"]["deviceId"], "cpu:0", "{loaded:#}");
}

#[test]
fn what_is_prefetched_waits_in_ram_for_its_card() {
    let daemon = with_ram(64 * MIB, &["a", "b"]);
    let prefetch = |name: &str, body: &Value| {
        let begun = daemon.post(&format!("/api/models/{name}/prefetch?wait=30"), body);
        begun.data(200)
    };
    let fetched = prefetch("a", &json!({}));
    assert_eq!((&fetched["state"], &fetched["result"]["deviceId"]), (&json!("Completed"), &json!("cpu:0")));
    assert_eq!(places(&daemon, "a"), of(&[("cpu:0", "sim:0")]));
    assert!(daemon.model("a")["lastUsedAt"].is_null(), "that is no use of it");
    assert_eq!(prefetch("a", &json!({"deviceId": "sim:0"}))["result"]["loaded"], false);
    let loaded = daemon.ended(&daemon.load("a", &json!({})));
    assert_eq!(
        (&loaded["result"]["copiedFrom"], &loaded["result"]["deviceId"]),
        (&json!(["cpu:0"]), &json!("sim:0"))
    );
    // There it is nothing to bring.
    daemon.post("/api/models/b/prefetch", &json!({"deviceId": "cpu:0"})).refuses("deviceId");
    daemon.post("/api/models/nobody/prefetch", &json!({})).error("NOT_FOUND");
    // Nothing that is worth more goes for it.
    let daemon = with_ram(30 * MIB, &["a", "b"]);
    loaded_slowly(&daemon, "a");
    daemon.unloaded("a");
    daemon.post("/api/models/a/prefetch?wait=30", &json!({})).data(200);
    for _ in 0..15 {
        daemon.post("/api/models/a/touch", &json!({})).data(200);
    }
    daemon.post("/api/models/b/prefetch", &json!({})).error("INSUFFICIENT_MEMORY");
    assert_eq!(places(&daemon, "a"), of(&[("cpu:0", "sim:0")]));
}

#[test]
fn what_usually_follows_is_prefetched() {
    let daemon = with_ram(64 * MIB, &["a", "b"]);
    for _ in 0..3 {
        daemon.loaded("a", "sim:0");
        daemon.loaded("b", "sim:0");
    }
    daemon.unloaded("b");
    assert_eq!(places(&daemon, "b"), []);
    daemon.post("/api/models/a/touch", &json!({})).data(200);
    wait_for("b to come to RAM", || (places(&daemon, "b") == of(&[("cpu:0", "sim:0")])).then_some(()));
}

#[test]
fn ram_that_only_keeps_models_is_there_for_who_asks_for_it() {
    let home = Home::new();
    let daemon = home.start_tiers(&[CARD], 700 * MIB, 0);
    // A limit that leaves room for one of them.
    daemon.put("/api/memory/limits/cpu:0", &json!({"limitBytes": 30 * MIB})).data(200);
    write_model(&home.path("models/a.safetensors"), "w", 20 << 20);
    daemon.register("a", "a.safetensors");
    daemon.post("/api/models/a/prefetch?wait=30", &json!({})).data(200);
    let body = json!({"sizeBytes": 24 * MIB, "leaseSeconds": 60});
    daemon.post("/api/memory/allocations/allocate/cpu:0", &body).data(201);
    assert_eq!(places(&daemon, "a"), []);
}

#[test]
fn a_move_of_what_another_model_begins_to_share_leaves_it_there() {
    let daemon = Home::new().start(&[64 * MIB, 64 * MIB]);
    write_model(&daemon.home.path("models/one.safetensors"), "w", 8 << 20);
    for name in ["one", "same"] {
        daemon.register(name, "one.safetensors");
    }
    daemon.loaded("one", "sim:0");
    let held = daemon.faults[1].hold(Call::Write);
    let items = json!({"items": [{"model": "one"}], "targetDeviceId": "sim:1", "mode": "move"});
    let transfer = daemon.post("/api/memory/transfer", &items).data(202);
    assert!(held.wait_until_caught(1, Duration::from_secs(30)));
    // It is being read for the move: a second model may have it too, and then it stays.
    daemon.loaded("same", "sim:0");
    drop(held);
    let ended = daemon.ended(transfer["operationId"].as_str().expect("an id"));
    let shared = daemon.residency("same");
    assert_eq!(shared[0]["state"], "Resident", "{ended:#}");
    let bytes = attached_bytes(&daemon, &json!({"model": "same", "deviceId": "sim:0"}));
    assert_eq!(bytes[..8 << 20], payload((8 << 20) + 2, 7)[..8 << 20]);
    for name in ["one", "same"] {
        daemon.unloaded(name);
    }
    daemon.all_is_back("sim:0");
    daemon.all_is_back("sim:1");
}
