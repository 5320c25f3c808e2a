//! What NVML says of each card, and of several CUDA, which reach each other. Nothing here takes memory on one, or opens a context.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, PoisonError};

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{EventSet, Nvml};
use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlEventSet_t};
use uuid::Uuid;

use super::Libraries;
use super::driver::{Driver, NoDriver};
use super::xid;
use crate::{Process, Report};

/// What is read of one card at once: the others want their turn.
const MOST_REPORTS: usize = 16;

/// Why no card can be looked for.
#[derive(Debug, thiserror::Error)]
pub enum NoCuda {
    #[error("NVIDIA's management library (NVML) cannot be used: {0}")]
    Nvml(#[from] NvmlError),
    #[error(transparent)]
    Driver(#[from] NoDriver),
}

/// One card, or one instance of a card that is split (MIG).
#[derive(Clone)]
pub struct Adapter {
    nvml: Arc<Nvml>,
    handle: Handle,
    pub(super) libraries: Libraries,
    /// Counts all cards and instances of the machine, those too that cannot be used.
    pub(super) ordinal: u16,
    /// As `nvidia-smi -L` has it.
    pub(super) uuid: String,
    pub(super) id: Uuid,
    pub(super) pci_address: Option<String>,
    /// The uuids of those cards whose memory this one reaches directly.
    pub(super) peers: Vec<String>,
    pub(super) name: String,
    pub(super) total_bytes: u64,
}

#[derive(Clone, Copy)]
struct Handle(nvmlDevice_t);

// SAFETY: NVML may be called from any thread, and its handles are good until it is shut down, which the last adapter does.
unsafe impl Send for Handle {}
// SAFETY: as for `Send`.
unsafe impl Sync for Handle {}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter").field("name", &self.name).field("uuid", &self.uuid).finish_non_exhaustive()
    }
}

/// Asks NVML for all cards, in its order, which is that of the PCI bus; one that does not answer is left out. Where
/// `CUDA_VISIBLE_DEVICES` is set, or a card is split, the CUDA driver says which of them this process may use.
pub fn discover(libraries: &Libraries) -> Result<Vec<Adapter>, NoCuda> {
    let nvml = Arc::new(Nvml::builder().lib_path(libraries.nvml.as_os_str()).init()?);
    let mut found = Vec::new();
    let mut restricted = std::env::var_os("CUDA_VISIBLE_DEVICES").is_some();
    let mut ordinal = 0;
    let mut add = |card: Result<nvml_wrapper::Device<'_>, NvmlError>| {
        let adapter = card.and_then(|card| Adapter::of(&nvml, &card, libraries, ordinal));
        let left_out =
            |error: &NvmlError| tracing::warn!(card = ordinal, %error, "an NVIDIA card is left out");
        found.extend(adapter.inspect_err(left_out).ok().flatten());
        ordinal += 1;
    };
    for index in 0..nvml.device_count()? {
        let card = nvml.device_by_index(index);
        let split = card.as_ref().ok().filter(|card| card.mig_mode().is_ok_and(|mode| mode.current == 1));
        let Some(split) = split else {
            add(card);
            continue;
        };
        restricted = true;
        for instance in 0..split.mig_device_count().unwrap_or(0) {
            match split.mig_device_by_index(instance) {
                // The numbers have gaps where instances were removed.
                Err(NvmlError::NotFound) => {}
                instance => add(instance),
            }
        }
    }
    if restricted {
        let visible = Driver::load(&libraries.cuda)?.visible().map_err(NoDriver::from)?;
        found.retain(|adapter| visible.iter().any(|(_, id)| *id == adapter.id));
    }
    if found.len() > 1
        && let Err(error) = find_peers(&mut found, libraries)
    {
        tracing::info!(%error, "cards are not known to reach each other");
    }
    Ok(found)
}

/// Asks the driver which cards reach which. Instances of a split card reach none: a process has one of them.
fn find_peers(cards: &mut [Adapter], libraries: &Libraries) -> Result<(), NoDriver> {
    let driver = Driver::load(&libraries.cuda)?;
    let visible = driver.visible()?;
    let of = |card: &Adapter| {
        let ordinal = visible.iter().find(|(_, id)| *id == card.id)?.0;
        (!card.is_instance()).then(|| (ordinal, card.uuid.clone()))
    };
    let known: Vec<_> = cards.iter().filter_map(of).collect();
    for card in cards {
        let Some((ordinal, _)) = of(card) else { continue };
        for (other, uuid) in known.iter().filter(|(other, _)| *other != ordinal) {
            match driver.reaches(ordinal, *other) {
                Ok(true) => card.peers.push(uuid.clone()),
                Ok(false) => {}
                Err(error) => tracing::info!(card.uuid, uuid, %error, "a card is not known to reach another"),
            }
        }
    }
    Ok(())
}

