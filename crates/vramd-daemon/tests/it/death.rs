//! A driver that dies takes the daemon with it: nobody is left answering from an old snapshot.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use vramd_daemon::{Devices, StartError};
use vramd_device::{
    Device, DeviceError, ExportAccess, Exported, Facts, Range, Sample, SegmentId, Source, Writers, sim,
};

use crate::support::{Home, MIB, write_model};

/// A simulated device whose facts, which never block and never fail, end the driver once they are broken.
struct Breakable {
    device: sim::Device,
    broken: Arc<AtomicBool>,
}

impl Device for Breakable {
    fn facts(&self) -> &Facts {
        assert!(!self.broken.load(Ordering::Relaxed), "the test has broken this device");
        self.device.facts()
    }

    fn sample(&self) -> Result<Sample, DeviceError> {
        self.device.sample()
    }

    fn create(&self, segment: SegmentId, bytes: u64, writers: Writers) -> Result<(), DeviceError> {
        self.device.create(segment, bytes, writers)
    }

    fn destroy(&self, segment: SegmentId) -> Result<(), DeviceError> {
        self.device.destroy(segment)
    }

    fn zero(&self, range: Range) -> Result<(), DeviceError> {
        self.device.zero(range)
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.device.write(segment, offset, bytes)
    }

    fn read(&self, segment: SegmentId, offset: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.device.read(segment, offset, bytes)
    }

    fn fill_from_file(&self, range: Range, source: &Source, source_offset: u64) -> Result<(), DeviceError> {
        self.device.fill_from_file(range, source, source_offset)
    }

    fn copy(&self, from: Range, to: SegmentId, to_offset: u64) -> Result<(), DeviceError> {
        self.device.copy(from, to, to_offset)
    }

    fn importers(&self, segment: SegmentId, processes: &[u32]) -> Result<Option<Vec<u32>>, DeviceError> {
        self.device.importers(segment, processes)
    }

    fn adopt(&self) -> Result<(), DeviceError> {
        self.device.adopt()
    }

    fn export(&self, segment: SegmentId, access: ExportAccess) -> Result<Exported, DeviceError> {
        self.device.export(segment, access)
    }
}

#[test]
fn a_driver_that_dies_ends_the_daemon_and_the_next_one_recovers() {
    let home = Home::new();
    write_model(&home.path("models/tiny.safetensors"), "a", 5000);
    let broken = Arc::new(AtomicBool::new(false));
    let device = sim::Device::open(sim::Spec::new(0, 64 * MIB)).expect("a device");
    let mut devices = Devices::default();
    devices.add(Arc::new(Breakable { device, broken: broken.clone() }), 64 * MIB);
    let daemon = home.start_on(devices, Vec::new());
    daemon.register("tiny", "tiny.safetensors");
    let kept = daemon.allocated(&json!({"sizeBytes": 4096, "persistent": true}));
    broken.store(true, Ordering::Relaxed);
    let error = daemon.died();
    assert!(matches!(error, StartError::Driver) && error.hint().is_some(), "{error}");
    let daemon = home.start(&[64 * MIB]);
    assert_eq!(daemon.allocations()[0]["allocationId"], kept.as_str());
    assert_eq!(daemon.model("tiny")["name"], "tiny");
}
