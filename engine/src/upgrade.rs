//! What is changed for all hosts of a store at once: its level. Only when each of them says that it knows
//! the next one; whoever does not, or does not answer, is named.

use crate::error::{Error, Kind, Result};
use crate::hosts::HostReport;
use crate::store::{Store, StoreLevel};

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

/// That all hosts answer, and nothing stands against any of them.
fn all(
    hosts: &[HostReport],
    refusal: &str,
    against: impl Fn(&HostReport) -> Option<String>,
) -> Result<()> {
    let obstacle = |host: &HostReport| {
        let why = match host.state.as_str() {
            "silent" => Some("does not answer".to_owned()),
            _ => against(host),
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
    use crate::store::names;
    use crate::store::testing::TestStore;

    fn host(name: &str, state: &str, newest_level: StoreLevel) -> HostReport {
        let (name, state) = (name.to_owned(), state.to_owned());
        HostReport { name, state, version: "0.0.9".into(), newest_level, ..HostReport::default() }
    }

    /// A store as an older Fleece made it.
    fn of_level_1() -> TestStore {
        let test = TestStore::new();
        std::fs::remove_file(test.path(&names::level(StoreLevel::NEWEST.0))).unwrap();
        let store = test.reader();
        assert_eq!(store.agreed().level, StoreLevel::FIRST);
        TestStore { store, ..test }
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
        ];
        let refused = finalize(&test.store, &hosts, 7).unwrap_err().to_string();
        assert!(refused.contains("hv1 does not answer"), "{refused}");
        assert!(refused.contains("hv2 runs 0.0.9 and knows levels up to 1"), "{refused}");
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
