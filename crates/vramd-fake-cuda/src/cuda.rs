//! `libcuda.so.1`

use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_int, c_uint, c_void};
use std::ptr;

use crate::state::{Memory, Range, beside, cards, fault, note_context, state, used};

const SUCCESS: u32 = 0;
const INVALID_VALUE: u32 = 1;
const OUT_OF_MEMORY: u32 = 2;
const NO_DEVICE: u32 = 100;
const INVALID_DEVICE: u32 = 101;
const INVALID_CONTEXT: u32 = 201;
const ILLEGAL_ADDRESS: u32 = 700;
const GRANULARITY: usize = 2 << 20;

thread_local! {
    static CONTEXT: Cell<usize> = const { Cell::new(0) };
}

/// Answers what a test wants to be answered.
macro_rules! faults {
    ($call:literal) => {
        match fault($call) {
            SUCCESS => {}
            code => return code,
        }
    };
}

macro_rules! needs_context {
    () => {
        if CONTEXT.get() == 0 {
            return INVALID_CONTEXT;
        }
    };
}

#[repr(C)]
pub struct Location {
    kind: u32,
    id: c_int,
}

#[repr(C)]
pub struct Properties {
    kind: u32,
    handle_types: u32,
    location: Location,
    win32: *mut c_void,
    flags: [u8; 8],
}

#[repr(C)]
pub struct Access {
    location: Location,
    flags: u32,
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_: c_uint) -> u32 {
    faults!("cuInit");
    if visible().is_empty() { NO_DEVICE } else { SUCCESS }
}

