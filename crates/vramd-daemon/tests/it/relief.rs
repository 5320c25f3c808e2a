//! Pressure and relief: who goes when memory is tight, in which order, and what is believed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use vramd_attach::{Attachment, Stream};

use crate::support::{Daemon, Events, Home, MIB, wait_for, write_model};

/// What a worker of this process holds and does; shared with its thread.
#[derive(Default)]
struct Held {
    /// Its models, as it reports them.
    models: BTreeMap<String, Value>,
    /// Its attachments, by model.
    attachments: BTreeMap<String, Attachment>,
    /// What it was asked, in order.
    asked: Vec<(String, Value)>,
    /// It says that it does what it is asked, and does not.
    lies: bool,
    /// It does not answer what it is asked.
    is_silent: bool,
    refuses: bool,
}

/// A worker in this process, on a thread of its own.
struct Peer {
    held: Arc<Mutex<Held>>,
    stream: Stream,
}

impl Peer {
    /// One that has joined and is ready. `gives` frees what a model of its took.
    fn join(daemon: &Daemon, name: &str, gives: impl Fn(&Value) + Send + 'static) -> Self {
        let stream = Stream::connect(daemon.socket()).expect("a connection");
        let held = Arc::new(Mutex::new(Held::default()));
        let peer = Self { held: held.clone(), stream: stream.try_clone().expect("a second handle") };
        let join = json!({ "event": "join", "data": { "name": name, "device_id": "sim:0" } });
        writeln!(&stream, "{join}").expect("written");
        std::thread::spawn(move || serve(&stream, &held, &gives));
        let path = format!("/api/workers/{name}");
        wait_for("it to be ready", || {
            let answer = daemon.get(&path);
            (answer.status == 200 && answer.data(200)["state"] == "Ready").then_some(())
        });
        peer
    }

    fn held<T>(&self, change: impl FnOnce(&mut Held) -> T) -> T {
        change(&mut self.held.lock().expect("no test panics with it"))
    }

    /// Has a model, and says so.
    fn hold(&self, model: Value) {
        let name = model["name"].as_str().expect("a name").to_owned();
        self.held(|held| held.models.insert(name, model));
        self.tell();
    }

    fn attach(&self, daemon: &Daemon, model: &str, busy: bool) {
        let attachment = daemon.attach(&json!({ "model": model, "deviceId": "sim:0" })).expect("attached");
        self.held(|held| held.attachments.insert(model.to_owned(), attachment));
        self.hold(json!({ "name": model, "attached_mb": 8, "attached_model": model, "busy": busy, "idle_seconds": 1 }));
    }

    fn tell(&self) {
        let models: Vec<Value> = self.held(|held| held.models.values().cloned().collect());
        let event = json!({ "event": "models", "data": { "loaded_models": models } });
        writeln!(&self.stream, "{event}").expect("written");
    }

    fn asked(&self, action: &str) -> Vec<Value> {
        self.held(|held| {
            held.asked.iter().filter(|(it, _)| it == action).map(|(_, data)| data.clone()).collect()
        })
    }
}

fn serve(stream: &Stream, held: &Mutex<Held>, gives: &dyn Fn(&Value)) {
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let request: Value = serde_json::from_str(&line).expect("a request");
        let (action, data) = (request["action"].as_str().expect("an action"), &request["data"]);
        let mut held = held.lock().expect("no test panics with it");
        held.asked.push((action.to_owned(), data.clone()));
        let actions = ["ping", "memory.get_model_info", "memory.unload_model", "memory.pressure_check"];
        let answer = match action {
            "hello" => json!({ "version": 1, "actions": actions }),
            "ping" => json!({}),
            _ if held.is_silent => continue,
            "memory.get_model_info" => json!({ "loaded_models": held.models.values().collect::<Vec<_>>() }),
            "memory.unload_model" if held.refuses => {
                let error = json!({ "code": "CONFLICT", "message": "it is dear to me" });
                let reply = json!({ "request_id": request["request_id"], "success": false, "error": error });
                writeln!(&mut &*stream, "{reply}").expect("written");
                continue;
            }
            "memory.unload_model" => {
                let name = data["name"].as_str().expect("a name");
                let model = held.models.get(name).cloned().unwrap_or_default();
                if !held.lies {
                    held.attachments.remove(name);
                    held.models.remove(name);
                    gives(&model);
                }
                json!({ "acknowledged_mb": model["memory_mb"].as_f64().unwrap_or(0.0) })
            }
            _ => json!({ "freed_mb": 0 }),
        };
        drop(held);
        let reply = json!({ "request_id": request["request_id"], "success": true, "data": answer });
        if writeln!(&mut &*stream, "{reply}").is_err() || action == "shutdown" {
            return;
        }
    }
}

