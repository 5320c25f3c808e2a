//! The peers that need a Vulkan device: `gpu-allocator`, and VMA's own defragmentation. Mesa's software device is
//! enough; nothing here computes.

use std::sync::{Arc, LazyLock};
use std::time::Instant;

use anyhow::{Context, Result};
use ash::vk;
use gpu_allocator::MemoryLocation;
use gpu_allocator::vulkan as gpu;
use vk_mem::{Alloc, AllocationCreateInfo, AllocatorCreateInfo, PoolCreateInfo};
use vramd_core::compaction::{Block, Pool};

use crate::mixes::Random;
use crate::peers::{Peer, UNIT};

pub struct Vulkan {
    /// Keeps the library loaded.
    _entry: ash::Entry,
    instance: ash::Instance,
    physical: vk::PhysicalDevice,
    device: ash::Device,
}

/// Lives as long as the program; what went wrong instead is told to people.
static VULKAN: LazyLock<Result<Vulkan, String>> =
    LazyLock::new(|| Vulkan::open().map_err(|error| format!("no Vulkan device: {error:#}")));

pub fn open() -> Result<&'static Vulkan, &'static str> {
    VULKAN.as_ref().map_err(String::as_str)
}

impl Vulkan {
    fn open() -> Result<Self> {
        // SAFETY: the system's own loader.
        let entry = unsafe { ash::Entry::load() }.context("no Vulkan loader")?;
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
        let create = vk::InstanceCreateInfo::default().application_info(&application);
        // SAFETY: the structures live through each call, and each handle is of the one before.
        unsafe {
            let instance = entry.create_instance(&create, None)?;
            let physical = instance.enumerate_physical_devices()?;
            let kind =
                |device: &vk::PhysicalDevice| instance.get_physical_device_properties(*device).device_type;
            let software = physical.into_iter().find(|device| kind(device) == vk::PhysicalDeviceType::CPU);
            let physical = software.context("Mesa's software device is not installed")?;
            let priorities = [1.0];
            let queues = [vk::DeviceQueueCreateInfo::default().queue_priorities(&priorities)];
            let create = vk::DeviceCreateInfo::default().queue_create_infos(&queues);
            let device = instance.create_device(physical, &create, None)?;
            Ok(Self { _entry: entry, instance, physical, device })
        }
    }
}

/// It takes memory from the device in pieces of its own size, so it has no pool to fill.
pub struct GpuAllocator(gpu::Allocator);

impl Peer for GpuAllocator {
    type Block = gpu::Allocation;

    fn new(_: u64) -> Self {
        let vulkan = open().expect("the caller looked before");
        let mut quiet = gpu_allocator::AllocatorDebugSettings::default();
        quiet.log_leaks_on_shutdown = false;
        let allocator = gpu::Allocator::new(&gpu::AllocatorCreateDesc {
            instance: vulkan.instance.clone(),
            device: vulkan.device.clone(),
            physical_device: vulkan.physical,
            debug_settings: quiet,
            buffer_device_address: false,
            allocation_sizes: gpu_allocator::AllocationSizes::default(),
        });
        Self(allocator.expect("the device has memory"))
    }

    fn take(&mut self, bytes: u64) -> Option<Self::Block> {
        let requirements =
            vk::MemoryRequirements { size: bytes, alignment: UNIT, memory_type_bits: u32::MAX };
        let request = gpu::AllocationCreateDesc {
            name: "",
            requirements,
            location: MemoryLocation::GpuOnly,
            linear: true,
            allocation_scheme: gpu::AllocationScheme::GpuAllocatorManaged,
        };
        self.0.allocate(&request).ok()
    }

    fn give(&mut self, block: Self::Block) {
        self.0.free(block).expect("the block is of this allocator");
    }
}

pub struct Defragmented {
    /// What was there before, as `vramd` plans on it.
    pub before: Pool,
    pub seconds: f64,
    pub moves: u32,
    pub bytes: u64,
    pub fragmentation: f64,
}

pub const POOL: u64 = 1 << 30;
pub const LIVE: usize = 16 << 10;

/// Fills 1 GiB with blocks of 4 to 128 KiB, frees random ones until 16k are left, and lets VMA's full algorithm
/// defragment; only its own time counts, nothing is copied.
pub fn defragment() -> Result<Defragmented> {
    let vulkan = open().map_err(anyhow::Error::msg)?;
    // SAFETY: the handles live as long as the program; every allocation is freed before its pool and allocator.
    unsafe {
        let create = AllocatorCreateInfo::new(&vulkan.instance, &vulkan.device, vulkan.physical);
        let allocator = Arc::new(vk_mem::Allocator::new(create)?);
        let pool = PoolCreateInfo { block_size: POOL, max_block_count: 1, ..Default::default() };
        let pool = allocator.create_pool(&pool)?;
        let mut random = Random(3);
        let mut live = Vec::new();
        let request = AllocationCreateInfo::default();
        loop {
            let size = block_size(&mut random);
            let requirements = vk::MemoryRequirements { size, alignment: UNIT, memory_type_bits: u32::MAX };
            let Ok(allocation) = pool.allocate_memory(&requirements, &request) else { break };
            live.push(allocation);
        }
        while live.len() > LIVE {
            let mut allocation = live.swap_remove(random.below(live.len()));
            allocator.free_memory(&mut allocation);
        }
        let snapshot = || {
            let blocks = live.iter().zip(0..).map(|(allocation, id)| {
                let info = allocator.get_allocation_info(allocation);
                block(id, info.offset, info.size)
            });
            Pool { id: 0, bytes: POOL, blocks: blocks.collect() }
        };
        let before = snapshot();
        let mut info = zeroed_argument(vk_mem::Allocator::begin_defragmentation);
        info.flags = FULL;
        info.pool = std::mem::transmute_copy(&Alloc::pool(&pool));
        let start = Instant::now();
        let context = allocator.begin_defragmentation(&info)?;
        while context.begin_pass(|_| ()) {}
        let statistics = context.end();
        let seconds = start.elapsed().as_secs_f64();
        let after = vramd_core::compaction::plan(
            &[snapshot()],
            vramd_core::compaction::Bounds { bytes: Some(0), moves: Some(0) },
        );
        for mut allocation in live {
            allocator.free_memory(&mut allocation);
        }
        Ok(Defragmented {
            before,
            seconds,
            moves: statistics.allocationsMoved,
            bytes: statistics.bytesMoved,
            fragmentation: after.before.fragmentation,
        })
    }
}

/// `VMA_DEFRAGMENTATION_FLAG_ALGORITHM_FULL_BIT`: the crate keeps the name to itself.
const FULL: u32 = 4;

/// The argument's type has no name outside of its crate.
///
/// # Safety
/// All zeroes must be a value of it.
unsafe fn zeroed_argument<'a, A, T, R>(_: unsafe fn(&'a A, &T) -> R) -> T {
    // SAFETY: the caller's.
    unsafe { std::mem::zeroed() }
}

pub fn block_size(random: &mut Random) -> u64 {
    crate::mixes::Mix { name: "", least: 4 << 10, most: 128 << 10 }.size(random)
}

pub fn block(id: u64, offset: u64, bytes: u64) -> Block {
    Block { id, offset, bytes, alignment: UNIT, congruence: None, movable: true }
}
