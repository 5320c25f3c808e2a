//! Bridges: programs that people already run, played by servers that answer in the shapes of those projects' documents.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use vramd_daemon::{Bridge, BridgeKind};
use vramd_device::sim;

use crate::support::{Daemon, Home, MIB, wait_for};

/// What a program answers: to a method, a path and a body, a status and a text; None: not at all.
type Answers = dyn Fn(&str, &str, &Value) -> Option<(u16, String)> + Send + Sync;

/// A server that somebody else runs.
struct Program {
    url: String,
    answers: Arc<Mutex<Arc<Answers>>>,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Program {
    fn serve(answers: impl Fn(&str, &str, &Value) -> Option<(u16, String)> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let answers: Arc<Mutex<Arc<Answers>>> = Arc::new(Mutex::new(Arc::new(answers)));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let program = Self { url, answers: answers.clone(), asked: asked.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (answers, asked) = (answers.clone(), asked.clone());
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(&stream);
                    let mut first = String::new();
                    let (mut length, mut line) = (0, String::new());
                    reader.read_line(&mut first).ok()?;
                    while reader.read_line(&mut line).ok()? > 2 {
                        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                            length = value.trim().parse().ok()?;
                        }
                        line.clear();
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body).ok()?;
                    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
                    let mut words = first.split_whitespace();
                    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
                    asked.lock().ok()?.push((format!("{method} {path}"), body.clone()));
                    let answers = answers.lock().ok()?.clone();
                    let Some((status, text)) = answers(&method, &path, &body) else {
                        // Until the other side gives up.
                        return (&stream).read(&mut [0]).ok();
                    };
                    let head = format!(
                        "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                        text.len()
                    );
                    (&stream).write_all((head + &text).as_bytes()).ok()?;
                    Some(0)
                });
            }
        });
        program
    }

    fn now(&self, answers: impl Fn(&str, &str, &Value) -> Option<(u16, String)> + Send + Sync + 'static) {
        *self.answers.lock().expect("no test panics with it") = Arc::new(answers);
    }

    fn asked(&self, what: &str) -> Vec<Value> {
        let asked = self.asked.lock().expect("no test panics with it");
        asked.iter().filter(|(request, _)| request == what).map(|(_, body)| body.clone()).collect()
    }
}

fn daemon(kind: BridgeKind, program: &Program, size_bytes: Option<u64>) -> Daemon {
    Home::new().start_workers(&[64 * MIB], |config| {
        let name = "theirs".parse().expect("a name");
        let device = Some("sim:0".to_owned());
        config.bridges = vec![Bridge { name, kind, url: program.url.clone(), device, size_bytes }];
    })
}

fn worker(daemon: &Daemon) -> Value {
    let answer = daemon.get("/api/workers/theirs");
    if answer.status == 200 { answer.data(200) } else { Value::Null }
}

#[track_caller]
fn when(daemon: &Daemon, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    wait_for(what, || Some(worker(daemon)).filter(&is))
}

fn known(daemon: &Daemon) -> Value {
    let has = |it: &Value| it["models"].as_array().is_some_and(|all| !all.is_empty());
    when(daemon, "its models", |it| it["state"] == "Ready" && has(it))["models"].clone()
}

fn freed(daemon: &Daemon, bytes: u64) -> Value {
    let done =
        daemon.post("/api/memory/model/optimize/sim:0", &json!({ "minMemoryToFree": bytes })).data(200);
    assert_eq!(done["workers"][0]["name"], "theirs", "{done:#}");
    done
}

#[allow(clippy::unnecessary_wraps)] // as all that a program answers
fn ok(body: &Value) -> Option<(u16, String)> {
    Some((200, body.to_string()))
}

/// Ollama with one model that takes 16 MiB of the card, until it is told to let it go.
fn ollama(sim: Option<sim::Faults>) -> impl Fn(&str, &str, &Value) -> Option<(u16, String)> + Send + Sync {
    let is_loaded = Mutex::new(true);
    move |method, path, body| {
        let mut is_loaded = is_loaded.lock().expect("no test panics with it");
        match (method, path) {
            ("GET", "/api/ps") if *is_loaded => ok(&json!({ "models": [{
                "name": "llama3.2:latest", "model": "llama3.2:latest", "size": 20 * MIB, "size_vram": 16 * MIB,
                "digest": "2ae6f6dd", "details": { "format": "gguf" }, "expires_at": "2026-06-04T14:38:31.83753-07:00",
            }] })),
            ("GET", "/api/ps") => ok(&json!({ "models": [] })),
            ("POST", "/api/generate") if body["keep_alive"] == 0 => {
                if let Some(sim) = &sim {
                    *is_loaded = false;
                    sim.set_foreign_bytes(0);
                }
                ok(&json!({ "model": body["model"], "response": "", "done": true, "done_reason": "unload" }))
            }
            _ => Some((404, "404 page not found".to_owned())),
        }
    }
}

