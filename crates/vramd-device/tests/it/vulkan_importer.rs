//! Another program that uses Vulkan: an instance and a logical device of its own, and what it imports there.

use std::os::fd::OwnedFd;

use ash::vk;
use vramd_api::attach::{AttachedSegment, Handle};
use vramd_attach::vulkan::{ImportError, import};
use vramd_device::Exported;

pub struct Client {
    entry: ash::Entry,
    instance: ash::Instance,
    physical: vk::PhysicalDevice,
    device: ash::Device,
    queue: vk::Queue,
    family: u32,
}

/// A segment as this client has it.
pub struct Imported {
    client: Client,
    memory: vk::DeviceMemory,
    buffer: vk::Buffer,
    bytes: u64,
}

fn segment(handle: Handle, bytes: u64) -> AttachedSegment {
    AttachedSegment { bytes, page_bytes: 4096, handle }
}

impl Client {
    /// On the adapter that an exported segment is on; or, to see what happens, on another one.
    pub fn open(handle: &Handle, same: bool) -> Option<Self> {
        let Handle::VulkanOpaqueFd { device_uuid, .. } = handle else { panic!("not of Vulkan: {handle:?}") };
        // SAFETY: the loader and its drivers are trusted; everything is destroyed in the order of its making, in `Drop`.
        unsafe {
            let entry = ash::Entry::load().unwrap();
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
            let create = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry.create_instance(&create, None).unwrap();
            let is_wanted = |physical: &vk::PhysicalDevice| {
                let mut ids = vk::PhysicalDeviceIDProperties::default();
                let mut asked = vk::PhysicalDeviceProperties2::default().push_next(&mut ids);
                instance.get_physical_device_properties2(*physical, &mut asked);
                (ids.device_uuid == *device_uuid.as_bytes()) == same
            };
            let mut found = instance.enumerate_physical_devices().unwrap().into_iter();
            let Some(physical) = found.find(is_wanted) else {
                instance.destroy_instance(None);
                return None;
            };
            let families = instance.get_physical_device_queue_family_properties(physical);
            let computes = |family: &vk::QueueFamilyProperties| {
                family.queue_flags.intersects(vk::QueueFlags::GRAPHICS | vk::QueueFlags::COMPUTE)
            };
            let family = families.iter().position(computes).unwrap() as u32;
            let queues =
                [vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&[1.0])];
            let extensions = [ash::khr::external_memory_fd::NAME.as_ptr()];
            let create = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queues)
                .enabled_extension_names(&extensions);
            let device = instance.create_device(physical, &create, None).unwrap();
            let queue = device.get_device_queue(family, 0);
            Some(Self { entry, instance, physical, device, queue, family })
        }
    }

    fn import(
        &self,
        handle: Handle,
        bytes: u64,
        descriptor: OwnedFd,
    ) -> Result<vk::DeviceMemory, ImportError> {
        // SAFETY: all three are of this client, which asked for the extension.
        unsafe { import(&self.instance, self.physical, &self.device, &segment(handle, bytes), descriptor) }
    }

    fn buffer(&self, bytes: u64, external: bool) -> vk::Buffer {
        let mut of_others = vk::ExternalMemoryBufferCreateInfo::default()
            .handle_types(vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD);
        let mut create = vk::BufferCreateInfo::default().size(bytes).usage(
            vk::BufferUsageFlags::TRANSFER_SRC
                | vk::BufferUsageFlags::TRANSFER_DST
                | vk::BufferUsageFlags::STORAGE_BUFFER,
        );
        if external {
            create = create.push_next(&mut of_others);
        }
        // SAFETY: the device lives.
        unsafe { self.device.create_buffer(&create, None).unwrap() }
    }

    /// Copies between two buffers, the second or the first of which is in memory that the processor sees.
    fn through_host(&self, other: vk::Buffer, offset: u64, bytes: &mut [u8], write: bool) {
        use vk::MemoryPropertyFlags as Flags;
        let size = bytes.len() as u64;
        let host = self.buffer(size, false);
        // SAFETY: everything is this client's own, used by this thread alone, waited for and destroyed here.
        unsafe {
            let device = &self.device;
            let needs = device.get_buffer_memory_requirements(host);
            let all = self.instance.get_physical_device_memory_properties(self.physical);
            let fits = |(index, one): &(u32, &vk::MemoryType)| {
                needs.memory_type_bits & 1 << index != 0
                    && one.property_flags.contains(Flags::HOST_VISIBLE | Flags::HOST_COHERENT)
            };
            let (kind, _) = (0..).zip(all.memory_types_as_slice()).find(fits).unwrap();
            let allocate =
                vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(kind);
            let memory = device.allocate_memory(&allocate, None).unwrap();
            device.bind_buffer_memory(host, memory, 0).unwrap();
            let mapped =
                device.map_memory(memory, 0, size, vk::MemoryMapFlags::empty()).unwrap().cast::<u8>();
            let region = |src_offset, dst_offset| [vk::BufferCopy { src_offset, dst_offset, size }];
            let pool = vk::CommandPoolCreateInfo::default().queue_family_index(self.family);
            let pool = device.create_command_pool(&pool, None).unwrap();
            let commands =
                vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
            let commands = device.allocate_command_buffers(&commands).unwrap();
            device.begin_command_buffer(commands[0], &vk::CommandBufferBeginInfo::default()).unwrap();
            if write {
                mapped.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                device.cmd_copy_buffer(commands[0], host, other, &region(0, offset));
            } else {
                device.cmd_copy_buffer(commands[0], other, host, &region(offset, 0));
            }
            device.end_command_buffer(commands[0]).unwrap();
            let submit = vk::SubmitInfo::default().command_buffers(&commands);
            device.queue_submit(self.queue, &[submit], vk::Fence::null()).unwrap();
            device.device_wait_idle().unwrap();
            if !write {
                mapped.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len());
            }
            device.destroy_command_pool(pool, None);
            device.destroy_buffer(host, None);
            device.free_memory(memory, None);
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // SAFETY: what was made from them is gone: an import owns its client. The library stays until they are.
        unsafe {
            self.device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
        let _ = &self.entry;
    }
}

