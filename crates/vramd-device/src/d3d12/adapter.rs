//! The libraries, and what DXGI says about each adapter. Nothing here takes memory on a card.

use std::sync::OnceLock;

use libloading::os::windows::{LOAD_LIBRARY_SEARCH_SYSTEM32, Library};
use windows::Win32::Graphics::Direct3D::D3D_FEATURE_LEVEL_11_0;
use windows::Win32::Graphics::Direct3D12::ID3D12Device;
use windows::Win32::Graphics::Dxgi::{
    DXGI_ADAPTER_FLAG_SOFTWARE, DXGI_ERROR_NOT_FOUND, DXGI_MEMORY_SEGMENT_GROUP_LOCAL,
    DXGI_QUERY_VIDEO_MEMORY_INFO, IDXGIAdapter3, IDXGIFactory1,
};
use windows::core::{GUID, HRESULT, Interface as _};

use super::context::Failed;

/// Why no adapter can be looked for.
#[derive(Debug, thiserror::Error)]
pub enum NoDirect3d {
    #[error("a library of the system is not there: {0}")]
    Library(#[from] libloading::Error),
    #[error("{0}")]
    Refused(#[from] windows::core::Error),
}

type CreateFactory = unsafe extern "system" fn(*const GUID, *mut *mut std::ffi::c_void) -> HRESULT;

/// The libraries of the system, and what we call in them. They stay loaded: drivers have threads of their own in them.
struct Api {
    create_factory: CreateFactory,
    create_device: unsafe extern "system" fn(
        *mut std::ffi::c_void,
        windows::Win32::Graphics::Direct3D::D3D_FEATURE_LEVEL,
        *const GUID,
        *mut *mut std::ffi::c_void,
    ) -> HRESULT,
    /// What the two point into.
    _libraries: [Library; 2],
}

impl Api {
    fn get() -> Result<&'static Self, NoDirect3d> {
        static API: OnceLock<Api> = OnceLock::new();
        if let Some(api) = API.get() {
            return Ok(api);
        }
        let api = Self::load()?;
        // One factory stays. On Wine the last one takes libraries with it that open devices still call.
        std::mem::forget(api.factory()?);
        Ok(API.get_or_init(|| api))
    }

    fn factory(&self) -> windows::core::Result<IDXGIFactory1> {
        let mut factory = std::ptr::null_mut();
        // SAFETY: the answer is a reference to an object of the interface that was asked for.
        unsafe {
            (self.create_factory)(&IDXGIFactory1::IID, &raw mut factory).ok()?;
            Ok(IDXGIFactory1::from_raw(factory))
        }
    }

    fn load() -> Result<Self, NoDirect3d> {
        // SAFETY: the libraries' initialisers run, which we have to trust like any driver; the types are those of the
        // platform's headers.
        unsafe {
            let (dxgi, d3d12) = (load("dxgi.dll")?, load("d3d12.dll")?);
            let create_factory = *dxgi.get(c"CreateDXGIFactory1")?;
            let create_device = *d3d12.get(c"D3D12CreateDevice")?;
            Ok(Self { create_factory, create_device, _libraries: [dxgi, d3d12] })
        }
    }
}

/// Only the system's own library: nobody puts another one beside the program.
///
/// # Safety
/// Its initialisers run.
unsafe fn load(name: &str) -> Result<Library, libloading::Error> {
    // SAFETY: by this function's contract.
    unsafe { Library::load_with_flags(name, LOAD_LIBRARY_SEARCH_SYSTEM32) }
}

type CreateDirectMl =
    unsafe extern "system" fn(*mut std::ffi::c_void, i32, *const GUID, *mut *mut std::ffi::c_void) -> HRESULT;

/// `IDMLDevice`, as the platform's header has it.
const IDML_DEVICE: GUID = GUID::from_u128(0x6dbd_6437_96fd_423f_a98c_ae5e_7c2a_573f);

/// One adapter, as DXGI describes it.
#[derive(Clone)]
pub struct Adapter {
    api: &'static Api,
    raw: IDXGIAdapter3,
    pub(super) name: String,
    pub(super) uuid: String,
    pub(super) luid: u64,
    software: bool,
    pub(super) dedicated_bytes: u64,
    pub(super) shared_bytes: u64,
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter").field("name", &self.name).field("uuid", &self.uuid).finish_non_exhaustive()
    }
}

