//! Blocks that get another place: defragmentation with processes attached, transfers between devices, copies.

use std::io::{ErrorKind, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use vramd_api::attach::Attach;
use vramd_attach::{Attachment, Descriptor, Mapped, Place, read_at, write_at};
use vramd_device::{Call, sim};

use crate::support::{Daemon, Home, MIB, PATIENCE, caught, payload, wait_for, with_model};

const KIB: u64 = 1 << 10;

/// Writes to an allocation through an attachment of its own, which has ended when this returns.
pub fn fill(daemon: &Daemon, id: &str, bytes: &[u8]) {
    let writer = daemon.attach(&json!({"allocationId": id, "access": "write"})).expect("attached");
    write_at(&writer.descriptors[0], writer.attached.block.offset, bytes).expect("written");
    drop(writer);
    wait_for("the writer's lease to end", || {
        let shown = daemon.get(&format!("/api/memory/allocation/{id}")).data(200);
        let leases = shown["leases"].as_array().expect("a list");
        leases.iter().all(|lease| lease["kind"] != "connection").then_some(())
    });
}

pub fn contents(descriptor: &Descriptor, offset: u64, bytes: u64) -> Vec<u8> {
    let mut read = vec![0; bytes as usize];
    read_at(descriptor, offset, &mut read).expect("read");
    read
}

/// What an allocation holds now.
pub fn held(daemon: &Daemon, id: &str) -> Vec<u8> {
    let reader = daemon.attach(&json!({"allocationId": id})).expect("attached");
    let block = &reader.attached.block;
    contents(&reader.descriptors[0], block.offset, block.bytes)
}

fn follow(daemon: &Daemon, id: &str) -> Attachment {
    let reader = daemon.attach(&json!({"allocationId": id, "moves": true})).expect("attached");
    reader.stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    reader
}

/// The next move that a reader is told of.
fn told(reader: &mut Attachment) -> Place {
    reader.next_move().expect("a move").expect("the connection is open")
}

/// Fills two segments with blocks of 300 KiB, so that the second is nearly empty once `keep` of it are left. Answers the
/// blocks that stay: many in the first segment, with room between, and `keep` in the second.
pub fn fragmented(daemon: &Daemon, keep: usize) -> Vec<String> {
    // 13 blocks of 300 KiB go into one segment of 4 MiB.
    let ids: Vec<_> =
        (0..26).map(|_| daemon.allocated(&json!({"sizeBytes": 300 * KIB, "leaseSeconds": 600}))).collect();
    let mut kept = Vec::new();
    for (number, id) in ids.into_iter().enumerate() {
        let stays = if number < 13 { number % 2 == 0 } else { number < 13 + keep };
        if stays {
            kept.push(id);
        } else {
            daemon.release(&id).data(200);
        }
    }
    kept
}

/// A fragmented device, and a reader of its last block that does not answer to moves: what is kept, the block and its bytes.
pub fn behind(daemon: &Daemon) -> (Vec<String>, String, Vec<u8>, Attachment) {
    let kept = fragmented(daemon, 1);
    let last = kept.last().expect("one is kept").clone();
    let written = payload(300 * KIB as usize, 5);
    fill(daemon, &last, &written);
    let reader = follow(daemon, &last);
    (kept, last, written, reader)
}

pub fn defragment(daemon: &Daemon, body: &Value) -> Value {
    let operation = daemon.post("/api/memory/operations/defragment?wait=30", body).data(200);
    assert_eq!(operation["state"], "Completed", "{operation:#}");
    operation["result"].clone()
}

pub fn all_released(daemon: &Daemon, ids: &[String], device: &str) {
    for id in ids {
        wait_for("the release", || (daemon.release(id).status == 200).then_some(()));
    }
    if device.starts_with("sim") {
        daemon.all_is_back(device);
    } else {
        // Others use the machine's memory as well.
        daemon.status_when(device, "the bytes to be back", |status| status["allocatedBytes"] == 0);
    }
}

#[test]
fn a_reader_follows_its_block_to_another_segment_and_the_old_one_goes_back() {
    for device in ["sim:0", "cpu:0"] {
        let home = Home::new();
        let daemon = if device == "sim:0" { home.start(&[64 * MIB]) } else { home.start_cpu(64 * MIB) };
        let kept = fragmented(&daemon, 2);
        let last = kept.last().expect("two are kept").clone();
        let written = payload(300 * KIB as usize, 3);
        fill(&daemon, &last, &written);
        let mut reader = follow(&daemon, &last);
        let (before, page) = (reader.attached.block.offset, reader.attached.segments[0].page_bytes);
        assert_eq!(daemon.status(device)["poolFreeBytes"], 8 * MIB - 9 * 300 * KIB);

        let plan = daemon.post("/api/memory/operations/defragment", &json!({"dryRun": true})).data(200);
        let plan = &plan["plans"][0];
        // Two empty the second segment, two more close the holes of the first.
        assert_eq!((&plan["moves"], &plan["bytes"]), (&json!(4), &json!(4 * 300 * KIB)), "{plan:#}");
        assert_eq!(plan["reclaimedBytes"], 4 * MIB);
        assert!(plan["expectedSeconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{plan:#}");
        let largest = |figures: &Value| figures["largestFreeBytes"].as_u64().expect("a number");
        assert_eq!(largest(&plan["after"]), largest(&plan["before"]) + 4 * MIB);

        let operation = daemon.post("/api/memory/operations/defragment", &json!({})).data(202);
        let place = told(&mut reader);
        let moved = &place.moved;
        assert_eq!(moved.generation, 2);
        assert_eq!(moved.block.bytes, 300 * KIB);
        assert_eq!(moved.block.offset % page, before % page, "its addresses can stay");
        assert_eq!(contents(&place.descriptors[0], moved.block.offset, 300 * KIB), written);
        // Until it has answered, the old pages are as they were.
        assert_eq!(contents(&reader.descriptors[0], before, 300 * KIB), written);
        reader.accept(place).expect("sent");
        let ended = daemon.ended(operation["operationId"].as_str().expect("an id"));
        let result = &ended["result"]["devices"][0];
        assert_eq!(result["fixedCount"], 0, "{ended:#}");
        assert_eq!(result["after"], plan["after"], "it did what the plan said: {ended:#}");
        assert_eq!(daemon.status(device)["poolFreeBytes"], 4 * MIB - 9 * 300 * KIB);
        let shown = daemon.get(&format!("/api/memory/allocation/{last}")).data(200);
        assert_eq!((&shown["generation"], &shown["status"]), (&json!(2), &json!("Active")));
        drop(reader);
        assert_eq!(held(&daemon, &last), written);
        all_released(&daemon, &kept, device);
    }
}

#[test]
fn mapped_blocks_keep_their_addresses_and_bytes_while_the_device_is_packed() {
    for device in ["sim:0", "cpu:0"] {
        let home = Home::new();
        let daemon = if device == "sim:0" { home.start(&[64 * MIB]) } else { home.start_cpu(64 * MIB) };
        let kept = fragmented(&daemon, 4);
        let written: Vec<_> = (0..kept.len()).map(|seed| payload(300 * KIB as usize, seed as u8)).collect();
        let mapped: Vec<_> = kept
            .iter()
            .zip(&written)
            .map(|(id, written)| {
                fill(&daemon, id, written);
                let allocation_id = Some(id.parse().expect("an id"));
                let request = Attach { allocation_id, moves: true, ..Attach::default() };
                Mapped::attach(&daemon.socket(), &request).expect("attached")
            })
            .collect();
        let addresses: Vec<_> = mapped.iter().map(Mapped::as_ptr).collect();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for (mapped, written) in mapped.iter().zip(&written) {
                        let mut bytes = vec![0; written.len()];
                        mapped.read_at(0, &mut bytes);
                        assert!(bytes == *written);
                    }
                }
            });
            let operation = daemon.post("/api/memory/operations/defragment?wait=30", &json!({})).data(200);
            done.store(true, Ordering::Relaxed);
            reader.join().expect("the same bytes at every moment");
            let packed = &operation["result"]["devices"][0];
            // Windows cannot replace pages under a reader: there they stay.
            let (fixed, segments) = if cfg!(unix) { (0, 1) } else { (kept.len(), 2) };
            assert_eq!(
                (&packed["fixedCount"], &packed["after"]["segmentCount"]),
                (&json!(fixed), &json!(segments)),
                "{operation:#}"
            );
        });
        let moved = mapped.iter().filter(|one| one.generation() > 1).count();
        assert!(if cfg!(unix) { moved >= 4 } else { moved == 0 }, "{moved}");
        assert_eq!(mapped.iter().map(Mapped::as_ptr).collect::<Vec<_>>(), addresses);
        drop(mapped);
        all_released(&daemon, &kept, device);
    }
}

