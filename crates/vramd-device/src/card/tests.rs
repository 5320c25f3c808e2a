//! The books of a card whose driver fails at any of its calls. What the drivers themselves do is held to the contract
//! elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vramd_api::attach::{Handle, HandleType};
use vramd_api::{DeviceCapabilities, MemoryType};

use super::*;
use crate::Device as _;

/// How the call that is due fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Memory,
    Native,
    Lost,
}

/// What a test sees of a driver, and tells it to do.
#[derive(Debug, Default)]
struct Switch {
    calls: AtomicUsize,
    /// The call that fails, counted from 0, and how; later ones too if the device is lost by it.
    fault: Mutex<Option<(usize, Way)>>,
    /// Blocks, stages and drivers that are not given back.
    open: AtomicUsize,
}

impl Switch {
    fn enter(&self) -> Result<(), Way> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        match *self.fault.lock().unwrap() {
            Some((at, way)) if at == call || at < call && way == Way::Lost => Err(way),
            _ => Ok(()),
        }
    }

    fn open(&self) -> Result<(), Way> {
        self.enter()?;
        self.open.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn close(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Memory(Arc<Switch>);

impl Drop for Memory {
    fn drop(&mut self) {
        self.0.close();
    }
}

type Bytes = Mutex<Vec<u8>>;

impl Failed for Way {
    fn explain(self, call: Call, requested: u64, available: u64) -> DeviceError {
        match self {
            Self::Memory => DeviceError::OutOfMemory { requested, available },
            Self::Native => {
                DeviceError::Native { call, native: "a call", source: std::io::Error::other("on demand") }
            }
            Self::Lost => DeviceError::Lost { reason: "on demand".to_owned() },
        }
    }
}

impl Driver for Memory {
    type Adapter = Arc<Switch>;
    type Block = Bytes;
    type Stage = Vec<u8>;
    type Failed = Way;

    fn open(adapter: &Arc<Switch>) -> Result<Self, Way> {
        adapter.open()?;
        Ok(Self(adapter.clone()))
    }

    fn available_bytes(_: &Arc<Switch>, _: u64) -> Option<u64> {
        None
    }

    /// Filled with what somebody else had.
    fn block(&self, bytes: u64) -> Result<Bytes, Way> {
        self.0.open()?;
        Ok(Mutex::new(vec![0xEE; bytes as usize]))
    }

    fn free(&self, _: &mut Bytes) {
        self.0.close();
    }

    fn staged<T>(&self, work: impl FnOnce(&mut Vec<u8>) -> Result<T, Way>) -> Result<T, Way> {
        self.0.open()?;
        let done = work(&mut vec![0; STAGE_BYTES as usize]);
        self.0.close();
        done
    }

    fn bytes(stage: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
        &mut stage[..bytes]
    }

    fn push(&self, stage: &mut Vec<u8>, (to, at): (&Bytes, u64), bytes: u64) -> Result<(), Way> {
        self.0.enter()?;
        to.lock().unwrap()[at as usize..][..bytes as usize].copy_from_slice(&stage[..bytes as usize]);
        Ok(())
    }

    fn pull(&self, stage: &mut Vec<u8>, (from, at): (&Bytes, u64), bytes: u64) -> Result<(), Way> {
        self.0.enter()?;
        stage[..bytes as usize].copy_from_slice(&from.lock().unwrap()[at as usize..][..bytes as usize]);
        Ok(())
    }

    fn copy(
        &self,
        stage: &mut Vec<u8>,
        from: (&Bytes, u64),
        to: (&Bytes, u64),
        bytes: u64,
    ) -> Result<(), Way> {
        self.pull(stage, from, bytes)?;
        self.push(stage, to, bytes)
    }

    fn zero(&self, stage: &mut Vec<u8>, at: (&Bytes, u64), bytes: u64) -> Result<(), Way> {
        stage.fill(0);
        self.push(stage, at, bytes)
    }

    fn export(&self, _: &Arc<Switch>, _: &Bytes, _: ExportAccess) -> Result<Exported, Way> {
        self.0.enter()?;
        let descriptor = tempfile::tempfile().unwrap().into();
        Ok(Exported { descriptor, handle: Handle::HOST })
    }
}

const BYTES: u64 = 4 * GRANULARITY;
const TOTAL: u64 = 16 * GRANULARITY;

fn card() -> (Device<Memory>, Arc<Switch>) {
    let switch = Arc::new(Switch::default());
    let facts = Facts {
        device: "vulkan:0".parse().unwrap(),
        uuid: "made up".to_owned(),
        luid: None,
        pci_address: None,
        name: "made up".to_owned(),
        memory_type: MemoryType::Vram,
        total_bytes: TOTAL,
        granularity_bytes: GRANULARITY,
        max_segment_bytes: u64::MAX,
        page_bytes: 4096,
        capabilities: DeviceCapabilities {
            handle: Some(HandleType::HOST),
            read_only_export: false,
            host_access: false,
            remap: false,
            sparse: false,
            peer_copy: false,
        },
        notes: Vec::new(),
    };
    (Device::of(switch.clone(), facts, u32::MAX, None), switch)
}

/// Everything that is done with two segments; what was made is given back, whatever happens.
fn history(device: &Device<Memory>) -> Result<(), DeviceError> {
    let [one, other] = [SegmentId(1), SegmentId(2)];
    let range = |segment, offset, bytes| Range { segment, offset, bytes };
    let through = || {
        device.create(one, BYTES, Writers::DeviceOnly)?;
        device.create(other, BYTES, Writers::Importers)?;
        device.write(one, 3, b"hello")?;
        device.copy(range(one, 3, 5), other, 100)?;
        let mut read = [0; 7];
        device.read(other, 99, &mut read)?;
        assert_eq!(&read, b"\0hello\0", "a new segment has nothing of others");
        device.zero(range(other, 101, 3))?;
        device.read(other, 99, &mut read)?;
        assert_eq!(&read, b"\0h\0\0\0o\0");
        device.export(other, ExportAccess::Write)?;
        Ok(())
    };
    let done = through();
    for segment in [one, other] {
        match device.destroy(segment) {
            Ok(()) | Err(DeviceError::Misuse { .. }) => {}
            Err(error) => panic!("a segment always goes back: {error}"),
        }
    }
    done
}

#[test]
fn a_driver_that_fails_at_any_call_leaves_nothing_behind() {
    let (device, switch) = card();
    history(&device).unwrap();
    let calls = switch.calls.load(Ordering::Relaxed);
    assert!(calls > 10);
    for way in [Way::Memory, Way::Native, Way::Lost] {
        for at in 0..calls {
            let (device, switch) = card();
            *switch.fault.lock().unwrap() = Some((at, way));
            let error = history(&device).unwrap_err();
            let expected = match way {
                Way::Memory => matches!(error, DeviceError::OutOfMemory { .. }),
                Way::Native => matches!(error, DeviceError::Native { .. }),
                Way::Lost => matches!(error, DeviceError::Lost { .. }),
            };
            assert!(expected, "{way:?} at {at}: {error}");
            assert_eq!(switch.open.load(Ordering::Relaxed), 0, "{way:?} at {at}");
            let state = device.state();
            assert_eq!((state.held, state.pending, state.count), (0, 0, 0), "{way:?} at {at}");
            drop(state);
            assert_eq!(device.sample().is_err(), way == Way::Lost);
            // What was only once in the way is out of it.
            if way != Way::Lost {
                history(&device).unwrap();
            }
        }
    }
}

#[test]
fn a_lost_card_is_adopted_once_it_works_again() {
    let (device, switch) = card();
    history(&device).unwrap();
    *switch.fault.lock().unwrap() = Some((0, Way::Lost));
    assert!(history(&device).is_err());
    assert!(matches!(device.adopt(), Err(DeviceError::Lost { .. })));
    assert!(matches!(device.sample(), Err(DeviceError::Lost { .. })));
    // A driver that answers, but has no memory yet, is not back either.
    *switch.fault.lock().unwrap() = Some((switch.calls.load(Ordering::Relaxed) + 1, Way::Memory));
    assert!(device.adopt().is_err());
    assert!(matches!(device.sample(), Err(DeviceError::Lost { .. })));
    *switch.fault.lock().unwrap() = None;
    device.adopt().unwrap();
    history(&device).unwrap();
    assert_eq!(switch.open.load(Ordering::Relaxed), 0);
    assert_eq!(device.sample().unwrap().available_bytes, TOTAL);
}

#[test]
fn what_a_driver_never_refuses_is_refused_by_the_count() {
    let (device, _switch) = card();
    device.create(SegmentId(1), TOTAL, Writers::DeviceOnly).unwrap();
    let refused = device.create(SegmentId(2), GRANULARITY, Writers::DeviceOnly);
    assert!(matches!(refused, Err(DeviceError::OutOfMemory { available: 0, .. })), "{refused:?}");
    device.destroy(SegmentId(1)).unwrap();
    device.create(SegmentId(2), TOTAL, Writers::DeviceOnly).unwrap();
}
