//! What every backend must do. A check takes any device of at least 32 MiB that nobody else uses; adding a
//! backend is adding a line to `on_every_backend`.

use std::io::{self, Write as _};
use std::sync::Mutex;
use std::thread;

use proptest::prelude::*;
use proptest::test_runner::Config;
use vramd_device::{
    Descriptor, Device, DeviceError, ExportAccess, Exported, Range, SegmentId, Writers, cpu, sim, vulkan,
};

use crate::files::{buffered, direct, file, pattern};
use crate::fresh;
use crate::importer::Importer;

const TOTAL: u64 = 64 << 20;

pub fn open_cpu() -> cpu::Device {
    cpu::Device::open(cpu::Options { limit_bytes: Some(TOTAL), ahead_bytes: 0 }).unwrap()
}

pub fn open_sim() -> sim::Device {
    sim::Device::open(sim::Spec::new(0, TOTAL)).unwrap()
}

/// The drivers whose absence was told: once for all checks.
static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// On the first card, or the software driver that has this in its name; None, and said, where there is none.
fn open_vulkan(driver: &str) -> Option<vulkan::Device> {
    let wanted = |adapter: &vulkan::Adapter| {
        if driver == "card" { !adapter.is_software() } else { adapter.name().contains(driver) }
    };
    let reason = match vulkan::discover().map(|adapters| adapters.into_iter().find(wanted)) {
        Ok(Some(adapter)) => {
            let options = vulkan::Options { ordinal: 0, limit_bytes: Some(TOTAL) };
            return Some(vulkan::Device::open(adapter, options).unwrap());
        }
        Ok(None) => "there is none".to_owned(),
        Err(error) => error.to_string(),
    };
    let needed = driver != "card" && std::env::var_os("VRAMD_TEST_VULKAN").is_some();
    assert!(!needed, "{driver}: {reason}");
    skipped(&format!("Vulkan, {driver}"), &reason);
    None
}

#[cfg(windows)]
fn open_d3d12() -> Option<vramd_device::d3d12::Device> {
    use vramd_device::d3d12;
    let reason = match d3d12::discover().map(|adapters| adapters.into_iter().next()) {
        Ok(Some(adapter)) => {
            let options = d3d12::Options { ordinal: 0, limit_bytes: Some(TOTAL) };
            return Some(d3d12::Device::open(adapter, options).unwrap());
        }
        Ok(None) => "there is no adapter".to_owned(),
        Err(error) => error.to_string(),
    };
    assert!(std::env::var_os("VRAMD_TEST_D3D12").is_none(), "{reason}");
    skipped("Direct3D 12", &reason);
    None
}

/// On the first real card; None, and said, where there is none.
#[cfg(unix)]
fn open_cuda_card() -> Option<vramd_device::cuda::Device> {
    use vramd_device::cuda;
    let reason = match cuda::discover(&cuda::Libraries::default()) {
        Ok(found) => match found.into_iter().next() {
            Some(adapter) => return Some(crate::cuda::open(adapter, Some(TOTAL))),
            None => "there is none".to_owned(),
        },
        Err(error) => error.to_string(),
    };
    assert!(std::env::var_os("VRAMD_TEST_CUDA_CARD").is_none(), "{reason}");
    skipped("CUDA, card", &reason);
    None
}

/// Says once what is skipped.
fn skipped(what: &str, reason: &str) {
    let mut told = TOLD.lock().unwrap();
    if !told.iter().any(|one| one == what) {
        told.push(what.to_owned());
        // Past the test's own output, which is shown only of those that fail.
        let text = format!("SKIPPED: the contract on {what}: {reason}\n");
        io::stderr().write_all(text.as_bytes()).unwrap();
    }
}