#[test]
fn a_reader_that_does_not_answer_keeps_its_old_copy_until_it_goes() {
    let daemon = Daemon::start(&[64 * MIB]);
    let (kept, last, written, reader) = behind(&daemon);
    let result = defragment(&daemon, &json!({}));
    let fixed = &result["devices"][0]["fixed"][0];
    assert_eq!(
        (&fixed["reason"], &fixed["holders"][0]["pid"]),
        (&json!("readerNotAnswering"), &json!(std::process::id())),
        "{result:#}"
    );
    assert_eq!(contents(&reader.descriptors[0], reader.attached.block.offset, 300 * KIB), written);
    assert_eq!(held(&daemon, &last), written, "others read the new place");
    // It is not moved again before it has answered.
    let again = defragment(&daemon, &json!({}));
    assert_eq!(again["moves"], 0, "{again:#}");
    drop(reader);
    daemon.status_when("sim:0", "the old segment to go back", |status| {
        status["poolFreeBytes"] == 4 * MIB - 8 * 300 * KIB
    });
    all_released(&daemon, &kept, "sim:0");
}

#[test]
fn a_reader_that_cannot_follow_says_so_and_keeps_its_pages() {
    let daemon = Daemon::start(&[64 * MIB]);
    let kept = fragmented(&daemon, 1);
    let last = kept.last().expect("one is kept").clone();
    let mut reader = follow(&daemon, &last);
    let operation = daemon.post("/api/memory/operations/defragment", &json!({})).data(202);
    let place = told(&mut reader);
    reader.decline(&place, "it has written to its copy".to_owned()).expect("sent");
    let ended = daemon.ended(operation["operationId"].as_str().expect("an id"));
    assert_eq!(ended["result"]["devices"][0]["fixed"][0]["reason"], "readerNotAnswering", "{ended:#}");
    drop(reader);
    all_released(&daemon, &kept, "sim:0");
}

