//! Memory: admitted, listed, renewed, released; leases, waiting requests, limits, and figures that add up.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::support::{Daemon, MIB, Pending, wait_for};

#[test]
fn an_allocation_lives_from_its_answer_to_its_release() {
    let daemon = Daemon::start(&[64 * MIB]);
    let asked = json!({"sizeBytes": 2 * MIB + 1, "alignment": 4096, "allocationType": "KvCache", "purpose": "cache",
        "priority": "High", "owner": "trainer", "leaseSeconds": 60});
    let given = daemon.allocate(&asked).data(201);
    for (field, value) in asked.as_object().expect("an object") {
        assert!(field == "leaseSeconds" || given[field] == *value, "{field}: {given:#}");
    }
    assert_eq!(
        (&given["status"], &given["deviceId"], &given["generation"]),
        (&json!("Active"), &json!("sim:0"), &json!(1))
    );
    assert_eq!(
        (&given["leases"][0]["kind"], &given["placement"]["considered"][0]["reason"]),
        (&json!("timeToLive"), &json!("chosen"))
    );
    let block = given["blockBytes"].as_u64().expect("a number");
    assert!(block > 2 * MIB && block.is_multiple_of(64 << 10), "{block}");

    let id = given["allocationId"].as_str().expect("an id");
    let shown = daemon.get(&format!("/api/memory/allocation/{id}")).data(200);
    assert!(!shown["history"].as_array().expect("a list").is_empty(), "{shown:#}");
    let status = daemon.get("/api/memory/status/sim:0?include=allocations,fragmentation,processes").data(200);
    assert_eq!((&status["allocatedBytes"], &status["allocationCount"]), (&json!(block), &json!(1)));
    assert_eq!(status["allocations"][0]["allocationId"], id);
    assert_eq!(
        (&status["processes"], &status["fragmentationDetails"]["segmentCount"]),
        (&json!([]), &json!(1))
    );

    let released = daemon.release(id).data(200);
    assert_eq!((&released["releasedBytes"], &released["deviceId"]), (&json!(block), &json!("sim:0")));
    daemon.release(id).error("NOT_FOUND");
    daemon.get(&format!("/api/memory/allocation/{id}")).error("NOT_FOUND");
    daemon.all_is_back("sim:0");
}

#[test]
fn a_request_goes_to_the_device_that_it_fits_and_is_told_why() {
    let daemon = Daemon::start(&[16 * MIB, 64 * MIB]);
    let given = daemon.allocate(&json!({"sizeBytes": 32 * MIB})).data(201);
    assert_eq!(given["deviceId"], "sim:1");
    let considered = given["placement"]["considered"].as_array().expect("a list");
    assert_eq!(considered.len(), 2);
    let other = considered.iter().find(|one| one["deviceId"] == "sim:0").expect("the other device");
    assert_eq!((&other["fits"], &other["reason"]), (&json!(false), &json!("notEnoughMemory")));

    let error =
        daemon.allocate(&json!({"sizeBytes": 4096, "memoryType": "RAM"})).error("INSUFFICIENT_MEMORY");
    assert_eq!(error["details"]["considered"][0]["reason"], "otherMemoryType");
}

#[test]
fn a_shortage_is_told_with_its_figures() {
    let daemon = Daemon::start(&[64 * MIB]);
    daemon.allocated(&json!({"sizeBytes": 40 * MIB, "owner": "big"}));
    daemon.allocated(&json!({"sizeBytes": 8 * MIB, "owner": "small"}));
    let error = daemon.allocate(&json!({"sizeBytes": 32 * MIB})).error("INSUFFICIENT_MEMORY");
    assert_eq!((&error["status"], &error["retryable"]), (&json!(507), &json!(true)));
    let details = &error["details"];
    assert_eq!(details["requestedBytes"], 32 * MIB);
    assert_eq!(
        (&details["availableBytes"], &details["largestFreeBytes"]),
        (&json!(16 * MIB), &json!(16 * MIB))
    );
    assert_eq!(
        details["holders"],
        json!([{"owner": "big", "bytes": 40 * MIB}, {"owner": "small", "bytes": 8 * MIB}])
    );
    assert!(error["hint"].is_string());
    let largest = json!({"sizeBytes": 9_223_372_036_854_775_807_u64});
    daemon.allocate(&largest).error("INSUFFICIENT_MEMORY");
    daemon.allocate(&json!({"sizeBytes": 16 * MIB})).data(201);
}

