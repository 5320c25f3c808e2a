//! Which blocks to move where, so that whole pools become empty and free bytes lie together.
//!
//! Owns the plan, made on a snapshot. Leaves out carrying it out, and what the caller knows of blocks beyond
//! whether they can move.
//!
//! First pools are emptied, the one with the fewest bytes first, into the fullest of the others: an empty pool
//! goes back to its device. Then the rest is compacted: what lies above where all would end without a hole goes to
//! the lowest place below that fits, the largest first. Then each block, from the top down, goes to the lowest
//! place below its own, in rounds, for a round leaves room that the next can use. What is done after fragmentation
//! was least is left out of the plan. No block moves twice, and no block moves onto its own old
//! place. So a plan ends, never makes things worse, and one made after it was carried out is empty or makes them
//! better.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::ranges::Ranges;

/// A later round moves little; who wants more plans again.
const MOST_ROUNDS: usize = 8;

/// One address space. All pools of a plan are interchangeable: a block may move from each to each.
#[derive(Debug, Clone)]
pub struct Pool {
    pub id: u64,
    pub bytes: u64,
    /// In any order; none overlaps another.
    pub blocks: Vec<Block>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    pub id: u64,
    pub offset: u64,
    pub bytes: u64,
    /// Of the new offset too; a power of two, as is the next.
    pub alignment: u64,
    /// The new offset leaves the same remainder as the old one when divided by this: the page size where others
    /// have mapped the block.
    pub congruence: Option<u64>,
    pub movable: bool,
}

/// What a plan may cost at most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bounds {
    pub bytes: Option<u64>,
    pub moves: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The pool's id.
    pub pool: u64,
    pub offset: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    pub block: u64,
    pub from: Place,
    pub to: Place,
    pub bytes: u64,
    /// Moves of a pass need only what was free before it; the old places are free for the pass after.
    pub pass: u32,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figures {
    pub free_bytes: u64,
    pub largest_free_bytes: u64,
    pub hole_count: usize,
    /// The share of the free bytes that are not in the largest hole of their pool: with one pool, 1 − largest
    /// free / free.
    pub fragmentation: f64,
    pub empty_pools: usize,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// In the order of their passes.
    pub moves: Vec<Move>,
    pub bytes: u64,
    pub before: Figures,
    pub after: Figures,
}

/// Plans within the bounds; the same for the same pools. Panics where blocks overlap or lie outside of their pool.
pub fn plan(pools: &[Pool], bounds: Bounds) -> Plan {
    let mut planner = Planner::new(pools, bounds);
    let before = planner.figures();
    planner.empty_pools();
    planner.compact();
    let mut moves: Vec<Move> = planner.moves.iter().map(|step| step.told(pools)).collect();
    moves.sort_by_key(|step| step.pass);
    let bytes = moves.iter().map(|step| step.bytes).sum();
    Plan { moves, bytes, before, after: planner.figures() }
}

struct Planner<'a> {
    spaces: Vec<Space<'a>>,
    moves: Vec<Step<'a>>,
    bytes_left: u64,
    moves_left: usize,
}

/// A pool as the moves so far leave it.
struct Space<'a> {
    pool: &'a Pool,
    ranges: Ranges,
    /// What moves have left: by offset, the end and the pass.
    left: BTreeMap<u64, (u64, u32)>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing is in it, and nothing is to come.
    Empty,
    Untouched,
    /// Blocks of other pools have come, so that it is not to be emptied.
    Filled,
}

/// After how many moves most of the free bytes were together.
struct Best {
    together: u64,
    moves: usize,
}

#[derive(Clone, Copy)]
struct Step<'a> {
    block: &'a Block,
    from: usize,
    to: (usize, u64),
    pass: u32,
}

impl Step<'_> {
    fn told(&self, pools: &[Pool]) -> Move {
        let (to, offset) = self.to;
        Move {
            block: self.block.id,
            from: Place { pool: pools[self.from].id, offset: self.block.offset },
            to: Place { pool: pools[to].id, offset },
            bytes: self.block.bytes,
            pass: self.pass,
        }
    }
}

impl Block {
    /// The modulus and the remainder of every offset where it may lie, if there is one.
    fn places(&self) -> Option<(u64, u64)> {
        let congruence = self.congruence.unwrap_or(1);
        let remainder = if congruence >= self.alignment { self.offset % congruence } else { 0 };
        let both = remainder % self.alignment == 0 && remainder % congruence == self.offset % congruence;
        both.then_some((congruence.max(self.alignment), remainder))
    }
}

