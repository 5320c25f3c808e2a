use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vramd_api::attach::{Access, FrameKind};
use vramd_attach::{Ended, Mapped};

use super::daemon::{BYTES, OFFSET, PAGE, attached, moved};

fn payload() -> Vec<u8> {
    (0..BYTES).map(|at| (at * 31 % 251) as u8).collect()
}

fn contents(mapped: &Mapped) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    mapped.read_at(0, &mut bytes);
    bytes
}

fn ended(mapped: &Mapped) -> &Ended {
    let begun = Instant::now();
    loop {
        if let Some(ended) = mapped.ended() {
            return ended;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "it still follows moves");
        std::thread::yield_now();
    }
}

#[test]
fn address_and_bytes_stay_through_a_hundred_moves_under_a_reader() {
    let payload = payload();
    let (mapped, mut daemon) = attached("hundred", Access::Read, &payload);
    let address = mapped.as_ptr();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                // SAFETY: the daemon that the test plays writes to a segment only before it hands it out.
                assert!(unsafe { mapped.as_slice() } == payload);
                rounds += 1;
            }
            rounds
        });
        for generation in 2..102 {
            let page = generation % 3;
            let segment = daemon.segment(page, &payload);
            daemon.send(FrameKind::Moved, &moved(generation, page), &[segment.as_fd()]);
            drop(segment);
            let answer = daemon.acknowledged();
            assert_eq!((answer.generation, answer.moved), (generation, true), "{:?}", answer.reason);
        }
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().expect("the same bytes at every moment") > 0);
    });
    assert_eq!((mapped.as_ptr(), contents(&mapped)), (address, payload));
    assert_eq!(daemon.descriptors(), 0);
    let mappings = daemon.mappings();
    assert_eq!(mappings.len(), 1, "{mappings:?}");
    assert!(mappings[0].contains(" dc"), "a child would keep the old place: {mappings:?}");
    assert!(mapped.ended().is_none());
    drop(mapped);
    assert_eq!(daemon.mappings(), Vec::<String>::new());
    daemon.closed();
}

#[test]
fn moves_that_cannot_be_used_are_declined_and_the_old_pages_stay() {
    let change = |place: &str, value: Value| {
        let mut body = moved(2, 1);
        *body.pointer_mut(place).expect("a place") = value;
        body
    };
    let cases = [
        ("stale", change("/generation", json!(1))),
        ("size", change("/block/bytes", json!(BYTES - 1))),
        ("offset", change("/block/offset", json!(PAGE + OFFSET + 1))),
        ("outside", change("/block/offset", json!(5 * PAGE + OFFSET))),
        ("pages", change("/segments/0/pageBytes", json!(2 * PAGE))),
        ("long", change("/segments/0/bytes", json!(9 * PAGE))),
        ("segment", change("/block/segment", json!(1))),
        ("none", change("/segments", json!([]))),
    ];
    for (name, body) in cases {
        let payload = payload();
        let (mapped, mut daemon) = attached(&format!("unusable-{name}"), Access::Read, &payload);
        let segment = daemon.segment(1, &payload);
        daemon.send(FrameKind::Moved, &body, &[segment.as_fd()]);
        let answer = daemon.acknowledged();
        assert_eq!((json!(answer.generation), answer.moved), (body["generation"].clone(), false), "{name}");
        assert!(answer.reason.is_some_and(|reason| !reason.is_empty()), "{name}");
        assert_eq!((contents(&mapped), mapped.generation()), (payload.clone(), 1), "{name}");
        // It goes on listening.
        daemon.send(FrameKind::Moved, &moved(3, 1), &[segment.as_fd()]);
        assert!(daemon.acknowledged().moved, "{name}");
        drop(segment);
        assert_eq!(daemon.descriptors(), 0, "{name}");
    }
}

#[test]
fn frames_that_cannot_be_read_end_the_following_and_leave_the_pages_to_the_lease() {
    let mut text = moved(2, 1);
    text["generation"] = json!("2");
    for (name, bytes, descriptors) in [
        ("type", vramd_api::attach::encode_frame(FrameKind::Moved, &text, 1).expect("a frame"), 1),
        ("kind", encode(FrameKind::Acknowledge, 0), 0),
        ("text", b"HTTP/1.1 400 Bad Request".to_vec(), 0),
    ] {
        let payload = payload();
        let (mapped, mut daemon) = attached(&format!("frame-{name}"), Access::Read, &payload);
        let segments: Vec<_> = (0..descriptors).map(|_| daemon.segment(1, &payload)).collect();
        let borrowed: Vec<_> = segments.iter().map(AsFd::as_fd).collect();
        daemon.send_bytes(&bytes, &borrowed);
        assert!(matches!(ended(&mapped), Ended::Broken(_)), "{name} was taken");
        assert_eq!((contents(&mapped), mapped.generation()), (payload, 1), "{name}");
        drop(segments);
        assert_eq!(daemon.descriptors(), 0, "{name}");
        // Were it closed, the daemon would give the pages to others.
        assert!(daemon.is_open(), "{name}");
        drop(mapped);
        daemon.closed();
    }
}

