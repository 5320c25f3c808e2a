//! Which model is usually used after another.

use std::collections::BTreeMap;

/// The most successors of one that are counted.
const COUNTED: usize = 16;
/// So many uses are remembered, the older ones by half each time.
const REMEMBERED: u32 = 64;
/// Fewer are no habit.
const HABIT: u32 = 3;

/// What was used after what.
#[derive(Debug, Clone)]
pub struct Succession<K> {
    last: Option<K>,
    after: BTreeMap<K, BTreeMap<K, u32>>,
}

impl<K> Default for Succession<K> {
    fn default() -> Self {
        Self { last: None, after: BTreeMap::new() }
    }
}

impl<K: Ord + Clone> Succession<K> {
    /// Something is used; answers what is used next at least every other time, if there is such.
    pub fn used(&mut self, key: &K) -> Option<K> {
        let before = self.last.replace(key.clone()).filter(|before| before != key);
        if let Some(before) = before {
            let after = self.after.entry(before).or_default();
            if after.values().sum::<u32>() >= REMEMBERED {
                after.retain(|_, count| {
                    *count /= 2;
                    *count > 0
                });
            }
            if after.len() < COUNTED || after.contains_key(key) {
                *after.entry(key.clone()).or_default() += 1;
            }
        }
        let after = self.after.get(key)?;
        let (next, count) = after.iter().max_by_key(|(_, count)| **count)?;
        (*count >= HABIT && count * 2 >= after.values().sum()).then(|| next.clone())
    }

    /// It is no more.
    pub fn forget(&mut self, key: &K) {
        self.after.remove(key);
        self.after.values_mut().for_each(|after| {
            after.remove(key);
        });
        self.last = self.last.take().filter(|last| last != key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_every_other_time_is_foreseen_once_it_is_a_habit() {
        let mut succession = Succession::default();
        let mut foreseen = Vec::new();
        for _ in 0..4 {
            for key in ["a", "b", "c"] {
                foreseen.push(succession.used(&key));
            }
        }
        assert!(foreseen[..9].iter().all(Option::is_none), "{foreseen:?}");
        assert_eq!(foreseen[9..], [Some("b"), Some("c"), Some("a")]);
        // Again and again the same is no succession.
        assert_eq!((succession.used(&"a"), succession.used(&"a")), (Some("b"), Some("b")));
        // As many others come after it.
        for _ in 0..8 {
            succession.used(&"d");
            succession.used(&"a");
        }
        assert_eq!(succession.used(&"a"), Some("d"));
        succession.forget(&"d");
        assert_eq!(succession.used(&"a"), Some("b"));
    }

    #[test]
    fn old_habits_fade() {
        let mut succession = Succession::default();
        for _ in 0..200 {
            succession.used(&"a");
            succession.used(&"b");
        }
        let mut until = 0;
        while succession.used(&"a") != Some("c") {
            succession.used(&"c");
            until += 1;
        }
        assert!(until < 70, "{until}");
    }
}