impl<'a> Space<'a> {
    fn new(pool: &'a Pool) -> Self {
        let mut ranges = Ranges::new(pool.bytes);
        let mut blocks: Vec<&Block> = pool.blocks.iter().collect();
        blocks.sort_unstable_by_key(|block| block.offset);
        for block in blocks {
            let taken = ranges.take_at(block.offset, block.bytes);
            assert!(taken, "block {} overlaps another or lies outside of pool {}", block.id, pool.id);
        }
        let state = if pool.blocks.is_empty() { State::Empty } else { State::Untouched };
        Self { pool, ranges, left: BTreeMap::new(), state }
    }

    fn live(&self) -> u64 {
        self.ranges.bytes() - self.ranges.free()
    }

    fn find(&self, block: &Block) -> Option<u64> {
        let (modulus, remainder) = block.places()?;
        self.ranges.find_congruent(block.bytes, modulus, remainder)
    }

    /// The first pass in which `bytes` at `offset` are free.
    fn pass(&self, offset: u64, bytes: u64) -> u32 {
        let below = self.left.range(..offset + bytes).rev();
        let overlapping = below.take_while(|(_, (end, _))| *end > offset);
        overlapping.map(|(_, (_, pass))| pass + 1).max().unwrap_or(0)
    }
}

impl<'a> Planner<'a> {
    fn new(pools: &'a [Pool], bounds: Bounds) -> Self {
        Self {
            spaces: pools.iter().map(Space::new).collect(),
            moves: Vec::new(),
            bytes_left: bounds.bytes.unwrap_or(u64::MAX),
            moves_left: bounds.moves.unwrap_or(usize::MAX),
        }
    }

    fn figures(&self) -> Figures {
        let free_bytes = self.spaces.iter().map(|space| space.ranges.free()).sum();
        Figures {
            free_bytes,
            largest_free_bytes: self
                .spaces
                .iter()
                .map(|space| space.ranges.largest_free())
                .max()
                .unwrap_or(0),
            hole_count: self.spaces.iter().map(|space| space.ranges.hole_count()).sum(),
            fragmentation: if free_bytes == 0 {
                0.0
            } else {
                1.0 - self.together() as f64 / free_bytes as f64
            },
            empty_pools: self.spaces.iter().filter(|space| space.ranges.is_empty()).count(),
        }
    }

    fn empty_pools(&mut self) {
        let live: Vec<u64> = self.spaces.iter().map(Space::live).collect();
        let mut cheapest: Vec<usize> = (0..self.spaces.len()).collect();
        // Of two that cost the same, the later goes: what remains lies at the front.
        cheapest.sort_by_key(|&at| (live[at], Reverse(at)));
        let fullest: Vec<usize> = cheapest.iter().rev().copied().collect();
        for &at in &cheapest {
            let space = &self.spaces[at];
            let all_move = space.pool.blocks.iter().all(|block| block.movable);
            if live[at] > self.bytes_left {
                return;
            }
            if space.state == State::Untouched && all_move && space.pool.blocks.len() <= self.moves_left {
                self.empty_pool(at, &fullest);
            }
        }
    }

    /// Moves all blocks of a pool to others, or none.
    fn empty_pool(&mut self, from: usize, targets: &[usize]) {
        let mut blocks: Vec<&Block> = self.spaces[from].pool.blocks.iter().collect();
        blocks.sort_by_key(|block| (Reverse(block.bytes), block.offset));
        let mut steps: Vec<Step<'a>> = Vec::with_capacity(blocks.len());
        for block in blocks {
            let others = targets.iter().filter(|&&to| to != from && self.spaces[to].state != State::Empty);
            let place = others.copied().find_map(|to| Some((to, self.spaces[to].find(block)?)));
            let Some((to, offset)) = place else {
                for Step { block, to: (to, offset), .. } in steps {
                    self.spaces[to].ranges.give(offset, block.bytes);
                }
                return;
            };
            let taken = self.spaces[to].ranges.take_at(offset, block.bytes);
            assert!(taken, "what was found is free");
            steps.push(Step { block, from, to: (to, offset), pass: 0 });
        }
        for step in &steps {
            self.spaces[step.to.0].state = State::Filled;
            self.bytes_left -= step.block.bytes;
        }
        self.moves_left -= steps.len();
        self.moves.extend(steps);
        let emptied = &mut self.spaces[from];
        (emptied.ranges, emptied.state) = (Ranges::new(emptied.pool.bytes), State::Empty);
    }