macro_rules! checks {
    ($open:expr; $($check:ident),*) => {
        $(#[test] fn $check() { if let Some(device) = $open { super::$check(&device); } })*
    };
}

pub(crate) use checks;

macro_rules! on_every_backend {
    ($($check:ident),* $(,)?) => {
        mod cpu_device { checks!(Some(super::open_cpu()); $($check),*); }
        mod sim_device { checks!(Some(super::open_sim()); $($check),*); }
        #[cfg(windows)]
        mod d3d12 { checks!(super::open_d3d12(); $($check),*); }
        #[cfg(unix)]
        mod cuda_card { checks!(super::open_cuda_card(); $($check),*); }
        #[cfg(unix)]
        mod cuda_fake { checks!(Some(crate::cuda::SHARED.open()); $($check),*); }
        mod vulkan_card { checks!(super::open_vulkan("card"); $($check),*); }
        mod vulkan_lavapipe { checks!(super::open_vulkan("llvmpipe"); $($check),*); }
        mod vulkan_swiftshader { checks!(super::open_vulkan("SwiftShader"); $($check),*); }
    };
}

on_every_backend![
    facts_are_plausible,
    a_new_segment_reads_as_zero,
    memory_that_was_used_before_is_new_again,
    what_is_written_is_what_is_read,
    a_range_is_filled_and_taken_in_order,
    a_range_outside_of_its_segment_is_misuse_and_changes_nothing,
    a_segment_that_does_not_exist_is_misuse,
    a_size_off_the_granularity_is_misuse_and_takes_nothing,
    an_id_in_use_is_misuse_and_leaves_the_first,
    a_full_device_refuses_and_gets_everything_back,
    more_than_there_is_is_out_of_memory,
    samples_count_what_is_held,
    creates_at_the_same_time_never_take_more_than_there_is,
    many_threads_leave_nothing_behind,
    a_copy_is_what_was_there_and_nothing_else,
    a_copy_that_overlaps_or_leaves_its_segment_is_misuse_and_changes_nothing,
    a_segment_is_emptied_into_the_holes_of_another,
    a_file_fills_exactly_its_range,
    a_file_that_ends_early_is_an_error,
    parallel_fills_do_not_mix,
    an_importer_sees_the_bytes,
    another_process_sees_the_bytes,
    importers_write_where_they_may,
    exported_descriptors_are_not_inherited,
    many_exports_leave_nothing_behind,
    what_is_destroyed_lives_on_for_who_still_has_it,
    an_importer_sees_what_was_copied_into_a_sealed_segment,
    who_cannot_import_a_segment_is_told,
];

/// A size that every backend's granularity divides.
pub const SIZE: u64 = 4 << 20;

pub fn create(device: &dyn Device, writers: Writers) -> SegmentId {
    let id = fresh();
    device.create(id, SIZE, writers).unwrap();
    id
}

fn contents(device: &dyn Device, segment: SegmentId, bytes: u64) -> Vec<u8> {
    let mut contents = vec![0xAA; bytes as usize];
    device.read(segment, 0, &mut contents).unwrap();
    contents
}

fn available(device: &dyn Device) -> u64 {
    device.sample().unwrap().available_bytes
}

pub fn export(device: &dyn Device, segment: SegmentId, access: ExportAccess) -> Descriptor {
    device.export(segment, access).unwrap().descriptor
}

/// Whether other processes can have its memory; it is told where they cannot.
fn exports(device: &dyn Device) -> bool {
    let facts = device.facts();
    let exports = facts.capabilities.handle.is_some();
    if !exports {
        let text = format!("SKIPPED: a check of exports on {}: its driver has none\n", facts.name);
        io::stderr().write_all(text.as_bytes()).unwrap();
    }
    exports
}

fn reader(device: &dyn Device, segment: SegmentId) -> Importer {
    Importer::reader(device.export(segment, ExportAccess::Read).unwrap(), SIZE)
}

#[track_caller]
pub fn assert_misuse<T: std::fmt::Debug>(result: &Result<T, DeviceError>) {
    assert!(matches!(result, Err(DeviceError::Misuse { .. })), "{result:?}");
}

#[track_caller]
fn assert_out_of_memory(result: &Result<(), DeviceError>, requested: u64) {
    assert!(
        matches!(result, Err(DeviceError::OutOfMemory { requested: r, available: a }) if *r == requested && a < r),
        "{result:?}"
    );
}

fn facts_are_plausible(device: &dyn Device) {
    let facts = device.facts();
    assert!(facts.granularity_bytes.is_power_of_two() && facts.page_bytes.is_power_of_two());
    assert!(facts.page_bytes <= facts.granularity_bytes && SIZE.is_multiple_of(facts.granularity_bytes));
    assert!(!facts.uuid.is_empty() && !facts.name.is_empty());
    assert_eq!(facts.total_bytes, TOTAL);
}

fn a_new_segment_reads_as_zero(device: &dyn Device) {
    let id = create(device, Writers::DeviceOnly);
    assert!(contents(device, id, SIZE).iter().all(|byte| *byte == 0));
}

fn memory_that_was_used_before_is_new_again(device: &dyn Device) {
    for _ in 0..4 {
        let id = create(device, Writers::Importers);
        assert!(contents(device, id, SIZE).iter().all(|byte| *byte == 0));
        device.write(id, 0, &pattern(SIZE as usize)).unwrap();
        device.destroy(id).unwrap();
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(Vec<u8>),
    Zero(usize),
    Read(usize),
}

/// Random histories against the dullest model: a vector.
fn what_is_written_is_what_is_read(device: &dyn Device) {
    let length = 0_usize..70_000;
    let step = prop_oneof![
        (length.clone(), any::<u8>()).prop_map(|(length, seed)| {
            Step::Write(pattern(length).iter().map(|byte| byte ^ seed).collect())
        }),
        length.clone().prop_map(Step::Zero),
        length.prop_map(Step::Read),
    ];
    let history = prop::collection::vec((0..SIZE as usize, step), 1..40);
    for writers in [Writers::DeviceOnly, Writers::Importers] {
        proptest!(Config::with_cases(16), |(history in &history)| {
            let id = create(device, writers);
            let mut model = vec![0; SIZE as usize];
            for (offset, step) in history {
                let room = model.len() - offset;
                match step {
                    Step::Write(bytes) => {
                        let bytes = &bytes[..bytes.len().min(room)];
                        device.write(id, offset as u64, bytes).unwrap();
                        model[offset..][..bytes.len()].copy_from_slice(bytes);
                    }
                    Step::Zero(length) => {
                        let length = length.min(room);
                        device.zero(Range { segment: id, offset: offset as u64, bytes: length as u64 }).unwrap();
                        model[offset..][..length].fill(0);
                    }
                    Step::Read(length) => {
                        let mut read = vec![0xAA; length.min(room)];
                        device.read(id, offset as u64, &mut read).unwrap();
                        prop_assert!(read == model[offset..][..read.len()], "a read at {offset} differs");
                    }
                }
            }
            prop_assert!(contents(device, id, SIZE) == model, "the end differs");
            device.destroy(id).unwrap();
        });
    }
}

fn a_range_is_filled_and_taken_in_order(device: &dyn Device) {
    let id = fresh();
    // More than any device does at once.
    let bytes = 12 << 20;
    device.create(id, bytes, Writers::DeviceOnly).unwrap();
    let range = Range { segment: id, offset: 3, bytes: bytes - 5 };
    let written = pattern(range.bytes as usize);
    let mut buffer = Vec::new();
    let mut next = 0;
    let mut fill = |at: u64, part: &mut [u8]| {
        assert_eq!(at, next);
        next += part.len() as u64;
        part.copy_from_slice(&written[at as usize..][..part.len()]);
        Ok(())
    };
    device.write_from(range, &mut buffer, &mut fill).unwrap();
    assert_eq!(next, range.bytes);
    let mut read = Vec::new();
    let mut take = |at: u64, part: &[u8]| {
        assert_eq!(at, read.len() as u64);
        read.extend_from_slice(part);
        Ok(())
    };
    device.read_into(range, &mut buffer, &mut take).unwrap();
    assert!(read == written);
    let whole = contents(device, id, bytes);
    assert_eq!((&whole[..3], &whole[whole.len() - 2..]), (&[0; 3][..], &[0; 2][..]));
    // What the other end of a copy fails with is the answer.
    let lost = || Err(DeviceError::Lost { reason: "the other end".to_owned() });
    let failed = [
        device.write_from(range, &mut buffer, &mut |_, _| lost()),
        device.read_into(range, &mut buffer, &mut |_, _| lost()),
    ];
    for failed in failed {
        assert!(
            matches!(&failed, Err(DeviceError::Lost { reason }) if reason == "the other end"),
            "{failed:?}"
        );
    }
    device.sample().unwrap();
    let empty = Range { segment: id, offset: bytes, bytes: 0 };
    device.write_from(empty, &mut buffer, &mut |_, _| lost()).unwrap();
    device.read_into(empty, &mut buffer, &mut |_, _| lost()).unwrap();
    let outside = Range { segment: id, offset: bytes - 1, bytes: 2 };
    assert_misuse(&device.write_from(outside, &mut buffer, &mut |_, _| Ok(())));
    assert_misuse(&device.read_into(outside, &mut buffer, &mut |_, _| Ok(())));
}

fn a_range_outside_of_its_segment_is_misuse_and_changes_nothing(device: &dyn Device) {
    let source = file(&pattern(8192));
    let id = create(device, Writers::DeviceOnly);
    for offset in [SIZE - 4095, SIZE, SIZE + 1, u64::MAX - 4095, u64::MAX] {
        let range = Range { segment: id, offset, bytes: 4096 };
        assert_misuse(&device.zero(range));
        assert_misuse(&device.write(id, offset, &[7; 4096]));
        assert_misuse(&device.read(id, offset, &mut [0; 4096]));
        assert_misuse(&device.fill_from_file(range, &buffered(&source), 0));
    }
    assert_misuse(&device.zero(Range { segment: id, offset: 1, bytes: u64::MAX }));
    assert!(contents(device, id, SIZE).iter().all(|byte| *byte == 0));
    // Nothing at the very end is inside.
    device.write(id, SIZE, &[]).unwrap();
    device.zero(Range { segment: id, offset: SIZE, bytes: 0 }).unwrap();
}

fn a_segment_that_does_not_exist_is_misuse(device: &dyn Device) {
    let source = file(b"x");
    let destroyed = create(device, Writers::Importers);
    device.destroy(destroyed).unwrap();
    for id in [fresh(), destroyed] {
        let range = Range { segment: id, offset: 0, bytes: 1 };
        assert_misuse(&device.destroy(id));
        assert_misuse(&device.zero(range));
        assert_misuse(&device.write(id, 0, b"x"));
        assert_misuse(&device.read(id, 0, &mut [0]));
        assert_misuse(&device.fill_from_file(range, &buffered(&source), 0));
        assert_misuse(&device.copy(range, id, 1));
        assert_misuse(&device.export(id, ExportAccess::Read));
    }
}

fn a_size_off_the_granularity_is_misuse_and_takes_nothing(device: &dyn Device) {
    let before = available(device);
    let granularity = device.facts().granularity_bytes;
    for bytes in [0, 1, granularity / 2, granularity + 1, u64::MAX] {
        assert_misuse(&device.create(fresh(), bytes, Writers::DeviceOnly));
    }
    assert_eq!(available(device), before);
}

fn an_id_in_use_is_misuse_and_leaves_the_first(device: &dyn Device) {
    let id = create(device, Writers::DeviceOnly);
    device.write(id, 5, b"kept").unwrap();
    let before = available(device);
    assert_misuse(&device.create(id, SIZE, Writers::Importers));
    assert_eq!(available(device), before);
    assert_eq!(&contents(device, id, SIZE)[5..9], b"kept");
}

fn a_full_device_refuses_and_gets_everything_back(device: &dyn Device) {
    let granularity = device.facts().granularity_bytes;
    for _ in 0..3 {
        let mut ids: Vec<_> = (0..TOTAL / SIZE).map(|_| create(device, Writers::DeviceOnly)).collect();
        assert_eq!(available(device), 0);
        assert_out_of_memory(&device.create(fresh(), granularity, Writers::DeviceOnly), granularity);
        device.destroy(ids[3]).unwrap();
        ids[3] = create(device, Writers::DeviceOnly);
        assert_out_of_memory(&device.create(fresh(), granularity, Writers::DeviceOnly), granularity);
        for id in ids {
            device.destroy(id).unwrap();
        }
        assert_eq!(available(device), TOTAL);
    }
    // In one piece as well.
    let whole = fresh();
    device.create(whole, TOTAL, Writers::DeviceOnly).unwrap();
    device.destroy(whole).unwrap();
    assert_eq!(available(device), TOTAL);
}

fn more_than_there_is_is_out_of_memory(device: &dyn Device) {
    let granularity = device.facts().granularity_bytes;
    for bytes in [TOTAL + granularity, 1 << 40, 1 << 62, u64::MAX - (granularity - 1)] {
        assert_out_of_memory(&device.create(fresh(), bytes, Writers::DeviceOnly), bytes);
    }
    assert_eq!(available(device), TOTAL);
}

fn samples_count_what_is_held(device: &dyn Device) {
    let before = device.sample().unwrap();
    assert_eq!(before.used_bytes + before.available_bytes, TOTAL);
    let id = create(device, Writers::DeviceOnly);
    let after = device.sample().unwrap();
    assert_eq!(after.available_bytes, before.available_bytes - SIZE);
    assert_eq!(after.used_bytes, before.used_bytes + SIZE);
    device.destroy(id).unwrap();
    assert_eq!(device.sample().unwrap(), before);
}

fn creates_at_the_same_time_never_take_more_than_there_is(device: &dyn Device) {
    let made: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(|| device.create(fresh(), TOTAL / 4, Writers::DeviceOnly))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(made.iter().filter(|made| made.is_ok()).count(), 4, "{made:?}");
    assert_eq!(available(device), 0);
}

fn many_threads_leave_nothing_behind(device: &dyn Device) {
    thread::scope(|scope| {
        for seed in 0..8_u8 {
            scope.spawn(move || {
                let bytes: Vec<u8> = pattern(100_000).iter().map(|byte| byte ^ seed).collect();
                for _ in 0..10 {
                    let id = create(device, Writers::Importers);
                    device.write(id, 77, &bytes).unwrap();
                    device.sample().unwrap();
                    assert!(contents(device, id, SIZE)[77..][..bytes.len()] == bytes);
                    device.destroy(id).unwrap();
                }
            });
        }
    });
    assert_eq!(available(device), TOTAL);
}

fn an_importer_sees_the_bytes(device: &dyn Device) {
    if !exports(device) {
        return;
    }
    for writers in [Writers::DeviceOnly, Writers::Importers] {
        let id = create(device, writers);
        let bytes = pattern(SIZE as usize);
        device.write(id, 0, &bytes).unwrap();
        let import = reader(device, id);
        assert!(import.bytes() == bytes);
        device.zero(Range { segment: id, offset: 1, bytes: SIZE - 1 }).unwrap();
        assert!(import.bytes()[1..].iter().all(|byte| *byte == 0));
    }
}

/// Names the handle to the process that this test starts.
const CHILD: &str = "VRAMD_TEST_HANDLE";

fn another_process_sees_the_bytes(device: &dyn Device) {
    if !exports(device) {
        return;
    }
    let id = create(device, Writers::DeviceOnly);
    device.write(id, 0, &pattern(SIZE as usize)).unwrap();
    let exported = device.export(id, ExportAccess::Read).unwrap();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    #[cfg(unix)]
    command.env(crate::cuda_importer::LIBRARY, crate::cuda_importer::library(&device.facts().uuid));
    let child = command
        .args(["--exact", "contract::in_the_other_process", "--nocapture"])
        .env(CHILD, serde_json::to_string(&exported.handle).unwrap())
        .stdin(exported.descriptor)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&child.stderr)
    );
}

