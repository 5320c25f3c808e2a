//! What is special about simulated devices: any size, any speed, and every fault when it is asked for.

use std::thread;
use std::time::{Duration, Instant};

use vramd_api::MemoryType;
use vramd_device::sim::{self, Fault};
use vramd_device::{Call, Device, DeviceError, ExportAccess, Range, SegmentId, Writers};

use crate::files::{buffered, file, pattern};
use crate::fresh;

const MIB: u64 = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(30);

fn open(total_bytes: u64) -> sim::Device {
    sim::Device::open(sim::Spec::new(3, total_bytes)).unwrap()
}

fn create(device: &sim::Device, bytes: u64) -> SegmentId {
    let id = fresh();
    device.create(id, bytes, Writers::DeviceOnly).unwrap();
    id
}

/// Host memory that is behind a segment.
#[cfg(unix)]
fn host_bytes(device: &sim::Device, id: SegmentId) -> u64 {
    let descriptor = device.export(id, ExportAccess::Read).unwrap().descriptor;
    rustix::fs::fstat(descriptor).unwrap().st_blocks.cast_unsigned() * 512
}

/// Every call of the contract on a segment, by its kind.
fn call(device: &sim::Device, id: SegmentId, call: Call) -> Result<(), DeviceError> {
    let range = Range { segment: id, offset: 0, bytes: 1 };
    match call {
        Call::Sample => device.sample().map(drop),
        Call::Create => device.create(fresh(), MIB, Writers::DeviceOnly),
        Call::Destroy => device.destroy(id),
        Call::Zero => device.zero(range),
        Call::Write => device.write(id, 0, b"x"),
        Call::Read => device.read(id, 0, &mut [0]),
        Call::FillFromFile => device.fill_from_file(range, &buffered(&file(b"x")), 0),
        Call::Copy => device.copy(range, id, 1),
        Call::Importers => device.importers(id, &[]).map(drop),
        Call::Export => device.export(id, ExportAccess::Read).map(drop),
    }
}

const CALLS: [Call; 10] = [
    Call::Sample,
    Call::Create,
    Call::Zero,
    Call::Write,
    Call::Read,
    Call::FillFromFile,
    Call::Copy,
    Call::Importers,
    Call::Export,
    Call::Destroy,
];

#[test]
fn it_says_what_it_is() {
    let device = open(24 << 30);
    let facts = device.facts();
    assert_eq!((facts.device.as_str(), facts.uuid.as_str()), ("sim:3", "sim-3"));
    assert_eq!((facts.memory_type, facts.granularity_bytes), (MemoryType::Vram, 64 << 10));
    assert!(facts.capabilities.read_only_export && !facts.capabilities.host_access);
}

#[test]
fn a_device_that_makes_no_sense_does_not_open() {
    let good = sim::Spec::new(0, MIB);
    for spec in [
        sim::Spec { granularity_bytes: 3 << 12, ..good },
        sim::Spec { granularity_bytes: 1024, ..good },
        sim::Spec { total_bytes: 0, ..good },
        sim::Spec { bytes_per_second: Some(0), ..good },
        sim::Spec { ordinal: 1_000_000, ..good },
    ] {
        assert!(matches!(sim::Device::open(spec), Err(sim::OpenError::BadSpec(_))), "{spec:?}");
    }
}

#[cfg(unix)]
#[test]
fn a_device_larger_than_the_machine_takes_only_what_was_written() {
    let device = open(16 << 40);
    let id = create(&device, 15 << 40);
    device.write(id, (15 << 40) - 5, b"final").unwrap();
    device.zero(Range { segment: id, offset: 0, bytes: 8 << 30 }).unwrap();
    let mut end = [9; 8192];
    device.read(id, (15 << 40) - 8192, &mut end).unwrap();
    assert!(end.ends_with(b"\0final"));
    assert!(host_bytes(&device, id) <= 2 * MIB, "{}", host_bytes(&device, id));
    let other = create(&device, 1 << 30);
    device.copy(Range { segment: id, offset: (15 << 40) - (1 << 30), bytes: 1 << 30 }, other, 0).unwrap();
    assert!(host_bytes(&device, other) <= 2 * MIB, "{}", host_bytes(&device, other));
    assert_eq!(device.sample().unwrap().available_bytes, (1 << 40) - (1 << 30));
}

#[test]
fn a_link_of_a_given_speed_takes_its_time() {
    let spec = sim::Spec { bytes_per_second: Some(64 * MIB), ..sim::Spec::new(0, 64 * MIB) };
    let device = sim::Device::open(spec).unwrap();
    let id = create(&device, 16 * MIB);
    let source = file(&pattern(4 * MIB as usize));
    let begun = Instant::now();
    device.fill_from_file(Range { segment: id, offset: 0, bytes: 4 * MIB }, &buffered(&source), 0).unwrap();
    assert!(begun.elapsed() >= Duration::from_micros(62_500), "{:?}", begun.elapsed());
}

