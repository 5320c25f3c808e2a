//! What is special about CUDA: no context in this process, loaders that die, drivers that fail at any call.
//!
//! On the fake driver, since a real one fails when it likes.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use uuid::Uuid;
use vramd_device::cuda::{self, LoaderCommand};
use vramd_device::{Call, Device, DeviceError, ExportAccess, Range, SegmentId, Writers};
use vramd_fake_cuda::{Installed, loader_arguments};

use crate::cuda_importer::DRIVERS;
use crate::files::{buffered, file, pattern};
use crate::fresh;

const MIB: u64 = 1 << 20;
const TOTAL: u64 = 64 * MIB;
const SIZE: u64 = 4 * MIB;

const UNKNOWN: u32 = 999;
const OUT_OF_MEMORY: u32 = 2;
const GPU_IS_LOST: u32 = 15;

/// The fake driver, installed in a directory of its own.
pub struct Fake {
    home: TempDir,
    driver: Installed,
}

impl Fake {
    pub fn new(cards: usize, bytes: u64) -> Self {
        let home = tempfile::tempdir().unwrap();
        let cards: Vec<_> = (0..cards).map(|_| format!("GPU-{}", Uuid::now_v7())).collect();
        let driver = Installed::new(home.path(), cards, bytes).unwrap();
        let known = driver.cards.iter().map(|uuid| (uuid.clone(), driver.cuda()));
        DRIVERS.lock().unwrap().extend(known);
        Self { home, driver }
    }

    pub fn libraries(&self) -> cuda::Libraries {
        cuda::Libraries { cuda: self.driver.cuda(), nvml: self.driver.nvml() }
    }

    fn fail(&self, call: &str, number: u32, code: u32) {
        self.driver.fail(call, number, code).unwrap();
    }

    fn mend(&self) {
        self.driver.mend().unwrap();
    }

    /// What any process has of the card.
    fn used(&self) -> u64 {
        self.driver.used_bytes(0)
    }

    fn contexts(&self) -> BTreeSet<u32> {
        self.driver.contexts()
    }

    pub fn open(&self) -> cuda::Device {
        self.open_with(|_| {})
    }

    fn open_with(&self, change: impl FnOnce(&mut cuda::Options)) -> cuda::Device {
        let adapter = cuda::discover(&self.libraries()).unwrap().remove(0);
        let mut options = options(Some(TOTAL));
        change(&mut options);
        cuda::Device::open(adapter, options).unwrap()
    }
}

pub fn open(adapter: cuda::Adapter, limit_bytes: Option<u64>) -> cuda::Device {
    cuda::Device::open(adapter, options(limit_bytes)).unwrap()
}

fn options(limit_bytes: Option<u64>) -> cuda::Options {
    let arguments = ["--exact", "cuda::as_a_loader", "--nocapture"].map(Into::into).to_vec();
    let loader = LoaderCommand { program: std::env::current_exe().unwrap(), arguments };
    cuda::Options { limit_bytes, ..cuda::Options::new(loader) }
}

/// One for all checks of the contract.
pub static SHARED: LazyLock<Fake> = LazyLock::new(|| Fake::new(1, 16 << 30));

/// This process, as it was started by [`open`].
#[test]
fn as_a_loader() {
    let Some((library, card)) = loader_arguments() else { return };
    let control = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).unwrap();
    // Why it ends early, the other side was told.
    let _ = cuda::serve(&library, &card, &control);
}

fn create(device: &cuda::Device) -> SegmentId {
    let id = fresh();
    device.create(id, SIZE, Writers::Importers).unwrap();
    id
}

fn available(device: &cuda::Device) -> u64 {
    device.sample().unwrap().available_bytes
}

