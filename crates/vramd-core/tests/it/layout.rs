//! Files that the format's own library writes, files that it cannot write, and files that nobody should.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use vramd_api::attach::{PlainDtype as Dtype, Tensor};
use vramd_core::layout::{
    FileHeader, Header, HeaderError, IndexError, Layout, LayoutError, MAX_HEADER_BYTES, MAX_RANK, MAX_SHARDS,
    SPAN_ALIGNMENT, header_length, parse_header, parse_index,
};

const DTYPES: [&str; 22] = [
    "BOOL",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
];

fn dtype(name: &str) -> Dtype {
    serde_json::from_value(name.into()).unwrap()
}

/// A file of these header and payload bytes.
fn file(header: impl AsRef<[u8]>, payload: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, payload].concat()
}

/// Reads a file as the daemon does: eight bytes, the header, and the rest only counted.
fn read(file: &[u8]) -> Result<FileHeader, HeaderError> {
    let mut prefix = [0; 8];
    if file.len() >= 8 {
        prefix.copy_from_slice(&file[..8]);
    }
    let header_bytes = header_length(prefix, file.len() as u64, 0)?;
    let payload_offset = 8 + header_bytes;
    let header = parse_header(&file[8..payload_offset as usize], file.len() as u64 - payload_offset)?;
    Ok(FileHeader { name: "model.safetensors".to_owned(), payload_offset, header })
}

/// The error for a header before a payload of `payload` bytes.
fn refusal(header: impl AsRef<[u8]>, payload: usize) -> HeaderError {
    let error = read(&file(header, &vec![0; payload])).unwrap_err();
    assert!(!error.hint().is_empty());
    error
}

fn f32_at(name: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

/// Does what a device does with a layout: copies each span of each file into one block.
fn fill(layout: &Layout, files: &[Vec<u8>]) -> Vec<u8> {
    let mut block = vec![0xEE; layout.block_bytes as usize];
    for span in &layout.spans {
        let source = &files[span.file][span.source_offset as usize..][..span.bytes as usize];
        block[span.block_offset as usize..][..source.len()].copy_from_slice(source);
    }
    block
}

fn bytes_of<'a>(block: &'a [u8], tensor: &Tensor) -> &'a [u8] {
    &block[tensor.offset as usize..][..tensor.bytes as usize]
}

