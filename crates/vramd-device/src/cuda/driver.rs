//! CUDA's driver library: the calls that are used here, looked up by name when it is loaded.
//!
//! Types and values are those of `cuda.h`, written down here because a result that is newer than any list of them must
//! stay a number.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::null_mut;

use libloading::Library;
use uuid::Uuid;

use crate::{Call, DeviceError};

pub(super) type Address = c_ulonglong;
pub(super) type Memory = c_ulonglong;
pub(super) type Ordinal = c_int;
pub(super) type Context = *mut c_void;
pub(super) type Stream = *mut c_void;

const SUCCESS: u32 = 0;
const OUT_OF_MEMORY: u32 = 2;
const NO_DEVICE: u32 = 100;
const PINNED: u32 = 1;
const ON_DEVICE: u32 = 1;
const READ_AND_WRITE: u32 = 3;
const POSIX_FILE_DESCRIPTOR: u32 = 1;
const RECOMMENDED: u32 = 1;
/// A thread that waits sleeps.
const BLOCKING_SYNC: u32 = 4;
const NON_BLOCKING: u32 = 1;

/// `CUmemLocation`
#[repr(C)]
struct Location {
    kind: u32,
    id: c_int,
}

/// `CUmemAllocationProp`
#[repr(C)]
struct Properties {
    kind: u32,
    handle_types: u32,
    location: Location,
    win32: *mut c_void,
    flags: [u8; 8],
}

/// `CUmemAccessDesc`
#[repr(C)]
struct Access {
    location: Location,
    flags: u32,
}

/// A failed call of the driver, before it is known what it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failed {
    /// An index of [`NAMES`].
    pub(super) call: u32,
    /// A `CUresult`.
    pub(super) code: u32,
}

impl Failed {
    /// What is not of the driver's saying.
    pub(super) const UNKNOWN: Self = Self { call: u32::MAX, code: u32::MAX };

    pub(super) fn name(self) -> &'static str {
        NAMES.get(self.call as usize).copied().unwrap_or("a call of the CUDA driver")
    }

    /// A context is no longer good for anything after most errors.
    pub(super) fn is_out_of_memory(self) -> bool {
        self.code == OUT_OF_MEMORY
    }

    /// Whether memory could not be given back.
    pub(super) fn is_of_release(self) -> bool {
        self.call == Index::release as u32
    }

    pub(super) fn explain(self, call: Call, requested: u64, available: u64) -> DeviceError {
        if self.is_out_of_memory() {
            return DeviceError::OutOfMemory { requested, available };
        }
        let source = std::io::Error::other(format!("CUDA error {}", self.code));
        DeviceError::Native { call, native: self.name(), source }
    }
}

macro_rules! table {
    ($($field:ident, $symbol:literal, ($($argument:ty),*);)*) => {
        #[allow(non_camel_case_types)]
        enum Index { $($field),* }

        /// The calls by their numbers, as both ends of the loader's socket have them.
        pub(super) const NAMES: &[&str] = &[$($symbol),*];

        struct Table {
            $($field: unsafe extern "C" fn($($argument),*) -> u32,)*
        }

        impl Table {
            /// # Safety
            /// The library is CUDA's driver, and outlives the table.
            unsafe fn of(library: &Library) -> Result<Self, NoDriver> {
                // SAFETY: by this function's contract the symbols are functions of these types.
                unsafe {
                    Ok(Self {
                        $($field: *library.get::<unsafe extern "C" fn($($argument),*) -> u32>($symbol.as_bytes())
                            .map_err(|_| NoDriver::Old { lacks: $symbol })?,)*
                    })
                }
            }
        }
    };
}