#[test]
fn lists_are_filtered_sorted_and_paged() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let mut ids = Vec::new();
    for (size, owner, kind, persistent) in [
        (3, "a", "Buffer", false),
        (1, "b", "Weights", false),
        (2, "a", "Buffer", true),
        (1, "a", "KvCache", false),
    ] {
        let body = json!({"sizeBytes": size * 4096, "owner": owner, "allocationType": kind, "persistent": persistent, "purpose": kind});
        ids.push(daemon.allocated(&body));
    }
    let list = |query: &str| -> Vec<usize> {
        let page = daemon.get(&format!("/api/memory/allocations?{query}")).data(200);
        let found = page["allocations"].as_array().expect("a list").iter();
        found.map(|one| ids.iter().position(|id| one["allocationId"] == **id).expect("one of ours")).collect()
    };
    assert_eq!(list(""), [0, 1, 2, 3]);
    assert_eq!(list("sort=-createdAt"), [3, 2, 1, 0]);
    assert_eq!(list("sort=sizeBytes"), [1, 3, 2, 0]);
    assert_eq!(list("sort=-sizeBytes"), [0, 2, 1, 3]);
    assert_eq!(list("owner=a"), [0, 2, 3]);
    assert_eq!(list("owner=a&persistent=false"), [0, 3]);
    assert_eq!(list("allocationType=Weights"), [1]);
    assert_eq!(list("purpose=KvCache"), [3]);
    assert_eq!(list("status=Active").len(), 4);
    assert!(list("status=Moving").is_empty());

    for sort in ["createdAt", "-createdAt", "sizeBytes", "-sizeBytes"] {
        let (mut pages, mut token) = (Vec::new(), String::new());
        loop {
            let page =
                daemon.get(&format!("/api/memory/allocations?sort={sort}&pageSize=3{token}")).data(200);
            pages.extend(page["allocations"].as_array().expect("a list").clone());
            let Some(next) = page["nextPageToken"].as_str() else { break };
            token = format!("&pageToken={next}");
        }
        let whole = daemon.get(&format!("/api/memory/allocations?sort={sort}")).data(200);
        assert_eq!(json!(pages), whole["allocations"], "{sort}");
    }
}

#[test]
fn a_lease_that_ends_frees_exactly_its_own() {
    let daemon = Daemon::start(&[64 * MIB]);
    let ends = daemon.allocated(&json!({"sizeBytes": 4 * MIB, "leaseSeconds": 1}));
    let renewed = daemon.allocated(&json!({"sizeBytes": 8 * MIB, "leaseSeconds": 1}));
    let long = daemon.allocated(&json!({"sizeBytes": 16 * MIB}));
    let persistent = daemon.allocated(&json!({"sizeBytes": 2 * MIB, "persistent": true}));
    let mut events = daemon.events(None);
    let renew = |id: &str, body: Value| daemon.post(&format!("/api/memory/allocation/{id}/renew"), &body);

    let shown = renew(&renewed, json!({"leaseSeconds": 600})).data(200);
    assert_eq!(shown["leases"][0]["kind"], "timeToLive");
    // Without a length it is as long as it was.
    let path = format!("/api/memory/allocation/{renewed}/renew");
    daemon.send("POST", &path, &[], b"").data(200);
    renew(&renewed, json!({"leaseSeconds": 0})).refuses("leaseSeconds");
    renew(&persistent, json!({})).error("CONFLICT");

    assert_eq!(events.until("allocation.released")["allocationId"], *ends);
    let left: Vec<_> = daemon.allocations().iter().map(|one| one["allocationId"].clone()).collect();
    assert_eq!(left, [renewed, long, persistent]);
    assert_eq!(daemon.status("sim:0")["allocatedBytes"], 26 * MIB);
    renew(&ends, json!({})).error("NOT_FOUND");
}

/// A request that waits in line when this returns.
fn waiting(daemon: &Daemon, body: &Value) -> Pending {
    let pending = daemon.begin("/api/memory/allocations/allocate", &[], body);
    daemon.settle();
    assert!(!pending.is_answered());
    pending
}