#[test]
fn in_the_other_process() {
    let Ok(handle) = std::env::var(CHILD) else { return };
    let handle = serde_json::from_str(&handle).unwrap();
    #[cfg(unix)]
    let descriptor = std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned().unwrap();
    #[cfg(windows)]
    let descriptor = std::os::windows::io::AsHandle::as_handle(&io::stdin()).try_clone_to_owned().unwrap();
    let import = Importer::reader(Exported { descriptor, handle }, SIZE);
    assert!(import.bytes() == pattern(SIZE as usize));
}

fn importers_write_where_they_may(device: &dyn Device) {
    if !exports(device) {
        return;
    }
    let id = create(device, Writers::Importers);
    let import = Importer::writer(device.export(id, ExportAccess::Write).unwrap(), SIZE);
    import.write(4095, b"hello");
    assert_eq!(&contents(device, id, SIZE)[4095..4100], b"hello");
    assert_eq!(&reader(device, id).bytes()[4095..4100], b"hello");
    let sealed = create(device, Writers::DeviceOnly);
    assert_misuse(&device.export(sealed, ExportAccess::Write));
}

fn exported_descriptors_are_not_inherited(device: &dyn Device) {
    if !exports(device) {
        return;
    }
    let id = create(device, Writers::Importers);
    for access in [ExportAccess::Read, ExportAccess::Write] {
        assert!(!crate::importer::is_inherited(&export(device, id, access)), "{access:?}");
    }
}