#[test]
fn a_reader_that_cannot_be_told_of_the_new_place_keeps_the_old_one() {
    let daemon = Daemon::start(&[64 * MIB]);
    let (kept, last, written, mut reader) = behind(&daemon);
    daemon.faults[0].fail(Call::Export, 0, sim::Fault::Native);
    let result = defragment(&daemon, &json!({}));
    assert_eq!(result["devices"][0]["fixed"][0]["reason"], "readerNotAnswering", "{result:#}");
    // Nobody got its pages, and the connection that keeps them is open.
    assert_eq!(contents(&reader.descriptors[0], reader.attached.block.offset, 300 * KIB), written);
    reader.stream.set_read_timeout(Some(Duration::from_millis(1))).expect("a socket");
    let error = reader.stream.read(&mut [0]).expect_err("nothing is sent");
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    assert_eq!(held(&daemon, &last), written, "others read the new place");
    drop(reader);
    all_released(&daemon, &kept, "sim:0");
}

#[test]
fn what_cannot_move_says_why() {
    let daemon = Daemon::start(&[64 * MIB]);
    let kept = fragmented(&daemon, 2);
    let (written, read) = (&kept[kept.len() - 2], &kept[kept.len() - 1]);
    let writer =
        daemon.attach(&json!({"allocationId": written, "access": "write", "moves": true})).expect("attached");
    let reader = daemon.attach(&json!({"allocationId": read})).expect("attached");
    let plan = daemon.post("/api/memory/operations/defragment/sim:0", &json!({"dryRun": true})).data(200);
    let mut reasons: Vec<_> = plan["plans"][0]["fixed"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|fixed| (fixed["allocationId"].clone(), fixed["reason"].clone()))
        .collect();
    reasons.sort_by_key(|(id, _)| id.to_string());
    assert_eq!(reasons, [(json!(written), json!("written")), (json!(read), json!("readerDoesNotFollow"))]);
    // The others move to them.
    let result = defragment(&daemon, &json!({}));
    let device = &result["devices"][0];
    assert_eq!(
        (&device["fixedCount"], &device["after"]["segmentCount"]),
        (&json!(2), &json!(1)),
        "{result:#}"
    );
    for id in [written, read] {
        let shown = daemon.get(&format!("/api/memory/allocation/{id}")).data(200);
        assert_eq!(shown["generation"], 1, "{shown:#}");
    }
    drop((writer, reader));
    all_released(&daemon, &kept, "sim:0");
}

#[test]
fn bounds_hold_and_the_answer_says_which_ended_it() {
    let daemon = Daemon::start(&[64 * MIB]);
    let kept = fragmented(&daemon, 4);
    // What empties a segment goes first, so nothing moves that would not.
    let few = defragment(&daemon, &json!({"maxMoves": 4}));
    assert_eq!((&few["moves"], &few["endedBy"]), (&json!(4), &json!("maxMoves")), "{few:#}");
    assert_eq!(few["devices"][0]["after"]["segmentCount"], 1, "{few:#}");
    let bytes = defragment(&daemon, &json!({"maxBytes": 200 * KIB}));
    assert_eq!((&bytes["bytes"], &bytes["endedBy"]), (&json!(0), &json!("maxBytes")), "{bytes:#}");
    let rest = defragment(&daemon, &json!({}));
    assert_eq!(
        (&rest["endedBy"], &rest["devices"][0]["after"]["holeCount"]),
        (&json!("done"), &json!(1)),
        "{rest:#}"
    );
    daemon.post("/api/memory/operations/defragment", &json!({"maxMoves": 0})).refuses("maxMoves");
    daemon.post("/api/memory/operations/defragment/sim:9", &json!({})).error("NOT_FOUND");
    all_released(&daemon, &kept, "sim:0");
}

#[test]
fn a_second_defragmentation_is_refused_while_one_runs() {
    let daemon = Daemon::start(&[64 * MIB]);
    let kept = fragmented(&daemon, 1);
    let copies = daemon.faults[0].hold(Call::Copy);
    let first = daemon.post("/api/memory/operations/defragment", &json!({})).data(202);
    caught(&copies, Call::Copy);
    let refused = daemon.post("/api/memory/operations/defragment", &json!({})).error("CONFLICT");
    assert_eq!(refused["details"]["operationId"], first["operationId"]);
    // A plan can be made at any time.
    daemon.post("/api/memory/operations/defragment", &json!({"dryRun": true})).data(200);
    drop(copies);
    daemon.ended(first["operationId"].as_str().expect("an id"));
    all_released(&daemon, &kept, "sim:0");
}

