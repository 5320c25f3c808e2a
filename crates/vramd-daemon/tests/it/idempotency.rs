//! `Idempotency-Key`: one POST is done once, however often it is sent.

use serde_json::{Value, json};
use vramd_device::Call;

use crate::support::{Daemon, MIB, caught, wait_for, with_model};

const ALLOCATE: &str = "/api/memory/allocations/allocate";

fn sent(daemon: &Daemon, key: &str, body: &Value) -> crate::support::Answer {
    daemon.post_with(ALLOCATE, &[("Idempotency-Key", key)], body)
}

#[test]
fn a_request_that_is_sent_again_gets_the_first_answer() {
    let daemon = Daemon::start(&[64 * MIB]);
    let body = json!({"sizeBytes": 4 * MIB});
    let first = sent(&daemon, "one", &body);
    assert_eq!(first.header("idempotency-replayed"), None);
    let first = first.data(201);
    let again = sent(&daemon, "one", &body);
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(again.data(201), first);
    assert_eq!(daemon.allocations().len(), 1);
    assert_ne!(sent(&daemon, "two", &body).data(201)["allocationId"], first["allocationId"]);

    // A refusal of the request itself is an answer too; a shortage is not, since it may pass.
    sent(&daemon, "bad", &json!({"sizeBytes": 0})).refuses("sizeBytes");
    assert_eq!(sent(&daemon, "bad", &json!({"sizeBytes": 0})).header("idempotency-replayed"), Some("true"));
    let large = json!({"sizeBytes": 60 * MIB});
    sent(&daemon, "large", &large).error("INSUFFICIENT_MEMORY");
    for held in daemon.allocations() {
        daemon.release(held["allocationId"].as_str().expect("an id")).data(200);
    }
    sent(&daemon, "large", &large).data(201);
}

#[test]
fn a_key_stands_for_one_request_only() {
    let daemon = Daemon::start(&[64 * MIB]);
    sent(&daemon, "one", &json!({"sizeBytes": 4096})).data(201);
    sent(&daemon, "one", &json!({"sizeBytes": 8192})).error("IDEMPOTENCY_MISMATCH");
    let elsewhere = format!("{ALLOCATE}/sim:0");
    daemon
        .post_with(&elsewhere, &[("Idempotency-Key", "one")], &json!({"sizeBytes": 4096}))
        .error("IDEMPOTENCY_MISMATCH");
    for unsound in ["", "two words", &"x".repeat(257)] {
        sent(&daemon, unsound, &json!({"sizeBytes": 4096})).refuses("Idempotency-Key");
    }
    assert_eq!(daemon.allocations().len(), 1);
}

#[test]
fn a_second_request_is_refused_while_the_first_runs() {
    let daemon = Daemon::start(&[64 * MIB]);
    let body = json!({"sizeBytes": 4 * MIB});
    let held = daemon.faults[0].hold(Call::Create);
    let first = daemon.begin(ALLOCATE, &[("Idempotency-Key", "one")], &body);
    caught(&held, Call::Create);
    sent(&daemon, "one", &body).error("CONFLICT");
    drop(held);
    let first = first.answer().data(201);
    assert_eq!(sent(&daemon, "one", &body).data(201), first);
    assert_eq!(daemon.allocations().len(), 1);
}

#[test]
fn a_request_with_a_key_is_done_although_its_client_went_away() {
    let daemon = Daemon::start(&[64 * MIB]);
    let body = json!({"sizeBytes": 4 * MIB});
    let held = daemon.faults[0].hold(Call::Create);
    let first = daemon.begin(ALLOCATE, &[("Idempotency-Key", "one")], &body);
    caught(&held, Call::Create);
    first.hang_up();
    drop(held);
    let replayed = wait_for("the first to end", || {
        Some(sent(&daemon, "one", &body)).filter(|answer| answer.status != 409)
    });
    assert_eq!(replayed.header("idempotency-replayed"), Some("true"));
    assert_eq!(replayed.data(201)["allocationId"], daemon.allocations()[0]["allocationId"]);
    assert_eq!(daemon.allocations().len(), 1);
}

#[test]
fn a_refusal_that_may_pass_is_not_kept() {
    let (daemon, _) = with_model(&[64 * MIB], 4096);
    let unload =
        || daemon.post_with("/api/models/tiny/unload?wait=30", &[("Idempotency-Key", "one")], &json!({}));
    unload().error("NOT_RESIDENT");
    daemon.loaded("tiny", "sim:0");
    let done = unload().data(200);
    assert_eq!(unload().data(200), done);
}
