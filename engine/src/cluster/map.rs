//! Who owns which fingerprints: weighted rendezvous hashing of slices of the fingerprint space
//! over the hosts of a cluster.
//!
//! Every host has a score for every slice, and the highest one owns it, so a host that joins or
//! leaves moves only its own share (Thaler and Ravishankar, "Using name-based mappings to increase
//! hit rates", 1998; weights: `-weight / ln(hash)`, Mosko's form). All hosts must come to the same
//! map, so scores are compared in whole numbers, never in floating point.

use std::cmp::Ordering;

use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::ids::{Fingerprint, HostId};

/// Leading bits of a fingerprint that name its slice: 4096 of them share 100 hosts out within some
/// percent of one another.
const SLICE_BITS: u32 = 12;
/// Slices of the fingerprint space.
const SLICES: usize = 1 << SLICE_BITS;
/// Hosts of a cluster: their numbers fit into a session's, and 255 is nobody's.
pub const MAX_HOSTS: usize = 255;
/// Binary places of a logarithm.
const PLACES: u32 = 32;

/// A host of the cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// Its name, which its certificate proves.
    pub name: String,
    /// Where its engine listens for the others: host and port.
    pub address: String,
    /// Its share beside the others': twice the capacity, twice the slices.
    pub capacity: u32,
}

/// Which host owns each slice. The same members give the same map everywhere.
#[derive(Clone, Debug)]
pub struct PartitionMap {
    epoch: u64,
    members: Vec<Member>,
    owners: Vec<HostId>,
}

impl PartitionMap {
    /// The map of these members, whatever order they come in.
    ///
    /// # Errors
    /// [`Kind::Usage`] without members, with too many, with one twice, or with one without capacity.
    pub fn new(mut members: Vec<Member>) -> Result<Self> {
        members.sort_by(|a, b| a.name.cmp(&b.name));
        let wrong = |what: String| Err(Error::new(Kind::Usage, what));
        if members.is_empty() || members.len() > MAX_HOSTS {
            let count = members.len();
            return wrong(format!("a cluster has 1 to {MAX_HOSTS} hosts, not {count}"));
        }
        if let Some(pair) = members.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return wrong(format!("the host {} is in the cluster twice", pair[0].name));
        }
        if let Some(member) = members.iter().find(|m| m.capacity == 0 || m.name.is_empty()) {
            return wrong(format!("the host '{}' has no name or no capacity", member.name));
        }
        let owners = (0..SLICES).map(|slice| owner_of(slice as u32, &members)).collect();
        Ok(PartitionMap { epoch: epoch(&members), members, owners })
    }

    /// Distinguishes this map from every other one.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The hosts, in the order of their numbers.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The number of the host of that name.
    #[must_use]
    pub fn host(&self, name: &str) -> Option<HostId> {
        let at = self.members.binary_search_by(|member| member.name.as_str().cmp(name));
        at.ok().map(|at| HostId(at as u16))
    }

    /// Who answers for a fingerprint.
    #[must_use]
    pub fn owner(&self, fingerprint: &Fingerprint) -> HostId {
        let [first, second, ..] = fingerprint.0;
        let slice = (usize::from(first) << 8 | usize::from(second)) >> (16 - SLICE_BITS);
        self.owners[slice]
    }

    /// Slices that a host owns, of how many.
    #[must_use]
    pub fn share(&self, host: HostId) -> (usize, usize) {
        (self.owners.iter().filter(|owner| **owner == host).count(), SLICES)
    }
}

/// The same for the same members with the same capacities. Addresses may change.
fn epoch(members: &[Member]) -> u64 {
    let mut hash = Sha256::new();
    for member in members {
        hash.update((member.name.len() as u64).to_le_bytes());
        hash.update(&member.name);
        hash.update(member.capacity.to_le_bytes());
    }
    first_eight(&hash.finalize())
}

fn owner_of(slice: u32, members: &[Member]) -> HostId {
    let score = |member: &Member| {
        let mut hash = Sha256::new();
        hash.update(slice.to_le_bytes());
        hash.update(&member.name);
        (member.capacity, minus_log2(first_eight(&hash.finalize())))
    };
    let mut best = (HostId(0), (0, 1));
    for (number, member) in members.iter().enumerate() {
        let this = score(member);
        if compare(this, best.1) == Ordering::Greater {
            best = (HostId(number as u16), this);
        }
    }
    best.0
}