#[test]
fn a_copy_that_fails_leaves_the_block_where_it_was() {
    let daemon = Daemon::start(&[64 * MIB]);
    let kept = fragmented(&daemon, 1);
    let last = kept.last().expect("one is kept");
    let written = payload(300 * KIB as usize, 9);
    fill(&daemon, last, &written);
    daemon.faults[0].fail(Call::Copy, 0, sim::Fault::Native);
    let result = defragment(&daemon, &json!({}));
    let fixed = &result["devices"][0]["fixed"][0];
    assert_eq!(
        (&fixed["reason"], &result["devices"][0]["fixedCount"]),
        (&json!("failed"), &json!(1)),
        "{result:#}"
    );
    let failed = fixed["allocationId"].as_str().expect("an id");
    assert_eq!(daemon.get(&format!("/api/memory/allocation/{failed}")).data(200)["generation"], 1);
    assert_eq!(held(&daemon, last), written);
    // The next one succeeds.
    assert_eq!(defragment(&daemon, &json!({}))["devices"][0]["after"]["segmentCount"], 1);
    assert_eq!(held(&daemon, last), written);
    all_released(&daemon, &kept, "sim:0");
}

#[test]
fn a_block_that_is_released_or_written_to_meanwhile_does_not_move() {
    let daemon = Daemon::start(&[64 * MIB]);
    let mut kept = fragmented(&daemon, 2);
    let (written, released) = (kept[kept.len() - 2].clone(), kept.pop().expect("it was kept"));
    let copies = daemon.faults[0].hold(Call::Copy);
    let operation = daemon.post("/api/memory/operations/defragment", &json!({})).data(202);
    assert!(copies.wait_until_caught(2, PATIENCE));
    let path = format!("/api/memory/allocation/{released}");
    wait_for("it to be shown as moving", || {
        (daemon.get(&path).data(200)["status"] == "Moving").then_some(())
    });
    std::thread::scope(|scope| {
        let release = scope.spawn(|| daemon.release(&released));
        let writer = daemon.attach(&json!({"allocationId": written, "access": "write"})).expect("attached");
        write_at(&writer.descriptors[0], writer.attached.block.offset, b"late").expect("written");
        drop(writer);
        daemon.settle();
        drop(copies);
        release.join().expect("an answer").data(200);
    });
    daemon.ended(operation["operationId"].as_str().expect("an id"));
    assert_eq!(&held(&daemon, &written)[..4], b"late");
    daemon.get(&path).error("NOT_FOUND");
    all_released(&daemon, &kept, "sim:0");
}

#[test]
fn it_can_be_paused_and_cancelled_and_what_has_moved_stays_moved() {
    let daemon = Daemon::start(&[64 * MIB]);
    let kept = fragmented(&daemon, 3);
    let copies = daemon.faults[0].hold(Call::Copy);
    let begun = daemon.post("/api/memory/operations/defragment", &json!({"maxMoves": 3})).data(202);
    let id = begun["operationId"].as_str().expect("an id").to_owned();
    caught(&copies, Call::Copy);
    let paused = daemon.post(&format!("/api/operations/{id}/pause"), &json!({})).data(200);
    assert_eq!((&paused["paused"], &paused["state"]), (&json!(true), &json!("Running")));
    drop(copies);
    daemon.settle();
    assert_eq!(daemon.get(&format!("/api/operations/{id}")).data(200)["state"], "Running");
    daemon.post(&format!("/api/operations/{id}/resume"), &json!({})).data(200);
    assert_eq!(daemon.ended(&id)["state"], "Completed");
    daemon.post(&format!("/api/operations/{id}/pause"), &json!({})).error("CONFLICT");

    let again = fragmented(&daemon, 3);
    let copies = daemon.faults[0].hold(Call::Copy);
    let begun = daemon.post("/api/memory/operations/defragment", &json!({})).data(202);
    let id = begun["operationId"].as_str().expect("an id").to_owned();
    caught(&copies, Call::Copy);
    daemon.post(&format!("/api/operations/{id}/pause"), &json!({})).data(200);
    daemon.delete(&format!("/api/operations/{id}")).data(202);
    drop(copies);
    let ended = daemon.ended(&id);
    assert_eq!(
        (&ended["state"], &ended["error"]["code"]),
        (&json!("Cancelled"), &json!("CANCELLED")),
        "{ended:#}"
    );
    for id in kept.iter().chain(&again) {
        daemon.release(id).data(200);
    }
    daemon.all_is_back("sim:0");
}

#[test]
fn a_request_that_lacks_one_piece_has_the_device_packed() {
    // Room for two shared segments and 4 MiB more.
    let daemon = Daemon::start(&[12 * MIB]);
    let kept = fragmented(&daemon, 1);
    let refused = daemon.allocate(&json!({"sizeBytes": 8 * MIB})).error("INSUFFICIENT_MEMORY");
    assert_eq!(refused["details"]["largestAfterDefragmentationBytes"], 8 * MIB, "{refused:#}");
    assert!(refused["details"]["operationId"].is_string(), "{refused:#}");
    let waits = json!({"sizeBytes": 8 * MIB, "onShortage": "wait", "timeoutSeconds": 30});
    let id = daemon.allocated(&waits);
    daemon.release(&id).data(200);
    all_released(&daemon, &kept, "sim:0");
}

