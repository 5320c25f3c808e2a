//! Limits and reserves, set while memory is in use.

use serde_json::{Value, json};

use crate::support::{Daemon, Home, MIB, wait_for, write_model};

fn with_models(names: &[&str]) -> Daemon {
    let daemon = Daemon::start(&[64 * MIB]);
    for name in names {
        write_model(&daemon.home.path("models").join(format!("{name}.safetensors")), "w", (16 << 20) - 4096);
        daemon.register(name, &format!("{name}.safetensors"));
    }
    daemon
}

fn set(daemon: &Daemon, body: &Value) -> Value {
    daemon.put("/api/memory/limits/sim:0", body).data(200)
}

fn is_resident(daemon: &Daemon, name: &str) -> bool {
    !daemon.residency(name).is_empty()
}

fn nobodys(daemon: &Daemon) {
    let begun = std::time::Instant::now();
    wait_for("all to be nobody's", || (begun.elapsed().as_millis() > 1200).then_some(()));
    daemon.settle();
}

fn allocation(owner: &str, mib: u64) -> Value {
    json!({"sizeBytes": mib * MIB, "owner": owner, "leaseSeconds": 60})
}

#[test]
fn a_lower_limit_has_idle_models_go_and_says_what_it_could_not() {
    let daemon = with_models(&["a", "b", "c"]);
    for name in ["a", "b", "c"] {
        daemon.loaded(name, "sim:0");
    }
    for name in ["a", "c"] {
        for _ in 0..4 {
            daemon.post(&format!("/api/models/{name}/touch"), &json!({})).data(200);
        }
    }
    nobodys(&daemon);
    let reader = daemon.attach(&json!({"model": "a"})).expect("attached");
    let limits = set(&daemon, &json!({"limitBytes": 34 * MIB}));
    assert_eq!(limits["evicted"][0]["model"], "b", "{limits:#}");
    assert_eq!((&limits["aboveBytes"], limits["evicted"].as_array().map(Vec::len)), (&json!(0), Some(1)));
    wait_for("b to be gone", || (!is_resident(&daemon, "b")).then_some(()));
    // What is in use stays, above the limit.
    let limits = set(&daemon, &json!({"limitBytes": 8 * MIB}));
    assert_eq!(limits["evicted"][0]["model"], "c");
    assert_eq!(limits["aboveBytes"].as_u64().map(|bytes| bytes / MIB), Some(8), "{limits:#}");
    assert!(is_resident(&daemon, "a"));
    daemon.allocate(&allocation("me", 1)).error("INSUFFICIENT_MEMORY");
    drop(reader);
    // Lifted, it is as before; the event told of each.
    let limits = set(&daemon, &json!({"limitBytes": null}));
    assert_eq!((&limits["overridden"], &limits["evicted"]), (&json!(false), &Value::Null));
    daemon.loaded("b", "sim:0");
}

#[test]
fn above_a_soft_limit_idle_models_go_by_themselves() {
    let daemon = with_models(&["a", "b"]);
    set(&daemon, &json!({"limitBytes": null, "softLimitBytes": 20 * MIB}));
    daemon.loaded("a", "sim:0");
    daemon.loaded("b", "sim:0");
    wait_for("one of them to be gone", || {
        (is_resident(&daemon, "a") != is_resident(&daemon, "b")).then_some(())
    });
    daemon.settle();
    assert!(is_resident(&daemon, "a") != is_resident(&daemon, "b"), "the other is below it");
}

