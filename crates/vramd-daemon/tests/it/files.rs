//! Model files as they should not be, and paths that lead elsewhere: refused by name, with a hint, and nothing left.

use std::io::Write as _;
#[cfg(unix)]
use std::os::unix::fs::symlink;
use std::path::Path;
#[cfg(unix)]
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::{Answer, Daemon, MIB, file_of, write_model};

fn register(daemon: &Daemon, path: impl AsRef<Path>) -> Answer {
    daemon.post("/api/models", &json!({"name": "x", "components": {"weights": {"path": path.as_ref()}}}))
}

fn nothing_is_left(daemon: &Daemon) {
    assert_eq!(daemon.get("/api/models").data(200)["models"], json!([]));
    daemon.all_is_back("sim:0");
}

#[test]
fn malformed_files_are_refused_with_what_is_wrong() {
    let daemon = Daemon::start(&[64 * MIB]);
    let one = |dtype: &str, shape: Value, begin: u64, end: u64| {
        json!({"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}).to_string()
    };
    let two = |second: [u64; 2]| {
        json!({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "b": {"dtype": "U8", "shape": [4], "data_offsets": second}})
        .to_string()
    };
    let good = file_of(&one("F32", json!([2]), 0, 8), &[0; 8]);
    let duplicate = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
    let mut not_utf8 = file_of(&one("F32", json!([2]), 0, 8), &[0; 8]);
    not_utf8[11] = 0xff;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("an empty file", Vec::new()),
        ("seven bytes", vec![0; 7]),
        ("a header of no bytes", file_of("", b"")),
        ("a header cut off", good[..20].to_vec()),
        ("a payload cut off", good[..good.len() - 1].to_vec()),
        ("a payload too long", [good.as_slice(), b"x"].concat()),
        ("a header longer than the file", [&1000_u64.to_le_bytes(), b"{}".as_slice()].concat()),
        ("a header of 2^63 bytes", [&(1_u64 << 63).to_le_bytes(), b"{}".as_slice()].concat()),
        ("a header that is not UTF-8", not_utf8),
        ("a header that is not JSON", file_of("{]", b"")),
        ("a header that is a list", file_of("[]", b"")),
        ("metadata that is not text", file_of(r#"{"__metadata__":{"a":1}}"#, b"")),
        ("an unknown dtype", file_of(&one("F7", json!([2]), 0, 8), &[0; 8])),
        ("a negative dimension", file_of(&one("F32", json!([-2]), 0, 8), &[0; 8])),
        ("a shape of text", file_of(&one("F32", json!("2"), 0, 8), &[0; 8])),
        ("a shape that needs more", file_of(&one("F32", json!([3]), 0, 8), &[0; 8])),
        ("a shape beyond 64 bits", file_of(&one("F32", json!([1_u64 << 40, 1_u64 << 40]), 0, 8), &[0; 8])),
        ("half a byte", file_of(&one("F4", json!([3]), 0, 2), &[0; 2])),
        ("offsets that end before they begin", file_of(&one("F32", json!([2]), 8, 0), &[0; 8])),
        ("offsets beyond the file", file_of(&one("F32", json!([4]), 0, 16), &[0; 8])),
        (
            "offsets of 2^64",
            file_of(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,18446744073709551616]}}"#, &[0; 8]),
        ),
        ("a gap at the beginning", file_of(&one("F32", json!([1]), 4, 8), &[0; 8])),
        ("a gap", file_of(&two([8, 12]), &[0; 12])),
        ("an overlap", file_of(&two([2, 6]), &[0; 6])),
        ("a name twice", file_of(duplicate, &[0; 8])),
    ];
    let path = daemon.home.path("models").join("bad.safetensors");
    for (what, bytes) in cases {
        std::fs::write(&path, bytes).expect("a file");
        let answer = register(&daemon, &path);
        assert_eq!(answer.status, 400, "{what}: {answer:#?}");
        let error = answer.error("INVALID_MODEL_FILE");
        assert!(error["hint"].is_string() && error["details"]["component"] == "weights", "{what}: {error:#}");
        assert_eq!(error["details"]["path"], json!(path), "{what}");
    }
    // A header of 100 MB and more is refused by its length alone: the rest of this file is a hole.
    let huge = std::fs::File::create(&path).expect("a file");
    huge.set_len(200 << 20).expect("a hole");
    (&huge).write_all(&(150_u64 << 20).to_le_bytes()).expect("written");
    register(&daemon, &path).error("INVALID_MODEL_FILE");
    nothing_is_left(&daemon);
}

#[test]
fn indexes_that_do_not_match_their_shards_are_refused() {
    let daemon = Daemon::start(&[64 * MIB]);
    let models = daemon.home.path("models");
    write_model(&models.join("one.safetensors"), "a", 100);
    let path = models.join("model.safetensors.index.json");
    let map = |map: Value| json!({"weight_map": map}).to_string();
    for (what, text) in [
        ("no JSON", "{".to_owned()),
        ("no map", "{}".to_owned()),
        ("an empty map", map(json!({}))),
        (
            "a tensor that is not in its file",
            map(json!({"a": "one.safetensors", "a.scale": "one.safetensors", "b": "one.safetensors"})),
        ),
        ("a tensor left out", map(json!({"a": "one.safetensors"}))),
        ("a way out", map(json!({"a": "../one.safetensors"}))),
        ("an absolute name", map(json!({"a": "/etc/passwd"}))),
        ("a number", map(json!({"a": 1}))),
    ] {
        std::fs::write(&path, text).expect("a file");
        let answer = register(&daemon, &path);
        assert_eq!(answer.status, 400, "{what}: {answer:#?}");
        assert!(answer.error("INVALID_MODEL_FILE")["hint"].is_string(), "{what}");
    }
    std::fs::write(&path, map(json!({"a": "gone.safetensors"}))).expect("a file");
    register(&daemon, &path).error("NOT_FOUND");
    nothing_is_left(&daemon);
}

#[cfg(unix)]
#[test]
fn paths_that_lead_out_of_the_roots_are_refused() {
    let daemon = Daemon::start(&[64 * MIB]);
    let (models, outside) = (daemon.home.path("models"), daemon.home.path("outside"));
    std::fs::create_dir(&outside).expect("a directory");
    write_model(&outside.join("secret.safetensors"), "a", 16);
    symlink(&outside, models.join("way-out")).expect("a link");
    symlink(outside.join("secret.safetensors"), models.join("absolute.safetensors")).expect("a link");
    symlink("../outside/secret.safetensors", models.join("relative.safetensors")).expect("a link");
    let denied = [
        outside.join("secret.safetensors"),
        PathBuf::from("/etc/passwd"),
        PathBuf::from("/"),
        models.join("../outside/secret.safetensors"),
        models.join("way-out/../../outside/secret.safetensors"),
        models.join("way-out/secret.safetensors"),
        models.join("absolute.safetensors"),
        models.join("relative.safetensors"),
        // A name that only begins like the root.
        PathBuf::from(format!("{}-2/x.safetensors", models.display())),
    ];
    for path in denied {
        let error = register(&daemon, &path).error("PERMISSION_DENIED");
        assert!(error["hint"].is_string(), "{path:?}: {error:#}");
    }
    register(&daemon, "tiny.safetensors").refuses("path");
    register(&daemon, "").refuses("path");
    register(&daemon, format!("{}/a\0b", models.display())).refuses("path");
    register(&daemon, models.join("x".repeat(300))).refuses("path");
    nothing_is_left(&daemon);
}

#[cfg(unix)]
#[test]
fn links_inside_a_root_are_followed() {
    let daemon = Daemon::start(&[64 * MIB]);
    let models = daemon.home.path("models");
    std::fs::create_dir_all(models.join("blobs")).expect("a directory");
    std::fs::create_dir_all(models.join("snapshots/main")).expect("a directory");
    write_model(&models.join("blobs/0123"), "a", 16);
    // As the cache of Hugging Face lays it out.
    symlink("../../blobs/0123", models.join("snapshots/main/model.safetensors")).expect("a link");
    register(&daemon, models.join("snapshots/main")).data(201);
    daemon.loaded("x", "sim:0");

    symlink("loop", models.join("loop")).expect("a link");
    register(&daemon, models.join("loop")).refuses("path");
}

#[cfg(unix)]
fn special_files_are_refused(daemon: &Daemon) {
    let models = daemon.home.path("models");
    let fifo = models.join("pipe.safetensors");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
        .expect("a FIFO");
    register(daemon, &fifo).error("INVALID_MODEL_FILE");
    let listener = std::os::unix::net::UnixListener::bind(models.join("s.safetensors")).expect("a socket");
    register(daemon, models.join("s.safetensors")).error("INVALID_MODEL_FILE");
    drop(listener);
}

#[test]
fn only_regular_files_and_unambiguous_directories_are_taken() {
    let daemon = Daemon::start(&[64 * MIB]);
    let models = daemon.home.path("models");
    #[cfg(unix)]
    special_files_are_refused(&daemon);

    let directory = models.join("several");
    std::fs::create_dir(&directory).expect("a directory");
    let error = register(&daemon, &directory).error("NOT_FOUND");
    assert!(error["hint"].is_string());
    write_model(&directory.join("one.safetensors"), "a", 16);
    write_model(&directory.join("two.safetensors"), "a", 16);
    let error = register(&daemon, &directory).refuses("path");
    assert_eq!(error["details"]["files"], json!(["one.safetensors", "two.safetensors"]));
    register(&daemon, models.join("none.safetensors")).error("NOT_FOUND");
    register(&daemon, models.join("several/one.safetensors/x")).error("NOT_FOUND");
    nothing_is_left(&daemon);
}

#[test]
fn a_file_that_changed_after_its_registration_is_refused_at_the_load() {
    let daemon = Daemon::start(&[64 * MIB]);
    let path = daemon.home.path("models/tiny.safetensors");
    write_model(&path, "a", 3 << 20);
    daemon.register("tiny", "tiny.safetensors");
    let whole = std::fs::read(&path).expect("the file");

    std::fs::write(&path, &whole[..whole.len() / 2]).expect("a file");
    daemon.post("/api/models/tiny/load", &json!({})).error("INVALID_MODEL_FILE");
    std::fs::remove_file(&path).expect("removed");
    daemon.post("/api/models/tiny/load", &json!({})).error("NOT_FOUND");
    daemon.all_is_back("sim:0");
    // Another file in its place is read as it is now.
    write_model(&path, "a", 1 << 20);
    daemon.loaded("tiny", "sim:0");
    assert_eq!(daemon.model("tiny")["sizeBytes"], (1 << 20) + 2);
}