fn transfer(daemon: &Daemon, body: &Value) -> Value {
    daemon.post("/api/memory/transfer?wait=30", body).data(200)
}

#[test]
fn a_moved_allocation_keeps_its_id_and_its_bytes() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let mut events = daemon.events(None);
    for size in [5000, 3 * MIB + 17] {
        let id = daemon.allocate(&json!({"sizeBytes": size, "persistent": true})).data(201);
        let (id, from) = (id["allocationId"].as_str().expect("an id").to_owned(), id["deviceId"].clone());
        let to = if from == "sim:0" { "sim:1" } else { "sim:0" };
        let written = payload(size as usize, 11);
        fill(&daemon, &id, &written);
        let ended = transfer(
            &daemon,
            &json!({"items": [{"allocationId": id}], "targetDeviceId": to, "checksum": true}),
        );
        assert_eq!((&ended["state"], &ended["bytesDone"]), (&json!("Completed"), &json!(size)), "{ended:#}");
        let item = &ended["result"]["items"][0];
        assert_eq!((&item["allocationId"], &item["targetDeviceId"]), (&json!(id), &json!(to)));
        let checksum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &written);
        assert_eq!(
            item["checksum"],
            json!({"algorithm": "CRC-64/NVME", "value": format!("{checksum:016x}")})
        );
        assert_eq!(events.until("allocation.moved")["deviceId"], to);
        let shown = daemon.get(&format!("/api/memory/allocation/{id}")).data(200);
        assert_eq!((&shown["deviceId"], &shown["generation"]), (&json!(to), &json!(2)));
        assert_eq!(held(&daemon, &id), written);
        wait_for("the release", || (daemon.release(&id).status == 200).then_some(()));
        daemon.all_is_back("sim:0");
        daemon.all_is_back("sim:1");
    }
}

#[test]
fn a_persistent_allocation_is_on_its_new_device_after_a_restart() {
    let home = Home::new();
    let daemon = home.start(&[64 * MIB, 64 * MIB]);
    let id =
        daemon.post("/api/memory/allocations/allocate/sim:0", &json!({"sizeBytes": MIB, "persistent": true}));
    let id = id.data(201)["allocationId"].as_str().expect("an id").to_owned();
    transfer(&daemon, &json!({"items": [{"allocationId": id}], "targetDeviceId": "sim:1"}));
    let copied = transfer(
        &daemon,
        &json!({"items": [{"allocationId": id}], "targetDeviceId": "sim:0", "mode": "copy"}),
    );
    let copy = copied["result"]["items"][0]["copyAllocationId"].as_str().expect("an id").to_owned();
    let daemon = daemon.stop().start(&[64 * MIB, 64 * MIB]);
    // Higher than any that a client has seen: the bytes are others.
    for (id, device, generation) in [(id, "sim:1", 3), (copy, "sim:0", 2)] {
        let shown = wait_for("it to be back", || {
            let answer = daemon.get(&format!("/api/memory/allocation/{id}"));
            (answer.status == 200).then(|| answer.data(200))
        });
        assert_eq!((&shown["deviceId"], &shown["persistent"]), (&json!(device), &json!(true)));
        assert_eq!(shown["generation"], generation);
    }
}

#[test]
fn a_copy_of_what_only_a_process_keeps_ends_by_itself() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let mut events = daemon.events(None);
    let body = json!({"sizeBytes": MIB, "leaseSeconds": 1});
    let answer = daemon.post("/api/memory/allocations/allocate/sim:0", &body);
    let id = answer.data(201)["allocationId"].as_str().expect("an id").to_owned();
    let reader = daemon.attach(&json!({"allocationId": id})).expect("attached");
    assert_eq!(events.until("lease.ended")["allocationId"], *id);
    let body = json!({"items": [{"allocationId": id}], "targetDeviceId": "sim:1", "mode": "copy"});
    let copied = transfer(&daemon, &body);
    let copy = copied["result"]["items"][0]["copyAllocationId"].as_str().expect("an id").to_owned();
    let shown = daemon.get(&format!("/api/memory/allocation/{copy}")).data(200);
    assert_eq!((&shown["persistent"], &shown["leases"][0]["kind"]), (&json!(false), &json!("timeToLive")));
    drop(reader);
    daemon.release(&copy).data(200);
    daemon.all_is_back("sim:0");
    daemon.all_is_back("sim:1");
}

