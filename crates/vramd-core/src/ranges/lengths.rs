//! The lengths of a node's holes, or the longest below each of its children, made to be looked through at once.
//!
//! Beside each length stands a rough one of 16 bits, rounded down: what is rough enough for a request is looked at
//! exactly, and the rough ones of a whole node fill one line of the cache.

use wide::{CmpEq, CmpGt, i16x16};

/// Slots of a node.
pub const WIDTH: usize = 32;

#[derive(Debug, Clone)]
pub struct Lengths {
    /// 0 where there is nothing.
    exact: [u64; WIDTH],
    rough: Rough,
}

#[derive(Debug, Clone)]
#[repr(align(64))]
struct Rough([i16; WIDTH]);

/// A float of 6 bits of exponent and 9 of mantissa, without rounding up. It orders as lengths do, but for equals.
fn rough(length: u64) -> i16 {
    let Some(exponent) = length.checked_ilog2() else { return -1 };
    let mantissa = (length << (63 - exponent)) >> 54 & 0x1FF;
    (exponent << 9) as i16 | mantissa as i16
}

impl Rough {
    fn halves(&self) -> [i16x16; 2] {
        let [low, high] = self.0.as_chunks().0 else { unreachable!("a node has two times 16 slots") };
        [i16x16::new(*low), i16x16::new(*high)]
    }
}

fn slots([low, high]: [i16x16; 2]) -> u32 {
    low.move_mask() as u32 | (high.move_mask() as u32) << 16
}

impl Lengths {
    pub const NONE: Self = Self { exact: [0; WIDTH], rough: Rough([-1; WIDTH]) };

    #[inline]
    pub fn get(&self, slot: usize) -> u64 {
        self.exact[slot]
    }

    #[inline]
    pub fn set(&mut self, slot: usize, length: u64) {
        self.exact[slot] = length;
        self.rough.0[slot] = rough(length);
    }

    pub fn insert(&mut self, slot: usize, count: usize, length: u64) {
        insert_at(&mut self.exact, slot, count, length);
        insert_at(&mut self.rough.0, slot, count, rough(length));
    }

    pub fn remove(&mut self, slot: usize, count: usize) {
        remove_at(&mut self.exact, slot, count, 0);
        remove_at(&mut self.rough.0, slot, count, -1);
    }

    pub fn split(&mut self) -> Self {
        Self { exact: back_half(&mut self.exact, 0), rough: Rough(back_half(&mut self.rough.0, -1)) }
    }

    /// Puts what `other` has, `more` slots, behind the first `count`.
    pub fn append(&mut self, count: usize, other: &Self, more: usize) {
        self.exact[count..count + more].copy_from_slice(&other.exact[..more]);
        self.rough.0[count..count + more].copy_from_slice(&other.rough.0[..more]);
    }

    /// The first slot of `from` or more with at least this much, which is not nothing.
    #[inline]
    pub fn first_of(&self, from: usize, least: u64) -> Option<usize> {
        let below = i16x16::splat(rough(least) - 1);
        let candidates = slots(self.rough.halves().map(|half| half.cmp_gt(below)));
        let mut candidates = u64::from(candidates) >> from << from;
        while candidates != 0 {
            let slot = candidates.trailing_zeros() as usize % WIDTH;
            if self.exact[slot] >= least {
                return Some(slot);
            }
            candidates &= candidates - 1;
        }
        None
    }

    /// The longest of all but one slot.
    #[inline]
    pub fn longest_but(&self, but: usize) -> u64 {
        const SLOTS: Rough = {
            let mut slots = [0; WIDTH];
            let mut slot = 0;
            while slot < WIDTH {
                slots[slot] = (slot as u16).cast_signed();
                slot += 1;
            }
            Rough(slots)
        };
        let splat = i16x16::splat((but as u16).cast_signed());
        let [low, high] = self.rough.halves();
        let [low_slots, high_slots] = SLOTS.halves();
        // All bits set is −1, as where there is nothing.
        let others = [low | low_slots.cmp_eq(splat), high | high_slots.cmp_eq(splat)];
        let most = i16x16::splat(others[0].max(others[1]).reduce_max());
        let mut candidates = slots(others.map(|half| half.cmp_eq(most))) & !(1u64 << but) as u32;
        let mut longest = 0;
        while candidates != 0 {
            longest = longest.max(self.exact[candidates.trailing_zeros() as usize % WIDTH]);
            candidates &= candidates - 1;
        }
        longest
    }

    pub fn longest(&self) -> u64 {
        self.longest_but(WIDTH)
    }
}

pub fn insert_at<T: Copy>(slots: &mut [T; WIDTH], slot: usize, count: usize, value: T) {
    slots.copy_within(slot..count, slot + 1);
    slots[slot] = value;
}

pub fn remove_at<T: Copy>(slots: &mut [T; WIDTH], slot: usize, count: usize, none: T) {
    slots.copy_within(slot + 1..count, slot);
    slots[count - 1] = none;
}

pub fn back_half<T: Copy>(slots: &mut [T; WIDTH], none: T) -> [T; WIDTH] {
    let mut back = [none; WIDTH];
    back[..WIDTH / 2].copy_from_slice(&slots[WIDTH / 2..]);
    slots[WIDTH / 2..].fill(none);
    back
}