#[test]
fn no_context_is_ever_opened_in_this_process() {
    let fake = Fake::new(1, 1 << 30);
    let device = fake.open();
    device.sample().unwrap();
    assert!(fake.contexts().is_empty(), "status costs nothing on the card");
    let id = create(&device);
    device.write(id, 7, &pattern(5000)).unwrap();
    device.export(id, ExportAccess::Read).unwrap();
    device.destroy(id).unwrap();
    let loaders = fake.contexts();
    assert!(loaders.len() == 1 && !loaders.contains(&std::process::id()), "{loaders:?}");
    drop(device);
    assert!(!is_there(*loaders.first().unwrap()), "the loader outlives its device");
    assert_eq!(fake.used(), 0);
}

#[test]
fn room_is_left_for_the_context_and_what_others_have_is_seen() {
    let fake = Fake::new(1, 2 << 30);
    let device = fake.open();
    let free = |bytes: u64| fake.driver.set_others(2 << 30, (2 << 30) - bytes).unwrap();
    free(512 * MIB + 8 * MIB);
    assert_eq!(available(&device), 8 * MIB);
    free(100 * MIB);
    assert_eq!(available(&device), 0);
    let refused = device.create(fresh(), SIZE, Writers::DeviceOnly);
    assert!(matches!(refused, Err(DeviceError::OutOfMemory { .. })), "{refused:?}");
}

/// Everything that a device does, once; the first error.
fn work(device: &cuda::Device) -> Result<(), DeviceError> {
    let (one, two) = (fresh(), fresh());
    let source = file(&pattern(9000));
    let range = |offset, bytes| Range { segment: one, offset, bytes };
    let done = device
        .create(one, SIZE, Writers::Importers)
        .and_then(|()| device.create(two, SIZE, Writers::DeviceOnly))
        .and_then(|()| device.write(one, 3, &pattern(100_000)))
        .and_then(|()| device.fill_from_file(range(MIB, 9000), &buffered(&source), 0))
        .and_then(|()| device.copy(range(0, MIB), two, 77))
        .and_then(|()| device.zero(range(0, 5)))
        .and_then(|()| device.export(one, ExportAccess::Read).map(drop))
        .and_then(|()| device.read(two, 0, &mut [0; 4096]));
    // What is there goes, whatever happened.
    let gone = [one, two].map(|id| match device.destroy(id) {
        Err(DeviceError::Misuse { .. }) => Ok(()),
        other => other.inspect_err(|_| LEFT.lock().unwrap().push(id)),
    });
    done.and(gone.into_iter().collect())
}

/// What [`work`] could not give back.
static LEFT: Mutex<Vec<SegmentId>> = Mutex::new(Vec::new());

#[test]
fn a_driver_that_fails_at_any_call_leaves_nothing_and_the_next_try_succeeds() {
    let fake = Fake::new(1, 1 << 30);
    let device = fake.open();
    work(&device).unwrap();
    let calls = [
        "cuMemCreate",
        "cuMemExportToShareableHandle",
        "cuMemImportFromShareableHandle",
        "cuMemAddressReserve",
        "cuMemAddressReserve nothing",
        "cuMemExportToShareableHandle nothing",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemRelease",
        "cuStreamSynchronize",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuMemcpyDtoDAsync_v2",
        "cuMemsetD8Async",
    ];
    for call in calls {
        for code in [UNKNOWN, OUT_OF_MEMORY] {
            // The second one is somewhere in the middle, for most.
            for number in [1, 2] {
                fake.fail(call, number, code);
                if let Err(error) = work(&device) {
                    let known = match &error {
                        DeviceError::OutOfMemory { .. } => code == OUT_OF_MEMORY,
                        DeviceError::Native { native, .. } => call.starts_with(native),
                        _ => false,
                    };
                    assert!(known, "{call} {number} {code}: {error:?}");
                } else {
                    assert_eq!(number, 2, "{call} did not fail");
                }
                fake.mend();
                // A release that failed is tried again, as the daemon does.
                device.sample().unwrap();
                for id in std::mem::take(&mut *LEFT.lock().unwrap()) {
                    device.destroy(id).unwrap();
                }
                // Also by those that are only on their way back.
                until(|| device.sample().is_ok() && fake.used() == 0);
                work(&device).unwrap_or_else(|error| panic!("after {call} {number} {code}: {error:?}"));
                assert_eq!(fake.used(), 0);
            }
        }
    }
}

