//! What devices have in common whose bytes go through staging memory.

use crate::{Device, DeviceError, Range, SegmentId};

/// A range's parts of at most so many bytes: places in the segment, and offsets in the range.
pub(crate) fn parts(range: Range, most: u64) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    (0..range.bytes).step_by(most as usize).map(move |begin| {
        let end = range.bytes.min(begin + most);
        (range.offset + begin, begin as usize..end as usize)
    })
}

/// [`Device::write`] by way of [`Device::write_from`].
pub(crate) fn write(
    device: &dyn Device,
    segment: SegmentId,
    offset: u64,
    bytes: &[u8],
) -> Result<(), DeviceError> {
    let range = Range { segment, offset, bytes: bytes.len() as u64 };
    device.write_from(range, &mut Vec::new(), &mut |at, part| {
        part.copy_from_slice(&bytes[at as usize..][..part.len()]);
        Ok(())
    })
}

/// [`Device::read`] by way of [`Device::read_into`].
pub(crate) fn read(
    device: &dyn Device,
    segment: SegmentId,
    offset: u64,
    bytes: &mut [u8],
) -> Result<(), DeviceError> {
    let range = Range { segment, offset, bytes: bytes.len() as u64 };
    device.read_into(range, &mut Vec::new(), &mut |at, part| {
        bytes[at as usize..][..part.len()].copy_from_slice(part);
        Ok(())
    })
}