    fn compact(&mut self) {
        let mut blocks: Vec<(usize, &'a Block)> = Vec::new();
        for (at, space) in self.spaces.iter().enumerate().filter(|(_, space)| space.state != State::Empty) {
            blocks.extend(space.pool.blocks.iter().filter(|block| block.movable).map(|block| (at, block)));
        }
        let from_the_top = |(at, block): &(usize, &Block)| Reverse((*at, block.offset));
        blocks.sort_unstable_by_key(from_the_top);

        let mut best = Best { together: self.together(), moves: self.moves.len() };
        // The largest first: what is left of the room below is for small ones.
        let (top, floor) = self.top(&blocks);
        blocks[..top].sort_by_key(|(_, block)| Reverse(block.bytes));
        let mut left = blocks.split_off(top);
        self.round(&mut blocks, |_| floor, &mut best);
        left.append(&mut blocks);
        left.sort_unstable_by_key(from_the_top);
        for _ in 0..MOST_ROUNDS {
            let before = best.moves;
            self.round(&mut left, |place| place, &mut best);
            if best.moves == before {
                break;
            }
        }
        self.undo(best.moves);
    }

    /// How many of the blocks, which come from the top down, lie above where all would end if they lay without a
    /// hole, as far as the bounds reach; and the place of the last of them.
    fn top(&self, blocks: &[(usize, &Block)]) -> (usize, (usize, u64)) {
        let used = self.spaces.iter().enumerate().filter(|(_, space)| space.state != State::Empty);
        let mut rest: u64 = used.clone().map(|(_, space)| space.live()).sum();
        let mut line = (0, 0);
        for (at, space) in used {
            line = (at, rest.min(space.pool.bytes));
            rest -= line.1;
            if rest == 0 {
                break;
            }
        }
        let (mut floor, mut bytes, mut count) = (line, self.bytes_left, 0);
        for (at, block) in blocks.iter().take(self.moves_left) {
            if (*at, block.offset) < line || block.bytes > bytes {
                break;
            }
            (floor, bytes, count) = ((*at, block.offset), bytes - block.bytes, count + 1);
        }
        (count, floor)
    }

    /// Moves each block, in this order, to its lowest place, if that is below a limit. Those that stay are left.
    fn round(
        &mut self,
        blocks: &mut Vec<(usize, &'a Block)>,
        limit: impl Fn((usize, u64)) -> (usize, u64),
        best: &mut Best,
    ) {
        let mut together = self.together();
        blocks.retain(|&(from, block)| {
            let Some(to) = self.lowest_place(block, limit((from, block.offset))) else { return true };
            together -= self.largest_of(from, to.0);
            self.go(from, block, to);
            together += self.largest_of(from, to.0);
            if together > best.together {
                *best = Best { together, moves: self.moves.len() };
            }
            false
        });
    }

    /// Of the free bytes, those in the largest hole of their pool.
    fn together(&self) -> u64 {
        self.spaces.iter().map(|space| space.ranges.largest_free()).sum()
    }

    fn undo(&mut self, from: usize) {
        for Step { block, from, to: (to, offset), .. } in self.moves.drain(from..).rev() {
            self.spaces[to].ranges.give(offset, block.bytes);
            let taken = self.spaces[from].ranges.take_at(block.offset, block.bytes);
            assert!(taken, "moves are undone from the last to the first");
        }
    }

    fn largest_of(&self, one: usize, other: usize) -> u64 {
        let largest = |at: usize| self.spaces[at].ranges.largest_free();
        largest(one) + if one == other { 0 } else { largest(other) }
    }

    /// The lowest place for a block, if it is below the limit and the bounds allow the move.
    fn lowest_place(&self, block: &Block, limit: (usize, u64)) -> Option<(usize, u64)> {
        if self.moves_left == 0 || block.bytes > self.bytes_left {
            return None;
        }
        let mut spaces =
            self.spaces[..=limit.0].iter().enumerate().filter(|(_, space)| space.state != State::Empty);
        let place = spaces.find_map(|(to, space)| Some((to, space.find(block)?)));
        place.filter(|place| *place < limit)
    }

    fn go(&mut self, from: usize, block: &'a Block, (to, offset): (usize, u64)) {
        let pass = self.spaces[to].pass(offset, block.bytes);
        let taken = self.spaces[to].ranges.take_at(offset, block.bytes);
        assert!(taken, "what was found is free");
        let old = &mut self.spaces[from];
        old.ranges.give(block.offset, block.bytes);
        old.left.insert(block.offset, (block.offset + block.bytes, pass));
        self.moves.push(Step { block, from, to: (to, offset), pass });
        self.moves_left -= 1;
        self.bytes_left -= block.bytes;
    }
}