#[test]
fn transfers_that_cannot_be_are_refused_and_leave_nothing() {
    let daemon = Daemon::start(&[64 * MIB, 8 * MIB]);
    let at = |device: &str, size: u64| {
        let answer =
            daemon.post(&format!("/api/memory/allocations/allocate/{device}"), &json!({"sizeBytes": size}));
        answer.data(201)["allocationId"].as_str().expect("an id").to_owned()
    };
    let (large, small) = (at("sim:0", 20 * MIB), at("sim:0", 2 * MIB));
    let ask = |items: &Value, target: &str| {
        daemon.post("/api/memory/transfer", &json!({"items": items, "targetDeviceId": target}))
    };
    ask(&json!([{"allocationId": small}]), "sim:0").refuses("targetDeviceId");
    let full =
        ask(&json!([{"allocationId": small}, {"allocationId": large}]), "sim:1").error("INSUFFICIENT_MEMORY");
    assert_eq!(full["details"]["requestedBytes"], 20 * MIB);
    ask(&json!([{"allocationId": small}, {"allocationId": small}]), "sim:1").refuses("items");
    ask(&json!([]), "sim:1").refuses("items");
    ask(&json!([{}]), "sim:1").refuses("items");
    ask(&json!([{"model": "no"}]), "sim:1").error("NOT_FOUND");
    ask(&json!([{"allocationId": small, "model": "no"}]), "sim:1").refuses("items");
    ask(&json!([{"allocationId": "0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f"}]), "sim:1").error("NOT_FOUND");
    ask(&json!([{"allocationId": small}]), "sim:7").error("NOT_FOUND");
    let reader = daemon.attach(&json!({"allocationId": small, "moves": true})).expect("attached");
    let error = ask(&json!([{"allocationId": small}]), "sim:1").error("CONFLICT");
    assert_eq!(error["details"]["holders"][0]["pid"], std::process::id());
    drop(reader);
    daemon.get("/api/memory/transfer/0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f").error("NOT_FOUND");
    let status = daemon.status("sim:1");
    assert_eq!((&status["allocatedBytes"], &status["reservedBytes"]), (&json!(0), &json!(0)));
    wait_for("the release", || (daemon.release(&small).status == 200).then_some(()));
    all_released(&daemon, &[large], "sim:0");
}

#[test]
fn a_transfer_that_is_cancelled_or_fails_leaves_the_old_copy() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let answer = daemon.post("/api/memory/allocations/allocate/sim:0", &json!({"sizeBytes": 8 * MIB}));
    let id = answer.data(201)["allocationId"].as_str().expect("an id").to_owned();
    let written = payload(8 * MIB as usize, 2);
    fill(&daemon, &id, &written);
    let body = json!({"items": [{"allocationId": id}], "targetDeviceId": "sim:1", "checksum": true});

    let writes = daemon.faults[1].hold(Call::Write);
    let begun = daemon.post("/api/memory/transfer", &body).data(202);
    let transfer_id = begun["operationId"].as_str().expect("an id");
    caught(&writes, Call::Write);
    // Another move of it, and a release of its target, have to wait.
    daemon.post("/api/memory/transfer", &body).error("CONFLICT");
    daemon.delete(&format!("/api/memory/transfer/{transfer_id}")).data(202);
    drop(writes);
    let ended = daemon.ended(transfer_id);
    assert_eq!(ended["state"], "Cancelled", "{ended:#}");
    daemon.delete(&format!("/api/memory/transfer/{transfer_id}")).error("CONFLICT");
    assert_eq!(held(&daemon, &id), written);
    daemon.all_is_back("sim:1");

    for (device, call, fault) in [
        (0, Call::Read, sim::Fault::Native),
        (1, Call::Write, sim::Fault::Native),
        (1, Call::Create, sim::Fault::OutOfMemory),
    ] {
        wait_for("the reader's lease to end", || {
            let shown = daemon.get(&format!("/api/memory/allocation/{id}")).data(200);
            (shown["leases"].as_array().map(Vec::len) == Some(1)).then_some(())
        });
        daemon.faults[device].fail(call, 0, fault);
        let ended = transfer(&daemon, &body);
        assert_eq!(ended["state"], "Failed", "{call:?}: {ended:#}");
        assert_eq!(ended["error"]["details"]["allocationId"], *id);
        assert_eq!(held(&daemon, &id), written);
        daemon.all_is_back("sim:1");
    }
    all_released(&daemon, &[id], "sim:0");
}

