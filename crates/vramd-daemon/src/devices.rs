//! The devices of this machine, by id.

use std::collections::BTreeMap;
use std::sync::Arc;

use vramd_api::{ApiError, DeviceHealth, DeviceId, ErrorCode};
use vramd_core::ledger::DeviceFacts;
#[cfg(unix)]
use vramd_device::cuda;
#[cfg(windows)]
use vramd_device::d3d12;
use vramd_device::{Device, DeviceError, Facts, cpu, sim, vulkan};

use crate::Config;

/// The share of the machine's memory that the daemon may hold when no limit is configured.
const DEFAULT_CPU_SHARE: f64 = 0.8;

/// The share of a card's memory that the daemon may hold.
const DEFAULT_CARD_SHARE: f64 = 0.9;

/// Which adapters of an interface to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Adapters {
    #[default]
    None,
    /// Those that are real cards.
    Hardware,
    /// Software drivers too.
    All,
}

/// Which cards to open for CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CudaCards {
    None,
    /// All that `CUDA_VISIBLE_DEVICES` leaves.
    #[default]
    All,
}

/// The words of a choice, as settings have them.
macro_rules! words {
    ($choice:ident, $expected:literal: $($value:ident $word:literal),*) => {
        impl std::fmt::Display for $choice {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self {
                    $(Self::$value => $word,)*
                })
            }
        }

        impl std::str::FromStr for $choice {
            type Err = &'static str;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                match text {
                    $($word => Ok(Self::$value),)*
                    _ => Err($expected),
                }
            }
        }
    };
}

words!(Adapters, "write none, hardware or all": None "none", Hardware "hardware", All "all");
words!(CudaCards, "write none or all": None "none", All "all");

/// The Vulkan adapters of this machine by name, and whether each is a real card; or why there are none.
pub fn vulkan_adapters() -> Result<Vec<(String, bool)>, String> {
    let adapters = vulkan::discover().map_err(|error| error.to_string())?;
    Ok(adapters.iter().map(|adapter| (adapter.name().to_owned(), !adapter.is_software())).collect())
}

/// The cards of this machine that CUDA may use, by name; or why there are none.
#[cfg(unix)]
pub fn cuda_cards() -> Result<Vec<String>, String> {
    let cards = cuda::discover(&cuda::Libraries::default()).map_err(|error| error.to_string())?;
    cards
        .iter()
        .map(|card| card.check().map(|()| card.name().to_owned()).map_err(|error| error.to_string()))
        .collect()
}

/// The cards of this machine that CUDA may use: none, since handing its memory out takes Linux.
#[cfg(windows)]
pub fn cuda_cards() -> Result<Vec<String>, String> {
    Err("on Windows cards are opened for Direct3D 12".to_owned())
}

/// The Direct3D 12 adapters of this machine by name, and whether each is a real card; or why there are none.
#[cfg(windows)]
pub fn d3d12_adapters() -> Result<Vec<(String, bool)>, String> {
    let adapters = d3d12::discover().map_err(|error| error.to_string())?;
    Ok(adapters.iter().map(|adapter| (adapter.name().to_owned(), !adapter.is_software())).collect())
}

/// On which adapters `DirectML` works, by name; or why on none.
#[cfg(windows)]
pub fn directml() -> Result<Vec<String>, String> {
    let adapters = d3d12::discover().map_err(|error| error.to_string())?;
    let works = |adapter: &d3d12::Adapter| {
        adapter.check_directml().map(|()| adapter.name().to_owned()).map_err(|error| error.to_string())
    };
    adapters.iter().map(works).collect()
}

/// On which adapters `DirectML` works: none.
#[cfg(unix)]
pub fn directml() -> Result<Vec<String>, String> {
    Err("DirectML is there on Windows alone".to_owned())
}

/// The Direct3D 12 adapters of this machine: none.
#[cfg(unix)]
pub fn d3d12_adapters() -> Result<Vec<(String, bool)>, String> {
    Err("Direct3D 12 is there on Windows alone".to_owned())
}

/// A device and the most that the daemon may hold on it.
pub struct Opened {
    pub device: Arc<dyn Device>,
    pub limit_bytes: u64,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened")
            .field("facts", self.device.facts())
            .field("limit_bytes", &self.limit_bytes)
            .finish()
    }
}

