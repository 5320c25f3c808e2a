//! Ranges against the dullest model: a flag for each byte.

use proptest::prelude::*;
use vramd_core::Ranges;

/// Which bytes are taken, and what was taken.
struct Flags {
    flags: Vec<bool>,
    taken: Vec<(u64, u64)>,
}

impl Flags {
    fn new(bytes: usize) -> Self {
        Self { flags: vec![false; bytes], taken: Vec::new() }
    }

    fn is_free(&self, offset: u64, bytes: u64) -> bool {
        let (offset, bytes) = (offset as usize, bytes as usize);
        bytes > 0 && self.flags.get(offset..offset + bytes).is_some_and(|flags| !flags.contains(&true))
    }

    fn find(&self, bytes: u64, modulus: u64, remainder: u64) -> Option<u64> {
        let mut offsets = (0..self.flags.len() as u64).filter(|offset| offset % modulus == remainder);
        offsets.find(|&offset| self.is_free(offset, bytes))
    }

    fn take(&mut self, offset: u64, bytes: u64) {
        self.flags[offset as usize..(offset + bytes) as usize].fill(true);
        self.taken.push((offset, bytes));
    }

    fn give(&mut self, which: usize) -> (u64, u64) {
        let (offset, bytes) = self.taken.swap_remove(which % self.taken.len());
        self.flags[offset as usize..(offset + bytes) as usize].fill(false);
        (offset, bytes)
    }

    fn holes(&self) -> Vec<(u64, u64)> {
        let mut offset = 0;
        let runs = self.flags.split_inclusive(|taken| *taken).map(|run| {
            let hole = (offset, run.iter().filter(|taken| !**taken).count() as u64);
            offset += run.len() as u64;
            hole
        });
        runs.filter(|(_, length)| *length > 0).collect()
    }

    fn check(&self, ranges: &Ranges) {
        let holes = self.holes();
        assert_eq!(ranges.holes().collect::<Vec<_>>(), holes);
        let free: u64 = holes.iter().map(|(_, length)| length).sum();
        let largest = holes.iter().map(|(_, length)| *length).max().unwrap_or(0);
        assert_eq!(ranges.free(), free);
        assert_eq!(ranges.largest_free(), largest);
        assert_eq!(ranges.hole_count(), holes.len());
        assert_eq!(ranges.is_empty(), self.taken.is_empty());
        let mut histogram = [0; 64];
        for (_, length) in holes {
            histogram[length.ilog2() as usize] += 1;
        }
        assert_eq!(ranges.histogram(), &histogram);
        let fragmentation = if free == 0 { 0.0 } else { 1.0 - largest as f64 / free as f64 };
        assert!((ranges.fragmentation() - fragmentation).abs() < 1e-12);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Take { bytes: u64, power: u32 },
    TakeAt { offset: u64, bytes: u64 },
    Find { bytes: u64, power: u32, remainder: u64 },
    Give { which: usize },
}

const BYTES: u64 = 2048;
const CASES: u32 = if cfg!(miri) { 2 } else { 96 };

/// With sizes that are multiples of `unit`.
fn steps(unit: u64) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..24 / unit, 0..7u32).prop_map(move |(units, power)| Step::Take { bytes: units * unit, power }),
        1 => (0..BYTES / unit, 1..24 / unit)
            .prop_map(move |(at, units)| Step::TakeAt { offset: at * unit, bytes: units * unit }),
        1 => (0..64u64, 0..9u32, any::<u64>())
            .prop_map(|(bytes, power, remainder)| Step::Find { bytes, power, remainder }),
        3 => any::<usize>().prop_map(|which| Step::Give { which }),
    ];
    prop::collection::vec(step, 1..if cfg!(miri) { 100 } else { 1500 })
}

fn run(steps: Vec<Step>) {
    let mut ranges = Ranges::new(BYTES);
    let mut flags = Flags::new(BYTES as usize);
    for (at, step) in steps.into_iter().enumerate() {
        match step {
            Step::Take { bytes, power } => {
                let lowest = flags.find(bytes, 1 << power, 0);
                assert_eq!(ranges.take(bytes, 1 << power), lowest);
                if let Some(offset) = lowest {
                    flags.take(offset, bytes);
                }
            }
            Step::TakeAt { offset, bytes } => {
                let free = flags.is_free(offset, bytes);
                assert_eq!(ranges.is_free(offset, bytes), free);
                assert_eq!(ranges.take_at(offset, bytes), free);
                if free {
                    flags.take(offset, bytes);
                }
            }
            Step::Find { bytes, power, remainder } => {
                let modulus = 1 << power;
                let lowest = flags.find(bytes, modulus, remainder % modulus);
                assert_eq!(ranges.find_congruent(bytes, modulus, remainder), lowest);
                assert_eq!(ranges.find(bytes, modulus), flags.find(bytes, modulus, 0));
            }
            Step::Give { which } if !flags.taken.is_empty() => {
                let (offset, bytes) = flags.give(which);
                ranges.give(offset, bytes);
            }
            Step::Give { .. } => {}
        }
        if at % 16 == 0 {
            flags.check(&ranges);
        }
    }
    flags.check(&ranges);
    while !flags.taken.is_empty() {
        let (offset, bytes) = flags.give(0);
        ranges.give(offset, bytes);
    }
    flags.check(&ranges);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) })]

    #[test]
    fn odd_sizes_agree_with_a_flag_for_each_byte(steps in steps(1)) {
        run(steps);
    }

    #[test]
    fn sizes_of_one_unit_agree_with_a_flag_for_each_byte(steps in steps(4)) {
        run(steps);
    }
}

