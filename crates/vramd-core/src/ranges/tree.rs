//! The index of the holes: a B+ tree by offset whose inner nodes also hold how long the longest hole below is.
//!
//! Owns nodes, paths, splits and merges; knows nothing of what is given out. Nodes live in two arrays and are
//! used again, so that a steady history asks for no memory.
//!
//! A node's `keys` are separators, not first offsets: child `i` has the holes from `keys[i]` up to `keys[i + 1]`,
//! and `keys[0]` is never looked at. No hole reaches over a separator, so a hole that loses its front stays
//! where it is; who makes a hole longer keeps this with [`Tree::separate`].

/// Holes of a leaf, children of an inner node: 32 keys are four lines of the cache.
const WIDTH: usize = 32;
/// A node with fewer looks for a neighbour to merge with,
const FEW: usize = WIDTH / 4;
/// as long as the two together have no more than this, so that the next insertion splits nothing.
const MERGED: usize = WIDTH * 3 / 4;
/// Two neighbours have at least [`FEW`] between them: 4 to the 12th nodes are more than fit in memory.
const MAX_HEIGHT: usize = 12;

/// A free range, its first byte and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    pub offset: u64,
    pub length: u64,
}

impl Hole {
    pub fn end(self) -> u64 {
        self.offset + self.length
    }

    /// From its start to the first offset that leaves `remainder` when divided by `modulus`, a power of two.
    pub fn padding(self, modulus: u64, remainder: u64) -> u64 {
        remainder.wrapping_sub(self.offset) & (modulus - 1)
    }

    /// What is left of it behind that padding.
    pub fn usable(self, modulus: u64, remainder: u64) -> u64 {
        self.length.saturating_sub(self.padding(modulus, remainder))
    }
}

#[derive(Debug, Clone)]
struct Leaf {
    count: usize,
    offsets: [u64; WIDTH],
    lengths: [u64; WIDTH],
}

#[derive(Debug, Clone)]
struct Inner {
    count: usize,
    keys: [u64; WIDTH],
    children: [u32; WIDTH],
}

/// How long the longest hole below each child is, counted from its first multiple of `modulus` on.
#[derive(Debug, Clone)]
struct Longest {
    modulus: u64,
    all: u64,
    /// By inner node, then by child. Slots without a child are 0.
    children: Vec<[u64; WIDTH]>,
}

/// From the root to a leaf. Any insertion or removal ends it.
#[derive(Debug, Clone, Copy)]
pub struct Path {
    steps: [Step; MAX_HEIGHT],
    leaf: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Step {
    node: u32,
    slot: u32,
}

#[derive(Debug, Clone)]
pub struct Tree {
    /// Inner nodes on the way to each leaf. With none, the root is a leaf.
    height: usize,
    root: u32,
    leaves: Vec<Leaf>,
    inners: Vec<Inner>,
    spare_leaves: Vec<u32>,
    spare_inners: Vec<u32>,
    lengths: Longest,
    aligned: Vec<Longest>,
}

impl Leaf {
    const EMPTY: Self = Self { count: 0, offsets: [0; WIDTH], lengths: [0; WIDTH] };

    fn hole(&self, slot: usize) -> Hole {
        Hole { offset: self.offsets[slot], length: self.lengths[slot] }
    }

    fn holes(&self) -> impl Iterator<Item = Hole> {
        let pairs = self.offsets.iter().zip(&self.lengths).take(self.count);
        pairs.map(|(&offset, &length)| Hole { offset, length })
    }
}

impl Inner {
    const EMPTY: Self = Self { count: 0, keys: [0; WIDTH], children: [0; WIDTH] };

    fn slot_of(&self, offset: u64) -> usize {
        self.keys[1..self.count].partition_point(|key| *key <= offset)
    }
}

impl Longest {
    fn new(modulus: u64) -> Self {
        Self { modulus, all: 0, children: Vec::new() }
    }

    fn of_leaf(&self, leaf: &Leaf) -> u64 {
        if self.modulus == 1 {
            // Slots without a hole are 0.
            return longest(&leaf.lengths);
        }
        leaf.holes().map(|hole| hole.usable(self.modulus, 0)).max().unwrap_or(0)
    }

    /// Where the longest of the node at `depth` of the path is kept.
    fn kept(&mut self, path: &Path, depth: usize) -> &mut u64 {
        match depth.checked_sub(1) {
            None => &mut self.all,
            Some(above) => {
                let Step { node, slot } = path.steps[above];
                &mut self.children[node as usize][slot as usize]
            }
        }
    }