#[test]
fn a_segment_counts_once_while_it_is_made() {
    let fake = Fake::new(1, 1 << 30);
    let device = fake.open_with(|options| options.limit_bytes = None);
    // Started, so that only zeroing is left to wait for.
    let first = create(&device);
    fake.driver.hang(true).unwrap();
    std::thread::scope(|scope| {
        let making = scope.spawn(|| device.create(fresh(), 96 * MIB, Writers::DeviceOnly));
        until(|| fake.driver.is_hanging());
        let sample = device.sample().unwrap();
        assert_eq!(sample.used_bytes, SIZE + 96 * MIB);
        assert_eq!(sample.held_bytes, SIZE + 96 * MIB);
        assert_eq!(sample.available_bytes, (1 << 30) - SIZE - 96 * MIB);
        fake.driver.hang(false).unwrap();
        making.join().unwrap().unwrap();
    });
    device.destroy(first).unwrap();
}

#[test]
fn an_idle_loader_ends_and_a_busy_one_does_not() {
    let fake = Fake::new(1, 1 << 30);
    let device = fake.open_with(|options| options.idle = Duration::ZERO);
    let id = create(&device);
    let loader = *fake.contexts().first().unwrap();
    fake.driver.hang(true).unwrap();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| device.write(id, 0, b"written"));
        until(|| fake.driver.is_hanging());
        device.sample().unwrap();
        assert!(is_there(loader), "it was ended while it worked");
        fake.driver.hang(false).unwrap();
        writing.join().unwrap().unwrap();
    });
    device.sample().unwrap();
    assert!(!is_there(loader));
    assert_eq!(fake.used(), SIZE, "what it had mapped stays with the daemon");
    let mut read = [0; 7];
    device.read(id, 0, &mut read).unwrap();
    assert_eq!((&read, fake.contexts().len()), (b"written", 2));
    device.destroy(id).unwrap();
    assert_eq!(fake.used(), 0);
}

#[test]
fn a_card_that_does_not_answer_is_lost_and_its_loader_gone() {
    let fake = Fake::new(1, 1 << 30);
    let device = fake.open_with(|options| options.patience = Duration::from_secs(2));
    let id = create(&device);
    fake.driver.hang(true).unwrap();
    let lost = device.write(id, 0, b"x");
    assert!(matches!(lost, Err(DeviceError::Lost { .. })), "{lost:?}");
    assert!(!is_there(*fake.contexts().first().unwrap()));
    fake.fail("cuMemRelease", 0, UNKNOWN);
    device.destroy(id).unwrap();
}

/// Two cards that reach each other, and a segment on each.
fn peers(fake: &Fake) -> ([cuda::Device; 2], [SegmentId; 2]) {
    let cards = cuda::discover(&fake.libraries()).unwrap();
    let devices: [_; 2] =
        cards.into_iter().map(|card| open(card, Some(TOTAL))).collect::<Vec<_>>().try_into().unwrap();
    let segments = [create(&devices[0]), create(&devices[1])];
    devices[0].write(segments[0], 0, &pattern(SIZE as usize)).unwrap();
    (devices, segments)
}

fn copied(devices: &[cuda::Device; 2], [from, to]: [SegmentId; 2]) -> Result<(), DeviceError> {
    let [source, target] = devices;
    target.copy_from(source, Range { segment: from, offset: 64, bytes: SIZE - 64 }, to, 0)
}