table! {
    init, "cuInit", (c_uint);
    count, "cuDeviceGetCount", (*mut c_int);
    get, "cuDeviceGet", (*mut Ordinal, c_int);
    uuid, "cuDeviceGetUuid_v2", (*mut [u8; 16], Ordinal);
    reaches, "cuDeviceCanAccessPeer", (*mut c_int, Ordinal, Ordinal);
    granularity, "cuMemGetAllocationGranularity", (*mut usize, *const Properties, u32);
    create, "cuMemCreate", (*mut Memory, usize, *const Properties, c_ulonglong);
    release, "cuMemRelease", (Memory);
    export, "cuMemExportToShareableHandle", (*mut c_int, Memory, u32, c_ulonglong);
    import, "cuMemImportFromShareableHandle", (*mut Memory, *mut c_void, u32);
    reserve, "cuMemAddressReserve", (*mut Address, usize, usize, Address, c_ulonglong);
    free, "cuMemAddressFree", (Address, usize);
    map, "cuMemMap", (Address, usize, usize, Memory, c_ulonglong);
    unmap, "cuMemUnmap", (Address, usize);
    allow, "cuMemSetAccess", (Address, usize, *const Access, usize);
    set_flags, "cuDevicePrimaryCtxSetFlags_v2", (Ordinal, c_uint);
    retain, "cuDevicePrimaryCtxRetain", (*mut Context, Ordinal);
    set_current, "cuCtxSetCurrent", (Context);
    new_stream, "cuStreamCreate", (*mut Stream, c_uint);
    synchronize, "cuStreamSynchronize", (Stream);
    to_device, "cuMemcpyHtoDAsync_v2", (Address, *const c_void, usize, Stream);
    to_host, "cuMemcpyDtoHAsync_v2", (*mut c_void, Address, usize, Stream);
    on_device, "cuMemcpyDtoDAsync_v2", (Address, Address, usize, Stream);
    fill, "cuMemsetD8Async", (Address, u8, usize, Stream);
    register, "cuMemHostRegister_v2", (*mut c_void, usize, c_uint);
}

fn check(call: Index, code: u32) -> Result<(), Failed> {
    if code == SUCCESS { Ok(()) } else { Err(Failed { call: call as u32, code }) }
}

/// The loaded library. It stays loaded for as long as the process lives.
pub(super) struct Driver(Table);

/// Why there is no driver.
#[derive(Debug, thiserror::Error)]
pub enum NoDriver {
    #[error("the CUDA driver (libcuda.so.1) is not there: {0}")]
    Library(#[from] libloading::Error),
    #[error("the CUDA driver is too old: it has no {lacks}")]
    Old { lacks: &'static str },
    #[error("{0}")]
    Call(Failed),
    /// It works, and does not show this card.
    #[error("CUDA does not show this card to this process: look at CUDA_VISIBLE_DEVICES")]
    Hidden,
}

impl From<Failed> for NoDriver {
    fn from(failed: Failed) -> Self {
        Self::Call(failed)
    }
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} failed with CUDA error {}", self.name(), self.code)
    }
}

impl Driver {
    pub fn load(path: &Path) -> Result<Self, NoDriver> {
        // SAFETY: NVIDIA's library, whose initialisers we have to trust like any driver; it is never unloaded, since its
        // threads would not survive that.
        let table = unsafe {
            let library = Library::new(path)?;
            let table = Table::of(&library)?;
            std::mem::forget(library);
            table
        };
        Ok(Self(table))
    }

    /// Begins to use the driver, and answers the cards that this process may use, in CUDA's order: `CUDA_VISIBLE_DEVICES` and
    /// instances of split cards are minded.
    pub fn visible(&self) -> Result<Vec<(Ordinal, Uuid)>, Failed> {
        // SAFETY: a plain call, which may be made again.
        match check(Index::init, unsafe { (self.0.init)(0) }) {
            Err(failed) if failed.code == NO_DEVICE => return Ok(Vec::new()),
            begun => begun?,
        }
        let mut count = 0;
        // SAFETY: each call writes what it is given a pointer to.
        unsafe {
            check(Index::count, (self.0.count)(&raw mut count))?;
            (0..count)
                .map(|index| {
                    let (mut ordinal, mut bytes) = (0, [0; 16]);
                    check(Index::get, (self.0.get)(&raw mut ordinal, index))?;
                    check(Index::uuid, (self.0.uuid)(&raw mut bytes, ordinal))?;
                    Ok((ordinal, Uuid::from_bytes(bytes)))
                })
                .collect()
        }
    }