    /// A hole of the path's leaf was this long and now is that long; 0 for none.
    #[inline]
    fn change(&mut self, leaf: &Leaf, path: &Path, height: usize, (mut was, mut is): (u64, u64)) {
        for depth in (0..=height).rev() {
            let kept = *self.kept(path, depth);
            let longest = if is >= kept {
                is
            } else if was < kept {
                return;
            } else if depth == height {
                self.of_leaf(leaf)
            } else {
                longest(&self.children[path.steps[depth].node as usize])
            };
            if longest == kept {
                return;
            }
            *self.kept(path, depth) = longest;
            (was, is) = (kept, longest);
        }
    }
}

fn longest(lengths: &[u64; WIDTH]) -> u64 {
    lengths.iter().copied().max().unwrap_or(0)
}

fn first_of_at_least(lengths: &[u64; WIDTH], from: usize, least: u64) -> Option<usize> {
    lengths[from..].iter().position(|length| *length >= least).map(|slot| from + slot)
}

impl Tree {
    pub fn new() -> Self {
        Self {
            height: 0,
            root: 0,
            leaves: vec![Leaf::EMPTY],
            inners: Vec::new(),
            spare_leaves: Vec::new(),
            spare_inners: Vec::new(),
            lengths: Longest::new(1),
            aligned: Vec::new(),
        }
    }

    pub fn longest(&self) -> u64 {
        self.lengths.all
    }

    pub fn hole(&self, path: &Path, slot: usize) -> Hole {
        self.leaves[path.leaf as usize].hole(slot)
    }

    /// Holes in the path's leaf.
    pub fn count(&self, path: &Path) -> usize {
        self.leaves[path.leaf as usize].count
    }

    pub fn iter(&self) -> impl Iterator<Item = Hole> {
        let mut next = Some(self.first_path());
        std::iter::from_fn(move || {
            let path = next?;
            next = self.after(&path);
            Some(&self.leaves[path.leaf as usize])
        })
        .flat_map(Leaf::holes)
    }

    /// The leaf where `offset` belongs, and how many of its holes start at or before it.
    pub fn locate(&self, offset: u64) -> (Path, usize) {
        let mut path = self.start();
        for step in &mut path.steps[..self.height] {
            let inner = &self.inners[path.leaf as usize];
            let slot = inner.slot_of(offset);
            *step = Step { node: path.leaf, slot: slot as u32 };
            path.leaf = inner.children[slot];
        }
        let leaf = &self.leaves[path.leaf as usize];
        (path, leaf.offsets[..leaf.count].partition_point(|start| *start <= offset))
    }

    /// Makes searches for multiples of `modulus` one descent, at some cost for each change. Without effect where
    /// it is so already, and where there are `most` of them.
    pub fn index(&mut self, modulus: u64, most: usize) {
        let at = self.aligned.partition_point(|known| known.modulus < modulus);
        if self.aligned.len() >= most || self.aligned.get(at).is_some_and(|known| known.modulus == modulus) {
            return;
        }
        let mut longest = Longest::new(modulus);
        longest.children = vec![[0; WIDTH]; self.inners.len()];
        longest.all = self.measure(&mut longest, self.root, 0);
        self.aligned.insert(at, longest);
    }

    pub fn forget_indexes(&mut self) {
        self.aligned.clear();
    }

    /// The lowest hole that has `least` bytes from its first multiple of `modulus` on and that `fits` likes. The
    /// longest of the indexed moduli up to `modulus` guides it; with an indexed one and no more to ask of a hole,
    /// the first hole looked at is the answer.
    #[inline]
    pub fn search(&self, modulus: u64, least: u64, fits: impl Fn(Hole) -> bool) -> Option<(Path, usize)> {
        let guide = self.aligned.iter().rfind(|known| known.modulus <= modulus).unwrap_or(&self.lengths);
        if guide.all < least {
            return None;
        }
        let mut path = self.start();
        let mut depth = 0;
        let mut from = 0;
        loop {
            // Down from `path.leaf`, which names the node at `depth`, along its first slot of `from` or more.
            while depth < self.height {
                let node = path.leaf;
                let Some(slot) = first_of_at_least(&guide.children[node as usize], from, least) else {
                    break;
                };
                path.steps[depth] = Step { node, slot: slot as u32 };
                path.leaf = self.inners[node as usize].children[slot];
                depth += 1;
                from = 0;
            }
            if depth == self.height {
                let leaf = &self.leaves[path.leaf as usize];
                while let Some(slot) = first_of_at_least(&leaf.lengths, from, least) {
                    let hole = leaf.hole(slot);
                    if hole.usable(guide.modulus, 0) >= least && fits(hole) {
                        return Some((path, slot));
                    }
                    from = slot + 1;
                }
            }
            depth = depth.checked_sub(1)?;
            path.leaf = path.steps[depth].node;
            from = path.steps[depth].slot as usize + 1;
        }
    }

