//! What bare programs get from Vulkan drivers: one `vkCmdCopyBuffer`, and the plain way from one device to another. And what
//! a program waits for that has memory of vramd's handed to it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use ash::vk;
use vramd_api::Bytes;
use vramd_api::attach::{Attach, HandleType};

/// What goes through host memory at once on the plain way: it stays in the processor's cache.
const PART: u64 = 4 << 20;

/// An adapter, opened. Nothing is ever closed: the process ends.
struct Card {
    instance: ash::Instance,
    physical: vk::PhysicalDevice,
    device: ash::Device,
    queue: vk::Queue,
    commands: vk::CommandBuffer,
    fence: vk::Fence,
    name: String,
}

/// A buffer, and where the processor sees it if it does.
#[derive(Clone, Copy)]
struct Buffer {
    raw: vk::Buffer,
    memory: vk::DeviceMemory,
}

impl Card {
    /// The adapter with that number, in the loader's order.
    fn open(ordinal: usize) -> anyhow::Result<Self> {
        Self::open_with(ordinal, &[])
    }

    fn open_with(ordinal: usize, extensions: &[*const std::ffi::c_char]) -> anyhow::Result<Self> {
        // SAFETY: a straight line: everything is made in order, used by this thread alone, and the process ends after it.
        unsafe {
            let entry = ash::Entry::load()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
            let create = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry.create_instance(&create, None)?;
            std::mem::forget(entry);
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
            let create = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queues)
                .enabled_extension_names(extensions);
            let device = instance.create_device(physical, &create, None)?;
            let queue = device.get_device_queue(family, 0);
            let create = vk::CommandPoolCreateInfo::default()
                .queue_family_index(family)
                .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER);
            let pool = device.create_command_pool(&create, None)?;
            let allocate =
                vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
            let commands = device.allocate_command_buffers(&allocate)?[0];
            let fence = device.create_fence(&vk::FenceCreateInfo::default(), None)?;
            Ok(Self { instance, physical, device, queue, commands, fence, name })
        }
    }

    /// Memory with these properties, and pages that are there.
    fn buffer(&self, bytes: u64, wanted: vk::MemoryPropertyFlags) -> anyhow::Result<Buffer> {
        let usage = vk::BufferUsageFlags::TRANSFER_SRC | vk::BufferUsageFlags::TRANSFER_DST;
        // SAFETY: as in `open`.
        let made = unsafe {
            let create = vk::BufferCreateInfo::default().size(bytes).usage(usage);
            let raw = self.device.create_buffer(&create, None)?;
            let needs = self.device.get_buffer_memory_requirements(raw);
            let types = self.instance.get_physical_device_memory_properties(self.physical);
            let fits = |(index, one): &(u32, &vk::MemoryType)| {
                needs.memory_type_bits & 1 << index != 0 && one.property_flags.contains(wanted)
            };
            let found = (0..).zip(types.memory_types_as_slice()).find(fits);
            let (kind, _) = found.context("no memory fits")?;
            let allocate =
                vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(kind);
            let memory = self.device.allocate_memory(&allocate, None)?;
            self.device.bind_buffer_memory(raw, memory, 0)?;
            Buffer { raw, memory }
        };
        self.run(|device, commands| {
            // SAFETY: as in `open`.
            unsafe { device.cmd_fill_buffer(commands, made.raw, 0, vk::WHOLE_SIZE, 1) };
        })?;
        Ok(made)
    }

    /// Records, submits and waits.
    fn run(&self, record: impl FnOnce(&ash::Device, vk::CommandBuffer)) -> anyhow::Result<()> {
        let commands = [self.commands];
        let submit = [vk::SubmitInfo::default().command_buffers(&commands)];
        // SAFETY: as in `open`.
        unsafe {
            self.device.begin_command_buffer(self.commands, &vk::CommandBufferBeginInfo::default())?;
            record(&self.device, self.commands);
            self.device.end_command_buffer(self.commands)?;
            self.device.reset_fences(&[self.fence])?;
            self.device.queue_submit(self.queue, &submit, self.fence)?;
            self.device.wait_for_fences(&[self.fence], true, u64::MAX)?;
        }
        Ok(())
    }

    fn copy(&self, from: (Buffer, u64), to: (Buffer, u64), size: u64) -> anyhow::Result<()> {
        let region = [vk::BufferCopy { src_offset: from.1, dst_offset: to.1, size }];
        // SAFETY: as in `open`.
        self.run(|device, commands| unsafe {
            device.cmd_copy_buffer(commands, from.0.raw, to.0.raw, &region);
        })
    }
}

