//! What is known again after a restart, and a journal that cannot be written.

use std::process::Command;

use serde_json::{Value, json};
use vramd_attach::{read_at, write_at};

use crate::support::{Daemon, Home, MIB, wait_for, write_model};

#[test]
fn models_limits_and_persistent_allocations_are_known_again() {
    let home = Home::new();
    write_model(&home.path("models/tiny.safetensors"), "a", 5000);
    let daemon = home.start(&[64 * MIB, 32 * MIB]);
    daemon.register("tiny", "tiny.safetensors");
    daemon.register("other", "tiny.safetensors");
    daemon.register("gone", "tiny.safetensors");
    daemon.send("POST", "/api/models/tiny/pin", &[], b"").data(200);
    daemon.post("/api/models/other/touch", &json!({"keepAlive": "7m"})).data(200);
    daemon.delete("/api/models/gone").data(200);
    daemon.loaded("tiny", "sim:1");
    daemon.loaded("other", "sim:0");
    daemon.unloaded("other");
    daemon.put("/api/memory/limits/sim:0", &json!({"limitBytes": 48 * MIB})).data(200);
    daemon.put("/api/memory/limits/sim:1", &json!({"limitBytes": 16 * MIB})).data(200);
    daemon.put("/api/memory/limits/sim:1", &json!({"limitBytes": null})).data(200);
    let asked = json!({"sizeBytes": 4 * MIB, "persistent": true, "owner": "trainer", "purpose": "kept", "alignment": 4096,
        "allocationType": "KvCache", "priority": "High"});
    let kept = daemon.allocated(&asked);
    let released = daemon.allocated(&asked);
    daemon.release(&released).data(200);
    daemon.allocated(&json!({"sizeBytes": 4 * MIB}));
    let writer = daemon.attach(&json!({"allocationId": kept, "access": "write"})).expect("attached");
    write_at(&writer.descriptors[0], writer.attached.block.offset, b"old").expect("written");
    drop(writer);
    daemon.stop();

    for generation in [2, 3] {
        let daemon = home.start(&[64 * MIB, 32 * MIB]);
        let models = daemon.get("/api/models").data(200)["models"].clone();
        let known: Vec<_> = models
            .as_array()
            .expect("a list")
            .iter()
            .map(|model| (model["name"].clone(), model["pinned"].clone(), model["keepAlive"].clone()))
            .collect();
        assert_eq!(
            known,
            [(json!("other"), json!(false), json!("7m")), (json!("tiny"), json!(true), json!("5m"))]
        );
        // What was resident is loaded again, where it was; the rest is looked at.
        wait_for("the model", || (daemon.residency("tiny").first()?["state"] == "Resident").then_some(()));
        assert_eq!(daemon.residency("tiny")[0]["deviceId"], "sim:1");
        wait_for("its size", || (daemon.model("other")["sizeBytes"] == 5002).then_some(()));
        assert!(daemon.residency("other").is_empty());
        let limits = daemon.get("/api/memory/limits").data(200)["limits"].clone();
        assert_eq!(
            limits[0],
            json!({"deviceId": "sim:0", "limitBytes": 48 * MIB, "overridden": true, "reserveBytes": 0, "aboveBytes": 0})
        );
        assert_eq!(
            limits[1],
            json!({"deviceId": "sim:1", "limitBytes": 32 * MIB, "overridden": false, "reserveBytes": 0, "aboveBytes": 0})
        );
        let mine = daemon.get("/api/memory/allocations?owner=trainer").data(200)["allocations"].clone();
        assert_eq!(mine.as_array().map(Vec::len), Some(1));
        for (field, value) in asked.as_object().expect("an object") {
            assert_eq!(mine[0][field], *value, "{field}");
        }
        assert_eq!(
            (&mine[0]["allocationId"], &mine[0]["generation"], &mine[0]["leases"][0]["kind"]),
            (&json!(kept), &json!(generation), &json!("persistent"))
        );
        assert_eq!(
            daemon.get("/api/memory/allocations?persistent=false&owner=local").data(200)["allocations"],
            json!([])
        );
        let reader = daemon.attach(&json!({"allocationId": kept})).expect("attached");
        let mut bytes = [1; 3];
        read_at(&reader.descriptors[0], reader.attached.block.offset, &mut bytes).expect("read");
        assert_eq!(bytes, [0; 3]);
        drop(reader);
        daemon.stop();
    }
}

