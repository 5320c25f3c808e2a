//! Plans: what loads would come to, and that they then do.

use serde_json::{Value, json};

use crate::support::{Daemon, MIB, wait_for, write_model};

fn with_models(sizes: &[u64], names: &[(&str, u64)]) -> Daemon {
    let daemon = Daemon::start(sizes);
    for (name, bytes) in names {
        let path = daemon.home.path("models").join(format!("{name}.safetensors"));
        write_model(&path, "w", *bytes as usize - 4096);
        daemon.register(name, &format!("{name}.safetensors"));
    }
    daemon
}

fn plan(daemon: &Daemon, body: &Value) -> Value {
    daemon.post("/api/memory/plan", body).data(200)
}

fn outcomes(plan: &Value) -> Vec<(&str, &str)> {
    let models = plan["models"].as_array().expect("a list");
    models
        .iter()
        .map(|it| (it["outcome"].as_str().unwrap_or("-"), it["deviceId"].as_str().unwrap_or("-")))
        .collect()
}

fn of(names: &[&str]) -> Value {
    json!({"models": names.iter().map(|name| json!({"model": name})).collect::<Vec<_>>()})
}

#[test]
fn a_plan_says_where_models_would_go_and_what_would_go_for_them() {
    let daemon = with_models(
        &[64 * MIB],
        &[("a", 20 * MIB), ("b", 20 * MIB), ("c", 20 * MIB), ("d", 20 * MIB), ("huge", 70 * MIB)],
    );
    let all = plan(&daemon, &of(&["a", "b", "c"]));
    assert_eq!((&all["fits"], &all["evicted"]), (&json!(true), &json!([])));
    assert_eq!(outcomes(&all), [("fits", "sim:0"); 3]);
    assert!(all["seconds"].as_f64() > Some(0.0) && all["largestSet"].is_null());
    assert!(daemon.allocations().is_empty(), "nothing came of it");
    for name in ["a", "b", "c"] {
        daemon.loaded(name, "sim:0");
    }
    for name in ["a", "c"] {
        for _ in 0..5 {
            daemon.post(&format!("/api/models/{name}/touch"), &json!({})).data(200);
        }
    }
    let one = plan(&daemon, &of(&["a", "d"]));
    assert_eq!(outcomes(&one), [("resident", "sim:0"), ("evicts", "sim:0")]);
    assert_eq!(one["models"][1]["evicted"][0]["model"], "b");
    assert_eq!(one["evicted"], one["models"][1]["evicted"]);
    // It then does.
    let begun = std::time::Instant::now();
    wait_for("all to be nobody's", || (begun.elapsed().as_millis() > 1200).then_some(()));
    let loaded = daemon.ended(&daemon.load("d", &json!({})));
    assert_eq!(loaded["result"]["evicted"][0]["model"], "b", "{loaded:#}");
    // More than there is, and more than there could be.
    let most = plan(&daemon, &of(&["a", "b", "c", "d", "huge"]));
    assert_eq!(most["fits"], false);
    assert_eq!(outcomes(&most)[4], ("tooLarge", "-"));
    assert_eq!(most["models"][1]["outcome"], "noRoom", "{most:#}");
    assert!(most["models"][1]["missingBytes"].as_u64() > Some(15 * MIB));
    assert_eq!(most["largestSet"], json!(["a", "c", "d"]));
}

