//! Engines of the simulation in situations that are made step by step.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::host::Host;
use super::{block, map};
use crate::cluster::frame::{FrameReader, Message};
use crate::cluster::map::{MapEpoch, PartitionMap};
use crate::cluster::{Caller, Cluster, Move};
use crate::ids::{HostId, Sequence, SessionId};
use crate::session::event::Claim;

#[test]
fn a_map_that_comes_while_an_index_is_filled_is_filled_for_next() {
    let dir = tempfile::tempdir().unwrap();
    let two = map(1, &BTreeSet::from([0, 1]));
    let host = Host::start(dir.path(), HostId(0), &two, (1, true), Instant::now);
    let next = || {
        let (cluster, (send, receive)) = (Arc::clone(&host.cluster), std::sync::mpsc::channel());
        std::thread::spawn(move || {
            let _ = send.send(cluster.next_move(Duration::ZERO, Duration::from_secs(10)));
        });
        match receive.recv_timeout(Duration::from_secs(20)).unwrap() {
            Some(Move::Fill(map)) => Some(map.epoch()),
            _ => None,
        }
    };
    let alone = map(2, &BTreeSet::from([0]));
    host.cluster.adopt(alone.clone()).unwrap();
    assert_eq!(next(), Some(MapEpoch(2)));
    // By the next one it owns the same: the index for the one before is as good.
    host.cluster.adopt(PartitionMap::at(MapEpoch(3), alone.members().to_vec()).unwrap()).unwrap();
    assert!(host.cluster.is_still_ours(MapEpoch(2)) && host.cluster.settled().is_none());
    host.cluster.filled(MapEpoch(2)).unwrap();
    assert_eq!((host.cluster.filling(), host.cluster.index_epoch()), (0, MapEpoch(3)));
    // By this one it is not; the index for the one before is done only now.
    host.cluster.adopt(map(4, &BTreeSet::from([0, 1]))).unwrap();
    host.cluster.adopt(PartitionMap::at(MapEpoch(5), alone.members().to_vec()).unwrap()).unwrap();
    assert!(!host.cluster.is_still_ours(MapEpoch(4)));
    host.cluster.filled(MapEpoch(4)).unwrap();
    assert!(host.cluster.filling() > 0);
    assert_eq!(next(), Some(MapEpoch(5)));
    host.cluster.filled(MapEpoch(5)).unwrap();
    assert_eq!(host.cluster.settled().map(|map| map.epoch()), Some(MapEpoch(5)));
}

#[test]
fn a_session_that_is_gone_has_given_everything_up() {
    let dir = tempfile::tempdir().unwrap();
    let three = map(1, &BTreeSet::from([0, 1, 2]));
    let host = |n: u16| {
        let how = (u32::from(n) + 1, true);
        Host::start(dir.path(), HostId(n), &three, how, Instant::now).cluster
    };
    let (a, b, owner) = (host(0), host(1), host(2));
    let next = |from: &Cluster, to: &Cluster| {
        let caller = Caller { host: from.us(), instance: from.instance(to.us()) };
        let received = to.greeted(caller).received;
        let ours = (to.us(), caller.instance);
        let next = from.connected(ours, to.instance(from.us()), received).unwrap();
        let (number, frame) = from.next(ours, next).unwrap().unwrap();
        (caller, number, frame)
    };
    // Of a process that ended, say.
    let (waiter, writer) = (SessionId::on(HostId(0), 1), SessionId::on(HostId(1), 1));
    assert!(a.give_up(waiter, writer, vec![Claim { fingerprint: block(1), theirs: Sequence(1) }]));
    let (caller, number, frame) = next(&a, &b);
    b.take(caller, number, &frame).unwrap();
    let said = |to: &Cluster| {
        let (.., frame) = next(&b, to);
        let mut reader = FrameReader::new(&frame);
        std::iter::from_fn(move || reader.read_next().unwrap()).collect::<Vec<_>>()
    };
    assert!(said(&a).contains(&Message::GaveUp { from: writer, to: waiter }));
    // Whoever has not heard of the end of that process hears of it now.
    assert_eq!(said(&owner), [Message::Withdraw(writer)]);
}
