//! The index's files for the fuzzer, with their checksums made good.

use super::current::{Current, Identity, Level};
use super::header::Header;
use super::{DetectOptions, Partition};
use crate::detect::current::range_of;
use crate::ids::StoreId;

/// CURRENT (bit 0 of the first byte is not set) or the header of a run, as it comes and with its
/// checksum made good. LMDB's own pages are not tried: a run's checksum, which CURRENT has, is
/// checked before LMDB sees it.
pub fn index(data: &[u8]) {
    let Some((what, data)) = data.split_first() else { return };
    let mut good = data.to_vec();
    if let Some(body) = data.len().checked_sub(4) {
        good[body..].copy_from_slice(&crc32c::crc32c(&data[..body]).to_le_bytes());
    }
    for bytes in [data, &good] {
        if what & 1 == 0 { current(bytes) } else { header(bytes) }
    }
}

fn current(bytes: &[u8]) {
    let Ok(current) = Current::decode(bytes) else { return };
    assert_eq!(Current::decode(&current.encode()).as_ref(), Ok(&current), "it has two forms");
    let wanted = Identity::of(&DetectOptions::new(StoreId(uuid::Uuid::nil())));
    let _ = current.identity.differs(&wanted);
    for run in &current.runs {
        if let Level::Base(own) | Level::Delta(own) = run.level {
            assert!(run.touches(own));
            let (first, last) = range_of(own, current.identity.partition_bits);
            assert!(first <= last);
        }
        let _ = run.touches(Partition(0));
    }
}

fn header(bytes: &[u8]) {
    let Ok(header) = Header::decode(bytes) else { return };
    assert_eq!(Header::decode(&header.encode()).as_ref(), Ok(&header), "it has two forms");
}

/// A real CURRENT and a real header, as seeds.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use super::current::RunMeta;
    use crate::ids::Incarnation;

    let options = DetectOptions::new(StoreId(uuid::Uuid::from_u128(7)));
    let mut current = Current::new(Identity::of(&options), 3);
    current.watermark.raise(Incarnation(2), 40);
    let levels = [Level::Base(Partition(0)), Level::Delta(Partition(15)), Level::Young];
    for (number, level) in (1..).zip(levels) {
        current.runs.push(RunMeta { number, level, entries: 9, bytes: 8192, crc: 7 });
    }
    current.next_run = 9;
    current.duplicates.add(Partition(4), 12);
    let (identity, watermark) = (current.identity, current.watermark.clone());
    let header = Header { identity, number: 4, level: Level::Young, entries: 9, watermark };
    vec![
        ("current", [&[0][..], &current.encode()].concat()),
        ("header", [&[1][..], &header.encode()].concat()),
    ]
}