    /// The leaf before the path's, if there is one.
    pub fn before(&self, path: &Path) -> Option<Path> {
        let depth = (0..self.height).rfind(|depth| path.steps[*depth].slot > 0)?;
        Some(self.descend(path, depth, path.steps[depth].slot - 1, |inner| inner.count - 1))
    }

    /// The leaf after the path's, if there is one.
    pub fn after(&self, path: &Path) -> Option<Path> {
        let has_next = |step: Step| step.slot as usize + 1 < self.inners[step.node as usize].count;
        let depth = (0..self.height).rfind(|depth| has_next(path.steps[*depth]))?;
        Some(self.descend(path, depth, path.steps[depth].slot + 1, |_| 0))
    }

    /// Makes `offset` the separator between the path's leaf and what is before it.
    pub fn separate(&mut self, path: &Path, offset: u64) {
        if let Some(step) = path.steps[..self.height].iter().rev().find(|step| step.slot > 0) {
            self.inners[step.node as usize].keys[step.slot as usize] = offset;
        }
    }

    /// Puts another hole in the place of one.
    #[inline]
    pub fn replace(&mut self, path: &Path, slot: usize, hole: Hole) {
        let leaf = &mut self.leaves[path.leaf as usize];
        let old = leaf.hole(slot);
        (leaf.offsets[slot], leaf.lengths[slot]) = (hole.offset, hole.length);
        self.changed(path, old, hole);
    }

    pub fn insert(&mut self, path: &Path, slot: usize, hole: Hole) {
        if self.count(path) == WIDTH {
            self.make_room(hole.offset);
            let (path, slot) = self.locate(hole.offset);
            return self.insert(&path, slot, hole);
        }
        let leaf = &mut self.leaves[path.leaf as usize];
        insert_at(&mut leaf.offsets, slot, leaf.count, hole.offset);
        insert_at(&mut leaf.lengths, slot, leaf.count, hole.length);
        leaf.count += 1;
        self.changed(path, Hole { length: 0, ..hole }, hole);
    }

    pub fn remove(&mut self, path: &Path, slot: usize) {
        let leaf = &mut self.leaves[path.leaf as usize];
        let hole = leaf.hole(slot);
        remove_at(&mut leaf.offsets, slot, leaf.count);
        remove_at(&mut leaf.lengths, slot, leaf.count);
        leaf.count -= 1;
        let few = leaf.count < FEW;
        self.changed(path, hole, Hole { length: 0, ..hole });
        if few {
            self.merge(path);
        }
    }

    #[inline]
    fn changed(&mut self, path: &Path, was: Hole, is: Hole) {
        let leaf = &self.leaves[path.leaf as usize];
        self.lengths.change(leaf, path, self.height, (was.length, is.length));
        for longest in &mut self.aligned {
            let usable = (was.usable(longest.modulus, 0), is.usable(longest.modulus, 0));
            longest.change(leaf, path, self.height, usable);
        }
    }

    fn start(&self) -> Path {
        Path { steps: [Step::default(); MAX_HEIGHT], leaf: self.root }
    }

    fn first_path(&self) -> Path {
        self.fill(self.start(), 0, |_| 0)
    }

    fn descend(&self, path: &Path, depth: usize, slot: u32, choose: impl Fn(&Inner) -> usize) -> Path {
        let mut path = *path;
        path.steps[depth].slot = slot;
        path.leaf = self.inners[path.steps[depth].node as usize].children[slot as usize];
        self.fill(path, depth + 1, choose)
    }

    /// Completes a path whose `leaf` names the node at `depth`.
    fn fill(&self, mut path: Path, depth: usize, choose: impl Fn(&Inner) -> usize) -> Path {
        for step in &mut path.steps[depth..self.height] {
            let inner = &self.inners[path.leaf as usize];
            let slot = choose(inner);
            *step = Step { node: path.leaf, slot: slot as u32 };
            path.leaf = inner.children[slot];
        }
        path
    }

