//! What is open in the driver while a device has segments: the logical device, its queue, the staging buffers.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ash::vk;

use super::adapter::{Adapter, BUFFER_USAGE, Instance};
use crate::card::{self, Driver, STAGE_BYTES};
use crate::{Call, DeviceError, ExportAccess, Exported};
use vramd_api::attach::Handle;

/// Staging buffers that wait for the next use; more are made when more threads copy.
const IDLE_STAGES: usize = 8;
/// A card that does nothing for so long will not do it any more.
const PATIENCE_NS: u64 = 60_000_000_000;
const WAIT: &str = "vkWaitSemaphores";
const GET_FD: &str = "vkGetMemoryFdKHR";

/// A failed call of the driver, before it is known what it means.
#[derive(Debug, Clone, Copy)]
pub struct Failed {
    pub native: &'static str,
    pub result: vk::Result,
}

impl Failed {
    pub fn at(native: &'static str) -> impl FnOnce(vk::Result) -> Self {
        move |result| Self { native, result }
    }
}

impl card::Failed for Failed {
    fn explain(self, call: Call, requested: u64, available: u64) -> DeviceError {
        let Self { native, result } = self;
        match result {
            // Whatever the reason: what was waited for may still run, and the device cannot be used any more.
            result if native == WAIT && result != vk::Result::ERROR_DEVICE_LOST => DeviceError::Lost {
                reason: format!("{native}: {result} ({} seconds at most)", PATIENCE_NS / 1_000_000_000),
            },
            vk::Result::ERROR_TOO_MANY_OBJECTS if call == Call::Export => {
                DeviceError::Native { call, native, source: too_many_descriptors() }
            }
            vk::Result::ERROR_OUT_OF_DEVICE_MEMORY
            | vk::Result::ERROR_OUT_OF_HOST_MEMORY
            | vk::Result::ERROR_TOO_MANY_OBJECTS => DeviceError::OutOfMemory { requested, available },
            vk::Result::ERROR_DEVICE_LOST => {
                DeviceError::Lost { reason: format!("{native}: the driver has lost it") }
            }
            result => DeviceError::Native { call, native, source: std::io::Error::other(result) },
        }
    }
}

pub struct Context {
    pub raw: ash::Device,
    queue: Mutex<Queue>,
    /// Counts the submissions that have ended.
    ended: vk::Semaphore,
    family: u32,
    /// Of adapters whose memory can be exported.
    exporter: Option<ash::khr::external_memory_fd::Device>,
    segment_type: u32,
    staging_type: u32,
    idle: Mutex<Vec<Stage>>,
    lost: AtomicBool,
    /// A wait has failed: the driver may use anything that is here still, so that nothing is ever destroyed.
    abandoned: AtomicBool,
    /// It outlives the logical device.
    instance: Arc<Instance>,
}

struct Queue {
    raw: vk::Queue,
    /// How many submissions there were.
    submitted: u64,
}

/// A buffer that the processor sees, and what a copy through it takes. One thread has it at a time.
pub struct Stage {
    pool: vk::CommandPool,
    commands: vk::CommandBuffer,
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    mapped: NonNull<u8>,
}

// SAFETY: the mapping belongs to the process, and `Context` hands a stage to one thread at a time.
unsafe impl Send for Stage {}

/// A buffer over the whole of its own memory.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    pub buffer: vk::Buffer,
    pub memory: vk::DeviceMemory,
}

/// What a buffer and its memory are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Segment,
    Staging,
}

/// A segment's memory, as the driver has it.
pub struct MemoryFacts {
    pub memory_type: u32,
    pub bytes: u64,
}