/// Whether it is a part of a card that is split.
fn is_instance(uuid: &str) -> bool {
    uuid.starts_with("MIG-")
}

/// What NVML reports of a card by itself.
pub(super) struct Reports {
    set: Mutex<EventHandle>,
    nvml: Arc<Nvml>,
}

struct EventHandle(nvmlEventSet_t);

// SAFETY: as for `Handle`; one thread uses it at a time.
unsafe impl Send for EventHandle {}

impl std::fmt::Debug for Reports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reports")
    }
}

impl Reports {
    /// Those that have come since the last call.
    pub fn take(&self) -> Result<Vec<Report>, NvmlError> {
        let set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: of this NVML, and freed by `drop` alone.
        let set = ManuallyDrop::new(unsafe { EventSet::new(set.0, &self.nvml) });
        let mut found = Vec::new();
        while found.len() < MOST_REPORTS {
            match set.wait(0) {
                Ok(event) => found.extend(event.event_data.map(|error| match error {
                    XidError::Value(code) => xid::report(code),
                    XidError::Unknown => xid::report(xid::UNKNOWN),
                })),
                Err(NvmlError::Timeout) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        let set = self.set.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the last use of it. A failure leaves nothing to do.
        let _ = unsafe { EventSet::new(set.0, &self.nvml) }.release_events();
    }
}

impl Adapter {
    fn of(
        nvml: &Arc<Nvml>,
        card: &nvml_wrapper::Device<'_>,
        libraries: &Libraries,
        ordinal: u16,
    ) -> Result<Option<Self>, NvmlError> {
        let uuid = card.uuid()?;
        // "GPU-" or "MIG-" before it.
        let Some(id) = uuid.get(4..).and_then(|id| Uuid::parse_str(id).ok()) else {
            tracing::warn!(uuid, "a card whose uuid cannot be read is left out");
            return Ok(None);
        };
        let total_bytes = match card.memory_info() {
            Ok(memory) => memory.total,
            Err(NvmlError::NotSupported) => {
                tracing::info!(uuid, "a card without memory of its own is left out: it is the machine's");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        // An instance has that of its card, whose other instances are other devices.
        let pci = (!is_instance(&uuid)).then(|| card.pci_info().ok()).flatten();
        let pci_address = pci.map(|at| format!("{:04x}:{:02x}:{:02x}.0", at.domain, at.bus, at.device));
        let name = card.name()?.replace(char::is_control, "?");
        // SAFETY: it is used with the NVML that it is from, which the adapter keeps.
        let handle = Handle(unsafe { card.handle() });
        let (nvml, libraries) = (nvml.clone(), libraries.clone());
        Ok(Some(Self {
            nvml,
            handle,
            libraries,
            ordinal,
            uuid,
            id,
            pci_address,
            peers: Vec::new(),
            name,
            total_bytes,
        }))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    fn is_instance(&self) -> bool {
        is_instance(&self.uuid)
    }

    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Whether CUDA can be used with it, which takes nothing of the card.
    pub fn check(&self) -> Result<(), NoDriver> {
        Driver::load(&self.libraries.cuda)?.find(self.id).map(|_| ())
    }

    /// What NVML reports of the card from now on.
    pub(super) fn reports(&self) -> Result<Reports, NvmlError> {
        // SAFETY: as below.
        let card = unsafe { nvml_wrapper::Device::new(self.handle.0, &self.nvml) };
        let set = self.nvml.create_event_set()?;
        let set = card.register_events(EventTypes::CRITICAL_XID_ERROR, set).map_err(|error| error.error)?;
        // SAFETY: it goes with `Reports`, and NVML after it.
        let handle = unsafe { set.handle() };
        std::mem::forget(set);
        Ok(Reports { set: Mutex::new(EventHandle(handle)), nvml: self.nvml.clone() })
    }

    /// The processes with a context there, and what each has; what was only imported is charged to nobody.
    pub(super) fn processes(&self) -> Result<Vec<Process>, NvmlError> {
        // SAFETY: as below.
        let card = unsafe { nvml_wrapper::Device::new(self.handle.0, &self.nvml) };
        let mut found: BTreeMap<u32, Option<u64>> = BTreeMap::new();
        // One that both computes and draws is in both lists, with the same figure.
        for process in card.running_compute_processes()?.into_iter().chain(card.running_graphics_processes()?)
        {
            let used = match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some(bytes),
                UsedGpuMemory::Unavailable => None,
            };
            found.insert(process.pid, used);
        }
        Ok(found.into_iter().map(|(pid, used_bytes)| Process { pid, used_bytes }).collect())
    }

    /// What nobody has of it, now.
    pub(super) fn free_bytes(&self) -> Result<u64, NvmlError> {
        // SAFETY: the handle is of this NVML, which is not shut down before the adapter goes.
        let card = unsafe { nvml_wrapper::Device::new(self.handle.0, &self.nvml) };
        Ok(card.memory_info()?.free)
    }
}