/// Copies so many bytes from one buffer to another of an adapter; answers with bytes per second of each round, the first of
/// which warms up and is left out.
pub fn run(ordinal: usize, bytes: Bytes, rounds: usize) -> anyhow::Result<serde_json::Value> {
    let card = Card::open(ordinal)?;
    let [from, to] = [(); 2].map(|()| card.buffer(bytes.get(), vk::MemoryPropertyFlags::DEVICE_LOCAL));
    let (from, to) = (from?, to?);
    let rates = rates(bytes, rounds, || card.copy((from, 0), (to, 0), bytes.get()))?;
    Ok(serde_json::json!({ "name": card.name, "bytesPerSecond": rates }))
}

/// Copies so many bytes to another adapter: from the first into host memory, there to that of the second, and from there, one
/// after the other.
pub fn run_between(from: usize, to: usize, bytes: Bytes, rounds: usize) -> anyhow::Result<serde_json::Value> {
    use vk::MemoryPropertyFlags as Flags;
    let seen = Flags::HOST_VISIBLE | Flags::HOST_COHERENT;
    let (from, to) = (Card::open(from)?, Card::open(to)?);
    let source = from.buffer(bytes.get(), Flags::DEVICE_LOCAL)?;
    let target = to.buffer(bytes.get(), Flags::DEVICE_LOCAL)?;
    let (out, into) = (from.buffer(PART, seen)?, to.buffer(PART, seen)?);
    ensure!(bytes.get().is_multiple_of(PART), "whole parts only");
    // SAFETY: as in `open`; both mappings have that many bytes.
    let (read, written) = unsafe {
        let map = |card: &Card, memory| card.device.map_memory(memory, 0, PART, vk::MemoryMapFlags::empty());
        (map(&from, out.memory)?.cast::<u8>(), map(&to, into.memory)?.cast::<u8>())
    };
    let rates = rates(bytes, rounds, || {
        for offset in (0..bytes.get()).step_by(PART as usize) {
            from.copy((source, offset), (out, 0), PART)?;
            // SAFETY: as above, and no device uses them now.
            unsafe { written.copy_from_nonoverlapping(read, PART as usize) };
            to.copy((into, 0), (target, offset), PART)?;
        }
        Ok(())
    })?;
    Ok(serde_json::json!({ "names": [from.name, to.name], "bytesPerSecond": rates }))
}

/// Attaches allocations of an adapter one after the other and imports them; answers with the milliseconds of each round, the
/// first of which warms up and is left out: for the daemon to hand all out, and for the driver to import them.
pub fn run_attach(
    ordinal: usize,
    socket: &Path,
    allocations: &[String],
    rounds: usize,
) -> anyhow::Result<serde_json::Value> {
    let card = Card::open_with(ordinal, &[ash::khr::external_memory_fd::NAME.as_ptr()])?;
    let (mut handed, mut imported, mut descriptors) = (Vec::new(), Vec::new(), 0);
    for round in 0..=rounds {
        let (mut asking, mut importing) = (Duration::ZERO, Duration::ZERO);
        let mut held = Vec::new();
        for id in allocations {
            let request = Attach {
                allocation_id: Some(id.parse()?),
                handles: Some(vec![HandleType::VulkanOpaqueFd]),
                ..Attach::default()
            };
            let begun = Instant::now();
            let mut attachment = vramd_attach::attach(socket, &request)?;
            asking += begun.elapsed();
            descriptors = attachment.descriptors.len();
            let begun = Instant::now();
            for (descriptor, segment) in attachment.descriptors.drain(..).zip(&attachment.attached.segments) {
                let Card { instance, physical, device, .. } = &card;
                // SAFETY: the three belong together and live, and the device has the extension.
                let memory = unsafe {
                    vramd_attach::vulkan::import(instance, *physical, device, segment, descriptor)
                }?;
                held.push(memory);
            }
            importing += begun.elapsed();
        }
        for memory in held {
            // SAFETY: nothing uses it.
            unsafe { card.device.free_memory(memory, None) };
        }
        if round > 0 {
            handed.push(asking.as_secs_f64() * 1e3);
            imported.push(importing.as_secs_f64() * 1e3);
        }
    }
    Ok(serde_json::json!({
        "name": card.name,
        "attachMilliseconds": handed,
        "importMilliseconds": imported,
        "descriptorsAMessage": descriptors,
    }))
}

fn rates(
    bytes: Bytes,
    rounds: usize,
    mut copy: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<f64>> {
    let mut rates = Vec::new();
    for round in 0..=rounds {
        let begun = Instant::now();
        copy()?;
        if round > 0 {
            rates.push(bytes.get() as f64 / begun.elapsed().as_secs_f64());
        }
    }
    Ok(rates)
}