#[test]
fn a_card_copies_from_another_that_it_reaches_and_lets_go_of_its_memory() {
    let fake = Fake::new(2, 1 << 30);
    let (devices, ids) = peers(&fake);
    assert!(devices[1].reaches(&devices[0]) && devices[1].facts().capabilities.peer_copy);
    assert!(!devices[0].reaches(&devices[0]));
    // The first time it is looked whether the bytes have arrived, later no more.
    copied(&devices, ids).unwrap();
    fake.fail("cuMemcpyDtoHAsync_v2", 0, UNKNOWN);
    copied(&devices, ids).unwrap();
    fake.mend();
    let mut bytes = vec![0; SIZE as usize];
    devices[1].read(ids[1], 0, &mut bytes).unwrap();
    assert!(bytes[..(SIZE - 64) as usize] == pattern(SIZE as usize)[64..]);
    // What the other card's loader had mapped is free at once.
    devices[0].destroy(ids[0]).unwrap();
    assert_eq!(fake.used(), 0);
    assert_eq!(available(&devices[0]), TOTAL);
    devices[1].destroy(ids[1]).unwrap();
    assert_eq!(fake.driver.used_bytes(1), 0);
}

#[test]
fn cards_that_do_not_reach_each_other_after_all_are_not_asked_again() {
    let fake = Fake::new(2, 1 << 30);
    let (devices, ids) = peers(&fake);
    // For want of memory now, which may be another time.
    fake.fail("cuMemMap", 0, OUT_OF_MEMORY);
    out_of_reach(&copied(&devices, ids));
    assert!(devices[1].reaches(&devices[0]));
    let loaders = fake.contexts();
    fake.fail("cuMemSetAccess", 0, UNKNOWN);
    out_of_reach(&copied(&devices, ids));
    fake.mend();
    // A mapping that cannot be had leaves the loader as it was.
    assert_eq!(fake.contexts(), loaders);
    assert!(!devices[1].reaches(&devices[0]));
    assert!(matches!(copied(&devices, ids), Err(DeviceError::Misuse { .. })));
    // The other way it was not tried.
    assert!(devices[0].reaches(&devices[1]));
    for (device, id) in devices.iter().zip(ids) {
        device.destroy(id).unwrap();
    }
    assert_eq!((fake.used(), fake.driver.used_bytes(1)), (0, 0));
}

fn out_of_reach(copied: &Result<(), DeviceError>) {
    assert!(matches!(copied, Err(DeviceError::Interrupted { .. })), "{copied:?}");
}

#[test]
fn a_copy_that_does_not_arrive_is_found_out_and_not_tried_again() {
    let fake = Fake::new(2, 1 << 30);
    let (devices, ids) = peers(&fake);
    fake.fail("cuMemcpyDtoDAsync_v2 nothing", 0, UNKNOWN);
    out_of_reach(&copied(&devices, ids));
    assert!(!devices[1].reaches(&devices[0]));
    // Zeros that are there anyway prove nothing.
    let (devices, ids) = peers(&fake);
    devices[0].zero(Range { segment: ids[0], offset: 0, bytes: SIZE }).unwrap();
    copied(&devices, ids).unwrap();
    devices[0].write(ids[0], 64, b"x").unwrap();
    out_of_reach(&copied(&devices, ids));
}

#[test]
fn a_copy_that_hangs_loses_neither_card() {
    let fake = Fake::new(2, 1 << 30);
    let cards = cuda::discover(&fake.libraries()).unwrap();
    let devices: Vec<_> = cards
        .into_iter()
        .map(|card| {
            let patience = Duration::from_secs(1);
            cuda::Device::open(card, cuda::Options { patience, ..options(Some(TOTAL)) }).unwrap()
        })
        .collect();
    let devices: [_; 2] = devices.try_into().unwrap();
    let ids = [create(&devices[0]), create(&devices[1])];
    fake.driver.hang(true).unwrap();
    out_of_reach(&copied(&devices, ids));
    fake.driver.hang(false).unwrap();
    assert!(!devices[1].reaches(&devices[0]));
    for device in &devices {
        device.sample().unwrap();
    }
    devices[1].write(ids[1], 0, b"x").unwrap();
}

