//! A process that has no descriptor left. It has a test process of its own, since the limit is of all its threads.
#![cfg(target_os = "linux")]

#[allow(dead_code, reason = "the other tests use the rest")]
#[path = "it/daemon.rs"]
mod daemon;

use std::os::fd::AsFd;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vramd_api::attach::{Access, FrameKind};

use daemon::{BYTES, attached, moved};

#[test]
fn a_move_whose_descriptor_has_no_place_is_declined_and_the_next_one_followed() {
    let payload = vec![7; BYTES];
    let (mapped, mut daemon) = attached("full", Access::Read, &payload);
    let segment = daemon.segment(1, &payload);
    let before = getrlimit(Resource::Nofile);
    // Standard input, output and error have these places.
    setrlimit(Resource::Nofile, Rlimit { current: Some(3), ..before }).expect("set");
    daemon.send(FrameKind::Moved, &moved(2, 1), &[segment.as_fd()]);
    let answer = daemon.acknowledged();
    setrlimit(Resource::Nofile, before).expect("set");
    assert!(answer.reason.is_some_and(|reason| reason.contains("ulimit -n")));
    assert_eq!((answer.moved, mapped.generation()), (false, 1));
    daemon.send(FrameKind::Moved, &moved(3, 1), &[segment.as_fd()]);
    assert!(daemon.acknowledged().moved);
    let mut bytes = vec![0; BYTES];
    mapped.read_at(0, &mut bytes);
    assert_eq!(bytes, payload);
}
