//! `--read-limit`: no more bytes per second than the operator allows.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// What may be read at once after a pause, as time at the full rate.
const BURST: Duration = Duration::from_millis(100);

/// Spreads reads over time; shared by all that read for one backup.
#[derive(Debug)]
pub struct ReadLimit {
    bytes_per_second: Option<u64>,
    /// When everything admitted so far has been read at the full rate.
    busy_until: Cell<Instant>,
}

impl ReadLimit {
    /// A limit, or none.
    #[must_use]
    pub fn new(bytes_per_second: Option<u64>) -> ReadLimit {
        ReadLimit { bytes_per_second, busy_until: Cell::new(Instant::now()) }
    }

    /// Whether there is one: then no byte is to be read that nobody wants.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.bytes_per_second.is_some()
    }

    /// Waits until that many bytes may be read.
    pub async fn admit(&self, bytes: u64) {
        let wait = self.delay(Instant::now(), bytes);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    fn delay(&self, now: Instant, bytes: u64) -> Duration {
        let Some(rate) = self.bytes_per_second else {
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
        assert_eq!(limit.delay(now, 100), Duration::ZERO);
        assert_eq!(limit.delay(now, 500), Duration::ZERO);
        assert_eq!(limit.delay(now, 1), Duration::from_millis(500));
    }

    #[test]
    fn no_limit_never_waits() {
        let limit = ReadLimit::new(None);
        assert_eq!(limit.delay(Instant::now(), u64::MAX), Duration::ZERO);
    }
}
