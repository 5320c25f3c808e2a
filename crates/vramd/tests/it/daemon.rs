//! Every command against a running daemon.

use std::io::Read;
use std::process::{Child, Stdio};

use serde_json::Value;

use crate::support::{Daemon, Ended, Signal, kill, wait_for, write_model};

const UNKNOWN: &str = "0198c2de-7a51-7c3e-9d0f-5b1a2c3d4e5f";

/// A daemon with the model `tiny` registered.
fn with_model(count: usize) -> Daemon {
    let daemon = Daemon::start();
    write_model(&daemon.home.path("models/tiny.safetensors"), count);
    daemon.run(&["models", "add", "tiny", "models/tiny.safetensors"]).expect(0);
    daemon
}

/// A daemon with the model `slow`, which takes two seconds to load on `sim:0`: long enough to be cancelled.
fn with_slow_load() -> Daemon {
    let daemon = Daemon::start_with("256MiB@64MiB");
    write_model(&daemon.home.path("models/slow.safetensors"), 32 << 20);
    daemon.run(&["models", "add", "slow", "models/slow.safetensors"]).expect(0);
    daemon
}

fn spawn(daemon: &Daemon, arguments: &[&str]) -> Child {
    daemon.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs")
}

/// Attaches `tiny` and holds it; answers once the client has everything.
fn hold(daemon: &Daemon) -> Child {
    let mut child = spawn(daemon, &["attach", "tiny", "--hold"]);
    let stderr = child.stderr.as_mut().expect("piped");
    let mut said = Vec::new();
    while !said.ends_with(b"held; Ctrl-C lets go\n") {
        let mut byte = [0];
        assert_eq!(stderr.read(&mut byte).expect("read"), 1, "{}", String::from_utf8_lossy(&said));
        said.push(byte[0]);
    }
    child
}

fn ended(child: Child) -> Ended {
    child.wait_with_output().expect("it ended").into()
}

/// The pids that `ps` shows.
#[cfg(unix)]
fn holders(daemon: &Daemon) -> Vec<u64> {
    let shown = daemon.json(&["ps"]);
    let holders = shown["holders"].as_array().expect("holders");
    holders.iter().filter_map(|it| it["lease"]["holder"]["pid"].as_u64()).collect()
}

#[test]
fn memory_is_allocated_shown_renewed_and_released() {
    let daemon = Daemon::start();
    let made = daemon
        .run(&[
            "alloc",
            "1MiB",
            "--device",
            "sim:0",
            "--purpose",
            "scratch",
            "--owner",
            "me",
            "--priority",
            "high",
        ])
        .expect(0);
    let id = made.stdout.trim();
    assert!(made.stderr.contains("on sim:0") && made.stderr.contains("lease expires in"), "{made:?}");
    for (arguments, text) in [
        (&["allocations"][..], "scratch"),
        (
            &[
                "allocations",
                "--device",
                "sim:0",
                "--owner",
                "me",
                "--type",
                "buffer",
                "--sort",
                "-sizeBytes",
            ],
            "me",
        ),
        (&["ps"], "expires in"),
        (&["ps", "--device", "sim:0"], id),
        (&["status"], "PRESSURE"),
        (&["status", "sim:0"], "1.0 MiB in 1 allocations"),
        (&["devices"], "sim:1"),
        (&["limits"], "the configuration"),
    ] {
        let shown = daemon.run(arguments).expect(0);
        assert!(shown.stdout.contains(text), "{arguments:?}: {shown:?}");
        assert_eq!(shown.stderr, "");
    }
    assert_eq!(daemon.json(&["allocations", "--purpose", "other"])["allocations"], Value::Array(vec![]));
    assert_eq!(daemon.json(&["renew", id, "--lease-seconds", "600"])["allocationId"], id);
    assert_eq!(daemon.json(&["status", "sim:0"])["allocationCount"], 1);
    assert_eq!(daemon.json(&["free", id])["released"][0]["allocationId"], id);
    assert_eq!(daemon.json(&["status", "sim:0"])["allocatedBytes"], 0);
}