    /// The ordinal of a card, for the calls below.
    pub fn find(&self, card: Uuid) -> Result<Ordinal, NoDriver> {
        let found = self.visible()?.into_iter().find(|(_, id)| *id == card);
        found.map(|(ordinal, _)| ordinal).ok_or(NoDriver::Hidden)
    }

    /// Whether a card can use memory of another one directly.
    pub fn reaches(&self, card: Ordinal, other: Ordinal) -> Result<bool, Failed> {
        let mut can = 0;
        // SAFETY: the call writes what it is given a pointer to.
        check(Index::reaches, unsafe { (self.0.reaches)(&raw mut can, card, other) })?;
        Ok(can != 0)
    }

    fn properties(ordinal: Ordinal) -> Properties {
        Properties {
            kind: PINNED,
            handle_types: POSIX_FILE_DESCRIPTOR,
            location: Location { kind: ON_DEVICE, id: ordinal },
            win32: null_mut(),
            flags: [0; 8],
        }
    }

    pub fn granularity(&self, ordinal: Ordinal) -> Result<u64, Failed> {
        let mut bytes = 0;
        let properties = Self::properties(ordinal);
        // SAFETY: both pointers are good for the call.
        check(Index::granularity, unsafe {
            (self.0.granularity)(&raw mut bytes, &raw const properties, RECOMMENDED)
        })?;
        Ok(bytes as u64)
    }

    /// Memory of a card that can be exported; no context is needed.
    pub fn create(&self, ordinal: Ordinal, bytes: u64) -> Result<Memory, Failed> {
        let mut memory = 0;
        let properties = Self::properties(ordinal);
        // SAFETY: both pointers are good for the call.
        check(Index::create, unsafe {
            (self.0.create)(&raw mut memory, bytes as usize, &raw const properties, 0)
        })?;
        Ok(memory)
    }

    /// Gives memory back, as far as this process has it.
    pub fn release(&self, memory: Memory) -> Result<(), Failed> {
        // SAFETY: a number that the driver checks.
        check(Index::release, unsafe { (self.0.release)(memory) })
    }

