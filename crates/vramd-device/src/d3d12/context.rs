//! What is open in the driver while a device has segments: the Direct3D device, its copy queue, the staging buffers.

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::os::windows::io::{AsRawHandle as _, FromRawHandle as _, OwnedHandle};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vramd_api::attach::Handle;
use vramd_windows::system;
use windows::Win32::Foundation::{E_OUTOFMEMORY, GENERIC_ALL, HANDLE, WAIT_OBJECT_0};
use windows::Win32::Graphics::Direct3D12::{
    D3D12_COMMAND_LIST_TYPE_COPY, D3D12_COMMAND_QUEUE_DESC, D3D12_CPU_PAGE_PROPERTY_WRITE_BACK,
    D3D12_FENCE_FLAG_NONE, D3D12_HEAP_DESC, D3D12_HEAP_FLAG_ALLOW_ONLY_BUFFERS, D3D12_HEAP_FLAG_SHARED,
    D3D12_HEAP_FLAGS, D3D12_HEAP_PROPERTIES, D3D12_HEAP_TYPE_CUSTOM, D3D12_HEAP_TYPE_DEFAULT,
    D3D12_MEMORY_POOL_L0, D3D12_RESOURCE_DESC, D3D12_RESOURCE_DIMENSION_BUFFER, D3D12_RESOURCE_STATE_COMMON,
    D3D12_TEXTURE_LAYOUT_ROW_MAJOR, ID3D12CommandAllocator, ID3D12CommandList, ID3D12CommandQueue,
    ID3D12Device, ID3D12Fence, ID3D12GraphicsCommandList, ID3D12Heap, ID3D12PipelineState, ID3D12Resource,
};
use windows::Win32::Graphics::Dxgi::Common::{DXGI_FORMAT_UNKNOWN, DXGI_SAMPLE_DESC};
use windows::Win32::Graphics::Dxgi::{
    DXGI_ERROR_DEVICE_HUNG, DXGI_ERROR_DEVICE_REMOVED, DXGI_ERROR_DEVICE_RESET,
    DXGI_ERROR_DRIVER_INTERNAL_ERROR,
};
use windows::Win32::System::Threading::{CreateEventW, WaitForSingleObject};
use windows::core::{Error, HRESULT, Interface as _, PCWSTR};

use super::adapter::Adapter;
use crate::card::{self, Driver, STAGE_BYTES};
use crate::{Call, Descriptor, DeviceError, ExportAccess, Exported};

/// Staging buffers that wait for the next use; more are made when more threads copy.
const IDLE_STAGES: usize = 8;
/// A card that does nothing for so long will not do it any more.
const PATIENCE_MS: u32 = 60_000;
const WAIT: &str = "WaitForSingleObject";
const REMOVED: &str = "GetDeviceRemovedReason";

/// A failed call of the driver, before it is known what it means.
#[derive(Debug, Clone)]
pub struct Failed {
    native: &'static str,
    pub(super) error: Error,
}

impl Failed {
    pub(super) fn at(native: &'static str) -> impl FnOnce(Error) -> Self {
        move |error| Self { native, error }
    }

    /// Whatever reason the device gives for being gone, it is gone.
    fn is_lost(&self) -> bool {
        let codes = [
            DXGI_ERROR_DEVICE_REMOVED,
            DXGI_ERROR_DEVICE_RESET,
            DXGI_ERROR_DEVICE_HUNG,
            DXGI_ERROR_DRIVER_INTERNAL_ERROR,
        ];
        self.native == REMOVED || codes.contains(&self.error.code())
    }

    /// Whatever the reason: what was waited for may still run, and the device cannot be used any more.
    fn is_wait(&self) -> bool {
        self.native == WAIT
    }
}

