//! Who owns which fingerprints: weighted rendezvous hashing of slices of the fingerprint space
//! over the hosts of a cluster.
//!
//! Every host has a score for every slice, and the highest one owns it, so a host that joins or
//! leaves moves only its own share (Thaler and Ravishankar, "Using name-based mappings to increase
//! hit rates", 1998; weights: `-weight / ln(hash)`, Mosko's form). All hosts must come to the same
//! map, so scores are compared in whole numbers, never in floating point.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::ids::{Fingerprint, HostId, Slice, Slices};

/// Hosts of a cluster: their numbers fit into a session's, and 255 is nobody's.
pub const MAX_HOSTS: usize = 255;
/// Binary places of a logarithm.
const PLACES: u32 = 32;

/// A host of the cluster.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Member {
    /// Its number, which no other host has as long as anybody may know it.
    pub number: HostId,
    /// Its name, which its certificate proves.
    pub name: String,
    /// Where its engine listens for the others: host and port.
    pub address: String,
    /// Its share beside the others': twice the capacity, twice the slices; 0 owns nothing.
    pub capacity: u32,
}

/// Which map: it grows with every change. A fixed list's is 0 for ever.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct MapEpoch(pub u64);

/// Which host owns each slice. The same members give the same map everywhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PartitionMap {
    epoch: MapEpoch,
    digest: u64,
    /// By number.
    members: Vec<Member>,
    /// By slice.
    owners: Vec<HostId>,
}

impl PartitionMap {
    /// The map of a fixed list, whatever order it comes in: numbers go by the names.
    ///
    /// # Errors
    /// As [`PartitionMap::at`]; a host without capacity.
    pub fn fixed(mut members: Vec<Member>) -> Result<Self> {
        members.sort_by(|a, b| a.name.cmp(&b.name));
        for (n, member) in members.iter_mut().enumerate() {
            member.number = HostId(n as u16);
        }
        if let Some(member) = members.iter().find(|member| member.capacity == 0) {
            return wrong(format!("the host {} has no capacity", member.name));
        }
        let digest = digest(&members);
        Ok(PartitionMap { digest, ..Self::at(MapEpoch::default(), members)? })
    }

    /// The map of these members in an epoch.
    ///
    /// # Errors
    /// [`Kind::Usage`] without members, with too many, with a name or a number twice, or with nobody
    /// who can own anything.
    pub fn at(epoch: MapEpoch, mut members: Vec<Member>) -> Result<Self> {
        members.sort_by_key(|member| member.number);
        if members.is_empty() || members.len() > MAX_HOSTS {
            let count = members.len();
            return wrong(format!("a cluster has 1 to {MAX_HOSTS} hosts, not {count}"));
        }
        for (n, member) in members.iter().enumerate() {
            let same = |other: &Member| other.name == member.name || other.number == member.number;
            if members[..n].iter().any(same) {
                return wrong(format!("the host {} is in the cluster twice", member.name));
            }
            if member.name.is_empty() || usize::from(member.number.0) >= MAX_HOSTS {
                return wrong(format!("'{}' cannot be a host of a cluster", member.name));
            }
        }
        if members.iter().all(|member| member.capacity == 0) {
            return wrong("no host of the cluster has a capacity".into());
        }
        let owners = Slice::all().map(|slice| winner_of(slice, &members)).collect();
        Ok(PartitionMap { epoch, digest: 0, members, owners })
    }

    /// The map of the same hosts, one of which shall own nothing.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for a host that is not in it; [`Kind::Usage`] when nobody is left.
    pub fn without(&self, host: &str) -> Result<Self> {
        let mut members = self.members.clone();
        match members.iter_mut().find(|member| member.name == host) {
            Some(member) => member.capacity = 0,
            None => return Err(Error::new(Kind::NotFound, format!("there is no host {host}"))),
        }
        Self::at(self.epoch, members)
    }

    /// Which one it is.
    #[must_use]
    pub fn epoch(&self) -> MapEpoch {
        self.epoch
    }

    /// Distinguishes a fixed list from every other one; 0 for a map that may change.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// The hosts, by their numbers.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The host of that number.
    #[must_use]
    pub fn member(&self, host: HostId) -> Option<&Member> {
        self.members.iter().find(|member| member.number == host)
    }

    /// The number of the host of that name.
    #[must_use]
    pub fn host(&self, name: &str) -> Option<HostId> {
        self.members.iter().find(|member| member.name == name).map(|member| member.number)
    }

    /// Who answers for a fingerprint.
    #[must_use]
    pub fn owner(&self, fingerprint: &Fingerprint) -> HostId {
        self.owner_of(Slice::of(fingerprint))
    }

    /// Who owns a slice.
    #[must_use]
    pub fn owner_of(&self, slice: Slice) -> HostId {
        self.owners[usize::from(slice.0)]
    }

    /// What a host owns.
    #[must_use]
    pub fn slices(&self, host: HostId) -> Slices {
        Slice::all().filter(|slice| self.owner_of(*slice) == host).collect()
    }
}

