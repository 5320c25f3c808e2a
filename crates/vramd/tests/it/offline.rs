//! What needs no daemon, and what is said when none answers.

use std::io::Read;
use std::net::TcpListener;
use std::process::Stdio;

use crate::support::Home;

/// An address that was free a moment ago, so that nothing answers there.
fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    format!("http://{}", listener.local_addr().expect("its address"))
}

#[test]
fn a_daemon_that_does_not_answer_is_a_fault_with_a_hint() {
    let (home, server) = (Home::new(), nowhere());
    let socket = format!("unix:{}", home.path("none.sock").display());
    for server in [&server, &socket] {
        for command in [&["status"][..], &["alloc", "1K"], &["load", "m"], &["events"], &["models"]] {
            let ended = home.run(&[command, &["--server", server]].concat()).expect(2);
            assert!(ended.stderr.contains(&format!("error: no vramd answers at {server}")), "{ended:?}");
            assert!(ended.stderr.contains("hint: is it running? `vramd serve` starts it"), "{ended:?}");
            assert_eq!(ended.stdout, "");
        }
    }
    let ended = home.run(&["attach", "m", "--server", &socket]).expect(2);
    assert!(ended.stderr.contains("hint: is it running?"), "{ended:?}");
}

#[test]
fn an_error_can_be_json_and_goes_to_standard_error() {
    let ended = Home::new().run(&["status", "--json", "--server", &nowhere()]).expect(2);
    let error: serde_json::Value = serde_json::from_str(&ended.stderr).expect("JSON");
    assert!(error["error"]["message"].as_str().expect("a message").contains("no vramd answers"));
    assert_eq!(ended.stdout, "");
}

#[test]
fn something_else_that_answers_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let server = format!("http://{}", listener.local_addr().expect("its address"));
    let other = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let _ = stream.read(&mut [0; 4096]).expect("a request");
        std::io::Write::write_all(&mut stream, b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno")
            .expect("sent");
    });
    let ended = Home::new().run(&["status", "--server", &server]).expect(2);
    other.join().expect("it ended");
    assert!(ended.stderr.contains("404 Not Found without an error of vramd"), "{ended:?}");
}

#[test]
fn wrong_use_ends_with_two_and_says_what_is_right() {
    let home = Home::new();
    for (arguments, text) in [
        (&["alloc", "0"][..], "at least 1 byte"),
        (&["alloc", "-1"], "is not a size"),
        (&["alloc", "9EiB"], "units are"),
        (&["alloc", "9223372036854775808"], "larger than"),
        (&["alloc", "1K", "--persistent", "--lease-seconds", "5"], "cannot be used with"),
        (&["alloc", "1K", "--type", "Wheels"], "KvCache"),
        (&["free", "x"], "a UUID such as"),
        (&["free"], "required"),
        (&["load", "a/b"], "letters, digits"),
        (&["load", "m", "--keep-alive", "soon"], "-1 for ever"),
        (&["limits", "cpu:0", "much"], "not a size"),
        (&["models", "add", "m"], "required"),
        (&["models", "add", "m", "--component", "unet"], "NAME=PATH"),
        (&["serve", "--listen", "everywhere"], "127.0.0.1:8726, or none"),
        (&["status", "--server", "localhost"], "http:// or unix:"),
        (&["frobnicate"], "unrecognized subcommand"),
    ] {
        let ended = home.run(arguments).expect(2);
        assert!(ended.stderr.contains(text), "{arguments:?} said {}", ended.stderr);
        assert_eq!(ended.stdout, "");
    }
}

#[test]
fn every_shell_has_completions() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = home.run(&["completions", shell]).expect(0).stdout;
        assert!(script.contains("alloc") && script.contains("doctor"), "{shell}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let home = Home::new();
    let mut child = home
        .command(&["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    drop(child.stdout.take());
    let ended = child.wait_with_output().expect("it ended");
    assert!(ended.status.success() && ended.stderr.is_empty(), "{ended:?}");
}

#[test]
fn the_reference_pages_are_complete() {
    let home = Home::new();
    let page = |name: &str| home.run(&["generate", name]).expect(0).stdout;
    let cli = page("cli");
    for command in ["serve", "models add", "attach", "config show", "completions"] {
        assert!(cli.contains(&format!("\n## `vramd {command}`\n")), "{command}");
    }
    assert!(!cli.contains("generate") && !cli.contains('\x1b'));
    assert!(page("config").contains("| `cpu_limit` | `--cpu-limit` | `VRAMD_CPU_LIMIT` |"));
    assert!(page("errors").contains("| `INSUFFICIENT_MEMORY` | 507 | yes |"));
    assert!(serde_json::from_str::<serde_json::Value>(&page("openapi")).is_ok());
}

#[test]
fn the_doctor_speaks_json_and_ends_as_bad_as_the_worst() {
    let home = Home::new();
    let roots = home.path("missing");
    let roots = roots.to_str().expect("UTF-8");
    let ended = home.run(&[
        "doctor",
        "--json",
        "--server",
        &nowhere(),
        "--listen",
        "127.0.0.1:0",
        "--model-root",
        roots,
    ]);
    let report = ended.expect(2).json();
    assert_eq!(report["verdict"], "fault");
    let checks = report["checks"].as_array().expect("checks");
    let verdict =
        |name: &str| &checks.iter().find(|check| check["name"] == name).expect("a check")["verdict"];
    assert_eq!(verdict("model root"), "fault");
    assert_eq!(verdict("daemon"), "warning");
    assert_eq!(verdict("kernel"), "ok");
    assert_eq!(verdict("shared memory"), "ok");
    for check in checks {
        assert_eq!(check["verdict"] == "ok", check["hint"].is_null(), "{check}");
    }
}
