//! Models in GGUF files: loaded as they are, in one file or split into several.

use std::path::Path;

use serde_json::{Value, json};

use crate::moves::contents;
use crate::support::{Daemon, MIB, payload, wait_for};

/// One file: texts, tensors of packed rows (`Q4_K`, 144 bytes for 256 elements), and their payload, the first byte of which is `seed`.
fn gguf(
    texts: &[(&str, &str)],
    split: Option<[u16; 3]>,
    tensors: &[&str],
    rows: u64,
    seed: u8,
) -> (Vec<u8>, Vec<u8>) {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let size = rows * 144;
    let numbers: Vec<_> = split
        .map(|[number, count, tensors]| {
            [("split.no", number), ("split.count", count), ("split.tensors.count", tensors)]
        })
        .into_iter()
        .flatten()
        .collect();
    let mut header = b"GGUF\x03\0\0\0".to_vec();
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend(((texts.len() + numbers.len()) as u64).to_le_bytes());
    for (key, value) in texts {
        header.extend([text(key), 8_u32.to_le_bytes().to_vec(), text(value)].concat());
    }
    for (key, value) in numbers {
        header.extend([text(key), 2_u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat());
    }
    for (at, name) in (0..).zip(tensors) {
        header.extend(text(name));
        header.extend(2_u32.to_le_bytes());
        header.extend([256, rows].map(u64::to_le_bytes).concat());
        header.extend(12_u32.to_le_bytes());
        header.extend((at * size.next_multiple_of(32)).to_le_bytes());
    }
    header.resize(header.len().next_multiple_of(32), 0);
    let bytes = payload((size.next_multiple_of(32) * tensors.len() as u64) as usize, seed);
    (header, bytes)
}

fn write(path: &Path, file: &(Vec<u8>, Vec<u8>)) {
    std::fs::write(path, [file.0.as_slice(), &file.1].concat()).expect("a file");
}

/// What a reader finds: the tensors' names, dtypes, shapes and bytes.
fn attached(daemon: &Daemon, model: &str) -> Vec<(String, Value, Vec<u8>)> {
    let reader = daemon.attach(&json!({"model": model})).expect("attached");
    let block = &reader.attached.block;
    let tensors = reader.attached.tensors().expect("a table");
    tensors
        .into_iter()
        .map(|tensor| {
            let bytes = contents(&reader.descriptors[0], block.offset + tensor.offset, tensor.bytes);
            (tensor.name, json!([tensor.dtype, tensor.shape]), bytes)
        })
        .collect()
}

#[test]
fn a_file_is_loaded_as_it_is_and_attached_with_its_packed_tensors() {
    let daemon = Daemon::start(&[64 * MIB]);
    let file = gguf(&[("general.architecture", "llama")], None, &["a", "b"], 1001, 3);
    write(&daemon.home.path("models/tiny.gguf"), &file);
    let shown = daemon.register("tiny", "tiny.gguf");
    assert_eq!(shown["components"][0]["tensorCount"], 2);
    daemon.loaded("tiny", "sim:0");
    let size = 1001 * 144;
    let expected = [("a", 0), ("b", size + 16)].map(|(name, at): (&str, usize)| {
        (name.to_owned(), json!(["Q4_K", [1001, 256]]), file.1[at..at + size].to_vec())
    });
    assert!(attached(&daemon, "tiny") == expected);
    let reader = daemon.attach(&json!({"model": "tiny"})).expect("attached");
    assert_eq!(reader.attached.metadata["general.architecture"], "llama");
}

#[test]
fn a_model_that_was_split_is_one_whatever_names_it() {
    let daemon = Daemon::start(&[64 * MIB]);
    let directory = daemon.home.path("models/big");
    std::fs::create_dir(&directory).expect("a directory");
    let name = |number: u16| directory.join(format!("big-{number:05}-of-00003.gguf"));
    let files = [("a", 5), ("b", 6), ("c", 7)].map(|(tensor, seed)| {
        let number = u16::from(seed) - 5;
        let file = gguf(&[], Some([number, 3, 3]), &[tensor], 10, seed);
        write(&name(number + 1), &file);
        file
    });
    for path in ["big", "big/big-00001-of-00003.gguf"] {
        daemon.register("big", path);
        daemon.loaded("big", "sim:0");
        let read = attached(&daemon, "big");
        assert!(read.iter().zip(&files).all(|((.., bytes), file)| *bytes == file.1));
        assert_eq!(read.len(), 3);
        wait_for("the reader to be gone", || {
            (daemon.residency("big")[0]["attachedCount"] == 0).then_some(())
        });
        daemon.unloaded("big");
        daemon.delete("/api/models/big").data(200);
    }
    let refused = |number: u16| {
        let body = json!({"name": "big", "components": {"weights": {"path": name(number)}}});
        let answer = daemon.post("/api/models", &body);
        let body: Value = serde_json::from_str(&answer.text).expect("JSON");
        (answer.status, body["error"]["code"].clone(), body["error"]["hint"].to_string())
    };
    // Not the first.
    let (status, code, hint) = refused(2);
    assert_eq!((status, code), (400, json!("INVALID_MODEL_FILE")));
    assert!(hint.contains("big-00001-of-00003.gguf"), "{hint}");
    // One twice, under the other's name.
    std::fs::copy(name(2), name(3)).expect("copied");
    assert_eq!(refused(1).0, 400);
    // Of another model.
    write(&name(3), &gguf(&[], Some([2, 3, 9]), &["c"], 10, 7));
    assert_eq!(refused(1).0, 400);
    // A tensor that another file has.
    write(&name(3), &gguf(&[], Some([2, 3, 3]), &["b"], 10, 7));
    assert_eq!(refused(1).0, 400);
    // One tensor more than there should be.
    write(&name(3), &gguf(&[], Some([2, 3, 3]), &["c", "d"], 10, 7));
    assert_eq!(refused(1).0, 400);
    std::fs::remove_file(name(3)).expect("removed");
    let (status, code, _) = refused(1);
    assert_eq!((status, code), (404, json!("NOT_FOUND")));
    // A name that does not say where the others are.
    let alone = daemon.home.path("models/alone.gguf");
    std::fs::copy(name(1), &alone).expect("copied");
    let body = json!({"name": "big", "components": {"weights": {"path": alone}}});
    daemon.post("/api/models", &body).error("INVALID_MODEL_FILE");
    assert_eq!(daemon.get("/api/models").data(200)["models"], json!([]));
}

#[test]
fn damaged_files_are_refused_with_what_is_wrong() {
    let daemon = Daemon::start(&[64 * MIB]);
    let (header, bytes) = gguf(&[("a", "b")], None, &["w"], 10, 1);
    let whole = [header.as_slice(), &bytes].concat();
    let path = daemon.home.path("models/bad.gguf");
    let mut huge_count = whole.clone();
    huge_count[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut old = whole.clone();
    old[4] = 1;
    let cases: [(&str, &[u8]); 6] = [
        ("an empty file", &[]),
        ("another format", b"\x02\0\0\0\0\0\0\0{}"),
        ("a header cut off", &whole[..40]),
        ("a payload cut off", &whole[..whole.len() - 1]),
        ("a count of 2^64 - 1", &huge_count),
        ("version 1", &old),
    ];
    for (what, bytes) in cases {
        std::fs::write(&path, bytes).expect("a file");
        let body = json!({"name": "x", "components": {"weights": {"path": path}}});
        let answer = daemon.post("/api/models", &body);
        assert_eq!(answer.status, 400, "{what}: {answer:#?}");
        let error = answer.error("INVALID_MODEL_FILE");
        assert!(error["hint"].is_string() && error["details"]["component"] == "weights", "{what}: {error:#}");
    }
    // A header longer than what is read of it at first.
    let long = "x".repeat(3 << 20);
    write(&path, &gguf(&[("a", "b"), ("long", &long)], None, &["w"], 10, 1));
    daemon.register("long", "bad.gguf");
    daemon.loaded("long", "sim:0");
}
