//! What is changed for all hosts of a store at once: its level, and the encryption key for what is new. Only
//! when each of them says that it knows the next one; whoever does not, or does not answer, is named.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::hosts::HostReport;
use crate::store::format::KeyId;
use crate::store::keys::StoreKey;
use crate::store::{Agreed, Store, StoreLevel};

/// Looks at the key file, and at what all engines of the store go by now. Gives both outcomes: a key file
/// that cannot be used does no harm until something of it is needed.
pub fn look(store: &Store, key_file: &Path) -> (Result<Agreed>, Result<()>) {
    let taken = StoreKey::load(key_file).and_then(|key| store.take_key(key));
    (store.follow(), taken)
}

/// Raises the store to the newest level that this engine knows, if all hosts know it.
///
/// # Errors
/// [`Kind::Failed`], naming the hosts that do not; the store's.
pub fn finalize(store: &Store, hosts: &[HostReport], now_ms: i64) -> Result<StoreLevel> {
    let newest = StoreLevel::NEWEST;
    if store.follow()?.level >= newest {
        return Ok(newest);
    }
    let old = |host: &HostReport| {
        let known = host.newest_level;
        (known < newest).then(|| format!("runs {} and knows levels up to {known}", host.version))
    };
    all(hosts, &format!("the store cannot be raised to level {newest}"), old)?;
    Ok(store.raise(newest, now_ms)?.level)
}

/// Has all engines of the store go over to the newest encryption key that this one has, if all have it.
///
/// # Errors
/// [`Kind::Usage`] when there is none to go over to, [`Kind::Failed`], naming the hosts that lack it;
/// the store's.
pub fn use_newest_key(store: &Store, hosts: &[HostReport], now_ms: i64) -> Result<KeyId> {
    let agreed = store.follow()?;
    must_allow_keys(agreed.level)?;
    let key = store.sealer().key();
    let newest = key.newest();
    if newest <= agreed.key {
        let what = format!(
            "what is new is under the encryption key {} already, and the key file has no newer one",
            agreed.key.0
        );
        return Err(Error::new(Kind::Usage, format!("{what}: fleecectl key rotate makes one")));
    }
    let checks = key.checks();
    let lacking = |host: &HostReport| match host.keys.get(&newest.0) {
        check @ Some(_) if check == checks.get(&newest.0) => None,
        Some(_) => Some(format!("has another key {}: give it this host's key file", newest.0)),
        None => Some("lacks it: copy the key file there".to_owned()),
    };
    all(hosts, &format!("the encryption key {} cannot be used yet", newest.0), lacking)?;
    Ok(store.use_newest_of(&key, now_ms)?.key)
}

/// Makes sure that a store may have further encryption keys.
///
/// # Errors
/// [`Kind::Usage`] at a lower level.
pub fn must_allow_keys(level: StoreLevel) -> Result<()> {
    if level >= StoreLevel::KEYS {
        return Ok(());
    }
    let what = format!(
        "the store is at level {level}, and has one encryption key below level {}",
        StoreLevel::KEYS
    );
    Err(Error::new(Kind::Usage, format!("{what}: fleecectl upgrade --finalize first")))
}

