//! The device `cpu:0`: the books of what it holds, and the contract's calls.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vramd_api::attach::{Handle, HandleType};
use vramd_api::{DeviceCapabilities, DeviceId, MemoryType};

use super::pages::{BASE_PAGE_BYTES, Pages};
use super::populate::populate;
use crate::host::Host;
use crate::segment::{Backing, Failed, Segment};
use crate::table::{Extent as _, Table};
use crate::{Call, DeviceError, ExportAccess, Exported, Facts, Range, Sample, SegmentId, Source, Writers};

/// What an administrator may say about host memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// The most that the device may hold; it is then the device's total. Unset: all of the machine, less a
    /// headroom of 2 % or 64 MiB, whichever is more.
    pub limit_bytes: Option<u64>,
}

/// The machine's memory as a device.
#[derive(Debug)]
pub struct Device {
    facts: Facts,
    host: Host,
    pages: Pages,
    books: Mutex<Books>,
    segments: Table<Segment>,
}

#[derive(Debug, Default)]
struct Books {
    /// The size of all segments, those being created included.
    held: u64,
    /// The part of `held` that the machine does not count as used yet: pages still to be populated.
    pending: u64,
}

impl Device {
    pub fn open(options: Options) -> Result<Self, DeviceError> {
        Ok(Self::of(Host::probe()?, options))
    }

    fn of(host: Host, options: Options) -> Self {
        let Options { limit_bytes } = options;
        let pages = Pages::choose(&host);
        let total_bytes = limit_bytes.map_or(host.total_bytes(), |limit| limit.min(host.total_bytes()));
        let facts = Facts {
            device: "cpu:0".parse::<DeviceId>().expect("a literal of the right form"),
            uuid: host.uuid(),
            luid: None,
            pci_address: None,
            name: host.processor().unwrap_or_else(|| "host memory".to_owned()),
            memory_type: MemoryType::Ram,
            total_bytes,
            granularity_bytes: pages.granularity_bytes(),
            max_segment_bytes: u64::MAX,
            page_bytes: pages.page_bytes(),
            capabilities: DeviceCapabilities {
                handle: Some(HandleType::HOST),
                read_only_export: true,
                host_access: true,
                remap: false,
                sparse: false,
                peer_copy: false,
            },
            notes: pages.notes.clone(),
        };
        Self { facts, host, pages, books: Mutex::default(), segments: Table::default() }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Every change of the books is a single sum.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What could be created now in pages of the machine's common memory.
    fn available_bytes(&self, books: &Books) -> Result<u64, DeviceError> {
        let machine = self.host.available_bytes()?.saturating_sub(books.pending);
        Ok(machine.min(self.facts.total_bytes.saturating_sub(books.held)))
    }

    /// Enters a segment into the books, if there is room for it.
    fn take(&self, bytes: u64, from: From) -> Result<Taken<'_>, DeviceError> {
        let mut books = self.books();
        let available = match from {
            From::CommonMemory => self.available_bytes(&books)?,
            From::Pool => self.facts.total_bytes.saturating_sub(books.held),
        };
        if bytes > available {
            return Err(DeviceError::OutOfMemory { requested: bytes, available });
        }
        // The pool's pages were taken from the machine when it was set up: they are in its books already.
        let pending = if from == From::Pool { 0 } else { bytes };
        books.held += bytes;
        books.pending += pending;
        Ok(Taken { device: self, bytes, pending: Mutex::new(pending) })
    }

    /// A segment out of the huge page pool; nothing if the pool has not enough.
    fn create_from_pool(
        &self,
        name: &str,
        bytes: u64,
        writers: Writers,
    ) -> Result<Option<Segment>, DeviceError> {
        if self.host.free_huge_page_bytes() < bytes {
            tracing::info!(segment = name, bytes, "the huge page pool has not enough: 4 KiB pages instead");
            return Ok(None);
        }
        let taken = self.take(bytes, From::Pool)?;
        let made = Segment::create(name, bytes, writers, Backing::HugePagePool)
            .and_then(|segment| segment.populate(0, bytes).map(|()| segment));
        match made {
            Ok(segment) => {
                taken.keep();
                Ok(Some(segment))
            }
            // Somebody else was quicker.
            Err(failed) if failed.is_full() => Ok(None),
            Err(failed) => Err(self.explain(failed, bytes)),
        }
    }

