//! placeholder until the planner is merged
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    pub id: u64,
    pub bytes: u64,
    pub blocks: Vec<Block>,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    pub id: u64,
    pub offset: u64,
    pub bytes: u64,
    pub alignment: u64,
    pub congruence: Option<u64>,
    pub movable: bool,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bounds {
    pub bytes: Option<u64>,
    pub moves: Option<usize>,
}
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Move {
    pub block: u64,
    pub from: (u64, u64),
    pub to: (u64, u64),
    pub bytes: u64,
    pub pass: u32,
}
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Figures {
    pub free_bytes: u64,
    pub largest_free_bytes: u64,
    pub hole_count: u64,
    pub fragmentation: f64,
    pub empty_pools: u64,
}
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    pub moves: Vec<Move>,
    pub bytes: u64,
    pub before: Figures,
    pub after: Figures,
}
pub fn plan(pools: &[Pool], _bounds: Bounds) -> Plan {
    let mut plan = Plan::default();
    let mut order: Vec<&Pool> = pools.iter().collect();
    order.sort_by_key(|p| std::cmp::Reverse(p.blocks.iter().map(|b| b.bytes).sum::<u64>()));
    let mut ranges: Vec<(u64, crate::Ranges)> = order
        .iter()
        .map(|p| {
            let mut r = crate::Ranges::new(p.bytes);
            for b in &p.blocks {
                let _ = r.take_at(b.offset, b.bytes);
            }
            (p.id, r)
        })
        .collect();
    for at in (1..order.len()).rev() {
        for b in order[at].blocks.iter().filter(|b| b.movable) {
            if let Some(k) = (0..at).find(|k| {
                ranges[*k]
                    .1
                    .find(b.bytes, b.alignment)
                    .is_some_and(|o| b.congruence.is_none_or(|m| o % m == b.offset % m))
            }) {
                let to = ranges[k].1.take(b.bytes, b.alignment).unwrap_or(0);
                plan.bytes += b.bytes;
                plan.moves.push(Move {
                    block: b.id,
                    from: (order[at].id, b.offset),
                    to: (ranges[k].0, to),
                    bytes: b.bytes,
                    pass: 1,
                });
            }
        }
    }
    plan
}
