//! Duplicate detection: request logs, passes, verdicts and the index they sweep. It knows
//! fingerprints, opaque addresses, sessions and sequences; it knows nothing of the store.
//!
//! A session submits requests, which wait in a log per partition. A pass sorts a partition's log
//! and joins it in one ascending sweep with the index and with the run of pending grants; every
//! request gets a [`Verdict`]. What sealed containers hold is learned into the index, which is a
//! hint and nothing more: all of it can be refilled from the store's journals.

mod detector;
mod options;
mod verdict;
mod watermark;

pub use detector::{Detector, OpenReport, PassReport, Rebuild};
pub use options::{DetectOptions, Partition};
pub use verdict::Verdict;
pub use watermark::{JournalPosition, Watermark};
