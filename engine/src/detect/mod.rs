//! Duplicate detection: request logs, shards, passes, verdicts. Knows nothing of the store.