/// A driver that kept a segment for each descriptor that it ever gave would not get all back.
fn many_exports_leave_nothing_behind(device: &dyn Device) {
    if !exports(device) {
        return;
    }
    for _ in 0..8 {
        let id = create(device, Writers::Importers);
        for _ in 0..64 {
            export(device, id, ExportAccess::Read);
        }
        device.destroy(id).unwrap();
    }
    assert_eq!(available(device), TOTAL);
}

#[cfg(windows)]
fn who_cannot_import_a_segment_is_told(device: &dyn Device) {
    if !exports(device) {
        assert_misuse(&device.export(create(device, Writers::Importers), ExportAccess::Read));
    }
}

#[cfg(unix)]
fn who_cannot_import_a_segment_is_told(device: &dyn Device) {
    if device.facts().capabilities.handle == Some(vramd_api::attach::HandleType::VulkanOpaqueFd) {
        let id = create(device, Writers::Importers);
        crate::vulkan_importer::assert_refused_elsewhere(
            &device.export(id, ExportAccess::Read).unwrap(),
            SIZE,
        );
    }
}

fn what_is_destroyed_lives_on_for_who_still_has_it(device: &dyn Device) {
    if !exports(device) {
        return;
    }
    let id = create(device, Writers::DeviceOnly);
    let bytes = pattern(SIZE as usize);
    device.write(id, 0, &bytes).unwrap();
    let exported = device.export(id, ExportAccess::Read).unwrap();
    let import = reader(device, id);
    device.destroy(id).unwrap();
    assert_eq!(available(device), TOTAL);
    assert!(import.bytes() == bytes);
    drop(import);
    assert!(Importer::reader(exported, SIZE).bytes() == bytes);
}