#[derive(Debug, Clone)]
struct Random {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Tensors of every dtype, 0-d and zero-size ones among them, with names that need escapes in JSON.
fn tensors() -> impl Strategy<Value = Vec<Random>> {
    let tensor = (0..DTYPES.len(), prop::collection::vec(0usize..7, 0..4), any::<u8>()).prop_map(
        |(at, mut shape, seed)| {
            let dtype = dtype(DTYPES[at]);
            if !dtype.bitsize().is_multiple_of(8) {
                shape.push(4);
            }
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (dtype, shape, (0..bytes).map(|at| seed.wrapping_add(at as u8)).collect())
        },
    );
    prop::collection::btree_map("[a-z.\"\\\\é]{0,6}", tensor, 0..12).prop_map(|tensors| {
        tensors
            .into_iter()
            .map(|(name, (dtype, shape, bytes))| Random { name, dtype, shape, bytes })
            .collect()
    })
}

fn written_by_the_library(tensors: &[Random], metadata: Option<HashMap<String, String>>) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|t| (t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    safetensors::serialize(views, metadata).unwrap()
}

/// Names in the given order, tensors without alignment, `spaces` behind the header.
fn written_by_hand(tensors: &[Random], spaces: usize) -> Vec<u8> {
    let (mut entries, mut payload) = (Vec::new(), Vec::new());
    for t in tensors.iter().rev() {
        let begin = payload.len();
        payload.extend_from_slice(&t.bytes);
        entries.push(format!(
            r#"{}:{{"shape":{:?},"data_offsets":[{begin},{}],"dtype":"{}"}}"#,
            serde_json::to_string(&t.name).unwrap(),
            t.shape,
            payload.len(),
            t.dtype,
        ));
    }
    entries.rotate_left(tensors.len() / 2);
    file(format!("{{{}}}{}", entries.join(","), " ".repeat(spaces)), &payload)
}

fn check_layout(layout: &Layout) {
    assert!(layout.block_bytes >= SPAN_ALIGNMENT && layout.block_bytes.is_multiple_of(SPAN_ALIGNMENT));
    for span in &layout.spans {
        assert!(span.source_offset.is_multiple_of(SPAN_ALIGNMENT) || !span.source_offset.is_multiple_of(8));
        assert!(span.block_offset.is_multiple_of(SPAN_ALIGNMENT));
    }
    for pair in layout.spans.windows(2) {
        assert!(pair[0].block_offset + pair[0].bytes <= pair[1].block_offset);
    }
    for pair in layout.tensors.windows(2) {
        assert!(pair[0].offset + pair[0].bytes <= pair[1].offset);
    }
    let end = layout.tensors.iter().map(|tensor| tensor.offset + tensor.bytes).max().unwrap_or(0);
    assert!(end <= layout.block_bytes);
    assert_eq!(layout.tensors.iter().map(|tensor| tensor.bytes).sum::<u64>(), layout.payload_bytes);
}

proptest! {
    #[test]
    fn every_tensor_lands_where_the_table_says(
        shards in prop::collection::vec((tensors(), prop::option::of(0usize..9000)), 1..4),
    ) {
        let mut expected = BTreeMap::new();
        let (mut files, mut headers) = (Vec::new(), Vec::new());
        for (at, (mut tensors, by_hand)) in shards.into_iter().enumerate() {
            for tensor in &mut tensors {
                tensor.name = format!("{at}{}", tensor.name);
                expected.insert(tensor.name.clone(), tensor.clone());
            }
            let bytes = match by_hand {
                Some(spaces) => written_by_hand(&tensors, spaces),
                None => written_by_the_library(&tensors, None),
            };
            headers.push(FileHeader { name: format!("{at}.safetensors"), ..read(&bytes).unwrap() });
            files.push(bytes);
        }
        let layout = Layout::build(headers, None).unwrap();
        check_layout(&layout);
        let block = fill(&layout, &files);
        prop_assert_eq!(layout.tensors.len(), expected.len());
        for tensor in &layout.tensors {
            let original = &expected[&tensor.name];
            prop_assert_eq!(tensor.dtype, original.dtype.into());
            prop_assert!(tensor.shape.iter().map(|n| *n as usize).eq(original.shape.iter().copied()));
            prop_assert_eq!(bytes_of(&block, tensor), original.bytes.as_slice());
        }
    }

    /// The library is the model: it never takes what we refuse, except for the name that occurs twice, and we
    /// never take what it refuses.
    #[test]
    fn a_damaged_file_is_refused_or_means_what_the_library_reads(
        tensors in tensors(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![
            any::<u8>(),
            prop::sample::select(br#"0123456789{}[]",:-.eFU "#.to_vec()),
        ]), 1..4),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut bytes = written_by_the_library(&tensors, Some([("format".into(), "pt".into())].into()));
        let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for (at, value) in damage {
            bytes[at.index(header_end)] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        match (read(&bytes), SafeTensors::deserialize(&bytes)) {
            (Ok(ours), Ok(theirs)) => {
                let files = [bytes.clone()];
                let layout = Layout::build(vec![ours], None).unwrap();
                check_layout(&layout);
                let block = fill(&layout, &files);
                prop_assert_eq!(layout.tensors.len(), theirs.len());
                for tensor in &layout.tensors {
                    prop_assert_eq!(bytes_of(&block, tensor), theirs.tensor(&tensor.name).unwrap().data());
                }
            }
            (Err(HeaderError::Duplicate { .. }), Ok(_)) | (Err(_), Err(_)) => {}
            (ours, theirs) => prop_assert!(false, "ours {ours:?}, the library's {theirs:?}"),
        }
    }

    #[test]
    fn no_bytes_make_the_readers_panic(bytes: Vec<u8>, payload_bytes: u64, prefix: [u8; 8]) {
        let _ = parse_header(&bytes, payload_bytes);
        let _ = parse_index(&bytes);
        if let Ok(length) = header_length(prefix, payload_bytes, 0) {
            prop_assert!(length <= MAX_HEADER_BYTES && length + 8 <= payload_bytes);
        }
    }
}

#[test]
fn every_dtype_of_the_format_is_read() {
    for name in DTYPES {
        let bits = dtype(name).bitsize();
        let header = format!(r#"{{"t":{{"dtype":"{name}","shape":[2,4],"data_offsets":[0,{bits}]}}}}"#);
        let read = read(&file(header, &vec![7; bits])).unwrap();
        assert_eq!(read.header.tensors[0].dtype, dtype(name).into());
        assert_eq!(read.header.tensors[0].bytes, bits as u64);
    }
}

#[test]
fn scalars_and_empty_tensors_have_a_place() {
    let header = format!(
        "{{{},{},{}}}",
        f32_at("empty", "[3,0]", 4, 4),
        f32_at("scalar", "[]", 0, 4),
        f32_at("first", "[0]", 0, 0)
    );
    let bytes = file(header, &[1, 2, 3, 4]);
    let layout = Layout::build(vec![read(&bytes).unwrap()], None).unwrap();
    let names: Vec<&str> = layout.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["first", "scalar", "empty"]);
    assert_eq!(bytes_of(&fill(&layout, std::slice::from_ref(&bytes)), &layout.tensors[1]), [1, 2, 3, 4]);
}

#[test]
fn a_model_without_tensors_still_has_a_block() {
    let layout = Layout::build(vec![read(&file("{}", &[])).unwrap()], None).unwrap();
    assert_eq!((layout.block_bytes, layout.payload_bytes), (SPAN_ALIGNMENT, 0));
    assert!(layout.spans.is_empty() && layout.tensors.is_empty());
}

#[test]
fn metadata_is_kept_and_may_be_null() {
    let kept = read(&file(r#"{"__metadata__":{"format":"pt"}}"#, &[])).unwrap();
    assert_eq!(kept.header.metadata["format"], "pt");
    assert!(read(&file(r#"{"__metadata__":null}"#, &[])).unwrap().header.metadata.is_empty());
}

#[test]
fn a_truncated_file_is_refused() {
    assert_eq!(read(&[2, 0, 0]), Err(HeaderError::Truncated { file_bytes: 3 }));
    assert_eq!(read(&[]), Err(HeaderError::Truncated { file_bytes: 0 }));
    let header = format!("{{{}}}", f32_at("w", "[4]", 0, 16));
    assert_eq!(
        refusal(header, 15),
        HeaderError::PayloadTooShort { tensor: "w".into(), end: 16, payload_bytes: 15 }
    );
}

#[test]
fn a_header_longer_than_the_file_is_refused() {
    let prefix = 100u64.to_le_bytes();
    assert_eq!(header_length(prefix, 50, 0), Err(HeaderError::PastEnd { header_bytes: 100, file_bytes: 50 }));
    assert_eq!(header_length(prefix, 107, 0).ok(), None);
    assert_eq!(header_length(prefix, 108, 0), Ok(100));
}

#[test]
fn a_header_beyond_100_mb_is_refused_before_it_is_read() {
    for header_bytes in [MAX_HEADER_BYTES + 1, 1 << 63, u64::MAX] {
        assert_eq!(
            header_length(header_bytes.to_le_bytes(), u64::MAX, 0),
            Err(HeaderError::TooLong { header_bytes })
        );
    }
    assert_eq!(header_length(MAX_HEADER_BYTES.to_le_bytes(), u64::MAX, 0), Ok(MAX_HEADER_BYTES));
}

#[test]
fn many_shards_have_no_more_header_than_one_file() {
    let prefix = 1000u64.to_le_bytes();
    assert_eq!(header_length(prefix, 5000, MAX_HEADER_BYTES - 1000), Ok(1000));
    for kept in [MAX_HEADER_BYTES - 999, u64::MAX] {
        assert_eq!(header_length(prefix, 5000, kept), Err(HeaderError::TooLong { header_bytes: 1000 }));
    }
}

#[test]
fn a_header_that_is_not_utf8_is_refused() {
    assert_eq!(refusal(b"{\"a\xff\":1}", 0), HeaderError::NotUtf8 { at: 3 });
}

#[test]
fn what_is_not_an_object_of_tensors_is_refused() {
    let tensor = |value: &str| format!(r#"{{"layer.7":{value}}}"#);
    for header in [
        String::new(),
        "[]".into(),
        "{".into(),
        "{}x".into(),
        "[".repeat(100_000),
        tensor("[".repeat(100_000).as_str()),
        tensor("1"),
        tensor("{}"),
        tensor(r#"{"dtype":"F32","shape":[1]}"#),
        tensor(r#"{"dtype":"Q4_K","shape":[1],"data_offsets":[0,4]}"#),
        tensor(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#),
        tensor(r#"{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}"#),
        tensor(r#"{"dtype":"F32","shape":"1","data_offsets":[0,4]}"#),
        tensor(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}"#),
        tensor(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551616]}"#),
        tensor(r#"{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}"#),
        r#"{"__metadata__":{"a":1}}"#.into(),
        r#"{"__metadata__":{"a":"1","a":"2"}}"#.into(),
        r#"{"__metadata__":{},"__metadata__":{}}"#.into(),
    ] {
        let error = refusal(&header, 4);
        assert!(matches!(error, HeaderError::Malformed { .. }), "{error}");
        if header.contains("layer.7") {
            assert!(error.to_string().contains("layer.7"), "{error}");
        }
    }
}

#[test]
fn an_unknown_dtype_is_named() {
    let error = refusal(r#"{"w":{"dtype":"Q4_K","shape":[1],"data_offsets":[0,4]}}"#, 4).to_string();
    assert!(error.contains("\"w\"") && error.contains("Q4_K"), "{error}");
}

#[test]
fn a_name_that_occurs_twice_is_refused_however_it_is_spelt() {
    let header = format!("{{{},{}}}", f32_at("w", "[1]", 0, 4), f32_at("\\u0077", "[1]", 4, 8));
    assert_eq!(refusal(header, 8), HeaderError::Duplicate { name: "w".into() });
}

#[test]
fn overlapping_offsets_are_refused() {
    let header = format!("{{{},{}}}", f32_at("a", "[2]", 0, 8), f32_at("b", "[2]", 4, 12));
    assert_eq!(refusal(header, 12), HeaderError::Overlap { tensor: "b".into(), begin: 4, previous_end: 8 });
    let same = format!("{{{},{}}}", f32_at("a", "[2]", 0, 8), f32_at("b", "[2]", 0, 8));
    assert!(matches!(refusal(same, 8), HeaderError::Overlap { .. }));
}

#[test]
fn gapped_offsets_are_refused() {
    let header = format!("{{{},{}}}", f32_at("a", "[1]", 0, 4), f32_at("b", "[1]", 8, 12));
    assert_eq!(refusal(header, 12), HeaderError::Gap { tensor: "b".into(), begin: 8, previous_end: 4 });
    assert!(matches!(refusal(format!("{{{}}}", f32_at("a", "[1]", 4, 8)), 8), HeaderError::Gap { .. }));
}

#[test]
fn offsets_out_of_range_are_refused() {
    let far = format!("{{{},{}}}", f32_at("a", "[1]", 0, 4), f32_at("b", "[1]", 1 << 40, (1 << 40) + 4));
    assert!(matches!(refusal(far, 8), HeaderError::PayloadTooShort { tensor, .. } if tensor == "b"));
    let reversed = format!("{{{}}}", f32_at("a", "[1]", 8, 4));
    assert_eq!(refusal(reversed, 8), HeaderError::Reversed { tensor: "a".into(), begin: 8, end: 4 });
    let last = format!("{{{}}}", f32_at("a", "[1]", 0, u64::MAX));
    assert!(matches!(refusal(last, 8), HeaderError::PayloadTooShort { .. }));
}

#[test]
fn a_payload_longer_than_described_is_refused() {
    let header = format!("{{{}}}", f32_at("a", "[1]", 0, 4));
    assert_eq!(refusal(header, 5), HeaderError::PayloadTooLong { described: 4, payload_bytes: 5 });
}

#[test]
fn a_shape_that_does_not_match_its_offsets_is_refused() {
    let header = format!("{{{}}}", f32_at("a", "[3]", 0, 8));
    let error = refusal(header, 8);
    assert!(matches!(&error, HeaderError::WrongSize { needed: 12, spanned: 8, .. }), "{error}");
    let huge = format!("{{{}}}", f32_at("a", "[4294967296,4294967296]", 0, 8));
    assert!(matches!(refusal(huge, 8), HeaderError::Overflow { .. }));
}

#[test]
fn a_sub_byte_tensor_that_ends_inside_a_byte_is_refused() {
    for (name, shape, bytes) in [("F4", 3, 2), ("F6_E2M3", 1, 1), ("F6_E3M2", 2, 2)] {
        let header = format!(r#"{{"a":{{"dtype":"{name}","shape":[{shape}],"data_offsets":[0,{bytes}]}}}}"#);
        assert!(matches!(refusal(header, bytes), HeaderError::NotWholeBytes { .. }), "{name}");
    }
}

#[test]
fn lists_beyond_their_bounds_are_refused() {
    let shape = |rank| format!("[{}]", vec!["1"; rank].join(","));
    assert!(read(&file(format!("{{{}}}", f32_at("a", &shape(MAX_RANK), 0, 4)), &[0; 4])).is_ok());
    let deep = refusal(format!("{{{}}}", f32_at("a", &shape(MAX_RANK + 1), 0, 4)), 4);
    assert!(deep.to_string().contains("at most 64 dimensions"), "{deep}");
    let long = refusal(format!("{{{}}}", f32_at(&"n".repeat(4097), "[1]", 0, 4)), 4);
    assert!(long.to_string().contains("longer than 4096 bytes"), "{long}");
    let value = refusal(format!(r#"{{"a":"{}"}}"#, "x".repeat(1 << 20)), 0).to_string();
    assert!(value.len() < 2000, "an error of {} bytes", value.len());
}

fn shard(name: &str, tensors: &[&str]) -> FileHeader {
    let tensors: Vec<Tensor> = tensors
        .iter()
        .zip(0..)
        .map(|(name, at)| Tensor {
            name: (*name).to_owned(),
            dtype: Dtype::U8.into(),
            shape: vec![10],
            offset: at * 10,
            bytes: 10,
        })
        .collect();
    let header = Header { payload_bytes: 10 * tensors.len() as u64, tensors, metadata: BTreeMap::new() };
    FileHeader { name: name.to_owned(), payload_offset: 104, header }
}

fn index(entries: &[(&str, &str)]) -> vramd_core::layout::Index {
    let map: BTreeMap<_, _> = entries.iter().copied().collect();
    let json = serde_json::json!({ "metadata": { "total_size": 12.5 }, "weight_map": map });
    parse_index(json.to_string().as_bytes()).unwrap()
}

#[test]
fn shards_that_agree_with_their_index_are_laid_one_after_another() {
    let index = index(&[("a", "1"), ("b", "1"), ("c", "2")]);
    assert_eq!(index.files(), ["1", "2"]);
    let layout = Layout::build(vec![shard("1", &["a", "b"]), shard("2", &["c"])], Some(&index)).unwrap();
    check_layout(&layout);
    assert_eq!(layout.spans.iter().map(|span| span.block_offset).collect::<Vec<_>>(), [0, 4096]);
    assert_eq!(layout.tensors.iter().map(|t| t.offset).collect::<Vec<_>>(), [104, 114, 4200]);
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let error = Layout::build(vec![shard("1", &["a", "b"]), shard("2", &["b"])], None).unwrap_err();
    assert_eq!(error, LayoutError::TwoFiles { tensor: "b".into(), first: "1".into(), second: "2".into() });
}

#[test]
fn a_tensor_that_is_not_where_the_index_says_is_refused() {
    let shards = || vec![shard("1", &["a"]), shard("2", &["b"])];
    let missing = Layout::build(shards(), Some(&index(&[("a", "1"), ("b", "2"), ("c", "2")])));
    assert_eq!(missing, Err(LayoutError::NotInFile { tensor: "c".into(), file: "2".into() }));
    let moved = Layout::build(shards(), Some(&index(&[("a", "2"), ("b", "2")])));
    assert_eq!(moved, Err(LayoutError::NotInFile { tensor: "a".into(), file: "2".into() }));
}

#[test]
fn a_tensor_that_the_index_lacks_is_refused() {
    let error = Layout::build(vec![shard("1", &["a", "b"])], Some(&index(&[("a", "1")]))).unwrap_err();
    assert_eq!(error, LayoutError::NotInIndex { tensor: "b".into(), file: "1".into() });
}

#[test]
fn shards_larger_than_any_memory_are_refused() {
    let mut huge = shard("1", &["a"]);
    huge.header.payload_bytes = 1 << 63;
    assert_eq!(Layout::build(vec![huge], None), Err(LayoutError::TooLarge));
}

#[test]
fn an_index_names_only_files_beside_it() {
    for name in ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a:b", "a\0b"] {
        let json = serde_json::json!({ "weight_map": { "t": name } }).to_string();
        let error = parse_index(json.as_bytes()).unwrap_err();
        assert!(matches!(error, IndexError::FileName { .. }), "{name:?}: {error}");
    }
}

#[test]
fn a_malformed_index_is_refused() {
    for json in [
        "",
        "{}",
        "[]",
        r#"{"weight_map":{"a":1}}"#,
        r#"{"weight_map":{"a":"1","a":"2"}}"#,
        r#"{"weight_map":{"a":"1"},"weight_map":{"a":"1"}}"#,
        "{\"weight_map\":{\"a\":\"\u{0}",
    ] {
        let error = parse_index(json.as_bytes()).unwrap_err();
        assert!(matches!(error, IndexError::Malformed { .. }), "{json}: {error}");
    }
    assert!(matches!(parse_index(b"{\"weight_map\":{\"\xff\":\"1\"}}"), Err(IndexError::Malformed { .. })));
    assert_eq!(parse_index(br#"{"weight_map":{}}"#), Err(IndexError::Empty));
    let shards: BTreeMap<_, _> = (0..=MAX_SHARDS).map(|n| (n.to_string(), n.to_string())).collect();
    let json = serde_json::json!({ "weight_map": shards }).to_string();
    assert_eq!(parse_index(json.as_bytes()), Err(IndexError::TooManyShards { count: MAX_SHARDS + 1 }));
}

#[test]
fn an_unpadded_header_leaves_tensors_aligned() {
    let header = br#"{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#;
    assert!(!(header.len() as u64 + 8).is_multiple_of(8), "the test needs an odd header");
    let file = FileHeader {
        name: "a.safetensors".into(),
        payload_offset: 8 + header.len() as u64,
        header: parse_header(header, 8).unwrap(),
    };
    let layout = Layout::build(vec![file], None).unwrap();
    assert_eq!((layout.tensors[0].offset, layout.spans[0].bytes), (0, 8));
}