/// A daemon with 64 MiB of sim:0 and models of 8 MiB, `m0` to `m3`.
fn daemon() -> Daemon {
    let home = Home::new();
    let recent = vramd_api::EvictionPolicy::LeastRecentlyUsed;
    let daemon = home.start_workers(&[64 * MIB], |config| config.eviction = recent);
    for name in ["m0", "m1", "m2", "m3"] {
        let file = format!("{name}.safetensors");
        write_model(&home.path("models").join(&file), name, (8 * MIB - 4096) as usize);
        daemon.register(name, &file);
    }
    daemon
}

fn pressure(daemon: &Daemon) -> Value {
    daemon.get("/api/memory/pressure/sim:0").data(200)
}

fn optimize(daemon: &Daemon, body: &Value) -> Value {
    daemon.post("/api/memory/model/optimize/sim:0", body).data(200)
}

fn resident(daemon: &Daemon) -> Vec<String> {
    let status = daemon.get("/api/memory/model/status/sim:0").data(200);
    let all = status["loadedModels"].as_array().expect("a list").clone();
    all.iter().map(|model| model["name"].as_str().expect("a name").to_owned()).collect()
}

/// The next event of that kind.
fn next(events: &mut Events, kind: &str) -> Value {
    loop {
        let (_, found, event) = events.next().expect("an event");
        if found == kind {
            return event["data"].clone();
        }
    }
}

#[test]
fn what_others_take_has_the_first_idle_model_go_and_no_more() {
    let daemon = daemon();
    for name in ["m0", "m1", "m2", "m3"] {
        daemon.loaded(name, "sim:0");
    }
    // All but m2 are used again.
    for name in ["m0", "m1", "m3"] {
        daemon.post(&format!("/api/models/{name}/touch"), &json!({})).data(200);
    }
    // What was loaded just now stays for a moment.
    let may_go = || pressure(&daemon)["recommendedActions"].as_array().map_or(0, Vec::len);
    wait_for("all of them to be idle", || (may_go() >= 4).then_some(()));
    // Full of idle models, and in no need.
    daemon.faults[0].set_foreign_bytes(28 * MIB);
    daemon.settle();
    let before = pressure(&daemon);
    assert_eq!((&before["pressureLevel"], &before["neededBytes"]), (&json!("Normal"), &json!(0)), "{before}");
    let mut events = daemon.events(None);
    daemon.faults[0].set_foreign_bytes(30 * MIB);
    let changed = next(&mut events, "pressure.changed");
    assert_eq!((&changed["level"], &changed["before"]), (&json!("High"), &json!("Normal")), "{changed}");
    let step = next(&mut events, "pressure.step");
    assert_eq!((&step["action"], &step["model"]), (&json!("unloadModel"), &json!("m2/weights")), "{step}");
    assert_eq!(step["measuredBytes"], step["askedBytes"]);
    let relieved = next(&mut events, "pressure.relieved");
    assert!(relieved["memoryFreed"].as_u64() >= relieved["neededBytes"].as_u64(), "{relieved}");
    assert_eq!(resident(&daemon), ["m0", "m1", "m3"]);
    wait_for("the level to fall", || (pressure(&daemon)["pressureLevel"] == "Normal").then_some(()));
    let operations = daemon.get("/api/operations").data(200);
    let done =
        operations["operations"].as_array().expect("a list").iter().find(|it| it["kind"] == "optimize");
    assert_eq!(done.map(|it| it["state"].clone()), Some(json!("Completed")));
}

