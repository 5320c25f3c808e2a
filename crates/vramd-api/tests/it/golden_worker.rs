//! The lines in `protocol/golden/worker`, which the tests of the Python package read too.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use vramd_api::worker_protocol::{BadLine, Hello, Message, Request, decode};

#[derive(Debug, Deserialize)]
struct Case {
    name: String,
    from: String,
    line: String,
    #[serde(default)]
    message: Value,
    #[serde(default)]
    fault: Option<String>,
}

fn cases(from: &str) -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../protocol/golden/worker/lines.json");
    let list = std::fs::read(path).expect("the list of golden lines is there");
    let cases: Vec<Case> = serde_json::from_slice(&list).expect("the list of golden lines is JSON");
    let of: Vec<Case> = cases.into_iter().filter(|case| case.from == from).collect();
    assert!(of.len() > 10, "there are lines from the {from}");
    of
}

#[test]
fn requests_are_written_to_the_byte() {
    for case in cases("daemon").into_iter().filter(|case| case.fault.is_none()) {
        let message = &case.message;
        let text = |field: &str| message[field].as_str().expect("a text");
        let (request_id, action, deadline_ms) =
            (text("request_id"), text("action"), message["deadline_ms"].as_u64());
        let line = if action == "hello" {
            let data: Hello = serde_json::from_value(message["data"].clone()).expect("a hello");
            Request { request_id, action, data: &data, deadline_ms }.encode()
        } else {
            Request { request_id, action, data: &message["data"], deadline_ms }.encode()
        };
        assert_eq!(String::from_utf8_lossy(&line), case.line, "{}", case.name);
    }
}

#[test]
fn lines_of_workers_read_as_listed() {
    for case in cases("worker") {
        let read = decode(case.line.trim_end_matches('\n').as_bytes());
        let name = &case.name;
        let told = match (read, case.fault.as_deref()) {
            (Err(BadLine::NotJson(_)), Some("not_json")) | (Err(BadLine::Neither), Some("neither")) => {
                continue;
            }
            (Ok(message), None) => message,
            (read, fault) => panic!("{name}: {read:?}, not {fault:?}"),
        };
        match told {
            Message::Reply { request_id, outcome } => {
                assert_eq!(case.message["request_id"], request_id, "{name}");
                assert_eq!(case.message["success"], outcome.is_ok(), "{name}");
                match outcome {
                    Ok(data) => {
                        let data: Value = serde_json::from_str(data.get()).expect("an object");
                        assert_eq!(case.message["data"], data, "{name}");
                    }
                    Err(error) => {
                        let expected = &case.message["error"];
                        assert_eq!(
                            (&expected["code"], &expected["message"]),
                            (&error.code.into(), &error.message.into())
                        );
                        assert_eq!(expected["hint"].as_str(), error.hint.as_deref(), "{name}");
                    }
                }
            }
            Message::Event { event, data } => {
                let data: Value = serde_json::from_str(data.expect("data").get()).expect("an object");
                assert_eq!((&case.message["event"], &case.message["data"]), (&event.into(), &data));
            }
        }
    }
}
