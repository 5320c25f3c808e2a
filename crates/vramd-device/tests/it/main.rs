//! The contract on every backend that opens here, then what is special about each.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod contract;
#[cfg(unix)]
mod cpu;
#[cfg(unix)]
mod cuda;
#[cfg(unix)]
mod cuda_importer;
#[cfg(windows)]
mod file_mapping;
mod files;
mod importer;
#[cfg(unix)]
mod memfd;
mod sim;
#[cfg(unix)]
mod vulkan_importer;

use std::sync::atomic::{AtomicU64, Ordering};

use vramd_device::SegmentId;

/// A segment id that no other test of this process uses.
fn fresh() -> SegmentId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    SegmentId(NEXT.fetch_add(1, Ordering::Relaxed))
}
