//! The contestants behind one face: ranges of one address space, taken and given back.

use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;

use vk_mem::{
    VirtualAllocationCreateFlags, VirtualAllocationCreateInfo, VirtualBlock, VirtualBlockCreateInfo,
};

/// Everyone aligns to this, and every size is a multiple of it: `offset-allocator` knows no alignment.
pub const UNIT: u64 = 256;

pub trait Peer {
    type Block;

    fn new(bytes: u64) -> Self;
    fn take(&mut self, bytes: u64) -> Option<Self::Block>;
    fn give(&mut self, block: Self::Block);
}

pub struct Ours(pub vramd_core::Ranges);

impl Peer for Ours {
    type Block = (u64, u64);

    fn new(bytes: u64) -> Self {
        Self(vramd_core::Ranges::new(bytes))
    }

    fn take(&mut self, bytes: u64) -> Option<Self::Block> {
        self.0.take(bytes, UNIT).map(|offset| (offset, bytes))
    }

    fn give(&mut self, (offset, bytes): Self::Block) {
        self.0.give(offset, bytes);
    }
}

pub const DEFAULT: u32 = 0;
pub const LEAST_MEMORY: u32 =
    VirtualAllocationCreateFlags::VMA_VIRTUAL_ALLOCATION_CREATE_STRATEGY_MIN_MEMORY_BIT.bits();
pub const LEAST_TIME: u32 =
    VirtualAllocationCreateFlags::VMA_VIRTUAL_ALLOCATION_CREATE_STRATEGY_MIN_TIME_BIT.bits();
pub const LOWEST_OFFSET: u32 =
    VirtualAllocationCreateFlags::VMA_VIRTUAL_ALLOCATION_CREATE_STRATEGY_MIN_OFFSET_BIT.bits();

/// VMA's virtual block, by strategy.
pub struct Vma<const STRATEGY: u32>(VirtualBlock);

impl<const STRATEGY: u32> Peer for Vma<STRATEGY> {
    type Block = vk_mem::VirtualAllocation;

    fn new(bytes: u64) -> Self {
        let block = VirtualBlock::new(VirtualBlockCreateInfo { size: bytes, ..Default::default() });
        Self(block.expect("a virtual block is only a structure"))
    }

    fn take(&mut self, bytes: u64) -> Option<Self::Block> {
        let request = VirtualAllocationCreateInfo {
            size: bytes,
            alignment: UNIT,
            flags: VirtualAllocationCreateFlags::from_bits_retain(STRATEGY),
            user_data: 0,
        };
        // SAFETY: the size is not 0 and the alignment a power of two.
        unsafe { self.0.allocate(request) }.ok().map(|(block, _)| block)
    }

    fn give(&mut self, mut block: Self::Block) {
        // SAFETY: the block comes from this virtual block and is freed once.
        unsafe { self.0.free(&mut block) }
    }
}

impl<const STRATEGY: u32> Drop for Vma<STRATEGY> {
    fn drop(&mut self) {
        // SAFETY: nobody has a block any more.
        unsafe { self.0.clear() }
    }
}

/// With room for as many blocks as any run here has.
pub struct OffsetAllocator(offset_allocator::Allocator<u32>);

impl Peer for OffsetAllocator {
    type Block = offset_allocator::Allocation<u32>;

    fn new(bytes: u64) -> Self {
        Self(offset_allocator::Allocator::with_max_allocs((bytes / UNIT) as u32, 1 << 20))
    }

    fn take(&mut self, bytes: u64) -> Option<Self::Block> {
        self.0.allocate((bytes / UNIT) as u32)
    }

    fn give(&mut self, block: Self::Block) {
        self.0.free(block);
    }
}

pub struct RangeAlloc(range_alloc::RangeAllocator<u64>);

impl Peer for RangeAlloc {
    type Block = std::ops::Range<u64>;

    fn new(bytes: u64) -> Self {
        Self(range_alloc::RangeAllocator::new(0..bytes))
    }

    fn take(&mut self, bytes: u64) -> Option<Self::Block> {
        self.0.allocate_range_aligned(bytes, UNIT).ok()
    }

    fn give(&mut self, block: Self::Block) {
        self.0.free_range(block);
    }
}

/// Keeps its books in the memory that it gives out, so it gets an address space that is never touched but there.
pub struct Rlsf {
    tlsf: rlsf::Tlsf<'static, u32, u32, 32, 32>,
    pool: NonNull<libc::c_void>,
    bytes: usize,
}

impl Peer for Rlsf {
    type Block = NonNull<u8>;

    fn new(bytes: u64) -> Self {
        let bytes = bytes as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at no particular place.
        let pool = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(pool, libc::MAP_FAILED, "no address space of {bytes} bytes");
        let pool = NonNull::new(pool).expect("a mapping is never at 0");
        let mut tlsf = rlsf::Tlsf::new();
        // SAFETY: the mapping is ours until drop, which ends the allocator too.
        unsafe { tlsf.insert_free_block_ptr(NonNull::slice_from_raw_parts(pool.cast(), bytes)) };
        Self { tlsf, pool, bytes }
    }

    fn take(&mut self, bytes: u64) -> Option<Self::Block> {
        let layout = std::alloc::Layout::from_size_align(bytes as usize, UNIT as usize);
        self.tlsf.allocate(layout.expect("the alignment is a power of two"))
    }

    fn give(&mut self, block: Self::Block) {
        // SAFETY: the block comes from this allocator, with this alignment, and is freed once.
        unsafe { self.tlsf.deallocate(block, UNIT as usize) }
    }
}

impl Drop for Rlsf {
    fn drop(&mut self) {
        // SAFETY: nobody has a block any more, and the allocator is dropped without a look at its memory.
        unsafe { libc::munmap(self.pool.as_ptr(), self.bytes) };
    }
}

/// The smallest hole that fits, exactly: what packing is held against.
pub struct BestFit {
    holes: BTreeMap<u64, u64>,
    by_length: BTreeSet<(u64, u64)>,
}

impl BestFit {
    fn insert(&mut self, offset: u64, length: u64) {
        self.holes.insert(offset, length);
        self.by_length.insert((length, offset));
    }

    fn remove(&mut self, offset: u64, length: u64) {
        self.holes.remove(&offset);
        self.by_length.remove(&(length, offset));
    }
}

impl Peer for BestFit {
    type Block = (u64, u64);

    fn new(bytes: u64) -> Self {
        let mut new = Self { holes: BTreeMap::new(), by_length: BTreeSet::new() };
        new.insert(0, bytes);
        new
    }

    fn take(&mut self, bytes: u64) -> Option<Self::Block> {
        let &(length, offset) = self.by_length.range((bytes, 0)..).next()?;
        self.remove(offset, length);
        if length > bytes {
            self.insert(offset + bytes, length - bytes);
        }
        Some((offset, bytes))
    }

    fn give(&mut self, (offset, bytes): Self::Block) {
        let (mut start, mut end) = (offset, offset + bytes);
        let before = self.holes.range(..offset).next_back().map(|(&at, &length)| (at, length));
        if let Some((at, length)) = before.filter(|(at, length)| at + length == offset) {
            self.remove(at, length);
            start = at;
        }
        if let Some(&length) = self.holes.get(&end) {
            self.remove(end, length);
            end += length;
        }
        self.insert(start, end - start);
    }
}