impl Context {
    fn check_lost(&self) -> Result<(), Failed> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(Failed { native: "vkQueueSubmit", result: vk::Result::ERROR_DEVICE_LOST });
        }
        Ok(())
    }

    /// The types that all buffers of one use can lie in, as bits.
    fn allowed_types(&self, usage: Use) -> Result<u32, Failed> {
        let probe = self.buffer(STAGE_BYTES, usage)?;
        // SAFETY: the buffer was just made and is used nowhere else.
        unsafe {
            let requirements = self.raw.get_buffer_memory_requirements(probe);
            self.raw.destroy_buffer(probe, None);
            Ok(requirements.memory_type_bits)
        }
    }

    fn is_exported(&self, usage: Use) -> bool {
        usage == Use::Segment && self.exporter.is_some()
    }

    fn buffer(&self, bytes: u64, usage: Use) -> Result<vk::Buffer, Failed> {
        let mut external = vk::ExternalMemoryBufferCreateInfo::default()
            .handle_types(vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD);
        let mut create = vk::BufferCreateInfo::default()
            .size(bytes)
            .usage(BUFFER_USAGE)
            .sharing_mode(vk::SharingMode::EXCLUSIVE);
        if self.is_exported(usage) {
            create = create.push_next(&mut external);
        }
        // SAFETY: the device lives.
        unsafe { self.raw.create_buffer(&create, None) }.map_err(Failed::at("vkCreateBuffer"))
    }

    /// A descriptor of a segment's memory, and what its importer has to know beside the adapter.
    #[cfg(unix)]
    fn exported(&self, block: Block) -> Result<(crate::Descriptor, MemoryFacts), Failed> {
        use std::os::fd::FromRawFd as _;
        let unable = Failed { native: GET_FD, result: vk::Result::ERROR_EXTENSION_NOT_PRESENT };
        let exporter = self.exporter.as_ref().ok_or(unable)?;
        let get = vk::MemoryGetFdInfoKHR::default()
            .memory(block.memory)
            .handle_type(vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD);
        // SAFETY: the memory is ours, lives, and was made to be exported so; a descriptor that comes is the caller's.
        let descriptor = unsafe { exporter.get_memory_fd(&get) }.map_err(Failed::at(GET_FD))?;
        if descriptor < 0 {
            return Err(Failed { native: GET_FD, result: vk::Result::ERROR_UNKNOWN });
        }
        // SAFETY: as above.
        let descriptor = unsafe { crate::Descriptor::from_raw_fd(descriptor) };
        // Not every driver does.
        rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC)
            .map_err(|_| Failed { native: GET_FD, result: vk::Result::ERROR_UNKNOWN })?;
        // SAFETY: the buffer lives.
        let bytes = unsafe { self.raw.get_buffer_memory_requirements(block.buffer) }.size;
        Ok((descriptor, MemoryFacts { memory_type: self.segment_type, bytes }))
    }

    /// No adapter is asked for its handles yet: [`Adapter`] says that none exports.
    #[cfg(windows)]
    #[allow(clippy::unused_self, reason = "elsewhere it does")]
    fn exported(&self, _block: Block) -> Result<(crate::Descriptor, MemoryFacts), Failed> {
        Err(Failed { native: GET_FD, result: vk::Result::ERROR_EXTENSION_NOT_PRESENT })
    }

    fn block_of(&self, bytes: u64, usage: Use) -> Result<Block, Failed> {
        let buffer = self.buffer(bytes, usage)?;
        let memory_type = match usage {
            Use::Segment => self.segment_type,
            Use::Staging => self.staging_type,
        };
        let mut export = vk::ExportMemoryAllocateInfo::default()
            .handle_types(vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD);
        // SAFETY: the buffer is new. The driver says how much memory it takes, which may be more than its size.
        let made = unsafe {
            let size = self.raw.get_buffer_memory_requirements(buffer).size;
            let mut allocate =
                vk::MemoryAllocateInfo::default().allocation_size(size).memory_type_index(memory_type);
            if self.is_exported(usage) {
                allocate = allocate.push_next(&mut export);
            }
            self.raw.allocate_memory(&allocate, None).map_err(Failed::at("vkAllocateMemory")).and_then(
                |memory| {
                    let bound = self.raw.bind_buffer_memory(buffer, memory, 0);
                    bound.map(|()| Block { buffer, memory }).map_err(|result| {
                        self.raw.free_memory(memory, None);
                        Failed { native: "vkBindBufferMemory", result }
                    })
                },
            )
        };
        // SAFETY: it was bound to nothing, or to what was just freed.
        made.inspect_err(|_| unsafe { self.raw.destroy_buffer(buffer, None) })
    }

    /// Gives a block back; nothing that was submitted uses it any more.
    fn release(&self, block: Block) {
        if self.abandoned.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: by the caller's word, and everybody has waited for what they submitted; both are ours.
        unsafe {
            self.raw.destroy_buffer(block.buffer, None);
            self.raw.free_memory(block.memory, None);
        }
    }

    fn stages(&self) -> MutexGuard<'_, Vec<Stage>> {
        // No operation under this lock can leave the list half changed.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stage(&self) -> Result<Stage, Failed> {
        let block = self.block_of(STAGE_BYTES, Use::Staging)?;
        self.stage_over(block).inspect_err(|_| self.release(block))
    }

    fn stage_over(&self, Block { buffer, memory }: Block) -> Result<Stage, Failed> {
        let create = vk::CommandPoolCreateInfo::default()
            .queue_family_index(self.family)
            .flags(vk::CommandPoolCreateFlags::TRANSIENT);
        // SAFETY: the memory is new, visible to the processor, and mapped once. What an error leaves behind of a pool is
        // destroyed here, and nothing has used it.
        unsafe {
            let mapped = self
                .raw
                .map_memory(memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty())
                .map_err(Failed::at("vkMapMemory"))?;
            // Drivers have been seen that answer success with no address.
            let mapped =
                NonNull::new(mapped.cast::<u8>()).filter(|mapped| mapped.as_ptr().addr() != usize::MAX);
            let mapped = mapped
                .ok_or(Failed { native: "vkMapMemory", result: vk::Result::ERROR_MEMORY_MAP_FAILED })?;
            let pool =
                self.raw.create_command_pool(&create, None).map_err(Failed::at("vkCreateCommandPool"))?;
            let allocate =
                vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
            let made = self.raw.allocate_command_buffers(&allocate);
            let made = made.map(|commands| Stage { pool, commands: commands[0], buffer, memory, mapped });
            let made = made.map_err(Failed::at("vkAllocateCommandBuffers"));
            made.inspect_err(|_| self.raw.destroy_command_pool(pool, None))
        }
    }

    fn close(&self, stage: &Stage) {
        if self.abandoned.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: whoever had it has waited for what it submitted, or the device is lost, which ends everything.
        unsafe { self.raw.destroy_command_pool(stage.pool, None) };
        self.release(Block { buffer: stage.buffer, memory: stage.memory });
    }
}

