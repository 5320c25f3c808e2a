//! The index of the holes: a B+ tree by offset whose inner nodes also hold how long the longest hole below is.
//!
//! Owns nodes, paths, splits and merges; knows nothing of what is given out. Nodes live in two arrays and are
//! used again, so that a steady history asks for no memory.
//!
//! A node's `keys` are separators, not first offsets: child `i` has the holes from `keys[i]` up to `keys[i + 1]`,
//! and `keys[0]` is below all. No hole reaches over a separator, so a hole that loses its front stays
//! where it is; who makes a hole longer keeps this with [`Tree::separate`].

use super::lengths::{Lengths, WIDTH, back_half, insert_at, remove_at};

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
    /// Slots without a hole are `u64::MAX`.
    offsets: [u64; WIDTH],
    lengths: Lengths,
}

#[derive(Debug, Clone)]
struct Inner {
    count: usize,
    /// Slots without a child are `u64::MAX`.
    keys: [u64; WIDTH],
    children: [u32; WIDTH],
}

/// How long the longest hole below each child is, counted from its first multiple of `modulus` on.
#[derive(Debug, Clone)]
struct Longest {
    modulus: u64,
    all: u64,
    /// By inner node, then by child.
    children: Vec<Lengths>,
}

/// From the root to a leaf. Any insertion or removal ends it.
#[derive(Debug, Clone, Copy, Default)]
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
    const EMPTY: Self = Self { count: 0, offsets: [u64::MAX; WIDTH], lengths: Lengths::NONE };

    fn hole(&self, slot: usize) -> Hole {
        Hole { offset: self.offsets[slot], length: self.lengths.get(slot) }
    }

    fn holes(&self) -> impl Iterator<Item = Hole> {
        (0..self.count).map(|slot| self.hole(slot))
    }
}

impl Inner {
    const EMPTY: Self = Self { count: 0, keys: [u64::MAX; WIDTH], children: [0; WIDTH] };
}

impl Longest {
    fn new(modulus: u64) -> Self {
        Self { modulus, all: 0, children: Vec::new() }
    }

    /// The longest of a leaf but for one slot.
    #[inline]
    fn of_leaf_but(&self, leaf: &Leaf, but: usize) -> u64 {
        if self.modulus == 1 {
            return leaf.lengths.longest_but(but);
        }
        let others = (0..leaf.count).filter(|slot| *slot != but);
        others.map(|slot| leaf.hole(slot).usable(self.modulus, 0)).max().unwrap_or(0)
    }

    fn of_leaf(&self, leaf: &Leaf) -> u64 {
        self.of_leaf_but(leaf, WIDTH)
    }

    /// The hole at `slot` of the path's leaf was this long and is going to be that long; 0 for none. Each node is
    /// looked through before it is written to, the leaf too: what was just written in parts is slow to read whole.
    #[inline]
    fn change(
        &mut self,
        leaf: &Leaf,
        slot: usize,
        path: &Path,
        (mut was, mut is): (u64, u64),
        height: usize,
    ) {
        for depth in (0..=height).rev() {
            let kept = match depth.checked_sub(1).map(|above| path.steps[above]) {
                Some(Step { node, slot }) => self.children[node as usize].get(slot as usize),
                None => self.all,
            };
            let longest = if is >= kept {
                is
            } else if was < kept {
                kept
            } else if depth == height {
                is.max(self.of_leaf_but(leaf, slot))
            } else {
                let Step { node, slot } = path.steps[depth];
                is.max(self.children[node as usize].longest_but(slot as usize))
            };
            if depth < height {
                let Step { node, slot } = path.steps[depth];
                self.children[node as usize].set(slot as usize, is);
            }
            if longest == kept {
                return;
            }
            (was, is) = (kept, longest);
        }
        self.all = is;
    }
}

