//! The devices `d3d12:N`, as [`card::Device`] has them.

use vramd_api::attach::HandleType;
use vramd_api::{DeviceCapabilities, MemoryType};
use windows::Win32::Graphics::Direct3D12::{
    D3D12_FEATURE, D3D12_FEATURE_ARCHITECTURE, D3D12_FEATURE_DATA_ARCHITECTURE,
    D3D12_FEATURE_DATA_GPU_VIRTUAL_ADDRESS_SUPPORT, D3D12_FEATURE_GPU_VIRTUAL_ADDRESS_SUPPORT, ID3D12Device,
};

use super::adapter::Adapter;
use super::context::{Context, Failed, buffer_facts, shares};
use crate::card::{self, Failed as _, GRANULARITY, Options};
use crate::host::Host;
use crate::{Call, DeviceError, Facts};

/// What the system and every driver take at once without a second thought.
const MAX_PIECES: u32 = 1 << 16;

/// One adapter's memory as a device.
pub type Device = card::Device<Context>;

impl Device {
    pub fn open(adapter: Adapter, options: Options) -> Result<Self, DeviceError> {
        // Closed again when its questions are answered.
        let (unified, max_bytes, exports) =
            ask(&adapter).map_err(|failed| failed.explain(Call::Sample, 0, 0))?;
        let memory_type = match (adapter.is_software(), unified) {
            (true, _) => MemoryType::Ram,
            (false, true) => MemoryType::Unified,
            (false, false) => MemoryType::Vram,
        };
        let shares_host = memory_type != MemoryType::Vram;
        // Where the system's budget goes beyond the card's own memory, the machine's is meant too.
        let beyond = adapter.budget().is_some_and(|(budget, _)| budget > adapter.dedicated_bytes);
        let shared = if shares_host && beyond { adapter.shared_bytes } else { 0 };
        let all = adapter.dedicated_bytes + shared;
        let host = shares_host.then(Host::probe).transpose()?;
        let mut notes = Vec::new();
        if adapter.is_software() {
            notes.push("a software driver: it runs on the processor, in host memory".to_owned());
        }
        if !exports {
            notes.push("the driver cannot share heaps: other processes cannot attach them".to_owned());
        }
        let facts = Facts {
            device: format!("d3d12:{}", options.ordinal).parse().expect("of the right form"),
            uuid: adapter.uuid.clone(),
            luid: Some(adapter.luid),
            pci_address: None,
            name: adapter.name.clone(),
            memory_type,
            total_bytes: options.limit_bytes.map_or(all, |limit| limit.min(all)),
            granularity_bytes: GRANULARITY,
            max_segment_bytes: max_bytes,
            page_bytes: GRANULARITY,
            capabilities: DeviceCapabilities {
                handle: exports.then_some(HandleType::D3d12Heap),
                read_only_export: false,
                host_access: false,
                remap: false,
                sparse: false,
                peer_copy: false,
            },
            notes,
        };
        Ok(Self::of(adapter, facts, MAX_PIECES, host))
    }
}

/// Whether the card's memory is the machine's, the largest buffer, and whether heaps can be shared.
fn ask(adapter: &Adapter) -> Result<(bool, u64, bool), Failed> {
    let device = adapter.open()?;
    let mut architecture = D3D12_FEATURE_DATA_ARCHITECTURE::default();
    let mut addresses = D3D12_FEATURE_DATA_GPU_VIRTUAL_ADDRESS_SUPPORT::default();
    feature(&device, D3D12_FEATURE_ARCHITECTURE, &mut architecture)?;
    feature(&device, D3D12_FEATURE_GPU_VIRTUAL_ADDRESS_SUPPORT, &mut addresses)?;
    let bits = addresses.MaxGPUVirtualAddressBitsPerResource.clamp(32, 63);
    // Some have fewer than they say.
    let largest = (32..=bits).rev().map(|bits| (1_u64 << bits) - GRANULARITY).find(|bytes| {
        // SAFETY: a plain question; an impossible buffer would take all there is.
        let info = unsafe { device.GetResourceAllocationInfo(0, &[buffer_facts(*bytes)]) };
        info.SizeInBytes != u64::MAX
    });
    let max_bytes = largest.unwrap_or((1 << 32) - GRANULARITY);
    Ok((architecture.UMA.as_bool(), max_bytes, shares(&device)))
}

fn feature<T>(device: &ID3D12Device, which: D3D12_FEATURE, answer: &mut T) -> Result<(), Failed> {
    // SAFETY: each caller's structure is that of its feature, and its size is said.
    unsafe { device.CheckFeatureSupport(which, std::ptr::from_mut(answer).cast(), size_of::<T>() as u32) }
        .map_err(Failed::at("CheckFeatureSupport"))
}