impl card::Failed for Failed {
    fn explain(self, call: Call, requested: u64, available: u64) -> DeviceError {
        let native = self.native;
        if self.is_lost() {
            return DeviceError::Lost { reason: format!("{native}: {}", self.error.message()) };
        }
        if self.is_wait() {
            let seconds = PATIENCE_MS / 1000;
            return DeviceError::Lost { reason: format!("{native}: nothing ended within {seconds} seconds") };
        }
        let source = system(self.error.clone());
        if self.error.code() == E_OUTOFMEMORY || source.kind() == std::io::ErrorKind::OutOfMemory {
            return DeviceError::OutOfMemory { requested, available };
        }
        DeviceError::Native { call, native, source }
    }
}

pub struct Context {
    device: ManuallyDrop<ID3D12Device>,
    queue: ManuallyDrop<ID3D12CommandQueue>,
    shares: bool,
    idle: Mutex<Vec<Stage>>,
    lost: AtomicBool,
    /// A wait has failed: the driver may use anything that is here still, so that nothing is ever given back.
    abandoned: AtomicBool,
}

/// A heap, and a buffer over all of it.
pub struct Block {
    heap: ManuallyDrop<ID3D12Heap>,
    buffer: ManuallyDrop<ID3D12Resource>,
}

/// A buffer that the processor sees, and what a copy through it takes. One thread has it at a time.
pub struct Stage {
    allocator: ManuallyDrop<ID3D12CommandAllocator>,
    commands: ManuallyDrop<ID3D12GraphicsCommandList>,
    fence: ManuallyDrop<ID3D12Fence>,
    block: Block,
    mapped: NonNull<u8>,
    /// What the fence comes to next.
    next: AtomicU64,
    done: OwnedHandle,
}

// SAFETY: the interfaces may be called from any thread, the mapping belongs to the process, and `Context` hands a stage to
// one thread at a time.
unsafe impl Send for Stage {}

