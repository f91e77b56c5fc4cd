//! The pace of a backup: how fast it reads beside a guest that is busy itself.
//!
//! QEMU answers our reads in the thread that answers the guest, which waits behind them, and what we do with them
//! takes processors and disk from it. How it fares beside us can be told from what QEMU counts of its requests, and
//! so can how it fares without us: for that the reads rest now and then. The rate follows the
//! difference, as that of LEDBAT (RFC 6817), a transfer in the background of others; the rests are the slowdowns of
//! LEDBAT++ (draft-irtf-iccrg-ledbat-plus-plus). There, what others may wait for us is a fixed time; here, where one
//! guest waits 50 µs and another 5 ms, it is a part of what they wait anyway.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::qmp::load::Load;

/// How long a guest may wait beside us, over what it waits without us, on the mean: of its slowest requests it
/// is more (`ci/bench guest`).
const TOLERATED: f64 = 1.1;

/// Requests under way, on the mean, from which a guest counts as busy. Not how many a second: of a guest
/// that waits for us they are few.
const BUSY: f64 = 0.1;

/// How often an idle guest is looked at: as long as one that begins to work waits behind reads at full speed.
const LOOK: Duration = Duration::from_millis(100);

/// Requests in such a look up to which it does not: it may write and flush its journal now and then.
const FEW: f64 = 4.0;

/// Requests under way, on the mean, from which it does although they are few: they wait for us.
const STUCK: f64 = 0.5;

/// How long the guest still feels reads that have ended: what was read is hashed, packed and written yet.
const SETTLE: Duration = Duration::from_millis(50);

/// A rest behind that: long enough for the mean of some requests. Both are a tenth of the time, as in LEDBAT++.
const REST: Duration = Duration::from_millis(100);

/// Reads between two rests.
const READ: Duration = Duration::from_millis(1350);

/// What is left of a rest in the mean after the next one: it is that of the last few.
const KEPT: f64 = 0.6;

/// Bytes per second at first, beside a guest that is busy: it is easier to go up than to be forgiven.
const FIRST: u64 = 32 << 20;

/// Bytes per second at least: the guest hardly feels them, but the copy-before-write as long as a backup lasts.
const LEAST: u64 = 16 << 20;

/// The rate changes by no more than this in one step, down and up: how a guest fares in one stretch can be chance
/// (as much up as down, so that chance alone leads nowhere), and a new point in time costs it most at first, as
/// every block that it overwrites is copied once.
const CHANGE: RangeInclusive<f64> = 0.9..=1.1;

/// How to read in the stretch of time that follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reads {
    /// As fast as they can.
    Freely,
    /// So many bytes per second.
    At(u64),
    /// Not at all: what was read is still worked on.
    Settle,
    /// Not at all: the guest is alone.
    Rest,
}

/// What the guest had answered in how many seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Spell {
    load: Load,
    seconds: f64,
}

impl Spell {
    /// Requests per second.
    fn rate(&self) -> f64 {
        self.load.requests() / self.seconds
    }

    /// How many times as long the guest waits as in another spell: by what its requests take once QEMU has them,
    /// or by how many of them it gets through, as what it waits before and after that nobody counts. Nothing
    /// where there is too little to compare.
    fn slower_than(&self, other: &Spell) -> Option<f64> {
        let latency = self.load.over(&other.load)?;
        Some(latency.max(other.rate() / self.rate()))
    }
}

/// What a pace is made of: rests and stretches of reading by turns while the guest is busy.
#[derive(Debug)]
pub struct Pace {
    now: Reads,
    /// Bytes per second, of the last stretch or the next.
    rate: u64,
    /// How the guest fares without us.
    alone: Spell,
}

impl Default for Pace {
    /// Of a guest that is not known yet.
    fn default() -> Pace {
        Pace { now: Reads::Freely, rate: FIRST, alone: Spell::default() }
    }
}

