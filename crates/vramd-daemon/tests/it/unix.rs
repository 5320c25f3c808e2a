//! The attach socket where it is a Unix socket: descriptors of clients, descriptors of ours, other users.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;

use rustix::fs::{Gid, Uid};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::thread::{set_thread_res_gid, set_thread_res_uid};
use serde_json::{Value, json};
use vramd_api::attach::{FrameKind, encode_frame};

use crate::attach::{connect, refusal};
use crate::support::{Daemon, Home, MIB, PATIENCE, message, wait_for, with_model};

#[test]
fn descriptors_of_clients_are_closed() {
    let daemon = Daemon::start(&[64 * MIB]);
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let frame = encode_frame(FrameKind::Attach, &json!({"model": "tiny"}), 0).expect("a frame");
    for announced in [&frame[..], &[&frame[..12], &[1, 0, 0, 0], &frame[16..]].concat()] {
        let stream = connect(&daemon);
        let writers = [writer.as_fd(); 3];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&writers)));
        sendmsg(&stream, &[IoSlice::new(announced)], &mut control, SendFlags::empty()).expect("sent");
        refusal(stream);
    }
    drop(writer);
    // With any copy of the other end open somewhere, this would not end.
    assert_eq!(reader.read(&mut [0]).expect("read"), 0);
}

/// The descriptors of this process that lead to the same memory as `file`.
fn descriptors_of(file: &std::fs::Metadata) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").expect("our descriptors");
    open.filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok())
        .filter(|found| (found.dev(), found.ino()) == (file.dev(), file.ino()))
        .count()
}

#[test]
fn connections_leave_no_descriptor_behind() {
    let (daemon, _) = with_model(&[64 * MIB], 4096);
    daemon.loaded("tiny", "sim:0");
    let many: Vec<_> = (0..50).map(|_| daemon.attach(&json!({"model": "tiny"})).expect("attached")).collect();
    let descriptor = many[0].descriptors[0].try_clone().expect("a descriptor");
    let memory = std::fs::File::from(descriptor).metadata().expect("a file");
    // Ours, and those by which the daemon holds it.
    let open = descriptors_of(&memory);
    assert!((51..=52).contains(&open), "{open} descriptors");
    drop(many);
    wait_for("the leases to end", || (daemon.residency("tiny")[0]["attachedCount"] == 0).then_some(()));
    daemon.unloaded("tiny");
    // The empty segment goes back just after the unload has ended.
    daemon.all_is_back("sim:0");
    wait_for("the daemon's descriptors to be closed", || (descriptors_of(&memory) == 0).then_some(()));
}

fn open_to_all(daemon: &Daemon) {
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(daemon.socket(), open.clone()).expect("our socket");
    std::fs::set_permissions(daemon.home.path(""), open).expect("our directory");
}

/// Sends a request on the socket as the user `nobody`; what came back.
fn as_another_user(daemon: &Daemon, request: Vec<u8>) -> String {
    let socket = daemon.socket();
    let other = move || {
        // Linux keeps credentials by thread; this one ends with its answer.
        let nobody = (Uid::from_raw(65534), Gid::from_raw(65534));
        set_thread_res_gid(nobody.1, nobody.1, nobody.1).expect("a group");
        set_thread_res_uid(nobody.0, nobody.0, nobody.0).expect("a user");
        let mut stream = UnixStream::connect(socket).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.write_all(&request).expect("sent");
        let mut bytes = vec![0; 65536];
        let got = stream.read(&mut bytes).expect("an answer");
        String::from_utf8_lossy(&bytes[..got]).into_owned()
    };
    std::thread::spawn(other).join().expect("an answer")
}

#[test]
fn another_user_attaches_models_but_not_what_others_own() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can call as another user");
        return;
    }
    let (daemon, _) = with_model(&[64 * MIB], 4096);
    daemon.loaded("tiny", "sim:0");
    let mine = daemon.allocated(&json!({"sizeBytes": 4096, "owner": "uid:0"}));
    open_to_all(&daemon);
    let as_other = |request| as_another_user(&daemon, request);
    let attach = |request: &Value| as_other(encode_frame(FrameKind::Attach, request, 0).expect("a frame"));
    assert!(attach(&json!({"model": "tiny"})).contains("leaseId"));
    assert!(attach(&json!({"allocationId": mine})).contains("PERMISSION_DENIED"));
    let call = |method: &str, path: &str, body: &str| {
        as_other(message(method, path, &[("Content-Type", "application/json")], body.as_bytes()))
    };
    let id = format!("/api/memory/allocation/{mine}/renew");
    assert!(call("POST", &id, "{}").contains("PERMISSION_DENIED"));
    let id = format!("/api/memory/allocations/{mine}");
    assert!(call("DELETE", &id, "").contains("PERMISSION_DENIED"));
    let allocate = "/api/memory/allocations/allocate";
    // Whatever it asks to be called, it is itself.
    let answer = call("POST", allocate, r#"{"sizeBytes":4096,"owner":"uid:0"}"#);
    assert!(answer.contains("\"uid:65534/uid:0\""), "{answer}");
    assert!(call("POST", allocate, r#"{"sizeBytes":4096}"#).contains("\"uid:65534\""));
}

#[test]
fn another_user_cannot_give_up_an_allocation_that_is_not_back() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can call as another user");
        return;
    }
    let home = Home::new();
    let daemon = home.start(&[64 * MIB, 64 * MIB]);
    let body = json!({"sizeBytes": 4096, "persistent": true, "owner": "uid:0"});
    let path = "/api/memory/allocations/allocate/sim:1";
    let kept = daemon.post(path, &body).data(201)["allocationId"].as_str().expect("an id").to_owned();
    daemon.stop();
    let daemon = home.start(&[64 * MIB]);
    open_to_all(&daemon);
    let release = message("DELETE", &format!("/api/memory/allocations/{kept}"), &[], b"");
    assert!(as_another_user(&daemon, release).contains("PERMISSION_DENIED"));
    daemon.stop();
    assert_eq!(home.start(&[64 * MIB, 64 * MIB]).allocations()[0]["allocationId"], kept.as_str());
}
