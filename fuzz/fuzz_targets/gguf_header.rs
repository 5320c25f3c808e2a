//! A whole GGUF file: every tensor of what is taken lies in the file, in order and without overlap, and more bytes change nothing.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vramd_core::layout::{GgufError, Layout, parse_gguf};

fuzz_target!(|file: &[u8]| {
    let bytes = file.len() as u64;
    let read = parse_gguf("fuzz", file, bytes);
    // Read in part it is the same, or wants more.
    let part = parse_gguf("fuzz", &file[..file.len() / 2], bytes);
    assert!(part == read || matches!(part, Err(GgufError::Short { .. })));
    let Ok(gguf) = read else { return };
    let mut end = 0;
    for tensor in &gguf.file.header.tensors {
        assert!(tensor.offset >= end);
        end = tensor.offset + tensor.bytes;
        assert_eq!(tensor.dtype.bytes(&tensor.shape), Some(tensor.bytes));
    }
    assert_eq!(end, gguf.file.header.payload_bytes);
    assert!(end == 0 || gguf.file.payload_offset + end <= bytes);
    let layout = Layout::build(vec![gguf.file], None).expect("one sound file is a sound model");
    for span in &layout.spans {
        assert!(span.source_offset + span.bytes <= bytes);
    }
});