/// All devices that opened; the set does not change while the daemon runs.
#[derive(Debug, Default)]
pub struct Devices(BTreeMap<DeviceId, Opened>);

impl Devices {
    /// Opens the host's memory, simulated devices by a spec such as `24GiB,8GiB`, cards for CUDA and Vulkan adapters. One
    /// of those that does not open is left out, with a line in the log.
    pub fn open(config: &Config) -> Result<Self, String> {
        let Config { cpu_limit_bytes, sim, vulkan, .. } = config;
        let mut devices = Self::default();
        let options = cpu::Options { limit_bytes: None, ahead_bytes: config.page_pool_bytes };
        let cpu = cpu::Device::open(options).map_err(|error| format!("host memory: {error}"))?;
        let total = cpu.facts().total_bytes;
        let limit = cpu_limit_bytes.unwrap_or((total as f64 * DEFAULT_CPU_SHARE) as u64);
        devices.add(Arc::new(cpu), limit);
        for spec in sim
            .as_deref()
            .map(sim::parse_spec)
            .transpose()
            .map_err(|error| error.to_string())?
            .unwrap_or_default()
        {
            let limit = spec.total_bytes;
            let device = sim::Device::open(spec).map_err(|error| format!("simulated device: {error}"))?;
            devices.add(Arc::new(device), limit);
        }
        // Before Vulkan: what CUDA has, clients can do more with.
        #[cfg(unix)]
        if config.cuda != CudaCards::None {
            devices.open_cuda(&cuda::Libraries::default(), &config.loader);
        }
        // As before, on systems that have it: its memory can be handed out there.
        #[cfg(windows)]
        if config.d3d12 != Adapters::None {
            devices.open_d3d12(config.d3d12 == Adapters::All);
        }
        if *vulkan != Adapters::None {
            devices.open_vulkan(*vulkan == Adapters::All);
        }
        Ok(devices)
    }

    #[cfg(unix)]
    fn open_cuda(&mut self, libraries: &cuda::Libraries, loader: &cuda::LoaderCommand) {
        let found = cuda::discover(libraries).unwrap_or_else(|error| {
            // Most machines have no such card, and want none.
            tracing::info!(%error, "no CUDA device is opened");
            Vec::new()
        });
        for adapter in found {
            let name = adapter.name().to_owned();
            match cuda::Device::open(adapter, cuda::Options::new(loader.clone())) {
                Ok(device) => self.add_card(Arc::new(device)),
                Err(error) => tracing::warn!(name, %error, "a card does not open for CUDA"),
            }
        }
    }

    /// Adds a card, unless it is there already by way of another driver: its bytes would count twice.
    fn add_card(&mut self, device: Arc<dyn Device>) {
        let facts = device.facts();
        let Facts { device: id, uuid, total_bytes, .. } = facts;
        if let Some(same) = self.iter().find(|other| same_card(other.facts(), facts)) {
            let other = &same.facts().device;
            tracing::info!(device = %id, uuid, %other, "a card that is open already is not opened again");
            return;
        }
        let limit = (*total_bytes as f64 * DEFAULT_CARD_SHARE) as u64;
        self.add(device, limit);
    }

    fn open_vulkan(&mut self, software: bool) {
        let found = vulkan::discover().unwrap_or_else(|error| {
            tracing::warn!(%error, "no Vulkan device is opened");
            Vec::new()
        });
        for (ordinal, adapter) in (0..).zip(found) {
            let name = adapter.name().to_owned();
            if adapter.is_software() && !software {
                tracing::info!(name, "a software Vulkan driver is not opened: `--vulkan all` does");
                continue;
            }
            match vulkan::Device::open(adapter, vulkan::Options { ordinal, limit_bytes: None }) {
                Ok(device) => self.add_card(Arc::new(device)),
                Err(error) => tracing::warn!(name, %error, "a Vulkan adapter does not open"),
            }
        }
    }