#[test]
fn the_call_that_was_chosen_fails_and_only_that_one() {
    for kind in CALLS {
        let device = open(64 * MIB);
        let id = create(&device, MIB);
        let after = if kind == Call::Destroy { 0 } else { 2 };
        device.faults().fail(kind, after, Fault::Native);
        for _ in 0..after {
            call(&device, id, kind).unwrap();
        }
        let failed = call(&device, id, kind);
        assert!(matches!(&failed, Err(DeviceError::Native { call, .. }) if *call == kind), "{failed:?}");
        call(&device, id, kind).unwrap();
    }
}

#[test]
fn a_fault_in_create_or_destroy_leaves_the_books_as_they_were() {
    let device = open(64 * MIB);
    let id = create(&device, MIB);
    let before = device.sample().unwrap();
    for fault in [Fault::OutOfMemory, Fault::Native] {
        device.faults().fail(Call::Create, 0, fault);
        assert!(device.create(fresh(), MIB, Writers::DeviceOnly).is_err());
        device.faults().fail(Call::Destroy, 0, fault);
        assert!(device.destroy(id).is_err());
        assert_eq!(device.sample().unwrap(), before);
    }
    device.destroy(id).unwrap();
    assert_eq!(device.sample().unwrap().used_bytes, 0);
}

#[test]
fn a_refusal_on_demand_names_what_was_asked_for() {
    let device = open(64 * MIB);
    device.faults().fail(Call::Create, 0, Fault::OutOfMemory);
    let refused = device.create(fresh(), 2 * MIB, Writers::DeviceOnly);
    assert!(matches!(refused, Err(DeviceError::OutOfMemory { requested, .. }) if requested == 2 * MIB));
}

#[test]
fn a_lost_device_only_lets_its_books_be_closed() {
    for by_call in [false, true] {
        let device = open(64 * MIB);
        let id = create(&device, MIB);
        if by_call {
            device.faults().fail(Call::Write, 0, Fault::Lost);
        } else {
            device.faults().lose("it fell off the bus");
        }
        assert!(matches!(call(&device, id, Call::Write), Err(DeviceError::Lost { .. })));
        for kind in CALLS.into_iter().filter(|kind| *kind != Call::Destroy) {
            let lost = call(&device, id, kind);
            assert!(matches!(lost, Err(DeviceError::Lost { .. })), "{kind:?}: {lost:?}");
        }
        device.destroy(id).unwrap();
    }
}

#[test]
fn a_held_call_waits_until_it_is_let_go() {
    let device = open(64 * MIB);
    let id = create(&device, 8 * MIB);
    let contents = pattern(8 * MIB as usize);
    let source = file(&contents);
    let (device, source) = (&device, &source);
    let fill = |part: u64| {
        let range = Range { segment: id, offset: part * 4 * MIB, bytes: 4 * MIB };
        move || device.fill_from_file(range, &buffered(source), range.offset)
    };
    thread::scope(|scope| {
        let held = device.faults().hold(Call::FillFromFile);
        let fills = [scope.spawn(fill(0)), scope.spawn(fill(1))];
        assert!(held.wait_until_caught(2, TIMEOUT));
        // Other kinds of calls go on, and nothing was written yet.
        #[cfg(unix)]
        assert_eq!(host_bytes(device, id), 0);
        drop(held);
        for fill in fills {
            fill.join().unwrap().unwrap();
        }
    });
    let mut read = vec![0; contents.len()];
    device.read(id, 0, &mut read).unwrap();
    assert!(read == contents);
}

#[test]
fn nothing_is_caught_where_nothing_calls() {
    let device = open(64 * MIB);
    let held = device.faults().hold(Call::Write);
    assert!(!held.wait_until_caught(1, Duration::from_millis(1)));
}

#[test]
fn a_device_lost_in_the_middle_of_a_load_fails_the_load() {
    let device = open(64 * MIB);
    let id = create(&device, MIB);
    let source = file(&pattern(MIB as usize));
    thread::scope(|scope| {
        let held = device.faults().hold(Call::FillFromFile);
        let fill = scope.spawn(|| {
            device.fill_from_file(Range { segment: id, offset: 0, bytes: MIB }, &buffered(&source), 0)
        });
        assert!(held.wait_until_caught(1, TIMEOUT));
        device.faults().lose("it fell off the bus");
        drop(held);
        let lost = fill.join().unwrap();
        assert!(matches!(lost, Err(DeviceError::Lost { .. })), "{lost:?}");
    });
    device.destroy(id).unwrap();
}

#[test]
fn foreign_bytes_are_used_and_not_available() {
    let device = open(64 * MIB);
    let id = create(&device, 16 * MIB);
    device.faults().set_foreign_bytes(40 * MIB);
    let sample = device.sample().unwrap();
    assert_eq!((sample.used_bytes, sample.available_bytes), (56 * MIB, 8 * MIB));
    assert!(device.create(fresh(), 16 * MIB, Writers::DeviceOnly).is_err());
    // Another process may have squeezed itself in beyond what is left.
    device.faults().set_foreign_bytes(100 * MIB);
    assert_eq!(device.sample().unwrap().available_bytes, 0);
    device.faults().set_foreign_bytes(0);
    device.destroy(id).unwrap();
    assert_eq!(device.sample().unwrap().available_bytes, 64 * MIB);
}