#[test]
fn a_model_of_ollama_is_seen_in_the_ledger_and_gives_way() {
    let program = Program::serve(ollama(None));
    let daemon = daemon(BridgeKind::Ollama, &program, None);
    let sim = daemon.faults[0].clone();
    program.now(ollama(Some(sim.clone())));
    sim.set_foreign_bytes(16 * MIB);
    let models = known(&daemon);
    assert_eq!((&models[0]["name"], &models[0]["ownBytes"]), (&json!("llama3.2:latest"), &json!(16 * MIB)));
    assert_eq!(worker(&daemon)["implementation"], format!("Ollama at {}", program.url));
    let status = daemon.status_when("sim:0", "it to be charged", |it| it["workerBytes"] == 16 * MIB);
    assert_eq!(status["foreignBytes"], 0);
    let done = freed(&daemon, 8 * MIB);
    assert_eq!(
        (&done["memoryFreed"], &done["modelsUnloaded"][0]["model"]),
        (&json!(16 * MIB), &models[0]["name"])
    );
    assert_eq!(program.asked("POST /api/generate"), [json!({ "model": "llama3.2:latest", "keep_alive": 0 })]);
    daemon.status_when("sim:0", "nothing to be left", |it| it["workerBytes"] == 0 && it["foreignBytes"] == 0);
}

#[test]
fn one_that_says_it_unloads_and_does_not_is_not_believed() {
    let program = Program::serve(ollama(None));
    let daemon = daemon(BridgeKind::Ollama, &program, None);
    daemon.faults[0].set_foreign_bytes(16 * MIB);
    known(&daemon);
    let done = freed(&daemon, 8 * MIB);
    assert_eq!(
        (&done["memoryFreed"], &done["workers"][0]["acknowledgedBytes"]),
        (&json!(0), &json!(16 * MIB))
    );
    assert!(
        worker(&daemon)["lastFault"]["message"].as_str().is_some_and(|it| it.contains("0 were measured"))
    );
}

#[test]
fn comfy_ui_frees_what_it_holds_unless_it_computes() {
    let answers = |running: Value, sim: Option<sim::Faults>| {
        move |method: &str, path: &str, body: &Value| match (method, path) {
            ("GET", "/system_stats") => ok(&json!({
                "system": { "os": "posix", "ram_total": 1, "ram_free": 1, "comfyui_version": "0.3.50" },
                "devices": [{
                    "name": "cuda:0 NVIDIA", "type": "cuda", "index": 0, "vram_total": 64 * MIB,
                    "vram_free": 40 * MIB, "torch_vram_total": 24 * MIB, "torch_vram_free": MIB,
                }],
            })),
            ("GET", "/queue") => ok(&json!({ "queue_running": running, "queue_pending": [] })),
            ("POST", "/free") if body["unload_models"] == true && body["free_memory"] == true => {
                sim.as_ref().expect("it is idle").set_foreign_bytes(0);
                Some((200, String::new()))
            }
            _ => Some((404, String::new())),
        }
    };
    let program = Program::serve(answers(json!([[0, "id"]]), None));
    let daemon = daemon(BridgeKind::ComfyUi, &program, None);
    daemon.faults[0].set_foreign_bytes(24 * MIB);
    assert_eq!(known(&daemon)[0]["busy"], true);
    let body = json!({ "minMemoryToFree": MIB });
    let done = daemon.post("/api/memory/model/optimize/sim:0", &body).data(200);
    assert_eq!(done["workers"], json!([]), "what is busy is not asked: {done:#}");
    program.now(answers(json!([]), Some(daemon.faults[0].clone())));
    when(&daemon, "it to be idle", |it| it["models"][0]["busy"] == false);
    assert_eq!(freed(&daemon, MIB)["memoryFreed"], 24 * MIB);
}