#[test]
fn a_slow_transfer_ends_at_once_when_it_is_cancelled_or_its_source_goes() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    // The first piece goes at once; the next one would have its turn in twelve days.
    let begin = || {
        let answer = daemon.post("/api/memory/allocations/allocate/sim:0", &json!({"sizeBytes": 8 * MIB}));
        let id = answer.data(201)["allocationId"].as_str().expect("an id").to_owned();
        let body =
            json!({"items": [{"allocationId": id}], "targetDeviceId": "sim:1", "maxBytesPerSecond": 1});
        let begun = daemon.post("/api/memory/transfer", &body).data(202);
        (id, begun["operationId"].as_str().expect("an id").to_owned())
    };
    // 202, or 200 where no piece was under way and it has ended with the answer.
    let cancel = |path: String| {
        let answer = daemon.delete(&path);
        let status = if answer.status == 200 { 200 } else { 202 };
        answer.data(status);
    };
    let (id, operation) = begin();
    cancel(format!("/api/memory/transfer/{operation}"));
    assert_eq!(daemon.ended(&operation)["state"], "Cancelled");
    daemon.release(&id).data(200);
    let (id, operation) = begin();
    daemon.release(&id).data(200);
    assert_eq!(daemon.ended(&operation)["error"]["code"], "CONFLICT");
    let (id, operation) = begin();
    let path = format!("/api/operations/{operation}");
    let left = wait_for("the first piece", || daemon.get(&path).data(200)["secondsLeft"].as_f64());
    assert!((7.0..8.1).contains(&(left / f64::from(1 << 20))), "at a byte a second: {left}");
    let paused = daemon.post(&format!("{path}/pause"), &json!({})).data(200);
    assert_eq!(paused["secondsLeft"], Value::Null, "nobody knows");
    cancel(path);
    assert_eq!(daemon.ended(&operation)["state"], "Cancelled");
    daemon.release(&id).data(200);
    daemon.all_is_back("sim:0");
    daemon.all_is_back("sim:1");
    // A daemon that stops does not wait for it either.
    begin();
    daemon.stop();
}

#[test]
fn an_allocation_that_dies_half_way_ends_its_transfer() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let answer = daemon.post("/api/memory/allocations/allocate/sim:0", &json!({"sizeBytes": 8 * MIB}));
    let id = answer.data(201)["allocationId"].as_str().expect("an id").to_owned();
    let writes = daemon.faults[1].hold(Call::Write);
    let begun = daemon
        .post("/api/memory/transfer", &json!({"items": [{"allocationId": id}], "targetDeviceId": "sim:1"}))
        .data(202);
    caught(&writes, Call::Write);
    std::thread::scope(|scope| {
        let release = scope.spawn(|| daemon.release(&id));
        daemon.settle();
        assert!(!release.is_finished(), "its bytes are not back while they are being read");
        drop(writes);
        release.join().expect("an answer").data(200);
    });
    let ended = daemon.ended(begun["operationId"].as_str().expect("an id"));
    assert_eq!(
        (&ended["state"], &ended["error"]["code"]),
        (&json!("Failed"), &json!("CONFLICT")),
        "{ended:#}"
    );
    daemon.all_is_back("sim:0");
    daemon.all_is_back("sim:1");
}

#[test]
fn a_device_that_is_lost_in_the_middle_of_a_transfer_takes_only_its_own_side() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let answer = daemon.post("/api/memory/allocations/allocate/sim:0", &json!({"sizeBytes": 8 * MIB}));
    let id = answer.data(201)["allocationId"].as_str().expect("an id").to_owned();
    let written = payload(8 * MIB as usize, 4);
    fill(&daemon, &id, &written);
    daemon.faults[1].fail(Call::Write, 3, sim::Fault::Lost);
    let ended = transfer(&daemon, &json!({"items": [{"allocationId": id}], "targetDeviceId": "sim:1"}));
    assert_eq!(
        (&ended["state"], &ended["error"]["code"]),
        (&json!("Failed"), &json!("DEVICE_LOST")),
        "{ended:#}"
    );
    assert_eq!(held(&daemon, &id), written);
    daemon.status_when("sim:1", "its books to be closed", |status| status["allocatedBytes"] == 0);
    all_released(&daemon, &[id], "sim:0");
}

#[test]
fn a_model_is_copied_and_moved_to_another_device() {
    for bytes in [100_000, 3 << 20] {
        let (daemon, payload) = with_model(&[64 * MIB, 64 * MIB], bytes);
        daemon.loaded("tiny", "sim:0");
        let item = json!([{"model": "tiny", "component": "weights"}]);
        let ask = |mode: &str, target: &str| {
            daemon.post(
                "/api/memory/transfer?wait=30",
                &json!({"items": item, "targetDeviceId": target, "mode": mode, "checksum": true}),
            )
        };
        let copied = ask("copy", "sim:1").data(200);
        assert_eq!(copied["state"], "Completed", "{copied:#}");
        assert_eq!(daemon.residency("tiny").len(), 2);
        for device in ["sim:0", "sim:1"] {
            let reader = daemon.attach(&json!({"model": "tiny", "deviceId": device})).expect("attached");
            let block = &reader.attached.block;
            let tensor = &reader.tensors.iter().find(|tensor| tensor.name == "a").expect("its tensor");
            let read = contents(&reader.descriptors[0], block.offset + tensor.offset, tensor.bytes);
            assert_eq!(read, payload[..bytes]);
        }
        ask("copy", "sim:1").refuses("targetDeviceId");
        wait_for("the readers to be gone", || {
            daemon.residency("tiny").iter().all(|one| one["attachedCount"] == 0).then_some(())
        });
        daemon.post("/api/models/tiny/unload?wait=30", &json!({"deviceId": "sim:0"})).data(200);
        let moved = ask("move", "sim:0").data(200);
        assert_eq!(moved["state"], "Completed", "{moved:#}");
        let residency = daemon.residency("tiny");
        assert_eq!((residency.len(), &residency[0]["deviceId"]), (1, &json!("sim:0")), "{residency:#?}");
        daemon.all_is_back("sim:1");
        daemon.unloaded("tiny");
        daemon.all_is_back("sim:0");
    }
}

