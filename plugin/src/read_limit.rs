//! How fast the disks are read: no more bytes per second than the operator allows (`--read-limit`), and than the
//! pace beside a busy guest.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::pace::Reads;
use crate::source::READ_SIZE;

/// What may be read at once after a pause, as time at the full rate.
const BURST: Duration = Duration::from_millis(20);

/// Bytes of a read beside a busy guest: one of its requests that comes just then waits for one of ours, so
/// the 99th percentile is a matter of how long these are, the mean of how many.
const PACED_READ: u32 = 64 << 10;

/// Spreads reads over time; shared by all that read for one backup.
#[derive(Debug)]
pub struct ReadLimit {
    /// The operator's, bytes per second.
    most: Option<u64>,
    /// What a guest bears, bytes per second; also between a rest and the next word of it.
    rate: Cell<Option<u64>>,
    /// The slowest pace so far that was less than the operator's limit, bytes per second.
    slowest: Cell<Option<u64>>,
    /// When everything admitted so far has been read at the full rate.
    busy_until: Cell<Instant>,
    /// The end of a rest.
    resting_until: Cell<Instant>,
    /// Bytes.
    admitted: Cell<u64>,
}

impl ReadLimit {
    /// A limit in bytes per second, or none.
    #[must_use]
    pub fn new(most: Option<u64>) -> ReadLimit {
        let now = Instant::now();
        ReadLimit {
            most,
            rate: Cell::new(None),
            slowest: Cell::new(None),
            busy_until: Cell::new(now),
            resting_until: Cell::new(now),
            admitted: Cell::new(0),
        }
    }

    /// Whether the operator has set one: then no byte is to be read that nobody wants.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.most.is_some()
    }

    /// Most bytes that are to be read at once.
    #[must_use]
    pub fn read_size(&self) -> u32 {
        match self.rate.get() {
            None => READ_SIZE,
            Some(_) => PACED_READ,
        }
    }

    /// Changes the pace, for so long if it is a rest.
    pub fn pace(&self, now: Instant, reads: Reads, time: Duration) {
        match reads {
            Reads::Freely => self.rate.set(None),
            Reads::At(rate) => {
                self.rate.set(Some(rate));
                if self.most.is_none_or(|most| rate < most) {
                    let slowest = self.slowest.get().map_or(rate, |slowest| slowest.min(rate));
                    self.slowest.set(Some(slowest));
                }
            }
            Reads::Settle | Reads::Rest => {
                self.resting_until.set(now + time);
                // A rest earns no burst.
                self.busy_until.set(self.busy_until.get().max(now + time));
            }
        }
    }

    /// The slowest pace that was kept, bytes per second.
    #[must_use]
    pub fn slowest_pace(&self) -> Option<u64> {
        self.slowest.get()
    }

    /// Bytes that were read or are about to be.
    #[must_use]
    pub fn admitted(&self) -> u64 {
        self.admitted.get()
    }

    /// Waits until that many bytes may be read.
    pub async fn admit(&self, bytes: u64) {
        let wait = self.delay(Instant::now(), bytes);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        // A rest that has begun meanwhile counts for who waits, too.
        while self.resting_until.get() > Instant::now() {
            tokio::time::sleep_until(self.resting_until.get().into()).await;
        }
        self.admitted.set(self.admitted.get() + bytes);
    }

    fn delay(&self, now: Instant, bytes: u64) -> Duration {
        let Some(rate) = self.most.into_iter().chain(self.rate.get()).min() else {
            return Duration::ZERO;
        };
        let cost = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let begin = self.busy_until.get().max(earliest);
        self.busy_until.set(begin + cost);
        begin.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time() {
        let limit = ReadLimit::new(Some(1000));
        let begin = Instant::now();
        let mut now = begin;
        let mut read = 0;
        while now < begin + Duration::from_secs(10) {
            now += limit.delay(now, 50);
            read += 50;
        }
        assert!((9_950..=10_200).contains(&read), "{read}");
    }

    #[test]
    fn a_pause_earns_no_more_than_the_burst() {
        let limit = ReadLimit::new(Some(1000));
        let now = Instant::now() + Duration::from_secs(60);
        assert_eq!(limit.delay(now, 20), Duration::ZERO);
        assert_eq!(limit.delay(now, 500), Duration::ZERO);
        assert_eq!(limit.delay(now, 1), Duration::from_millis(500));
    }

    #[test]
    fn no_limit_never_waits() {
        let limit = ReadLimit::new(None);
        assert_eq!(limit.delay(Instant::now(), u64::MAX), Duration::ZERO);
        assert_eq!(limit.slowest_pace(), None);
    }

    #[test]
    fn the_lower_of_limit_and_pace_counts() {
        let second = Duration::from_secs(1);
        for (most, pace) in [(None, 1000), (Some(1000), 5000), (Some(5000), 1000)] {
            let limit = ReadLimit::new(most);
            let now = Instant::now() + Duration::from_secs(60);
            limit.pace(now, Reads::At(pace), second);
            assert_eq!(limit.delay(now, 1020), Duration::ZERO);
            assert_eq!(limit.delay(now, 1), second, "{most:?} {pace}");
            limit.pace(now, Reads::Freely, second);
            assert_eq!(limit.delay(now, 1).is_zero(), most.is_none());
            assert_eq!(limit.slowest_pace(), (most != Some(1000)).then_some(pace));
        }
    }

    #[tokio::test]
    async fn nothing_is_read_in_a_rest_and_it_earns_nothing() {
        let limit = ReadLimit::new(None);
        let begun = Instant::now();
        let rest = Duration::from_millis(50);
        limit.pace(begun, Reads::Rest, rest);
        limit.admit(1000).await;
        assert!(begun.elapsed() >= rest);
        assert_eq!(limit.admitted(), 1000);
        let over = begun + rest;
        limit.pace(over, Reads::At(1000), rest);
        assert_eq!(limit.delay(over, 20), Duration::ZERO);
        assert_eq!(limit.delay(over, 1), Duration::from_millis(20));
    }
}