#[test]
fn waiting_requests_are_served_by_priority_then_by_age() {
    let daemon = Daemon::start(&[64 * MIB]);
    let full = daemon.allocated(&json!({"sizeBytes": 64 * MIB}));
    let mut line: Vec<(&str, Pending)> = Vec::new();
    for (key, priority) in [("low", "Low"), ("first", "Normal"), ("second", "Normal"), ("urgent", "Critical")]
    {
        let body = json!({"sizeBytes": 48 * MIB, "priority": priority, "onShortage": "wait", "timeoutSeconds": 60, "purpose": key});
        line.push((key, waiting(&daemon, &body)));
    }
    daemon.release(&full).data(200);
    for expected in ["urgent", "first", "second", "low"] {
        wait_for(expected, || line.iter().any(|(_, pending)| pending.is_answered()).then_some(()));
        let at = line.iter().position(|(_, pending)| pending.is_answered()).expect("one is answered");
        let (key, pending) = line.remove(at);
        let given = pending.answer().data(201);
        assert_eq!((key, &given["purpose"]), (expected, &json!(expected)));
        daemon.release(given["allocationId"].as_str().expect("an id")).data(200);
    }
    daemon.all_is_back("sim:0");
}

#[test]
fn nobody_overtakes_a_request_that_waits() {
    let daemon = Daemon::start(&[64 * MIB]);
    let half = daemon.allocated(&json!({"sizeBytes": 32 * MIB}));
    let body = |size: u64| json!({"sizeBytes": size, "onShortage": "wait", "timeoutSeconds": 60});
    let first = waiting(&daemon, &body(64 * MIB));
    let second = waiting(&daemon, &body(16 * MIB));
    daemon.release(&half).data(200);
    let given = first.answer().data(201);
    assert!(!second.is_answered());
    daemon.release(given["allocationId"].as_str().expect("an id")).data(200);
    second.answer().data(201);
}

#[test]
fn a_wait_that_ends_without_room_is_told_with_the_figures() {
    let daemon = Daemon::start(&[64 * MIB]);
    let full = daemon.allocated(&json!({"sizeBytes": 64 * MIB}));
    for seconds in [0, 1] {
        let body = json!({"sizeBytes": MIB, "onShortage": "wait", "timeoutSeconds": seconds});
        let error = daemon.allocate(&body).error("TIMEOUT");
        assert_eq!((&error["status"], &error["retryable"]), (&json!(504), &json!(true)));
        assert_eq!(
            (&error["details"]["requestedBytes"], &error["details"]["availableBytes"]),
            (&json!(MIB), &json!(0))
        );
    }
    daemon.release(&full).data(200);
    daemon.all_is_back("sim:0");
}

#[test]
fn a_client_that_goes_away_while_it_waits_leaves_nothing() {
    let daemon = Daemon::start(&[64 * MIB]);
    let full = daemon.allocated(&json!({"sizeBytes": 64 * MIB}));
    let body = json!({"sizeBytes": 32 * MIB, "onShortage": "wait", "timeoutSeconds": 600});
    let path = "/api/memory/allocations/allocate";
    let line: Vec<_> = (0..4).map(|_| daemon.begin(path, &[], &body)).collect();
    daemon.settle();
    line.into_iter().for_each(Pending::hang_up);
    daemon.release(&full).data(200);
    daemon.all_is_back("sim:0");
}

#[test]
fn a_limit_holds_for_what_is_asked_from_then_on() {
    let daemon = Daemon::start(&[64 * MIB]);
    let limits = "/api/memory/limits/sim:0";
    assert_eq!(
        daemon.get(limits).data(200),
        json!({"deviceId": "sim:0", "limitBytes": 64 * MIB, "overridden": false, "reserveBytes": 0, "aboveBytes": 0})
    );
    let held = daemon.allocated(&json!({"sizeBytes": 32 * MIB}));
    let set = daemon.put(limits, &json!({"limitBytes": 16 * MIB})).data(200);
    assert_eq!(
        set,
        json!({"deviceId": "sim:0", "limitBytes": 16 * MIB, "overridden": true, "reserveBytes": 0, "aboveBytes": 16 * MIB})
    );
    assert_eq!(daemon.get("/api/memory/limits").data(200)["limits"], json!([set]));
    assert_eq!(daemon.status("sim:0")["availableBytes"], 0);
    daemon.allocate(&json!({"sizeBytes": 4096})).error("INSUFFICIENT_MEMORY");
    daemon.release(&held).data(200);
    let error = daemon.allocate(&json!({"sizeBytes": 24 * MIB})).error("INSUFFICIENT_MEMORY");
    assert_eq!(error["details"]["largestFreeBytes"], 16 * MIB);

    let waiting = daemon.begin(
        "/api/memory/allocations/allocate",
        &[],
        &json!({"sizeBytes": 24 * MIB, "onShortage": "wait", "timeoutSeconds": 60}),
    );
    let back = daemon.put(limits, &json!({"limitBytes": null})).data(200);
    assert_eq!((&back["limitBytes"], &back["overridden"]), (&json!(64 * MIB), &json!(false)));
    waiting.answer().data(201);
    for wrong in [json!({}), json!({"limitBytes": 0}), json!({"limitBytes": "16MiB"})] {
        daemon.put(limits, &wrong).refuses("limitBytes");
    }
    daemon.put(limits, &json!({"limitBytes": 1, "mostBytes": 1})).refuses("mostBytes");
    daemon.put("/api/memory/limits/sim:9", &json!({"limitBytes": 1})).error("NOT_FOUND");
}

