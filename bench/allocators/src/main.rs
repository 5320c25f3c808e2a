//! Measures the allocator and the planner of moves beside their peers, and prints one JSON document: measures, each
//! with a row for each contestant, ours first. Contestants take turns, round by round; each figure is the median
//! of its rounds.

mod clock;
mod mixes;
mod moving;
mod peers;
mod traces;
mod vulkan;

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;
use vramd_core::compaction::{self, Bounds, Pool};

use clock::Clock;
use mixes::{MIXES, Mix, Random, Times};
use peers::{
    BestFit, DEFAULT, LEAST_MEMORY, LEAST_TIME, LOWEST_OFFSET, OffsetAllocator, Ours, Peer, RangeAlloc, Rlsf,
    Vma,
};
use traces::Event;
use vulkan::GpuAllocator;

const SEEDS: u64 = 12;
const HOLES: [usize; 4] = [10, 100, 1_000, 10_000];

#[derive(Serialize)]
struct Measure {
    what: String,
    unit: &'static str,
    more_is_better: bool,
    aim: Option<Aim>,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Aim {
    text: String,
    met: bool,
}

#[derive(Serialize, Clone, Copy)]
struct Row {
    who: &'static str,
    median: f64,
    p99: Option<f64>,
}

/// What one peer does in each kind of work.
struct Contestant {
    name: &'static str,
    steady: fn(&Clock, Mix, f64, usize) -> Times,
    with_holes: fn(&Clock, usize, usize) -> Times,
    replay: fn(&Clock, &[Event]) -> Times,
    used_at_first_refusal: fn(Mix, u64) -> f64,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Ours,
    Vma,
    /// Looks through its holes one by one, so it gets a tenth of the work, and one round.
    Slow,
    /// Has no pool to fill, and looks through its holes one by one.
    Poolless,
    Other,
}

impl Kind {
    fn is_slow(self) -> bool {
        matches!(self, Self::Slow | Self::Poolless)
    }
}

fn contestant<P: Peer>(name: &'static str, kind: Kind) -> Contestant {
    Contestant {
        name,
        steady: mixes::steady::<P>,
        with_holes: mixes::with_holes::<P>,
        replay: traces::replay::<P>,
        used_at_first_refusal: mixes::used_at_first_refusal::<P>,
        kind,
    }
}

struct Bench {
    clock: Clock,
    contestants: Vec<Contestant>,
    rounds: usize,
    measures: Vec<Measure>,
}

fn main() -> Result<()> {
    let rounds = if std::env::args().any(|argument| argument == "--quick") { 1 } else { 5 };
    let mut contestants = vec![
        contestant::<Ours>("**vramd**", Kind::Ours),
        contestant::<Vma<DEFAULT>>("VMA, default", Kind::Vma),
        contestant::<Vma<LEAST_TIME>>("VMA, least time", Kind::Vma),
        contestant::<Vma<LEAST_MEMORY>>("VMA, least memory", Kind::Vma),
        contestant::<Vma<LOWEST_OFFSET>>("VMA, lowest offset", Kind::Slow),
        contestant::<OffsetAllocator>("offset-allocator", Kind::Other),
        contestant::<Rlsf>("rlsf", Kind::Other),
        contestant::<RangeAlloc>("range-alloc", Kind::Slow),
        contestant::<BestFit>("exact best fit in a BTree", Kind::Other),
    ];
    match vulkan::open() {
        Ok(_) => {
            contestants.push(contestant::<GpuAllocator>("gpu-allocator, software Vulkan", Kind::Poolless))
        }
        Err(reason) => eprintln!("SKIPPED gpu-allocator: {reason}"),
    }
    let mut bench = Bench { clock: Clock::new(), contestants, rounds, measures: Vec::new() };
    for mix in MIXES {
        bench.times(mix.name, |one, clock, takes| (one.steady)(clock, mix, 0.75, takes));
    }
    bench.near_full();
    bench.times("models of a day", |one, clock, _| (one.replay)(clock, &traces::day()));
    bench.holes();
    for mix in MIXES {
        bench.packing(mix);
    }
    bench.plan();
    bench.moving()?;
    println!("{}", serde_json::to_string(&bench.measures)?);
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

impl Bench {
    fn takes(&self, kind: Kind) -> usize {
        let full = if self.rounds == 1 { 50_000 } else { 200_000 };
        if kind.is_slow() { full / 10 } else { full }
    }

    /// For each contestant: of taking and of giving, the median over the rounds of p50 and p99; and the refusals.
    fn rounds(
        &self,
        who: impl Fn(Kind) -> bool,
        run: impl Fn(&Contestant, &Clock, usize) -> Times,
    ) -> Vec<(Kind, Row, Row, usize)> {
        let contestants: Vec<&Contestant> = self.contestants.iter().filter(|one| who(one.kind)).collect();
        let mut figures = vec![[const { Vec::new() }; 4]; contestants.len()];
        let mut refusals = vec![0; contestants.len()];
        for round in 0..self.rounds {
            for (at, one) in contestants.iter().enumerate() {
                if round > 0 && one.kind.is_slow() {
                    continue;
                }
                let times = run(one, &self.clock, self.takes(one.kind));
                refusals[at] = times.refusals;
                let (take, give) = (self.clock.figures(times.take), self.clock.figures(times.give));
                for (figures, figure) in figures[at].iter_mut().zip([take.0, take.1, give.0, give.1]) {
                    figures.push(figure);
                }
            }
        }
        let rows = contestants.iter().zip(figures).zip(refusals).map(|((one, figures), refusals)| {
            let [take, take99, give, give99] = figures.map(median);
            let row = |median, p99| Row { who: one.name, median, p99: Some(p99) };
            (one.kind, row(take, take99), row(give, give99), refusals)
        });
        rows.collect()
    }

    fn add(&mut self, what: String, unit: &'static str, aim: Option<Aim>, rows: Vec<Row>) {
        self.measures.push(Measure { what, unit, more_is_better: unit.ends_with('%'), aim, rows });
    }

    /// Adds taking and giving, and aims at VMA's fastest.
    fn add_times(&mut self, what: &str, rows: &[(Kind, Row, Row, usize)]) {
        for (verb, row) in [("take", 1), ("give", 2)] {
            let of = |figures: &(Kind, Row, Row, usize)| if row == 1 { figures.1 } else { figures.2 };
            let vma: Vec<Row> = rows.iter().filter(|figures| figures.0 == Kind::Vma).map(of).collect();
            let fastest = |figure: fn(&Row) -> f64| vma.iter().map(figure).fold(f64::INFINITY, f64::min);
            let (p50, p99) = (fastest(|row| row.median), fastest(|row| row.p99.unwrap_or(0.0)));
            let ours = of(&rows[0]);
            let aim = Aim {
                text: "p50 and p99 ≤ VMA's fastest".into(),
                met: ours.median <= p50 && ours.p99.is_some_and(|ours| ours <= p99),
            };
            self.add(format!("{verb}, {what}"), "ns", Some(aim), rows.iter().map(of).collect());
        }
    }

    fn times(&mut self, what: &str, run: impl Fn(&Contestant, &Clock, usize) -> Times) {
        eprintln!("{what}");
        let rows = self.rounds(|_| true, run);
        self.add_times(what, &rows);
    }

    fn near_full(&mut self) {
        eprintln!("near full");
        let rows = self.rounds(
            |kind| kind != Kind::Poolless,
            |one, clock, takes| (one.steady)(clock, MIXES[0], 1.0, takes),
        );
        self.add_times("256 B to 64 MiB, pool near full", &rows);
        let share = |figures: &(Kind, Row, Row, usize)| {
            let refused = 100.0 * figures.3 as f64 / self.takes(figures.0) as f64;
            Row { median: refused, p99: None, ..figures.1 }
        };
        let rows = rows.iter().map(share).collect();
        self.add("refused there, of all requests".into(), "percent", None, rows);
    }

    fn holes(&mut self) {
        let mut ours = Vec::new();
        for holes in HOLES {
            eprintln!("{holes} holes");
            let rows = self.rounds(|_| true, |one, clock, takes| (one.with_holes)(clock, holes, takes));
            ours.push((rows[0].1.median, rows[0].2.median));
            self.add_times(&format!("about {holes} holes"), &rows);
        }
        let (few, many) = (ours[0], ours[ours.len() - 1]);
        for (verb, ratio) in [("take", many.0 / few.0), ("give", many.1 / few.1)] {
            let aim = Aim { text: "≤ 2".into(), met: ratio <= 2.0 };
            let row = Row { who: "**vramd**", median: ratio, p99: None };
            self.add(format!("{verb} with 10,000 holes ÷ with 10"), "times", Some(aim), vec![row]);
        }
    }

    fn packing(&mut self, mix: Mix) {
        eprintln!("first refusal, {}", mix.name);
        // Slow ones would take minutes where blocks are many.
        let many = mix.most == MIXES[1].most;
        let fit = self.contestants.iter().filter(|one| one.kind != Kind::Poolless);
        let fit = fit.filter(|one| !many || one.kind != Kind::Slow);
        let rows: Vec<(Kind, Row)> = fit
            .map(|one| {
                let shares = (0..SEEDS).map(|seed| 100.0 * (one.used_at_first_refusal)(mix, seed));
                (one.kind, Row { who: one.name, median: median(shares.collect()), p99: None })
            })
            .collect();
        let vma = rows.iter().filter(|(kind, row)| *kind == Kind::Vma || row.who.starts_with("VMA"));
        let best = vma.map(|(_, row)| row.median).fold(0.0, f64::max);
        let least = if mix.most == MIXES[2].most { 60.0 } else { 0.0 };
        let aim = Aim {
            text: if least > 0.0 { "≥ VMA's best and ≥ 60".into() } else { "≥ VMA's best".into() },
            met: rows[0].1.median >= best.max(least),
        };
        let what = format!("used of 16 GiB at the first refusal, {}", mix.name);
        self.add(what, "%", Some(aim), rows.into_iter().map(|(_, row)| row).collect());
    }

    fn plan(&mut self) {
        eprintln!("plan");
        let peer = vulkan::defragment();
        let peer = peer.inspect_err(|error| eprintln!("SKIPPED VMA's defragmentation: {error:#}")).ok();
        let pool = peer.as_ref().map_or_else(own_pool, |peer| peer.before.clone());
        let pools = [pool];
        let milliseconds = (0..4 * self.rounds + 1).map(|_| {
            let start = Instant::now();
            std::hint::black_box(compaction::plan(&pools, Bounds::default()));
            start.elapsed().as_secs_f64() * 1e3
        });
        let milliseconds = median(milliseconds.collect());
        let plan = compaction::plan(&pools, Bounds::default());
        let rows = |ours: f64, theirs: Option<f64>| {
            let row = |who, median| Row { who, median, p99: None };
            let theirs = theirs.map(|theirs| row("VMA, full defragmentation, software Vulkan", theirs));
            std::iter::once(row("**vramd**", ours)).chain(theirs).collect::<Vec<_>>()
        };
        let aim = Aim { text: "≤ 10".into(), met: milliseconds <= 10.0 };
        let what = "plan of moves, 16k blocks in 1 GiB".to_owned();
        self.add(what, "ms", Some(aim), rows(milliseconds, peer.as_ref().map(|peer| peer.seconds * 1e3)));
        let percent = 100.0 * plan.after.fragmentation;
        let theirs = peer.as_ref().map(|peer| 100.0 * peer.fragmentation);
        let aim = theirs.map(|theirs| Aim { text: "no worse".into(), met: percent <= theirs });
        let before = 100.0 * plan.before.fragmentation;
        let what = format!("fragmentation after it, {before:.1} before");
        self.add(what, "percent", aim, rows(percent, theirs));
        let moves = rows(plan.moves.len() as f64, peer.as_ref().map(|peer| f64::from(peer.moves)));
        self.add("its moves".into(), "count", None, moves);
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let bytes = rows(mib(plan.bytes), peer.as_ref().map(|peer| mib(peer.bytes)));
        self.add("what they move".into(), "MiB", None, bytes);
    }

    fn moving(&mut self) -> Result<()> {
        eprintln!("moving");
        let moving = moving::measure()?;
        let row = |who, mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            Row { who, median: values[values.len() / 2], p99: Some(values[values.len() - 1]) }
        };
        let rows = vec![
            row("**mremap**, touched", moving.remap),
            row("mmap over it, touched", moving.map_over),
            row("copy", moving.copy),
        ];
        let aim = Aim { text: "≤ copy".into(), met: rows[0].median <= rows[2].median };
        self.add("2 MiB of shared memory to another address".into(), "µs", Some(aim), rows);
        Ok(())
    }
}

/// As VMA's, where there is none.
fn own_pool() -> Pool {
    let mut random = Random(3);
    let mut ranges = vramd_core::Ranges::new(vulkan::POOL);
    let mut blocks = Vec::new();
    loop {
        let bytes = vulkan::block_size(&mut random);
        let Some(offset) = ranges.take(bytes, peers::UNIT) else { break };
        blocks.push(vulkan::block(blocks.len() as u64, offset, bytes));
    }
    while blocks.len() > vulkan::LIVE {
        blocks.swap_remove(random.below(blocks.len()));
    }
    Pool { id: 0, bytes: vulkan::POOL, blocks }
}