#[test]
fn room_for_a_run_is_reserved_and_what_it_took_is_shown() {
    let daemon = with_model(10);
    let arguments = ["reserve", "8MiB", "--model", "sdxl", "--shape", "1x64,64", "--device", "sim:0"];
    let made = daemon.run(&arguments).expect(0);
    assert!(made.stderr.contains("8.0 MiB on sim:0, as was said; lease expires in"), "{made:?}");
    let id = made.stdout.trim();
    let listed = daemon.run(&["ps"]).expect(0);
    assert!(listed.stdout.contains("reservation, expires in"), "{listed:?}");
    let renewed = daemon.json(&["renew", id, "--used", "3MiB"]);
    assert_eq!(renewed["reservation"]["peakBytes"], 3 << 20);
    assert_eq!(daemon.json(&["free", id, "--peak", "4MiB"])["released"][0]["footprint"]["error"], 1.0);
    let shown = daemon.run(&["footprints"]).expect(0);
    for text in ["sdxl", "1x64x64", "8.0 MiB", "4.0 MiB", "+100 %"] {
        assert!(shown.stdout.contains(text), "{shown:?}");
    }
    let again =
        daemon.run(&["reserve", "--model", "sdxl", "--shape", "1x64x64", "--device", "sim:0"]).expect(0);
    assert!(again.stderr.contains("4.0 MiB on sim:0, as runs of that shape took"), "{again:?}");
    let wide =
        daemon.run(&["reserve", "--model", "sdxl", "--shape", "2x64x64", "--device", "sim:0"]).expect(0);
    assert!(wide.stderr.contains("8.0 MiB on sim:0, by what runs of other shapes took"), "{wide:?}");
    let both = [again.stdout.trim(), wide.stdout.trim()];
    daemon.run(&["free", both[0], both[1], "--peak", "1"]).expect(2);
    daemon.run(&["free", both[0], both[1]]).expect(0);
    let planned = |run: &str| daemon.run(&["plan", &format!("tiny{run}")]);
    assert!(planned("").expect(0).stdout.contains("fits"));
    assert!(planned("+1MiB").expect(0).stdout.contains("1.0 MiB"));
    assert!(planned("@sim:0+1TiB").expect(1).stdout.contains("tooLarge"));
    planned("+1x64").expect(1);
    planned("+much").expect(2);
    daemon.run(&["reserve"]).expect(2);
    daemon.run(&["reserve", "1MiB", "--model", "m", "--shape", "1x0"]).expect(2);
    daemon.run(&["reserve", "1MiB", "--shape", "1"]).expect(2);
}

#[test]
fn each_answer_is_json_on_request() {
    let daemon = with_model(100);
    let made = daemon.json(&["alloc", "4K", "--persistent", "--memory-type", "ram"]);
    assert_eq!((&made["deviceId"], &made["persistent"]), (&"cpu:0".into(), &true.into()));
    let id = made["allocationId"].as_str().expect("an id");
    let pid = &std::process::id().to_string();
    for (arguments, field) in [
        (&["status"][..], "/total/totalBytes"),
        (&["status", "cpu:0"], "/largestFreeBytes"),
        (&["devices"], "/devices/0/capabilities"),
        (&["allocations"], "/allocations/0/leases"),
        (&["ps"], "/holders/0/lease/kind"),
        (&["limits", "sim:0", "16MiB"], "/overridden"),
        (&["limits", "sim:0"], "/limitBytes"),
        (&["limits", "sim:0", "default"], "/limitBytes"),
        (&["limits"], "/limits/0/deviceId"),
        (&["models"], "/models/0/name"),
        (&["models", "show", "tiny"], "/components/0/path"),
        (&["load", "tiny", "--device", "cpu:0", "--keep-alive", "-1"], "/operationId"),
        (&["pin", "tiny"], "/pinned"),
        (&["unpin", "tiny"], "/pinned"),
        (&["touch", "tiny", "--keep-alive", "1h"], "/expiresAt"),
        (&["attach", "tiny/weights"], "/tensors/1/0"),
        (&["operations"], "/operations/0/state"),
        (&["operations", "--state", "completed"], "/operations/0/kind"),
        (&["unload", "tiny"], "/operationId"),
        (&["models", "rm", "tiny"], "/name"),
        (&["free", id], "/released/0/releasedBytes"),
        (
            &["reserve", "1MiB", "--device", "sim:0", "--model", "m", "--shape", "2x8", "--pid", pid],
            "/reservation/pid",
        ),
        (&["footprints", "m"], "/footprints"),
        (&["config", "show"], "/settings/0/origin"),
    ] {
        let answer = daemon.json(arguments);
        assert!(answer.pointer(field).is_some(), "{arguments:?} has no {field}: {answer:#}");
    }
}

#[test]
fn a_model_is_loaded_attached_and_unloaded() {
    let daemon = with_model(1000);
    for (arguments, text) in [
        (&["models"][..], "OnDisk"),
        (&["load", "tiny", "--device", "cpu:0"], "Completed"),
        (&["load", "tiny", "--device", "cpu:0"], "Completed"),
        (&["models"], "cpu:0 Resident"),
        (&["models", "show", "tiny"], "weights"),
        (&["pin", "tiny"], "pinned"),
        (&["unpin", "tiny"], "expires in"),
        (&["touch", "tiny", "--keep-alive", "-1"], "for ever"),
        (&["attach", "tiny"], "F32    [1000]"),
        (&["attach", "tiny/weights", "--device", "cpu:0"], "BF16   []"),
        (&["operations"], "tiny on cpu:0"),
        (&["unload", "tiny", "--device", "cpu:0"], "Completed"),
        (&["models", "rm", "tiny"], "tiny is forgotten"),
    ] {
        let shown = daemon.run(arguments).expect(0);
        assert!(shown.stdout.contains(text), "{arguments:?}: {shown:?}");
    }
}

