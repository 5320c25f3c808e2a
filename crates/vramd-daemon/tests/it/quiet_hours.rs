//! Quiet hours: devices are defragmented without being asked, within them and only then.

use serde_json::{Value, json};
use vramd_device::Call;

use crate::support::{Daemon, Home, MIB, WallClock, caught, wait_for};

/// A daemon on whose clock it is `time`.
fn start(sizes: &[u64], hours: &str, time: &str) -> (Daemon, WallClock) {
    let clock = WallClock::default();
    clock.set(time);
    (Home::new().start_quiet(sizes, hours, &clock), clock)
}

/// Fills so many segments of a device with 13 blocks each, and keeps every fourth.
fn fragment(daemon: &Daemon, device: &str, segments: usize) -> Vec<String> {
    let allocate = |_| {
        let path = format!("/api/memory/allocations/allocate/{device}");
        let answer = daemon.post(&path, &json!({"sizeBytes": 300 << 10, "leaseSeconds": 600}));
        answer.data(201)["allocationId"].as_str().expect("an id").to_owned()
    };
    let ids: Vec<_> = (0..13 * segments).map(allocate).collect();
    let mut kept = Vec::new();
    for (number, id) in ids.into_iter().enumerate() {
        if number % 4 == 0 {
            kept.push(id);
        } else {
            daemon.release(&id).data(200);
        }
    }
    kept
}

fn operations(daemon: &Daemon) -> Vec<Value> {
    daemon.get("/api/operations").data(200)["operations"].as_array().expect("a list").clone()
}

/// Waits until the driver has seen what the clock shows: the second measurement is begun after the first has come.
fn look_at_the_clock(daemon: &Daemon) {
    daemon.settle();
    daemon.settle();
}

/// The operation with that number, once it has ended.
fn ended(daemon: &Daemon, number: usize) -> Value {
    let begun = wait_for("an operation to begin", || {
        let mut operations = operations(daemon);
        operations.sort_by_key(|operation| operation["operationId"].to_string());
        operations.into_iter().nth(number)
    });
    daemon.ended(begun["operationId"].as_str().expect("an id"))
}

/// What a defragmentation of the device would do now.
fn plan(daemon: &Daemon, device: &str) -> Value {
    let path = format!("/api/memory/operations/defragment/{device}");
    daemon.post(&path, &json!({"dryRun": true})).data(200)["plans"][0].clone()
}

fn moves_left(daemon: &Daemon, device: &str) -> u64 {
    plan(daemon, device)["moves"].as_u64().expect("a number")
}

fn all_released(daemon: &Daemon, ids: &[String]) {
    for id in ids {
        wait_for("the release", || (daemon.release(id).status == 200).then_some(()));
    }
    daemon.all_is_back("sim:0");
}

#[test]
fn a_fragmented_device_is_packed_in_quiet_hours_and_not_outside_of_them() {
    let (daemon, clock) = start(&[64 * MIB], "22:00-06:00", "21:59");
    let mut kept = fragment(&daemon, "sim:0", 2);
    look_at_the_clock(&daemon);
    assert_eq!(
        (operations(&daemon).len(), &plan(&daemon, "sim:0")["before"]["segmentCount"]),
        (0, &json!(2))
    );

    clock.set("22:00");
    let packed = ended(&daemon, 0);
    assert_eq!(
        (&packed["state"], &packed["subject"], &packed["result"]["endedBy"]),
        (&json!("Completed"), &json!("sim:0, in quiet hours"), &json!("done")),
        "{packed:#}"
    );
    let packed = plan(&daemon, "sim:0");
    assert_eq!((&packed["moves"], &packed["before"]["segmentCount"]), (&json!(0), &json!(1)), "{packed:#}");

    // Once is enough for half an hour, and by day there is no other.
    kept.extend(fragment(&daemon, "sim:0", 3));
    look_at_the_clock(&daemon);
    clock.set("06:00");
    look_at_the_clock(&daemon);
    assert_eq!(operations(&daemon).len(), 1);
    assert!(moves_left(&daemon, "sim:0") > 0);
    // The next night.
    clock.set("00:30");
    assert_eq!(ended(&daemon, 1)["result"]["endedBy"], "done");
    assert_eq!(moves_left(&daemon, "sim:0"), 0);
    all_released(&daemon, &kept);
}

