//! Models whose components are on different devices.

use serde_json::{Value, json};
use vramd_device::{Call, sim::Fault};

use crate::support::{Daemon, MIB, caught, wait_for, write_model};

const COMPONENTS: [(&str, u64); 3] = [("unet", 24), ("encoder", 16), ("vae", 4)];

/// A daemon with a model `sdxl` of three components, 44 MiB together, and two others of one.
fn with_pipeline(sizes: &[u64]) -> Daemon {
    let daemon = Daemon::start(sizes);
    let folder = daemon.home.path("models");
    let mut components = json!({});
    for (name, mib) in COMPONENTS {
        let path = folder.join(format!("{name}.safetensors"));
        write_model(&path, name, (mib << 20) as usize - 4096);
        components[name] = json!({ "path": path });
    }
    daemon.post("/api/models", &json!({"name": "sdxl", "components": components})).data(201);
    for name in ["a", "b"] {
        write_model(&folder.join(format!("{name}.safetensors")), "w", (20 << 20) - 4096);
        daemon.register(name, &format!("{name}.safetensors"));
    }
    daemon
}

fn split() -> Value {
    json!({"split": true})
}

/// On which devices each component of `sdxl` is.
fn places(daemon: &Daemon) -> Vec<(String, Vec<String>)> {
    let text = |value: &Value| value.as_str().expect("a name").to_owned();
    let components = daemon.model("sdxl")["components"].as_array().expect("a list").clone();
    components
        .iter()
        .map(|it| {
            let residency = it["residency"].as_array().expect("a list").iter();
            (text(&it["name"]), residency.map(|on| text(&on["deviceId"])).collect())
        })
        .collect()
}

fn nowhere(daemon: &Daemon) -> bool {
    places(daemon).iter().all(|(_, on)| on.is_empty())
}

#[test]
fn what_no_device_has_room_for_is_spread_over_as_few_as_can_be() {
    let daemon = with_pipeline(&[32 * MIB, 32 * MIB, 32 * MIB]);
    let ended = daemon.ended(&daemon.load("sdxl", &split()));
    assert_eq!(ended["state"], "Completed", "{ended:#}");
    let devices = ended["result"]["devices"].as_array().expect("a list").clone();
    assert_eq!(devices.len(), 2, "{ended:#}");
    let reason = ended["result"]["reason"].as_str().expect("words");
    assert!(
        reason.contains("unet on sim:") && reason.contains("no device has room for all of it"),
        "{reason}"
    );
    assert_eq!(ended["bytesDone"], ended["bytesTotal"]);
    for (name, on) in places(&daemon) {
        assert_eq!(on.len(), 1, "{name} is in one place");
        let attached = daemon.attach(&json!({"model": "sdxl", "component": name})).expect("attached");
        assert_eq!(attached.attached.device_id.as_str(), on[0]);
    }
    // It is there, however it is asked for.
    let before = places(&daemon);
    for body in [split(), json!({})] {
        let again = daemon.ended(&daemon.load("sdxl", &body));
        assert_eq!(
            (&again["state"], &again["result"]["loaded"]),
            (&json!("Completed"), &json!(false)),
            "{again:#}"
        );
    }
    assert_eq!(places(&daemon), before);
    // One part that went comes back to where there is room, beside the others.
    let from = &before.iter().find(|(name, _)| name == "unet").expect("it is one of them").1[0];
    daemon.post("/api/models/sdxl/unload?wait=20", &json!({"deviceId": from})).data(200);
    daemon.ended(&daemon.load("sdxl", &split()));
    assert_eq!(places(&daemon).iter().filter(|(_, on)| on.len() == 1).count(), 3);
    daemon.unloaded("sdxl");
    for device in ["sim:0", "sim:1", "sim:2"] {
        daemon.all_is_back(device);
    }
}

#[test]
fn what_one_device_has_room_for_stays_together() {
    let daemon = with_pipeline(&[48 * MIB, 64 * MIB]);
    let ended = daemon.ended(&daemon.load("sdxl", &split()));
    assert_eq!(
        (&ended["state"], &ended["result"]["devices"]),
        (&json!("Completed"), &Value::Null),
        "{ended:#}"
    );
    let on: Vec<_> = places(&daemon).into_iter().map(|(_, on)| on).collect();
    assert!(on.iter().all(|one| *one == on[0]), "{on:?}");
}

