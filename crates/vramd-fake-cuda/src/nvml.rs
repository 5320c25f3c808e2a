//! `libnvidia-ml.so.1`

use std::ffi::{CStr, c_char, c_int, c_uint};

use crate::state::{beside, cards, fault, state, used};

const SUCCESS: u32 = 0;
const INVALID_ARGUMENT: u32 = 2;
const NOT_SUPPORTED: u32 = 3;
const NOT_FOUND: u32 = 6;
const INSUFFICIENT_SIZE: u32 = 7;
const TIMEOUT: u32 = 10;
/// A critical Xid.
const XID: u64 = 8;

macro_rules! faults {
    ($call:literal) => {
        match fault($call) {
            SUCCESS => {}
            code => return code,
        }
    };
}

/// `nvmlProcessInfo_t`
#[repr(C)]
pub struct Process {
    pid: c_uint,
    used: u64,
    instances: [c_uint; 2],
}

/// `nvmlMemory_v2_t`
#[repr(C)]
pub struct Memory {
    version: c_uint,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

/// `nvmlEventData_t`
#[repr(C)]
pub struct EventData {
    handle: usize,
    kind: u64,
    data: u64,
    instances: [c_uint; 2],
}

/// `nvmlPciInfo_t`
#[repr(C)]
pub struct PciInfo {
    legacy: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    ids: [c_uint; 2],
    id: [c_char; 32],
}

/// Writes a text with its end into the caller's room.
unsafe fn write(text: &str, to: *mut c_char, room: c_uint) -> u32 {
    if text.len() >= room as usize {
        return INSUFFICIENT_SIZE;
    }
    // SAFETY: the caller has that much room; so it is below.
    unsafe {
        to.copy_from_nonoverlapping(text.as_ptr().cast(), text.len());
        *to.add(text.len()) = 0;
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> u32 {
    faults!("nvmlInit_v2");
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> u32 {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(_: u32) -> *const c_char {
    c"an error of the fake driver".as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(to: *mut c_char, room: c_uint) -> u32 {
    // SAFETY: by the caller's word; so below.
    unsafe { write("580.65.06", to, room) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> u32 {
    faults!("nvmlDeviceGetCount_v2");
    // SAFETY: as above.
    unsafe { *count = cards().len() as c_uint };
    SUCCESS
}

/// Handles are the numbers of the cards, from 1 on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, handle: *mut usize) -> u32 {
    faults!("nvmlDeviceGetHandleByIndex_v2");
    if index as usize >= cards().len() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: as above.
    unsafe { *handle = index as usize + 1 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, handle: *mut usize) -> u32 {
    // SAFETY: as above.
    let uuid = unsafe { CStr::from_ptr(uuid) };
    let found = cards().iter().position(|card| card.uuid.as_bytes() == uuid.to_bytes());
    let Some(index) = found else { return NOT_FOUND };
    // SAFETY: as above.
    unsafe { *handle = index + 1 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(handle: usize, to: *mut c_char, room: c_uint) -> u32 {
    faults!("nvmlDeviceGetUUID");
    let Some(card) = cards().into_iter().nth(handle - 1) else { return INVALID_ARGUMENT };
    // SAFETY: as above.
    unsafe { write(&card.uuid, to, room) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetName(_: usize, to: *mut c_char, room: c_uint) -> u32 {
    faults!("nvmlDeviceGetName");
    // SAFETY: as above.
    unsafe { write("Fake card", to, room) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(_: usize, _: *mut c_uint, _: *mut c_uint) -> u32 {
    NOT_SUPPORTED
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(handle: usize, memory: *mut Memory) -> u32 {
    faults!("nvmlDeviceGetMemoryInfo_v2");
    let Some(card) = cards().into_iter().nth(handle - 1) else { return INVALID_ARGUMENT };
    let used = used(handle as c_int - 1) + card.others;
    // SAFETY: as above.
    unsafe {
        (*memory).total = card.bytes;
        (*memory).reserved = 0;
        (*memory).used = used.min(card.bytes);
        (*memory).free = card.bytes.saturating_sub(used);
    }
    SUCCESS
}

/// Those that a test has written down, of the first card: a line each, with a pid and bytes, or a pid alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    handle: usize,
    count: *mut c_uint,
    to: *mut Process,
) -> u32 {
    faults!("nvmlDeviceGetComputeRunningProcesses_v3");
    let text = std::fs::read_to_string(beside("processes")).unwrap_or_default();
    let lines: Vec<_> = text.lines().filter(|_| handle == 1).collect();
    // SAFETY: by the caller's word there is room for as many as it says, or none is asked for.
    unsafe {
        let room = std::mem::replace(&mut *count, lines.len() as c_uint);
        if lines.is_empty() {
            return SUCCESS;
        }
        if to.is_null() || (room as usize) < lines.len() {
            return INSUFFICIENT_SIZE;
        }
        for (index, line) in lines.iter().enumerate() {
            let mut words = line.split_whitespace().map(|word| word.parse::<u64>().unwrap_or(0));
            let pid = words.next().unwrap_or(0) as c_uint;
            // All ones where the driver does not say.
            let used = words.next().unwrap_or(u64::MAX);
            to.add(index).write(Process { pid, used, instances: [c_uint::MAX; 2] });
        }
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGraphicsRunningProcesses_v3(
    _: usize,
    count: *mut c_uint,
    _: *mut Process,
) -> u32 {
    // SAFETY: as above.
    unsafe { *count = 0 };
    SUCCESS
}

/// Each card has a bus of its own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPciInfo_v3(handle: usize, to: *mut PciInfo) -> u32 {
    faults!("nvmlDeviceGetPciInfo_v3");
    // SAFETY: as above.
    unsafe {
        (*to).domain = 0;
        (*to).bus = handle as c_uint;
        (*to).device = 0;
        write(&format!("00000000:{handle:02X}:00.0"), (&raw mut (*to).id).cast(), 32)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetCreate(set: *mut usize) -> u32 {
    faults!("nvmlEventSetCreate");
    let number = state().number() as usize;
    // SAFETY: as above.
    unsafe { *set = number };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceRegisterEvents(handle: usize, kinds: u64, set: usize) -> u32 {
    faults!("nvmlDeviceRegisterEvents");
    if kinds != XID {
        return NOT_SUPPORTED;
    }
    state().event_sets.insert(set, handle);
    SUCCESS
}

/// What a test has written down, once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetWait_v2(set: usize, to: *mut EventData, _: c_uint) -> u32 {
    faults!("nvmlEventSetWait_v2");
    let Some(handle) = state().event_sets.get(&set).copied() else { return INVALID_ARGUMENT };
    let file = beside(&format!("xid.{}", handle - 1));
    let Some(data) = std::fs::read_to_string(&file).ok().and_then(|text| text.parse().ok()) else {
        return TIMEOUT;
    };
    let _ = std::fs::remove_file(file);
    // SAFETY: as above.
    unsafe { to.write(EventData { handle, kind: XID, data, instances: [0; 2] }) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlEventSetFree(set: usize) -> u32 {
    if state().event_sets.remove(&set).is_some() { SUCCESS } else { INVALID_ARGUMENT }
}
