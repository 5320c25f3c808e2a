//! Another program that uses CUDA: a context of its own, and what it imports there.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::{LazyLock, Mutex};

use libloading::{Library, Symbol};
use vramd_api::attach::Handle;
use vramd_device::Exported;

/// Names the library to a process that a test starts.
pub const LIBRARY: &str = "VRAMD_TEST_CUDA";

/// The drivers of cards that are not real ones.
pub static DRIVERS: LazyLock<Mutex<HashMap<String, PathBuf>>> = LazyLock::new(Mutex::default);

pub struct Imported {
    library: Library,
    context: *mut c_void,
    address: u64,
    bytes: usize,
}

#[repr(C)]
struct Access {
    kind: u32,
    id: c_int,
    flags: u32,
}

/// Calls a function of the driver that has to succeed.
macro_rules! call {
    ($library:expr, $name:literal, $($argument:expr => $type:ty),*) => {{
        // SAFETY: the function has these arguments, which are good for the call.
        unsafe {
            let function: Symbol<'_, unsafe extern "C" fn($($type),*) -> u32> =
                $library.get($name.as_bytes()).unwrap();
            assert_eq!(function($($argument),*), 0, $name);
        }
    }};
}

/// The driver of a card.
pub fn library(uuid: &str) -> PathBuf {
    let known = DRIVERS.lock().unwrap().get(uuid).cloned();
    known.or_else(|| std::env::var_os(LIBRARY).map(Into::into)).unwrap_or_else(|| "libcuda.so.1".into())
}

impl Imported {
    pub fn new(exported: &Exported, bytes: u64) -> Self {
        let Handle::CudaPosixFd { device_uuid } = &exported.handle else { panic!("not of CUDA") };
        // SAFETY: the driver is trusted.
        let library = unsafe { Library::new(library(device_uuid)) }.unwrap();
        call!(library, "cuInit", 0 => u32);
        let mut count = 0;
        call!(library, "cuDeviceGetCount", &raw mut count => *mut c_int);
        let uuid = uuid::Uuid::parse_str(&device_uuid[4..]).unwrap();
        let device = (0..count).find(|device| {
            let mut bytes = [0; 16];
            call!(library, "cuDeviceGetUuid_v2", &raw mut bytes => *mut [u8; 16], *device => c_int);
            bytes == *uuid.as_bytes()
        });
        let device = device.unwrap();
        let bytes = bytes as usize;
        let (mut context, mut memory, mut address) = (null_mut(), 0, 0);
        call!(library, "cuDevicePrimaryCtxRetain", &raw mut context => *mut *mut c_void, device => c_int);
        call!(library, "cuCtxSetCurrent", context => *mut c_void);
        let descriptor = exported.descriptor.as_raw_fd() as usize as *mut c_void;
        call!(library, "cuMemImportFromShareableHandle",
            &raw mut memory => *mut u64, descriptor => *mut c_void, 1 => u32);
        call!(library, "cuMemAddressReserve",
            &raw mut address => *mut u64, bytes => usize, 0 => usize, 0 => u64, 0 => u64);
        call!(library, "cuMemMap", address => u64, bytes => usize, 0 => usize, memory => u64, 0 => u64);
        call!(library, "cuMemRelease", memory => u64);
        let access = Access { kind: 1, id: device, flags: 3 };
        call!(library, "cuMemSetAccess",
            address => u64, bytes => usize, &raw const access => *const Access, 1 => usize);
        Self { library, context, address, bytes }
    }

    pub fn bytes(&self) -> Vec<u8> {
        call!(self.library, "cuCtxSetCurrent", self.context => *mut c_void);
        let mut bytes = vec![0xAA_u8; self.bytes];
        call!(self.library, "cuMemcpyDtoHAsync_v2",
            bytes.as_mut_ptr() => *mut u8, self.address => u64, self.bytes => usize, null_mut() => *mut c_void);
        call!(self.library, "cuStreamSynchronize", null_mut() => *mut c_void);
        bytes
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        call!(self.library, "cuCtxSetCurrent", self.context => *mut c_void);
        call!(self.library, "cuMemcpyHtoDAsync_v2",
            self.address + offset as u64 => u64, bytes.as_ptr() => *const u8, bytes.len() => usize,
            null_mut() => *mut c_void);
        call!(self.library, "cuStreamSynchronize", null_mut() => *mut c_void);
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        call!(self.library, "cuMemUnmap", self.address => u64, self.bytes => usize);
        call!(self.library, "cuMemAddressFree", self.address => u64, self.bytes => usize);
    }
}
