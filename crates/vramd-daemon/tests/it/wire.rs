//! The envelope, routing, what is refused before anything is done, and who may call.

use std::io::Write;

use serde_json::{Value, json};
use vramd_attach::Stream;

use crate::support::{Daemon, MIB, wait_for};

const JSON: (&str, &str) = ("Content-Type", "application/json");
const ALLOCATE: &str = "/api/memory/allocations/allocate";

#[test]
fn every_answer_is_an_envelope_with_the_callers_request_id() {
    let daemon = Daemon::start(&[64 * MIB]);
    let answer = daemon.send("GET", "/api/devices", &[("X-Request-Id", "mine-1")], b"");
    assert_eq!(answer.header("x-request-id"), Some("mine-1"));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let body = answer.json();
    assert_eq!((&body["success"], &body["requestId"]), (&json!(true), &json!("mine-1")));
    assert_eq!(body["data"]["devices"][0]["deviceId"], "sim:0");

    let long = "x".repeat(129);
    for unsound in ["", "two words", long.as_str()] {
        let answer = daemon.send("GET", "/healthz", &[("X-Request-Id", unsound)], b"");
        let id = answer.header("x-request-id").expect("an id").to_owned();
        assert_ne!(id, unsound);
        assert_eq!(answer.json()["requestId"], id);
    }
}

#[test]
fn what_is_not_there_is_told_in_the_envelope() {
    let daemon = Daemon::start(&[64 * MIB]);
    for path in ["/", "/api", "/api/nothing", "/api/memory/allocations/a/b", "/api/devices/"] {
        let error = daemon.get(path).error("NOT_FOUND");
        assert!(error["hint"].is_string(), "{path}");
    }
    for (path, code) in [
        ("/api/devices/sim:7", "NOT_FOUND"),
        ("/api/devices/nonsense", "NOT_FOUND"),
        ("/api/models/unknown", "NOT_FOUND"),
        ("/api/models/..%2Fx", "INVALID_ARGUMENT"),
        ("/api/models/%FF", "INVALID_ARGUMENT"),
        ("/api/memory/allocation/0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f", "NOT_FOUND"),
        ("/api/operations/0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f", "NOT_FOUND"),
        ("/api/memory/allocation/no-uuid", "INVALID_ARGUMENT"),
        ("/api/operations/no-uuid", "INVALID_ARGUMENT"),
    ] {
        daemon.get(path).error(code);
    }
    daemon.release("no-uuid").refuses("allocationId");
    daemon.release("0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f").error("NOT_FOUND");
}

#[test]
fn methods_that_a_path_does_not_take_are_refused() {
    let daemon = Daemon::start(&[64 * MIB]);
    for (method, path) in
        [("POST", "/api/devices"), ("DELETE", "/healthz"), ("PATCH", "/api/models"), ("GET", ALLOCATE)]
    {
        daemon.send(method, path, &[JSON], b"{}").error("METHOD_NOT_ALLOWED");
    }
    // No page of another origin gets a preflight answered.
    let headers = [("Origin", "http://evil.example"), ("Access-Control-Request-Method", "POST")];
    let preflight = daemon.send("OPTIONS", ALLOCATE, &headers, b"");
    assert_eq!(preflight.header("access-control-allow-origin"), None);
    preflight.error("PERMISSION_DENIED");
    daemon.send("OPTIONS", ALLOCATE, &[], b"").error("METHOD_NOT_ALLOWED");
}