/// How many of the keys, which ascend, are no more than `key`.
#[inline]
fn up_to(keys: &[u64; WIDTH], key: u64) -> usize {
    let eighths = keys.as_chunks::<8>().0;
    let full: usize = eighths[1..].iter().map(|keys| usize::from(keys[0] <= key)).sum();
    let more: usize = eighths[full].iter().map(|other| usize::from(*other <= key)).sum();
    8 * full + more
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

    /// Makes the path lead to the leaf where `offset` belongs. How many of its holes start at or before it.
    #[inline]
    pub fn locate(&self, offset: u64, path: &mut Path) -> usize {
        let mut node = self.root;
        for step in &mut path.steps[..self.height] {
            let inner = &self.inners[node as usize];
            let slot = up_to(&inner.keys, offset) - 1;
            *step = Step { node, slot: slot as u32 };
            node = inner.children[slot];
        }
        path.leaf = node;
        up_to(&self.leaves[node as usize].offsets, offset)
    }

    /// Makes searches for multiples of `modulus` one descent, at some cost for each change. Without effect where
    /// it is so already, and where there are `most` of them.
    pub fn index(&mut self, modulus: u64, most: usize) {
        let at = self.aligned.partition_point(|known| known.modulus < modulus);
        if self.aligned.len() >= most || self.aligned.get(at).is_some_and(|known| known.modulus == modulus) {
            return;
        }
        let mut longest = Longest::new(modulus);
        longest.children = vec![Lengths::NONE; self.inners.len()];
        longest.all = self.measure(&mut longest, self.root, 0);
        self.aligned.insert(at, longest);
    }

    pub fn forget_indexes(&mut self) {
        self.aligned.clear();
    }

    /// Makes the path lead to the lowest hole that has `least` bytes from its first multiple of `modulus` on and
    /// that `fits` likes, and answers with its slot. The longest of the indexed moduli up to `modulus` guides it;
    /// with an indexed one and no more to ask of a hole, the first hole looked at is the answer.
    #[inline]
    pub fn search(
        &self,
        modulus: u64,
        least: u64,
        path: &mut Path,
        fits: impl Fn(Hole) -> bool,
    ) -> Option<usize> {
        let guide = self.aligned.iter().rfind(|known| known.modulus <= modulus).unwrap_or(&self.lengths);
        if guide.all < least {
            return None;
        }
        let mut node = self.root;
        let mut depth = 0;
        let mut from = 0;
        loop {
            // Down from the node at `depth`, along its first slot of `from` or more.
            while depth < self.height {
                let Some(slot) = guide.children[node as usize].first_of(from, least) else { break };
                path.steps[depth] = Step { node, slot: slot as u32 };
                node = self.inners[node as usize].children[slot];
                depth += 1;
                from = 0;
            }
            if depth == self.height {
                path.leaf = node;
                let leaf = &self.leaves[node as usize];
                while let Some(slot) = leaf.lengths.first_of(from, least) {
                    let hole = leaf.hole(slot);
                    if hole.usable(guide.modulus, 0) >= least && fits(hole) {
                        return Some(slot);
                    }
                    from = slot + 1;
                }
            }
            depth = depth.checked_sub(1)?;
            node = path.steps[depth].node;
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
        self.change(path, slot, self.hole(path, slot), hole);
        let leaf = &mut self.leaves[path.leaf as usize];
        leaf.offsets[slot] = hole.offset;
        leaf.lengths.set(slot, hole.length);
    }

    pub fn insert(&mut self, path: &Path, slot: usize, hole: Hole) {
        if self.count(path) == WIDTH {
            self.make_room(hole.offset);
            let mut path = Path::default();
            let slot = self.locate(hole.offset, &mut path);
            return self.insert(&path, slot, hole);
        }
        self.change(path, WIDTH, Hole { length: 0, ..hole }, hole);
        let leaf = &mut self.leaves[path.leaf as usize];
        insert_at(&mut leaf.offsets, slot, leaf.count, hole.offset);
        leaf.lengths.insert(slot, leaf.count, hole.length);
        leaf.count += 1;
    }

    pub fn remove(&mut self, path: &Path, slot: usize) {
        let hole = self.hole(path, slot);
        self.change(path, slot, hole, Hole { length: 0, ..hole });
        let leaf = &mut self.leaves[path.leaf as usize];
        remove_at(&mut leaf.offsets, slot, leaf.count, u64::MAX);
        leaf.lengths.remove(slot, leaf.count);
        leaf.count -= 1;
        if leaf.count < FEW {
            self.merge(path);
        }
    }

    #[inline]
    fn change(&mut self, path: &Path, slot: usize, was: Hole, is: Hole) {
        let leaf = &self.leaves[path.leaf as usize];
        self.lengths.change(leaf, slot, path, (was.length, is.length), self.height);
        for longest in &mut self.aligned {
            let usable = (was.usable(longest.modulus, 0), is.usable(longest.modulus, 0));
            longest.change(leaf, slot, path, usable, self.height);
        }
    }

    fn first_path(&self) -> Path {
        self.fill(Path { leaf: self.root, ..Path::default() }, 0, |_| 0)
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
            let length = self.measure(longest, *child, depth + 1);
            longest.children[node as usize].set(slot, length);
        }
        longest.children[node as usize].longest()
    }

    /// Splits full nodes on the way to `offset`, from the lowest whose parent is not full, until its leaf is not.
    fn make_room(&mut self, offset: u64) {
        let mut path = Path::default();
        loop {
            self.locate(offset, &mut path);
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
        (inner.count, inner.keys[0], inner.children[0]) = (1, 0, self.root);
        for longest in self.indexes() {
            let all = longest.all;
            longest.children[root as usize].set(0, all);
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
                    longest.children[node as usize].longest()
                }
            };
            let (left, right) = (of(longest, left), of(longest, right));
            let children = &mut longest.children[parent];
            children.set(slot, left);
            children.insert(slot + 1, inner.count - 1, right);
        }
    }

    fn split_leaf(&mut self, left: u32) -> (u32, u64) {
        let right = self.spare_leaves.pop().unwrap_or_else(|| {
            self.leaves.push(Leaf::EMPTY);
            self.leaves.len() as u32 - 1
        });
        let mut new = Leaf::EMPTY;
        let old = &mut self.leaves[left as usize];
        new.offsets = back_half(&mut old.offsets, u64::MAX);
        new.lengths = old.lengths.split();
        (old.count, new.count) = (WIDTH / 2, WIDTH / 2);
        let key = new.offsets[0];
        self.leaves[right as usize] = new;
        (right, key)
    }

    fn split_inner(&mut self, left: u32) -> (u32, u64) {
        let right = self.new_inner();
        let mut new = Inner::EMPTY;
        let old = &mut self.inners[left as usize];
        new.keys = back_half(&mut old.keys, u64::MAX);
        new.children = back_half(&mut old.children, 0);
        (old.count, new.count) = (WIDTH / 2, WIDTH / 2);
        let key = std::mem::replace(&mut new.keys[0], 0);
        self.inners[right as usize] = new;
        for longest in self.indexes() {
            longest.children[right as usize] = longest.children[left as usize].split();
        }
        (right, key)
    }

    fn new_inner(&mut self) -> u32 {
        self.spare_inners.pop().unwrap_or_else(|| {
            self.inners.push(Inner::EMPTY);
            for longest in self.indexes() {
                longest.children.push(Lengths::NONE);
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
            left.lengths.append(left.count, &right.lengths, right.count);
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
                one.append(at, two, count);
            }
        }
        for longest in self.indexes() {
            let children = &mut longest.children[parent as usize];
            children.set(slot, children.get(slot).max(children.get(slot + 1)));
        }
        self.drop_child(parent, slot + 1, low);
    }

    /// Takes a child from its parent. Its neighbour before it, or else the one after, has its offsets from now on.
    fn drop_child(&mut self, parent: u32, slot: usize, low: bool) {
        let inner = &mut self.inners[parent as usize];
        let child = inner.children[slot];
        remove_at(&mut inner.keys, slot, inner.count, u64::MAX);
        remove_at(&mut inner.children, slot, inner.count, 0);
        let count = inner.count;
        inner.count -= 1;
        if inner.count > 0 {
            inner.keys[0] = 0;
        }
        for longest in self.indexes() {
            longest.children[parent as usize].remove(slot, count);
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
            longest.children[node as usize] = Lengths::NONE;
        }
        self.spare_inners.push(node);
    }
}
