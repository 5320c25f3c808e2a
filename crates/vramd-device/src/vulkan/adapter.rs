//! The loader, the instance, and what it says about each adapter. Nothing here takes memory on a card.

use std::ffi::CStr;
use std::sync::Arc;

use ash::vk;
use uuid::Uuid;
use vramd_api::MemoryType;

/// What buffers over segments and staging memory are for.
pub(super) const BUFFER_USAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
    vk::BufferUsageFlags::TRANSFER_SRC.as_raw() | vk::BufferUsageFlags::TRANSFER_DST.as_raw(),
);

/// Why no adapter can be looked for.
#[derive(Debug, thiserror::Error)]
pub enum NoVulkan {
    #[error("the Vulkan loader (libvulkan.so.1) is not there: {0}")]
    Loader(#[from] ash::LoadingError),
    #[error("the Vulkan loader speaks version {0}.{1}; 1.2 is needed")]
    Old(u32, u32),
    /// No driver, or none that works.
    #[error("no Vulkan driver answers: {0}")]
    Instance(#[from] vk::Result),
}

/// The connection to the loader; it goes with the last adapter.
pub(super) struct Instance {
    pub raw: ash::Instance,
    /// The library: what `raw` calls is in it.
    _entry: ash::Entry,
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: whatever was made from it holds it, so nothing is left.
        unsafe { self.raw.destroy_instance(None) };
    }
}

/// One adapter, as its driver describes it.
#[derive(Clone)]
pub struct Adapter {
    pub(super) instance: Arc<Instance>,
    pub(super) physical: vk::PhysicalDevice,
    pub(super) name: String,
    pub(super) uuid: Uuid,
    pub(super) driver_uuid: Uuid,
    /// On Windows.
    pub(super) luid: Option<u64>,
    /// Where the driver says.
    pub(super) pci_address: Option<String>,
    pub(super) kind: vk::PhysicalDeviceType,
    pub(super) memory: vk::PhysicalDeviceMemoryProperties,
    /// The family of the queue that copies.
    pub(super) family: u32,
    pub(super) has_budget: bool,
    /// Its memory can be handed to other processes, and theirs is no different from it.
    pub(super) exports: bool,
    /// The largest piece of memory with a buffer over it.
    pub(super) max_bytes: u64,
    /// How many pieces there may be.
    pub(super) max_count: u32,
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter").field("name", &self.name).field("uuid", &self.uuid).finish_non_exhaustive()
    }
}

/// Asks the loader for all adapters, in its order. Those that cannot copy buffers, or are older than Vulkan 1.2, are
/// left out.
pub fn discover() -> Result<Vec<Adapter>, NoVulkan> {
    // SAFETY: the loader's library runs its initialisers, which we have to trust like any driver.
    let entry = unsafe { ash::Entry::load() }?;
    // SAFETY: a plain question.
    let version = unsafe { entry.try_enumerate_instance_version() }?.unwrap_or(vk::API_VERSION_1_0);
    if version < vk::API_VERSION_1_2 {
        return Err(NoVulkan::Old(vk::api_version_major(version), vk::api_version_minor(version)));
    }
    let application =
        vk::ApplicationInfo::default().application_name(c"vramd").api_version(vk::API_VERSION_1_2);
    let create = vk::InstanceCreateInfo::default().application_info(&application);
    // SAFETY: what `create` points to lives until the call returns.
    let raw = unsafe { entry.create_instance(&create, None) }?;
    let instance = Arc::new(Instance { raw, _entry: entry });
    // SAFETY: the instance lives.
    let found = unsafe { instance.raw.enumerate_physical_devices() }?;
    Ok(found.into_iter().filter_map(|physical| Adapter::of(&instance, physical)).collect())
}