#[test]
fn descriptors_that_did_not_come_are_declined() {
    for (announced, sent) in [(1, 0), (2, 1), (1, 2)] {
        let payload = payload();
        let (mapped, mut daemon) = attached(&format!("announced-{announced}-{sent}"), Access::Read, &payload);
        let segments: Vec<_> = (0..sent).map(|_| daemon.segment(1, &payload)).collect();
        let borrowed: Vec<_> = segments.iter().map(AsFd::as_fd).collect();
        daemon.send_bytes(&encode(FrameKind::Moved, announced), &borrowed);
        assert!(!daemon.acknowledged().moved);
        assert_eq!((contents(&mapped), mapped.generation()), (payload, 1));
    }
}

fn encode(kind: FrameKind, descriptors: u32) -> Vec<u8> {
    vramd_api::attach::encode_frame(kind, &moved(2, 1), descriptors).expect("a frame")
}

#[test]
fn the_pages_stay_when_the_daemon_goes() {
    let payload = payload();
    let (mapped, daemon) = attached("gone", Access::Read, &payload);
    drop(daemon);
    assert!(matches!(ended(&mapped), Ended::Closed));
    assert_eq!(contents(&mapped), payload);
}

#[test]
fn half_a_move_and_then_nothing_leaves_the_pages() {
    let payload = payload();
    let (mapped, daemon) = attached("half", Access::Read, &payload);
    let segment = daemon.segment(1, &payload);
    let frame = encode(FrameKind::Moved, 1);
    daemon.send_bytes(&frame[..frame.len() - 1], &[segment.as_fd()]);
    daemon.stream.shutdown(std::net::Shutdown::Both).expect("closed");
    assert!(matches!(ended(&mapped), Ended::Broken(_)));
    assert_eq!(contents(&mapped), payload);
}

#[test]
fn dropped_in_the_middle_of_a_move_it_leaves_nothing() {
    let payload = payload();
    for _ in 0..50 {
        let (mapped, mut daemon) = attached("dropped", Access::Read, &payload);
        let segment = daemon.segment(1, &payload);
        daemon.send(FrameKind::Moved, &moved(2, 1), &[segment.as_fd()]);
        drop((mapped, segment));
        assert_eq!((daemon.mappings(), daemon.descriptors()), (Vec::new(), 0));
        daemon.closed();
    }
}

#[test]
fn a_place_that_cannot_be_mapped_is_declined_and_the_old_one_stays() {
    let payload = payload();
    let (mapped, mut daemon) = attached("declined", Access::Write, &payload);
    let segment = daemon.segment(1, &payload);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&segment));
    let read_only = std::fs::File::open(path).expect("opened again");
    daemon.send(FrameKind::Moved, &moved(2, 1), &[read_only.as_fd()]);
    let answer = daemon.acknowledged();
    assert_eq!((answer.generation, answer.moved), (2, false));
    assert!(answer.reason.is_some_and(|reason| reason.contains("could not be mapped")));
    assert_eq!((contents(&mapped), mapped.generation()), (payload.clone(), 1));
    // It goes on listening.
    daemon.send(FrameKind::Moved, &moved(3, 1), &[segment.as_fd()]);
    assert!(daemon.acknowledged().moved);
    assert_eq!(contents(&mapped), payload);
}

#[test]
fn what_a_writer_writes_is_in_the_segment() {
    let (mapped, mut daemon) = attached("writer", Access::Write, &[0; 16]);
    let segment = daemon.segment(2, &[0; 16]);
    daemon.send(FrameKind::Moved, &moved(2, 2), &[segment.as_fd()]);
    assert!(daemon.acknowledged().moved);
    mapped.write_at(BYTES as u64 - 4, b"last");
    let mut last = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&segment, &mut last, 2 * PAGE + OFFSET + BYTES as u64 - 4)
        .expect("read");
    assert_eq!(&last, b"last");
}

#[test]
#[should_panic(expected = "do not lie inside")]
fn reading_past_the_end_is_refused() {
    let (mapped, _daemon) = attached("past", Access::Read, &[]);
    mapped.read_at(BYTES as u64 - 1, &mut [0; 2]);
}

#[test]
#[should_panic(expected = "read-only")]
fn writing_to_what_is_read_only_is_refused() {
    let (mapped, _daemon) = attached("read-only", Access::Read, &[]);
    mapped.write_at(0, &[1]);
}