impl Context {
    fn check_lost(&self) -> Result<(), Failed> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(Failed::at("ExecuteCommandLists")(DXGI_ERROR_DEVICE_REMOVED.into()));
        }
        Ok(())
    }

    fn block_in(
        &self,
        bytes: u64,
        heap: D3D12_HEAP_PROPERTIES,
        flags: D3D12_HEAP_FLAGS,
    ) -> Result<Block, Failed> {
        // SAFETY: what the descriptions point to is nothing, and the answers are ours.
        unsafe {
            let heap = heap_of(&self.device, bytes, heap, flags)?;
            let mut buffer: Option<ID3D12Resource> = None;
            let facts = buffer_facts(bytes);
            self.device
                .CreatePlacedResource(
                    &heap,
                    0,
                    &raw const facts,
                    D3D12_RESOURCE_STATE_COMMON,
                    None,
                    &raw mut buffer,
                )
                .map_err(Failed::at("CreatePlacedResource"))?;
            let buffer = there(buffer, "CreatePlacedResource")?;
            Ok(Block { heap: ManuallyDrop::new(heap), buffer: ManuallyDrop::new(buffer) })
        }
    }

    fn stages(&self) -> MutexGuard<'_, Vec<Stage>> {
        // No operation under this lock can leave the list half changed.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stage(&self) -> Result<Stage, Failed> {
        let heap = D3D12_HEAP_PROPERTIES {
            Type: D3D12_HEAP_TYPE_CUSTOM,
            CPUPageProperty: D3D12_CPU_PAGE_PROPERTY_WRITE_BACK,
            MemoryPoolPreference: D3D12_MEMORY_POOL_L0,
            ..D3D12_HEAP_PROPERTIES::default()
        };
        let mut block = self.block_in(STAGE_BYTES, heap, D3D12_HEAP_FLAG_ALLOW_ONLY_BUFFERS)?;
        self.stage_over(&block).inspect_err(|_| self.free(&mut block)).map(|parts| {
            let (allocator, commands, fence, mapped, done) = parts;
            Stage {
                allocator: ManuallyDrop::new(allocator),
                commands: ManuallyDrop::new(commands),
                fence: ManuallyDrop::new(fence),
                block,
                mapped,
                next: AtomicU64::new(1),
                done,
            }
        })
    }

    #[allow(clippy::type_complexity, reason = "the parts of one structure")]
    fn stage_over(
        &self,
        block: &Block,
    ) -> Result<
        (ID3D12CommandAllocator, ID3D12GraphicsCommandList, ID3D12Fence, NonNull<u8>, OwnedHandle),
        Failed,
    > {
        let copy = D3D12_COMMAND_LIST_TYPE_COPY;
        // SAFETY: the buffer is new, seen by the processor, and mapped once; the answers are ours.
        unsafe {
            let mut mapped: *mut c_void = std::ptr::null_mut();
            block.buffer.Map(0, None, Some(&raw mut mapped)).map_err(Failed::at("Map"))?;
            let mapped = there(NonNull::new(mapped.cast::<u8>()), "Map")?;
            let allocator: ID3D12CommandAllocator =
                self.device.CreateCommandAllocator(copy).map_err(Failed::at("CreateCommandAllocator"))?;
            let none: Option<&ID3D12PipelineState> = None;
            let commands: ID3D12GraphicsCommandList = self
                .device
                .CreateCommandList(0, copy, &allocator, none)
                .map_err(Failed::at("CreateCommandList"))?;
            // It begins open.
            commands.Close().map_err(Failed::at("Close"))?;
            let fence =
                self.device.CreateFence(0, D3D12_FENCE_FLAG_NONE).map_err(Failed::at("CreateFence"))?;
            let done = CreateEventW(None, false, false, PCWSTR::null()).map_err(Failed::at("CreateEvent"))?;
            Ok((allocator, commands, fence, mapped, OwnedHandle::from_raw_handle(done.0)))
        }
    }

    fn close(&self, mut stage: Stage) {
        if self.abandoned.load(Ordering::Relaxed) {
            return std::mem::forget(stage);
        }
        // SAFETY: whoever had it has waited for its fence, or the device is lost, which ends everything; it is not used again.
        unsafe {
            ManuallyDrop::drop(&mut stage.commands);
            ManuallyDrop::drop(&mut stage.allocator);
            ManuallyDrop::drop(&mut stage.fence);
        }
        self.free(&mut stage.block);
    }

    /// Records one copy or several, and waits until they are done.
    fn submit(&self, stage: &Stage, record: impl FnOnce(&ID3D12GraphicsCommandList)) -> Result<(), Failed> {
        let value = stage.next.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the stage is this thread's alone, so its allocator, commands and fence are, and what was submitted with
        // them has ended; the caller holds all buffers until this returns.
        unsafe {
            stage.allocator.Reset().map_err(Failed::at("Reset"))?;
            let none: Option<&ID3D12PipelineState> = None;
            stage.commands.Reset(&*stage.allocator, none).map_err(Failed::at("Reset"))?;
            record(&stage.commands);
            stage.commands.Close().map_err(Failed::at("Close"))?;
            let list: ID3D12CommandList = stage.commands.cast().map_err(Failed::at("QueryInterface"))?;
            self.queue.ExecuteCommandLists(&[Some(list)]);
            // Without it nobody knows when what was submitted ends.
            self.queue.Signal(&*stage.fence, value).map_err(Failed::at(WAIT))?;
            if stage.fence.GetCompletedValue() < value {
                let done = HANDLE(stage.done.as_raw_handle());
                stage.fence.SetEventOnCompletion(value, done).map_err(Failed::at(WAIT))?;
                if WaitForSingleObject(done, PATIENCE_MS) != WAIT_OBJECT_0 {
                    return Err(Failed::at(WAIT)(Error::from(HRESULT(0))));
                }
            }
            // A fence passes every value when its device goes.
            self.device.GetDeviceRemovedReason().map_err(Failed::at(REMOVED))
        }
    }
}

impl Driver for Context {
    type Adapter = Adapter;
    type Block = Block;
    type Stage = Stage;
    type Failed = Failed;

    fn open(adapter: &Adapter) -> Result<Self, Failed> {
        let device = adapter.open()?;
        let facts = D3D12_COMMAND_QUEUE_DESC {
            Type: D3D12_COMMAND_LIST_TYPE_COPY,
            ..D3D12_COMMAND_QUEUE_DESC::default()
        };
        // SAFETY: the description lives until the call returns.
        let queue = unsafe { device.CreateCommandQueue(&raw const facts) }
            .map_err(Failed::at("CreateCommandQueue"))?;
        Ok(Self {
            shares: shares(&device),
            device: ManuallyDrop::new(device),
            queue: ManuallyDrop::new(queue),
            idle: Mutex::default(),
            lost: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
        })
    }