/// Random copies between two segments and inside of each, against two vectors.
fn a_copy_is_what_was_there_and_nothing_else(device: &dyn Device) {
    let place = (0_usize..2, 0..SIZE as usize);
    let copy = (place.clone(), place, 0_usize..300_000);
    proptest!(Config::with_cases(16), |(copies in prop::collection::vec(copy, 1..20))| {
        let ids = [create(device, Writers::DeviceOnly), create(device, Writers::Importers)];
        let mut model = [pattern(SIZE as usize), vec![0; SIZE as usize]];
        device.write(ids[0], 0, &model[0]).unwrap();
        for ((from, offset), (to, to_offset), bytes) in copies {
            let mut bytes = bytes.min(SIZE as usize - offset.max(to_offset));
            if from == to {
                bytes = bytes.min(offset.abs_diff(to_offset));
            }
            let range = Range { segment: ids[from], offset: offset as u64, bytes: bytes as u64 };
            device.copy(range, ids[to], to_offset as u64).unwrap();
            let copied = model[from][offset..][..bytes].to_vec();
            model[to][to_offset..][..bytes].copy_from_slice(&copied);
        }
        for (id, model) in ids.iter().zip(&model) {
            prop_assert!(contents(device, *id, SIZE) == *model, "{id:?} differs");
            device.destroy(*id).unwrap();
        }
    });
}

