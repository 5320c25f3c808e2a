//! Clearing, and what it leaves.

use serde_json::{Value, json};
use vramd_attach::{read_at, write_at};
use vramd_device::{Call, sim};

use crate::support::{Daemon, MIB, wait_for, with_model};

fn clear(daemon: &Daemon, body: &Value) -> Value {
    let operation = daemon.post("/api/memory/operations/clear?wait=30", body).data(200);
    assert_eq!(operation["state"], "Completed", "{operation:#}");
    operation["result"].clone()
}

#[test]
fn the_free_pool_goes_back_and_three_figures_say_so() {
    let daemon = Daemon::start(&[64 * MIB]);
    let small = daemon.allocated(&json!({"sizeBytes": 1000}));
    daemon.release(&small).data(200);
    daemon.status_when("sim:0", "the spare segment", |status| status["usedBytes"] == 4 * MIB);
    let dry =
        daemon.post("/api/memory/operations/clear", &json!({"what": "Cache", "dryRun": true})).data(200);
    assert_eq!((&dry["askedBytes"], &dry["dryRun"]), (&json!(4 * MIB), &json!(true)));
    assert_eq!(daemon.status("sim:0")["poolFreeBytes"], 4 * MIB, "a dry run changes nothing");
    let cleared = clear(&daemon, &json!({"what": "Cache"}));
    for figure in ["askedBytes", "acknowledgedBytes", "measuredBytes"] {
        assert_eq!(cleared[figure], 4 * MIB, "{figure}: {cleared:#}");
    }
    assert_eq!(daemon.status("sim:0")["usedBytes"], 0);
    assert_eq!(clear(&daemon, &json!({"what": "Cache"}))["askedBytes"], 0);
}

#[test]
fn what_is_unused_goes_and_what_is_attached_or_pinned_stays() {
    let (daemon, _) = with_model(&[64 * MIB], 3 << 20);
    daemon.loaded("tiny", "sim:0");
    let reader = daemon.attach(&json!({"model": "tiny"})).expect("attached");
    let cleared = clear(&daemon, &json!({"what": "Unused"}));
    assert_eq!((&cleared["models"], &cleared["kept"][0]["reason"]), (&json!([]), &json!("attached")));
    assert_eq!(cleared["kept"][0]["holders"][0]["pid"], std::process::id());
    daemon.post("/api/memory/operations/clear", &json!({"what": "Unused", "force": true})).refuses("force");
    drop(reader);
    wait_for("the reader to be gone", || (daemon.residency("tiny")[0]["attachedCount"] == 0).then_some(()));
    daemon.post("/api/models/tiny/pin", &json!({})).data(200);
    let cleared = clear(&daemon, &json!({"what": "Unused"}));
    assert_eq!((&cleared["models"], &cleared["kept"][0]["reason"]), (&json!([]), &json!("pinned")));
    daemon.post("/api/models/tiny/unpin", &json!({})).data(200);
    let cleared = clear(&daemon, &json!({"what": "Unused"}));
    assert_eq!(cleared["models"], json!(["tiny"]), "{cleared:#}");
    assert_eq!(cleared["acknowledgedBytes"], cleared["askedBytes"]);
    assert!(daemon.residency("tiny").is_empty());
    daemon.all_is_back("sim:0");
}

#[test]
fn the_allocations_of_one_owner_go_and_attached_ones_only_by_force() {
    let daemon = Daemon::start(&[64 * MIB, 64 * MIB]);
    let make = |owner: &str, persistent: bool| {
        daemon.allocated(&json!({"sizeBytes": 2 * MIB, "owner": owner, "persistent": persistent}))
    };
    let (mine, kept, attached) = (make("one", false), make("two", false), make("one", true));
    let reader = daemon.attach(&json!({"allocationId": attached})).expect("attached");
    let cleared = clear(&daemon, &json!({"what": "Allocations", "owner": "one"}));
    assert_eq!(cleared["allocations"], json!([mine]));
    assert_eq!(
        (&cleared["kept"][0]["allocationId"], &cleared["kept"][0]["reason"]),
        (&json!(attached), &json!("attached"))
    );
    let forced = clear(&daemon, &json!({"what": "Allocations", "owner": "one", "force": true}));
    assert_eq!((&forced["allocations"], &forced["acknowledgedBytes"]), (&json!([attached]), &json!(2 * MIB)));
    drop(reader);
    assert_eq!(daemon.allocations().len(), 1);
    daemon.release(&kept).data(200);
    daemon.all_is_back("sim:0");
    daemon.all_is_back("sim:1");
}

#[test]
fn one_allocation_is_zeroed_and_stays() {
    let daemon = Daemon::start(&[64 * MIB]);
    let id = daemon.allocated(&json!({"sizeBytes": 3 * MIB}));
    let writer = daemon.attach(&json!({"allocationId": id, "access": "write"})).expect("attached");
    write_at(&writer.descriptors[0], MIB, b"secret").expect("written");
    let zero = json!({"what": "Zero", "allocationId": id});
    daemon.post("/api/memory/operations/clear", &zero).error("CONFLICT");
    let forced = json!({"what": "Zero", "allocationId": id, "force": true});
    clear(&daemon, &forced);
    let mut read = [1; 6];
    read_at(&writer.descriptors[0], MIB, &mut read).expect("read");
    assert_eq!(read, [0; 6]);
    drop(writer);
    wait_for("the writer to be gone", || {
        (daemon.post("/api/memory/operations/clear", &zero).status == 202).then_some(())
    });
    daemon.settle();
    daemon.faults[0].fail(Call::Zero, 0, sim::Fault::Native);
    let failed = daemon.post("/api/memory/operations/clear?wait=30", &zero).data(200);
    assert_eq!(failed["state"], "Failed", "{failed:#}");
    wait_for("the release", || (daemon.release(&id).status == 200).then_some(()));
    daemon.all_is_back("sim:0");
}

#[test]
fn a_clearing_that_makes_no_sense_is_refused() {
    let daemon = Daemon::start(&[64 * MIB]);
    let ask = |body: Value| daemon.post("/api/memory/operations/clear", &body);
    ask(json!({"what": "Allocations"})).refuses("owner");
    ask(json!({"what": "Zero"})).refuses("allocationId");
    ask(json!({"what": "Cache", "owner": "one"})).refuses("owner");
    ask(json!({"what": "Cache", "allocationId": "0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f"}))
        .refuses("allocationId");
    ask(json!({"what": "Zero", "allocationId": "0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f"})).error("NOT_FOUND");
    ask(json!({"what": "Everything"})).error("INVALID_ARGUMENT");
    daemon.post("/api/memory/operations/clear/sim:9", &json!({"what": "Cache"})).error("NOT_FOUND");
}
