//! A process that has allocations mapped while the daemon moves them, and what it noticed of that.

use std::io::Read as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use vramd_api::attach::Attach;
use vramd_attach::Mapped;

const PAGE: u64 = 4096;

/// Attaches, reads every page, says `ready`, and holds until its input ends. `busy`: reads all the while. Answers with
/// how many blocks were moved, and the longest times between two reads.
pub fn run(socket: &Path, allocations: &[String], busy: bool) -> anyhow::Result<serde_json::Value> {
    let blocks = allocations
        .iter()
        .map(|id| {
            let request = Attach { allocation_id: Some(id.parse()?), moves: true, ..Attach::default() };
            Mapped::attach(socket, &request).with_context(|| format!("could not attach {id}"))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let before: Vec<_> = blocks.iter().map(sum).collect();
    println!("ready");
    let ended = AtomicBool::new(false);
    let gaps = std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            ended.store(true, Ordering::Relaxed);
        });
        if busy { read(&blocks, &ended) } else { Vec::new() }
    });
    for (block, before) in blocks.iter().zip(before) {
        ensure!(sum(block) == before, "the bytes of a block have changed");
    }
    let at = |share: f64| {
        gaps.get((gaps.len().saturating_sub(1) as f64 * share) as usize).map(Duration::as_micros)
    };
    Ok(serde_json::json!({
        "moved": blocks.iter().filter(|block| block.generation() > 1).count(),
        "longestMicros": at(1.0), "p9999Micros": at(0.9999),
    }))
}

/// A word of one page after another, and the sorted times between two.
fn read(blocks: &[Mapped], ended: &AtomicBool) -> Vec<Duration> {
    let mut gaps = Vec::new();
    let mut last = Instant::now();
    let mut page = 0;
    while !ended.load(Ordering::Relaxed) {
        for block in blocks {
            let mut word = [0; 8];
            block.read_at(page * PAGE % block.bytes(), &mut word);
            std::hint::black_box(word);
            let now = Instant::now();
            gaps.push(now - last);
            last = now;
        }
        page += 1;
    }
    gaps.sort_unstable();
    gaps
}

fn sum(block: &Mapped) -> u64 {
    let mut bytes = vec![0; block.bytes() as usize];
    block.read_at(0, &mut bytes);
    bytes.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}