#[test]
fn vllm_goes_to_sleep_and_wakes_up() {
    let program = Program::serve(|_, _, _| None);
    let daemon = daemon(BridgeKind::Vllm, &program, Some(32 * MIB));
    let sim = daemon.faults[0].clone();
    sim.set_foreign_bytes(32 * MIB);
    let asleep = Mutex::new(false);
    program.now(move |method, path, _| {
        let mut asleep = asleep.lock().expect("no test panics with it");
        match (method, path) {
            ("GET", "/is_sleeping") => ok(&json!({ "is_sleeping": *asleep })),
            ("GET", "/v1/models") => ok(&json!({ "object": "list", "data": [{ "id": "qwen", "object": "model" }] })),
            ("GET", "/metrics") => {
                Some((200, "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{model_name=\"qwen\"} 0.0\n".to_owned()))
            }
            ("POST", "/sleep?level=1") => {
                *asleep = true;
                sim.set_foreign_bytes(0);
                Some((200, String::new()))
            }
            ("POST", "/wake_up") => {
                *asleep = false;
                Some((200, String::new()))
            }
            _ => Some((404, String::new())),
        }
    });
    let idle = |it: &Value| it["state"] == "Ready" && it["models"][0]["busy"] == false;
    let models = when(&daemon, "it to be idle", idle)["models"].clone();
    assert_eq!((&models[0]["name"], &models[0]["ownBytes"]), (&json!("qwen"), &json!(32 * MIB)));
    assert_eq!(freed(&daemon, MIB)["memoryFreed"], 32 * MIB);
    when(&daemon, "it to sleep", |it| it["models"][0]["state"] == "Offloaded");
    let body = json!({ "action": "memory.restore_model", "data": { "name": "qwen" } });
    daemon.post("/api/workers/theirs/call", &body).data(200);
    when(&daemon, "it to be awake", |it| it["models"][0]["state"] == "Loaded");
}

#[test]
fn llama_swap_unloads_what_runs() {
    let program = Program::serve(|_, _, _| None);
    let daemon = daemon(BridgeKind::LlamaSwap, &program, Some(16 * MIB));
    let sim = daemon.faults[0].clone();
    sim.set_foreign_bytes(16 * MIB);
    program.now(move |method, path, _| match (method, path) {
        ("GET", "/running") => ok(&json!({ "running": [
            { "model": "chat", "state": "ready" }, { "model": "coder", "state": "starting" },
        ] })),
        ("POST", "/api/models/unload/chat") => {
            sim.set_foreign_bytes(8 * MIB);
            Some((200, "OK".to_owned()))
        }
        _ => Some((404, String::new())),
    });
    let models = known(&daemon);
    assert_eq!([&models[0]["busy"], &models[1]["busy"]], [&json!(false), &json!(true)]);
    assert_eq!(freed(&daemon, MIB)["memoryFreed"], 8 * MIB);
}

#[test]
fn one_that_answers_errors_html_or_nothing_is_named_and_taken_up_again() {
    let program = Program::serve(|_, _, _| Some((500, "oops".to_owned())));
    let daemon = daemon(BridgeKind::Ollama, &program, None);
    let reason = |part: &str| {
        let found = when(&daemon, part, |it| {
            let exit = it["lastExit"]["reason"].as_str().unwrap_or_default();
            let fault = it["lastFault"]["message"].as_str().unwrap_or_default();
            exit.contains(part) || fault.contains(part)
        });
        assert_ne!(found["state"], "Failed");
    };
    reason("GET /api/ps: it answered 500");
    program.now(ollama(None));
    when(&daemon, "it to be taken up", |it| it["state"] == "Ready" && !it["lastSynchronized"].is_null());
    program.now(|_, _, _| Some((200, "<html>welcome</html>".to_owned())));
    let body = json!({ "action": "memory.get_model_info" });
    let ask = || daemon.post("/api/workers/theirs/call", &body).error("WORKER_FAILED")["message"].clone();
    let error = ask();
    assert!(error.as_str().is_some_and(|it| it.contains("no JSON: <html>")), "{error}");
    program.now(|_, _, _| ok(&json!({ "models": 3 })));
    let error = ask();
    assert!(error.as_str().is_some_and(|it| it.contains("without models")), "{error}");
    program.now(|_, _, _| None);
    let error = ask();
    assert!(error.as_str().is_some_and(|it| it.contains("no answer within 3 s")), "{error}");
}