#[test]
fn small_models_share_segments_and_move_under_their_readers() {
    let daemon = Daemon::start(&[64 * MIB]);
    let write = |name: &str| {
        crate::support::write_model(
            &daemon.home.path("models").join(format!("{name}.safetensors")),
            "a",
            900_000,
        )
    };
    // Four fit into one segment.
    let names = ["a", "b", "c", "d", "e"];
    let payloads = names.map(write);
    for name in names {
        daemon.register(name, &format!("{name}.safetensors"));
        daemon.loaded(name, "sim:0");
    }
    daemon.unloaded("b");
    let mut reader = daemon.attach(&json!({"model": "e", "moves": true})).expect("attached");
    reader.stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let before = reader.attached.block.offset;
    let operation = daemon.post("/api/memory/operations/defragment", &json!({})).data(202);
    let place = told(&mut reader);
    let moved = &place.moved;
    assert_eq!(moved.block.bytes, reader.attached.block.bytes);
    assert_eq!(moved.block.offset % 4096, before % 4096);
    let tensor = reader.tensors.iter().find(|tensor| tensor.name == "a").expect("its tensor");
    let read = contents(&place.descriptors[0], moved.block.offset + tensor.offset, tensor.bytes);
    assert_eq!(read, payloads[4][..900_000]);
    reader.accept(place).expect("sent");
    let ended = daemon.ended(operation["operationId"].as_str().expect("an id"));
    assert_eq!(ended["result"]["devices"][0]["after"]["segmentCount"], 1, "{ended:#}");
    // A pinned model stays.
    daemon.post("/api/models/a/pin", &json!({})).data(200);
    let plan = daemon.post("/api/memory/operations/defragment", &json!({"dryRun": true})).data(200);
    assert_eq!(plan["plans"][0]["fixed"][0]["reason"], "pinned", "{plan:#}");
    daemon.post("/api/models/a/unpin", &json!({})).data(200);
    drop(reader);
    for name in ["a", "c", "d", "e"] {
        wait_for("the unload", || {
            let answer = daemon.post(&format!("/api/models/{name}/unload?wait=30"), &json!({}));
            (answer.status == 200).then_some(())
        });
    }
    daemon.all_is_back("sim:0");
}

#[test]
fn a_copy_goes_from_one_allocation_into_another() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let at = |device: &str, size: u64| {
        let answer =
            daemon.post(&format!("/api/memory/allocations/allocate/{device}"), &json!({"sizeBytes": size}));
        answer.data(201)["allocationId"].as_str().expect("an id").to_owned()
    };
    let (source, near, far) = (at("sim:0", 3 * MIB), at("sim:0", 2 * MIB), at("sim:1", 4 * MIB));
    let written = payload(3 * MIB as usize, 6);
    fill(&daemon, &source, &written);
    let ask = |target: &str, more: Value| {
        let mut body = json!({"sourceAllocationId": source, "targetAllocationId": target});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        daemon.post("/api/memory/copy?wait=30", &body)
    };
    let ended = ask(&near, json!({"sourceOffset": 1000, "targetOffset": 500, "sizeBytes": MIB})).data(200);
    assert_eq!(ended["state"], "Completed", "{ended:#}");
    let read = held(&daemon, &near);
    assert_eq!(read[500..][..MIB as usize], written[1000..][..MIB as usize]);
    assert!(
        read[..500].iter().chain(&read[500 + MIB as usize..]).all(|byte| *byte == 0),
        "nothing else changed"
    );
    let ended = ask(&far, json!({"checksum": true})).data(200);
    assert_eq!(ended["state"], "Completed", "{ended:#}");
    assert_eq!(held(&daemon, &far)[..written.len()], written);
    let ended = ask(&source, json!({"targetOffset": 2 * MIB, "sizeBytes": MIB})).data(200);
    assert_eq!(ended["state"], "Completed", "{ended:#}");

    ask(&near, json!({})).refuses("targetOffset");
    ask(&near, json!({"sourceOffset": 3 * MIB})).refuses("sourceOffset");
    ask(&near, json!({"sourceOffset": u64::MAX, "sizeBytes": 1})).refuses("sourceOffset");
    ask(&source, json!({"targetOffset": 10, "sizeBytes": MIB})).refuses("targetOffset");
    ask("0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f", json!({})).error("NOT_FOUND");
    let writes = daemon.faults[1].hold(Call::Write);
    let begun = daemon
        .post("/api/memory/copy", &json!({"sourceAllocationId": source, "targetAllocationId": far}))
        .data(202);
    caught(&writes, Call::Write);
    ask(&far, json!({})).error("CONFLICT");
    drop(writes);
    daemon.ended(begun["operationId"].as_str().expect("an id"));
    for id in [source, near, far] {
        wait_for("the release", || (daemon.release(&id).status == 200).then_some(()));
    }
    daemon.all_is_back("sim:0");
    daemon.all_is_back("sim:1");
}