/// The same numbers on every machine.
fn numbers(mut state: u64) -> impl FnMut(usize) -> usize {
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    }
}

#[test]
fn a_tree_of_many_levels_grows_and_shrinks_without_losing_a_hole() {
    let blocks: usize = if cfg!(miri) { 400 } else { 60_000 };
    let mut ranges = Ranges::new(2 * blocks as u64);
    let mut flags = Flags::new(2 * blocks);
    for at in 0..blocks as u64 {
        assert_eq!(ranges.take(2, 1), Some(2 * at));
        flags.take(2 * at, 2);
    }
    assert_eq!(ranges.take(1, 1), None);
    flags.check(&ranges);
    let mut number = numbers(1);
    for share in [2, 3, 4, 1] {
        for _ in 0..flags.taken.len() / share {
            let (offset, bytes) = flags.give(number(blocks));
            ranges.give(offset, bytes);
        }
        flags.check(&ranges);
        for at in 0..flags.taken.len() / (2 * share) {
            let bytes = 1 + number(3) as u64;
            let offset = ranges.take(bytes, 1);
            // Looking the lowest up in the flags takes long.
            if at % 100 == 0 {
                assert_eq!(offset, flags.find(bytes, 1, 0));
            }
            let Some(offset) = offset else { continue };
            assert!(flags.is_free(offset, bytes));
            flags.take(offset, bytes);
        }
        flags.check(&ranges);
    }
    for (offset, bytes) in std::mem::take(&mut flags.taken) {
        ranges.give(offset, bytes);
    }
    assert!(ranges.is_empty());
    assert_eq!(ranges.hole_count(), 1);
}

#[test]
fn more_alignments_than_have_an_index_are_answered_exactly() {
    let mut ranges = Ranges::new(1 << 40);
    for _ in 0..2000 {
        ranges.take(3, 1).unwrap();
    }
    for at in (0..2000).step_by(2) {
        ranges.give(3 * at, 3);
    }
    for power in 0..30 {
        let alignment = 1 << power;
        let offset = ranges.take(2, alignment).unwrap();
        assert_eq!(offset % alignment, 0);
        let lower = (0..offset).step_by(alignment as usize).find(|offset| ranges.is_free(*offset, 2));
        assert_eq!(lower, None);
    }
}

#[test]
fn a_segment_larger_than_any_device_is_given_out_to_its_last_byte() {
    const HALF: u64 = 1 << 61;
    let mut ranges = Ranges::new(2 * HALF);
    assert_eq!(ranges.find(2 * HALF, 2), Some(0));
    assert_eq!(ranges.find_congruent(2 * HALF, 2, 1), None);
    assert_eq!((ranges.find(u64::MAX, 2), ranges.find_congruent(u64::MAX, 2, 1)), (None, None));
    assert_eq!(ranges.take(1, 1), Some(0));
    assert_eq!(ranges.take(HALF + 1, HALF), None);
    assert_eq!(ranges.take(HALF, HALF), Some(HALF));
    assert_eq!(ranges.take(HALF - 1, 1), Some(1));
    assert_eq!((ranges.free(), ranges.largest_free()), (0, 0));
    assert!(ranges.fragmentation() < f64::EPSILON);
    ranges.give(HALF, HALF);
    ranges.give(1, HALF - 1);
    ranges.give(0, 1);
    assert!(ranges.is_empty());
}

#[test]
fn nothing_is_found_for_nothing() {
    let mut ranges = Ranges::new(16);
    assert_eq!((ranges.take(0, 1), ranges.take_at(0, 0), ranges.is_free(0, 0)), (None, false, false));
    let mut empty = Ranges::new(0);
    assert_eq!((empty.take(1, 1), empty.hole_count(), empty.is_empty()), (None, 0, true));
}

#[test]
#[should_panic(expected = "given back twice")]
fn what_is_given_back_twice_panics() {
    let mut ranges = Ranges::new(16);
    ranges.take(4, 1);
    ranges.give(0, 4);
    ranges.give(2, 1);
}

#[test]
#[should_panic(expected = "outside of its segment")]
fn what_lies_outside_panics() {
    Ranges::new(16).give(u64::MAX, 2);
}
