//! What a plain copy of as many bytes takes on this machine.

use std::time::Instant;

use vramd_api::Bytes;

/// Copies blocks within touched memory, on that many threads; answers with bytes per second.
pub fn run(block: Bytes, total: Bytes, threads: usize) -> serde_json::Value {
    let (block, total) = (block.get() as usize, total.get() as usize);
    let each = (total / threads / block).max(1) * block;
    let mut memory: Vec<_> = (0..threads).map(|_| (vec![1u8; each], vec![2u8; each])).collect();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for (to, from) in &mut memory {
            scope.spawn(move || {
                for (to, from) in to.chunks_exact_mut(block).zip(from.chunks_exact(block)) {
                    to.copy_from_slice(from);
                    std::hint::black_box(&to);
                }
            });
        }
    });
    let seconds = begin.elapsed().as_secs_f64();
    serde_json::json!({ "bytesPerSecond": (each * threads) as f64 / seconds })
}
