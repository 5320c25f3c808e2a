//! Bringing in a new segment's pages, on several threads for large ones.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::DeviceError;

/// Small enough that what all threads take between two looks at the machine stays inside the headroom.
const CHUNK_BYTES: u64 = 16 << 20;

/// From this size on, a second thread is worth starting.
const PARALLEL_BYTES: u64 = 256 << 20;

/// The kernel's page zeroing is bound by memory beyond this.
const MAX_THREADS: u64 = 4;

/// Has `step` bring in `bytes`, chunk by chunk, given as offset and size. Stops at the first error.
pub(super) fn populate(
    bytes: u64,
    step: impl Fn(u64, u64) -> Result<(), DeviceError> + Sync,
) -> Result<(), DeviceError> {
    let next = AtomicU64::new(0);
    let work = || loop {
        let offset = next.fetch_add(CHUNK_BYTES, Ordering::Relaxed);
        if offset >= bytes {
            return Ok(());
        }
        if let Err(error) = step(offset, CHUNK_BYTES.min(bytes - offset)) {
            next.store(bytes, Ordering::Relaxed);
            return Err(error);
        }
    };
    let threads = if bytes < PARALLEL_BYTES {
        1
    } else {
        thread::available_parallelism().map_or(1, |count| count.get() as u64).min(MAX_THREADS)
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
            // A machine that has no thread left for us still has this one.
            .filter_map(|_| thread::Builder::new().name("populate".to_owned()).spawn_scoped(scope, work).ok())
            .collect();
        let mut result = work();
        for other in others {
            let other = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(other);
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn every_byte_is_brought_in_once() {
        for bytes in [4096, CHUNK_BYTES, CHUNK_BYTES + 4096, PARALLEL_BYTES - 4096, PARALLEL_BYTES + 4096] {
            let seen = Mutex::new(Vec::new());
            populate(bytes, |offset, chunk| {
                seen.lock().unwrap().push((offset, chunk));
                Ok(())
            })
            .unwrap();
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            let end = seen.into_iter().fold(0, |end, (offset, chunk)| {
                assert_eq!(offset, end);
                end + chunk
            });
            assert_eq!(end, bytes);
        }
    }

    #[test]
    fn an_error_in_any_chunk_is_the_result_and_stops_the_rest() {
        let bytes = 4 * PARALLEL_BYTES;
        for bad in [0, 7, bytes / CHUNK_BYTES - 1] {
            let result = populate(bytes, |offset, _| {
                if offset == bad * CHUNK_BYTES {
                    return Err(DeviceError::OutOfMemory { requested: bytes, available: offset });
                }
                Ok(())
            });
            assert!(
                matches!(result, Err(DeviceError::OutOfMemory { available, .. }) if available == bad * CHUNK_BYTES),
                "{result:?}"
            );
        }
    }
}
