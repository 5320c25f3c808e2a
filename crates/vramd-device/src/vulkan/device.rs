//! The devices `vulkan:N`, as [`card::Device`] has them.

use vramd_api::attach::HandleType;
use vramd_api::{DeviceCapabilities, MemoryType};

use super::adapter::Adapter;
use super::context::Context;
use crate::card::{self, GRANULARITY, Options};
use crate::host::Host;
use crate::{DeviceError, Facts};

/// One adapter's memory as a device.
pub type Device = card::Device<Context>;

impl Device {
    pub fn open(adapter: Adapter, options: Options) -> Result<Self, DeviceError> {
        let (_, heap_bytes) = adapter.heap();
        let shares_host = adapter.is_software() || adapter.memory_type() == MemoryType::Unified;
        let host = (shares_host && !adapter.has_budget).then(Host::probe).transpose()?;
        let device = format!("vulkan:{}", options.ordinal).parse().expect("of the right form");
        let mut notes = Vec::new();
        if adapter.is_software() {
            notes.push("a software driver: it runs on the processor, in host memory".to_owned());
        }
        if !adapter.exports {
            notes.push("the driver cannot export memory: other processes cannot attach it".to_owned());
        }
        if !adapter.has_budget {
            notes.push(
                "the driver has no VK_EXT_memory_budget: what other programs use is not seen".to_owned(),
            );
        }
        let facts = Facts {
            device,
            uuid: adapter.uuid.to_string(),
            luid: adapter.luid,
            pci_address: adapter.pci_address.clone(),
            name: adapter.name.clone(),
            memory_type: adapter.memory_type(),
            total_bytes: options.limit_bytes.map_or(heap_bytes, |limit| limit.min(heap_bytes)),
            granularity_bytes: GRANULARITY,
            max_segment_bytes: adapter.max_bytes & !(GRANULARITY - 1),
            page_bytes: 4096,
            capabilities: DeviceCapabilities {
                handle: adapter.exports.then_some(HandleType::VulkanOpaqueFd),
                read_only_export: false,
                host_access: false,
                remap: false,
                sparse: false,
                peer_copy: false,
            },
            notes,
        };
        let max_count = adapter.max_count;
        Ok(Self::of(adapter, facts, max_count, host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device as _, SegmentId, Writers};

    #[test]
    fn the_driver_is_open_only_while_there_is_a_segment() {
        let Some(adapter) = crate::vulkan::discover().ok().and_then(|adapters| adapters.into_iter().next())
        else {
            return eprintln!("SKIPPED: no Vulkan driver is installed");
        };
        let device = Device::open(adapter, Options::default()).unwrap();
        device.sample().unwrap();
        assert!(!device.is_open());
        for _ in 0..2 {
            let ids = [SegmentId(1), SegmentId(2)];
            for id in ids {
                device.create(id, GRANULARITY, Writers::DeviceOnly).unwrap();
                assert!(device.is_open());
            }
            device.destroy(ids[0]).unwrap();
            assert!(device.is_open());
            device.destroy(ids[1]).unwrap();
            assert!(!device.is_open());
        }
    }
}
