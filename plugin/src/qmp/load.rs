//! What the guest asks of its disks, and how long that takes: as QEMU counts it, which leaves our own reads out.

use std::time::Duration;

use serde_json::json;

use crate::qmp::command::{self as cmd, DeviceCounts};
use crate::qmp::session::{Called, Session};

/// Requests of one kind that were answered, and how long they took all together, seconds.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Answered {
    /// How many; a part of one in an aged mean.
    pub requests: f64,
    /// The sum of their times.
    pub seconds: f64,
}

/// What a guest had answered, by kind: in a stretch of time, or since it began.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Load {
    /// Of its reads.
    pub reads: Answered,
    /// Of its writes.
    pub writes: Answered,
    /// Of its flushes.
    pub flushes: Answered,
}

impl Answered {
    fn new(requests: u64, nanoseconds: u64) -> Answered {
        let seconds = Duration::from_nanos(nanoseconds).as_secs_f64();
        Answered { requests: requests as f64, seconds }
    }
}

impl Load {
    /// Since the guest began, of all its disks.
    ///
    /// # Errors
    /// As any command.
    pub async fn of(session: &Session) -> Called<Load> {
        let devices = session.call(cmd::QueryBlockstats(json!({})), "").await?;
        let counts = devices.iter().map(|device| &device.stats);
        Ok(counts.fold(Load::default(), |sum, counts| sum.with(&Load::from(counts))))
    }

    /// Requests of every kind.
    #[must_use]
    pub fn requests(&self) -> f64 {
        self.kinds().iter().map(|kind| kind.requests).sum()
    }

    /// How long requests of every kind took all together.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.kinds().iter().map(|kind| kind.seconds).sum()
    }

    /// Both together.
    #[must_use]
    pub fn with(&self, more: &Load) -> Load {
        self.join(more, |a, b| a + b)
    }

    /// What came since: nothing where a disk was taken out meanwhile, and its counts with it.
    #[must_use]
    pub fn since(&self, before: &Load) -> Load {
        self.join(before, |now, then| (now - then).max(0.0))
    }

    /// A part of it, as what is older counts less in a mean.
    #[must_use]
    pub fn aged(&self, part: f64) -> Load {
        self.join(&Load::default(), |value, _| value * part)
    }

    /// How many times as long the same requests took as they would have by another load's means; nothing
    /// where none of their kinds is in both.
    #[must_use]
    pub fn over(&self, usual: &Load) -> Option<f64> {
        let pairs = self.kinds().into_iter().zip(usual.kinds());
        let both = pairs.filter(|(here, there)| here.requests > 0.0 && there.requests > 0.0);
        let (took, would) = both.fold((0.0, 0.0), |(took, would), (here, there)| {
            (took + here.seconds, would + here.requests * there.seconds / there.requests)
        });
        (would > 0.0).then_some(took / would)
    }

    fn kinds(&self) -> [Answered; 3] {
        [self.reads, self.writes, self.flushes]
    }

    fn join(&self, other: &Load, of: impl Fn(f64, f64) -> f64) -> Load {
        let both = |a: Answered, b: Answered| Answered {
            requests: of(a.requests, b.requests),
            seconds: of(a.seconds, b.seconds),
        };
        Load {
            reads: both(self.reads, other.reads),
            writes: both(self.writes, other.writes),
            flushes: both(self.flushes, other.flushes),
        }
    }
}

impl From<&DeviceCounts> for Load {
    fn from(counts: &DeviceCounts) -> Load {
        Load {
            reads: Answered::new(counts.rd_operations, counts.rd_total_time_ns),
            writes: Answered::new(counts.wr_operations, counts.wr_total_time_ns),
            flushes: Answered::new(counts.flush_operations, counts.flush_total_time_ns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(reads: (f64, f64), writes: (f64, f64)) -> Load {
        let answered = |(requests, seconds)| Answered { requests, seconds };
        Load { reads: answered(reads), writes: answered(writes), ..Load::default() }
    }

    #[test]
    fn another_mix_of_requests_is_no_slowdown() {
        let usual = load((100.0, 0.01), (10.0, 0.1));
        assert_eq!(load((1.0, 0.0001), (90.0, 0.9)).over(&usual), Some(1.0));
        assert_eq!(load((0.0, 0.0), (90.0, 1.8)).over(&usual), Some(2.0));
    }

    #[test]
    fn kinds_that_are_not_known_do_not_count() {
        let usual = load((100.0, 0.01), (0.0, 0.0));
        assert_eq!(load((100.0, 0.015), (50.0, 9.0)).over(&usual), Some(1.5));
        assert_eq!(load((0.0, 0.0), (50.0, 9.0)).over(&usual), None);
        assert_eq!(usual.over(&Load::default()), None);
    }

    #[test]
    fn counts_that_went_back_are_nothing() {
        let before = load((100.0, 1.0), (100.0, 1.0));
        let since = load((150.0, 1.5), (0.0, 0.0)).since(&before);
        assert_eq!(since, load((50.0, 0.5), (0.0, 0.0)));
    }
}