#[test]
fn owners_and_purposes_keep_to_their_limits() {
    let daemon = with_models(&["a", "b"]);
    set(
        &daemon,
        &json!({"limitBytes": null, "owners": {"alice": {"limitBytes": 20 * MIB}},
            "purposes": {"cache/*": {"limitBytes": 8 * MIB}}}),
    );
    let first = daemon.allocated(&allocation("alice", 16));
    let refused = daemon.allocate(&allocation("alice", 8)).error("INSUFFICIENT_MEMORY");
    let message = refused["message"].as_str().expect("words");
    assert!(message.contains("owner alice may have 20.0 MiB on sim:0, and has 16.0 MiB"), "{message}");
    assert_eq!(refused["retryable"], true);
    daemon.allocated(&allocation("bob", 8));
    // More than they may ever have.
    let refused = daemon.allocate(&allocation("alice", 21)).error("INSUFFICIENT_MEMORY");
    assert_eq!(refused["retryable"], false);
    // Who waits gets it once it is released.
    let mut late = allocation("alice", 8);
    late["onShortage"] = json!("wait");
    let waits = daemon.begin("/api/memory/allocations/allocate", &[], &late);
    daemon.settle();
    assert!(!waits.is_answered());
    daemon.release(&first).data(200);
    waits.answer().data(201);
    let mut cache = allocation("bob", 6);
    cache["purpose"] = json!("cache/one");
    daemon.allocated(&cache);
    cache["purpose"] = json!("cache/two");
    daemon.allocate(&cache).error("INSUFFICIENT_MEMORY");
    let limits = daemon.get("/api/memory/limits/sim:0").data(200);
    assert_eq!(limits["owners"]["alice"]["usedBytes"].as_u64().map(|bytes| bytes / MIB), Some(8));
    assert_eq!(limits["purposes"]["cache/*"]["usedBytes"].as_u64().map(|bytes| bytes / MIB), Some(6));
}

#[test]
fn models_as_a_whole_may_have_a_limit_and_go_for_each_other() {
    let daemon = with_models(&["a", "b", "c"]);
    set(&daemon, &json!({"limitBytes": null, "owners": {"vramd": {"limitBytes": 34 * MIB}}}));
    daemon.loaded("a", "sim:0");
    daemon.loaded("b", "sim:0");
    for _ in 0..4 {
        daemon.post("/api/models/a/touch", &json!({})).data(200);
    }
    nobodys(&daemon);
    let third = daemon.ended(&daemon.load("c", &json!({"deviceId": "sim:0"})));
    assert_eq!(
        (&third["state"], &third["result"]["evicted"][0]["model"]),
        (&json!("Completed"), &json!("b"))
    );
    // The rest of the device is for others.
    daemon.allocated(&allocation("me", 24));
}

#[test]
fn what_is_reserved_for_somebody_nobody_else_gets() {
    let daemon = with_models(&["a"]);
    set(&daemon, &json!({"limitBytes": null, "owners": {"alice": {"reserveBytes": 40 * MIB}}}));
    daemon.allocate(&allocation("bob", 32)).error("INSUFFICIENT_MEMORY");
    daemon.allocated(&allocation("bob", 16));
    let hers = daemon.allocated(&allocation("alice", 36));
    // What she has counts.
    daemon.allocated(&allocation("bob", 8));
    daemon.allocate(&allocation("bob", 4)).error("INSUFFICIENT_MEMORY");
    daemon.release(&hers).data(200);
    daemon.allocate(&allocation("bob", 4)).error("INSUFFICIENT_MEMORY");
}

#[test]
fn a_reserve_for_other_programs_is_left() {
    let daemon = with_models(&["a"]);
    set(&daemon, &json!({"limitBytes": null, "reserveBytes": 50 * MIB}));
    daemon.settle();
    daemon.allocate(&allocation("me", 16)).error("INSUFFICIENT_MEMORY");
    daemon.allocated(&allocation("me", 12));
}