#[test]
fn what_the_daemon_refuses_ends_with_one_and_a_hint() {
    let daemon = with_model(10);
    let mut without_hint = Vec::new();
    for (arguments, text) in [
        (&["free", UNKNOWN][..], UNKNOWN),
        (&["renew", UNKNOWN], UNKNOWN),
        (&["cancel", UNKNOWN], UNKNOWN),
        (&["operations", UNKNOWN], UNKNOWN),
        (&["load", "missing"], "missing"),
        (&["unload", "missing"], "missing"),
        (&["pin", "missing"], "missing"),
        (&["models", "show", "missing"], "missing"),
        (&["models", "rm", "missing"], "missing"),
        (&["models", "add", "tiny", "models/tiny.safetensors"], "tiny"),
        (&["models", "add", "other", "models/nothing.safetensors"], "nothing.safetensors"),
        (&["models", "add", "other", "/etc/passwd"], "passwd lies outside"),
        (&["attach", "missing"], "missing"),
        (&["attach", "tiny"], "tiny"),
        (&["attach", "tiny/unet"], "unet"),
        (&["alloc", "1TiB"], "1.0 TiB"),
        (&["alloc", "1K", "--device", "sim:9"], "sim:9"),
        (&["alloc", "1K", "--alignment", "3"], "alignment"),
        (&["alloc", "1TiB", "--on-shortage", "wait", "--timeout-seconds", "0"], "1.0 TiB"),
        (&["status", "sim:9"], "sim:9"),
        (&["limits", "sim:9"], "sim:9"),
        (&["reserve", "--model", "never"], "no such run was measured on sim:0"),
        (&["reserve", "1TiB"], "1.0 TiB"),
    ] {
        let ended = daemon.run(arguments).expect(1);
        assert!(ended.stderr.contains("error: ") && ended.stderr.contains(text), "{arguments:?}: {ended:?}");
        assert_eq!(ended.stdout, "");
        if !ended.stderr.contains("\nhint: ") {
            without_hint.push(ended.stderr);
        }
    }
    assert!(without_hint.is_empty(), "without a hint: {without_hint:#?}");
    let ended = daemon.run(&["alloc", "1TiB", "--json"]).expect(1);
    let error: Value = serde_json::from_str(&ended.stderr).expect("JSON");
    assert_eq!(error["error"]["code"], "INSUFFICIENT_MEMORY");
    assert_eq!(error["error"]["status"], 507);
}

#[test]
fn free_goes_on_after_an_id_that_is_unknown() {
    let daemon = Daemon::start();
    let id = daemon.run(&["alloc", "4K"]).expect(0).stdout;
    let ended = daemon.run(&["free", UNKNOWN, id.trim()]).expect(1);
    assert!(ended.stdout.contains(id.trim()) && ended.stderr.contains(UNKNOWN), "{ended:?}");
}

#[test]
fn the_local_socket_serves_the_same() {
    let daemon = Daemon::start();
    let server = daemon.home.local_server();
    let over_socket = daemon.run(&["devices", "--json", "--server", &server]).expect(0);
    assert_eq!(over_socket.json(), daemon.json(&["devices"]));
}

#[test]
fn events_are_followed_and_resumed() {
    let daemon = Daemon::start();
    let mut child = spawn(&daemon, &["events", "--json", "--count", "1"]);
    // It may not follow yet when the first of these happens.
    wait_for("an event", || {
        daemon.run(&["alloc", "4K"]).expect(0);
        child.try_wait().expect("a child")
    });
    let first = ended(child).expect(0).json();
    let since = first["id"].as_str().expect("an id");
    let id = daemon.run(&["alloc", "8K", "--purpose", "later"]).expect(0).stdout;
    let mut resumed = spawn(&daemon, &["events", "--since", since]);
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(resumed.stdout.take().expect("piped")));
    wait_for("the later event", || lines.next()?.expect("text").contains(id.trim()).then_some(()));
    kill(&resumed, Signal::KILL);
    resumed.wait().expect("it ended");
}

#[cfg(unix)]
#[test]
fn a_clean_stop_ends_those_who_follow() {
    let mut daemon = Daemon::start();
    let mut child = spawn(&daemon, &["events"]);
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().expect("piped")));
    let first = std::thread::scope(|scope| {
        let reader = scope.spawn(|| lines.next().expect("a line").expect("text"));
        wait_for("a first event", || {
            daemon.run(&["alloc", "4K"]).expect(0);
            reader.is_finished().then_some(())
        });
        reader.join().expect("a line")
    });
    assert!(first.contains("allocation."), "{first}");
    assert_eq!(daemon.end(Signal::TERM), Some(0), "{}", daemon.log());
    assert!(!daemon.home.path("ready.json").exists());
    let last = lines.map(|line| line.expect("text")).last().expect("more lines");
    assert!(last.contains("daemon.stopping"), "{last}");
    assert_eq!(child.wait().expect("it ended").code(), Some(0));
}