#[test]
fn others_go_for_it_where_there_is_no_room_either_way() {
    let daemon = with_pipeline(&[32 * MIB, 32 * MIB]);
    daemon.loaded("a", "sim:0");
    daemon.loaded("b", "sim:1");
    let begun = std::time::Instant::now();
    wait_for("both to be nobody's", || (begun.elapsed().as_millis() > 1200).then_some(()));
    daemon
        .post("/api/models/sdxl/load?wait=20", &json!({"split": true, "onShortage": "fail"}))
        .error("INSUFFICIENT_MEMORY");
    assert!(nowhere(&daemon) && daemon.residency("a").len() == 1 && daemon.residency("b").len() == 1);
    let ended = daemon.ended(&daemon.load("sdxl", &split()));
    assert_eq!(ended["state"], "Completed", "{ended:#}");
    assert!(daemon.residency("a").is_empty() && daemon.residency("b").is_empty());
    // What processes have attached goes for nobody.
    daemon.unloaded("sdxl");
    daemon.loaded("a", "sim:0");
    let reader = daemon.attach(&json!({"model": "a"})).expect("attached");
    daemon.post("/api/models/sdxl/load?wait=20", &split()).error("INSUFFICIENT_MEMORY");
    let waits = daemon.load("sdxl", &json!({"split": true, "onShortage": "wait", "timeoutSeconds": 60}));
    daemon.settle();
    assert_eq!(daemon.get(&format!("/api/operations/{waits}")).data(200)["state"], "Queued");
    assert_eq!(daemon.status("sim:1")["reservedBytes"], 0, "it holds nothing while it waits");
    assert_eq!(daemon.load("sdxl", &json!({})), waits, "others wait with it");
    daemon.post("/api/models/sdxl/unload", &json!({})).error("CONFLICT");
    daemon.delete("/api/models/sdxl").error("CONFLICT");
    let short = daemon.load("sdxl", &json!({"deviceId": "sim:1", "components": ["vae"]}));
    assert_eq!(daemon.ended(&short)["state"], "Completed", "it is in nobody's way");
    drop(reader);
    wait_for("it to be detached", || (daemon.residency("a")[0]["attachedCount"] == 0).then_some(()));
    daemon.unloaded("a");
    let ended = daemon.ended(&waits);
    assert_eq!(ended["state"], "Completed", "{ended:#}");
    assert!(places(&daemon).iter().all(|(_, on)| on.len() == 1));
    // One that waits in vain says so, one that is cancelled ends, and neither leaves anything.
    daemon.unloaded("sdxl");
    daemon.loaded("a", "sim:0");
    let reader = daemon.attach(&json!({"model": "a"})).expect("attached");
    let body = json!({"split": true, "onShortage": "wait", "timeoutSeconds": 1});
    assert_eq!(daemon.ended(&daemon.load("sdxl", &body))["error"]["code"], "TIMEOUT");
    let cancelled = daemon.load("sdxl", &json!({"split": true, "onShortage": "wait", "timeoutSeconds": 60}));
    daemon.delete(&format!("/api/operations/{cancelled}"));
    assert_eq!(daemon.ended(&cancelled)["state"], "Cancelled");
    drop(reader);
    wait_for("it to be detached", || (daemon.residency("a")[0]["attachedCount"] == 0).then_some(()));
    daemon.unloaded("a");
    daemon.all_is_back("sim:0");
    daemon.all_is_back("sim:1");
}

#[test]
fn half_of_it_is_not_taken_away_while_the_rest_comes() {
    let daemon = with_pipeline(&[32 * MIB, 32 * MIB]);
    let held = daemon.faults[1].hold(Call::FillFromFile);
    let running = daemon.load("sdxl", &split());
    caught(&held, Call::FillFromFile);
    wait_for("the other half to be there", || {
        let status = daemon.get("/api/operations?state=Completed").data(200);
        (status["operations"].as_array().map(Vec::len) == Some(1)).then_some(())
    });
    for device in ["sim:0", "sim:1"] {
        let refused = daemon.post("/api/models/sdxl/unload", &json!({"deviceId": device})).error("CONFLICT");
        assert!(refused["details"]["operationId"].is_string());
    }
    daemon.delete("/api/models/sdxl").error("CONFLICT");
    drop(held);
    assert_eq!(daemon.ended(&running)["state"], "Completed");
    assert!(places(&daemon).iter().all(|(_, on)| on.len() == 1));
}

