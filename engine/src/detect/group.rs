//! Entries as they lie in a run: packed, in groups that are read, compared and copied as a whole.
//!
//! One LMDB record for each entry costs 42.6 bytes and a step of the cursor for each; one for each
//! group costs 30.6 bytes, and the cursor is hardly seen.

use super::memtable::Entry;
use super::records::take;
use crate::ids::{Address, Fingerprint};

/// Bytes of a packed entry: fingerprint, address. They sort as entries do.
const PACKED: usize = Fingerprint::LEN + Address::LEN;

/// Entries of a full group: two of them, each with its key and LMDB's headers, fill a page of 4 KiB.
pub(super) const GROUP: usize = 67;

/// An entry as it lies in a run.
pub(super) type Packed = [u8; PACKED];

pub(super) fn pack((fingerprint, address): &Entry) -> Packed {
    let mut packed = [0; PACKED];
    packed[..Fingerprint::LEN].copy_from_slice(&fingerprint.0);
    packed[Fingerprint::LEN..].copy_from_slice(&address.to_bytes());
    packed
}

pub(super) fn unpack(packed: &Packed) -> Entry {
    let address = Address::from_bytes(take(&packed[Fingerprint::LEN..]));
    (Fingerprint(take(packed)), address)
}

/// The leading bits as a number, as [`super::memtable::Lead`] has them.
#[inline]
pub(super) fn lead(packed: &Packed) -> u64 {
    u64::from_be_bytes(take(packed))
}

/// The fingerprint's bytes.
#[inline]
pub(super) fn key(packed: &Packed) -> &[u8] {
    &packed[..Fingerprint::LEN]
}

/// The entries of a record; none if it is not a group.
pub(super) fn group(record: &[u8]) -> Option<&[Packed]> {
    let (group, rest) = record.as_chunks::<PACKED>();
    (rest.is_empty() && !group.is_empty() && group.len() <= GROUP).then_some(group)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tests::{address, fingerprint};
    use super::*;

    #[test]
    fn a_group_is_what_was_packed() {
        let entries: Vec<Entry> = (0..67).map(|n| (fingerprint(n), address(n, n * 900))).collect();
        let packed: Vec<Packed> = entries.iter().map(pack).collect();
        let group = group(packed.as_flattened()).unwrap();
        assert_eq!(group.iter().map(unpack).collect::<Vec<_>>(), entries);
        for (packed, (fingerprint, _)) in packed.iter().zip(&entries) {
            assert_eq!(key(packed), fingerprint.0);
            assert_eq!(lead(packed).to_be_bytes(), fingerprint.0[..8]);
        }
    }

    #[test]
    fn what_is_not_whole_entries_is_no_group() {
        for length in [0, 1, 29, 31, 59, 68 * 30] {
            assert_eq!(group(&vec![0; length]), None, "{length} bytes");
        }
    }
}