#[test]
fn a_worker_gives_its_own_before_what_is_dearer_and_is_told_how_tight_it_is() {
    let daemon = daemon();
    let (sim, pid) = (daemon.faults[0].clone(), std::process::id());
    sim.set_process_bytes(pid, 16 * MIB);
    let gives = sim.clone();
    let peer = Peer::join(&daemon, "third", move |_| gives.set_process_bytes(pid, 0));
    peer.hold(json!({ "name": "own", "memory_mb": 16, "load_seconds": 0.1, "idle_seconds": 500 }));
    daemon.loaded("m0", "sim:0");
    daemon.loaded("m1", "sim:0");
    for _ in 0..8 {
        daemon.post("/api/models/m0/touch", &json!({})).data(200);
        daemon.post("/api/models/m1/touch", &json!({})).data(200);
    }
    let status = wait_for("its model to be known", || {
        let status = daemon.get("/api/memory/model/status/sim:0").data(200);
        (status["workerMemory"]["reportedBytes"] == 16 * MIB
            && status["workerMemory"]["measuredBytes"] == 16 * MIB)
            .then_some(status)
    });
    assert_eq!(status["totalMemoryUsage"], 32 * MIB, "{status:#}");
    assert_eq!(
        (&status["loadedModelCount"], &status["modelMemory"]["residentBytes"]),
        (&json!(3), &json!(16 * MIB))
    );
    assert!(
        status["lastSynchronized"].is_string() && status["workerMemory"]["notes"] == json!([]),
        "{status:#}"
    );
    assert_eq!(daemon.status("sim:0")["workerBytes"], 16 * MIB);
    let mut events = daemon.events(None);
    sim.set_foreign_bytes(31 * MIB);
    let relieved = next(&mut events, "pressure.relieved");
    assert_eq!(relieved["workers"][0]["measuredBytes"], 16 * MIB, "{relieved:#}");
    assert_eq!(relieved["modelsUnloaded"][0]["model"], "own", "{relieved:#}");
    assert_eq!(resident(&daemon), ["m0", "m1"]);
    let told = peer.asked("memory.pressure_check");
    assert!(told.iter().any(|it| it["level"] == "High" && it["target_mb"].as_f64() > Some(0.0)), "{told:?}");
}

#[test]
fn a_worker_that_lies_is_not_believed_and_the_next_goes() {
    let daemon = daemon();
    let (sim, pid) = (daemon.faults[0].clone(), std::process::id());
    sim.set_process_bytes(pid, 16 * MIB);
    let peer = Peer::join(&daemon, "liar", |_| {});
    peer.held(|held| held.lies = true);
    peer.hold(json!({ "name": "own", "memory_mb": 16, "load_seconds": 0.001, "idle_seconds": 500 }));
    daemon.loaded("m0", "sim:0");
    daemon.post("/api/models/m0/touch", &json!({})).data(200);
    wait_for("its model to be known", || (resident(&daemon).len() == 2).then_some(()));
    let done = optimize(&daemon, &json!({ "minMemoryToFree": 8 * MIB }));
    assert_eq!(done["workers"][0]["acknowledgedBytes"], 16 * MIB, "{done:#}");
    assert_eq!(done["workers"][0]["measuredBytes"], 0);
    assert!(
        done["workers"][0]["errors"][0].as_str().is_some_and(|it| it.contains("0 were measured")),
        "{done:#}"
    );
    assert_eq!(done["modelsUnloaded"][0]["model"], "m0");
    assert_eq!(done["memoryFreed"], 8 * MIB);
    let worker = daemon.get("/api/workers/liar").data(200);
    assert_eq!(worker["faultCount"], 1, "{worker:#}");
}