#[test]
fn a_plan_counts_what_runs_take_beside_the_weights() {
    let daemon = with_models(&[64 * MIB], &[("a", 20 * MIB), ("b", 20 * MIB), ("c", 20 * MIB)]);
    let with = |name: &str, run: Value| json!({"model": name, "workingMemory": run});
    let run = json!({"shape": [1, 512]});
    daemon.post("/api/memory/plan", &json!({"models": [with("a", run.clone())]})).refuses("workingMemory");
    let reserve = json!({"model": "a", "shape": [1, 512], "sizeBytes": 8 * MIB, "deviceId": "sim:0"});
    let room = daemon.post("/api/memory/reservations", &reserve).data(201);
    let id = room["allocationId"].as_str().expect("an id");
    daemon.delete(&format!("/api/memory/allocations/{id}?peakBytes={}", 30 * MIB)).data(200);
    // By what was learned, which goes before what is said.
    let said = json!({"shape": [1, 512], "sizeBytes": MIB});
    for run in [&run, &said] {
        let one = plan(&daemon, &json!({"models": [with("a", run.clone())]}));
        assert_eq!(
            (outcomes(&one), &one["models"][0]["workingBytes"]),
            (vec![("fits", "sim:0")], &json!(30 * MIB))
        );
        assert_eq!(one["models"][0]["bytes"].as_u64().map(|bytes| bytes / MIB), Some(50), "{one:#}");
    }
    let two = plan(&daemon, &json!({"models": [with("a", run.clone()), {"model": "b"}]}));
    assert_eq!(outcomes(&two), [("fits", "sim:0"), ("noRoom", "-")], "{two:#}");
    assert_eq!(two["largestSet"], json!(["a"]));
    // What is there needs only the room for its run, and others go for that.
    for name in ["a", "b", "c"] {
        daemon.loaded(name, "sim:0");
    }
    let there = plan(&daemon, &json!({"models": [with("a", run)]}));
    assert_eq!(outcomes(&there), [("evicts", "sim:0")], "{there:#}");
    assert_eq!(there["models"][0]["evicted"].as_array().map(Vec::len), Some(2));
    let small = plan(&daemon, &json!({"models": [with("a", json!({"sizeBytes": 2 * MIB}))]}));
    assert_eq!(outcomes(&small), [("resident", "sim:0")], "{small:#}");
    assert!(daemon.allocations().len() == 3, "nothing came of it");
    for bad in [json!([]), json!({"shape": [0]}), json!({"size": 1}), json!(1)] {
        daemon.post("/api/memory/plan", &json!({"models": [with("a", bad)]})).error("INVALID_ARGUMENT");
    }
}

#[test]
fn what_is_attached_or_pinned_stays_in_plans_too() {
    let daemon = with_models(&[64 * MIB], &[("a", 30 * MIB), ("b", 30 * MIB), ("c", 30 * MIB)]);
    daemon.loaded("a", "sim:0");
    daemon.loaded("b", "sim:0");
    let reader = daemon.attach(&json!({"model": "a"})).expect("attached");
    daemon.post("/api/models/b/pin", &json!({})).data(200);
    let refused = plan(&daemon, &of(&["c"]));
    assert_eq!((outcomes(&refused), &refused["fits"]), (vec![("noRoom", "-")], &json!(false)));
    drop(reader);
    wait_for("room for c", || (plan(&daemon, &of(&["c"]))["fits"] == true).then_some(()));
    assert_eq!(plan(&daemon, &of(&["c"]))["evicted"][0]["model"], "a");
}

#[test]
fn devices_and_components_are_taken_as_loads_take_them() {
    let daemon = with_models(&[64 * MIB, 32 * MIB], &[("a", 30 * MIB), ("b", 30 * MIB), ("c", 30 * MIB)]);
    let spread = plan(&daemon, &of(&["a", "b", "c"]));
    assert_eq!(spread["fits"], true, "{spread:#}");
    let mut places: Vec<_> = outcomes(&spread).into_iter().map(|(_, device)| device).collect();
    places.sort_unstable();
    assert_eq!(places, ["sim:0", "sim:0", "sim:1"]);
    let body = json!({"models": [{"model": "a"}, {"model": "b", "deviceId": "sim:0"}], "deviceId": "sim:1"});
    assert_eq!(outcomes(&plan(&daemon, &body)), [("fits", "sim:1"), ("fits", "sim:0")]);
    for (body, field) in [
        (json!({"models": []}), "models"),
        (json!({"models": [{"model": "a"}, {"model": "a"}]}), "models"),
        (json!({"models": [{"model": "a", "components": []}]}), "models"),
        (json!({"models": vec![json!({"model": "a"}); 65]}), "models"),
    ] {
        daemon.post("/api/memory/plan", &body).refuses(field);
    }
    daemon.post("/api/memory/plan", &of(&["nobody"])).error("NOT_FOUND");
    let component = json!({"models": [{"model": "a", "components": ["unet"]}]});
    daemon.post("/api/memory/plan", &component).error("NOT_FOUND");
    let device = json!({"models": [{"model": "a", "deviceId": "sim:9"}]});
    daemon.post("/api/memory/plan", &device).error("NOT_FOUND");
    // What was not read since the start is read for it.
    let home = daemon.stop();
    let daemon = home.start(&[64 * MIB]);
    assert_eq!(outcomes(&plan(&daemon, &of(&["a", "b"]))), [("fits", "sim:0"); 2]);
}
