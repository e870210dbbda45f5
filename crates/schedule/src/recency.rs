//! A set that forgets what was touched longest ago.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

/// Keys that are hashes already.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

/// A map whose keys are hashes already.
pub(crate) type HashedMap<V> = HashMap<u64, V, BuildHasherDefault<Hashed>>;

/// A set of hashes in the order in which they were touched last.
///
/// Each touch is a line at the end of `order`; lines that a later touch made void are passed over, and swept once they
/// are half of all.
#[derive(Debug, Default)]
pub(crate) struct Recency {
    /// When each key was touched last.
    touched: HashedMap<u64>,
    order: VecDeque<(u64, u64)>,
    clock: u64,
}

impl Recency {
    pub(crate) fn len(&self) -> usize {
        self.touched.len()
    }

    /// Makes `key` the youngest; true if it is new.
    pub(crate) fn touch(&mut self, key: u64) -> bool {
        self.clock += 1;
        let new = self.touched.insert(key, self.clock).is_none();
        self.order.push_back((key, self.clock));
        if self.order.len() > 2 * self.touched.len() + 16 {
            let Self { touched, order, .. } = self;
            order.retain(|(key, at)| touched.get(key) == Some(at));
        }
        new
    }

    /// Removes the oldest.
    pub(crate) fn pop(&mut self) -> Option<u64> {
        while let Some((key, at)) = self.order.pop_front() {
            if self.touched.get(&key) == Some(&at) {
                self.touched.remove(&key);
                return Some(key);
            }
        }
        None
    }

    /// All keys, in no order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = u64> {
        self.touched.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a plain list.
        #[test]
        fn the_oldest_goes_first(steps in proptest::collection::vec((0..3u8, 0..20u64), 0..300)) {
            let (mut recency, mut list) = (Recency::default(), Vec::new());
            for (what, key) in steps {
                if what == 0 {
                    prop_assert_eq!(recency.pop(), (!list.is_empty()).then(|| list.remove(0)));
                } else {
                    let place = list.iter().position(|k| *k == key);
                    prop_assert_eq!(recency.touch(key), place.is_none());
                    if let Some(place) = place {
                        list.remove(place);
                    }
                    list.push(key);
                }
                prop_assert_eq!(recency.len(), list.len());
                prop_assert!(recency.order.len() <= 2 * list.len() + 17);
            }
        }
    }
}
