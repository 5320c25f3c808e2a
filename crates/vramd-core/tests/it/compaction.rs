//! Plans of moves, carried out on a picture of the address spaces that has an owner for each byte.

use std::collections::BTreeMap;

use proptest::prelude::*;
use vramd_core::compaction::{Block, Bounds, Figures, Move, Place, Plan, Pool, plan};

const POOL_BYTES: u64 = 96;

fn block(id: u64, offset: u64, bytes: u64) -> Block {
    Block { id, offset, bytes, alignment: 1, congruence: None, movable: true }
}

fn pool(id: u64, bytes: u64, blocks: Vec<Block>) -> Pool {
    Pool { id, bytes, blocks }
}

/// Who owns each byte of each pool.
struct Picture {
    bytes: BTreeMap<u64, Vec<Option<u64>>>,
}

impl Picture {
    fn new(pools: &[Pool]) -> Self {
        let mut picture = Self { bytes: BTreeMap::new() };
        for pool in pools {
            picture.bytes.insert(pool.id, vec![None; pool.bytes as usize]);
            for block in &pool.blocks {
                picture.put(block.id, Place { pool: pool.id, offset: block.offset }, block.bytes);
            }
        }
        picture
    }

    fn at(&mut self, place: Place, bytes: u64) -> &mut [Option<u64>] {
        let pool = self.bytes.get_mut(&place.pool).expect("the plan names pools that there are");
        &mut pool[place.offset as usize..(place.offset + bytes) as usize]
    }

    fn put(&mut self, block: u64, place: Place, bytes: u64) {
        let bytes = self.at(place, bytes);
        assert!(bytes.iter().all(Option::is_none), "{block} would lie over another at {place:?}");
        bytes.fill(Some(block));
    }

    fn carry_out(&mut self, moves: &[Move]) {
        assert!(moves.is_sorted_by_key(|step| step.pass));
        for pass in moves.chunk_by(|one, other| one.pass == other.pass) {
            for step in pass {
                self.put(step.block, step.to, step.bytes);
            }
            for step in pass {
                let old = self.at(step.from, step.bytes);
                assert!(old.iter().all(|owner| *owner == Some(step.block)));
                old.fill(None);
            }
        }
    }

    fn figures(&self) -> Figures {
        let holes = |pool: &[Option<u64>]| -> Vec<u64> {
            let runs = pool.split(Option::is_some).map(|run| run.len() as u64);
            runs.filter(|length| *length > 0).collect()
        };
        let pools: Vec<Vec<u64>> = self.bytes.values().map(|pool| holes(pool)).collect();
        let free_bytes = pools.iter().flatten().sum();
        let largest = pools.iter().map(|holes| holes.iter().copied().max().unwrap_or(0));
        let together: u64 = largest.clone().sum();
        Figures {
            free_bytes,
            largest_free_bytes: largest.max().unwrap_or(0),
            hole_count: pools.iter().map(Vec::len).sum(),
            fragmentation: if free_bytes == 0 { 0.0 } else { 1.0 - together as f64 / free_bytes as f64 },
            empty_pools: self.bytes.values().filter(|pool| pool.iter().all(Option::is_none)).count(),
        }
    }
}

/// The pools as a plan leaves them.
fn after(pools: &[Pool], plan: &Plan) -> Vec<Pool> {
    let mut after = pools.to_vec();
    for step in &plan.moves {
        let from = after.iter_mut().find(|pool| pool.id == step.from.pool).unwrap();
        let at = from.blocks.iter().position(|block| block.id == step.block).unwrap();
        let mut block = from.blocks.swap_remove(at);
        block.offset = step.to.offset;
        after.iter_mut().find(|pool| pool.id == step.to.pool).unwrap().blocks.push(block);
    }
    after
}

fn check(pools: &[Pool], bounds: Bounds) {
    let plan = plan(pools, bounds);
    let mut picture = Picture::new(pools);
    assert_eq!(plan.before, picture.figures());
    let blocks: BTreeMap<u64, &Block> =
        pools.iter().flat_map(|pool| &pool.blocks).map(|block| (block.id, block)).collect();
    for step in &plan.moves {
        let block = blocks[&step.block];
        assert!(block.movable);
        assert_eq!((step.bytes, step.from.offset), (block.bytes, block.offset));
        assert_eq!(step.to.offset % block.alignment, 0);
        let congruence = block.congruence.unwrap_or(1);
        assert_eq!(step.to.offset % congruence, block.offset % congruence);
    }
    assert_eq!(plan.bytes, plan.moves.iter().map(|step| step.bytes).sum::<u64>());
    assert!(bounds.bytes.is_none_or(|most| plan.bytes <= most));
    assert!(bounds.moves.is_none_or(|most| plan.moves.len() <= most));
    picture.carry_out(&plan.moves);
    assert_eq!(plan.after, picture.figures());
    assert!(plan.moves.is_empty() || is_better(&plan.after, &plan.before), "moves must be worth it");
    assert_eq!(self::plan(pools, bounds), plan);
}