#[test]
fn workers_let_go_of_what_they_have_attached_and_do_not_use() {
    let daemon = daemon();
    daemon.loaded("m0", "sim:0");
    daemon.loaded("m1", "sim:0");
    let one = Peer::join(&daemon, "one", |_| {});
    let two = Peer::join(&daemon, "two", |_| {});
    one.attach(&daemon, "m0", false);
    two.attach(&daemon, "m0", false);
    two.attach(&daemon, "m1", true);
    wait_for("their models to be known", || {
        let known =
            |name| daemon.get(&format!("/api/workers/{name}")).data(200)["models"].as_array().map(Vec::len);
        (known("one") == Some(1) && known("two") == Some(2)).then_some(())
    });
    // Attached weights are counted once, as the daemon's.
    let status = daemon.get("/api/memory/model/status/sim:0").data(200);
    assert_eq!(status["totalMemoryUsage"], 16 * MIB, "{status:#}");
    assert_eq!(status["modelMemory"]["attachedBytes"], 16 * MIB);
    assert_eq!(status["workerMemory"]["reportedBytes"], 0);
    let busy: Vec<_> =
        status["loadedModels"].as_array().expect("a list").iter().map(|it| &it["busy"]).collect();
    assert_eq!(busy, [false, true], "{status:#}");
    let recommended = pressure(&daemon)["recommendedActions"].clone();
    assert_eq!(recommended[0]["action"], "askToLetGo", "{recommended}");

    let done = optimize(&daemon, &json!({ "forceOptimization": true }));
    assert_eq!(done["modelsUnloaded"][0]["model"], "m0", "{done:#}");
    assert_eq!(done["modelsUnloaded"].as_array().map(Vec::len), Some(1));
    assert_eq!(done["memoryFreed"], 8 * MIB);
    for peer in [&one, &two] {
        assert_eq!(peer.asked("memory.unload_model"), [json!({ "name": "m0" })]);
    }
    // What is busy stays, whatever is asked.
    assert_eq!(resident(&daemon), ["m1"]);
}

#[test]
fn a_worker_that_refuses_or_is_silent_is_named_and_keeps_what_it_has() {
    let daemon = daemon();
    daemon.loaded("m0", "sim:0");
    let refuses = Peer::join(&daemon, "refuses", |_| {});
    refuses.held(|held| held.refuses = true);
    refuses.attach(&daemon, "m0", false);
    let silent = Peer::join(&daemon, "silent", |_| {});
    silent.hold(json!({ "name": "own", "memory_mb": 4, "idle_seconds": 1 }));
    wait_for("their models to be known", || (resident(&daemon).len() == 2).then_some(()));
    silent.held(|held| held.is_silent = true);
    let done = optimize(&daemon, &json!({ "forceOptimization": true, "maxOptimizationTimeMs": 60_000 }));
    let errors: Vec<_> =
        done["workers"].as_array().expect("a list").iter().map(|it| it["errors"][0].clone()).collect();
    assert!(errors.contains(&json!("it is dear to me")), "{done:#}");
    assert!(errors.iter().any(|it| it.as_str().is_some_and(|it| it.contains("did not answer"))), "{done:#}");
    assert_eq!((&done["memoryFreed"], &done["modelsUnloaded"]), (&json!(0), &json!([])));
    assert_eq!((&done["askedBytes"], &done["acknowledgedBytes"]), (&json!(4 * MIB), &json!(0)));
    assert_eq!(done["performanceImpact"]["reloadSeconds"], 0.0, "nothing went");
    assert!(done["message"].as_str().is_some_and(|it| it.contains("2 workers did not")), "{done:#}");
    assert_eq!(resident(&daemon), ["m0", "own"]);
}

