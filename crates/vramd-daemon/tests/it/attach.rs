//! The attach socket: what it hands out, what it refuses, and leases that end with their connections.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vramd_api::attach::{Attach, FrameKind, HEADER_BYTES, Header, MAX_REQUEST_BYTES, encode_frame};
use vramd_api::{ApiError, ErrorCode};
use vramd_attach::{AttachError, Attachment, Mapped, Stream};

use crate::support::{Daemon, Home, MIB, PATIENCE, caught, wait_for, with_model};

pub fn connect(daemon: &Daemon) -> Stream {
    let stream = Stream::connect(daemon.socket()).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// What the daemon says until it closes, which has to be one error frame.
#[track_caller]
pub fn refusal(mut stream: Stream) -> ApiError {
    let mut bytes = Vec::new();
    // A daemon that closes with something of ours unread ends the stream with a reset.
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    let header =
        bytes.first_chunk::<HEADER_BYTES>().map(Header::decode).expect("a header").expect("a good one");
    assert_eq!((header.kind, header.descriptors), (FrameKind::Error, 0));
    let error: ApiError = serde_json::from_slice(&bytes[HEADER_BYTES..]).expect("an error");
    assert_eq!(error.status, error.code.status());
    error
}

#[track_caller]
pub fn refused(daemon: &Daemon, request: &Value) -> ApiError {
    match daemon.attach(request) {
        Err(AttachError::Api(error)) => *error,
        other => panic!("{request}: {other:?}"),
    }
}

fn write_at(attachment: &Attachment, at: u64, bytes: &[u8]) -> std::io::Result<()> {
    vramd_attach::write_at(&attachment.descriptors[0], attachment.attached.block.offset + at, bytes)
}

fn read_at(attachment: &Attachment, at: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let offset = attachment.attached.block.offset + at;
    vramd_attach::read_at(&attachment.descriptors[0], offset, &mut bytes).expect("read");
    bytes
}

#[test]
fn a_model_is_held_once_and_read_by_many() {
    let home = Home::new();
    let daemon = home.start_cpu(256 * MIB);
    let payload = crate::support::write_model(&home.path("models/tiny.safetensors"), "a", 3 << 20);
    daemon.register("tiny", "tiny.safetensors");
    daemon.loaded("tiny", "cpu:0");
    let held = daemon.status("cpu:0")["allocatedBytes"].clone();
    let many: Vec<_> = (0..8).map(|_| daemon.attach(&json!({"model": "tiny"})).expect("attached")).collect();
    for attachment in &many {
        assert_eq!(read_at(attachment, 0, payload.len()), payload);
        write_at(attachment, 0, b"x").expect_err("weights are read-only");
    }
    assert_eq!(daemon.status("cpu:0")["allocatedBytes"], held);
    assert_eq!(daemon.residency("tiny")[0]["attachedCount"], 8);
    let leases: std::collections::BTreeSet<_> = many.iter().map(|one| one.attached.lease_id).collect();
    assert_eq!(leases.len(), 8);
}

#[test]
fn an_allocation_is_shared_for_reading_and_for_writing() {
    let daemon = Daemon::start(&[64 * MIB]);
    for size in [5000, 3 * MIB] {
        let id = daemon.allocated(&json!({"sizeBytes": size}));
        let writer = daemon.attach(&json!({"allocationId": id, "access": "write"})).expect("attached");
        let reader = daemon.attach(&json!({"allocationId": id})).expect("attached");
        assert_eq!((writer.attached.block.bytes, writer.tensors.len()), (size, 0));
        assert_eq!(read_at(&reader, 0, 5000), [0; 5000]);
        write_at(&writer, size - 3, b"abc").expect("written");
        assert_eq!(read_at(&reader, size - 3, 3), b"abc");
        write_at(&reader, 0, b"x").expect_err("it was attached for reading");
        daemon.release(&id).error("CONFLICT");
        drop((writer, reader));
        wait_for("the release", || (daemon.release(&id).status == 200).then_some(()));
        // Whoever gets the bytes next finds zeros.
        let next = daemon.allocated(&json!({"sizeBytes": size}));
        let reader = daemon.attach(&json!({"allocationId": next})).expect("attached");
        assert_eq!(read_at(&reader, size - 3, 3), [0; 3]);
    }
}

#[test]
fn an_attached_allocation_outlives_its_time() {
    let daemon = Daemon::start(&[64 * MIB]);
    let mut events = daemon.events(None);
    let id = daemon.allocated(&json!({"sizeBytes": 4 * MIB, "leaseSeconds": 1}));
    let attachment = daemon.attach(&json!({"allocationId": id})).expect("attached");
    assert_eq!(events.until("lease.ended")["allocationId"], *id);
    let shown = daemon.get(&format!("/api/memory/allocation/{id}")).data(200);
    assert_eq!(shown["leases"].as_array().map(Vec::len), Some(1));
    assert_eq!(
        (&shown["leases"][0]["kind"], &shown["leases"][0]["holder"]["pid"]),
        (&json!("connection"), &json!(std::process::id()))
    );
    drop(attachment);
    assert_eq!(events.until("allocation.released")["allocationId"], *id);
    daemon.all_is_back("sim:0");
}

#[test]
fn a_lease_ends_with_its_connection_and_the_others_keep_theirs() {
    let (daemon, payload) = with_model(&[64 * MIB], 4096);
    daemon.loaded("tiny", "sim:0");
    let stays = daemon.attach(&json!({"model": "tiny"})).expect("attached");
    // Nothing but its attachments keeps it from now on.
    daemon.post("/api/models/tiny/touch", &json!({"keepAlive": 0})).data(200);
    let goes = daemon.attach(&json!({"model": "tiny"})).expect("attached");
    let mut events = daemon.events(None);
    let begin = Instant::now();
    drop(goes);
    events.until("attachment.closed");
    assert!(begin.elapsed() < Duration::from_secs(1), "it took {:?}", begin.elapsed());
    assert_eq!(daemon.residency("tiny")[0]["attachedCount"], 1);
    assert_eq!(read_at(&stays, 0, payload.len()), payload);
    drop(stays);
    events.until("model.unloaded");
    daemon.all_is_back("sim:0");
}

#[test]
fn requests_that_cannot_be_met_are_refused_with_their_code() {
    let (daemon, _) = with_model(&[64 * MIB, 64 * MIB], 4096);
    assert_eq!(refused(&daemon, &json!({"model": "tiny"})).code, ErrorCode::NotResident);
    let held = daemon.faults[0].hold(vramd_device::Call::FillFromFile);
    let operation = daemon.load("tiny", &json!({"deviceId": "sim:0"}));
    caught(&held, vramd_device::Call::FillFromFile);
    let loading = refused(&daemon, &json!({"model": "tiny"}));
    assert_eq!((loading.code, &loading.details["state"]), (ErrorCode::NotResident, &json!("Loading")));
    drop(held);
    daemon.ended(&operation);

    let id = daemon.post("/api/memory/allocations/allocate/sim:1", &json!({"sizeBytes": 4096})).data(201)["allocationId"].clone();
    let unknown = "0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f";
    for (request, code) in [
        (json!({"model": "other"}), ErrorCode::NotFound),
        (json!({"model": "tiny", "component": "vae"}), ErrorCode::NotFound),
        (json!({"model": "tiny", "deviceId": "sim:9"}), ErrorCode::NotFound),
        (json!({"model": "tiny", "deviceId": "sim:1"}), ErrorCode::NotResident),
        (json!({"model": "tiny", "access": "write"}), ErrorCode::InvalidArgument),
        (json!({"allocationId": unknown}), ErrorCode::NotFound),
        (json!({"allocationId": id, "deviceId": "sim:0"}), ErrorCode::NotResident),
        (json!({"allocationId": id, "model": "tiny"}), ErrorCode::InvalidArgument),
        (json!({"allocationId": id, "component": "weights"}), ErrorCode::InvalidArgument),
        (json!({}), ErrorCode::InvalidArgument),
    ] {
        let error = refused(&daemon, &request);
        assert_eq!(error.code, code, "{request}: {error:?}");
    }
    let weights = daemon.residency("tiny")[0]["allocationId"].clone();
    assert_eq!(
        refused(&daemon, &json!({"allocationId": weights})).code,
        ErrorCode::Conflict,
        "weights are attached by their model, which knows whether they are there"
    );
    assert_eq!(daemon.residency("tiny")[0]["attachedCount"], 0);
}

#[test]
fn frames_that_break_a_rule_are_answered_and_closed() {
    let daemon = Daemon::start(&[64 * MIB]);
    let header = |kind, body_bytes, descriptors| Header { kind, body_bytes, descriptors }.encode().to_vec();
    let mut version = header(FrameKind::Attach, 2, 0);
    version[4] = 9;
    let mut kind = header(FrameKind::Attach, 2, 0);
    kind[6] = 77;
    let body =
        |text: &str| [header(FrameKind::Attach, text.len() as u32, 0), text.as_bytes().to_vec()].concat();
    for (what, bytes) in [
        ("garbage after a V", b"Vxxxxxxxxxxxxxxx".to_vec()),
        ("another version", version),
        ("another kind", kind),
        ("an answer", encode_frame(FrameKind::Attached, &json!({}), 0).expect("a frame")),
        ("a body too long", header(FrameKind::Attach, MAX_REQUEST_BYTES + 1, 0)),
        ("descriptors", header(FrameKind::Attach, 2, 1)),
        ("too many descriptors", header(FrameKind::Attach, 2, 254)),
        ("no JSON", body("{")),
        ("no body", body("")),
        ("an unknown field", body(r#"{"model":"tiny","colour":"red"}"#)),
        ("a bad name", body(r#"{"model":"../tiny"}"#)),
    ] {
        let mut stream = connect(&daemon);
        stream.write_all(&bytes).expect("sent");
        let error = refusal(stream);
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{what}: {error:?}");
        assert!(error.hint.is_some(), "{what}");
    }
}

#[test]
fn a_frame_that_stops_half_way_is_closed_in_time() {
    let daemon = Daemon::start(&[64 * MIB]);
    let frame = encode_frame(FrameKind::Attach, &json!({"model": "tiny"}), 0).expect("a frame");
    let mut waiting = Vec::new();
    for length in [1, HEADER_BYTES - 1, HEADER_BYTES, frame.len() - 1] {
        let mut stream = connect(&daemon);
        stream.write_all(&frame[..length]).expect("sent");
        waiting.push(stream);
        // One that ends half-way is just gone.
        let mut stream = connect(&daemon);
        stream.write_all(&frame[..length]).expect("sent");
        stream.shutdown(Shutdown::Write).expect("closed");
        assert_eq!(stream.read(&mut [0]).expect("an end"), 0);
    }
    for stream in waiting {
        assert_eq!(refusal(stream).code, ErrorCode::Timeout);
    }
}

#[test]
fn a_byte_too_much_ends_the_lease() {
    let (daemon, _) = with_model(&[64 * MIB], 4096);
    daemon.loaded("tiny", "sim:0");
    let mut attachment = daemon.attach(&json!({"model": "tiny"})).expect("attached");
    attachment.stream.write_all(b"?").expect("sent");
    assert_eq!(attachment.stream.read(&mut [0]).unwrap_or(0), 0);
    wait_for("the lease's end", || (daemon.residency("tiny")[0]["attachedCount"] == 0).then_some(()));
}

#[test]
fn the_socket_serves_again_after_a_daemon_that_readers_outlived() {
    let home = Home::new();
    let daemon = home.start(&[64 * MIB]);
    let id = daemon.allocated(&json!({"sizeBytes": 4096}));
    let request = Attach { allocation_id: Some(id.parse().expect("an id")), ..Attach::default() };
    let reader = Mapped::attach(&home.socket(), &request).expect("attached");
    daemon.stop();
    let daemon = home.start(&[64 * MIB]);
    daemon.send_local("GET", "/api/devices", &[], b"").data(200);
    // Its pages stay as they are.
    let mut bytes = [1; 4096];
    reader.read_at(0, &mut bytes);
    assert_eq!(bytes, [0; 4096]);
}

#[test]
fn clients_that_come_all_at_once_or_leave_at_once_hold_up_nobody() {
    let (daemon, payload) = with_model(&[64 * MIB], 4096);
    daemon.loaded("tiny", "sim:0");
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| drop(connect(&daemon)));
            scope.spawn(|| {
                let attachment = daemon.attach(&json!({"model": "tiny"})).expect("attached");
                assert_eq!(read_at(&attachment, 0, payload.len()), payload);
            });
        }
    });
    wait_for("the leases to end", || (daemon.residency("tiny")[0]["attachedCount"] == 0).then_some(()));
    daemon.send_local("GET", "/api/devices", &[], b"").data(200);
}