    /// Fills in what `longest` holds for the node and all below it; the answer is the node's own.
    fn measure(&self, longest: &mut Longest, node: u32, depth: usize) -> u64 {
        if depth == self.height {
            return longest.of_leaf(&self.leaves[node as usize]);
        }
        let inner = &self.inners[node as usize];
        for (slot, child) in inner.children[..inner.count].iter().enumerate() {
            longest.children[node as usize][slot] = self.measure(longest, *child, depth + 1);
        }
        self::longest(&longest.children[node as usize])
    }

    /// Splits full nodes on the way to `offset`, from the lowest whose parent is not full, until its leaf is not.
    fn make_room(&mut self, offset: u64) {
        loop {
            let (path, _) = self.locate(offset);
            if self.count(&path) < WIDTH {
                return;
            }
            let above =
                (0..self.height).rfind(|depth| self.inners[path.steps[*depth].node as usize].count < WIDTH);
            match above {
                Some(above) => self.split(&path, above),
                None => self.grow(),
            }
        }
    }

    /// A new root above the old one.
    fn grow(&mut self) {
        let root = self.new_inner();
        let inner = &mut self.inners[root as usize];
        (inner.count, inner.children[0]) = (1, self.root);
        for longest in self.indexes() {
            longest.children[root as usize][0] = longest.all;
        }
        self.root = root;
        self.height += 1;
    }

    /// Splits the child that the path takes at depth `above`. What is longest above does not change by it.
    fn split(&mut self, path: &Path, above: usize) {
        let Step { node: parent, slot } = path.steps[above];
        let (parent, slot) = (parent as usize, slot as usize);
        let left = self.inners[parent].children[slot];
        let (right, key) =
            if above + 1 == self.height { self.split_leaf(left) } else { self.split_inner(left) };
        let inner = &mut self.inners[parent];
        insert_at(&mut inner.keys, slot + 1, inner.count, key);
        insert_at(&mut inner.children, slot + 1, inner.count, right);
        inner.count += 1;
        for longest in std::iter::once(&mut self.lengths).chain(&mut self.aligned) {
            let of = |longest: &Longest, node: u32| {
                if above + 1 == self.height {
                    longest.of_leaf(&self.leaves[node as usize])
                } else {
                    self::longest(&longest.children[node as usize])
                }
            };
            let (left, right) = (of(longest, left), of(longest, right));
            let children = &mut longest.children[parent];
            children[slot] = left;
            insert_at(children, slot + 1, inner.count - 1, right);
        }
    }

    fn split_leaf(&mut self, left: u32) -> (u32, u64) {
        let right = self.spare_leaves.pop().unwrap_or_else(|| {
            self.leaves.push(Leaf::EMPTY);
            self.leaves.len() as u32 - 1
        });
        let mut new = Leaf::EMPTY;
        let old = &mut self.leaves[left as usize];
        move_back_half(&mut old.offsets, &mut new.offsets);
        move_back_half(&mut old.lengths, &mut new.lengths);
        (old.count, new.count) = (WIDTH / 2, WIDTH / 2);
        let key = new.offsets[0];
        self.leaves[right as usize] = new;
        (right, key)
    }

    fn split_inner(&mut self, left: u32) -> (u32, u64) {
        let right = self.new_inner();
        let mut new = Inner::EMPTY;
        let old = &mut self.inners[left as usize];
        move_back_half(&mut old.keys, &mut new.keys);
        move_back_half(&mut old.children, &mut new.children);
        (old.count, new.count) = (WIDTH / 2, WIDTH / 2);
        let key = new.keys[0];
        self.inners[right as usize] = new;
        for longest in self.indexes() {
            let mut back = [0; WIDTH];
            move_back_half(&mut longest.children[left as usize], &mut back);
            longest.children[right as usize] = back;
        }
        (right, key)
    }

    fn new_inner(&mut self) -> u32 {
        self.spare_inners.pop().unwrap_or_else(|| {
            self.inners.push(Inner::EMPTY);
            for longest in self.indexes() {
                longest.children.push([0; WIDTH]);
            }
            self.inners.len() as u32 - 1
        })
    }

    fn indexes(&mut self) -> impl Iterator<Item = &mut Longest> {
        std::iter::once(&mut self.lengths).chain(&mut self.aligned)
    }

