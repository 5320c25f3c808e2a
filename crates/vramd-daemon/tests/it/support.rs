//! A daemon on a thread of this process, plain HTTP to speak to it, and model files to give it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jiff::civil::Time;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::oneshot;
use vramd_api::KeepAlive;
use vramd_api::attach::Attach;
use vramd_attach::{AttachError, Attachment, Stream, attach};
use vramd_daemon::{Config, Devices, LocalTime, StartError, serve_on};
use vramd_device::{Call, cpu, sim};

/// Far above what anything here takes, also on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const MIB: u64 = 1 << 20;

/// Looks again until `look` has found something.
#[track_caller]
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// One HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    head: String,
    pub text: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error} in {self:#?}"))
    }

    /// The `data` of an answer with that status, and our envelope around it.
    #[track_caller]
    pub fn data(self, status: u16) -> Value {
        let mut body = self.json();
        assert_eq!((self.status, &body["success"]), (status, &json!(true)), "{self:#?}");
        body["data"].take()
    }

    /// The error of an answer with that code, with everything that every error has.
    #[track_caller]
    pub fn error(self, code: &str) -> Value {
        let mut body = self.json();
        let error = body["error"].take();
        assert_eq!(
            (body["success"].clone(), error["code"].clone()),
            (json!(false), json!(code)),
            "{self:#?}"
        );
        assert_eq!(error["status"], self.status, "{self:#?}");
        assert_eq!(self.header("content-type"), Some("application/json"), "{self:#?}");
        assert_eq!(body["requestId"].as_str(), self.header("x-request-id"), "{self:#?}");
        assert!(error["retryable"].is_boolean() && error["message"].is_string(), "{self:#?}");
        error
    }

    /// The error of an argument that is not allowed, and the field that it names.
    #[track_caller]
    pub fn refuses(self, field: &str) -> Value {
        let error = self.error("INVALID_ARGUMENT");
        assert_eq!(error["details"]["field"], field, "{error:#}");
        error
    }
}

/// Sends bytes over a new connection and reads all that comes back.
fn exchange(mut stream: impl Read + Write, request: &[u8]) -> Answer {
    // A daemon that refuses a large body may close before it has read all of it.
    let _ = stream.write_all(request);
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).expect("UTF-8");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP answer: {text:?}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    Answer { status, head: head.to_owned(), text: body.to_owned() }
}