#[test]
fn a_model_whose_file_is_gone_does_not_hold_up_the_start() {
    let home = Home::new();
    let path = home.path("models/tiny.safetensors");
    write_model(&path, "a", 5000);
    let daemon = home.start(&[64 * MIB]);
    daemon.register("tiny", "tiny.safetensors");
    daemon.loaded("tiny", "sim:0");
    daemon.stop();
    std::fs::remove_file(&path).expect("removed");
    let daemon = home.start(&[64 * MIB]);
    let component = wait_for("the look at the file", || {
        let component = daemon.model("tiny")["components"][0].clone();
        (component["error"]["code"] == "NOT_FOUND").then_some(component)
    });
    assert_eq!(component["residency"], json!([]));
    write_model(&path, "a", 5000);
    daemon.loaded("tiny", "sim:0");
    assert_eq!(daemon.model("tiny")["components"][0]["error"], Value::Null);
}

#[test]
fn a_device_that_is_missing_after_a_restart_does_not_hold_up_the_start() {
    let home = Home::new();
    let daemon = home.start(&[64 * MIB, 64 * MIB]);
    let path = "/api/memory/allocations/allocate/sim:1";
    let kept =
        daemon.post(path, &json!({"sizeBytes": 4 * MIB, "persistent": true})).data(201)["allocationId"]
            .clone();
    daemon.stop();
    let daemon = home.start(&[64 * MIB]);
    assert!(daemon.allocations().is_empty());
    daemon.stop();
    let daemon = home.start(&[64 * MIB, 64 * MIB]);
    let known = daemon.allocations();
    assert_eq!((&known[0]["allocationId"], &known[0]["deviceId"]), (&kept, &json!("sim:1")));
    daemon.stop();
    let daemon = home.start(&[64 * MIB]);
    let given_up = daemon.release(kept.as_str().expect("an id")).data(200);
    assert_eq!((&given_up["deviceId"], &given_up["releasedBytes"]), (&json!("sim:1"), &json!(0)));
    daemon.stop();
    assert!(home.start(&[64 * MIB, 64 * MIB]).allocations().is_empty(), "it was given up");
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() {
    let home = Home::new();
    let daemon = home.start(&[64 * MIB]);
    let config = vramd_daemon::Config {
        listen: Some(([127, 0, 0, 1], 0).into()),
        socket: None,
        state_dir: home.path("state"),
        model_roots: Vec::new(),
        cpu_limit_bytes: None,
        sim: None,
        cuda: vramd_daemon::CudaCards::None,
        vulkan: vramd_daemon::Adapters::None,
        d3d12: vramd_daemon::Adapters::None,
        eviction: vramd_api::EvictionPolicy::default(),
        minimum_stay: vramd_api::KeepAlive::Seconds(0),
        page_pool_bytes: 0,
        ram_tier_bytes: None,
        ram_reserve_bytes: None,
        #[cfg(unix)]
        loader: vramd_daemon::LoaderCommand { program: "none".into(), arguments: Vec::new() },
        quiet_hours: None,
        pressure_thresholds: vramd_daemon::Thresholds::default(),
        worker_programs: vramd_daemon::Programs::new(),
        workers: Vec::new(),
        bridges: Vec::new(),
        ready_file: None,
    };
    let start = |config: vramd_daemon::Config| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (devices, local) = (vramd_daemon::Devices::default(), vramd_daemon::LocalTime::system());
        runtime.block_on(vramd_daemon::serve_on(config, devices, local, async {})).expect_err("refused")
    };
    let error = start(config.clone());
    assert!(matches!(error, vramd_daemon::StartError::InUse { .. }) && error.hint().is_some(), "{error}");
    let elsewhere = || vramd_daemon::Config { state_dir: home.path("other"), ..config.clone() };
    for (config, what) in [
        (vramd_daemon::Config { listen: Some(([0, 0, 0, 0], 0).into()), ..elsewhere() }, "loopback"),
        (vramd_daemon::Config { listen: None, ..elsewhere() }, "neither"),
        (
            vramd_daemon::Config { listen: Some(daemon.address.parse().expect("an address")), ..elsewhere() },
            "listen",
        ),
        (vramd_daemon::Config { socket: Some(daemon.socket()), ..elsewhere() }, "listen"),
        (vramd_daemon::Config { model_roots: vec![home.path("nowhere")], ..elsewhere() }, "nowhere"),
        (vramd_daemon::Config { state_dir: home.path("ready.json/below"), ..elsewhere() }, "below"),
    ] {
        let error = start(config);
        assert!(error.to_string().contains(what) && error.hint().is_some(), "{what}: {error}");
    }
    daemon.get("/healthz").data(200);
}