    /// Merges the path's nodes with neighbours, from its leaf up, where they have become few. What is longest
    /// does not change by it.
    fn merge(&mut self, path: &Path) {
        for above in (0..self.height).rev() {
            let Step { node, slot } = path.steps[above];
            let (parent, slot) = (&self.inners[node as usize], slot as usize);
            let low = above + 1 == self.height;
            let count = |slot: usize| match (low, parent.children[slot] as usize) {
                (true, leaf) => self.leaves[leaf].count,
                (false, inner) => self.inners[inner].count,
            };
            let own = count(slot);
            if own == 0 {
                self.drop_child(node, slot, low);
            } else if own >= FEW {
                return;
            } else if slot + 1 < parent.count && own + count(slot + 1) <= MERGED {
                self.join(node, slot, low);
            } else if slot > 0 && own + count(slot - 1) <= MERGED {
                self.join(node, slot - 1, low);
            } else {
                return;
            }
        }
        while self.height > 0 && self.inners[self.root as usize].count == 1 {
            let old = self.root;
            self.root = self.inners[old as usize].children[0];
            self.recycle_inner(old);
            self.height -= 1;
        }
    }

    /// Moves all that the child after `slot` has to the child at `slot`.
    fn join(&mut self, parent: u32, slot: usize, low: bool) {
        let inner = &self.inners[parent as usize];
        let (left, right) = (inner.children[slot] as usize, inner.children[slot + 1] as usize);
        let key = inner.keys[slot + 1];
        let pair = "a node is not its own neighbour";
        if low {
            let [left, right] = self.leaves.get_disjoint_mut([left, right]).expect(pair);
            let (at, end) = (left.count, left.count + right.count);
            left.offsets[at..end].copy_from_slice(&right.offsets[..right.count]);
            left.lengths[at..end].copy_from_slice(&right.lengths[..right.count]);
            left.count = end;
        } else {
            let [one, two] = self.inners.get_disjoint_mut([left, right]).expect(pair);
            let (at, end, count) = (one.count, one.count + two.count, two.count);
            two.keys[0] = key;
            one.keys[at..end].copy_from_slice(&two.keys[..count]);
            one.children[at..end].copy_from_slice(&two.children[..count]);
            one.count = end;
            for longest in self.indexes() {
                let [one, two] = longest.children.get_disjoint_mut([left, right]).expect(pair);
                one[at..end].copy_from_slice(&two[..count]);
            }
        }
        for longest in self.indexes() {
            let children = &mut longest.children[parent as usize];
            children[slot] = children[slot].max(children[slot + 1]);
        }
        self.drop_child(parent, slot + 1, low);
    }

    /// Takes a child from its parent. Its neighbour before it, or else the one after, has its offsets from now on.
    fn drop_child(&mut self, parent: u32, slot: usize, low: bool) {
        let inner = &mut self.inners[parent as usize];
        let child = inner.children[slot];
        remove_at(&mut inner.keys, slot, inner.count);
        remove_at(&mut inner.children, slot, inner.count);
        inner.count -= 1;
        let count = inner.count + 1;
        for longest in self.indexes() {
            remove_at(&mut longest.children[parent as usize], slot, count);
        }
        if low {
            self.leaves[child as usize] = Leaf::EMPTY;
            self.spare_leaves.push(child);
        } else {
            self.recycle_inner(child);
        }
    }

    fn recycle_inner(&mut self, node: u32) {
        self.inners[node as usize] = Inner::EMPTY;
        for longest in self.indexes() {
            longest.children[node as usize] = [0; WIDTH];
        }
        self.spare_inners.push(node);
    }
}

fn insert_at<T: Copy>(slots: &mut [T; WIDTH], slot: usize, count: usize, value: T) {
    slots.copy_within(slot..count, slot + 1);
    slots[slot] = value;
}

/// Slots from the count on stay at 0.
fn remove_at<T: Copy + Default>(slots: &mut [T; WIDTH], slot: usize, count: usize) {
    slots.copy_within(slot + 1..count, slot);
    slots[count - 1] = T::default();
}

fn move_back_half<T: Copy + Default>(from: &mut [T; WIDTH], to: &mut [T; WIDTH]) {
    to[..WIDTH / 2].copy_from_slice(&from[WIDTH / 2..]);
    from[WIDTH / 2..].fill(T::default());
}