    fn create_from_common_memory(
        &self,
        name: &str,
        bytes: u64,
        writers: Writers,
    ) -> Result<Segment, DeviceError> {
        let transparent = self.pages.backing == Backing::TransparentHugePages;
        let backing = if transparent { Backing::TransparentHugePages } else { Backing::SmallPages };
        let taken = self.take(bytes, From::CommonMemory)?;
        let segment =
            Segment::create(name, bytes, writers, backing).map_err(|failed| self.explain(failed, bytes))?;
        self.bring_in(&segment, &taken)?;
        taken.keep();
        Ok(segment)
    }

    /// Populates a segment for as long as the machine has room.
    fn bring_in(&self, segment: &Segment, taken: &Taken<'_>) -> Result<(), DeviceError> {
        let requested = segment.bytes();
        // Half of the headroom may go to those who take memory at the same time, so that a request for all that
        // is available is not refused for their noise.
        let spare = self.host.headroom_bytes() / 2;
        populate(requested, |offset, chunk| {
            let available = self.host.free_bytes()?.saturating_sub(spare);
            if available < chunk {
                return Err(DeviceError::OutOfMemory { requested, available });
            }
            segment.populate(offset, chunk).map_err(|failed| self.explain(failed, requested))?;
            taken.populated(chunk);
            Ok(())
        })
    }

    fn explain(&self, failed: Failed, requested: u64) -> DeviceError {
        failed.explain(Call::Create, requested, self.host.available_bytes().unwrap_or_default())
    }
}

/// Where a segment's pages come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    CommonMemory,
    Pool,
}

/// A segment's bytes in the books while it is being made; dropped, they are taken out again.
struct Taken<'a> {
    device: &'a Device,
    bytes: u64,
    pending: Mutex<u64>,
}

impl Taken<'_> {
    fn populated(&self, bytes: u64) {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) -= bytes;
        self.device.books().pending -= bytes;
    }

    fn keep(mut self) {
        self.bytes = 0;
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut books = self.device.books();
        books.held -= self.bytes;
        books.pending -= *self.pending.get_mut().unwrap_or_else(PoisonError::into_inner);
    }
}

/// Makes sure of a range's pages. A writer may have punched holes; with no page left to fill them, an access there
/// would be a SIGBUS.
fn present(segment: &Segment, call: Call, offset: u64, bytes: u64) -> Result<(), DeviceError> {
    let start = offset & !(BASE_PAGE_BYTES - 1);
    let end = (offset + bytes).next_multiple_of(BASE_PAGE_BYTES);
    segment.populate(start, end - start).map_err(|failed| failed.explain(call, bytes, 0))
}

impl crate::Device for Device {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sample(&self) -> Result<Sample, DeviceError> {
        let total = self.facts.total_bytes;
        let books = self.books();
        let mut available_bytes = self.available_bytes(&books)?;
        if self.pages.backing == Backing::HugePagePool {
            let pool = available_bytes.saturating_add(self.host.free_huge_page_bytes());
            available_bytes = pool.min(total.saturating_sub(books.held));
        }
        Ok(Sample { used_bytes: total - available_bytes, available_bytes, held_bytes: books.held })
    }

    fn create(&self, segment: SegmentId, bytes: u64, writers: Writers) -> Result<(), DeviceError> {
        self.segments.check_new(segment, bytes, self.facts.granularity_bytes)?;
        let name = format!("vramd {} {}", self.facts.device, segment.0);
        let pool = self.pages.backing == Backing::HugePagePool;
        let from_pool = if pool { self.create_from_pool(&name, bytes, writers)? } else { None };
        let made = match from_pool {
            Some(made) => made,
            None => self.create_from_common_memory(&name, bytes, writers)?,
        };
        self.segments.insert(segment, made).inspect_err(|_| self.books().held -= bytes)
    }

    fn destroy(&self, segment: SegmentId) -> Result<(), DeviceError> {
        let removed = self.segments.remove(segment)?;
        let bytes = removed.bytes();
        drop(removed);
        self.books().held -= bytes;
        Ok(())
    }

    fn zero(&self, range: Range) -> Result<(), DeviceError> {
        let segment = self.segments.get_range(Call::Zero, range)?;
        if range.bytes == 0 {
            return Ok(());
        }
        present(&segment, Call::Zero, range.offset, range.bytes)?;
        segment.zero(range.offset, range.bytes);
        Ok(())
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let range = Range { segment, offset, bytes: bytes.len() as u64 };
        let segment = self.segments.get_range(Call::Write, range)?;
        if !bytes.is_empty() {
            present(&segment, Call::Write, offset, range.bytes)?;
            segment.write(offset, bytes);
        }
        Ok(())
    }