impl Pace {
    /// What comes next, and for how long, after a stretch of `time` in which the guest had `load` answered
    /// and we read so many bytes.
    pub fn next(&mut self, load: &Load, read: u64, time: Duration) -> (Reads, Duration) {
        let spell = Spell { load: *load, seconds: time.as_secs_f64() };
        let under_way = load.seconds() / spell.seconds;
        let busy = under_way >= if load.requests() > FEW { BUSY } else { STUCK };
        self.now = match self.now {
            Reads::Rest => {
                let Spell { load, seconds } = self.alone;
                self.alone = Spell {
                    load: load.aged(KEPT).with(&spell.load),
                    seconds: seconds * KEPT + spell.seconds,
                };
                Reads::At(self.rate)
            }
            Reads::Settle => Reads::Rest,
            _ if !busy => Reads::Freely,
            Reads::Freely => {
                self.rate = FIRST;
                self.alone = Spell::default();
                Reads::Settle
            }
            Reads::At(_) => {
                self.follow(&spell, read);
                Reads::Settle
            }
        };
        let time = match self.now {
            Reads::Freely => LOOK,
            Reads::Settle => SETTLE,
            Reads::Rest => REST,
            Reads::At(_) => READ,
        };
        (self.now, time)
    }

    /// Changes the rate after a stretch: what the guest waits for us grows with what we read, so the rate
    /// at which it is what we tolerate can be told from it.
    fn follow(&mut self, spell: &Spell, read: u64) {
        let Some(slower) = spell.slower_than(&self.alone) else { return };
        let (down, up) = (*CHANGE.start(), *CHANGE.end());
        let tolerated = TOLERATED - 1.0;
        let change = (tolerated / (slower - 1.0).max(tolerated / up)).max(down);
        let read = (read as f64 / spell.seconds) as u64;
        if change >= 1.0 {
            self.rate = (self.rate as f64 * change) as u64;
        } else if read >= LEAST / 2 {
            // What was read less than we allowed (the store may be slower) made the guest wait as long; of reads
            // that hardly took place nothing is learned.
            self.rate = ((self.rate.min(read) as f64 * change) as u64).max(LEAST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::load::Answered;

    const MIB: u64 = 1 << 20;

    /// A guest that waits longer, the more is read.
    struct Guest {
        /// Requests per second.
        busy: f64,
        /// Its next request waits for the last one, and the waiting is where QEMU does not count it.
        patient: bool,
        /// Bytes per second at which a request takes twice as long, and that are read if nobody says no.
        double: f64,
        free: u64,
        seed: u64,
    }

    impl Default for Guest {
        fn default() -> Guest {
            let double = 500.0 * MIB as f64;
            Guest { busy: 3000.0, patient: false, double, free: 900 * MIB, seed: 1 }
        }
    }

    impl Guest {
        /// Some 5 % around a value.
        fn about(&mut self, value: f64) -> f64 {
            self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            value * (0.95 + (self.seed >> 33) as f64 / (1u64 << 31) as f64 * 0.1)
        }

        /// What it was answered while so much was read, and how much that was.
        fn answered(&mut self, reads: Reads, time: Duration) -> (Load, u64) {
            let rate = match reads {
                Reads::Freely => self.free,
                Reads::At(rate) => rate.min(self.free),
                Reads::Settle | Reads::Rest => 0,
            };
            let slower = 1.0 + rate as f64 / self.double;
            let of = |requests: f64, each: f64| Answered { requests, seconds: requests * each };
            let (fewer, longer) = if self.patient { (slower, 1.0) } else { (1.0, slower) };
            let busy = self.about(self.busy / fewer);
            let (reads, writes) = (busy * 0.3, busy * 0.7);
            let each = self.about(0.0002 * longer);
            let load = Load {
                reads: of(reads * time.as_secs_f64(), each),
                writes: of(writes * time.as_secs_f64(), 4.0 * each),
                flushes: Answered::default(),
            };
            (load, (rate as f64 * time.as_secs_f64()) as u64)
        }

        /// The paces of so many stretches.
        fn stretches(&mut self, pace: &mut Pace, count: usize) -> Vec<Reads> {
            let mut paces = Vec::with_capacity(count);
            let (mut reads, mut time) = (pace.now, LOOK);
            for _ in 0..count {
                let (load, read) = self.answered(reads, time);
                (reads, time) = pace.next(&load, read, time);
                paces.push(reads);
            }
            paces
        }
    }

    fn rates(paces: &[Reads]) -> Vec<u64> {
        let rate = |pace: &Reads| match pace {
            Reads::At(rate) => Some(*rate / MIB),
            _ => None,
        };
        paces.iter().filter_map(rate).collect()
    }

    #[test]
    fn an_idle_guest_does_not_slow_a_backup_down() {
        let mut guest = Guest { busy: 10.0, ..Guest::default() };
        let paces = guest.stretches(&mut Pace::default(), 100);
        assert!(paces.iter().all(|reads| *reads == Reads::Freely), "{paces:?}");
    }

    #[test]
    fn a_busy_guest_waits_no_longer_than_is_tolerated() {
        for seed in 1..20 {
            // As much as is tolerated at 50 MiB/s.
            let mut guest = Guest { patient: seed % 2 == 0, seed, ..Guest::default() };
            let paces = guest.stretches(&mut Pace::default(), 300);
            assert_eq!(paces[..3], [Reads::Settle, Reads::Rest, Reads::At(FIRST)]);
            assert_eq!(paces.iter().filter(|reads| **reads == Reads::Rest).count(), 100);
            let rates = rates(&paces);
            assert!(rates.iter().all(|rate| (16..200).contains(rate)), "seed {seed}: {rates:?}");
            let settled = &rates[20..];
            let mean = settled.iter().sum::<u64>() / settled.len() as u64;
            assert!((25..60).contains(&mean), "seed {seed}: {mean} of {rates:?}");
        }
    }

    #[test]
    fn a_guest_that_does_not_mind_is_not_spared() {
        let mut guest = Guest { double: 1e12, ..Guest::default() };
        let rates = rates(&guest.stretches(&mut Pace::default(), 150));
        assert!(rates.last().is_some_and(|rate| *rate > 900), "{rates:?}");
        // And spared at once when it begins to: what is allowed is more than what was read.
        let mut pace = Pace::default();
        guest.stretches(&mut pace, 150);
        guest.double = Guest::default().double;
        let slower = self::rates(&guest.stretches(&mut pace, 12));
        assert!(slower.last().is_some_and(|rate| *rate < 600), "{slower:?}");
    }

    #[test]
    fn a_guest_that_goes_to_sleep_frees_the_backup() {
        let mut guest = Guest::default();
        let mut pace = Pace::default();
        guest.stretches(&mut pace, 75);
        guest.busy = 0.0;
        let paces = guest.stretches(&mut pace, 4);
        assert_eq!(paces.last(), Some(&Reads::Freely), "{paces:?}");
        guest.busy = 3000.0;
        let again = guest.stretches(&mut pace, 3);
        assert_eq!(again, [Reads::Settle, Reads::Rest, Reads::At(FIRST)]);
    }

    #[test]
    fn whatever_the_guest_waits_the_backup_goes_on() {
        let mut guest = Guest { double: 1e3, ..Guest::default() };
        let rates = rates(&guest.stretches(&mut Pace::default(), 150));
        assert_eq!(rates.into_iter().min(), Some(LEAST / MIB));
    }

    #[test]
    fn few_requests_that_wait_for_us_are_work_and_a_flush_is_none() {
        let of = |requests: f64, seconds: f64| {
            let load = Load { flushes: Answered { requests, seconds }, ..Load::default() };
            Pace::default().next(&load, 0, LOOK).0
        };
        assert_eq!(of(4.0, 0.02), Reads::Freely);
        assert_eq!(of(5.0, 0.02), Reads::Settle);
        assert_eq!(of(2.0, 0.06), Reads::Settle);
        assert_eq!(of(5.0, 0.005), Reads::Freely);
    }

    #[test]
    fn reads_that_did_not_take_place_say_nothing() {
        let mut pace = Pace::default();
        let mut guest = Guest { free: 0, ..Guest::default() };
        let rates = rates(&guest.stretches(&mut pace, 20));
        assert!(rates.iter().all(|rate| *rate >= FIRST / MIB), "{rates:?}");
    }
}
