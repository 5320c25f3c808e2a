//! Use over time.

use serde_json::{Value, json};

use crate::support::{Daemon, MIB, wait_for};

fn usage(daemon: &Daemon, path: &str) -> Value {
    daemon.get(&format!("/api/memory/usage{path}")).data(200)
}

#[test]
fn what_was_held_for_a_moment_is_in_the_peak_and_who_held_it_in_the_shares() {
    let daemon = Daemon::start(&[64 * MIB, 32 * MIB]);
    let kept = json!({"sizeBytes": 2 * MIB, "owner": "renderer", "purpose": "scratch"});
    let kept = daemon.post("/api/memory/allocations/allocate/sim:0", &kept).data(201);
    let gone =
        daemon.post("/api/memory/allocations/allocate/sim:0", &json!({"sizeBytes": 30 * MIB})).data(201);
    daemon.release(gone["allocationId"].as_str().expect("an id")).data(200);
    daemon
        .post("/api/memory/allocations/allocate/sim:0", &json!({"sizeBytes": 90 * MIB}))
        .error("INSUFFICIENT_MEMORY");
    let shown = wait_for("the counts to be sampled", || {
        let shown = usage(&daemon, "/sim:0?window=10m&step=10m");
        let counted: u64 =
            shown["samples"].as_array()?.iter().filter_map(|one| one["refusals"].as_u64()).sum();
        (counted == 1).then_some(shown)
    });
    assert_eq!(shown["peak"]["allocatedBytes"], 32 * MIB, "{shown:#}");
    let sum = |figure: &str| -> u64 {
        shown["samples"].as_array().expect("a list").iter().filter_map(|one| one[figure].as_u64()).sum()
    };
    assert_eq!((sum("allocations"), sum("releases")), (2, 1));
    assert!(shown["rates"]["allocatedBytesPerSecond"].as_f64().expect("a rate") > 0.0);
    assert!(shown["average"]["utilization"].as_f64().expect("a share") <= 1.0);
    let shown = wait_for("the shares to be looked at", || {
        let shown = usage(&daemon, "/sim-0");
        (shown["byOwner"][0]["name"] == "renderer").then_some(shown)
    });
    assert_eq!(shown["byPurpose"][0]["bytes"], 2 * MIB, "{shown:#}");
    assert_eq!((&shown["windowSeconds"], &shown["stepSeconds"]), (&json!(3600), &json!(60)));
    let all = usage(&daemon, "?window=60s");
    assert_eq!(all["devices"].as_array().map(Vec::len), Some(2));
    assert_eq!(all["devices"][1]["deviceId"], "sim:1");
    daemon.release(kept["allocationId"].as_str().expect("an id")).data(200);
}

#[test]
fn windows_and_steps_that_cannot_be_are_refused() {
    let daemon = Daemon::start(&[32 * MIB]);
    let get = |query: &str| daemon.get(&format!("/api/memory/usage/sim:0?{query}"));
    for window in ["0", "-1", "2h", "3601", "soon", "", "1.5m", "99999999999999999999s"] {
        get(&format!("window={window}")).refuses("window");
    }
    for step in ["0", "-5s", "11m", "x"] {
        get(&format!("window=10m&step={step}")).refuses("step");
    }
    get("from=1h").error("INVALID_ARGUMENT");
    daemon.get("/api/memory/usage/sim:7").error("NOT_FOUND");
    get("window=1h&step=1s").data(200);
    get("window=90").data(200);
}
