//! Histories made from the shapes of real models: what a machine for images and text takes and gives in a day.

use crate::clock::Clock;
use crate::mixes::{POOL, Random, Times};
use crate::peers::{Peer, UNIT};

pub enum Event {
    Take { id: usize, bytes: u64 },
    Give { id: usize },
}

/// Loads and unloads an image model, a text model and its growing caches, over and over. With seeds of its own.
pub fn day() -> Vec<Event> {
    let mut trace = Trace { events: Vec::new(), next: 0 };
    let mut random = Random(5);
    for _ in 0..20 {
        let encoders =
            trace.load(&[transformer(12, 768, 3072, 49_408), transformer(32, 1280, 5120, 49_408)].concat());
        let unet = trace.load(&unet());
        trace.run(&mut random, 30, 64 << 20);
        trace.unload(encoders);
        let decoder = trace.load(&decoder());
        trace.run(&mut random, 8, 256 << 20);
        trace.unload(decoder);
        let text = trace.load(&transformer(28, 3072, 8192, 128_256));
        let caches = trace.grow_caches(&mut random);
        // Every other time the image model goes first, so that holes of both sizes come about.
        if random.below(2) == 0 {
            trace.unload(unet);
            trace.unload(caches);
            trace.unload(text);
        } else {
            trace.unload(caches);
            trace.unload(text);
            trace.unload(unet);
        }
    }
    trace.events
}

pub fn replay<P: Peer>(clock: &Clock, events: &[Event]) -> Times {
    let mut pool = P::new(POOL);
    let mut live: Vec<Option<P::Block>> = Vec::new();
    let mut times = Times::default();
    for event in events {
        match *event {
            Event::Take { id, bytes } => {
                live.resize_with(live.len().max(id + 1), || None);
                live[id] = clock.time(&mut times.take, || pool.take(bytes));
                times.refusals += usize::from(live[id].is_none());
            }
            Event::Give { id } => {
                if let Some(block) = live[id].take() {
                    clock.time(&mut times.give, || pool.give(block));
                }
            }
        }
    }
    times
}

struct Trace {
    events: Vec<Event>,
    next: usize,
}

impl Trace {
    fn take(&mut self, bytes: u64) -> usize {
        let id = self.next;
        self.next += 1;
        self.events.push(Event::Take { id, bytes: bytes.next_multiple_of(UNIT) });
        id
    }

    fn load(&mut self, tensors: &[u64]) -> Vec<usize> {
        tensors.iter().map(|elements| self.take(2 * elements)).collect()
    }

    fn unload(&mut self, blocks: Vec<usize>) {
        self.events.extend(blocks.into_iter().map(|id| Event::Give { id }));
    }

    /// Working memory of a few steps: buffers that overlap in time, up to `most` bytes each.
    fn run(&mut self, random: &mut Random, steps: usize, most: u64) {
        let mut live = Vec::new();
        for _ in 0..steps * 10 {
            live.push(self.take(most >> random.below(8)));
            if live.len() > 5 {
                let id = live.swap_remove(random.below(live.len()));
                self.events.push(Event::Give { id });
            }
        }
        self.unload(live);
    }

    /// Sequences that come, grow by pages of 2 MiB and end. What is alive at last is the caller's.
    fn grow_caches(&mut self, random: &mut Random) -> Vec<usize> {
        let mut sequences: Vec<Vec<usize>> = vec![Vec::new(); 24];
        for _ in 0..4000 {
            let at = random.below(sequences.len());
            if sequences[at].len() > 8 + random.below(48) {
                let ended = std::mem::take(&mut sequences[at]);
                self.unload(ended);
            }
            let page = self.take(2 << 20);
            sequences[at].push(page);
        }
        sequences.concat()
    }
}

/// Elements of each tensor of a decoder of text: vocabulary, then for each layer attention, its norms and the
/// three matrices of its feed-forward part.
fn transformer(layers: u64, width: u64, inner: u64, words: u64) -> Vec<u64> {
    let layer = [width * width, width * width / 4, width * width / 4, width * width, width, width];
    let forward = [width * inner, width * inner, width * inner];
    let mut tensors = vec![words * width];
    for _ in 0..layers {
        tensors.extend(layer);
        tensors.extend(forward);
    }
    tensors.push(width);
    tensors
}

/// As of a large image model: residual blocks of 3 × 3 convolutions, and transformers at the two deeper levels.
fn unet() -> Vec<u64> {
    let mut tensors = Vec::new();
    for (width, depth) in [(320, 0), (640, 2), (1280, 10), (1280, 10), (640, 2), (320, 0)] {
        for _ in 0..3 {
            tensors.extend([9 * width * width, width, 9 * width * width, width, 1280 * width, width]);
            for _ in 0..depth {
                tensors.extend([width * width; 6]);
                tensors.extend([2048 * width, 2048 * width, 8 * width * width, 4 * width * width]);
                tensors.extend([width; 8]);
            }
        }
    }
    tensors
}

fn decoder() -> Vec<u64> {
    let level = |width: u64| [9 * width * width, width, 9 * width * width, width, width, width];
    [512u64, 512, 512, 256, 128].into_iter().flat_map(|width| [level(width); 3]).flatten().collect()
}
