//! Attached memory as memory of a Vulkan device of this process.

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};

use ash::vk;
use uuid::Uuid;
use vramd_api::attach::{AttachedSegment, Handle};

/// Why a segment is no memory of a device.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error("the segment's descriptor is not one of Vulkan's")]
    OtherHandle,
    /// Some drivers would import it all the same, and have other bytes there.
    #[error(
        "the segment is on device {segment} with driver {driver}; this is device {ours} with driver {our_driver}"
    )]
    OtherDevice { segment: Uuid, driver: Uuid, ours: Uuid, our_driver: Uuid },
    #[error("the device has no memory type {0}")]
    MemoryType(u32),
    #[error("vkAllocateMemory does not import the segment")]
    Driver(#[from] vk::Result),
}

/// Makes a segment memory of `device`: all `allocation_bytes` of its handle, the same as the daemon's. It is freed like any other, and
/// lives on when the lease ends, with bytes that may then be anybody's.
///
/// A buffer is bound to it at the block's offset, if it was created for
/// `VK_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD_BIT` and its requirements allow the memory type and the offset's alignment.
///
/// # Safety
/// `physical` is of `instance`, and `device` of `physical`, of Vulkan 1.1 or newer, with `VK_KHR_external_memory_fd` enabled.
pub unsafe fn import(
    instance: &ash::Instance,
    physical: vk::PhysicalDevice,
    device: &ash::Device,
    segment: &AttachedSegment,
    descriptor: OwnedFd,
) -> Result<vk::DeviceMemory, ImportError> {
    let Handle::VulkanOpaqueFd { device_uuid, driver_uuid, memory_type_index, allocation_bytes } =
        segment.handle
    else {
        return Err(ImportError::OtherHandle);
    };
    let mut ids = vk::PhysicalDeviceIDProperties::default();
    let mut asked = vk::PhysicalDeviceProperties2::default().push_next(&mut ids);
    // SAFETY: by this function's contract; the chain has room for the answer.
    let memory = unsafe {
        instance.get_physical_device_properties2(physical, &mut asked);
        instance.get_physical_device_memory_properties(physical)
    };
    let [ours, our_driver] = [ids.device_uuid, ids.driver_uuid].map(Uuid::from_bytes);
    if (ours, our_driver) != (device_uuid, driver_uuid) {
        let (segment, driver) = (device_uuid, driver_uuid);
        return Err(ImportError::OtherDevice { segment, driver, ours, our_driver });
    }
    if memory_type_index >= memory.memory_type_count {
        return Err(ImportError::MemoryType(memory_type_index));
    }
    let mut import = vk::ImportMemoryFdInfoKHR::default()
        .handle_type(vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD)
        .fd(descriptor.as_raw_fd());
    let allocate = vk::MemoryAllocateInfo::default()
        .allocation_size(allocation_bytes)
        .memory_type_index(memory_type_index)
        .push_next(&mut import);
    // SAFETY: by this function's contract; the descriptor comes from a driver with these uuids, which is all that the
    // driver asks for.
    let memory = unsafe { device.allocate_memory(&allocate, None) }?;
    // It is the driver's now.
    let _ = descriptor.into_raw_fd();
    Ok(memory)
}