#[test]
fn a_lost_card_is_let_go_of_by_the_loaders_of_others() {
    let fake = Fake::new(2, 1 << 30);
    let (devices, ids) = peers(&fake);
    copied(&devices, ids).unwrap();
    fake.driver.report_xid(0, 79).unwrap();
    devices[0].reports();
    for loader in fake.contexts() {
        until(|| !is_there(loader));
    }
    // The other card goes on with a new one.
    devices[1].write(ids[1], 0, b"x").unwrap();
    assert!(!devices[1].reaches(&devices[0]));
    assert!(matches!(copied(&devices, ids), Err(DeviceError::Misuse { .. })));
}

#[test]
fn only_cards_that_the_driver_lets_reach_each_other_do() {
    let fake = Fake::new(2, 1 << 30);
    for code in ["cuDeviceCanAccessPeer nothing", "cuDeviceCanAccessPeer"] {
        fake.fail(code, 0, UNKNOWN);
        let (devices, ids) = peers(&fake);
        assert!(!devices[1].reaches(&devices[0]) && !devices[1].facts().capabilities.peer_copy);
        assert!(matches!(copied(&devices, ids), Err(DeviceError::Misuse { .. })));
    }
    fake.mend();
    let (devices, _) = peers(&fake);
    fake.driver.report_xid(0, 79).unwrap();
    devices[0].reports();
    assert!(!devices[1].reaches(&devices[0]));
}

#[test]
fn more_threads_than_stages_take_turns() {
    let fake = Fake::new(1, 1 << 30);
    let device = fake.open();
    let id = create(&device);
    std::thread::scope(|scope| {
        for number in 0..32_u8 {
            let device = &device;
            scope.spawn(move || {
                for _ in 0..8 {
                    device.write(id, u64::from(number) * 1000, &[number; 1000]).unwrap();
                    let mut read = [0; 1000];
                    device.read(id, u64::from(number) * 1000, &mut read).unwrap();
                    assert_eq!(read, [number; 1000]);
                }
            });
        }
    });
    assert_eq!(fake.contexts().len(), 1);
}

#[test]
fn a_card_that_nvml_cannot_reach_hides_no_other() {
    let fake = Fake::new(3, 1 << 30);
    fake.fail("nvmlDeviceGetHandleByIndex_v2", 2, GPU_IS_LOST);
    let found = cuda::discover(&fake.libraries()).unwrap();
    let found: Vec<_> = found.iter().map(|card| card.uuid().to_owned()).collect();
    assert_eq!(found, [fake.driver.cards[0].clone(), fake.driver.cards[2].clone()]);
}

fn is_there(process: u32) -> bool {
    fs::exists(format!("/proc/{process}")).unwrap()
}

/// Waits until something is so.
#[track_caller]
fn until(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(30), "it does not come");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

#[test]
fn what_could_not_be_given_back_is_given_back_by_the_next_try() {
    let fake = Fake::new(1, 1 << 30);
    let device = fake.open();
    let id = create(&device);
    let before = available(&device);
    fake.fail("cuMemRelease", 1, UNKNOWN);
    let failed = device.destroy(id);
    assert!(matches!(failed, Err(DeviceError::Native { call: Call::Destroy, .. })), "{failed:?}");
    assert_eq!(available(&device), before);
    fake.mend();
    device.destroy(id).unwrap();
    assert_eq!(available(&device), TOTAL);
    // One that the loader does not unmap takes the loader with it.
    let id = create(&device);
    fake.fail("cuMemUnmap", 1, UNKNOWN);
    device.destroy(id).unwrap();
    assert_eq!(available(&device), TOTAL);
    fake.mend();
    work(&device).unwrap();
    assert_eq!(fake.contexts().len(), 2);
}

