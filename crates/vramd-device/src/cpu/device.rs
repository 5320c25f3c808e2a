//! The device `cpu:0`: the books of what it holds, and the contract's calls.

use std::collections::BTreeMap;
#[cfg(unix)]
use std::sync::Arc;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vramd_api::attach::{Handle, HandleType};
use vramd_api::{DeviceCapabilities, DeviceId, MemoryType};

#[cfg(unix)]
use super::ahead::Reserve;
#[cfg(unix)]
use super::memory::CHUNK_BYTES;
use super::memory::Memory;
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
    /// Pages that are made ahead while nothing else is to do, so that who needs many at once does not wait for them.
    pub ahead_bytes: u64,
}

/// From this size on, pages of a segment that only the device writes to come when they are first used, and those that were
/// made ahead are taken.
const LARGE_BYTES: u64 = 64 << 20;

/// The machine's memory as a device.
#[derive(Debug)]
pub struct Device {
    facts: Facts,
    host: Host,
    pages: Pages,
    books: Mutex<Books>,
    segments: Table<Memory>,
    #[cfg(unix)]
    reserve: Option<Arc<Reserve>>,
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
        #[cfg_attr(not(unix), allow(unused_mut, reason = "no pages are made ahead there"))]
        let mut device = Self::of(Host::probe()?, options);
        #[cfg(unix)]
        if options.ahead_bytes > 0 && device.pages.backing != Backing::HugePagePool {
            let bytes = options.ahead_bytes.next_multiple_of(CHUNK_BYTES).min(device.facts.total_bytes);
            device.reserve = Some(Reserve::start(Host::probe()?, bytes, device.pages.backing)?);
        }
        Ok(device)
    }

    fn of(host: Host, options: Options) -> Self {
        let Options { limit_bytes, .. } = options;
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
        Self {
            facts,
            host,
            pages,
            books: Mutex::default(),
            segments: Table::default(),
            #[cfg(unix)]
            reserve: None,
        }
    }

    /// What is ready to be taken, and counts as available too.
    fn ahead_bytes(&self) -> u64 {
        #[cfg(unix)]
        return self.reserve.as_ref().map_or(0, |reserve| reserve.populated());
        #[cfg(not(unix))]
        0
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Every change of the books is a single sum.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What could be created now in pages of the machine's common memory.
    fn available_bytes(&self, books: &Books) -> Result<u64, DeviceError> {
        let machine = self.host.available_bytes()?.saturating_add(self.ahead_bytes());
        let machine = machine.saturating_sub(books.pending);
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
    ) -> Result<Option<Memory>, DeviceError> {
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
                Ok(Some(Memory::all_there(segment)))
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
    ) -> Result<Memory, DeviceError> {
        let transparent = self.pages.backing == Backing::TransparentHugePages;
        let backing = if transparent { Backing::TransparentHugePages } else { Backing::SmallPages };
        let taken = self.take(bytes, From::CommonMemory)?;
        let (segment, there) = self.segment(name, &taken, writers, backing)?;
        // Elsewhere the system has them counted already.
        if cfg!(unix) && writers == Writers::DeviceOnly && bytes >= LARGE_BYTES {
            taken.keep();
            return Ok(Memory::coming(segment, there));
        }
        self.bring_in(&segment, &taken)?;
        taken.keep();
        Ok(Memory::all_there(segment))
    }

    /// A segment, and as many bytes of it as have their pages already.
    fn segment(
        &self,
        name: &str,
        taken: &Taken<'_>,
        writers: Writers,
        backing: Backing,
    ) -> Result<(Segment, u64), DeviceError> {
        let bytes = taken.bytes;
        #[cfg(unix)]
        if let Some(reserve) = &self.reserve
            // One that is much smaller would leave nothing for those that it is for.
            && (bytes >= LARGE_BYTES.max(reserve.populated() / 2) || self.host.available_bytes()? < bytes)
            && let Some(ahead) = reserve.take()
        {
            // Of whole chunks, so that each has its pages or has none.
            let there = ahead.populated().min(bytes);
            taken.populated(there);
            let segment = Segment::of(ahead, bytes, writers, backing);
            return segment.map(|it| (it, there)).map_err(|failed| self.explain(failed, bytes));
        }
        let segment = Segment::create(name, bytes, writers, backing);
        segment.map(|it| (it, 0)).map_err(|failed| self.explain(failed, bytes))
    }

    /// Makes sure of a range's pages. A writer may have punched holes, and some may not have come yet; with no page left to
    /// fill them, an access there would be a SIGBUS.
    fn present(&self, memory: &Memory, call: Call, offset: u64, bytes: u64) -> Result<(), DeviceError> {
        if !memory.is_coming() {
            let start = offset & !(BASE_PAGE_BYTES - 1);
            let end = (offset + bytes).next_multiple_of(BASE_PAGE_BYTES);
            let there = memory.segment.populate(start, end - start);
            return there.map_err(|failed| failed.explain(call, bytes, 0));
        }
        for (offset, bytes) in memory.missing(offset, bytes) {
            let available = self.free_for(bytes)?;
            if available < bytes {
                return Err(DeviceError::OutOfMemory { requested: bytes, available });
            }
            memory
                .segment
                .populate(offset, bytes)
                .map_err(|failed| failed.explain(call, bytes, available))?;
            self.books().pending -= memory.came(offset, bytes);
        }
        Ok(())
    }

    /// Populates a segment for as long as the machine has room.
    fn bring_in(&self, segment: &Segment, taken: &Taken<'_>) -> Result<(), DeviceError> {
        let requested = segment.bytes();
        let there = requested - taken.pending();
        populate(requested - there, |offset, chunk| {
            let offset = there + offset;
            let available = self.free_for(chunk)?;
            if available < chunk {
                return Err(DeviceError::OutOfMemory { requested, available });
            }
            segment.populate(offset, chunk).map_err(|failed| self.explain(failed, requested))?;
            taken.populated(chunk);
            Ok(())
        })
    }

    /// What the machine has for pages that were promised. Where it is short, those that were made ahead go first.
    fn free_for(&self, bytes: u64) -> Result<u64, DeviceError> {
        // Half of the headroom may go to those who take memory at the same time, so that a request for all that
        // is available is not refused for their noise.
        let spare = self.host.headroom_bytes() / 2;
        let free = || Ok(self.host.free_bytes()?.saturating_sub(spare));
        #[cfg(unix)]
        if let Some(reserve) = &self.reserve {
            reserve.rest();
            if free()? < bytes {
                drop(reserve.take());
            }
        }
        #[cfg(not(unix))]
        let _ = bytes;
        free()
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

    fn pending(&self) -> u64 {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has not come yet stays pending.
    fn keep(mut self) {
        self.bytes = 0;
        *self.pending.get_mut().unwrap_or_else(PoisonError::into_inner) = 0;
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut books = self.device.books();
        books.held -= self.bytes;
        books.pending -= *self.pending.get_mut().unwrap_or_else(PoisonError::into_inner);
    }
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
        let ready_bytes = self.ahead_bytes().min(available_bytes);
        Ok(Sample {
            used_bytes: total - available_bytes,
            available_bytes,
            held_bytes: books.held,
            ready_bytes,
        })
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
        let (bytes, missing) = (removed.bytes(), removed.missing_bytes());
        drop(removed);
        let mut books = self.books();
        books.held -= bytes;
        books.pending -= missing;
        Ok(())
    }

    fn zero(&self, range: Range) -> Result<(), DeviceError> {
        let segment = self.segments.get_range(Call::Zero, range)?;
        if range.bytes == 0 {
            return Ok(());
        }
        self.present(&segment, Call::Zero, range.offset, range.bytes)?;
        segment.segment.zero(range.offset, range.bytes);
        Ok(())
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let range = Range { segment, offset, bytes: bytes.len() as u64 };
        let segment = self.segments.get_range(Call::Write, range)?;
        if !bytes.is_empty() {
            self.present(&segment, Call::Write, offset, range.bytes)?;
            segment.segment.write(offset, bytes);
        }
        Ok(())
    }

    fn read(&self, segment: SegmentId, offset: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let range = Range { segment, offset, bytes: bytes.len() as u64 };
        let segment = self.segments.get_range(Call::Read, range)?;
        if !bytes.is_empty() {
            self.present(&segment, Call::Read, offset, range.bytes)?;
            segment.segment.read(offset, bytes);
        }
        Ok(())
    }

    fn copy(&self, from: Range, to: SegmentId, to_offset: u64) -> Result<(), DeviceError> {
        let (source, target) = self.segments.get_copy(from, to, to_offset)?;
        if from.bytes > 0 {
            self.present(&source, Call::Copy, from.offset, from.bytes)?;
            self.present(&target, Call::Copy, to_offset, from.bytes)?;
            source.segment.copy(from.offset, &target.segment, to_offset, from.bytes);
        }
        Ok(())
    }

    fn fill_from_file(&self, range: Range, source: &Source, source_offset: u64) -> Result<(), DeviceError> {
        let target = self.segments.get_range(Call::FillFromFile, range)?;
        if target.is_coming() {
            self.present(&target, Call::FillFromFile, range.offset, range.bytes)?;
        }
        #[cfg(unix)]
        if let Some(reserve) = &self.reserve {
            reserve.rest();
        }
        let read = target.segment.fill(range.offset, range.bytes, source, source_offset);
        read.map_err(DeviceError::Source)
    }

    fn used_by(&self, pids: &[u32]) -> Result<BTreeMap<u32, u64>, DeviceError> {
        Ok(self.host.private_bytes(pids))
    }

    fn importers(&self, segment: SegmentId, processes: &[u32]) -> Result<Option<Vec<u32>>, DeviceError> {
        self.segments.get(Call::Importers, segment)?.segment.importers(processes)
    }

    /// It is never lost.
    fn adopt(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn export(&self, segment: SegmentId, access: ExportAccess) -> Result<Exported, DeviceError> {
        let memory = self.segments.get(Call::Export, segment)?;
        if memory.is_coming() {
            // Those of padding, which nobody has used.
            self.present(&memory, Call::Export, 0, memory.bytes())?;
        }
        let descriptor = memory.segment.export(segment, access)?;
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
            Sample { used_bytes: 924 * MIB, available_bytes: 100 * MIB, held_bytes: 0, ready_bytes: 0 }
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