/// Asks DXGI for all adapters, in its order.
pub fn discover() -> Result<Vec<Adapter>, NoDirect3d> {
    let api = Api::get()?;
    let factory = api.factory()?;
    let mut found: Vec<Adapter> = Vec::new();
    for index in 0.. {
        // SAFETY: a plain question.
        let raw = match unsafe { factory.EnumAdapters1(index) } {
            Ok(raw) => raw,
            Err(error) if error.code() == DXGI_ERROR_NOT_FOUND => break,
            Err(error) => return Err(error.into()),
        };
        // Older systems do not tell of budgets.
        let Ok(raw) = raw.cast::<IDXGIAdapter3>() else { continue };
        // SAFETY: as above.
        let facts = unsafe { raw.GetDesc1() }?;
        // What follows the zero is whatever was there before.
        let name = facts.Description.split(|unit| *unit == 0).next().unwrap_or_default();
        // No driver has a name for one card of several alike: their order has to do.
        let model = format!(
            "dxgi-{:04x}-{:04x}-{:08x}-{:02x}",
            facts.VendorId, facts.DeviceId, facts.SubSysId, facts.Revision
        );
        let alike = found.iter().filter(|adapter| adapter.uuid.starts_with(&model)).count();
        let luid = facts.AdapterLuid;
        found.push(Adapter {
            api,
            raw,
            name: String::from_utf16_lossy(name).replace(char::is_control, "?"),
            uuid: format!("{model}-{alike}"),
            luid: u64::from(luid.HighPart.cast_unsigned()) << 32 | u64::from(luid.LowPart),
            software: facts.Flags & DXGI_ADAPTER_FLAG_SOFTWARE.0.cast_unsigned() != 0,
            dedicated_bytes: facts.DedicatedVideoMemory as u64,
            shared_bytes: facts.SharedSystemMemory as u64,
        });
    }
    Ok(found)
}

impl Adapter {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// It runs on the processor and its memory is the machine's: for tests.
    pub fn is_software(&self) -> bool {
        self.software
    }

    /// What the system would let this process have of the card's own memory, and what it counts it as having.
    pub(super) fn budget(&self) -> Option<(u64, u64)> {
        let mut info = DXGI_QUERY_VIDEO_MEMORY_INFO::default();
        // SAFETY: the structure is ours.
        unsafe { self.raw.QueryVideoMemoryInfo(0, DXGI_MEMORY_SEGMENT_GROUP_LOCAL, &raw mut info) }.ok()?;
        Some((info.Budget, info.CurrentUsage))
    }

    /// Whether DirectML works on it, for programs that compute with that; the daemon itself does not. Its library is
    /// loaded for this question alone.
    pub fn check_directml(&self) -> Result<(), NoDirect3d> {
        let device = self.open().map_err(|failed| failed.error)?;
        let mut made = std::ptr::null_mut();
        // SAFETY: as for Direct3D itself; both objects are given back before the library.
        unsafe {
            let library = load("DirectML.dll")?;
            let create = *library.get::<CreateDirectMl>(c"DMLCreateDevice")?;
            create(device.as_raw(), 0, &IDML_DEVICE, &raw mut made).ok()?;
            if !made.is_null() {
                drop(windows::core::IUnknown::from_raw(made));
            }
        }
        Ok(())
    }

    pub(super) fn open(&self) -> Result<ID3D12Device, Failed> {
        let mut device = std::ptr::null_mut();
        // SAFETY: the adapter lives; the answer is a reference to an object of the interface that was asked for.
        unsafe {
            let made = (self.api.create_device)(
                self.raw.as_raw(),
                D3D_FEATURE_LEVEL_11_0,
                &ID3D12Device::IID,
                &raw mut device,
            );
            made.ok().map_err(Failed::at("D3D12CreateDevice"))?;
            Ok(ID3D12Device::from_raw(device))
        }
    }
}
