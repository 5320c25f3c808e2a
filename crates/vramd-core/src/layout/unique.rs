//! A JSON object of texts in which a key that occurs twice is an error.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// At most `MAX` entries, no key twice.
pub(super) struct UniqueMap<const MAX: usize>(pub BTreeMap<String, String>);

impl<'de, const MAX: usize> Deserialize<'de> for UniqueMap<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueMapVisitor)
    }
}

struct UniqueMapVisitor<const MAX: usize>;

impl<'de, const MAX: usize> Visitor<'de> for UniqueMapVisitor<MAX> {
    type Value = UniqueMap<MAX>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object of at most {MAX} texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut unique = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            if unique.len() == MAX {
                return Err(A::Error::invalid_length(MAX + 1, &self));
            }
            if unique.contains_key(&key) {
                return Err(A::Error::custom(format_args!("{key:?} occurs twice")));
            }
            unique.insert(key, value);
        }
        Ok(UniqueMap(unique))
    }
}
