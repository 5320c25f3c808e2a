//! A whole safetensors file: what we take, the format's own library takes and reads the same bytes from.

#![no_main]

use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;
use vramd_core::layout::{FileHeader, Layout, PREFIX_BYTES, header_length, parse_header};

fuzz_target!(|file: &[u8]| {
    let Some((prefix, rest)) = file.split_first_chunk::<{ PREFIX_BYTES as usize }>() else { return };
    let Ok(header_bytes) = header_length(*prefix, file.len() as u64, 0) else { return };
    let (header, payload) = rest.split_at(header_bytes as usize);
    let Ok(header) = parse_header(header, payload.len() as u64) else { return };

    let library = SafeTensors::deserialize(file).expect("the library reads what we read");
    assert_eq!(library.len(), header.tensors.len());

    let payload_offset = PREFIX_BYTES + header_bytes;
    let file_header = FileHeader { name: "fuzz".to_owned(), payload_offset, header };
    let layout = Layout::build(vec![file_header], None).expect("one sound file is a sound model");
    let mut block = vec![0; layout.block_bytes as usize];
    for span in &layout.spans {
        block[span.block_offset as usize..][..span.bytes as usize]
            .copy_from_slice(&file[span.source_offset as usize..][..span.bytes as usize]);
    }
    for tensor in &layout.tensors {
        let bytes = &block[tensor.offset as usize..][..tensor.bytes as usize];
        let view = library.tensor(&tensor.name).expect("both have the same names");
        assert_eq!((bytes, tensor.dtype), (view.data(), view.dtype().into()));
    }
});
