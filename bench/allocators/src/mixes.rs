//! Random work: sizes spread evenly over the logarithm, blocks given back in any order.

use crate::clock::Clock;
use crate::peers::{Peer, UNIT};

pub const POOL: u64 = 16 << 30;
pub const MIXES: [Mix; 3] = [
    Mix { name: "256 B to 64 MiB", least: 256, most: 64 << 20 },
    Mix { name: "64 KiB to 2 MiB", least: 64 << 10, most: 2 << 20 },
    Mix { name: "1 MiB to 1 GiB", least: 1 << 20, most: 1 << 30 },
];

#[derive(Clone, Copy)]
pub struct Mix {
    pub name: &'static str,
    pub least: u64,
    pub most: u64,
}

impl Mix {
    pub fn size(&self, random: &mut Random) -> u64 {
        let (least, most) = ((self.least as f64).ln(), (self.most as f64).ln());
        let size = (least + (most - least) * random.share()).exp() as u64;
        size.next_multiple_of(UNIT)
    }
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[derive(Default)]
pub struct Times {
    pub take: Vec<u32>,
    pub give: Vec<u32>,
    pub refusals: usize,
}

/// Keeps `fill` of the pool in use: before each taking, random blocks go until it would fit in that share.
/// A refusal costs a random block too.
pub fn steady<P: Peer>(clock: &Clock, mix: Mix, fill: f64, takes: usize) -> Times {
    let mut random = Random(7);
    let mut pool = P::new(POOL);
    let limit = (POOL as f64 * fill) as u64;
    let mut live: Vec<(P::Block, u64)> = Vec::new();
    let mut used = 0;
    let mut times = Times::default();
    // The first fill is no steady state, nor is what comes right after it.
    let mut warm = None;
    let mut at = 0;
    while warm.is_none_or(|warm| at < warm + takes) {
        let bytes = mix.size(&mut random);
        while used + bytes > limit {
            if warm.is_none() {
                warm = Some(at + 2 * live.len());
            }
            let (block, bytes) = live.swap_remove(random.below(live.len()));
            clock.time(&mut times.give, || pool.give(block));
            used -= bytes;
        }
        if let Some(block) = clock.time(&mut times.take, || pool.take(bytes)) {
            live.push((block, bytes));
            used += bytes;
        } else {
            times.refusals += 1;
            let (block, bytes) = live.swap_remove(random.below(live.len()));
            clock.time(&mut times.give, || pool.give(block));
            used -= bytes;
        }
        at += 1;
        if warm == Some(at) {
            times = Times::default();
        }
    }
    times
}

/// A block taken for each one given back, with twice as many blocks as holes are wanted: about half as many
/// holes as blocks is what such a history settles at.
pub fn with_holes<P: Peer>(clock: &Clock, holes: usize, takes: usize) -> Times {
    let mut random = Random(11);
    let mut pool = P::new(POOL);
    let mix = MIXES[1];
    let mut live: Vec<P::Block> = Vec::new();
    while live.len() < 2 * holes {
        live.push(pool.take(mix.size(&mut random)).expect("the pool has room for all of them"));
    }
    let mut times = Times::default();
    let warm = 10 * holes;
    for at in 0..warm + takes {
        let bytes = mix.size(&mut random);
        let block = live.swap_remove(random.below(live.len()));
        clock.time(&mut times.give, || pool.give(block));
        live.push(
            clock.time(&mut times.take, || pool.take(bytes)).expect("the pool has room for all of them"),
        );
        if at == warm {
            times = Times::default();
        }
    }
    times
}

/// The used share of the pool at the first refusal. What may be in use grows by a fifth of each block taken, so
/// that four fifths of all that is taken go again, in any order, before the pool is full.
pub fn used_at_first_refusal<P: Peer>(mix: Mix, seed: u64) -> f64 {
    let mut random = Random(seed);
    let mut pool = P::new(POOL);
    let mut live: Vec<(P::Block, u64)> = Vec::new();
    let (mut used, mut limit) = (0, POOL / 4);
    loop {
        let bytes = mix.size(&mut random);
        limit += bytes / 5;
        while used + bytes > limit && !live.is_empty() {
            let (block, bytes) = live.swap_remove(random.below(live.len()));
            pool.give(block);
            used -= bytes;
        }
        let Some(block) = pool.take(bytes) else { return used as f64 / POOL as f64 };
        live.push((block, bytes));
        used += bytes;
    }
}
