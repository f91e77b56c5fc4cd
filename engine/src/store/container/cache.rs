//! A bounded cache of whole values.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

/// Values up to a number of bytes; the least recently used go first.
pub(crate) struct Cache<K, V> {
    limit: usize,
    used: usize,
    clock: u64,
    entries: HashMap<K, Cached<V>>,
}

struct Cached<V> {
    value: Arc<V>,
    bytes: usize,
    used_at: u64,
}

impl<K: Copy + Eq + Hash, V> Cache<K, V> {
    pub(crate) fn new(limit: usize) -> Self {
        Cache { limit, used: 0, clock: 0, entries: HashMap::new() }
    }

    pub(crate) fn used(&self) -> usize {
        self.used
    }

    pub(crate) fn get(&mut self, key: &K) -> Option<Arc<V>> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used_at = self.clock;
        Some(entry.value.clone())
    }

    pub(crate) fn put(&mut self, key: K, value: Arc<V>, bytes: usize) {
        self.clock += 1;
        if let Some(old) = self.entries.insert(key, Cached { value, bytes, used_at: self.clock }) {
            self.used -= old.bytes;
        }
        self.used += bytes;
        // Entries are some hundreds: looking through them is cheaper than keeping a list in order.
        while self.used > self.limit && self.entries.len() > 1 {
            let oldest =
                self.entries.iter().min_by_key(|(_, entry)| entry.used_at).map(|(key, _)| *key);
            let Some(old) = oldest.and_then(|oldest| self.entries.remove(&oldest)) else { break };
            self.used -= old.bytes;
        }
    }

    pub(crate) fn remove_if(&mut self, condition: impl Fn(&K) -> bool) {
        let used = &mut self.used;
        self.entries.retain(|key, entry| {
            let remove = condition(key);
            if remove {
                *used -= entry.bytes;
            }
            !remove
        });
    }
}