impl Driver for Context {
    type Adapter = Adapter;
    type Block = Block;
    type Stage = Stage;
    type Failed = Failed;

    fn open(adapter: &Adapter) -> Result<Self, Failed> {
        let queues = [vk::DeviceQueueCreateInfo::default()
            .queue_family_index(adapter.family)
            .queue_priorities(&[1.0])];
        let extensions = [ash::khr::external_memory_fd::NAME.as_ptr()];
        // Every driver of Vulkan 1.2 has it.
        let mut timeline = vk::PhysicalDeviceTimelineSemaphoreFeatures::default().timeline_semaphore(true);
        let mut create = vk::DeviceCreateInfo::default().queue_create_infos(&queues).push_next(&mut timeline);
        if adapter.exports {
            create = create.enabled_extension_names(&extensions);
        }
        let instance = &adapter.instance.raw;
        // SAFETY: the adapter is of this instance; what `create` points to lives until the call returns.
        let raw = unsafe { instance.create_device(adapter.physical, &create, None) }
            .map_err(Failed::at("vkCreateDevice"))?;
        // SAFETY: one queue of that family was asked for.
        let queue = Queue { raw: unsafe { raw.get_device_queue(adapter.family, 0) }, submitted: 0 };
        let exporter = adapter.exports.then(|| ash::khr::external_memory_fd::Device::new(instance, &raw));
        let mut context = Self {
            raw,
            exporter,
            queue: Mutex::new(queue),
            ended: vk::Semaphore::null(),
            family: adapter.family,
            segment_type: 0,
            staging_type: 0,
            idle: Mutex::default(),
            lost: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            instance: adapter.instance.clone(),
        };
        let mut kind = vk::SemaphoreTypeCreateInfo::default()
            .semaphore_type(vk::SemaphoreType::TIMELINE)
            .initial_value(0);
        let counter = vk::SemaphoreCreateInfo::default().push_next(&mut kind);
        // SAFETY: the device was opened for semaphores that count.
        context.ended = unsafe { context.raw.create_semaphore(&counter, None) }
            .map_err(Failed::at("vkCreateSemaphore"))?;
        let unfit = || Failed {
            native: "vkGetBufferMemoryRequirements",
            result: vk::Result::ERROR_FEATURE_NOT_PRESENT,
        };
        context.segment_type =
            adapter.segment_type(context.allowed_types(Use::Segment)?).ok_or_else(unfit)?;
        context.staging_type =
            adapter.staging_type(context.allowed_types(Use::Staging)?).ok_or_else(unfit)?;
        Ok(context)
    }