#[cfg(unix)]
#[test]
fn a_held_attachment_ends_with_its_process_and_the_model_stays() {
    let daemon = with_model(1000);
    daemon.run(&["load", "tiny", "--device", "cpu:0"]).expect(0);
    let (killed, mut asked) = (hold(&daemon), hold(&daemon));
    assert_eq!(holders(&daemon), [u64::from(killed.id()), u64::from(asked.id())]);

    let refused = daemon.run(&["unload", "tiny"]).expect(1);
    assert!(refused.stderr.contains(&format!("({})", killed.id())), "{refused:?}");

    kill(&killed, Signal::KILL);
    ended(killed);
    wait_for("its lease to end", || (holders(&daemon) == [u64::from(asked.id())]).then_some(()));
    kill(&asked, Signal::INT);
    assert_eq!(asked.wait().expect("it ended").code(), Some(0));
    wait_for("the other lease to end", || holders(&daemon).is_empty().then_some(()));
    assert!(daemon.run(&["models"]).expect(0).stdout.contains("cpu:0 Resident"));
}

#[test]
fn an_attachment_that_outlives_the_daemon_says_so() {
    let mut daemon = with_model(1000);
    daemon.run(&["load", "tiny", "--device", "cpu:0"]).expect(0);
    let child = hold(&daemon);
    daemon.end(Signal::KILL);
    let ended = ended(child).expect(2);
    assert!(ended.stderr.contains("error: the daemon ended the lease"), "{ended:?}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_cancels_a_load() {
    let daemon = with_slow_load();
    let child = spawn(&daemon, &["load", "slow", "--device", "sim:0"]);
    wait_for("the load to run", || {
        let shown = daemon.json(&["operations", "--state", "Running"]);
        (!shown["operations"].as_array()?.is_empty()).then_some(())
    });
    kill(&child, Signal::INT);
    let ended = ended(child).expect(1);
    assert!(ended.stderr.contains("cancelling slow on sim:0"), "{ended:?}");
    assert!(ended.stderr.contains("error: "), "{ended:?}");
    assert_eq!(daemon.json(&["operations"])["operations"][0]["state"], "Cancelled");
    assert_eq!(daemon.json(&["status", "sim:0"])["allocatedBytes"], 0);
}

#[test]
fn a_load_that_is_not_waited_for_can_be_cancelled_by_its_id() {
    let daemon = with_slow_load();
    let id = daemon.run(&["load", "slow", "--device", "sim:0", "--no-wait"]).expect(0).stdout;
    assert!(daemon.run(&["operations", id.trim()]).expect(0).stdout.contains("slow on sim:0"));
    daemon.run(&["cancel", id.trim()]).expect(0);
    wait_for("the end", || (daemon.json(&["operations", id.trim()])["state"] == "Cancelled").then_some(()));
    daemon.run(&["cancel", id.trim()]).expect(1);
}

#[test]
fn the_doctor_finds_the_daemon() {
    let daemon = Daemon::start();
    let report = daemon.run(&["doctor", "--json", "--socket", "none", "--state-dir", "state"]);
    let report = report.json();
    let checks = report["checks"].as_array().expect("checks");
    let check = |name: &str| checks.iter().find(|check| check["name"] == name);
    assert_eq!(check("daemon").expect("a check")["verdict"], "ok");
    assert!(check("device").is_some() && check("address").is_none());
}

#[cfg(unix)]
#[test]
fn what_is_to_stay_is_there_after_a_restart() {
    let mut daemon = with_model(10);
    let id = daemon.run(&["alloc", "4K", "--persistent", "--device", "sim:0"]).expect(0).stdout;
    daemon.run(&["alloc", "4K"]).expect(0);
    daemon.run(&["limits", "sim:1", "16MiB"]).expect(0);
    assert_eq!(daemon.end(Signal::INT), Some(0), "{}", daemon.log());
    daemon.restart();
    let kept = daemon.json(&["allocations"]);
    assert_eq!(kept["allocations"].as_array().expect("allocations").len(), 1);
    assert_eq!(kept["allocations"][0]["allocationId"], id.trim());
    assert_eq!(kept["allocations"][0]["generation"], 2);
    assert_eq!(daemon.json(&["models"])["models"][0]["name"], "tiny");
    assert_eq!(daemon.json(&["limits", "sim:1"])["limitBytes"], 16 << 20);
}
