//! Which map follows from what is in etcd.

use super::*;

fn seen(hosts: &[&str], drained: &[&str], map: Option<Document>) -> Seen {
    let announce = |name: &&str| {
        (
            (*name).to_owned(),
            Announcement { address: format!("{name}:1"), capacity: 1, engine: Incarnation(1) },
        )
    };
    Seen {
        hosts: hosts.iter().map(announce).collect(),
        drained: drained.iter().map(|name| (*name).to_owned()).collect(),
        map,
        revision: 0,
    }
}

#[test]
fn a_map_follows_its_hosts_and_numbers_stay() {
    let first = seen(&["b", "c"], &[], None).next().unwrap();
    assert_eq!(first.epoch, MapEpoch(1));
    let fits = seen(&["b", "c"], &[], Some(first.clone()));
    assert_eq!(fits.next(), None);
    let joined = seen(&["a", "b", "c"], &[], Some(first)).next().unwrap();
    let number = |map: &Document, name: &str| map.numbers[name].0;
    assert_eq!(["a", "b", "c"].map(|name| number(&joined, name)), [2, 0, 1]);
    let left = seen(&["a", "c"], &[], Some(joined)).next().unwrap();
    assert_eq!((left.epoch, left.hosts.len()), (MapEpoch(3), 2));
    // Its number is nobody else's, and its own again.
    let other = seen(&["a", "c", "d"], &[], Some(left)).next().unwrap();
    assert_eq!(number(&other, "d"), 3);
    let back = seen(&["a", "b", "c", "d"], &[], Some(other)).next().unwrap();
    assert_eq!(number(&back, "b"), 0);
    let text = serde_json::to_vec(&back).unwrap();
    assert_eq!(Document::decode(&text).unwrap(), back);
    let later = Document { version: 2, ..back };
    assert!(Document::decode(&serde_json::to_vec(&later).unwrap()).is_err());
}

#[test]
fn a_drained_host_owns_nothing_unless_all_are() {
    let map = seen(&["a", "b"], &["b"], None).next().unwrap();
    let map = map.map().unwrap();
    assert!(map.slices(map.host("b").unwrap()).is_empty());
    assert_eq!(seen(&["a", "b"], &["a", "b"], None).next(), None);
}

#[test]
fn where_etcd_has_lost_its_map_or_was_set_back_the_last_one_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let membership = Membership {
        settings: toml::from_str("name = 'a'\nidentity = '/identity'").unwrap(),
        prefix: String::new(),
        announcement: Announcement { address: String::new(), capacity: 1, engine: Incarnation(1) },
        kept: dir.path().join("map.json"),
        starting: Arc::default(),
    };
    let nothing = seen(&["a", "b"], &[], None);
    let next = |seen: &Seen| membership.next(seen, MapEpoch(2));
    assert_eq!(next(&nothing).unwrap().epoch, MapEpoch(1));
    let joined = seen(&["a", "b", "c"], &[], nothing.next()).next().unwrap();
    membership.keep(&joined);
    let again = next(&seen(&["a", "b", "c"], &[], None)).unwrap();
    assert_eq!((again.epoch, &again.numbers), (MapEpoch(3), &joined.numbers));
    // Not all are there yet.
    let some = next(&nothing).unwrap();
    assert_eq!((some.epoch, some.hosts.len(), &some.numbers), (MapEpoch(3), 2, &joined.numbers));
    // It was set back to the map before.
    let back = seen(&["a", "b", "c"], &[], nothing.next());
    let again = next(&back).unwrap();
    assert_eq!((again.epoch, &again.numbers), (MapEpoch(3), &joined.numbers));
    assert_eq!(next(&seen(&["a", "b", "c"], &[], Some(joined))), None);
}