fn wrong<T>(what: String) -> Result<T> {
    Err(Error::new(Kind::Usage, what))
}

/// The same for the same members with the same capacities. Addresses may change.
fn digest(members: &[Member]) -> u64 {
    let mut hash = Sha256::new();
    for member in members {
        hash.update((member.name.len() as u64).to_le_bytes());
        hash.update(&member.name);
        hash.update(member.capacity.to_le_bytes());
    }
    first_eight(&hash.finalize())
}

fn winner_of(slice: Slice, members: &[Member]) -> HostId {
    let score = |member: &Member| {
        let mut hash = Sha256::new();
        hash.update(u32::from(slice.0).to_le_bytes());
        hash.update(&member.name);
        (member.capacity, minus_log2(first_eight(&hash.finalize())))
    };
    let mut best = (HostId(0), (0, 1));
    for member in members {
        let this = score(member);
        if compare(this, best.1) == Ordering::Greater {
            best = (member.number, this);
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
            number: HostId(n as u16),
            name: format!("hv{n:03}"),
            address: format!("10.0.0.{n}:7420"),
            capacity: 1,
        };
        (0..count).map(member).collect()
    }

    fn share(map: &PartitionMap, host: u16) -> usize {
        map.slices(HostId(host)).len()
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
        let fixed = |members| PartitionMap::fixed(members).unwrap();
        let a = fixed(members(5));
        assert_eq!(a, fixed(turned));
        assert_eq!(a.host("hv003"), Some(HostId(3)));
        assert_eq!(a.host("hv"), None);
        let mut moved = members(5);
        moved[2].address = "192.0.2.1:1".into();
        assert_eq!(fixed(moved).digest(), a.digest());
        let mut larger = members(5);
        larger[2].capacity = 2;
        assert_ne!(fixed(larger).digest(), a.digest());
        // Numbers do not decide who owns what.
        let mut numbered = members(5);
        numbered.iter_mut().for_each(|member| member.number.0 = 200 - member.number.0);
        let b = PartitionMap::at(MapEpoch(7), numbered).unwrap();
        for (slice, (a, b)) in a.owners.iter().zip(&b.owners).enumerate() {
            assert_eq!(a.0, 200 - b.0, "{slice}");
        }
        assert_eq!((b.epoch(), b.digest()), (MapEpoch(7), 0));
    }

    #[test]
    fn shares_follow_capacities() {
        let mut hosts = members(10);
        hosts[4].capacity = 3;
        let map = PartitionMap::fixed(hosts).unwrap();
        let shares: Vec<usize> = (0..10).map(|n| share(&map, n)).collect();
        assert_eq!(shares.iter().sum::<usize>(), Slice::COUNT);
        for (host, share) in shares.iter().enumerate() {
            let fair = Slice::COUNT * if host == 4 { 3 } else { 1 } / 12;
            assert!(share.abs_diff(fair) < fair / 3, "{shares:?}");
        }
    }

    #[test]
    fn a_join_a_leave_or_a_drain_moves_only_its_own_share() {
        let mut drained = members(10);
        drained[9].capacity = 0;
        let [before, after, drained] = [members(9), members(10), drained]
            .map(|members| PartitionMap::at(MapEpoch(1), members).unwrap());
        assert_eq!(before.owners, drained.owners);
        assert_eq!(share(&drained, 9), 0);
        for (old, new) in before.owners.iter().zip(&after.owners) {
            assert!(old == new || *new == HostId(9), "{old:?} {new:?}");
        }
    }

    #[test]
    fn a_fingerprint_is_in_one_slice() {
        for (first, second) in (0..=255).flat_map(|a| (0..=255).map(move |b| (a, b))) {
            let mut bytes = [7; Fingerprint::LEN];
            (bytes[0], bytes[1]) = (first, second);
            let number = (u16::from(first) << 8 | u16::from(second)) / 16;
            assert_eq!(Slice::of(&Fingerprint(bytes)), Slice(number));
        }
        let set: Slices = Slice::all().filter(|slice| slice.0 % 3 == 0).collect();
        assert!(Slice::all().all(|slice| set.contains(slice) == (slice.0 % 3 == 0)));
        assert_eq!(set.len(), Slice::COUNT.div_ceil(3));
        assert!(set.without(&set).is_empty());
    }

    #[test]
    fn what_is_no_cluster_is_refused() {
        let twice = [members(2), members(1)].concat();
        let mut idle = members(2);
        idle[1].capacity = 0;
        for wrong in [Vec::new(), twice.clone(), idle.clone(), members(MAX_HOSTS + 1)] {
            assert_eq!(PartitionMap::fixed(wrong).unwrap_err().kind(), Kind::Usage);
        }
        assert!(PartitionMap::at(MapEpoch(1), idle.clone()).is_ok());
        idle[0].capacity = 0;
        let mut numbered = members(2);
        numbered[1].number = HostId(0);
        for wrong in [twice, idle, numbered] {
            assert_eq!(PartitionMap::at(MapEpoch(1), wrong).unwrap_err().kind(), Kind::Usage);
        }
    }
}