#[test]
fn a_loader_that_does_not_start_says_why_and_the_next_one_may() {
    let fake = Fake::new(1, 1 << 30);
    for (call, code) in [("cuDevicePrimaryCtxRetain", OUT_OF_MEMORY), ("cuCtxSetCurrent", UNKNOWN)] {
        let device = fake.open();
        fake.fail(call, 1, code);
        let error = device.create(fresh(), SIZE, Writers::DeviceOnly).unwrap_err();
        let known = match &error {
            DeviceError::OutOfMemory { .. } => code == OUT_OF_MEMORY,
            DeviceError::Native { native, .. } => call.starts_with(native),
            _ => false,
        };
        assert!(known, "{call}: {error:?}");
        assert_eq!(available(&device), TOTAL);
        fake.mend();
        work(&device).unwrap();
    }
}

#[test]
fn a_killed_loader_takes_no_bytes_with_it() {
    let fake = Fake::new(1, 1 << 30);
    let device = fake.open();
    let id = create(&device);
    let written = pattern(SIZE as usize);
    device.write(id, 0, &written).unwrap();
    let loader = *fake.contexts().first().unwrap();
    let pid = rustix::process::Pid::from_raw(loader.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    // Whether the kernel has ended it before or after the call begins: that call may fail, no other.
    let mut read = vec![0; written.len()];
    if let Err(error) = device.read(id, 0, &mut read) {
        assert!(matches!(error, DeviceError::Interrupted { .. }), "{error:?}");
        device.read(id, 0, &mut read).unwrap();
    }
    assert!(read == written);
    device.destroy(id).unwrap();
    assert_eq!(available(&device), TOTAL);
}

#[test]
fn a_lost_card_closes_its_books_and_is_taken_again_when_it_is_back() {
    let fake = Fake::new(1, 1 << 30);
    let device = fake.open();
    let id = create(&device);
    fake.fail("nvmlDeviceGetMemoryInfo_v2", 0, GPU_IS_LOST);
    let lost = |result: Result<(), DeviceError>| {
        assert!(matches!(result, Err(DeviceError::Lost { .. })), "{result:?}");
    };
    lost(device.sample().map(drop));
    lost(device.write(id, 0, b"x"));
    lost(device.create(fresh(), SIZE, Writers::DeviceOnly));
    lost(device.export(id, ExportAccess::Read).map(drop));
    // Nothing has its files open any more: the card can be reset.
    assert!(!is_there(*fake.contexts().first().unwrap()));
    fake.fail("cuMemRelease", 0, UNKNOWN);
    device.destroy(id).unwrap();
    // Asked for it, it looks; by itself it does not.
    fake.fail("nvmlDeviceGetMemoryInfo_v2", 0, GPU_IS_LOST);
    lost(device.adopt());
    fake.mend();
    lost(device.sample().map(drop));
    device.adopt().unwrap();
    device.adopt().unwrap();
    let id = create(&device);
    device.write(id, 0, b"x").unwrap();
    device.destroy(id).unwrap();
    assert_eq!(available(&device), TOTAL);
}

#[test]
fn a_fault_that_the_driver_reports_is_told_once_and_a_fatal_one_loses_the_card() {
    let fake = Fake::new(2, 1 << 30);
    let device = fake.open();
    let id = create(&device);
    assert_eq!(device.reports(), []);
    fake.driver.report_xid(0, 31).unwrap();
    // Of another card.
    fake.driver.report_xid(1, 79).unwrap();
    let told = device.reports();
    assert_eq!(told.iter().map(|fault| fault.code).collect::<Vec<_>>(), [31]);
    assert!(told[0].to_string().starts_with("Xid 31: "), "{}", told[0]);
    assert_eq!(device.reports(), []);
    device.write(id, 0, b"x").unwrap();
    fake.driver.report_xid(0, 79).unwrap();
    assert_eq!(device.reports()[0].code, 79);
    match device.sample() {
        Err(DeviceError::Lost { reason }) => assert!(reason.contains("Xid 79"), "{reason}"),
        other => panic!("{other:?}"),
    }
    device.destroy(id).unwrap();
    // What it reported before it was back is no news.
    fake.driver.report_xid(0, 79).unwrap();
    device.adopt().unwrap();
    assert_eq!(device.reports(), []);
    assert_eq!(available(&device), TOTAL);
}

#[test]
fn a_card_without_reports_or_an_address_opens() {
    let fake = Fake::new(1, 1 << 30);
    assert_eq!(fake.open().facts().pci_address.as_deref(), Some("0000:01:00.0"));
    fake.fail("nvmlEventSetCreate", 0, UNKNOWN);
    let device = fake.open();
    fake.driver.report_xid(0, 79).unwrap();
    assert_eq!(device.reports(), []);
    assert_eq!(available(&device), TOTAL);
    fake.fail("nvmlDeviceGetPciInfo_v3", 0, UNKNOWN);
    assert_eq!(fake.open().facts().pci_address, None);
}

#[test]
fn what_a_driver_lacks_is_named_when_a_card_is_opened() {
    let fake = Fake::new(1, 1 << 30);
    let library = fake.libraries().cuda;
    let mut bytes = fs::read(&library).unwrap();
    let name = b"cuMemExportToShareableHandle\0";
    let places: Vec<_> = (0..bytes.len() - name.len()).filter(|at| bytes[*at..].starts_with(name)).collect();
    for at in places {
        bytes[at + 2] = b'm';
    }
    fs::write(&library, bytes).unwrap();
    let adapter = cuda::discover(&fake.libraries()).unwrap().remove(0);
    let error = cuda::Device::open(adapter.clone(), options(None)).unwrap_err().to_string();
    assert!(error.contains("cuMemExportToShareableHandle"), "{error}");
    assert_eq!(adapter.check().unwrap_err().to_string(), error);
}

#[test]
fn a_machine_without_the_driver_has_no_card() {
    let nowhere =
        cuda::Libraries { cuda: "/nowhere/libcuda.so.1".into(), nvml: "/nowhere/libnvidia-ml.so.1".into() };
    assert!(matches!(cuda::discover(&nowhere), Err(cuda::NoCuda::Nvml(_))));
    let fake = Fake::new(0, 0);
    assert!(cuda::discover(&fake.libraries()).unwrap().is_empty());
}

/// Names the directory of a driver to the process that the next test starts.
const VISIBLE: &str = "VRAMD_TEST_VISIBLE";

#[test]
fn only_cards_that_cuda_may_use_are_found() {
    let fake = Fake::new(3, 1 << 30);
    let found = |visible: &str| -> Vec<String> {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "cuda::in_a_restricted_process", "--nocapture"])
            .env(VISIBLE, fake.home.path())
            .env("CUDA_VISIBLE_DEVICES", visible)
            .output()
            .unwrap();
        assert!(child.status.success(), "{child:?}");
        let said = String::from_utf8(child.stdout).unwrap();
        let cards = said.lines().filter_map(|line| line.strip_prefix("card ").map(str::to_owned));
        cards.collect()
    };
    let [one, two, three] = fake.driver.cards.as_slice() else { panic!("three cards") };
    assert_eq!(found("1"), *std::slice::from_ref(two));
    assert_eq!(found(three), *std::slice::from_ref(three));
    assert_eq!(found(&format!("{},0", &three[..35])), [one.clone(), three.clone()]);
    assert!(found("").is_empty());
    assert_eq!(cuda::discover(&fake.libraries()).unwrap().len(), 3);
}

#[test]
fn in_a_restricted_process() {
    let Some(home) = std::env::var_os(VISIBLE).map(PathBuf::from) else { return };
    let libraries = cuda::Libraries { cuda: home.join("libcuda.so.1"), nvml: home.join("libnvidia-ml.so.1") };
    for card in cuda::discover(&libraries).unwrap() {
        println!("\ncard {}", card.uuid());
    }
}
