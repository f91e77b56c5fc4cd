//! Duplicate detection: request logs, passes, verdicts and the index they sweep. It knows
//! fingerprints, opaque addresses, sessions and sequences; it knows nothing of the store.
//!
//! A session submits requests, which wait in a log per partition. A pass sorts a partition's log
//! and joins it in one ascending sweep with the index and with the run of pending grants; every
//! request gets a [`Verdict`]. What sealed containers hold is learned into the index, which is a
//! hint and nothing more: all of it can be refilled from the store's journals.

mod compaction;
mod current;
mod detector;
mod duplicates;
mod format;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod group;
mod header;
mod index;
mod lookup;
mod memtable;
mod merge;
mod options;
mod pass;
mod pending;
mod rebuild;
mod records;
mod request_log;
mod shard;
mod sweep;
mod verdict;
mod watermark;

pub use detector::{Detector, LeftOver, OpenReport};
pub use options::{DetectOptions, MAX_PARTITION_BITS, Partition};
pub use pass::PassReport;
pub use rebuild::{Anew, Rebuild, Rebuilt};
pub use verdict::Verdict;
pub use watermark::{JournalPosition, Watermark};

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