    fn available_bytes(adapter: &Adapter, _held: u64) -> Option<u64> {
        adapter.available_bytes()
    }

    fn block(&self, bytes: u64) -> Result<Block, Failed> {
        self.block_of(bytes, Use::Segment)
    }

    fn free(&self, block: &mut Block) {
        self.release(*block);
    }

    fn staged<T>(&self, work: impl FnOnce(&mut Stage) -> Result<T, Failed>) -> Result<T, Failed> {
        self.check_lost()?;
        let idle = self.stages().pop();
        let mut stage = match idle {
            Some(stage) => stage,
            None => self.stage()?,
        };
        let done = work(&mut stage);
        if let Err(Failed { native, result }) = done {
            let gone = result == vk::Result::ERROR_DEVICE_LOST;
            self.abandoned.fetch_or(native == WAIT && !gone, Ordering::Relaxed);
            self.lost.fetch_or(native == WAIT || gone, Ordering::Relaxed);
        }
        let mut idle = self.stages();
        if idle.len() < IDLE_STAGES && !self.lost.load(Ordering::Relaxed) {
            idle.push(stage);
        } else {
            drop(idle);
            self.close(&stage);
        }
        done
    }

    fn bytes(stage: &mut Stage, bytes: usize) -> &mut [u8] {
        assert!(bytes as u64 <= STAGE_BYTES);
        // SAFETY: mapped and coherent; what was submitted with this stage has ended, so that nobody else uses it.
        unsafe { std::slice::from_raw_parts_mut(stage.mapped.as_ptr(), bytes) }
    }

    fn push(&self, stage: &mut Stage, (to, offset): (&Block, u64), bytes: u64) -> Result<(), Failed> {
        stage.copy(self, (stage.buffer, 0), (to.buffer, offset), bytes)
    }

    fn pull(&self, stage: &mut Stage, (from, offset): (&Block, u64), bytes: u64) -> Result<(), Failed> {
        stage.copy(self, (from.buffer, offset), (stage.buffer, 0), bytes)
    }

    fn copy(
        &self,
        stage: &mut Stage,
        from: (&Block, u64),
        to: (&Block, u64),
        bytes: u64,
    ) -> Result<(), Failed> {
        stage.copy(self, (from.0.buffer, from.1), (to.0.buffer, to.1), bytes)
    }

    fn zero(&self, stage: &mut Stage, (at, offset): (&Block, u64), bytes: u64) -> Result<(), Failed> {
        // SAFETY: as for `Stage::copy`.
        stage.submit(self, || unsafe {
            self.raw.cmd_fill_buffer(stage.commands, at.buffer, offset, bytes, 0);
        })
    }