#[test]
fn limits_of_an_optimisation_are_kept() {
    let daemon = daemon();
    for name in ["m0", "m1", "m2", "m3"] {
        daemon.loaded(name, "sim:0");
    }
    let done = optimize(&daemon, &json!({}));
    assert_eq!(
        (&done["optimizationTriggered"], &done["operationId"]),
        (&json!(false), &Value::Null),
        "{done:#}"
    );
    let done = optimize(&daemon, &json!({ "minMemoryToFree": 9 * MIB, "strategy": "LeastRecentlyUsed" }));
    assert_eq!(done["memoryFreed"], 16 * MIB, "{done:#}");
    assert_eq!(resident(&daemon), ["m2", "m3"], "{done:#}");
    assert_eq!(done["optimizationStrategy"], "LeastRecentlyUsed");
    assert!(done["performanceImpact"]["reloadSeconds"].as_f64() >= Some(0.0));
    let body = json!({ "forceOptimization": true, "excludeModels": ["m2"] });
    let done = optimize(&daemon, &body);
    assert_eq!(done["modelsUnloaded"][0]["model"], "m3", "{done:#}");
    assert_eq!(resident(&daemon), ["m2"]);
    daemon.loaded("m0", "sim:0");
    let done = optimize(&daemon, &json!({ "forceOptimization": true, "maxModelsToUnload": 1 }));
    assert_eq!(done["modelsUnloaded"].as_array().map(Vec::len), Some(1), "{done:#}");
    daemon.post("/api/models/m2/pin", &json!({}));
    let pinned = resident(&daemon);
    optimize(&daemon, &json!({ "forceOptimization": true }));
    assert_eq!(resident(&daemon).contains(&"m2".to_owned()), pinned.contains(&"m2".to_owned()));

    let refused = |body: Value, field: &str| {
        daemon.post("/api/memory/model/optimize/sim:0", &body).refuses(field);
    };
    refused(json!({ "excludeModels": ["m2", "m22"] }), "excludeModels");
    refused(json!({ "maxOptimizationTimeMs": 0 }), "maxOptimizationTimeMs");
    refused(json!({ "maxModelsToUnload": 0 }), "maxModelsToUnload");
    refused(json!({ "strategy": "Random" }), "strategy");
    refused(json!({ "targetPressureLevel": "None" }), "targetPressureLevel");
    refused(json!({ "minMemoryToFree": -1 }), "minMemoryToFree");
    refused(json!({ "everything": true }), "everything");
    daemon.post("/api/memory/model/optimize/cuda:7", &json!({})).error("NOT_FOUND");
    daemon.get("/api/memory/model/status/cuda:7").error("NOT_FOUND");
    daemon.get("/api/memory/pressure/cuda:7").error("NOT_FOUND");
}

#[test]
fn the_books_are_right_after_a_worker_died_in_the_midst_of_relief() {
    let daemon = daemon();
    let (sim, pid) = (daemon.faults[0].clone(), std::process::id());
    sim.set_process_bytes(pid, 16 * MIB);
    let peer = Peer::join(&daemon, "mortal", |_| {});
    peer.hold(json!({ "name": "own", "memory_mb": 16, "idle_seconds": 500 }));
    wait_for("its model to be known", || (resident(&daemon).len() == 1).then_some(()));
    peer.held(|held| held.is_silent = true);
    let begun = daemon.begin("/api/memory/model/optimize/sim:0", &[], &json!({ "forceOptimization": true }));
    wait_for("it to be asked", || (!peer.asked("memory.unload_model").is_empty()).then_some(()));
    peer.stream.shutdown(std::net::Shutdown::Both).expect("closed");
    sim.set_process_bytes(pid, 0);
    let done = begun.answer().data(200);
    assert!(done["workers"][0]["errors"][0].as_str().is_some_and(|it| it.contains("ended")), "{done:#}");
    let gone = |it: &Value| it["workerBytes"] == 0 && it["foreignBytes"] == 0;
    daemon.status_when("sim:0", "its bytes to be gone", gone);
}
