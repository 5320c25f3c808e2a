//! The index of a sharded model: every shard that it names is a plain file name.

#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use vramd_core::layout::parse_index;

fuzz_target!(|bytes: &[u8]| {
    let Ok(index) = parse_index(bytes) else { return };
    assert!(!index.files().is_empty());
    for file in index.files() {
        let mut parts = Path::new(file).components();
        assert!(matches!(parts.next(), Some(Component::Normal(name)) if name == file.as_str()));
        assert_eq!(parts.next(), None);
    }
});