    fn read(&self, segment: SegmentId, offset: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let range = Range { segment, offset, bytes: bytes.len() as u64 };
        let segment = self.segments.get_range(Call::Read, range)?;
        if !bytes.is_empty() {
            present(&segment, Call::Read, offset, range.bytes)?;
            segment.read(offset, bytes);
        }
        Ok(())
    }

    fn copy(&self, from: Range, to: SegmentId, to_offset: u64) -> Result<(), DeviceError> {
        let (source, target) = self.segments.get_copy(from, to, to_offset)?;
        if from.bytes > 0 {
            present(&source, Call::Copy, from.offset, from.bytes)?;
            present(&target, Call::Copy, to_offset, from.bytes)?;
            source.copy(from.offset, &target, to_offset, from.bytes);
        }
        Ok(())
    }

    fn fill_from_file(&self, range: Range, source: &Source, source_offset: u64) -> Result<(), DeviceError> {
        self.segments
            .get_range(Call::FillFromFile, range)?
            .fill(range.offset, range.bytes, source, source_offset)
            .map_err(DeviceError::Source)
    }

    fn importers(&self, segment: SegmentId, processes: &[u32]) -> Result<Option<Vec<u32>>, DeviceError> {
        let segment = self.segments.get(Call::Importers, segment)?;
        segment.importers(processes)
    }

    /// It is never lost.
    fn adopt(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn export(&self, segment: SegmentId, access: ExportAccess) -> Result<Exported, DeviceError> {
        let descriptor = self.segments.get(Call::Export, segment)?.export(segment, access)?;
        Ok(Exported { descriptor, handle: Handle::HOST })
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::Device as _;
    use std::fs;

    const MIB: u64 = 1 << 20;

    /// A device on a machine of 1 GiB, of which 64 MiB are headroom, with that much memory available.
    fn device(available: u64) -> (tempfile::TempDir, Device) {
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir(tree.path().join("proc")).unwrap();
        let meminfo = format!("MemTotal: 1048576 kB\nMemAvailable: {} kB\n", available >> 10);
        fs::write(tree.path().join("proc/meminfo"), meminfo).unwrap();
        let device = Device::of(Host::at(tree.path()).unwrap(), Options::default());
        (tree, device)
    }

    #[test]
    fn the_headroom_is_not_given_out() {
        let (_tree, device) = device(164 * MIB);
        assert_eq!(
            device.sample().unwrap(),
            Sample { used_bytes: 924 * MIB, available_bytes: 100 * MIB, held_bytes: 0 }
        );
        let refused = device.create(SegmentId(1), 101 * MIB, Writers::DeviceOnly);
        assert!(
            matches!(refused, Err(DeviceError::OutOfMemory { available, .. }) if available == 100 * MIB),
            "{refused:?}"
        );
    }

    #[test]
    fn bytes_on_their_way_are_not_given_out_twice() {
        let (_tree, device) = device(164 * MIB);
        let first = device.take(60 * MIB, From::CommonMemory).ok().unwrap();
        assert!(device.take(60 * MIB, From::CommonMemory).is_err());
        // From here on the machine counts them itself, which this one does not.
        first.populated(40 * MIB);
        let second = device.take(60 * MIB, From::CommonMemory).ok().unwrap();
        drop((first, second));
        let books = device.books();
        assert_eq!((books.held, books.pending), (0, 0));
    }

    #[test]
    fn a_machine_that_fills_up_meanwhile_is_a_refusal_that_leaves_nothing() {
        let (tree, device) = device(164 * MIB);
        let taken = device.take(60 * MIB, From::CommonMemory).ok().unwrap();
        fs::write(tree.path().join("proc/meminfo"), "MemTotal: 1048576 kB\nMemAvailable: 40960 kB\n")
            .unwrap();
        let segment = Segment::create("test", 60 * MIB, Writers::DeviceOnly, Backing::SmallPages).unwrap();
        let refused = device.bring_in(&segment, &taken);
        assert!(
            matches!(refused, Err(DeviceError::OutOfMemory { requested, available })
                if requested == 60 * MIB && available == 8 * MIB),
            "{refused:?}"
        );
        drop(taken);
        let books = device.books();
        assert_eq!((books.held, books.pending), (0, 0));
    }
}