#[test]
fn only_json_of_a_bounded_size_is_read() {
    let daemon = Daemon::start(&[64 * MIB]);
    let body = br#"{"sizeBytes":4096}"#;
    daemon.send("POST", ALLOCATE, &[], body).error("UNSUPPORTED_MEDIA_TYPE");
    daemon.send("POST", ALLOCATE, &[("Content-Type", "text/plain")], body).error("UNSUPPORTED_MEDIA_TYPE");
    daemon.send("POST", ALLOCATE, &[("Content-Type", "Application/JSON; charset=utf-8")], body).data(201);

    let large = format!(r#"{{"sizeBytes":4096,"purpose":"{}"}}"#, "x".repeat(1 << 20));
    let error = daemon.send("POST", ALLOCATE, &[JSON], large.as_bytes()).error("PAYLOAD_TOO_LARGE");
    assert_eq!(error["details"]["limitBytes"], 1 << 20);
    for broken in ["", "{", "[4096]", "null", "{\"sizeBytes\":1}{}", "\u{0}"] {
        daemon.send("POST", ALLOCATE, &[JSON], broken.as_bytes()).refuses("body");
    }
    daemon
        .send("POST", ALLOCATE, &[JSON], b"{\"sizeBytes\":1,\"purpose\":\"\xff\"}")
        .error("INVALID_ARGUMENT");
    assert_eq!(daemon.allocations().len(), 1);
}

#[test]
fn arguments_that_are_not_allowed_are_named() {
    let daemon = Daemon::start(&[64 * MIB]);
    daemon.send("POST", ALLOCATE, &[JSON], br#"{"sizeBytes":9223372036854775808}"#).refuses("sizeBytes");
    daemon.send("POST", ALLOCATE, &[JSON], br#"{"sizeBytes":99999999999999999999999}"#).refuses("sizeBytes");
    let cases = [
        (json!({}), "sizeBytes"),
        (json!({"sizeBytes": 0}), "sizeBytes"),
        (json!({"sizeBytes": -1}), "sizeBytes"),
        (json!({"sizeBytes": 1.5}), "sizeBytes"),
        (json!({"sizeBytes": "1GiB"}), "sizeBytes"),
        (json!({"sizeBytes": null}), "sizeBytes"),
        (json!({"sizeBytes": 1, "size": 1}), "size"),
        (json!({"sizeBytes": 1, "alignment": 0}), "alignment"),
        (json!({"sizeBytes": 1, "alignment": 3}), "alignment"),
        (json!({"sizeBytes": 1, "alignment": 4 * MIB}), "alignment"),
        (json!({"sizeBytes": 1, "leaseSeconds": 0}), "leaseSeconds"),
        (json!({"sizeBytes": 1, "leaseSeconds": 31_536_001}), "leaseSeconds"),
        (json!({"sizeBytes": 1, "persistent": true, "leaseSeconds": 5}), "leaseSeconds"),
        (json!({"sizeBytes": 1, "timeoutSeconds": 86_401}), "timeoutSeconds"),
        (json!({"sizeBytes": 1, "purpose": "x".repeat(129)}), "purpose"),
        (json!({"sizeBytes": 1, "purpose": "\u{1b}[2J"}), "purpose"),
        (json!({"sizeBytes": 1, "priority": "Urgent"}), "priority"),
        (json!({"sizeBytes": 1, "owner": "two words"}), "owner"),
        (json!({"sizeBytes": 1, "memoryType": "DDR"}), "memoryType"),
        (json!({"sizeBytes": 1, "onShortage": "burn"}), "onShortage"),
    ];
    for (body, field) in cases {
        daemon.allocate(&body).refuses(field);
    }
    daemon.post(&format!("{ALLOCATE}/sim:9"), &json!({"sizeBytes": 1})).error("NOT_FOUND");
    assert!(daemon.allocations().is_empty());
}

#[test]
fn parameters_that_are_not_known_are_refused() {
    let daemon = Daemon::start(&[64 * MIB]);
    for path in [
        "/api/memory/allocations?colour=red",
        "/api/memory/allocations?persistent=maybe",
        "/api/memory/allocations?sort=size",
        "/api/memory/status?includes=processes",
        "/api/operations?state=Done",
        "/api/operations/0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f?wait=-1",
    ] {
        daemon.get(path).error("INVALID_ARGUMENT");
    }
    daemon.get("/api/events?since=3").refuses("query");
    daemon.get("/api/memory/allocations?pageSize=0").refuses("pageSize");
    daemon.get("/api/memory/allocations?pageSize=1001").refuses("pageSize");
    daemon.get("/api/memory/allocations?pageToken=x").refuses("pageToken");
    daemon.get("/api/memory/status?include=allocations,weather").refuses("include");
    daemon.get("/api/operations/0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f?wait=601").refuses("wait");
}

#[test]
fn a_device_is_found_by_its_id_and_by_its_uuid() {
    let daemon = Daemon::start(&[64 * MIB, 32 * MIB]);
    let uuid = daemon.get("/api/devices/sim:1").data(200)["uuid"].as_str().expect("a uuid").to_owned();
    for name in ["sim:1", uuid.as_str()] {
        assert_eq!(daemon.get(&format!("/api/devices/{name}")).data(200)["deviceId"], "sim:1");
        assert_eq!(daemon.status(name)["totalBytes"], 32 * MIB);
        let taken = daemon.post(&format!("{ALLOCATE}/{name}"), &json!({"sizeBytes": 4096})).data(201);
        assert_eq!(taken["deviceId"], "sim:1");
        let page = daemon.get(&format!("/api/memory/allocations/device/{name}")).data(200);
        assert!(!page["allocations"].as_array().expect("a list").is_empty());
        assert_eq!(daemon.get(&format!("/api/memory/limits/{name}")).data(200)["limitBytes"], 32 * MIB);
    }
    let page = daemon.get("/api/memory/allocations/device/sim:0").data(200);
    assert_eq!(page["allocations"], json!([]));
}

#[test]
fn pages_of_other_places_cannot_reach_the_daemon() {
    let daemon = Daemon::start(&[64 * MIB]);
    for host in ["evil.example", "evil.example:80", "10.0.0.1", "localhost.evil.example"] {
        daemon.send("GET", "/api/devices", &[("Host", host)], b"").error("PERMISSION_DENIED");
    }
    let own = format!("http://{}", daemon.address);
    for origin in ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost", "file://"] {
        let headers = [JSON, ("Origin", origin)];
        daemon.send("POST", ALLOCATE, &headers, br#"{"sizeBytes":1}"#).error("PERMISSION_DENIED");
    }
    assert!(daemon.allocations().is_empty());
    daemon.send("GET", "/api/devices", &[("Origin", &own)], b"").data(200);
    // On the Unix socket there are no pages, and clients put any name into `Host`.
    daemon.send_local("GET", "/api/devices", &[("Host", "evil.example")], b"").data(200);
}

#[test]
fn the_daemon_describes_itself() {
    let daemon = Daemon::start(&[64 * MIB]);
    for path in ["/healthz", "/readyz"] {
        let health = daemon.get(path).data(200);
        assert_eq!((&health["status"], health["version"].is_string()), (&json!("ok"), true));
    }
    let served = daemon.get("/api/openapi.json").json();
    let generated: Value = serde_json::from_str(&vramd_daemon::openapi_json()).expect("a JSON document");
    assert_eq!(served, generated);
    assert!(daemon.get("/docs/").text.contains("<html"));
}

#[test]
fn every_reference_in_the_document_leads_somewhere() {
    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
                fields.values().for_each(|value| references(value, found));
            }
            Value::Array(values) => values.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }
    let document: Value = serde_json::from_str(&vramd_daemon::openapi_json()).expect("a JSON document");
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(!found.is_empty());
    for reference in found {
        let place = reference.strip_prefix('#').expect("a reference inside the document");
        assert!(document.pointer(place).is_some(), "{reference}");
    }
}

#[test]
fn on_the_local_socket_the_owner_is_the_peer() {
    let daemon = Daemon::start(&[64 * MIB]);
    let body = br#"{"sizeBytes":4096}"#;
    #[cfg(unix)]
    let mine = format!("uid:{}", rustix::process::getuid().as_raw());
    #[cfg(windows)]
    let mine = "uid:0";
    assert_eq!(daemon.send_local("POST", ALLOCATE, &[JSON], body).data(201)["owner"], mine);
    assert_eq!(daemon.send("POST", ALLOCATE, &[JSON], body).data(201)["owner"], "local");
}

#[test]
fn half_a_request_harms_nobody() {
    let daemon = Daemon::start(&[64 * MIB]);
    let mut silent = Vec::new();
    for part in
        ["", "G", "GET /api", "POST /api/memory/allocations/allocate HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"]
    {
        let mut stream = daemon.connect();
        stream.write_all(part.as_bytes()).expect("sent");
        silent.push(stream);
        let mut stream = Stream::connect(daemon.socket()).expect("a connection");
        stream.write_all(part.as_bytes()).expect("sent");
    }
    daemon.get("/api/devices").data(200);
    let garbage = daemon.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n");
    assert_eq!(garbage.status, 400);
    drop(silent);
    wait_for("the daemon to go on", || (daemon.get("/readyz").status == 200).then_some(()));
}