pub fn message(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head =
        format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    if !headers.iter().any(|(name, _)| *name == "Host") {
        head.push_str("Host: localhost\r\n");
    }
    for (name, value) in headers {
        head.extend([*name, ": ", *value, "\r\n"]);
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

/// A clock on the wall that only tests move.
#[derive(Clone, Default)]
pub struct WallClock(Arc<Mutex<Time>>);

impl WallClock {
    /// To `HH:MM`.
    pub fn set(&self, time: &str) {
        *self.0.lock().expect("no test panics with it") = time.parse().expect("a time");
    }

    fn read(self) -> LocalTime {
        LocalTime::of(move |_| *self.0.lock().expect("no test panics with it"))
    }
}

/// A place on disk for one daemon after another.
pub struct Home(Arc<TempDir>);

impl Home {
    pub fn new() -> Self {
        let home = Self(Arc::new(tempfile::tempdir().expect("a directory")));
        std::fs::create_dir(home.path("models")).expect("a directory");
        std::fs::create_dir(home.path("state")).expect("a directory");
        home
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A name of its own for each home.
    pub fn socket(&self) -> PathBuf {
        if cfg!(windows) {
            let name = self.0.path().file_name().expect("a name").to_string_lossy().into_owned();
            return format!(r"\\.\pipe\vramd-test-{name}").into();
        }
        self.path("socket")
    }

    /// A daemon with simulated devices of these sizes.
    pub fn start(&self, sizes: &[u64]) -> Daemon {
        let (devices, simulated) = Self::simulated(sizes);
        self.start_on(devices, simulated)
    }

    /// The same with quiet hours by that clock.
    pub fn start_quiet(&self, sizes: &[u64], hours: &str, clock: &WallClock) -> Daemon {
        let (devices, simulated) = Self::simulated(sizes);
        let hours = hours.parse().expect("quiet hours");
        let configure = |config: &mut Config| config.quiet_hours = Some(hours);
        self.start_by(devices, simulated, clock.clone().read(), configure)
    }

    fn simulated(sizes: &[u64]) -> (Devices, Vec<sim::Faults>) {
        let mut devices = Devices::default();
        let mut simulated = Vec::new();
        for (size, ordinal) in sizes.iter().zip(0..) {
            let device = sim::Device::open(sim::Spec::new(ordinal, *size)).expect("a device");
            simulated.push(device.faults());
            devices.add(Arc::new(device), *size);
        }
        (devices, simulated)
    }

    /// A daemon with host memory alone.
    pub fn start_cpu(&self, limit: u64) -> Daemon {
        let mut devices = Devices::default();
        let device = cpu::Device::open(cpu::Options::default()).expect("host memory");
        devices.add(Arc::new(device), limit);
        self.start_on(devices, Vec::new())
    }

    pub fn start_on(&self, devices: Devices, simulated: Vec<sim::Faults>) -> Daemon {
        self.start_by(devices, simulated, LocalTime::system(), |_| {})
    }

    /// Simulated devices beside host memory, which keeps models that had to go from them up to so much.
    pub fn start_tiers(&self, sizes: &[u64], ram_tier: u64, ram_reserve: u64) -> Daemon {
        let (mut devices, simulated) = Self::simulated(sizes);
        let device = cpu::Device::open(cpu::Options::default()).expect("host memory");
        devices.add(Arc::new(device), 1 << 30);
        self.start_by(devices, simulated, LocalTime::system(), |config| {
            config.ram_tier_bytes = Some(ram_tier);
            config.ram_reserve_bytes = Some(ram_reserve);
        })
    }

    /// What was loaded stays so long at least.
    pub fn start_staying(&self, sizes: &[u64], minimum_stay: KeepAlive) -> Daemon {
        let (devices, simulated) = Self::simulated(sizes);
        self.start_by(devices, simulated, LocalTime::system(), |config| config.minimum_stay = minimum_stay)
    }

    /// One with host memory besides, that may start workers.
    #[cfg(unix)]
    pub fn start_workers(&self, sizes: &[u64], configure: impl FnOnce(&mut Config)) -> Daemon {
        let (mut devices, simulated) = Self::simulated(sizes);
        let device = cpu::Device::open(cpu::Options::default()).expect("host memory");
        devices.add(Arc::new(device), 1 << 30);
        self.start_by(devices, simulated, LocalTime::system(), configure)
    }

    fn start_by(
        &self,
        devices: Devices,
        simulated: Vec<sim::Faults>,
        local: LocalTime,
        configure: impl FnOnce(&mut Config),
    ) -> Daemon {
        let ready = self.path("ready.json");
        let mut config = Config {
            listen: Some(([127, 0, 0, 1], 0).into()),
            socket: Some(self.socket()),
            state_dir: self.path("state"),
            model_roots: vec![self.path("models")],
            cpu_limit_bytes: None,
            sim: None,
            cuda: vramd_daemon::CudaCards::None,
            vulkan: vramd_daemon::Adapters::None,
            d3d12: vramd_daemon::Adapters::None,
            eviction: vramd_api::EvictionPolicy::default(),
            minimum_stay: KeepAlive::Seconds(0),
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
            ready_file: Some(ready.clone()),
        };
        configure(&mut config);
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(serve_on(config, devices, local, async {
                let _ = stopped.await;
            }))
        });
        let ready: Value = wait_for("the ready file", || {
            assert!(!thread.is_finished(), "the daemon ended before it was ready");
            serde_json::from_slice(&std::fs::read(&ready).ok()?).ok()
        });
        Daemon {
            home: Self(self.0.clone()),
            address: ready["address"].as_str().expect("an address").to_owned(),
            faults: simulated,
            thread: Some(thread),
            stop: Some(stop),
        }
    }
}

/// A daemon that serves; it is stopped when this is dropped.
pub struct Daemon {
    pub home: Home,
    pub address: String,
    /// The switchboards of `sim:0`, `sim:1`, …
    pub faults: Vec<sim::Faults>,
    thread: Option<JoinHandle<Result<(), StartError>>>,
    stop: Option<oneshot::Sender<()>>,
}

impl Daemon {
    /// One with simulated devices of these sizes, in a home of its own.
    pub fn start(sizes: &[u64]) -> Self {
        Home::new().start(sizes)
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        self.raw(&message(method, path, headers, body))
    }

    /// Sends these bytes as they are.
    pub fn raw(&self, request: &[u8]) -> Answer {
        exchange(self.connect(), request)
    }

    /// The same over the local socket.
    pub fn send_local(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let stream = Stream::connect(self.socket()).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        exchange(stream, &message(method, path, headers, body))
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    pub fn delete(&self, path: &str) -> Answer {
        self.send("DELETE", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_with(path, &[], body)
    }

    pub fn post_with(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
        let headers = [&[("Content-Type", "application/json")], headers].concat();
        self.send("POST", path, &headers, body.to_string().as_bytes())
    }

    pub fn put(&self, path: &str, body: &Value) -> Answer {
        self.send("PUT", path, &[("Content-Type", "application/json")], body.to_string().as_bytes())
    }

    pub fn socket(&self) -> PathBuf {
        self.home.socket()
    }

    /// Sends a request now and reads its answer on a thread; the connection can be closed before.
    pub fn begin(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Pending {
        let headers = [&[("Content-Type", "application/json")], headers].concat();
        let request = message("POST", path, &headers, body.to_string().as_bytes());
        let stream = self.connect();
        let reader = stream.try_clone().expect("a clone");
        Pending { stream, thread: Some(std::thread::spawn(move || exchange(reader, &request))) }
    }

    pub fn allocate(&self, body: &Value) -> Answer {
        self.post("/api/memory/allocations/allocate", body)
    }

    /// Allocates and answers the id.
    #[track_caller]
    pub fn allocated(&self, body: &Value) -> String {
        self.allocate(body).data(201)["allocationId"].as_str().expect("an id").to_owned()
    }

    pub fn release(&self, id: &str) -> Answer {
        self.delete(&format!("/api/memory/allocations/{id}"))
    }

    pub fn allocations(&self) -> Vec<Value> {
        let page = self.get("/api/memory/allocations?pageSize=1000").data(200);
        page["allocations"].as_array().expect("a list").clone()
    }

    pub fn status(&self, device: &str) -> Value {
        self.get(&format!("/api/memory/status/{device}")).data(200)
    }

    /// The status of a device once `is` holds of it.
    #[track_caller]
    pub fn status_when(&self, device: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        wait_for(what, || Some(self.status(device)).filter(&is))
    }

    /// Waits until a simulated device is as at the start: the books at zero, all of it to be had in one piece. An
    /// empty segment for small blocks may be kept.
    #[track_caller]
    pub fn all_is_back(&self, device: &str) {
        self.status_when(device, "all bytes to be back", |status| {
            let is = |figure: &str, value: &Value| status[figure] == *value;
            ["allocatedBytes", "reservedBytes", "allocationCount"].iter().all(|figure| is(figure, &json!(0)))
                && ["availableBytes", "largestFreeBytes"]
                    .iter()
                    .all(|figure| is(figure, &status["totalBytes"]))
                && is("usedBytes", &status["poolFreeBytes"])
                && status["poolFreeBytes"].as_u64() <= Some(4 * MIB)
        });
    }

    /// Waits until the driver has measured its devices once more: what was sent before has long reached it.
    pub fn settle(&self) {
        let sampled = || self.get("/api/memory/status").data(200)["total"]["sampledAt"].clone();
        let before = sampled();
        wait_for("the next measurement", || (sampled() != before).then_some(()));
    }

    /// Registers the model file of that name under its stem.
    #[track_caller]
    pub fn register(&self, name: &str, file: &str) -> Value {
        let path = self.home.path("models").join(file);
        self.post("/api/models", &json!({"name": name, "components": {"weights": {"path": path}}})).data(201)
    }

    pub fn model(&self, name: &str) -> Value {
        self.get(&format!("/api/models/{name}")).data(200)
    }

    /// Where the model's first component is more than on disk.
    pub fn residency(&self, name: &str) -> Vec<Value> {
        self.model(name)["components"][0]["residency"].as_array().expect("a list").clone()
    }

    /// Starts a load and answers the operation's id.
    #[track_caller]
    pub fn load(&self, name: &str, body: &Value) -> String {
        let answer = self.post(&format!("/api/models/{name}/load"), body);
        assert!(matches!(answer.status, 200 | 202), "{answer:#?}");
        let status = answer.status;
        answer.data(status)["operationId"].as_str().expect("an id").to_owned()
    }

    /// An operation once it has ended.
    #[track_caller]
    pub fn ended(&self, operation: &str) -> Value {
        let ended = self.get(&format!("/api/operations/{operation}?wait=30")).data(200);
        assert!(ended["finishedAt"].is_string(), "{ended:#}");
        ended
    }

    /// Loads on `device`, which has to succeed.
    #[track_caller]
    pub fn loaded(&self, name: &str, device: &str) {
        let operation = self.ended(&self.load(name, &json!({"deviceId": device})));
        assert_eq!(operation["state"], "Completed", "{operation:#}");
    }

    #[track_caller]
    pub fn unloaded(&self, name: &str) {
        let answer = self.post(&format!("/api/models/{name}/unload?wait=30"), &json!({}));
        assert_eq!(answer.data(200)["state"], "Completed");
    }

    pub fn attach(&self, request: &Value) -> Result<Attachment, AttachError> {
        let request: Attach = serde_json::from_value(request.clone()).expect("a request");
        attach(&self.socket(), &request)
    }

    pub fn events(&self, last: Option<&str>) -> Events {
        let mut stream = self.connect();
        // HTTP/1.0: the body comes as it is, without chunks.
        let last = last.map(|id| format!("Last-Event-ID: {id}\r\n")).unwrap_or_default();
        write!(stream, "GET /api/events HTTP/1.0\r\nHost: localhost\r\n{last}\r\n").expect("sent");
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        lines.read_line(&mut line).expect("a status");
        assert!(line.contains(" 200 "), "{line}");
        while line.trim_end() != "" {
            line.clear();
            lines.read_line(&mut line).expect("a header");
        }
        Events { lines }
    }

    /// Waits until the daemon has ended by itself; why it did.
    pub fn died(mut self) -> StartError {
        let thread = self.thread.take().expect("it runs until now");
        wait_for("the daemon to end", || thread.is_finished().then_some(()));
        thread.join().expect("the daemon's thread does not panic").expect_err("it ended by itself")
    }

    /// Stops it as SIGTERM does, and waits until it has ended.
    #[track_caller]
    pub fn stop(mut self) -> Home {
        self.end().expect("a clean stop");
        Home(self.home.0.clone())
    }

    fn end(&mut self) -> Result<(), StartError> {
        drop(self.stop.take());
        self.thread.take().map_or(Ok(()), |thread| thread.join().expect("the daemon does not panic"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.expect("the daemon does not panic").expect("a clean stop");
            }
        }
    }
}

/// A request under way.
pub struct Pending {
    stream: TcpStream,
    thread: Option<JoinHandle<Answer>>,
}

impl Pending {
    pub fn is_answered(&self) -> bool {
        self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }

    pub fn answer(mut self) -> Answer {
        self.thread.take().expect("taken once").join().expect("an answer")
    }

    /// Goes away without reading the answer.
    pub fn hang_up(mut self) {
        self.stream.shutdown(std::net::Shutdown::Both).expect("closed");
        // Without an answer it panics, which is what was asked for.
        let _ = self.thread.take().expect("taken once").join();
    }
}

/// The event stream, line by line.
pub struct Events {
    lines: BufReader<TcpStream>,
}

impl Events {
    /// The next event's id, kind and data; None at the end of the stream.
    pub fn next(&mut self) -> Option<(String, String, Value)> {
        let (mut id, mut kind, mut data) = (String::new(), String::new(), None);
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line).expect("a line in time") == 0 {
                return None;
            }
            let line = line.trim_end();
            match line.split_once(": ") {
                Some(("id", value)) => value.clone_into(&mut id),
                Some(("event", value)) => value.clone_into(&mut kind),
                Some(("data", value)) => data = Some(serde_json::from_str(value).expect("JSON")),
                _ if line.is_empty() && data.is_some() => return data.map(|data| (id, kind, data)),
                _ => {}
            }
        }
    }

    /// The data of the next event of that kind.
    #[track_caller]
    pub fn until(&mut self, kind: &str) -> Value {
        loop {
            let (_, found, data) = self.next().unwrap_or_else(|| panic!("the stream ended before {kind}"));
            if found == kind {
                return data["data"].clone();
            }
        }
    }
}

/// A safetensors file: a header, and what follows it.
pub fn file_of(header: &str, payload: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), payload].concat()
}