fn a_copy_that_overlaps_or_leaves_its_segment_is_misuse_and_changes_nothing(device: &dyn Device) {
    let (first, second) = (create(device, Writers::DeviceOnly), create(device, Writers::DeviceOnly));
    let written = pattern(SIZE as usize);
    device.write(first, 0, &written).unwrap();
    let range = |offset, bytes| Range { segment: first, offset, bytes };
    assert_misuse(&device.copy(range(0, 8192), first, 4096));
    assert_misuse(&device.copy(range(4096, 8192), first, 0));
    assert_misuse(&device.copy(range(0, 8192), first, 0));
    assert_misuse(&device.copy(range(SIZE - 1, 2), second, 0));
    assert_misuse(&device.copy(range(0, 2), second, SIZE - 1));
    assert_misuse(&device.copy(range(0, 2), second, u64::MAX));
    assert_misuse(&device.copy(range(1, u64::MAX), second, 0));
    assert_misuse(&device.copy(range(0, 1), fresh(), 0));
    assert!(contents(device, first, SIZE) == written);
    assert!(contents(device, second, SIZE).iter().all(|byte| *byte == 0));
    // Side by side is no overlap.
    device.copy(range(0, 4096), first, 4096).unwrap();
}

fn an_importer_sees_what_was_copied_into_a_sealed_segment(device: &dyn Device) {
    if !exports(device) {
        return;
    }
    let (source, sealed) = (create(device, Writers::Importers), create(device, Writers::DeviceOnly));
    let import = reader(device, sealed);
    device.write(source, 100, b"moved").unwrap();
    device.copy(Range { segment: source, offset: 100, bytes: 5 }, sealed, 7).unwrap();
    assert_eq!(&import.bytes()[7..12], b"moved");
}

