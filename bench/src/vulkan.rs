//! What a bare program gets from a Vulkan driver: one `vkCmdCopyBuffer`, and nothing around it.

use std::time::Instant;

use anyhow::{Context, ensure};
use ash::vk;
use vramd_api::Bytes;

/// Copies so many bytes from one buffer to another of the adapter with that number, in the loader's order; answers with
/// bytes per second of each round, the first of which warms up and is left out.
pub fn run(ordinal: usize, bytes: Bytes, rounds: usize) -> anyhow::Result<serde_json::Value> {
    let bytes = bytes.get();
    // SAFETY: a straight line: everything is made in order, used by this thread alone, and the process ends after it.
    unsafe {
        let entry = ash::Entry::load()?;
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
        let instance =
            entry.create_instance(&vk::InstanceCreateInfo::default().application_info(&application), None)?;
        let physical =
            *instance.enumerate_physical_devices()?.get(ordinal).context("there is no such adapter")?;
        let properties = instance.get_physical_device_properties(physical);
        let name = properties.device_name_as_c_str()?.to_string_lossy().into_owned();
        let families = instance.get_physical_device_queue_family_properties(physical);
        let copies = |family: &vk::QueueFamilyProperties| {
            family
                .queue_flags
                .intersects(vk::QueueFlags::TRANSFER | vk::QueueFlags::COMPUTE | vk::QueueFlags::GRAPHICS)
        };
        let family = families.iter().position(copies).context("no queue copies")? as u32;
        let queues =
            [vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&[1.0])];
        let device = instance.create_device(
            physical,
            &vk::DeviceCreateInfo::default().queue_create_infos(&queues),
            None,
        )?;
        let queue = device.get_device_queue(family, 0);
        let usage = vk::BufferUsageFlags::TRANSFER_SRC | vk::BufferUsageFlags::TRANSFER_DST;
        let mut buffers = [vk::Buffer::null(); 2];
        for buffer in &mut buffers {
            *buffer =
                device.create_buffer(&vk::BufferCreateInfo::default().size(bytes).usage(usage), None)?;
            let needs = device.get_buffer_memory_requirements(*buffer);
            ensure!(needs.memory_type_bits != 0, "no memory fits");
            let allocate = vk::MemoryAllocateInfo::default()
                .allocation_size(needs.size)
                .memory_type_index(needs.memory_type_bits.trailing_zeros());
            let memory = device.allocate_memory(&allocate, None)?;
            device.bind_buffer_memory(*buffer, memory, 0)?;
        }
        let pool = device
            .create_command_pool(&vk::CommandPoolCreateInfo::default().queue_family_index(family), None)?;
        let allocate = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(2);
        let commands = device.allocate_command_buffers(&allocate)?;
        let fence = device.create_fence(&vk::FenceCreateInfo::default(), None)?;
        let begin = vk::CommandBufferBeginInfo::default();
        // Pages that were never written to are not there.
        device.begin_command_buffer(commands[0], &begin)?;
        for buffer in buffers {
            device.cmd_fill_buffer(commands[0], buffer, 0, vk::WHOLE_SIZE, 1);
        }
        device.end_command_buffer(commands[0])?;
        device.begin_command_buffer(commands[1], &begin)?;
        let region = [vk::BufferCopy { src_offset: 0, dst_offset: 0, size: bytes }];
        device.cmd_copy_buffer(commands[1], buffers[0], buffers[1], &region);
        device.end_command_buffer(commands[1])?;
        let mut rates = Vec::new();
        for round in 0..=rounds + 1 {
            let commands = [commands[usize::from(round > 0)]];
            let submit = [vk::SubmitInfo::default().command_buffers(&commands)];
            device.reset_fences(&[fence])?;
            let begun = Instant::now();
            device.queue_submit(queue, &submit, fence)?;
            device.wait_for_fences(&[fence], true, u64::MAX)?;
            if round > 1 {
                rates.push(bytes as f64 / begun.elapsed().as_secs_f64());
            }
        }
        Ok(serde_json::json!({ "name": name, "bytesPerSecond": rates }))
    }
}
