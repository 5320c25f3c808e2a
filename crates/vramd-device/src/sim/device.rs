//! The devices `sim:N`: capacity by a counter, contents in sparse host memory, every byte through the link.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vramd_api::attach::{Handle, HandleType};
use vramd_api::{Bytes, DeviceCapabilities, DeviceId, MemoryType};

use super::faults::Faults;
use super::link::Link;
use super::spec::{BadSpec, Spec};
use crate::host::Host;
use crate::segment::{Backing, Failed, Segment};
use crate::source::{DIRECT_ALIGN, READ_BYTES};
use crate::table::{Extent as _, Table};
use crate::{
    Call, DeviceError, ExportAccess, Exported, Facts, Process, Range, Sample, SegmentId, Source, Writers,
};

/// One simulated device.
#[derive(Debug)]
pub struct Device {
    facts: Facts,
    faults: Faults,
    link: Link,
    host: Host,
    held: Mutex<u64>,
    segments: Table<Segment>,
}

/// Why a simulated device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    BadSpec(#[from] BadSpec),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl Device {
    pub fn open(spec: Spec) -> Result<Self, OpenError> {
        spec.check().map_err(|reason| BadSpec { text: format!("{spec:?}"), reason })?;
        let Spec { ordinal, total_bytes, bytes_per_second, granularity_bytes } = spec;
        let device: DeviceId = format!("sim:{ordinal}").parse().map_err(|error: vramd_api::BadName| {
            BadSpec { text: format!("{spec:?}"), reason: error.to_string() }
        })?;
        let facts = Facts {
            device,
            uuid: format!("sim-{ordinal}"),
            luid: None,
            pci_address: None,
            name: format!("Simulated {}", Bytes::show(total_bytes)),
            memory_type: MemoryType::Vram,
            total_bytes,
            granularity_bytes,
            max_segment_bytes: u64::MAX,
            page_bytes: 4096,
            capabilities: DeviceCapabilities {
                handle: Some(HandleType::HOST),
                read_only_export: true,
                host_access: false,
                remap: false,
                sparse: false,
                peer_copy: false,
            },
            notes: Vec::new(),
        };
        Ok(Self {
            facts,
            faults: Faults::default(),
            link: Link::new(bytes_per_second),
            host: Host::probe()?,
            held: Mutex::new(0),
            segments: Table::default(),
        })
    }

    /// The switchboard for what is to go wrong.
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }

    fn held(&self) -> MutexGuard<'_, u64> {
        // Every change of the counter is a single sum.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn available_bytes(&self, held: u64) -> u64 {
        self.facts.total_bytes.saturating_sub(held).saturating_sub(self.faults.foreign_bytes())
    }

    /// Moves a range over the link in parts; `part` gets the place in the segment and the offset in the range.
    fn transfer(
        &self,
        range: Range,
        mut part: impl FnMut(u64, std::ops::Range<usize>) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let bytes = range.bytes as usize;
        for begin in (0..bytes).step_by(READ_BYTES) {
            let end = bytes.min(begin + READ_BYTES);
            self.link.transfer((end - begin) as u64);
            self.faults.check_lost()?;
            part(range.offset + begin as u64, begin..end)?;
        }
        Ok(())
    }

    /// The pages behind a write come from the machine, which may have none.
    fn check_host(&self, bytes: usize) -> Result<(), DeviceError> {
        let (requested, available) = (bytes as u64, self.host.available_bytes()?);
        if requested > available { Err(DeviceError::OutOfMemory { requested, available }) } else { Ok(()) }
    }

    fn explain(&self, call: Call, bytes: u64) -> impl FnOnce(Failed) -> DeviceError {
        let available = self.available_bytes(*self.held());
        move |failed| failed.explain(call, bytes, available)
    }
}

impl crate::Device for Device {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn sample(&self) -> Result<Sample, DeviceError> {
        self.faults.enter(Call::Sample, 0)?;
        let held_bytes = *self.held();
        let available_bytes = self.available_bytes(held_bytes);
        Ok(Sample {
            used_bytes: self.facts.total_bytes - available_bytes,
            available_bytes,
            held_bytes,
            ready_bytes: 0,
        })
    }