    #[cfg(windows)]
    fn open_d3d12(&mut self, software: bool) {
        let found = d3d12::discover().unwrap_or_else(|error| {
            // Most servers have no such card.
            tracing::info!(%error, "no Direct3D 12 device is opened");
            Vec::new()
        });
        for (ordinal, adapter) in (0..).zip(found) {
            let name = adapter.name().to_owned();
            if adapter.is_software() && !software {
                tracing::info!(name, "a software Direct3D 12 driver is not opened: `--d3d12 all` does");
                continue;
            }
            match d3d12::Device::open(adapter, d3d12::Options { ordinal, limit_bytes: None }) {
                Ok(device) => self.add_card(Arc::new(device)),
                Err(error) => tracing::warn!(name, %error, "a Direct3D 12 adapter does not open"),
            }
        }
    }

    pub fn add(&mut self, device: Arc<dyn Device>, limit_bytes: u64) {
        let limit_bytes = limit_bytes.min(device.facts().total_bytes);
        self.0.insert(device.facts().device.clone(), Opened { device, limit_bytes });
    }

    pub fn get(&self, id: &DeviceId) -> Option<&Arc<dyn Device>> {
        self.0.get(id).map(|opened| &opened.device)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Device>> {
        self.0.values().map(|opened| &opened.device)
    }

    /// The id of the device that an id or uuid names.
    pub fn id(&self, name: &str) -> Result<DeviceId, ApiError> {
        Ok(self.named(name)?.facts().device.clone())
    }

    /// The device that `text` names, by id or by uuid.
    pub fn named(&self, text: &str) -> Result<&Arc<dyn Device>, ApiError> {
        self.iter()
            .find(|device| device.facts().device.as_str() == text || device.facts().uuid == text)
            .ok_or_else(|| {
                let known: Vec<_> = self.0.keys().map(DeviceId::as_str).collect();
                ApiError::not_found("device", text).hint(format!("the devices are: {}", known.join(", ")))
            })
    }

    /// What the ledger has to know of each.
    pub fn facts(&self) -> impl Iterator<Item = DeviceFacts> {
        self.0.values().map(|opened| {
            let facts = opened.device.facts();
            DeviceFacts {
                page_bytes: facts.page_bytes,
                device: facts.device.clone(),
                memory_type: facts.memory_type,
                total_bytes: facts.total_bytes,
                granularity_bytes: facts.granularity_bytes,
                max_segment_bytes: facts.max_segment_bytes,
                limit_bytes: opened.limit_bytes,
            }
        })
    }
}

/// Whether two drivers show one card. NVIDIA's uuids have a word before them that Vulkan leaves out; on Windows every
/// driver knows the system's own number. Two Vulkan drivers of one card may give it two uuids, but it has one place on the bus.
fn same_card(one: &Facts, other: &Facts) -> bool {
    let plain = |uuid: &str| uuid.strip_prefix("GPU-").unwrap_or(uuid).to_ascii_lowercase();
    plain(&one.uuid) == plain(&other.uuid)
        || (one.luid.is_some() && one.luid == other.luid)
        || (one.pci_address.is_some() && one.pci_address == other.pci_address)
}

/// A device as the interfaces show it.
pub fn to_api(device: &dyn Device, lost: bool) -> vramd_api::Device {
    let facts = device.facts();
    vramd_api::Device {
        device_id: facts.device.clone(),
        uuid: facts.uuid.clone(),
        pci_address: facts.pci_address.clone(),
        name: facts.name.clone(),
        memory_type: facts.memory_type,
        total_bytes: facts.total_bytes,
        granularity_bytes: facts.granularity_bytes,
        capabilities: facts.capabilities,
        health: if lost { DeviceHealth::Lost } else { DeviceHealth::Healthy },
        notes: facts.notes.clone(),
    }
}

/// A device's error as the interfaces show it.
pub fn error(device: &DeviceId, error: &DeviceError) -> ApiError {
    let chain = {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    };
    let (code, hint) = match error {
        DeviceError::OutOfMemory { .. } => (
            ErrorCode::InsufficientMemory,
            "free memory on the machine, or ask for less; `vramd ps` shows who holds what",
        ),
        DeviceError::Lost { .. } => (
            ErrorCode::DeviceLost,
            "other devices go on working; release or unload what was on it: once it is back it is used again, at the latest after a restart of the daemon",
        ),
        DeviceError::Interrupted { .. } => (
            ErrorCode::Unavailable,
            "try again: another one is started; see the daemon's log for why it ended",
        ),
        DeviceError::Source(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => (
            ErrorCode::InvalidModelFile,
            "the file became shorter while it was read; put the whole file back and load again",
        ),
        DeviceError::Source(_) => {
            (ErrorCode::ModelReadFailed, "check the disk and the file system (`dmesg`), then load again")
        }
        error @ DeviceError::Native { .. } if error.is_out_of_descriptors() => (
            ErrorCode::TooManyRequests,
            "the daemon has no file descriptor left: release something, or raise its limit of open files",
        ),
        DeviceError::Native { .. } => {
            (ErrorCode::DeviceLost, "see the daemon's log; `vramd doctor` checks the machine")
        }
        DeviceError::Misuse { .. } => {
            (ErrorCode::Internal, "this is a bug in vramd; please report it with the daemon's log")
        }
    };
    let mut shown =
        ApiError::new(code, format!("{device}: {chain}")).hint(hint).detail("deviceId", device.as_str());
    if let DeviceError::OutOfMemory { requested, available } = error {
        shown = shown.detail("requestedBytes", *requested).detail("availableBytes", *available);
    }
    shown
}

#[cfg(all(test, unix))]
mod tests {
    use vramd_fake_cuda::Installed;

    use super::*;

    const CARD: &str = "GPU-01234567-89AB-cdef-0123-456789abcdef";

    #[test]
    fn a_card_counts_once_whatever_drivers_show_it() {
        let facts = |uuid: &str, luid| {
            let device = sim::Device::open(sim::Spec::new(0, 1 << 30)).expect("a device");
            Facts { uuid: uuid.to_owned(), luid, ..device.facts().clone() }
        };
        let same = |one: (&str, Option<u64>), other: (&str, Option<u64>)| {
            same_card(&facts(one.0, one.1), &facts(other.0, other.1))
        };
        assert!(same((CARD, None), ("01234567-89ab-cdef-0123-456789abcdef", None)));
        assert!(!same((CARD, None), ("MIG-01234567-89ab-cdef-0123-456789abcdef", None)));
        assert!(same((CARD, Some(7)), ("dxgi-10de-2684-16f310de-a1-0", Some(7))));
        assert!(!same((CARD, Some(7)), ("dxgi-10de-2684-16f310de-a1-0", Some(8))));
        let at = |uuid: &str, address: Option<&str>| Facts {
            pci_address: address.map(ToOwned::to_owned),
            ..facts(uuid, None)
        };
        assert!(same_card(&at("one", Some("0000:01:00.0")), &at("other", Some("0000:01:00.0"))));
        assert!(!same_card(&at("one", Some("0000:01:00.0")), &at("other", Some("0000:02:00.0"))));
        assert!(!same_card(&at("one", None), &at("other", None)));
        let home = tempfile::tempdir().expect("a directory");
        let other = "GPU-01234567-89ab-cdef-0123-000000000000";
        // A driver that shows one card twice.
        let cards = [CARD, CARD, other].map(ToOwned::to_owned).to_vec();
        let driver = Installed::new(home.path(), cards, 1 << 30).expect("a driver");
        let libraries = cuda::Libraries { cuda: driver.cuda(), nvml: driver.nvml() };
        let loader = cuda::LoaderCommand { program: "none".into(), arguments: Vec::new() };
        let mut devices = Devices::default();
        devices.open_cuda(&libraries, &loader);
        let names: Vec<_> = devices.iter().map(|device| device.facts().device.to_string()).collect();
        assert_eq!(names, ["cuda:0", "cuda:2"]);
        assert_eq!(
            devices.named(CARD).map(|device| device.facts().device.to_string()),
            Ok("cuda:0".to_owned())
        );
        let same = sim::Device::open(sim::Spec::new(0, 1 << 30)).expect("a device");
        let same: Arc<dyn Device> = Arc::new(same);
        devices.add_card(same.clone());
        devices.add_card(same);
        assert_eq!(devices.iter().count(), 3);
    }
}
