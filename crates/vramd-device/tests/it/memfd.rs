//! What memory files promise beyond the contract, on every device that has them.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::ptr;

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use vramd_device::{Device, ExportAccess, Writers};

use crate::contract::{SIZE, assert_misuse, create, export, open_cpu, open_sim};
use crate::fresh;

macro_rules! on_memory_files {
    ($($check:ident),* $(,)?) => {
        mod cpu_device { crate::contract::checks!(Some(super::open_cpu()); $($check),*); }
        mod sim_device { crate::contract::checks!(Some(super::open_sim()); $($check),*); }
    };
}

on_memory_files![
    a_process_that_has_a_segment_open_is_named_until_it_is_gone,
    readers_cannot_write,
    a_device_only_segment_is_never_writable_for_importers,
    nobody_changes_the_size,
];

fn a_process_that_has_a_segment_open_is_named_until_it_is_gone(device: &dyn Device) {
    let id = create(device, Writers::Importers);
    let read = export(device, id, ExportAccess::Read);
    // It has the descriptor as its input, and is ended below.
    let mut child = std::process::Command::new("sleep").arg("60").stdin(read).spawn().unwrap();
    let processes = [std::process::id(), child.id(), u32::MAX];
    assert_eq!(device.importers(id, &processes).unwrap(), Some(vec![child.id()]));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(device.importers(id, &processes).unwrap(), Some(Vec::new()));
    assert_misuse(&device.importers(fresh(), &processes));
}

fn readers_cannot_write(device: &dyn Device) {
    let id = create(device, Writers::Importers);
    let read = export(device, id, ExportAccess::Read);
    let refused = Import::map(&read, SIZE, true);
    assert_eq!(refused.err(), Some(Errno::ACCESS));
    assert_eq!(Import::read(&read, SIZE).make_writable(), Err(Errno::ACCESS));
}

fn a_device_only_segment_is_never_writable_for_importers(device: &dyn Device) {
    let id = create(device, Writers::DeviceOnly);
    let read = export(device, id, ExportAccess::Read);
    assert_eq!(Import::map(&read, SIZE, true).err(), Some(Errno::ACCESS));
    assert_eq!(Import::read(&read, SIZE).make_writable(), Err(Errno::ACCESS));
    match reopen_writable(&read) {
        Err(refused) => assert_eq!(refused, Errno::ACCESS),
        Ok(reopened) => {
            assert_eq!(Import::map(&reopened, SIZE, true).err(), Some(Errno::PERM));
            assert_eq!(Import::read(&reopened, SIZE).make_writable(), Err(Errno::ACCESS));
            assert!(rustix::io::pwrite(&reopened, b"x", 0).is_err());
            assert!(rustix::fs::fallocate(&reopened, HOLE, 0, SIZE).is_err());
        }
    }
    // The device itself still writes.
    device.write(id, 0, b"x").unwrap();
    assert_eq!(Import::read(&read, SIZE).bytes()[0], b'x');
}

const HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

fn nobody_changes_the_size(device: &dyn Device) {
    let closed = create(device, Writers::DeviceOnly);
    let open = create(device, Writers::Importers);
    let mut descriptors = vec![
        export(device, closed, ExportAccess::Read),
        export(device, open, ExportAccess::Read),
        export(device, open, ExportAccess::Write),
    ];
    let reopened: Vec<_> = descriptors.iter().filter_map(|fd| reopen_writable(fd).ok()).collect();
    descriptors.extend(reopened);
    for descriptor in &descriptors {
        for bytes in [0, SIZE - 4096, SIZE + (2 << 20)] {
            assert!(rustix::fs::ftruncate(descriptor, bytes).is_err());
        }
        assert!(rustix::fs::fcntl_add_seals(descriptor, rustix::fs::SealFlags::WRITE).is_err());
        assert_eq!(rustix::fs::fstat(descriptor).unwrap().st_size, SIZE.cast_signed());
    }
}

pub struct Import {
    base: *mut u8,
    bytes: usize,
}

impl Import {
    pub fn map(file: &OwnedFd, bytes: u64, writes: bool) -> Result<Self, Errno> {
        let bytes = bytes as usize;
        let access = if writes { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), bytes, access, MapFlags::SHARED, file, 0) }?;
        Ok(Self { base: base.cast(), bytes })
    }

    pub fn read(file: &OwnedFd, bytes: u64) -> Self {
        Self::map(file, bytes, false).expect("a read descriptor can be mapped for reading")
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut copy = vec![0; self.bytes];
        // SAFETY: the mapping has that many readable bytes.
        unsafe { ptr::copy_nonoverlapping(self.base, copy.as_mut_ptr(), self.bytes) };
        copy
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.bytes);
        // SAFETY: in range, and only writable mappings are written to here.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset), bytes.len()) };
    }

    pub fn make_writable(&self) -> Result<(), Errno> {
        // SAFETY: more rights on our own mapping change nothing for anybody else.
        unsafe {
            rustix::mm::mprotect(self.base.cast(), self.bytes, MprotectFlags::READ | MprotectFlags::WRITE)
        }
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and ends with us.
        unsafe { rustix::mm::munmap(self.base.cast(), self.bytes) }.expect("our own mapping");
    }
}

/// Opens a descriptor's file anew for reading and writing, which only a privileged user may.
pub fn reopen_writable(file: &OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::fs::open(
        format!("/proc/self/fd/{}", file.as_raw_fd()),
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// Whether a program that is started from here has it too.
pub fn is_inherited(descriptor: &OwnedFd) -> bool {
    !rustix::io::fcntl_getfd(descriptor).unwrap().contains(rustix::io::FdFlags::CLOEXEC)
}