#[test]
fn limits_are_kept_over_a_restart_and_bad_ones_change_nothing() {
    let home = Home::new();
    let daemon = home.start(&[64 * MIB]);
    let body = json!({"limitBytes": 60 * MIB, "softLimitBytes": 50 * MIB, "reserveBytes": MIB,
        "owners": {"alice": {"limitBytes": 20 * MIB, "reserveBytes": 10 * MIB}}});
    let before = set(&daemon, &body);
    for (bad, field) in [
        (json!({"limitBytes": 10 * MIB, "softLimitBytes": 11 * MIB}), "softLimitBytes"),
        (json!({"limitBytes": null, "reserveBytes": 65 * MIB}), "reserveBytes"),
        (json!({"limitBytes": null, "owners": {"a": {"limitBytes": 1, "reserveBytes": 2}}}), "owners"),
        (json!({"limitBytes": 8 * MIB, "owners": {"a": {"reserveBytes": 9 * MIB}}}), "owners"),
        (json!({"limitBytes": null, "purposes": {"": {"limitBytes": 1}}}), "purposes"),
        (json!({"softLimitBytes": 1}), "limitBytes"),
    ] {
        daemon.put("/api/memory/limits/sim:0", &bad).refuses(field);
    }
    for share in [json!({"most": 1}), json!([1, 1]), json!(null)] {
        let body = json!({"limitBytes": null, "owners": {"a": share}});
        daemon.put("/api/memory/limits/sim:0", &body).error("INVALID_ARGUMENT");
    }
    let daemon = daemon.stop().start(&[64 * MIB]);
    assert_eq!(daemon.get("/api/memory/limits/sim:0").data(200), before);
}

#[test]
fn what_is_reserved_does_not_go_for_others_and_nothing_goes_in_vain() {
    let daemon = with_models(&["a", "b"]);
    set(
        &daemon,
        &json!({"limitBytes": null, "owners": {"vramd": {"reserveBytes": 32 * MIB}},
        "purposes": {"big/*": {"limitBytes": 10 * MIB}}}),
    );
    for name in ["a", "b"] {
        daemon.loaded(name, "sim:0");
    }
    nobodys(&daemon);
    let mut body = allocation("me", 40);
    body["onShortage"] = json!("evict");
    daemon.allocate(&body).error("INSUFFICIENT_MEMORY");
    // No model that goes helps a purpose that is at its limit.
    let mut cache = allocation("me", 8);
    cache["purpose"] = json!("big/one");
    daemon.allocated(&cache);
    cache["onShortage"] = json!("evict");
    daemon.allocate(&cache).error("INSUFFICIENT_MEMORY");
    assert!(is_resident(&daemon, "a") && is_resident(&daemon, "b"));
    // A model of parts that may never have as much together is refused at once.
    let files = daemon.home.path("models");
    let path = |name: &str| json!({"path": files.join(format!("{name}.safetensors"))});
    for name in ["c", "d"] {
        write_model(&files.join(format!("{name}.safetensors")), name, 6 << 20);
    }
    let parts = json!({"name": "big", "components": {"c": path("c"), "d": path("d")}});
    daemon.post("/api/models", &parts).data(201);
    let refused =
        daemon.post("/api/models/big/load", &json!({"deviceId": "sim:0"})).error("INSUFFICIENT_MEMORY");
    assert_eq!(refused["retryable"], false, "{refused:#}");
    assert!(is_resident(&daemon, "a") && is_resident(&daemon, "b"));
}

#[test]
fn who_waits_for_a_limit_of_their_own_holds_up_nobody() {
    let daemon = with_models(&["a"]);
    set(&daemon, &json!({"limitBytes": null, "owners": {"alice": {"limitBytes": 16 * MIB}}}));
    let first = daemon.allocated(&allocation("alice", 12));
    let mut late = allocation("alice", 8);
    late["onShortage"] = json!("wait");
    let waits = daemon.begin("/api/memory/allocations/allocate", &[], &late);
    daemon.settle();
    let mut other = allocation("bob", 8);
    other["onShortage"] = json!("wait");
    daemon.allocate(&other).data(201);
    assert!(!waits.is_answered());
    daemon.release(&first).data(200);
    waits.answer().data(201);
}