impl Imported {
    pub fn new(exported: Exported, bytes: u64) -> Self {
        let client = Client::open(&exported.handle, true).expect("the adapter is there for every process");
        let memory = client.import(exported.handle, bytes, exported.descriptor).unwrap();
        let buffer = client.buffer(bytes, true);
        // SAFETY: both are new and this client's.
        unsafe { client.device.bind_buffer_memory(buffer, memory, 0).unwrap() };
        Self { client, memory, buffer, bytes }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0xAA; self.bytes as usize];
        self.client.through_host(self.buffer, 0, &mut bytes, false);
        bytes
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.client.through_host(self.buffer, offset as u64, &mut bytes.to_vec(), true);
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        // SAFETY: each use has been waited for.
        unsafe {
            self.client.device.destroy_buffer(self.buffer, None);
            self.client.device.free_memory(self.memory, None);
        }
    }
}

/// What happens on another adapter, with another memory type, with another kind of descriptor.
pub fn assert_refused_elsewhere(exported: &Exported, bytes: u64) {
    let descriptor = || exported.descriptor.try_clone().unwrap();
    if let Some(other) = Client::open(&exported.handle, false) {
        let refused = other.import(exported.handle.clone(), bytes, descriptor());
        assert!(matches!(refused, Err(ImportError::OtherDevice { .. })), "{refused:?}");
    }
    let client = Client::open(&exported.handle, true).unwrap();
    let mut handle = exported.handle.clone();
    if let Handle::VulkanOpaqueFd { memory_type_index, .. } = &mut handle {
        *memory_type_index = 99;
    }
    assert!(matches!(client.import(handle, bytes, descriptor()), Err(ImportError::MemoryType(99))));
    assert!(matches!(client.import(Handle::Memfd, bytes, descriptor()), Err(ImportError::OtherHandle)));
}