/// A small file system in a directory, until it is dropped.
struct SmallDisk<'a>(&'a Home);

impl<'a> SmallDisk<'a> {
    fn mount(home: &'a Home) -> Option<Self> {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=512k", "vramd-test"])
            .arg(home.path("state"))
            .output()
            .is_ok_and(|output| output.status.success());
        mounted.then_some(Self(home))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path("state")).output();
    }
}

/// Fills a disk to its last byte.
fn fill(path: &std::path::Path) {
    let mut file = std::fs::File::create(path).expect("a file");
    for size in [4096, 64, 1] {
        while std::io::Write::write_all(&mut file, &vec![0; size]).is_ok() {}
    }
}

#[test]
fn a_full_disk_fails_what_would_have_to_be_kept_and_nothing_else() {
    let home = Home::new();
    let Some(disk) = SmallDisk::mount(&home) else {
        eprintln!("SKIPPED: a small file system can be mounted by root alone");
        return;
    };
    write_model(&home.path("models/tiny.safetensors"), "a", 5000);
    let daemon = home.start(&[64 * MIB]);
    daemon.register("tiny", "tiny.safetensors");
    let persistent = json!({"sizeBytes": 4 * MIB, "persistent": true});
    let kept = daemon.allocated(&persistent);
    fill(&home.path("state/filler"));

    let full = |answer: crate::support::Answer| {
        let error = answer.error("STORE_FAILED");
        assert_eq!((&error["status"], error["hint"].is_string()), (&json!(503), true), "{error:#}");
    };
    let component = json!({"weights": {"path": home.path("models/tiny.safetensors")}});
    // The journal may have some room of its own left in what it had written before.
    wait_for("the disk to be full", || {
        let answer = daemon.put("/api/memory/limits/sim:0", &json!({"limitBytes": 48 * MIB}));
        (answer.status == 503).then_some(())
    });
    let limit = daemon.get("/api/memory/limits/sim:0").data(200);
    full(daemon.post("/api/models", &json!({"name": "more", "components": component})));
    full(daemon.delete("/api/models/tiny"));
    full(daemon.send("POST", "/api/models/tiny/pin", &[], b""));
    full(daemon.allocate(&persistent));
    full(daemon.release(&kept));
    full(daemon.put("/api/memory/limits/sim:0", &json!({"limitBytes": 32 * MIB})));
    assert_eq!(daemon.get("/api/memory/limits/sim:0").data(200), limit);
    assert_eq!(daemon.get("/api/models").data(200)["models"].as_array().map(Vec::len), Some(1));
    assert_eq!(daemon.model("tiny")["pinned"], false);
    let status =
        daemon.status_when("sim:0", "the failed ones to be back", |status| status["allocationCount"] == 1);
    assert_eq!((&status["allocatedBytes"], &status["reservedBytes"]), (&json!(4 * MIB), &json!(0)));
    // What need not be kept goes on.
    let passing = daemon.allocated(&json!({"sizeBytes": 4 * MIB}));
    daemon.release(&passing).data(200);
    daemon.loaded("tiny", "sim:0");
    daemon.unloaded("tiny");

    std::fs::remove_file(home.path("state/filler")).expect("removed");
    let second = daemon.allocated(&persistent);
    daemon.release(&kept).data(200);
    daemon.stop();
    let daemon: Daemon = home.start(&[64 * MIB]);
    assert_eq!(
        daemon.allocations().iter().map(|one| one["allocationId"].clone()).collect::<Vec<_>>(),
        [json!(second)]
    );
    drop(daemon);
    drop(disk);
}