#[test]
fn components_that_are_named_twice_are_loaded_once() {
    let daemon = with_pipeline(&[32 * MIB, 32 * MIB]);
    for device in ["sim:0", "sim:1"] {
        let name = if device == "sim:0" { "unet" } else { "vae" };
        daemon.ended(&daemon.load("sdxl", &json!({"deviceId": device, "components": [name, name]})));
    }
    let twice = json!({"split": true, "components": ["unet", "unet", "vae"]});
    assert_eq!(daemon.ended(&daemon.load("sdxl", &twice))["result"]["loaded"], false);
    // What is missing goes to where it fits, beside what is there.
    let rest = daemon.ended(&daemon.load("sdxl", &split()));
    assert_eq!(
        (&rest["state"], &rest["result"]["components"]),
        (&json!("Completed"), &json!(["encoder"])),
        "{rest:#}"
    );
    assert_eq!(places(&daemon)[0], ("encoder".to_owned(), vec!["sim:1".to_owned()]));
}

#[test]
fn a_part_that_fails_leaves_none_of_the_others() {
    let daemon = with_pipeline(&[32 * MIB, 32 * MIB]);
    for (device, call) in
        [(0, Call::Create), (1, Call::Create), (0, Call::FillFromFile), (1, Call::FillFromFile)]
    {
        daemon.faults[device].fail(call, 0, Fault::Native);
        let ended = daemon.ended(&daemon.load("sdxl", &split()));
        assert_eq!(
            (&ended["state"], &ended["error"]["code"]),
            (&json!("Failed"), &json!("DEVICE_LOST")),
            "{ended:#}"
        );
        assert!(nowhere(&daemon));
        daemon.all_is_back("sim:0");
        daemon.all_is_back("sim:1");
    }
    daemon.ended(&daemon.load("sdxl", &split()));
    assert!(!nowhere(&daemon));
}

#[test]
fn it_is_joined_and_cancelled_as_one() {
    let daemon = with_pipeline(&[32 * MIB, 32 * MIB]);
    let held = daemon.faults[0].hold(Call::FillFromFile);
    let running = daemon.load("sdxl", &split());
    caught(&held, Call::FillFromFile);
    assert_eq!(daemon.load("sdxl", &split()), running);
    assert_eq!(daemon.load("sdxl", &json!({"components": ["vae"]})), running);
    daemon.post("/api/models/sdxl/load", &json!({"deviceId": "sim:0"})).error("CONFLICT");
    // The other device's part is there already.
    wait_for("one part to be there", || {
        let there = |it: &Value| it["state"] == "Resident";
        let components = daemon.model("sdxl")["components"].as_array().expect("a list").clone();
        components
            .iter()
            .any(|it| it["residency"].as_array().expect("a list").iter().any(there))
            .then_some(())
    });
    daemon.delete(&format!("/api/operations/{running}")).data(202);
    drop(held);
    assert_eq!(daemon.ended(&running)["state"], "Cancelled");
    assert!(nowhere(&daemon));
    daemon.all_is_back("sim:0");
    daemon.all_is_back("sim:1");
}

#[test]
fn one_that_waits_takes_the_first_way_that_opens() {
    let daemon = with_pipeline(&[48 * MIB, 48 * MIB]);
    let take = |device: &str, mib: u64| {
        let made = daemon
            .post(&format!("/api/memory/allocations/allocate/{device}"), &json!({"sizeBytes": mib * MIB}));
        made.data(201)["allocationId"].as_str().expect("an id").to_owned()
    };
    let (small, _large) = (take("sim:0", 10), take("sim:0", 20));
    let (other, _rest) = (take("sim:1", 20), take("sim:1", 20));
    // Either device could hold all of it if it were empty: it goes over both when there is room on these first.
    let waits = daemon.load("sdxl", &json!({"split": true, "onShortage": "wait", "timeoutSeconds": 60}));
    daemon.settle();
    daemon.release(&small).data(200);
    daemon.release(&other).data(200);
    let ended = daemon.ended(&waits);
    assert_eq!(ended["state"], "Completed", "{ended:#}");
    assert_eq!(ended["result"]["devices"].as_array().map(Vec::len), Some(2));
}

