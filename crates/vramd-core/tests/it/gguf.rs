//! GGUF headers, written here by hand: what is taken, and what each hostile one is told.

use proptest::prelude::*;
use vramd_api::attach::{Dtype, Packed, PlainDtype};
use vramd_core::layout::{Gguf, GgufError, Layout, MAX_TENSORS, Split, parse_gguf};

const F32: u32 = 0;
const Q4_K: u32 = 12;

/// A file under construction.
#[derive(Clone)]
struct File {
    version: u32,
    pairs: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    /// Written in place of the true counts.
    counts: Option<(u64, u64)>,
    alignment: usize,
    payload: usize,
}

impl Default for File {
    fn default() -> Self {
        Self { version: 3, pairs: Vec::new(), tensors: Vec::new(), counts: None, alignment: 32, payload: 0 }
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key), &kind.to_le_bytes()[..], value].concat()
}

/// Dimensions as the file has them: the fastest first.
fn tensor(name: &str, shape: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend((shape.len() as u32).to_le_bytes());
    bytes.extend(shape.iter().flat_map(|dimension| dimension.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

impl File {
    fn pair(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.pairs.push(pair(key, kind, value));
        self
    }

    fn number(self, key: &str, value: u32) -> Self {
        self.pair(key, 4, &value.to_le_bytes())
    }

    fn tensor(mut self, name: &str, shape: &[u64], kind: u32, offset: u64, bytes: usize) -> Self {
        self.tensors.push(tensor(name, shape, kind, offset));
        self.payload = self.payload.max(offset as usize + bytes);
        self
    }

    fn header(&self) -> Vec<u8> {
        let counts = (self.tensors.len() as u64, self.pairs.len() as u64);
        let (tensors, pairs) = self.counts.unwrap_or(counts);
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(pairs.to_le_bytes());
        bytes.extend(self.pairs.concat());
        bytes.extend(self.tensors.concat());
        bytes
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header();
        bytes.resize(bytes.len().next_multiple_of(self.alignment) + self.payload, 7);
        bytes
    }

    fn read(&self) -> Result<Gguf, GgufError> {
        let bytes = self.bytes();
        parse_gguf("model.gguf", &bytes, bytes.len() as u64)
    }

    fn refused(&self) -> GgufError {
        self.read().unwrap_err()
    }
}

fn two_tensors() -> File {
    File::default()
        .pair("general.architecture", 8, &text("llama"))
        .pair("llama.rope.freq_base", 6, &10000.5_f32.to_le_bytes())
        .pair("general.quantized", 7, &[1])
        .pair(
            "tokenizer.ggml.tokens",
            9,
            &[&8_u32.to_le_bytes()[..], &2_u64.to_le_bytes(), &text("a"), &text("\u{e9}")].concat(),
        )
        .pair(
            "tokenizer.ggml.scores",
            9,
            &[&6_u32.to_le_bytes()[..], &3_u64.to_le_bytes(), &[0; 12]].concat(),
        )
        .tensor("norm.weight", &[7], F32, 0, 28)
        .tensor("blk.0.attn_q.weight", &[512, 3], Q4_K, 32, 864)
}

#[test]
fn a_file_is_read_with_its_packed_tensors_and_texts() {
    for version in [2, 3] {
        let read = File { version, ..two_tensors() }.read().unwrap();
        assert_eq!(read.split, None);
        let header = &read.file.header;
        let [norm, packed] = header.tensors.as_slice() else { panic!("two tensors: {header:?}") };
        assert_eq!(
            (norm.dtype, norm.shape.as_slice(), norm.offset, norm.bytes),
            (PlainDtype::F32.into(), &[7][..], 0, 28)
        );
        assert_eq!(packed.dtype, Dtype::Packed(Packed::Q4_K));
        // In the order that everybody else has.
        assert_eq!((packed.shape.as_slice(), packed.offset, packed.bytes), (&[3, 512][..], 32, 864));
        assert_eq!(header.payload_bytes, 896);
        assert!(read.file.payload_offset.is_multiple_of(32));
        let kept: Vec<_> =
            header.metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(
            kept,
            [
                ("general.architecture", "llama"),
                ("general.quantized", "true"),
                ("llama.rope.freq_base", "10000.5")
            ]
        );
        let layout = Layout::build(vec![read.file], None).unwrap();
        assert_eq!(layout.tensors.len(), 2);
        assert_eq!(layout.payload_bytes, 896);
    }
}

#[test]
fn a_file_without_tensors_has_no_payload() {
    let read = File::default().pair("a", 8, &text("b")).read().unwrap();
    assert_eq!(read.file.header.payload_bytes, 0);
}

#[test]
fn every_part_of_a_header_is_enough_or_too_short() {
    let (file, header) = (two_tensors().bytes(), two_tensors().header().len());
    for end in 0..header {
        let part = parse_gguf("model.gguf", &file[..end], file.len() as u64);
        assert_eq!(part, Err(GgufError::Short { have: end as u64 }), "{end}");
    }
    assert_eq!(parse_gguf("model.gguf", &file[..header], file.len() as u64), two_tensors().read());
}

#[test]
fn a_split_knows_its_siblings() {
    let split = |number: u16, count: u16| {
        File::default()
            .pair("split.no", 2, &number.to_le_bytes())
            .pair("split.count", 2, &count.to_le_bytes())
            .pair("split.tensors.count", 5, &5_i32.to_le_bytes())
            .read()
    };
    let read = split(1, 3).unwrap().split;
    assert_eq!(read, Some(Split { number: 1, count: 3, tensors: 5 }));
    let read = read.unwrap();
    assert_eq!(read.sibling("m-00002-of-00003.gguf", 0).as_deref(), Some("m-00001-of-00003.gguf"));
    assert_eq!(read.sibling("m-00002-of-00003.gguf", 2).as_deref(), Some("m-00003-of-00003.gguf"));
    for name in ["m.gguf", "m-00001-of-00003.gguf", "m-00002-of-00004.gguf", "m-00002-of-00003.GGUF"] {
        assert_eq!(read.sibling(name, 0), None, "{name}");
    }
    assert_eq!(split(0, 1).unwrap().split, None);
    assert!(matches!(split(3, 3), Err(GgufError::Pair { .. })));
    assert!(matches!(split(0, 60_000), Err(GgufError::TooMany { what: "files", .. })));
    let half = File::default().pair("split.count", 2, &2_u16.to_le_bytes());
    assert!(matches!(half.refused(), GgufError::Pair { .. }));
}

#[test]
fn hostile_counts_take_nothing_and_are_named() {
    let counts = |counts| File { counts: Some(counts), ..two_tensors() }.refused();
    assert!(matches!(counts((MAX_TENSORS as u64 + 1, 0)), GgufError::TooMany { what: "tensors", .. }));
    assert!(matches!(counts((0, u64::MAX)), GgufError::TooMany { what: "key-value pairs", .. }));
    // What comes next is taken for a name, which it is not.
    assert!(matches!(counts((1000, 5)), GgufError::Name { .. } | GgufError::Short { .. }));
    let list = |kind: u32, count: u64| {
        File::default().pair("a", 9, &[&kind.to_le_bytes()[..], &count.to_le_bytes()].concat()).refused()
    };
    assert!(matches!(list(8, u64::MAX), GgufError::Short { .. }));
    assert!(matches!(list(0, u64::MAX), GgufError::Short { .. }));
    assert!(matches!(list(10, u64::MAX), GgufError::Pair { .. }));
    assert!(matches!(list(9, 1), GgufError::Pair { .. }));
    assert!(matches!(list(13, 1), GgufError::Pair { .. }));
    let long = File::default().pair("a", 8, &u64::MAX.to_le_bytes());
    assert!(matches!(long.refused(), GgufError::Short { .. }));
    let name = File { tensors: vec![u64::MAX.to_le_bytes().to_vec()], ..File::default() };
    assert!(matches!(name.refused(), GgufError::Name { .. }));
    let rank =
        File { tensors: vec![[text("a"), u32::MAX.to_le_bytes().to_vec()].concat()], ..File::default() };
    assert!(matches!(rank.refused(), GgufError::TooMany { what: "dimensions", .. }));
}

#[test]
fn tensors_that_lie_are_named() {
    let one = |shape: &[u64], kind, offset| File::default().tensor("w", shape, kind, offset, 0).refused();
    assert!(matches!(one(&[100], Q4_K, 0), GgufError::Shape { .. }));
    assert!(matches!(one(&[u64::MAX, u64::MAX], F32, 0), GgufError::Shape { .. }));
    assert!(matches!(one(&[1], 31, 0), GgufError::Type { id: 31, .. }));
    assert!(matches!(one(&[1], F32, 8), GgufError::Place { begin: 8, expected: 0, .. }));
    assert!(matches!(one(&[1], F32, 0), GgufError::PayloadTooShort { end: 4, payload_bytes: 0, .. }));
    assert!(matches!(one(&[1 << 58], F32, 0), GgufError::PayloadTooShort { .. }));
    let overlap = File::default().tensor("a", &[100], F32, 0, 400).tensor("b", &[1], F32, 32, 4);
    assert!(matches!(overlap.refused(), GgufError::Place { begin: 32, expected: 416, .. }));
    let gap = File::default().tensor("a", &[1], F32, 0, 4).tensor("b", &[1], F32, 4096, 4);
    assert!(matches!(gap.refused(), GgufError::Place { begin: 4096, expected: 32, .. }));
    let twice = File::default().tensor("a", &[1], F32, 0, 4).tensor("a", &[1], F32, 32, 4);
    assert_eq!(twice.refused(), GgufError::Duplicate { tensor: "a".to_owned() });
    assert!(twice.refused().to_string().contains("\"a\" is there twice"));
}

#[test]
fn alignments_are_powers_of_two_within_reason() {
    let aligned = |alignment: u32, offset| {
        let file = File { alignment: 64, ..File::default() };
        file.number("general.alignment", alignment)
            .tensor("a", &[1], F32, 0, 4)
            .tensor("b", &[1], F32, offset, 4)
            .read()
    };
    let read = aligned(64, 64).unwrap();
    assert!(read.file.payload_offset.is_multiple_of(64));
    assert!(matches!(aligned(64, 32), Err(GgufError::Place { .. })));
    for alignment in [0, 1, 4, 24, 1 << 30] {
        assert!(matches!(aligned(alignment, 64), Err(GgufError::Pair { .. })), "{alignment}");
    }
    let words = File::default().pair("general.alignment", 8, &text("wide"));
    assert!(matches!(words.refused(), GgufError::Pair { .. }));
}

#[test]
fn what_is_no_gguf_of_today_is_told_why() {
    let version = |version| File { version, ..File::default() }.refused();
    assert_eq!(version(1), GgufError::Version { version: 1 });
    assert_eq!(version(3_u32.swap_bytes()), GgufError::BigEndian);
    assert_eq!(parse_gguf("a", b"\x08\0\0\0\0\0\0\0", 8), Err(GgufError::Magic));
    assert_eq!(parse_gguf("a", b"", 0), Err(GgufError::Short { have: 0 }));
    let twice = File::default().number("a", 1).number("a", 1);
    assert!(matches!(twice.refused(), GgufError::Pair { .. }));
    let kind = File::default().pair("a", 13, &[]);
    assert!(matches!(kind.refused(), GgufError::Pair { .. }));
    let name = File::default().pair("a\n", 0, &[1]);
    assert!(matches!(name.refused(), GgufError::Name { .. }));
    let broken = File { pairs: vec![[1_u64.to_le_bytes().to_vec(), vec![0xff]].concat()], ..File::default() };
    assert!(matches!(broken.refused(), GgufError::Name { .. }));
    // A text that is none is passed over, as its file's reader would have it.
    let odd = File::default().pair("a", 8, &[1_u64.to_le_bytes().to_vec(), vec![0xff]].concat());
    assert!(odd.read().unwrap().file.header.metadata.is_empty());
}

#[test]
fn texts_that_would_fill_every_answer_are_left_out() {
    let long = "\u{1}".repeat(1 << 20);
    let mut file = File::default().number("z", 1);
    for key in ["a", "b", "c", "d"] {
        file = file.pair(key, 8, &text(&long));
    }
    let kept = file.read().unwrap().file.header.metadata;
    assert_eq!(kept.keys().collect::<Vec<_>>(), ["a", "b", "z"]);
}

proptest! {
    #[test]
    fn a_changed_byte_is_an_error_or_another_sound_file(at in 0usize..1200, byte: u8) {
        let mut bytes = two_tensors().bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Ok(read) = parse_gguf("model.gguf", &bytes, bytes.len() as u64) {
            let end = read.file.payload_offset + read.file.header.payload_bytes;
            prop_assert!(read.file.header.payload_bytes == 0 || end <= bytes.len() as u64);
            prop_assert!(Layout::build(vec![read.file], None).is_ok());
        }
    }
}
