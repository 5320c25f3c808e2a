//! The frames in `protocol/golden`, which the tests of the Python package read too.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use vramd_api::ApiError;
use vramd_api::attach::{
    Acknowledge, Attach, Attached, BadHeader, FrameKind, HEADER_BYTES, Header, Moved, encode_frame,
};

/// One entry of `cases.json`; its `what` is for people.
#[derive(Debug, Deserialize)]
struct Case {
    file: String,
    #[serde(flatten)]
    expected: Expected,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Expected {
    Frame { kind: String, descriptors: u32, body: Value },
    Refused { error: String },
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../protocol/golden")
}

fn cases() -> Vec<(Case, Vec<u8>)> {
    let list = std::fs::read(golden().join("cases.json")).expect("the list of golden frames is there");
    let cases: Vec<Case> = serde_json::from_slice(&list).expect("the list of golden frames is JSON");
    cases
        .into_iter()
        .map(|case| {
            let bytes = std::fs::read(golden().join(&case.file)).expect("each golden frame has its file");
            (case, bytes)
        })
        .collect()
}

fn decode(bytes: &[u8]) -> Result<Header, BadHeader> {
    Header::decode(bytes.first_chunk::<HEADER_BYTES>().expect("a golden frame has a whole header"))
}

/// Reads the body as the type that its kind has, and writes the frame anew.
fn encode_again(header: Header, body: &[u8]) -> Vec<u8> {
    fn again<T: serde::Serialize + serde::de::DeserializeOwned>(header: Header, body: &[u8]) -> Vec<u8> {
        let body: T = serde_json::from_slice(body).expect("the body of a golden frame reads as its kind");
        encode_frame(header.kind, &body, header.descriptors).expect("a golden body can be written")
    }
    match header.kind {
        FrameKind::Attach => again::<Attach>(header, body),
        FrameKind::Attached => again::<Attached>(header, body),
        FrameKind::Error => again::<ApiError>(header, body),
        FrameKind::Moved => again::<Moved>(header, body),
        FrameKind::Acknowledge => again::<Acknowledge>(header, body),
    }
}

#[test]
fn golden_frames_read_as_listed_and_are_written_to_the_byte() {
    for (case, bytes) in cases() {
        let Expected::Frame { kind, descriptors, body } = &case.expected else { continue };
        let header = decode(&bytes).expect("a golden frame has a good header");
        let kind = match kind.as_str() {
            "attach" => FrameKind::Attach,
            "attached" => FrameKind::Attached,
            "error" => FrameKind::Error,
            "moved" => FrameKind::Moved,
            "acknowledge" => FrameKind::Acknowledge,
            other => panic!("{}: {other:?} is no kind", case.file),
        };
        assert_eq!(header.kind, kind, "{}", case.file);
        assert_eq!(header.descriptors, *descriptors, "{}", case.file);
        let rest = &bytes[HEADER_BYTES..];
        assert_eq!(rest.len(), header.body_bytes as usize, "{}", case.file);
        assert_eq!(&serde_json::from_slice::<Value>(rest).expect("the body is JSON"), body, "{}", case.file);
        assert_eq!(encode_again(header, rest), bytes, "{}", case.file);
    }
}

#[test]
fn golden_frames_that_break_a_rule_are_refused_by_that_rule() {
    for (case, bytes) in cases() {
        let Expected::Refused { error } = &case.expected else { continue };
        let broken = match decode(&bytes) {
            Ok(header) => panic!("{} was taken: {header:?}", case.file),
            Err(BadHeader::Magic) => "magic",
            Err(BadHeader::Version(_)) => "version",
            Err(BadHeader::Kind(_)) => "kind",
            Err(BadHeader::Body { .. }) => "body",
            Err(BadHeader::Descriptors { .. }) => "descriptors",
        };
        assert_eq!(broken, error, "{}", case.file);
    }
}

#[test]
fn the_tensor_table_of_a_golden_frame_reads_row_by_row() {
    let bytes = std::fs::read(golden().join("attached-model.bin")).expect("the frame is there");
    let attached: Attached = serde_json::from_slice(&bytes[HEADER_BYTES..]).expect("the body reads");
    let tensors = attached.tensors().expect("the tensor table reads");
    let shapes: Vec<_> = tensors.iter().map(|t| (t.name.as_str(), t.shape.as_slice(), t.bytes)).collect();
    assert_eq!(shapes, [("weight", &[2, 3][..], 24), ("scale", &[][..], 2), ("empty", &[0, 4][..], 0)]);
}