/// The cards that `CUDA_VISIBLE_DEVICES` leaves, by their numbers or the beginnings of their uuids.
fn visible() -> Vec<usize> {
    let cards = cards();
    let Ok(names) = std::env::var("CUDA_VISIBLE_DEVICES") else { return (0..cards.len()).collect() };
    let index = |name: &str| {
        if name.is_empty() {
            return None;
        }
        let by_number = name.parse().ok().filter(|index| *index < cards.len());
        by_number.or_else(|| cards.iter().position(|card| card.uuid.starts_with(name)))
    };
    names.split(',').map_while(index).collect()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> u32 {
    faults!("cuDeviceGetCount");
    // SAFETY: the caller gives a place for the answer; so do all below.
    unsafe { *count = visible().len() as c_int };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> u32 {
    faults!("cuDeviceGet");
    let Some(index) = visible().get(ordinal as usize).copied() else { return INVALID_DEVICE };
    // SAFETY: as above.
    unsafe { *device = index as c_int };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> u32 {
    faults!("cuDeviceGetUuid_v2");
    let Some(card) = cards().into_iter().nth(device as usize) else { return INVALID_DEVICE };
    let hex: String = card.uuid[4..].chars().filter(char::is_ascii_hexdigit).collect();
    let Ok(number) = u128::from_str_radix(&hex, 16) else { return INVALID_VALUE };
    // SAFETY: as above.
    unsafe { *uuid = number.to_be_bytes() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(can: *mut c_int, card: c_int, other: c_int) -> u32 {
    faults!("cuDeviceCanAccessPeer");
    let nothing = fault("cuDeviceCanAccessPeer nothing") != SUCCESS;
    // SAFETY: as above.
    unsafe { *can = c_int::from(card != other && !nothing) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAllocationGranularity(
    bytes: *mut usize,
    _: *const Properties,
    _: u32,
) -> u32 {
    faults!("cuMemGetAllocationGranularity");
    // SAFETY: as above.
    unsafe { *bytes = GRANULARITY };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemCreate(
    handle: *mut u64,
    bytes: usize,
    wanted: *const Properties,
    _: u64,
) -> u32 {
    faults!("cuMemCreate");
    // SAFETY: as above.
    let card = unsafe { (*wanted).location.id };
    if bytes == 0 || !bytes.is_multiple_of(GRANULARITY) {
        return INVALID_VALUE;
    }
    let cards = cards();
    let Some(of) = cards.get(card as usize) else { return INVALID_DEVICE };
    let mut state = state();
    if used(card) + of.others + bytes as u64 > of.bytes {
        return OUT_OF_MEMORY;
    }
    // SAFETY: calls to the kernel with arguments of our own. The mapping is only used here.
    let file = unsafe {
        // Whoever imports it learns from its name which card it is on.
        let name = CString::new(format!("a card's memory {card}")).unwrap_or_default();
        let file = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        if file < 0 || libc::ftruncate(file, bytes as libc::off_t) != 0 {
            return OUT_OF_MEMORY;
        }
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let base = libc::mmap(ptr::null_mut(), bytes, access, libc::MAP_SHARED, file, 0);
        if base == libc::MAP_FAILED {
            libc::close(file);
            return OUT_OF_MEMORY;
        }
        // What another program left there.
        ptr::write_bytes(base.cast::<u8>(), 0xA5, bytes.min(64 << 20));
        libc::munmap(base, bytes);
        file
    };
    let id = state.number();
    let Some(facts) = facts(file) else { return INVALID_VALUE };
    state.insert(id, Memory { file, inode: facts.st_ino, bytes: bytes as u64, card, uses: 1 });
    // SAFETY: as above.
    unsafe { *handle = id };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemRelease(handle: u64) -> u32 {
    faults!("cuMemRelease");
    let mut state = state();
    if !state.memories.contains_key(&handle) {
        return INVALID_VALUE;
    }
    state.unuse(handle);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemExportToShareableHandle(to: *mut c_int, handle: u64, kind: u32, _: u64) -> u32 {
    faults!("cuMemExportToShareableHandle");
    if fault("cuMemExportToShareableHandle nothing") != SUCCESS {
        // SAFETY: as above.
        unsafe { *to = -1 };
        return SUCCESS;
    }
    let state = state();
    let Some(memory) = state.memories.get(&handle).filter(|_| kind == 1) else { return INVALID_VALUE };
    // SAFETY: our own descriptor. As with the real driver, who gets it is not to inherit it by chance.
    unsafe { *to = libc::fcntl(memory.file, libc::F_DUPFD_CLOEXEC, 3) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemImportFromShareableHandle(to: *mut u64, from: *mut c_void, kind: u32) -> u32 {
    faults!("cuMemImportFromShareableHandle");
    needs_context!();
    if kind != 1 {
        return INVALID_VALUE;
    }
    // SAFETY: the descriptor is the caller's; what is kept is a copy.
    let file = unsafe { libc::fcntl(from.addr() as c_int, libc::F_DUPFD_CLOEXEC, 3) };
    let name = std::fs::read_link(format!("/proc/self/fd/{file}")).unwrap_or_default();
    let name = name.to_string_lossy();
    let card = name.strip_suffix(" (deleted)").and_then(|name| name.rsplit(' ').next()?.parse().ok());
    let (Some(card), Some(facts)) = (card, facts(file)) else { return INVALID_VALUE };
    if !visible().contains(&(card as usize)) {
        // SAFETY: our own copy of the descriptor.
        unsafe { libc::close(file) };
        return INVALID_DEVICE;
    }
    let mut state = state();
    let id = state.number();
    state.insert(id, Memory { file, inode: facts.st_ino, bytes: facts.st_size as u64, card, uses: 1 });
    // SAFETY: as above.
    unsafe { *to = id };
    SUCCESS
}

fn facts(file: c_int) -> Option<libc::stat> {
    // SAFETY: the structure is written before it is read.
    unsafe {
        let mut facts: libc::stat = std::mem::zeroed();
        (libc::fstat(file, &raw mut facts) == 0).then_some(facts)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAddressReserve(at: *mut u64, bytes: usize, _: usize, _: u64, _: u64) -> u32 {
    faults!("cuMemAddressReserve");
    needs_context!();
    if fault("cuMemAddressReserve nothing") != SUCCESS {
        // Success, and no address.
        // SAFETY: as above.
        unsafe { *at = 0 };
        return SUCCESS;
    }
    // SAFETY: a new mapping that nobody can reach yet.
    let base = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0)
    };
    if base == libc::MAP_FAILED {
        return OUT_OF_MEMORY;
    }
    state().ranges.insert(base.addr() as u64, Range { bytes, memory: None, access: None });
    // SAFETY: as above.
    unsafe { *at = base.addr() as u64 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAddressFree(at: u64, bytes: usize) -> u32 {
    faults!("cuMemAddressFree");
    let mut state = state();
    if !state.ranges.get(&at).is_some_and(|range| range.bytes == bytes && range.memory.is_none()) {
        return INVALID_VALUE;
    }
    state.ranges.remove(&at);
    // SAFETY: a range of ours with nothing in it.
    unsafe { libc::munmap(at as *mut c_void, bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemMap(at: u64, bytes: usize, offset: usize, handle: u64, _: u64) -> u32 {
    faults!("cuMemMap");
    needs_context!();
    let mut guard = state();
    let state = &mut *guard;
    let Some(memory) = state.memories.get_mut(&handle) else { return INVALID_VALUE };
    let Some(range) = state.ranges.get_mut(&at) else { return INVALID_VALUE };
    if offset != 0 || bytes as u64 != memory.bytes || bytes != range.bytes || range.memory.is_some() {
        return INVALID_VALUE;
    }
    // SAFETY: over a range of ours with nothing in it; nobody may use it before `cuMemSetAccess`.
    let mapped = unsafe {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        libc::mmap(at as *mut c_void, bytes, libc::PROT_NONE, flags, memory.file, 0)
    };
    if mapped == libc::MAP_FAILED {
        return OUT_OF_MEMORY;
    }
    memory.uses += 1;
    range.memory = Some(handle);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemUnmap(at: u64, bytes: usize) -> u32 {
    faults!("cuMemUnmap");
    let mut state = state();
    let Some(range) = state.ranges.get_mut(&at).filter(|range| range.bytes == bytes) else {
        return INVALID_VALUE;
    };
    let Some(memory) = range.memory.take() else { return INVALID_VALUE };
    range.access = None;
    state.unuse(memory);
    // SAFETY: a range of ours, which keeps its place.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        libc::mmap(at as *mut c_void, bytes, libc::PROT_NONE, flags, -1, 0);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemSetAccess(at: u64, bytes: usize, wanted: *const Access, _: usize) -> u32 {
    faults!("cuMemSetAccess");
    needs_context!();
    // SAFETY: the caller's description can be read.
    let card = unsafe { (*wanted).location.id };
    match state().ranges.get_mut(&at).filter(|range| range.bytes == bytes && range.memory.is_some()) {
        Some(range) => range.access = Some(card),
        None => return INVALID_VALUE,
    }
    // SAFETY: a mapped range of ours; the caller's description can be read.
    let done = unsafe {
        let access = if (*wanted).flags == 3 { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        libc::mprotect(at as *mut c_void, bytes, access)
    };
    if done == 0 { SUCCESS } else { INVALID_VALUE }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxSetFlags_v2(_: c_int, _: c_uint) -> u32 {
    faults!("cuDevicePrimaryCtxSetFlags_v2");
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> u32 {
    faults!("cuDevicePrimaryCtxRetain");
    note_context();
    // SAFETY: as above.
    unsafe { *context = 1 + device as usize };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: usize) -> u32 {
    faults!("cuCtxSetCurrent");
    CONTEXT.set(context);
    SUCCESS
}

thread_local! {
    static PUSHED: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: usize) -> u32 {
    faults!("cuCtxPushCurrent_v2");
    PUSHED.with_borrow_mut(|pushed| pushed.push(CONTEXT.replace(context)));
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut usize) -> u32 {
    let Some(before) = PUSHED.with_borrow_mut(Vec::pop) else { return INVALID_CONTEXT };
    // SAFETY: as above.
    unsafe { *context = CONTEXT.replace(before) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_: c_int) -> u32 {
    faults!("cuDevicePrimaryCtxRelease_v2");
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> u32 {
    faults!("cuCtxSynchronize");
    needs_context!();
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: usize, from: usize, bytes: usize) -> u32 {
    faults!("cuMemcpyDtoH_v2");
    // SAFETY: by the caller's word.
    unsafe { copy(to, from, bytes) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut usize, _: c_uint) -> u32 {
    faults!("cuStreamCreate");
    needs_context!();
    // SAFETY: as above.
    unsafe { *stream = 1 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_: usize) -> u32 {
    faults!("cuStreamSynchronize");
    while beside("hang").exists() {
        // Who waits for this finds it; who does not, loses nothing.
        let _ = std::fs::write(beside("hanging"), "");
        std::thread::park_timeout(std::time::Duration::from_millis(5));
    }
    SUCCESS
}

/// Whether the card of the current context may use an address, if that is a card's.
fn allowed(address: usize) -> bool {
    let state = state();
    let of = |(at, range): (&u64, &Range)| {
        (*at as usize..*at as usize + range.bytes).contains(&address).then_some(range.access)
    };
    // A context is the number of its card and one.
    let card = CONTEXT.get() as i32 - 1;
    state.ranges.iter().find_map(of).is_none_or(|access| access == Some(card))
}

/// Copies, all of which are done when they return, as may be.
unsafe fn copy(to: usize, from: usize, bytes: usize) -> u32 {
    needs_context!();
    if !allowed(to) || !allowed(from) {
        return ILLEGAL_ADDRESS;
    }
    // SAFETY: the caller's ranges, like those of the real driver.
    unsafe { ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: usize, from: usize, bytes: usize, _: usize) -> u32 {
    faults!("cuMemcpyHtoDAsync_v2");
    // SAFETY: by the caller's word; so below.
    unsafe { copy(to, from, bytes) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: usize, from: usize, bytes: usize, _: usize) -> u32 {
    faults!("cuMemcpyDtoHAsync_v2");
    // SAFETY: as above.
    unsafe { copy(to, from, bytes) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(to: usize, from: usize, bytes: usize, _: usize) -> u32 {
    faults!("cuMemcpyDtoDAsync_v2");
    if fault("cuMemcpyDtoDAsync_v2 nothing") != SUCCESS {
        return SUCCESS;
    }
    // SAFETY: as above.
    unsafe { copy(to, from, bytes) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(at: usize, value: u8, bytes: usize, _: usize) -> u32 {
    faults!("cuMemsetD8Async");
    needs_context!();
    // SAFETY: as above.
    unsafe { ptr::write_bytes(at as *mut u8, value, bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostRegister_v2(_: usize, _: usize, _: c_uint) -> u32 {
    faults!("cuMemHostRegister_v2");
    needs_context!();
    SUCCESS
}