#[test]
fn a_device_without_anything_to_move_is_left_alone() {
    let (daemon, clock) = start(&[64 * MIB], "02:00-05:00", "02:00");
    let id = daemon.allocated(&json!({"sizeBytes": MIB}));
    look_at_the_clock(&daemon);
    clock.set("05:00");
    look_at_the_clock(&daemon);
    clock.set("02:00");
    look_at_the_clock(&daemon);
    assert!(operations(&daemon).is_empty());
    all_released(&daemon, &[id]);
}

#[test]
fn one_device_is_packed_after_another() {
    let (daemon, clock) = start(&[64 * MIB, 64 * MIB], "02:00-05:00", "12:00");
    let mut kept = fragment(&daemon, "sim:0", 2);
    kept.extend(fragment(&daemon, "sim:1", 2));
    let held = [daemon.faults[0].hold(Call::Copy), daemon.faults[1].hold(Call::Copy)];
    clock.set("02:00");
    caught(&held[0], Call::Copy);
    look_at_the_clock(&daemon);
    assert_eq!(operations(&daemon).len(), 1);
    drop(held);
    for (number, subject) in ["sim:0, in quiet hours", "sim:1, in quiet hours"].into_iter().enumerate() {
        let packed = ended(&daemon, number);
        assert_eq!((&packed["subject"], &packed["state"]), (&json!(subject), &json!("Completed")));
    }
    all_released(&daemon, &kept);
    daemon.all_is_back("sim:1");
}

#[test]
fn when_the_hours_are_over_nothing_more_moves_and_the_rest_waits_for_the_next() {
    let (daemon, clock) = start(&[64 * MIB], "02:00-05:00", "12:00");
    // More moves than go on at the same time.
    let kept = fragment(&daemon, "sim:0", 8);
    let planned = moves_left(&daemon, "sim:0");
    let copies = daemon.faults[0].hold(Call::Copy);
    clock.set("02:00");
    caught(&copies, Call::Copy);
    clock.set("05:00");
    look_at_the_clock(&daemon);
    drop(copies);
    let cut = ended(&daemon, 0);
    assert_eq!(
        (&cut["state"], &cut["result"]["endedBy"]),
        (&json!("Completed"), &json!("quietHoursEnded")),
        "{cut:#}"
    );
    let moved = cut["result"]["moves"].as_u64().expect("a number");
    assert!((1..planned).contains(&moved), "{moved} of {planned}: {cut:#}");
    assert!(moves_left(&daemon, "sim:0") > 0);

    clock.set("02:00");
    assert_eq!(ended(&daemon, 1)["result"]["endedBy"], "done");
    assert_eq!(moves_left(&daemon, "sim:0"), 0);
    all_released(&daemon, &kept);
}

#[test]
fn one_that_is_paused_ends_with_the_hours_too() {
    let (daemon, clock) = start(&[64 * MIB], "02:00-05:00", "12:00");
    let kept = fragment(&daemon, "sim:0", 2);
    let copies = daemon.faults[0].hold(Call::Copy);
    clock.set("02:00");
    caught(&copies, Call::Copy);
    let id = operations(&daemon)[0]["operationId"].as_str().expect("an id").to_owned();
    daemon.post(&format!("/api/operations/{id}/pause"), &json!({})).data(200);
    drop(copies);
    clock.set("05:00");
    assert_eq!(ended(&daemon, 0)["result"]["endedBy"], "quietHoursEnded");
    all_released(&daemon, &kept);
}

#[test]
fn one_that_was_asked_for_is_left_to_itself() {
    let (daemon, clock) = start(&[64 * MIB], "02:00-05:00", "12:00");
    let kept = fragment(&daemon, "sim:0", 2);
    let copies = daemon.faults[0].hold(Call::Copy);
    daemon.post("/api/memory/operations/defragment", &json!({})).data(202);
    caught(&copies, Call::Copy);
    clock.set("02:00");
    look_at_the_clock(&daemon);
    assert_eq!(operations(&daemon).len(), 1, "none begins beside it");
    clock.set("05:00");
    look_at_the_clock(&daemon);
    drop(copies);
    assert_eq!(ended(&daemon, 0)["result"]["endedBy"], "done", "the end of the hours is nothing to it");
    all_released(&daemon, &kept);
}
