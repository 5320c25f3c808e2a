//! Ranges of a segment against a flag for each byte: what is taken, where, and every figure.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vramd_core::Ranges;

const BYTES: u64 = 1024;

fuzz_target!(|steps: &[u8]| {
    let mut ranges = Ranges::new(BYTES);
    let mut flags = [false; BYTES as usize];
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for &[what, one, two] in steps.as_chunks::<3>().0 {
        let (one, two) = (u64::from(one), u64::from(two));
        match what % 4 {
            0 => {
                let (bytes, alignment) = (one % 32, 1 << (two % 9));
                let offset = ranges.take(bytes, alignment);
                assert_eq!(offset, lowest(&flags, bytes, alignment, 0));
                if let Some(offset) = offset {
                    flags[offset as usize..(offset + bytes) as usize].fill(true);
                    taken.push((offset, bytes));
                }
            }
            1 => {
                let (offset, bytes) = (4 * one + u64::from(what) / 4 % 4, two % 32);
                let free = is_free(&flags, offset, bytes);
                assert_eq!(ranges.is_free(offset, bytes), free);
                assert_eq!(ranges.take_at(offset, bytes), free);
                if free {
                    flags[offset as usize..(offset + bytes) as usize].fill(true);
                    taken.push((offset, bytes));
                }
            }
            2 => {
                let (bytes, modulus) = (u64::from(what) / 4, 1 << (one % 9));
                let remainder = two % modulus;
                let lowest = lowest(&flags, bytes, modulus, remainder);
                assert_eq!(ranges.find_congruent(bytes, modulus, remainder), lowest);
            }
            _ if taken.is_empty() => {}
            _ => {
                let (offset, bytes) = taken.swap_remove(one as usize % taken.len());
                flags[offset as usize..(offset + bytes) as usize].fill(false);
                ranges.give(offset, bytes);
            }
        }
        let runs = flags.split(|taken| *taken).map(|run| run.len() as u64);
        let holes: Vec<u64> = runs.filter(|length| *length > 0).collect();
        assert!(ranges.holes().map(|(_, length)| length).eq(holes.iter().copied()));
        assert_eq!(ranges.free(), holes.iter().sum::<u64>());
        assert_eq!(ranges.largest_free(), holes.iter().copied().max().unwrap_or(0));
        assert_eq!(ranges.hole_count(), holes.len());
        assert_eq!(ranges.is_empty(), taken.is_empty());
        assert_eq!(ranges.histogram().iter().sum::<u32>() as usize, holes.len());
    }
});

fn is_free(flags: &[bool], offset: u64, bytes: u64) -> bool {
    let range = offset as usize..(offset + bytes) as usize;
    bytes > 0 && flags.get(range).is_some_and(|flags| !flags.contains(&true))
}

fn lowest(flags: &[bool], bytes: u64, modulus: u64, remainder: u64) -> Option<u64> {
    (remainder..BYTES).step_by(modulus as usize).find(|&offset| is_free(flags, offset, bytes))
}