impl Adapter {
    fn of(instance: &Arc<Instance>, physical: vk::PhysicalDevice) -> Option<Self> {
        // SAFETY: the adapter is of this instance, which lives.
        let base = unsafe { instance.raw.get_physical_device_properties(physical) };
        if base.api_version < vk::API_VERSION_1_2 {
            let name = base.device_name_as_c_str().unwrap_or(c"unnamed");
            tracing::info!(?name, "an adapter without Vulkan 1.2 is left out");
            return None;
        }
        let mut ids = vk::PhysicalDeviceIDProperties::default();
        let mut memory_limits = vk::PhysicalDeviceMaintenance3Properties::default();
        let mut buffer_limits = vk::PhysicalDeviceMaintenance4Properties::default();
        let mut asked =
            vk::PhysicalDeviceProperties2::default().push_next(&mut ids).push_next(&mut memory_limits);
        if base.api_version >= vk::API_VERSION_1_3 {
            asked = asked.push_next(&mut buffer_limits);
        }
        // SAFETY: as above; the chain has room for the answer, and the device is new enough for each part of it.
        let (memory, families, extensions) = unsafe {
            instance.raw.get_physical_device_properties2(physical, &mut asked);
            (
                instance.raw.get_physical_device_memory_properties(physical),
                instance.raw.get_physical_device_queue_family_properties(physical),
                instance.raw.enumerate_device_extension_properties(physical).unwrap_or_default(),
            )
        };
        // 0 where it was not asked for.
        let limits = [memory_limits.max_memory_allocation_size, buffer_limits.max_buffer_size];
        let has = |wanted: &CStr| {
            extensions.iter().any(|extension| extension.extension_name_as_c_str() == Ok(wanted))
        };
        Some(Self {
            instance: instance.clone(),
            physical,
            name: base.device_name_as_c_str().map_or_else(
                |_| "unnamed".to_owned(),
                |name| name.to_string_lossy().replace(char::is_control, "?"),
            ),
            uuid: Uuid::from_bytes(ids.device_uuid),
            driver_uuid: Uuid::from_bytes(ids.driver_uuid),
            luid: (ids.device_luid_valid == vk::TRUE).then(|| u64::from_le_bytes(ids.device_luid)),
            pci_address: has(ash::ext::pci_bus_info::NAME).then(|| pci_address(&instance.raw, physical)),
            kind: base.device_type,
            memory,
            family: transfer_family(&families)?,
            has_budget: has(ash::ext::memory_budget::NAME),
            exports: cfg!(unix)
                && has(ash::khr::external_memory_fd::NAME)
                && exports(&instance.raw, physical),
            max_bytes: limits.into_iter().filter(|limit| *limit > 0).min().unwrap_or(u64::MAX),
            max_count: base.limits.max_memory_allocation_count,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// It runs on the processor and its memory is the machine's: for tests.
    pub fn is_software(&self) -> bool {
        self.kind == vk::PhysicalDeviceType::CPU
    }

    pub(super) fn memory_type(&self) -> MemoryType {
        match self.kind {
            vk::PhysicalDeviceType::DISCRETE_GPU | vk::PhysicalDeviceType::VIRTUAL_GPU => MemoryType::Vram,
            vk::PhysicalDeviceType::INTEGRATED_GPU => MemoryType::Unified,
            vk::PhysicalDeviceType::CPU => MemoryType::Ram,
            _ => MemoryType::Unknown,
        }
    }

    /// The heap that segments come from: the largest of the card's own, or of all.
    pub(super) fn heap(&self) -> (u32, u64) {
        let heaps = (0..).zip(self.memory.memory_heaps_as_slice());
        let of = |(index, heap): (u32, &vk::MemoryHeap)| {
            (heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL), heap.size, std::cmp::Reverse(index))
        };
        let best = heaps.map(of).max();
        best.map_or((0, 0), |(_, bytes, index)| (index.0, bytes))
    }

    /// What this process could still get of that heap; None if the driver does not say.
    pub(super) fn available_bytes(&self) -> Option<u64> {
        if !self.has_budget {
            return None;
        }
        let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
        let mut asked = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budget);
        // SAFETY: as in `of`; the driver has the extension.
        unsafe { self.instance.raw.get_physical_device_memory_properties2(self.physical, &mut asked) };
        let (heap, total) = self.heap();
        let most = budget.heap_budget[heap as usize].min(total);
        Some(most.saturating_sub(budget.heap_usage[heap as usize]))
    }

    /// The type of memory to take segments from, of those whose bits are set.
    pub(super) fn segment_type(&self, allowed: u32) -> Option<u32> {
        use vk::MemoryPropertyFlags as Flags;
        let (heap, _) = self.heap();
        self.first_best(allowed, |one| {
            (one.heap_index == heap).then(|| {
                // What the processor sees too is scarce on some cards, and slower on others.
                u32::from(one.property_flags.contains(Flags::DEVICE_LOCAL)) * 2
                    + u32::from(!one.property_flags.contains(Flags::HOST_VISIBLE))
            })
        })
    }

    /// The type of memory to take staging buffers from, of those whose bits are set.
    pub(super) fn staging_type(&self, allowed: u32) -> Option<u32> {
        use vk::MemoryPropertyFlags as Flags;
        self.first_best(allowed, |one| {
            let flags = one.property_flags;
            let fit = flags.contains(Flags::HOST_VISIBLE | Flags::HOST_COHERENT);
            fit.then(|| u32::from(flags.contains(Flags::HOST_CACHED)))
        })
    }

    /// The first of the types that rank highest: drivers order them by how fast they are.
    fn first_best(&self, allowed: u32, rank: impl Fn(&vk::MemoryType) -> Option<u32>) -> Option<u32> {
        use vk::MemoryPropertyFlags as Flags;
        let ranked = (0..)
            .zip(self.memory.memory_types_as_slice())
            .filter(|(index, _)| allowed & 1 << index != 0)
            .filter(|(_, one)| !one.property_flags.intersects(Flags::PROTECTED | Flags::LAZILY_ALLOCATED))
            .filter_map(|(index, one)| Some((rank(one)?, std::cmp::Reverse(index))));
        ranked.max().map(|(_, index): (_, std::cmp::Reverse<u32>)| index.0)
    }
}

/// A queue that does nothing but copy, where there is one: it does not hold up those who compute.
fn transfer_family(families: &[vk::QueueFamilyProperties]) -> Option<u32> {
    use vk::QueueFlags as Flags;
    let rank = |flags: Flags| {
        let computes = flags.intersects(Flags::GRAPHICS | Flags::COMPUTE);
        // Those copy too, whether they say so or not.
        (flags.contains(Flags::TRANSFER) || computes).then_some((!computes, !flags.contains(Flags::GRAPHICS)))
    };
    let ranked = (0..)
        .zip(families)
        .filter(|(_, family)| family.queue_count > 0)
        .filter_map(|(index, family): (u32, _)| Some((rank(family.queue_flags)?, std::cmp::Reverse(index))));
    ranked.max().map(|(_, index)| index.0)
}

/// Of an adapter that has `VK_EXT_pci_bus_info`.
fn pci_address(instance: &ash::Instance, physical: vk::PhysicalDevice) -> String {
    let mut at = vk::PhysicalDevicePCIBusInfoPropertiesEXT::default();
    let mut asked = vk::PhysicalDeviceProperties2::default().push_next(&mut at);
    // SAFETY: the adapter is of this instance, and has the extension.
    unsafe { instance.get_physical_device_properties2(physical, &mut asked) };
    format!("{:04x}:{:02x}:{:02x}.{:x}", at.pci_domain, at.pci_bus, at.pci_device, at.pci_function)
}

/// Whether buffers of ours can be exported as opaque descriptors, by any process that shares pieces of a segment's memory.
fn exports(instance: &ash::Instance, physical: vk::PhysicalDevice) -> bool {
    use vk::ExternalMemoryFeatureFlags as Flags;
    let asked = vk::PhysicalDeviceExternalBufferInfo::default()
        .usage(BUFFER_USAGE)
        .handle_type(vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD);
    let mut answer = vk::ExternalBufferProperties::default();
    // SAFETY: the adapter is of this instance, and new enough for the question.
    unsafe { instance.get_physical_device_external_buffer_properties(physical, &asked, &mut answer) };
    let features = answer.external_memory_properties.external_memory_features;
    // Dedicated memory has to be imported for a buffer that is the exporter's twin: a client cannot use it as it likes.
    features.contains(Flags::EXPORTABLE | Flags::IMPORTABLE) && !features.contains(Flags::DEDICATED_ONLY)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn family(flags: vk::QueueFlags) -> vk::QueueFamilyProperties {
        vk::QueueFamilyProperties { queue_flags: flags, queue_count: 1, ..Default::default() }
    }

    #[test]
    fn a_queue_that_only_copies_is_preferred() {
        use vk::QueueFlags as Flags;
        let all = family(Flags::GRAPHICS | Flags::COMPUTE | Flags::TRANSFER);
        let (compute, copy) = (family(Flags::COMPUTE), family(Flags::TRANSFER | Flags::SPARSE_BINDING));
        let decode = family(Flags::VIDEO_DECODE_KHR);
        assert_eq!(transfer_family(&[all, compute, copy, copy]), Some(2));
        assert_eq!(transfer_family(&[all, compute]), Some(1));
        assert_eq!(transfer_family(&[decode, all, all]), Some(1));
        assert_eq!(transfer_family(&[decode]), None);
        let none = vk::QueueFamilyProperties { queue_count: 0, ..copy };
        assert_eq!(transfer_family(&[none]), None);
    }
}