    fn export(&self, adapter: &Adapter, block: &Block, _: ExportAccess) -> Result<Exported, Failed> {
        let (descriptor, memory) = self.exported(*block)?;
        let handle = Handle::VulkanOpaqueFd {
            device_uuid: adapter.uuid,
            driver_uuid: adapter.driver_uuid,
            memory_type_index: memory.memory_type,
            allocation_bytes: memory.bytes,
        };
        Ok(Exported { descriptor, handle })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.abandoned.load(Ordering::Relaxed) {
            return std::mem::forget(self.instance.clone());
        }
        for stage in std::mem::take(&mut *self.stages()) {
            self.close(&stage);
        }
        // SAFETY: the last segment is gone, and nobody has a stage: what was submitted has been waited for, and everything
        // that was made from it is destroyed.
        unsafe {
            self.raw.destroy_semaphore(self.ended, None);
            self.raw.destroy_device(None);
        }
    }
}

impl Stage {
    /// Copies between two places that do not overlap.
    fn copy(
        &self,
        context: &Context,
        (from, from_offset): (vk::Buffer, u64),
        (to, to_offset): (vk::Buffer, u64),
        bytes: u64,
    ) -> Result<(), Failed> {
        let region = vk::BufferCopy { src_offset: from_offset, dst_offset: to_offset, size: bytes };
        // SAFETY: the caller holds both buffers until this returns, and the table has checked the ranges.
        self.submit(context, || unsafe { context.raw.cmd_copy_buffer(self.commands, from, to, &[region]) })
    }

    fn submit(&self, context: &Context, record: impl FnOnce()) -> Result<(), Failed> {
        let raw = &context.raw;
        let begin = vk::CommandBufferBeginInfo::default().flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
        // What was written before is seen, and what is written here is seen by the processor and by what comes later.
        let before = [vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::MEMORY_WRITE)
            .dst_access_mask(vk::AccessFlags::MEMORY_READ | vk::AccessFlags::MEMORY_WRITE)];
        let after = [vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::TRANSFER_WRITE)
            .dst_access_mask(vk::AccessFlags::HOST_READ | vk::AccessFlags::HOST_WRITE)];
        let (all, transfer, host) = (
            vk::PipelineStageFlags::ALL_COMMANDS,
            vk::PipelineStageFlags::TRANSFER,
            vk::PipelineStageFlags::HOST,
        );
        let none = vk::DependencyFlags::empty();
        let commands = [self.commands];
        let ended = [context.ended];
        // SAFETY: the stage is this thread's alone, so its pool and commands are, and what was submitted with them has ended;
        // the queue is locked for the submission, so that the counter only grows.
        unsafe {
            raw.reset_command_pool(self.pool, vk::CommandPoolResetFlags::empty())
                .map_err(Failed::at("vkResetCommandPool"))?;
            raw.begin_command_buffer(self.commands, &begin).map_err(Failed::at("vkBeginCommandBuffer"))?;
            raw.cmd_pipeline_barrier(self.commands, all, transfer, none, &before, &[], &[]);
            record();
            raw.cmd_pipeline_barrier(self.commands, transfer, host, none, &after, &[], &[]);
            raw.end_command_buffer(self.commands).map_err(Failed::at("vkEndCommandBuffer"))?;
            let number = {
                let mut queue = context.queue.lock().unwrap_or_else(PoisonError::into_inner);
                // A failed submission leaves a gap.
                queue.submitted += 1;
                let number = [queue.submitted];
                let mut signal = vk::TimelineSemaphoreSubmitInfo::default().signal_semaphore_values(&number);
                let submit = vk::SubmitInfo::default()
                    .command_buffers(&commands)
                    .signal_semaphores(&ended)
                    .push_next(&mut signal);
                raw.queue_submit(queue.raw, &[submit], vk::Fence::null())
                    .map_err(Failed::at("vkQueueSubmit"))?;
                number
            };
            let wait = vk::SemaphoreWaitInfo::default().semaphores(&ended).values(&number);
            raw.wait_semaphores(&wait, PATIENCE_NS).map_err(Failed::at(WAIT))
        }
    }
}

#[cfg(unix)]
fn too_many_descriptors() -> std::io::Error {
    rustix::io::Errno::MFILE.into()
}

#[cfg(windows)]
fn too_many_descriptors() -> std::io::Error {
    let code = windows::Win32::Foundation::ERROR_TOO_MANY_OPEN_FILES;
    std::io::Error::from_raw_os_error(code.0.cast_signed())
}