/// What a defragmentation does to a device: the blocks of one segment go into the holes of another and what is left of
/// the first goes back, while a process has both mapped.
fn a_segment_is_emptied_into_the_holes_of_another(device: &dyn Device) {
    const BLOCK: usize = 300 << 10;
    let before = available(device);
    let (packed, emptied) = (create(device, Writers::Importers), create(device, Writers::Importers));
    let blocks = SIZE as usize / BLOCK;
    let written = |number: usize| pattern(2 * blocks * BLOCK)[number * BLOCK..][..BLOCK].to_vec();
    for number in 0..blocks {
        // Odd ones go: every second place of the first is a hole.
        if number % 2 == 0 {
            device.write(packed, (number * BLOCK) as u64, &written(number)).unwrap();
            device.write(emptied, (number * BLOCK) as u64, &written(blocks + number)).unwrap();
        }
    }
    let places = [packed, emptied];
    let importers = device.facts().capabilities.handle.map(|_| places.map(|segment| reader(device, segment)));
    // As the device has it, and every importer.
    let seen = |which: usize| {
        let bytes = contents(device, places[which], SIZE);
        assert!(importers.as_ref().is_none_or(|importers| importers[which].bytes() == bytes));
        bytes
    };
    for number in (0..blocks - 1).step_by(2) {
        let (from, to) = ((number * BLOCK) as u64, ((number + 1) * BLOCK) as u64);
        device.copy(Range { segment: emptied, offset: from, bytes: BLOCK as u64 }, packed, to).unwrap();
        let (new, old) = (seen(0), seen(1));
        assert!(old[from as usize..][..BLOCK] == written(blocks + number), "the old one stays");
        assert!(new[to as usize..][..BLOCK] == written(blocks + number));
        assert!(new[from as usize..][..BLOCK] == written(number), "its neighbour stays");
    }
    device.destroy(emptied).unwrap();
    // What is given out again reads as zero.
    device.zero(Range { segment: packed, offset: BLOCK as u64, bytes: BLOCK as u64 }).unwrap();
    let new = seen(0);
    assert!(new[BLOCK..][..BLOCK].iter().all(|byte| *byte == 0));
    assert!(new[..BLOCK] == written(0) && new[2 * BLOCK..][..BLOCK] == written(2));
    drop(importers);
    assert!(available(device) >= before - SIZE, "the emptied segment is back");
    device.destroy(packed).unwrap();
}