    pub fn export(&self, memory: Memory) -> Result<OwnedFd, Failed> {
        let mut descriptor: c_int = -1;
        // SAFETY: for descriptors the call writes an int. A descriptor that comes is the caller's.
        unsafe {
            check(Index::export, (self.0.export)(&raw mut descriptor, memory, POSIX_FILE_DESCRIPTOR, 0))?;
            if descriptor < 0 {
                return Err(Failed { call: Index::export as u32, code: u32::MAX });
            }
            let descriptor = OwnedFd::from_raw_fd(descriptor);
            // Nobody says whether the driver does.
            rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC)
                .map_err(|_| Failed { call: Index::export as u32, code: u32::MAX })?;
            Ok(descriptor)
        }
    }

    pub fn import(&self, descriptor: &OwnedFd) -> Result<Memory, Failed> {
        let mut memory = 0;
        let number = descriptor.as_raw_fd() as usize as *mut c_void;
        // SAFETY: for descriptors the second argument is the number itself; the driver makes its own copy.
        check(Index::import, unsafe { (self.0.import)(&raw mut memory, number, POSIX_FILE_DESCRIPTOR) })?;
        Ok(memory)
    }

    /// The context of a card that this process shares with whoever uses CUDA's runtime; it is never released, since only
    /// processes that end with it open it.
    pub fn open_context(&self, ordinal: Ordinal) -> Result<Context, Failed> {
        let mut context = null_mut();
        // SAFETY: the call writes the pointer.
        unsafe {
            check(Index::set_flags, (self.0.set_flags)(ordinal, BLOCKING_SYNC))?;
            check(Index::retain, (self.0.retain)(&raw mut context, ordinal))?;
        }
        Ok(context)
    }

    /// Makes a context this thread's.
    pub fn enter(&self, context: Context) -> Result<(), Failed> {
        // SAFETY: a context that `open_context` gave.
        check(Index::set_current, unsafe { (self.0.set_current)(context) })
    }

    pub fn new_stream(&self) -> Result<Stream, Failed> {
        let mut stream = null_mut();
        // SAFETY: the call writes the pointer.
        check(Index::new_stream, unsafe { (self.0.new_stream)(&raw mut stream, NON_BLOCKING) })?;
        Ok(stream)
    }

    /// Maps memory for this process. On an error nothing is mapped.
    pub fn map(&self, ordinal: Ordinal, memory: Memory, bytes: u64) -> Result<Address, Failed> {
        let bytes = bytes as usize;
        let mut address = 0;
        let access = Access { location: Location { kind: ON_DEVICE, id: ordinal }, flags: READ_AND_WRITE };
        // SAFETY: the range was just reserved and nobody uses it; what fails is undone.
        unsafe {
            check(Index::reserve, (self.0.reserve)(&raw mut address, bytes, 0, 0, 0))?;
            if address == 0 {
                return Err(Failed { call: Index::reserve as u32, code: u32::MAX });
            }
            let mapped = check(Index::map, (self.0.map)(address, bytes, 0, memory, 0)).and_then(|()| {
                let allowed = (self.0.allow)(address, bytes, &raw const access, 1);
                check(Index::allow, allowed).inspect_err(|_| {
                    (self.0.unmap)(address, bytes);
                })
            });
            if let Err(failed) = mapped {
                (self.0.free)(address, bytes);
                return Err(failed);
            }
        }
        Ok(address)
    }

    /// # Safety
    /// `address` is from [`map`](Self::map) with these bytes, and nothing that was submitted uses it.
    pub unsafe fn unmap(&self, address: Address, bytes: u64) -> Result<(), Failed> {
        // SAFETY: by this function's contract.
        unsafe {
            check(Index::unmap, (self.0.unmap)(address, bytes as usize))?;
            check(Index::free, (self.0.free)(address, bytes as usize))
        }
    }

    /// Pins host memory, so that the card can reach it by itself.
    ///
    /// # Safety
    /// It stays mapped for as long as the process lives.
    pub unsafe fn register(&self, at: *mut u8, bytes: usize) -> Result<(), Failed> {
        // SAFETY: by this function's contract.
        check(Index::register, unsafe { (self.0.register)(at.cast(), bytes, 0) })
    }

    /// Copies from host memory and waits.
    ///
    /// # Safety
    /// Both ranges are mapped, and nobody else uses them meanwhile.
    pub unsafe fn to_device(
        &self,
        to: Address,
        from: *const u8,
        bytes: u64,
        on: Stream,
    ) -> Result<(), Failed> {
        // SAFETY: by this function's contract.
        check(Index::to_device, unsafe { (self.0.to_device)(to, from.cast(), bytes as usize, on) })?;
        self.synchronize(on)
    }

    /// Copies to host memory and waits.
    ///
    /// # Safety
    /// As for [`to_device`](Self::to_device).
    pub unsafe fn to_host(&self, to: *mut u8, from: Address, bytes: u64, on: Stream) -> Result<(), Failed> {
        // SAFETY: by this function's contract.
        check(Index::to_host, unsafe { (self.0.to_host)(to.cast(), from, bytes as usize, on) })?;
        self.synchronize(on)
    }

    /// Copies on the card and waits.
    ///
    /// # Safety
    /// As for [`to_device`](Self::to_device); the ranges do not overlap.
    pub unsafe fn on_device(&self, to: Address, from: Address, bytes: u64, on: Stream) -> Result<(), Failed> {
        // SAFETY: by this function's contract.
        check(Index::on_device, unsafe { (self.0.on_device)(to, from, bytes as usize, on) })?;
        self.synchronize(on)
    }

    /// Fills with zeros and waits.
    ///
    /// # Safety
    /// As for [`to_device`](Self::to_device).
    pub unsafe fn zero(&self, at: Address, bytes: u64, on: Stream) -> Result<(), Failed> {
        // SAFETY: by this function's contract.
        check(Index::fill, unsafe { (self.0.fill)(at, 0, bytes as usize, on) })?;
        self.synchronize(on)
    }

    fn synchronize(&self, stream: Stream) -> Result<(), Failed> {
        // SAFETY: a stream that `new_stream` gave.
        check(Index::synchronize, unsafe { (self.0.synchronize)(stream) })
    }
}
