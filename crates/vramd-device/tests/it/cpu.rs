//! What is special about host memory: it is really there, and really back.

use std::fs;

use vramd_api::MemoryType;
use vramd_device::{Device, DeviceError, ExportAccess, SegmentId, Writers, cpu};

use crate::fresh;

fn open(limit_bytes: Option<u64>) -> cpu::Device {
    cpu::Device::open(cpu::Options { limit_bytes, ahead_bytes: 0 }).unwrap()
}

/// Bytes of a segment that are present in our mapping of it; nothing when there is no mapping.
fn resident_bytes(id: SegmentId) -> Option<u64> {
    let name = format!("/memfd:vramd cpu:0 {} (deleted)", id.0);
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let (_, entry) = maps.split_once(&name)?;
    // Pages of the huge page pool are counted apart.
    let bytes = |kind| {
        let line = entry.lines().find_map(|line| line.strip_prefix(kind)).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    };
    Some(["Rss:", "Shared_Hugetlb:", "Private_Hugetlb:"].map(bytes).iter().sum())
}

fn is_open(id: SegmentId) -> bool {
    let name = format!("/memfd:vramd cpu:0 {} (deleted)", id.0);
    fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .any(|target| target.to_str() == Some(&name))
}

#[test]
fn every_page_is_there_from_the_start_and_none_after_the_end() {
    let device = open(None);
    // One below and one above the size from which several threads bring the pages in.
    for bytes in [6 << 20, 258 << 20] {
        let id = fresh();
        device.create(id, bytes, Writers::Importers).unwrap();
        assert_eq!(resident_bytes(id), Some(bytes));
        assert!(is_open(id));
        device.destroy(id).unwrap();
        assert_eq!(resident_bytes(id), None);
        assert!(!is_open(id));
    }
}

#[test]
fn pages_of_large_segments_that_only_the_device_writes_to_come_with_their_use() {
    let device = open(None);
    let before = device.sample().unwrap();
    let (id, bytes) = (fresh(), 80 << 20);
    device.create(id, bytes, Writers::DeviceOnly).unwrap();
    assert_eq!(resident_bytes(id), Some(0));
    // They are this segment's all the same.
    assert_eq!(device.sample().unwrap().held_bytes - before.held_bytes, bytes);
    device.write(id, (8 << 20) - 1, &[1, 2]).unwrap();
    assert_eq!(resident_bytes(id), Some(8 << 20));
    let mut read = [9; 3];
    device.read(id, (8 << 20) - 1, &mut read).unwrap();
    assert_eq!(read, [1, 2, 0]);
    // Whoever maps it finds all of them.
    device.export(id, ExportAccess::Read).unwrap();
    assert_eq!(resident_bytes(id), Some(bytes));
    device.destroy(id).unwrap();
    assert_eq!(device.sample().unwrap().held_bytes, before.held_bytes);
}

#[test]
fn pages_that_were_made_ahead_are_taken_and_count_as_available() {
    let bytes = 96 << 20;
    let device = cpu::Device::open(cpu::Options { limit_bytes: None, ahead_bytes: bytes }).unwrap();
    let began = std::time::Instant::now();
    while device.sample().unwrap().ready_bytes < bytes {
        assert!(began.elapsed().as_secs() < 30, "they are not made");
        std::thread::yield_now();
    }
    assert!(device.sample().unwrap().available_bytes >= bytes);
    let id = fresh();
    // One that is larger than what is ready, and one when nothing is.
    device.create(id, 128 << 20, Writers::DeviceOnly).unwrap();
    assert_eq!(device.sample().unwrap().ready_bytes, 0);
    let mut read = vec![1; 4096];
    for at in [0, (96 << 20) - 4096, (128 << 20) - 4096] {
        device.read(id, at, &mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 0), "at {at}");
    }
    let exported = device.export(id, ExportAccess::Read).unwrap();
    assert_eq!(fs::File::from(exported.descriptor).metadata().unwrap().len(), 128 << 20);
    device.destroy(id).unwrap();
}

#[test]
fn a_refused_request_leaves_no_file_behind() {
    let device = open(Some(8 << 20));
    let id = fresh();
    assert!(device.create(id, 16 << 20, Writers::DeviceOnly).is_err());
    assert!(!is_open(id));
    assert_eq!(resident_bytes(id), None);
}

#[test]
fn a_device_that_closes_gives_everything_back() {
    let device = open(Some(64 << 20));
    let ids = [fresh(), fresh()];
    for id in ids {
        device.create(id, 4 << 20, Writers::Importers).unwrap();
    }
    drop(device);
    assert!(ids.iter().all(|id| !is_open(*id) && resident_bytes(*id).is_none()));
}

#[test]
fn the_last_bytes_of_the_machine_are_not_given_out() {
    let device = open(None);
    let facts = device.facts();
    let whole = facts.total_bytes - facts.total_bytes % facts.granularity_bytes;
    let refused = device.create(fresh(), whole, Writers::DeviceOnly);
    assert!(matches!(refused, Err(DeviceError::OutOfMemory { .. })), "{refused:?}");
    assert!(device.sample().unwrap().available_bytes < whole);
}

#[test]
fn it_is_the_same_device_after_a_restart() {
    let (first, second) = (open(None), open(None));
    assert_eq!(first.facts(), second.facts());
    assert_eq!(first.facts().device.as_str(), "cpu:0");
    assert_eq!(first.facts().memory_type, MemoryType::Ram);
    assert!(first.facts().uuid.starts_with("host-"), "{}", first.facts().uuid);
}

#[test]
fn small_pages_are_a_fallback_that_is_stated() {
    let device = open(None);
    let facts = device.facts();
    assert_eq!(facts.granularity_bytes == 4096, facts.notes.iter().any(|note| note.contains("echo advise")));
}

#[test]
fn a_limit_beyond_the_machine_is_the_machine() {
    assert_eq!(open(Some(u64::MAX)).facts().total_bytes, open(None).facts().total_bytes);
}

#[test]
fn what_a_process_has_for_itself_alone_is_told() {
    let device = open(None);
    let this = std::process::id();
    let used = || device.used_by(&[this]).unwrap()[&this];
    // Far more than the other tests of this process take or give back meanwhile.
    let bytes = 512 << 20;
    let taken = vec![1_u8; bytes as usize];
    assert!(used() >= bytes * 9 / 10);
    drop(taken);
    // What others can map is not its alone.
    let id = fresh();
    device.create(id, bytes, Writers::Importers).unwrap();
    assert!(used() < bytes * 9 / 10);
    device.destroy(id).unwrap();
    assert!(device.used_by(&[u32::MAX]).unwrap().is_empty());
}