#[test]
fn what_is_attached_of_one_that_is_cancelled_stays_and_is_named() {
    let daemon = with_pipeline(&[32 * MIB, 32 * MIB]);
    let held = daemon.faults[1].hold(Call::FillFromFile);
    let running = daemon.load("sdxl", &split());
    caught(&held, Call::FillFromFile);
    let first = || {
        places(&daemon)
            .into_iter()
            .find(|(_, on)| on.first().is_some_and(|on| on == "sim:0"))
            .map(|(name, _)| name)
    };
    let name = wait_for("a part to be there", first);
    let reader =
        wait_for("it to be attached", || daemon.attach(&json!({"model": "sdxl", "component": name})).ok());
    daemon.delete(&format!("/api/operations/{running}")).data(202);
    drop(held);
    let ended = daemon.ended(&running);
    let message = ended["error"]["message"].as_str().expect("words");
    assert!(message.contains("what somebody has attached meanwhile stays"), "{message}");
    assert!(ended["error"]["details"]["stays"].as_str().is_some_and(|it| it.contains(&name)), "{ended:#}");
    assert!(ended["bytesDone"].as_u64() > Some(0), "{ended:#}");
    drop(reader);
}

#[test]
fn nothing_goes_for_one_that_has_no_way_even_so() {
    let daemon = with_pipeline(&[32 * MIB, 32 * MIB]);
    daemon.loaded("a", "sim:0");
    daemon.loaded("b", "sim:1");
    let begun = std::time::Instant::now();
    wait_for("both to be nobody's", || (begun.elapsed().as_millis() > 1200).then_some(()));
    // What others have in reserve is lacking even with all of `a` gone.
    let reserve = json!({"limitBytes": null, "owners": {"them": {"reserveBytes": 10 * MIB}}});
    for device in ["sim:0", "sim:1"] {
        daemon.put(&format!("/api/memory/limits/{device}"), &reserve).data(200);
    }
    daemon.post("/api/models/sdxl/load", &split()).error("INSUFFICIENT_MEMORY");
    // Nor does a limit of one component's go up by what others give back.
    let limit = json!({"limitBytes": null, "purposes": {"sdxl/unet": {"limitBytes": 8 * MIB}}});
    for device in ["sim:0", "sim:1"] {
        daemon.put(&format!("/api/memory/limits/{device}"), &limit).data(200);
    }
    daemon.post("/api/models/sdxl/load", &split()).error("INSUFFICIENT_MEMORY");
    assert!(daemon.residency("a").len() == 1 && daemon.residency("b").len() == 1 && nowhere(&daemon));
    for device in ["sim:0", "sim:1"] {
        daemon.put(&format!("/api/memory/limits/{device}"), &json!({"limitBytes": null})).data(200);
    }
    assert_eq!(daemon.ended(&daemon.load("sdxl", &split()))["state"], "Completed");
    // However it is spread, it is there: for plans too.
    let plan = daemon.post("/api/memory/plan", &json!({"models": [{"model": "sdxl"}]})).data(200);
    assert_eq!(plan["models"][0]["outcome"], "resident", "{plan:#}");
}

#[test]
fn what_is_too_large_for_all_together_is_refused_for_good() {
    let daemon = with_pipeline(&[16 * MIB, 16 * MIB]);
    let refused = daemon.post("/api/models/sdxl/load", &split()).error("INSUFFICIENT_MEMORY");
    assert_eq!(refused["retryable"], false);
    daemon.post("/api/models/sdxl/load", &json!({"split": true, "deviceId": "sim:0"})).refuses("split");
    daemon.post("/api/models/sdxl/load", &json!({"split": 1})).error("INVALID_ARGUMENT");
    daemon.post("/api/models/sdxl/load", &json!({"split": true, "components": ["clip"]})).error("NOT_FOUND");
    assert!(nowhere(&daemon));
}