    fn create(&self, segment: SegmentId, bytes: u64, writers: Writers) -> Result<(), DeviceError> {
        self.segments.check_new(segment, bytes, self.facts.granularity_bytes)?;
        self.faults.enter(Call::Create, bytes)?;
        {
            let mut held = self.held();
            let available = self.available_bytes(*held);
            if bytes > available {
                return Err(DeviceError::OutOfMemory { requested: bytes, available });
            }
            *held += bytes;
        }
        let name = format!("vramd {} {}", self.facts.device, segment.0);
        Segment::create(&name, bytes, writers, Backing::Sparse)
            .map_err(self.explain(Call::Create, bytes))
            .and_then(|made| self.segments.insert(segment, made))
            .inspect_err(|_| *self.held() -= bytes)
    }

    fn destroy(&self, segment: SegmentId) -> Result<(), DeviceError> {
        match self.faults.enter(Call::Destroy, 0) {
            Ok(()) | Err(DeviceError::Lost { .. }) => {}
            Err(error) => return Err(error),
        }
        let removed = self.segments.remove(segment)?;
        let bytes = removed.bytes();
        drop(removed);
        *self.held() -= bytes;
        Ok(())
    }

    fn zero(&self, range: Range) -> Result<(), DeviceError> {
        let target = self.segments.get_range(Call::Zero, range)?;
        self.faults.enter(Call::Zero, range.bytes)?;
        self.transfer(range, |at, part| {
            target.zero_sparsely(at, part.len() as u64).map_err(self.explain(Call::Zero, range.bytes))
        })
    }

    fn write(&self, segment: SegmentId, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let range = Range { segment, offset, bytes: bytes.len() as u64 };
        let target = self.segments.get_range(Call::Write, range)?;
        self.faults.enter(Call::Write, range.bytes)?;
        self.transfer(range, |at, part| {
            self.check_host(part.len())?;
            target.write(at, &bytes[part]);
            Ok(())
        })
    }

    fn read(&self, segment: SegmentId, offset: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let range = Range { segment, offset, bytes: bytes.len() as u64 };
        let target = self.segments.get_range(Call::Read, range)?;
        self.faults.enter(Call::Read, range.bytes)?;
        self.transfer(range, |at, part| {
            target.read_sparsely(at, &mut bytes[part]).map_err(self.explain(Call::Read, range.bytes))
        })
    }

    fn copy(&self, from: Range, to: SegmentId, to_offset: u64) -> Result<(), DeviceError> {
        let (source, target) = self.segments.get_copy(from, to, to_offset)?;
        self.faults.enter(Call::Copy, from.bytes)?;
        for begin in (0..from.bytes).step_by(READ_BYTES) {
            let bytes = (from.bytes - begin).min(READ_BYTES as u64);
            self.faults.check_lost()?;
            self.check_host(bytes as usize)?;
            source
                .copy_sparsely(from.offset + begin, &target, to_offset + begin, bytes)
                .map_err(self.explain(Call::Copy, bytes))?;
        }
        Ok(())
    }

    fn fill_from_file(&self, range: Range, source: &Source, source_offset: u64) -> Result<(), DeviceError> {
        let target = self.segments.get_range(Call::FillFromFile, range)?;
        self.faults.enter(Call::FillFromFile, range.bytes)?;
        let mut staging = vec![0; range.bytes.min(READ_BYTES as u64) as usize + 2 * DIRECT_ALIGN];
        // As far from a multiple of 4096 as the place in the file, so that the read can be a direct one.
        let skip = staging.as_ptr().align_offset(DIRECT_ALIGN) + source_offset as usize % DIRECT_ALIGN;
        self.transfer(range, |at, part| {
            self.check_host(part.len())?;
            let staged = &mut staging[skip..][..part.len()];
            source.read(staged, source_offset + part.start as u64).map_err(DeviceError::Source)?;
            target.write(at, staged);
            Ok(())
        })
    }

    fn processes(&self) -> Result<Option<Vec<Process>>, DeviceError> {
        self.faults.check_lost()?;
        Ok(Some(self.faults.processes()))
    }

    fn importers(&self, segment: SegmentId, processes: &[u32]) -> Result<Option<Vec<u32>>, DeviceError> {
        let segment = self.segments.get(Call::Importers, segment)?;
        self.faults.enter(Call::Importers, 0)?;
        segment.importers(processes)
    }

    fn adopt(&self) -> Result<(), DeviceError> {
        self.faults.adopt()?;
        crate::works(self)
    }

    fn export(&self, segment: SegmentId, access: ExportAccess) -> Result<Exported, DeviceError> {
        let source = self.segments.get(Call::Export, segment)?;
        self.faults.enter(Call::Export, 0)?;
        Ok(Exported { descriptor: source.export(segment, access)?, handle: Handle::HOST })
    }
}
