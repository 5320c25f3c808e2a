//! A frame on the attach socket: its header reads back, its body is that of its kind or an error.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vramd_api::ApiError;
use vramd_api::attach::{Acknowledge, Attach, Attached, FrameKind, HEADER_BYTES, Header, Moved};

fuzz_target!(|frame: &[u8]| {
    let Some((bytes, body)) = frame.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(header) = Header::decode(bytes) else { return };
    assert_eq!(header.encode(), *bytes);
    let Some(body) = body.get(..header.body_bytes as usize) else { return };
    match header.kind {
        FrameKind::Attach => {
            if let Ok(attach) = serde_json::from_slice::<Attach>(body) {
                let again = serde_json::to_vec(&attach).expect("a request is always JSON");
                assert_eq!(
                    serde_json::from_slice::<Attach>(&again).expect("what we wrote reads back"),
                    attach
                );
            }
        }
        FrameKind::Attached => {
            if let Ok(attached) = serde_json::from_slice::<Attached>(body) {
                let _ = attached.tensors();
            }
        }
        FrameKind::Error => {
            let _ = serde_json::from_slice::<ApiError>(body);
        }
        FrameKind::Moved => {
            let _ = serde_json::from_slice::<Moved>(body);
        }
        FrameKind::Acknowledge => {
            let _ = serde_json::from_slice::<Acknowledge>(body);
        }
    }
});
