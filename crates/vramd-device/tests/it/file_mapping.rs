//! What file mappings promise beyond the contract, on every device that has them.

use std::os::windows::io::{AsRawHandle as _, FromRawHandle as _, OwnedHandle};
use std::ptr;

use vramd_device::{Device, ExportAccess, Writers};
use windows::Win32::Foundation::{
    DUPLICATE_HANDLE_OPTIONS, DuplicateHandle, ERROR_ACCESS_DENIED, GetHandleInformation, HANDLE,
    HANDLE_FLAG_INHERIT,
};
use windows::Win32::System::Memory::{
    FILE_MAP_READ, FILE_MAP_WRITE, MEMORY_MAPPED_VIEW_ADDRESS, MapViewOfFile, PAGE_PROTECTION_FLAGS,
    PAGE_READWRITE, UnmapViewOfFile, VirtualProtect,
};
use windows::Win32::System::Threading::GetCurrentProcess;
use windows::core::Error;

use crate::contract::{SIZE, assert_misuse, create, export, open_cpu, open_sim};
use crate::fresh;

macro_rules! on_file_mappings {
    ($($check:ident),* $(,)?) => {
        mod cpu_device { crate::contract::checks!(Some(super::open_cpu()); $($check),*); }
        mod sim_device { crate::contract::checks!(Some(super::open_sim()); $($check),*); }
    };
}

on_file_mappings![readers_cannot_write, nobody_is_told_who_has_a_segment];

fn readers_cannot_write(device: &dyn Device) {
    for writers in [Writers::Importers, Writers::DeviceOnly] {
        let read = export(device, create(device, writers), ExportAccess::Read);
        let refused = Import::map(&read, SIZE, true).err().unwrap();
        assert_eq!(refused.code(), ERROR_ACCESS_DENIED.to_hresult());
        assert!(Import::map(&read, SIZE, false).unwrap().make_writable().is_err());
        assert_eq!(better(&read).err().unwrap().code(), ERROR_ACCESS_DENIED.to_hresult());
    }
}

/// Opens what a handle is for anew, for writing.
fn better(handle: &OwnedHandle) -> Result<OwnedHandle, Error> {
    let mut better = HANDLE::default();
    // SAFETY: both handles are of this process; the one that comes is ours.
    unsafe {
        let (process, handle) = (GetCurrentProcess(), HANDLE(handle.as_raw_handle()));
        let (rights, options) = (FILE_MAP_READ.0 | FILE_MAP_WRITE.0, DUPLICATE_HANDLE_OPTIONS(0));
        DuplicateHandle(process, handle, process, &raw mut better, rights, false, options)?;
        Ok(OwnedHandle::from_raw_handle(better.0))
    }
}

fn nobody_is_told_who_has_a_segment(device: &dyn Device) {
    let id = create(device, Writers::Importers);
    assert_eq!(device.importers(id, &[std::process::id()]).unwrap(), None);
    assert_misuse(&device.importers(fresh(), &[]));
}

pub struct Import {
    base: *mut u8,
    bytes: usize,
}

impl Import {
    pub fn map(handle: &OwnedHandle, bytes: u64, writes: bool) -> Result<Self, Error> {
        let bytes = bytes as usize;
        let access = if writes { FILE_MAP_READ | FILE_MAP_WRITE } else { FILE_MAP_READ };
        // SAFETY: a new view at an address of the system's choice.
        let view = unsafe { MapViewOfFile(HANDLE(handle.as_raw_handle()), access, 0, 0, bytes) };
        if view.Value.is_null() {
            Err(Error::from_thread())
        } else {
            Ok(Self { base: view.Value.cast(), bytes })
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut copy = vec![0; self.bytes];
        // SAFETY: the view has that many readable bytes.
        unsafe { ptr::copy_nonoverlapping(self.base, copy.as_mut_ptr(), self.bytes) };
        copy
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.bytes);
        // SAFETY: in range, and only writable views are written to here.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset), bytes.len()) };
    }

    fn make_writable(&self) -> Result<(), Error> {
        let mut before = PAGE_PROTECTION_FLAGS::default();
        // SAFETY: more rights on our own view change nothing for anybody else.
        unsafe { VirtualProtect(self.base.cast(), self.bytes, PAGE_READWRITE, &raw mut before) }
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        // SAFETY: the view is ours and ends with us.
        unsafe { UnmapViewOfFile(MEMORY_MAPPED_VIEW_ADDRESS { Value: self.base.cast() }) }
            .expect("our own view");
    }
}

/// Whether a program that is started from here has it too.
pub fn is_inherited(handle: &OwnedHandle) -> bool {
    let mut flags = 0;
    // SAFETY: the handle lives.
    unsafe { GetHandleInformation(HANDLE(handle.as_raw_handle()), &raw mut flags) }.unwrap();
    flags & HANDLE_FLAG_INHERIT.0 != 0
}