/// That all hosts answer, and nothing stands against any of them. Whoever has some revoked certificate could pass
/// for any host that has to know something, so that a host is revoked is no reason not to ask it.
fn all(
    hosts: &[HostReport],
    refusal: &str,
    against: impl Fn(&HostReport) -> Option<String>,
) -> Result<()> {
    let obstacle = |host: &HostReport| {
        let why = match host.state.as_str() {
            HostReport::REVOKED => Some(
                "is revoked, and still in the cluster: keep it from etcd (--client-crl-file) or out of cluster.static"
                    .to_owned(),
            ),
            _ if host.answers() => against(host),
            _ => Some("does not answer".to_owned()),
        };
        why.map(|why| format!("{} {why}", host.name))
    };
    let obstacles: Vec<String> = hosts.iter().filter_map(obstacle).collect();
    if obstacles.is_empty() {
        return Ok(());
    }
    let hint = "set that right, or take the host out of the cluster, and try again";
    Err(Error::new(Kind::Failed, format!("{refusal}: {}; {hint}", obstacles.join(", "))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::format::{Header, ObjectKind};
    use crate::store::testing::TestStore;
    use crate::store::{InitOptions, StoreOptions};

    fn host(name: &str, state: &str, newest_level: StoreLevel) -> HostReport {
        let (name, state) = (name.to_owned(), state.to_owned());
        HostReport { name, state, version: "0.0.9".into(), newest_level, ..HostReport::default() }
    }

    /// A store as an older Fleece made it.
    fn of_level_1() -> TestStore {
        let (init, options) = (InitOptions::default(), StoreOptions::default());
        let test = TestStore::at(StoreLevel::FIRST, &init, options);
        assert_eq!(test.store.agreed().level, StoreLevel::FIRST);
        test
    }

    /// A key file with these keys.
    fn file(test: &TestStore, key: &StoreKey) -> std::path::PathBuf {
        let path = test.dir.path().join("file.key");
        let _ = std::fs::remove_file(&path);
        key.save(&path).unwrap();
        path
    }

    #[test]
    fn all_engines_go_over_to_a_key_that_all_have() {
        let test = TestStore::new();
        let old = StoreKey::from_text(&test.key_text).unwrap();
        let (next, other) = (old.rotated().unwrap(), old.rotated().unwrap());
        let (ours, running) = (&test.store, test.reader());
        let having = |name: &str, key: &StoreKey| HostReport {
            keys: key.checks(),
            ..host(name, "answers", StoreLevel::NEWEST)
        };
        // Nothing to go over to.
        let error = use_newest_key(ours, &[having("hv0", &old)], 7).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{error}");
        let before = ours.sealer().seal(ObjectKind::Session, "x", b"before").unwrap();

        let (followed, taken) = look(ours, &file(&test, &next));
        assert_eq!((followed.unwrap().key, taken.is_ok()), (KeyId(1), true));
        assert_eq!(ours.sealer().current(), KeyId(1), "it is not used before all have it");
        let hosts = [
            having("hv0", &next),
            having("hv1", &old),
            having("hv2", &other),
            host("hv3", "silent", StoreLevel::FIRST),
        ];
        let refused = use_newest_key(ours, &hosts, 7).unwrap_err().to_string();
        for named in ["hv1 lacks it", "hv2 has another key 2", "hv3 does not answer"] {
            assert!(refused.contains(named), "{refused}");
        }
        assert!(!refused.contains("hv0"), "{refused}");
        assert_eq!(test.reader().agreed().key, KeyId(1));

        // One that was never used is taken back by another file; who keeps it ends before it reads anything.
        let odd = test.reader();
        for key in [&other, &next, &other] {
            look(&odd, &file(&test, key)).1.unwrap();
        }
        let hosts = [having("hv0", &next), having("hv1", &next)];
        assert_eq!(use_newest_key(ours, &hosts, 7).unwrap(), KeyId(2));
        let after = ours.sealer().seal(ObjectKind::Session, "x", b"after").unwrap();
        assert_eq!(Header::decode(&after, "x").unwrap().key_id, KeyId(2));
        for (bytes, text) in [(&before, &b"before"[..]), (&after, b"after")] {
            assert_eq!(ours.sealer().open(ObjectKind::Session, "x", bytes).unwrap(), text);
        }

        let error = odd.follow().unwrap_err();
        assert!(error.kind() == Kind::Key && error.to_string().contains("another one"), "{error}");

        // Who has the old file ends by name, until the new one is there.
        let (followed, taken) = look(&running, &file(&test, &old));
        let error = followed.unwrap_err();
        assert!(error.kind() == Kind::Key && taken.is_ok(), "{error}");
        assert!(error.to_string().contains("needs the encryption key 2"), "{error}");
        let path = file(&test, &old);
        let refused = StoreKey::load(&path).unwrap();
        let options = StoreOptions::default();
        let error = Store::open_to_read(ours.location(), refused, options.clone()).err().unwrap();
        assert_eq!(error.kind(), Kind::Key);
        assert!(error.to_string().contains(&format!("{}", path.display())), "{error}");
        let (followed, taken) = look(&running, &file(&test, &next));
        assert!(followed.unwrap().key == KeyId(2) && taken.is_ok());
        assert_eq!(running.sealer().open(ObjectKind::Session, "x", &after).unwrap(), b"after");
        // A file that lacks something is not taken, and harms nobody who has it.
        let (followed, taken) = look(&running, &file(&test, &other));
        assert_eq!(followed.unwrap().key, KeyId(2));
        assert_eq!(taken.unwrap_err().kind(), Kind::Key);
    }

    #[test]
    fn a_store_at_the_first_level_has_one_key() {
        let test = of_level_1();
        let old = StoreKey::from_text(&test.key_text).unwrap();
        look(&test.store, &file(&test, &old.rotated().unwrap())).1.unwrap();
        let error = use_newest_key(&test.store, &[], 7).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().contains("upgrade --finalize"), "{error}");
    }

    #[test]
    fn a_store_is_raised_once_every_host_knows_the_level() {
        let test = of_level_1();
        let (newest, running) = (StoreLevel::NEWEST, test.reader());
        let hosts = [
            host("hv0", "here", newest),
            host("hv1", "silent", StoreLevel::FIRST),
            host("hv2", "answers", StoreLevel::FIRST),
            host("hv3", "answers", newest),
            host("hv4", HostReport::REVOKED, StoreLevel::FIRST),
        ];
        let refused = finalize(&test.store, &hosts, 7).unwrap_err().to_string();
        assert!(refused.contains("hv1 does not answer"), "{refused}");
        assert!(refused.contains("hv2 runs 0.0.9 and knows levels up to 1"), "{refused}");
        assert!(refused.contains("hv4 is revoked, and still in the cluster"), "{refused}");
        assert!(!refused.contains("hv0") && !refused.contains("hv3"), "{refused}");
        assert_eq!(test.reader().agreed().level, StoreLevel::FIRST);

        let hosts = [host("hv0", "here", newest), host("hv3", "answers", newest)];
        assert_eq!(finalize(&test.store, &hosts, 7).unwrap(), newest);
        assert_eq!(running.agreed().level, StoreLevel::FIRST);
        assert_eq!(running.follow().unwrap().level, newest);
        assert_eq!(test.reader().agreed().level, newest);
        // Nothing is asked of anybody for what is so already.
        let silent = [host("hv1", "silent", StoreLevel::FIRST)];
        assert_eq!(finalize(&running, &silent, 8).unwrap(), newest);
    }
}