#[test]
fn memory_that_others_took_is_not_given_out() {
    let daemon = Daemon::start(&[64 * MIB]);
    daemon.allocated(&json!({"sizeBytes": 16 * MIB}));
    daemon.faults[0].set_foreign_bytes(40 * MIB);
    let status =
        daemon.status_when("sim:0", "the foreign bytes", |status| status["foreignBytes"] == 40 * MIB);
    assert_eq!((&status["usedBytes"], &status["availableBytes"]), (&json!(56 * MIB), &json!(8 * MIB)));
    assert_eq!(status["pressure"]["level"], "High", "{status:#}");
    daemon.allocate(&json!({"sizeBytes": 9 * MIB})).error("INSUFFICIENT_MEMORY");
    daemon.faults[0].set_foreign_bytes(0);
    daemon.status_when("sim:0", "the room", |status| status["availableBytes"] == 48 * MIB);
}

/// What a client does in a random history.
#[derive(Debug, Clone)]
enum Step {
    Allocate { bytes: u64, alignment: u64, owner: &'static str, device: Option<&'static str> },
    Release(prop::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = prop_oneof![1..5000_u64, 1..2 * MIB, MIB..24 * MIB];
    let alignment = (0..=21_u32).prop_map(|power| 1 << power);
    let device = prop::option::of(prop::sample::select(vec!["sim:0", "sim:1"]));
    let allocate = (bytes, alignment, prop::sample::select(vec!["a", "b"]), device)
        .prop_map(|(bytes, alignment, owner, device)| Step::Allocate { bytes, alignment, owner, device });
    prop_oneof![3 => allocate, 2 => any::<prop::sample::Index>().prop_map(Step::Release)]
}

/// All figures of a device add up, and agree with its list of allocations.
fn adds_up(daemon: &Daemon, device: &str) {
    let status = daemon.get(&format!("/api/memory/status/{device}?include=allocations")).data(200);
    let figure = |name: &str| status[name].as_u64().expect("a number");
    let parts =
        ["allocatedBytes", "poolFreeBytes", "reservedBytes", "workerBytes", "foreignBytes", "unknownBytes"];
    assert_eq!(figure("usedBytes"), parts.into_iter().map(figure).sum::<u64>(), "{status:#}");
    assert!(figure("usedBytes") <= figure("totalBytes"), "{status:#}");
    assert!(figure("largestFreeBytes") <= figure("availableBytes"), "{status:#}");
    let held = status["allocations"].as_array().expect("a list");
    let blocks: u64 = held.iter().map(|one| one["blockBytes"].as_u64().expect("a number")).sum();
    assert_eq!(
        (figure("allocatedBytes"), figure("allocationCount")),
        (blocks, held.len() as u64),
        "{status:#}"
    );
    assert!(held.iter().all(|one| one["blockBytes"].as_u64() >= one["sizeBytes"].as_u64()), "{status:#}");
}

#[test]
fn figures_add_up_after_any_history() {
    let daemon = Daemon::start(&[64 * MIB, 32 * MIB]);
    let config = ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(steps in prop::collection::vec(step(), 1..40))| {
        let mut held: Vec<String> = Vec::new();
        for step in steps {
            match step {
                Step::Allocate { bytes, alignment, owner, device } => {
                    let body = json!({"sizeBytes": bytes, "alignment": alignment, "owner": owner});
                    let device = device.map(|device| format!("/{device}")).unwrap_or_default();
                    let answer = daemon.post(&format!("/api/memory/allocations/allocate{device}"), &body);
                    if answer.status == 507 {
                        answer.error("INSUFFICIENT_MEMORY");
                    } else {
                        held.push(answer.data(201)["allocationId"].as_str().expect("an id").to_owned());
                    }
                }
                Step::Release(_) if held.is_empty() => {}
                Step::Release(which) => {
                    daemon.release(&held.swap_remove(which.index(held.len()))).data(200);
                }
            }
            adds_up(&daemon, "sim:0");
            adds_up(&daemon, "sim:1");
        }
        for id in held {
            daemon.release(&id).data(200);
        }
        daemon.all_is_back("sim:0");
        daemon.all_is_back("sim:1");
    });
}