/// Bytes that are different everywhere.
pub fn payload(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|at| (at / 251) as u8 ^ at as u8 ^ seed).collect()
}

/// A file with one tensor `name` of `bytes` bytes, and a scalar.
pub fn write_model(path: &Path, name: &str, bytes: usize) -> Vec<u8> {
    let end = bytes + 2;
    let header = json!({
        "__metadata__": {"format": "pt"},
        name: {"dtype": "U8", "shape": [bytes], "data_offsets": [0, bytes]},
        format!("{name}.scale"): {"dtype": "BF16", "shape": [], "data_offsets": [bytes, end]},
    });
    let payload = payload(end, 7);
    std::fs::write(path, file_of(&header.to_string(), &payload)).expect("a file");
    payload
}

/// A daemon with the model `tiny` of that size registered.
pub fn with_model(sizes: &[u64], bytes: usize) -> (Daemon, Vec<u8>) {
    let daemon = Daemon::start(sizes);
    let payload = write_model(&daemon.home.path("models/tiny.safetensors"), "a", bytes);
    daemon.register("tiny", "tiny.safetensors");
    (daemon, payload)
}

/// Holds calls back until the guard is dropped, once `count` of them are caught.
pub fn caught(held: &sim::Held, call: Call) {
    assert!(held.wait_until_caught(1, PATIENCE), "no {call:?} came");
}