    fn available_bytes(adapter: &Adapter, held: u64) -> Option<u64> {
        // Some systems count nothing.
        adapter.budget().map(|(budget, used)| budget.saturating_sub(used.max(held)))
    }

    fn block(&self, bytes: u64) -> Result<Block, Failed> {
        let heap =
            D3D12_HEAP_PROPERTIES { Type: D3D12_HEAP_TYPE_DEFAULT, ..D3D12_HEAP_PROPERTIES::default() };
        let shared = if self.shares { D3D12_HEAP_FLAG_SHARED } else { D3D12_HEAP_FLAGS(0) };
        self.block_in(bytes, heap, D3D12_HEAP_FLAG_ALLOW_ONLY_BUFFERS | shared)
    }

    fn free(&self, block: &mut Block) {
        if self.abandoned.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: the caller frees a block once, and everybody has waited for what they submitted.
        unsafe {
            ManuallyDrop::drop(&mut block.buffer);
            ManuallyDrop::drop(&mut block.heap);
        }
    }

    fn staged<T>(&self, work: impl FnOnce(&mut Stage) -> Result<T, Failed>) -> Result<T, Failed> {
        self.check_lost()?;
        let idle = self.stages().pop();
        let mut stage = match idle {
            Some(stage) => stage,
            None => self.stage()?,
        };
        let done = work(&mut stage);
        if let Err(failed) = &done {
            self.abandoned.fetch_or(failed.is_wait() && !failed.is_lost(), Ordering::Relaxed);
            self.lost.fetch_or(failed.is_wait() || failed.is_lost(), Ordering::Relaxed);
        }
        let mut idle = self.stages();
        if idle.len() < IDLE_STAGES && !self.lost.load(Ordering::Relaxed) {
            idle.push(stage);
        } else {
            drop(idle);
            self.close(stage);
        }
        done
    }

    fn bytes(stage: &mut Stage, bytes: usize) -> &mut [u8] {
        assert!(bytes as u64 <= STAGE_BYTES);
        // SAFETY: mapped and coherent; what was submitted with this stage has ended, so that nobody else uses it.
        unsafe { std::slice::from_raw_parts_mut(stage.mapped.as_ptr(), bytes) }
    }

    fn push(&self, stage: &mut Stage, (to, offset): (&Block, u64), bytes: u64) -> Result<(), Failed> {
        self.submit(stage, |commands| {
            // SAFETY: the table has checked the range.
            unsafe { commands.CopyBufferRegion(&*to.buffer, offset, &*stage.block.buffer, 0, bytes) }
        })
    }

    fn pull(&self, stage: &mut Stage, (from, offset): (&Block, u64), bytes: u64) -> Result<(), Failed> {
        self.submit(stage, |commands| {
            // SAFETY: the table has checked the range.
            unsafe { commands.CopyBufferRegion(&*stage.block.buffer, 0, &*from.buffer, offset, bytes) }
        })
    }

    fn copy(
        &self,
        stage: &mut Stage,
        (from, from_offset): (&Block, u64),
        (to, to_offset): (&Block, u64),
        bytes: u64,
    ) -> Result<(), Failed> {
        // A buffer is not read and written by one command.
        if from.buffer.as_raw() == to.buffer.as_raw() {
            for begin in (0..bytes).step_by(STAGE_BYTES as usize) {
                let bytes = STAGE_BYTES.min(bytes - begin);
                self.pull(stage, (from, from_offset + begin), bytes)?;
                self.push(stage, (to, to_offset + begin), bytes)?;
            }
            return Ok(());
        }
        self.submit(stage, |commands| {
            // SAFETY: the table has checked both ranges.
            unsafe { commands.CopyBufferRegion(&*to.buffer, to_offset, &*from.buffer, from_offset, bytes) }
        })
    }