/// Compares weight over logarithm; what comes first wins a draw.
fn compare((weight_a, log_a): (u32, u64), (weight_b, log_b): (u32, u64)) -> Ordering {
    let (a, b) =
        (u128::from(weight_a) * u128::from(log_b), u128::from(weight_b) * u128::from(log_a));
    a.cmp(&b)
}

fn first_eight(hash: &[u8]) -> u64 {
    hash.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// `-log2(x / 2^64)` with [`PLACES`] binary places, at least 1: by squaring, a place at a time.
fn minus_log2(x: u64) -> u64 {
    let x = x.max(1);
    let whole = u64::from(x.leading_zeros()) + 1;
    // 1 <= mantissa < 2, with 63 binary places.
    let mut mantissa = u128::from(x << x.leading_zeros());
    let mut fraction = 0_u64;
    for _ in 0..PLACES {
        mantissa = (mantissa * mantissa) >> 63;
        fraction <<= 1;
        if mantissa >> 64 != 0 {
            fraction |= 1;
            mantissa >>= 1;
        }
    }
    ((whole << PLACES) - fraction).max(1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn members(count: usize) -> Vec<Member> {
        let member = |n| Member {
            name: format!("hv{n:03}"),
            address: format!("10.0.0.{n}:7420"),
            capacity: 1,
        };
        (0..count).map(member).collect()
    }

    fn print(first: u8, second: u8) -> Fingerprint {
        let mut bytes = [7; Fingerprint::LEN];
        (bytes[0], bytes[1]) = (first, second);
        Fingerprint(bytes)
    }

    #[test]
    fn logarithms_are_those_of_the_textbook() {
        for x in [1, 2, 3, 1000, 1 << 40, u64::MAX / 3, u64::MAX / 2 + 1, u64::MAX - (1 << 20)] {
            let exact = 64.0 - (x as f64).log2();
            let ours = minus_log2(x) as f64 / (1_u64 << PLACES) as f64;
            assert!((exact - ours).abs() < 1e-7, "{x}: {exact} {ours}");
        }
    }

    #[test]
    fn every_host_comes_to_the_same_map() {
        let mut turned = members(5);
        turned.reverse();
        let (a, b) = (PartitionMap::new(members(5)).unwrap(), PartitionMap::new(turned).unwrap());
        assert_eq!((a.epoch, &a.owners), (b.epoch, &b.owners));
        assert_eq!(a.host("hv003"), Some(HostId(3)));
        assert_eq!(a.host("hv"), None);
        let mut moved = members(5);
        moved[2].address = "192.0.2.1:1".into();
        assert_eq!(PartitionMap::new(moved).unwrap().epoch, a.epoch);
        let mut larger = members(5);
        larger[2].capacity = 2;
        assert_ne!(PartitionMap::new(larger).unwrap().epoch, a.epoch);
    }

    #[test]
    fn shares_follow_capacities() {
        let mut hosts = members(10);
        hosts[4].capacity = 3;
        let map = PartitionMap::new(hosts).unwrap();
        let shares: Vec<usize> = (0..10).map(|n| map.share(HostId(n)).0).collect();
        assert_eq!(shares.iter().sum::<usize>(), SLICES);
        for (host, share) in shares.iter().enumerate() {
            let fair = SLICES * if host == 4 { 3 } else { 1 } / 12;
            assert!(share.abs_diff(fair) < fair / 3, "{shares:?}");
        }
    }

    #[test]
    fn a_join_or_a_leave_moves_only_its_own_share() {
        let (before, after) =
            (PartitionMap::new(members(9)).unwrap(), PartitionMap::new(members(10)).unwrap());
        for (first, second) in (0..=255).flat_map(|a| (0..=255).step_by(16).map(move |b| (a, b))) {
            let (old, new) =
                (before.owner(&print(first, second)), after.owner(&print(first, second)));
            assert!(old == new || new == HostId(9), "{first} {second}: {old:?} {new:?}");
        }
    }

    #[test]
    fn what_is_no_cluster_is_refused() {
        let twice = [members(2), members(1)].concat();
        let mut idle = members(2);
        idle[1].capacity = 0;
        for wrong in [Vec::new(), twice, idle, members(MAX_HOSTS + 1)] {
            assert_eq!(PartitionMap::new(wrong).unwrap_err().kind(), Kind::Usage);
        }
    }
}
