//! Sizes at which sorting spills, sweeps slide their windows and seeks are chosen.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{STORE, address, export, fingerprint, position, tempdir};
use crate::detect::{DetectOptions, Detector, Partition, Verdict, Watermark};
use crate::ids::{Sequence, SessionId};

fn answers(detector: &mut Detector) -> BTreeMap<(SessionId, Sequence), Verdict> {
    let mut all = BTreeMap::new();
    for partition in detector.partitions().collect::<Vec<_>>() {
        let mut take = |session, seq, verdict| {
            assert_eq!(all.insert((session, seq), verdict), None, "answered once");
            Ok(())
        };
        detector.pass(partition, &|_| true, &mut take).unwrap();
    }
    all
}

#[test]
fn a_million_entries_and_a_hundred_thousand_requests() {
    const ENTRIES: u64 = 1_000_000;
    let dir = tempdir();
    // Two partitions: a base of 21 MB each, five windows.
    let options = DetectOptions { partition_bits: 1, ..DetectOptions::new(STORE) };
    let (mut detector, _) = Detector::open(dir.path(), options).unwrap();
    let mut rebuild = detector.rebuild().unwrap();
    for n in 0..ENTRIES {
        // Twice, backwards: the last one counts.
        let n = ENTRIES - 1 - n;
        rebuild
            .feed(&[(fingerprint(n), address(1, 1)), (fingerprint(n), address(n, n % 1000))])
            .unwrap();
    }
    let mut watermark = Watermark::default();
    watermark.raise(position(1).incarnation, 5);
    let rebuilt = rebuild.build(watermark.clone()).unwrap();
    assert_eq!(rebuilt.entries(), ENTRIES);
    detector.install(rebuilt).unwrap();
    assert_eq!(detector.entries(), ENTRIES);
    assert_eq!(detector.watermark(), watermark);
    assert!(detector.index_bytes() < ENTRIES * 44, "{}", detector.index_bytes());

    // A sweep (many requests), then seeks (few), half of them known; each asked by two sessions.
    for (requests, step) in [(100_000, 20), (200, 9_973)] {
        let writer = SessionId(step as u32);
        for session in [writer, SessionId(0)] {
            let asked: Vec<_> = (0..requests)
                .map(|i| (fingerprint(ENTRIES - requests * step / 2 + i * step), Sequence(i)))
                .collect();
            detector.submit(session, &asked).unwrap();
        }
        let answers = answers(&mut detector);
        assert_eq!(answers.len() as u64, 2 * requests);
        for ((session, seq), verdict) in answers {
            let n = ENTRIES - requests * step / 2 + seq.0 * step;
            let expected = match (n < ENTRIES, session) {
                (true, _) => Verdict::Stored(address(n, n % 1000)),
                (false, asking) if asking == writer => Verdict::Grant,
                (false, _) => Verdict::SameAs(writer, seq),
            };
            assert_eq!(verdict, expected, "{session:?} {seq:?}");
        }
        detector.withdraw(writer);
    }
}

#[test]
fn a_log_larger_than_the_memory_to_sort_it() {
    let dir = tempdir();
    let options =
        DetectOptions { partition_bits: 0, pass_memory: 256 << 10, ..DetectOptions::new(STORE) };
    let (mut detector, _) = Detector::open(dir.path(), options).unwrap();
    // 8 MB of requests in 4915 at a time; every fingerprint comes four times.
    for session in 0..4 {
        let asked: Vec<_> = (0..50_000).map(|i| (fingerprint(i), Sequence(i))).collect();
        detector.submit(SessionId(3 - session), &asked).unwrap();
    }
    for ((session, seq), verdict) in answers(&mut detector) {
        let first = SessionId(3);
        let same = Verdict::SameAs(first, seq);
        assert_eq!(verdict, if session == first { Verdict::Grant } else { same });
    }
    // The writer dies: its grants go to those who ask again, in their order.
    detector.withdraw(SessionId(3));
    for session in [2, 0] {
        let asked: Vec<_> = (0..50_000).map(|i| (fingerprint(i), Sequence(i))).collect();
        detector.submit(SessionId(session), &asked).unwrap();
    }
    for ((session, seq), verdict) in answers(&mut detector) {
        let same = Verdict::SameAs(SessionId(2), seq);
        assert_eq!(verdict, if session == SessionId(2) { Verdict::Grant } else { same });
    }
}

#[test]
fn everything_learned_is_found_through_all_levels() {
    const CONTAINERS: u64 = 120;
    const SLOTS: u64 = 1_000;
    let dir = tempdir();
    let options = DetectOptions { memtable_entries: 5_000, ..DetectOptions::new(STORE) };
    let (mut detector, _) = Detector::open(dir.path(), options).unwrap();
    for container in 1..=CONTAINERS {
        let mut entries: Vec<_> = (0..SLOTS)
            .map(|slot| (fingerprint(container * SLOTS + slot), address(container, slot)))
            .collect();
        detector.learn(&mut entries, position(container)).unwrap();
        if container % 7 == 0 {
            detector.maintain().unwrap();
        }
    }
    while detector.maintain().unwrap() {}
    assert_eq!((detector.entries(), detector.duplicates()), (CONTAINERS * SLOTS, 0));
    let all = export(&mut detector).unwrap();
    assert_eq!(all.len() as u64, CONTAINERS * SLOTS);
    assert!(all.is_sorted_by(|a, b| a.0 < b.0));
}

#[test]
fn a_pass_is_due_when_a_log_is_big_old_or_waited_for() {
    let dir = tempdir();
    let options = DetectOptions {
        pass_requests: 10,
        pass_age: Duration::from_secs(20),
        ..super::tiny_options()
    };
    let (mut detector, _) = Detector::open(dir.path(), options).unwrap();
    let now = Instant::now();
    assert_eq!(detector.due(now, true), None);
    let of = |partition: u16| {
        let mine = move |n: &u64| fingerprint(*n).0[0] >> 6 == partition as u8;
        (0..).filter(mine).map(|n| (fingerprint(n), Sequence(n)))
    };
    detector.submit(SessionId(1), &of(1).take(3).collect::<Vec<_>>()).unwrap();
    detector.submit(SessionId(1), &of(2).take(2).collect::<Vec<_>>()).unwrap();
    assert_eq!(detector.due(now, false), None);
    assert_eq!(detector.due(now, true), Some(Partition(1)), "the largest first");
    let later = now + Duration::from_secs(20);
    assert_eq!(detector.due(later, false), Some(Partition(1)));
    detector.pass(Partition(1), &|_| true, &mut |_, _, _| Ok(())).unwrap();
    assert_eq!(detector.due(later, false), Some(Partition(2)));
    detector.submit(SessionId(1), &of(3).take(10).collect::<Vec<_>>()).unwrap();
    assert_eq!(detector.due(now, false), Some(Partition(3)), "big enough");
    assert_eq!(detector.waiting(Partition(3)), 10);
}
