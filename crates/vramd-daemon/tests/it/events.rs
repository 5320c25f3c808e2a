//! The event stream: order, resumption, and its end.

use serde_json::json;

use crate::support::{Daemon, MIB, with_model};

#[test]
fn events_come_in_order_with_ids_that_resume() {
    let (daemon, _) = with_model(&[64 * MIB], 4096);
    let mut events = daemon.events(None);
    let id = daemon.allocated(&json!({"sizeBytes": 4 * MIB, "owner": "trainer"}));
    daemon.release(&id).data(200);
    daemon.loaded("tiny", "sim:0");
    daemon.unloaded("tiny");
    daemon.delete("/api/models/tiny").data(200);

    let mut seen = Vec::new();
    while seen.last().is_none_or(|(_, kind, _): &(String, String, _)| kind != "model.removed") {
        seen.push(events.next().expect("an event"));
    }
    for (id, kind, event) in &seen {
        assert_eq!((&event["id"], &event["event"]), (&json!(id), &json!(kind)));
        assert!(event["at"].is_string(), "{event:#}");
    }
    let kinds: Vec<_> =
        seen.iter().map(|(_, kind, _)| kind.as_str()).filter(|kind| *kind != "operation.changed").collect();
    assert_eq!(
        kinds,
        [
            "allocation.created",
            "allocation.released",
            "allocation.created",
            "model.loaded",
            "allocation.released",
            "model.unloaded",
            "model.removed"
        ]
    );
    assert_eq!(seen[0].2["data"]["owner"], "trainer");
    let states: Vec<_> = seen
        .iter()
        .filter(|(_, kind, event)| kind == "operation.changed" && event["data"]["kind"] == "load")
        .map(|(_, _, event)| event["data"]["state"].clone())
        .collect();
    assert_eq!((states.first(), states.last()), (Some(&json!("Running")), Some(&json!("Completed"))));

    let mut resumed = daemon.events(Some(&seen[1].0));
    for expected in &seen[2..] {
        assert_eq!(resumed.next().as_ref(), Some(expected));
    }
}

#[test]
fn an_id_that_cannot_be_resumed_from_begins_with_a_reset() {
    let daemon = Daemon::start(&[64 * MIB]);
    for unknown in ["x", "0198c2de7a517c3e9d0f5b1a2c3d4e5f-1", "-1"] {
        let mut events = daemon.events(Some(unknown));
        let (_, kind, event) = events.next().expect("an event");
        assert_eq!((kind.as_str(), &event["data"]["lastEventId"]), ("reset", &json!(unknown)));
        daemon.allocated(&json!({"sizeBytes": 4096}));
        events.until("allocation.created");
    }
}

#[test]
fn the_stream_ends_when_the_daemon_stops() {
    let daemon = Daemon::start(&[64 * MIB]);
    let mut events = daemon.events(None);
    let home = daemon.stop();
    while events.next().is_some() {}
    assert!(!home.path("ready.json").exists() && !home.path("socket").exists());
}

#[test]
fn followers_beyond_the_limit_are_refused() {
    let daemon = Daemon::start(&[64 * MIB]);
    let followers: Vec<_> = (0..64).map(|_| daemon.events(None)).collect();
    let error = daemon.get("/api/events").error("TOO_MANY_REQUESTS");
    assert_eq!(error["details"]["limit"], 64);
    drop(followers);
    crate::support::wait_for("room for a follower", || {
        use std::io::{BufRead, BufReader, Write};
        let mut stream = daemon.connect();
        stream.write_all(b"GET /api/events HTTP/1.0\r\nHost: localhost\r\n\r\n").expect("sent");
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).expect("a status");
        line.contains(" 200 ").then_some(())
    });
}