fn is_better(one: &Figures, other: &Figures) -> bool {
    one.empty_pools > other.empty_pools || one.fragmentation < other.fragmentation
}

fn pools() -> impl Strategy<Value = Vec<Pool>> {
    let block = (0..8u64, 1..12u64, 0..5u32, prop::option::of(0..5u32), prop::bool::weighted(0.85));
    prop::collection::vec(prop::collection::vec(block, 0..12), 1..6).prop_map(|pools| {
        let mut id = 0;
        let pools = pools.into_iter().zip(0..).map(|(blocks, pool_id)| {
            let mut offset = 0;
            let mut pool = pool(pool_id, POOL_BYTES, Vec::new());
            for (gap, bytes, power, congruence, movable) in blocks {
                let alignment = 1 << power;
                let at = (offset + gap).next_multiple_of(alignment);
                if at + bytes > POOL_BYTES {
                    break;
                }
                id += 1;
                let congruence = congruence.map(|power| 1 << power);
                pool.blocks.push(Block { id, offset: at, bytes, alignment, congruence, movable });
                offset = at + bytes;
            }
            pool
        });
        pools.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]

    #[test]
    fn a_plan_carried_out_pass_by_pass_harms_no_block(
        pools in pools(), bytes in prop::option::of(0..200u64), moves in prop::option::of(0..20usize)
    ) {
        check(&pools, Bounds { bytes, moves });
    }

    #[test]
    fn plans_end(pools in pools()) {
        let mut pools = pools;
        for _ in 0..100 {
            let plan = plan(&pools, Bounds::default());
            if plan.moves.is_empty() {
                return Ok(());
            }
            check(&pools, Bounds::default());
            pools = after(&pools, &plan);
        }
        prop_assert!(false, "always more to move");
    }
}

#[test]
fn the_pool_with_the_fewest_bytes_is_emptied_into_the_fullest() {
    let pools = [
        pool(1, 100, vec![block(10, 0, 70), block(11, 80, 10)]),
        pool(2, 100, vec![block(20, 0, 50)]),
        pool(3, 100, vec![block(30, 40, 10), block(31, 90, 5)]),
    ];
    let plan = plan(&pools, Bounds::default());
    assert_eq!(
        plan.moves.iter().map(|step| (step.block, step.to.pool)).collect::<Vec<_>>(),
        [(30, 1), (31, 1)]
    );
    assert_eq!((plan.before.empty_pools, plan.after.empty_pools), (0, 1));
    check(&pools, Bounds::default());
}

#[test]
fn a_pool_with_a_block_that_cannot_move_is_not_emptied_in_part() {
    let fixed = Block { movable: false, ..block(21, 50, 1) };
    let pools = [pool(1, 100, vec![block(10, 0, 10)]), pool(2, 100, vec![block(20, 0, 5), fixed])];
    let plan = plan(&pools, Bounds::default());
    assert_eq!(plan.moves.iter().map(|step| step.block).collect::<Vec<_>>(), [10]);
    assert_eq!(plan.after.empty_pools, 1);
}

#[test]
fn bounds_that_allow_nothing_plan_nothing() {
    let pools = [pool(1, 100, vec![block(10, 50, 10)])];
    for bounds in [
        Bounds { bytes: Some(9), moves: None },
        Bounds { bytes: None, moves: Some(0) },
        Bounds { bytes: Some(0), moves: Some(0) },
    ] {
        assert_eq!(plan(&pools, bounds).moves, []);
    }
    assert_eq!(plan(&pools, Bounds { bytes: Some(10), moves: Some(1) }).moves.len(), 1);
}

#[test]
fn a_block_that_others_have_mapped_keeps_its_place_in_the_page() {
    let mapped = Block { congruence: Some(16), ..block(1, 69, 4) };
    let plan = plan(&[pool(1, 100, vec![block(2, 0, 8), mapped])], Bounds::default());
    assert_eq!(plan.moves.iter().map(|step| step.to.offset).collect::<Vec<_>>(), [21]);
}

#[test]
fn a_block_does_not_move_onto_itself() {
    let pools = [pool(1, 100, vec![block(1, 10, 50)])];
    assert_eq!(plan(&pools, Bounds::default()).moves, []);
}

#[test]
fn room_that_a_round_leaves_is_used_in_a_later_pass() {
    // Only when the first has gone to the front is there room below the second.
    let pools = [pool(1, 40, vec![block(1, 10, 10), block(2, 22, 11)])];
    let plan = plan(&pools, Bounds::default());
    let moves = plan.moves.iter().map(|step| (step.block, step.to.offset, step.pass));
    assert_eq!(moves.collect::<Vec<_>>(), [(1, 0, 0), (2, 10, 1)]);
    check(&pools, Bounds::default());
}

#[test]
fn no_pools_and_empty_pools_have_an_empty_plan() {
    for pools in [vec![], vec![pool(1, 64, vec![])]] {
        let plan = plan(&pools, Bounds::default());
        assert_eq!((plan.moves, plan.bytes, plan.before), (vec![], 0, plan.after));
    }
}