/// Any part of a file to any place, direct and buffered, aligned alike or not: the range is right, the rest of the
/// segment untouched.
fn a_file_fills_exactly_its_range(device: &dyn Device) {
    const FILE: usize = 6_000_123;
    let bytes = pattern(FILE);
    let file = file(&bytes);
    let sources = [direct(&file), buffered(&file)];
    let id = create(device, Writers::DeviceOnly);
    let edge = prop_oneof![Just(0_usize), Just(1), Just(4095), Just(4096), 0..2_000_000_usize];
    let length = prop_oneof![Just(0_usize), Just(1), Just(4096), 0..10_000_usize, 0..2_000_000_usize];
    let untouched = vec![0x55; SIZE as usize];
    let cases = (edge.clone(), edge, length, any::<bool>(), 0..sources.len());
    proptest!(Config::with_cases(64), |((place, from, length, alike, source) in cases)| {
        let from = if alike { from - from % 4096 + place % 4096 } else { from };
        device.write(id, 0, &untouched).unwrap();
        let range = Range { segment: id, offset: place as u64, bytes: length as u64 };
        device.fill_from_file(range, &sources[source], from as u64).unwrap();
        let filled = contents(device, id, SIZE);
        prop_assert!(filled[place..][..length] == bytes[from..][..length], "the range differs");
        let beside = [0..place, place + length..SIZE as usize];
        prop_assert!(beside.into_iter().all(|part| filled[part.clone()] == untouched[part]), "something beside the range was written");
    });
    // To the last byte of the file, which no direct read can end at.
    let range = Range { segment: id, offset: 0, bytes: SIZE };
    device.fill_from_file(range, &sources[0], FILE as u64 - SIZE).unwrap();
    assert!(contents(device, id, SIZE) == bytes[FILE - SIZE as usize..]);
}

fn a_file_that_ends_early_is_an_error(device: &dyn Device) {
    let id = create(device, Writers::DeviceOnly);
    for contents in [0, 1, 4095, 4096, 4097, 100_000] {
        let file = file(&pattern(contents));
        for source in [direct(&file), buffered(&file)] {
            for (from, bytes) in
                [(0, contents as u64 + 1), (contents as u64, 1), (1 << 40, 4096), (u64::MAX, 4096)]
            {
                let range = Range { segment: id, offset: 0, bytes };
                let result = device.fill_from_file(range, &source, from);
                assert!(
                    matches!(&result, Err(DeviceError::Source(error)) if error.kind() == io::ErrorKind::UnexpectedEof),
                    "{bytes} bytes from {from} of {contents}: {result:?}"
                );
            }
            let whole = Range { segment: id, offset: 0, bytes: contents as u64 };
            device.fill_from_file(whole, &source, 0).unwrap();
        }
    }
}

fn parallel_fills_do_not_mix(device: &dyn Device) {
    const PARTS: u64 = 8;
    let bytes = pattern(SIZE as usize);
    let file = file(&bytes);
    let source = direct(&file);
    let id = create(device, Writers::DeviceOnly);
    thread::scope(|scope| {
        for part in 0..PARTS {
            let range = Range { segment: id, offset: part * (SIZE / PARTS), bytes: SIZE / PARTS };
            let source = &source;
            scope.spawn(move || device.fill_from_file(range, source, range.offset).unwrap());
        }
    });
    assert!(contents(device, id, SIZE) == bytes);
}