    /// A copy queue fills nothing: zeros are copied.
    fn zero(&self, stage: &mut Stage, (at, offset): (&Block, u64), bytes: u64) -> Result<(), Failed> {
        Self::bytes(stage, STAGE_BYTES.min(bytes) as usize).fill(0);
        self.submit(stage, |commands| {
            for begin in (0..bytes).step_by(STAGE_BYTES as usize) {
                let (to, bytes) = (offset + begin, STAGE_BYTES.min(bytes - begin));
                // SAFETY: the table has checked the range.
                unsafe { commands.CopyBufferRegion(&*at.buffer, to, &*stage.block.buffer, 0, bytes) };
            }
        })
    }

    fn export(&self, adapter: &Adapter, block: &Block, _: ExportAccess) -> Result<Exported, Failed> {
        Ok(Exported {
            descriptor: share(&self.device, &block.heap)?,
            handle: Handle::D3d12Heap { adapter_luid: format!("{:016x}", adapter.luid) },
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        for stage in std::mem::take(&mut *self.stages()) {
            self.close(stage);
        }
        if !self.abandoned.load(Ordering::Relaxed) {
            // SAFETY: they are not used again: the last segment is gone, and nobody has a stage.
            unsafe {
                ManuallyDrop::drop(&mut self.queue);
                ManuallyDrop::drop(&mut self.device);
            }
        }
    }
}

/// Whether heaps of that device can be handed to other processes.
pub(super) fn shares(device: &ID3D12Device) -> bool {
    let properties =
        D3D12_HEAP_PROPERTIES { Type: D3D12_HEAP_TYPE_DEFAULT, ..D3D12_HEAP_PROPERTIES::default() };
    let flags = D3D12_HEAP_FLAG_ALLOW_ONLY_BUFFERS | D3D12_HEAP_FLAG_SHARED;
    heap_of(device, card::GRANULARITY, properties, flags).and_then(|heap| share(device, &heap)).is_ok()
}

fn share(device: &ID3D12Device, heap: &ID3D12Heap) -> Result<Descriptor, Failed> {
    // SAFETY: the heap lives; the handle that comes is ours.
    unsafe {
        let handle = device
            .CreateSharedHandle(heap, None, GENERIC_ALL.0, PCWSTR::null())
            .map_err(Failed::at("CreateSharedHandle"))?;
        Ok(OwnedHandle::from_raw_handle(handle.0))
    }
}

fn heap_of(
    device: &ID3D12Device,
    bytes: u64,
    properties: D3D12_HEAP_PROPERTIES,
    flags: D3D12_HEAP_FLAGS,
) -> Result<ID3D12Heap, Failed> {
    let facts = D3D12_HEAP_DESC { SizeInBytes: bytes, Properties: properties, Alignment: 0, Flags: flags };
    let mut heap: Option<ID3D12Heap> = None;
    // SAFETY: the description lives until the call returns, and the answer is ours.
    unsafe { device.CreateHeap(&raw const facts, &raw mut heap) }.map_err(Failed::at("CreateHeap"))?;
    there(heap, "CreateHeap")
}

/// Drivers have been seen that answer success with nothing.
fn there<T>(answer: Option<T>, native: &'static str) -> Result<T, Failed> {
    answer.ok_or_else(|| Failed::at(native)(windows::Win32::Foundation::E_POINTER.into()))
}

pub(super) fn buffer_facts(bytes: u64) -> D3D12_RESOURCE_DESC {
    D3D12_RESOURCE_DESC {
        Dimension: D3D12_RESOURCE_DIMENSION_BUFFER,
        Width: bytes,
        Height: 1,
        DepthOrArraySize: 1,
        MipLevels: 1,
        Format: DXGI_FORMAT_UNKNOWN,
        SampleDesc: DXGI_SAMPLE_DESC { Count: 1, Quality: 0 },
        Layout: D3D12_TEXTURE_LAYOUT_ROW_MAJOR,
        ..D3D12_RESOURCE_DESC::default()
    }
}
