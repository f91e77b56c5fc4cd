//! Tidy: takes away objects that nobody needs. The only job that does, so it runs on a keeper only.
//!
//! - Registrations of readers whose time is up, and of backups that are over.
//! - Checkpoints that nobody finished, or whose record is damaged: the journals have all that they had.
//! - Of two copies the one that is damaged while the other is sound. It is made again at once: no key is
//!   ever overwritten, so repair cannot do that. One that is missing, as after a crash in between, is made, too.
//!
//! Everything is looked at again right before it is taken away, and what is taken away is needed by nobody
//! or made again from what stays: two keepers at once, or a crash at any point, lose nothing.

use serde::Serialize;

use super::Options;
use crate::error::{Error, Kind, Result};
use crate::jobs::restore::is_damage;
use crate::store::Store;
use crate::store::commit::{Manifests, SnapshotKey};
use crate::store::manifest::Record;
use crate::store::objects::Keeper;
use crate::store::shards::{self, CheckpointId};
use crate::store::{names, sessions::SessionRecord};

/// Hosts' clocks may differ by so much, and whoever wrote something may ask for it once more: milliseconds.
const GRACE_MS: i64 = 24 * 3600 * 1000;

/// What tidy says as it goes, one JSON object a line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "message_type", rename_all = "snake_case")]
pub enum Event {
    /// Something is taken away, or would be.
    Removal {
        /// The object, or the folder of objects.
        object: String,
        /// Why.
        message: String,
    },
    /// The end.
    Summary(Report),
}

/// What was taken away, or would be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Report {
    /// Registrations of backups.
    pub sessions: u64,
    /// Registrations of readers.
    pub readers: u64,
    /// Checkpoints, whole or not.
    pub checkpoints: u64,
    /// Damaged or missing ones of two copies, which were made again.
    pub copies: u64,
    /// Objects, those of checkpoints each.
    pub removed_objects: u64,
}

/// Takes away what nobody needs.
///
/// # Errors
/// [`Kind::NotPermitted`] on a host, unless it is only to be said; when the store cannot be read or written, or
/// the first of `events`.
pub fn tidy(
    store: &Store,
    options: &Options,
    events: &mut dyn FnMut(&Event) -> Result<()>,
) -> Result<Report> {
    let keeper = if options.dry_run { None } else { Some(store.objects().keeper()?) };
    let manifests = Manifests::of(store, &options.scratch);
    let mut tidier =
        Tidier { store, manifests, keeper, options, events, report: Report::default() };
    tidier.readers()?;
    tidier.sessions()?;
    tidier.checkpoints()?;
    tidier.manifests()?;
    tidier.directories()?;
    let report = tidier.report;
    (tidier.events)(&Event::Summary(report))?;
    Ok(report)
}

struct Tidier<'t> {
    store: &'t Store,
    manifests: Manifests,
    /// `None`: it is only said.
    keeper: Option<Keeper<'t>>,
    options: &'t Options,
    events: &'t mut dyn FnMut(&Event) -> Result<()>,
    report: Report,
}

impl Tidier<'_> {
    fn say(&mut self, object: &str, message: &str) -> Result<()> {
        (self.events)(&Event::Removal { object: object.into(), message: message.into() })
    }

    fn remove(&mut self, object: &str) -> Result<()> {
        self.report.removed_objects += 1;
        self.keeper.as_ref().map_or(Ok(()), |keeper| keeper.remove(object))
    }

    fn is_long_ago(&self, ms: i64) -> bool {
        ms.saturating_add(GRACE_MS) < self.options.now_ms
    }

    /// One that cannot be read may still be valid: verify names it.
    fn readers(&mut self) -> Result<()> {
        let manifests = self.manifests.clone();
        manifests.each_reader(|object, record| {
            let ends = |record: SessionRecord| record.expires_ms;
            let Some(end) = readable(record)?.and_then(ends) else { return Ok(()) };
            if !self.is_long_ago(end) {
                return Ok(());
            }
            self.say(object, "the time of this reader is up")?;
            self.report.readers += 1;
            self.remove(object)
        })
    }

    fn sessions(&mut self) -> Result<()> {
        let manifests = self.manifests.clone();
        manifests.vms_with_sessions()?.into_iter().try_for_each(|vm| {
            manifests.each_session(
                vm,
                |key, is_over| {
                    if is_over { self.session(&key) } else { Ok(()) }
                },
            )
        })
    }

    /// A session whose commit key exists: nothing can become of it any more.
    fn session(&mut self, key: &SnapshotKey) -> Result<()> {
        let why = match self.manifests.session(key) {
            Ok(record) if !self.is_long_ago(record.started_ms) => return Ok(()),
            Ok(_) => "this backup is over",
            Err(error) if error.kind() == Kind::Damaged => "it is damaged, and the backup is over",
            // Another keeper was faster.
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let object = names::session(key.vm, key.seq, key.snapshot);
        self.say(&object, why)?;
        self.report.sessions += 1;
        self.remove(&object)
    }

    fn checkpoints(&mut self) -> Result<()> {
        let all = shards::list(self.store)?;
        for id in &all {
            // A host writes one after the other, so that those before its last one are done with.
            let is_done = all.iter().any(|other| other.host == id.host && other.n > id.n);
            if !is_done {
                continue;
            }
            match shards::read_record(self.store, *id) {
                Ok(_) => {}
                Err(error) if error.kind() == Kind::NotFound => {
                    self.checkpoint(*id, "this checkpoint was never finished")?;
                }
                Err(error) if error.kind() == Kind::Damaged => {
                    self.checkpoint(*id, "the record of this checkpoint is damaged")?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn checkpoint(&mut self, id: CheckpointId, why: &str) -> Result<()> {
        let folder = names::checkpoint(id.host, id.n);
        let mut said = false;
        // What is left of it in a directory is the empty folder: nothing is said of that.
        self.store.objects().list(&folder, |object, _| {
            if !std::mem::replace(&mut said, true) {
                self.say(&folder, why)?;
                self.report.checkpoints += 1;
            }
            self.remove(object)
        })
    }

    fn manifests(&mut self) -> Result<()> {
        let manifests = self.manifests.clone();
        manifests.each_of_both(|key| {
            match (manifests.read_first(&key), manifests.read_copy(&key)) {
                (Ok(_), Ok(_)) => Ok(()),
                // Its session may still be about to commit, and must not find the place free.
                (Err(_), Ok(Record::Tombstone(of))) if !self.is_long_ago(of.time_ms) => Ok(()),
                (Err(error), Ok(_)) => {
                    let make = || manifests.heal_first(&key).map(drop);
                    self.replace(&key.manifest(), error, make)
                }
                (Ok(_), Err(error)) => {
                    self.replace(&key.copy(), error, || manifests.heal_copy(&key).map(drop))
                }
                (Err(first), Err(copy)) => {
                    let other = [first, copy].into_iter().find(|error| !is_damage(error));
                    other.map_or(Ok(()), Err)
                }
            }
        })
    }

    /// Own objects of directories, where what they have to be is known without them.
    fn directories(&mut self) -> Result<()> {
        let (store, directories) = (self.store, self.store.directories());
        store.objects().list(names::DIRECTORIES, |object, _| {
            let Some((container, generation)) = names::parse_directory(object) else {
                return Ok(());
            };
            let damaged = match directories.check_copy(container, generation) {
                Err(error) if error.kind() == Kind::Damaged => error,
                Err(error) if error.kind() != Kind::NotFound => return Err(error),
                _ => return Ok(()),
            };
            // What the engine has in its caches says nothing about the store.
            directories.forget(container);
            let own = directories.summary(container).and_then(|own| match own {
                Some(own) if own.generation == generation => {
                    directories.own_object(container).map(Some)
                }
                _ => Ok(None),
            });
            // Read before it goes: a part of it that is sound may be said by nothing else.
            let Some(Some(bytes)) = readable(own)? else { return Ok(()) };
            self.replace(object, damaged, || store.objects().create(object, bytes).map(drop))
        })
    }

    /// Takes one of two copies away that is damaged, and makes it again from the other.
    fn replace(
        &mut self,
        object: &str,
        error: Error,
        make: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        match error.kind() {
            Kind::Damaged => {
                let why = "it is damaged, and made again from what says the same and is sound";
                self.say(object, why)?;
                self.remove(object)?;
            }
            Kind::NotFound => self.say(object, "it is missing, and made from the other copy")?,
            _ => return Err(error),
        }
        self.report.copies += 1;
        if self.options.dry_run { Ok(()) } else { make() }
    }
}

/// `None` for what is damaged, or gone meanwhile.
fn readable<T>(read: Result<T>) -> Result<Option<T>> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error) if is_damage(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::ids::{HostId, SnapshotId};
    use crate::jobs::fixture::{Fixture, image};
    use crate::jobs::verify::{self, Scope};
    use crate::store::Role;
    use crate::store::manifest::{Manifest, Tombstone};
    use crate::store::shards::Writer;
    use crate::store::testing::session_of;

    /// Some day, and as long before it as makes everything old.
    const NOW: i64 = 1_800_000_000_000;
    const OLD: i64 = NOW - GRACE_MS - 1;

    fn run(f: &Fixture, role: Role, dry_run: bool) -> Result<(Report, Vec<String>)> {
        let options = Options { dry_run, scratch: f.scratch(), now_ms: NOW };
        let mut said = Vec::new();
        let report = tidy(&f.opened_by(role), &options, &mut |event| {
            serde_json::to_string(event).unwrap();
            if let Event::Removal { object, .. } = event {
                said.push(object.clone());
            }
            Ok(())
        })?;
        Ok((report, said))
    }

    fn objects(f: &Fixture) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        let listed = f.store.objects().list("", |object, _| {
            // Every engine that opens the store claims a number.
            if !object.starts_with(names::INCARNATIONS) {
                all.insert(object.to_owned());
            }
            Ok(())
        });
        listed.unwrap();
        all
    }

    fn is_clean(f: &Fixture) -> bool {
        let options = verify::Options { scope: Scope::All, scratch: f.scratch(), now_ms: NOW };
        verify::verify(&f.writable(), &options, &mut |_| Ok(()), &mut |_| Ok(())).unwrap().clean()
    }

    fn session(of: &Manifest, started_ms: i64, expires_ms: Option<i64>) -> SessionRecord {
        SessionRecord { started_ms, expires_ms, ..session_of(of) }
    }

    fn session_key(of: &Manifest) -> String {
        names::session(of.vm, of.seq, of.snapshot)
    }

    /// A checkpoint with one entry in a part; without its record if it is not to be finished.
    fn checkpoint(f: &Fixture, host: u16, finished: bool) -> String {
        let mut writer = Writer::begin(&f.store, HostId(host)).unwrap();
        let entries: Vec<_> = f.index.iter().map(|(f, a)| (*f, *a)).collect();
        let full = shards::PART_ENTRIES.div_ceil(entries.len()) * entries.len();
        entries.iter().cycle().take(full).for_each(|entry| writer.push(*entry).unwrap());
        if finished {
            let record = shards::Record {
                map_epoch: 1,
                written_ms: 0,
                after: Vec::new(),
                up_to: Vec::new(),
                slices: crate::ids::Slices::default(),
                parts: 0,
                entries: 0,
            };
            writer.finish(record).unwrap();
        }
        let last = shards::list(&f.store).unwrap();
        let last = last.iter().rfind(|id| id.host == HostId(host)).unwrap();
        names::checkpoint(last.host, last.n)
    }

    #[test]
    fn what_nobody_needs_is_taken_away_and_nothing_else() {
        let mut f = Fixture::new(4096);
        let made: Vec<Manifest> =
            (1..=4).map(|n| f.backup(n, &image(n as u64, 1 << 20), None)).collect();
        let mut gone = BTreeSet::new();
        // Over for long, over of late, over and damaged.
        for (of, started_ms) in [(&made[0], OLD), (&made[1], OLD + 2), (&made[2], NOW)] {
            assert!(f.manifests.begin_session(&session(of, started_ms, None)).unwrap());
        }
        f.flip(&session_key(&made[2]), 70);
        gone.extend([&made[0], &made[2]].map(session_key));
        // Ended without a commit, and still open.
        let other = |n: u32| Manifest {
            snapshot: SnapshotId::from_random(n),
            seq: u64::from(n),
            ..made[0].clone()
        };
        let (ended, open) = (other(90), other(91));
        for of in [&ended, &open] {
            assert!(f.manifests.begin_session(&session(of, OLD, None)).unwrap());
        }
        let (snapshot, vm, seq) = (ended.snapshot, ended.vm, ended.seq);
        f.manifests
            .tombstone(&Tombstone { snapshot, vm, seq, reason: "test".into(), time_ms: OLD })
            .unwrap();
        gone.insert(session_key(&ended));
        let before = objects(&f);
        f.manifests.begin_reader(&session(&made[0], OLD, Some(OLD))).unwrap();
        gone.extend(objects(&f).difference(&before).cloned());
        f.manifests.begin_reader(&session(&made[0], OLD, Some(OLD + 2))).unwrap();
        // Never finished, whole, with a damaged record, being written; damaged, and the last one of its host.
        let unfinished = checkpoint(&f, 1, false);
        let whole = checkpoint(&f, 1, true);
        let damaged = checkpoint(&f, 2, true);
        let written = checkpoint(&f, 2, false);
        let last = checkpoint(&f, 3, true);
        [&damaged, &last].iter().for_each(|of| f.flip(&format!("{of}/record"), 70));
        let of = |folder: &str, all: &BTreeSet<String>| -> BTreeSet<String> {
            all.iter().filter(|object| object.starts_with(folder)).cloned().collect()
        };
        let before = objects(&f);
        [&unfinished, &damaged].iter().for_each(|folder| gone.extend(of(folder, &before)));
        assert!([&whole, &written, &last].iter().all(|folder| !of(folder, &before).is_empty()));
        let next_seq = f.manifests.next_seq(made[0].vm).unwrap();

        let (planned, said) = run(&f, Role::Host, true).unwrap();
        assert_eq!(run(&f, Role::Host, false).unwrap_err().kind(), Kind::NotPermitted);
        assert_eq!(objects(&f), before, "nothing is taken away by a host, or to see what would be");
        let (report, removed) = run(&f, Role::Keeper, false).unwrap();
        assert_eq!((report, &removed), (planned, &said));
        let left: BTreeSet<String> = before.difference(&gone).cloned().collect();
        assert_eq!(objects(&f), left);
        assert_eq!((report.sessions, report.readers, report.checkpoints), (3, 1, 2));
        assert_eq!(report.removed_objects, gone.len() as u64);
        assert_eq!(run(&f, Role::Keeper, false).unwrap().0, Report::default());

        assert!(is_clean(&f));
        assert_eq!(f.manifests.next_seq(made[0].vm).unwrap(), next_seq);
        let open_now = f.manifests.open_sessions(open.vm).unwrap();
        assert_eq!(open_now, [SnapshotKey::of(&open)]);
        assert!(!f.manifests.settle(ended.vm, ended.snapshot, "", NOW).unwrap());
    }

    #[test]
    fn of_two_copies_the_damaged_one_is_made_again() {
        let mut f = Fixture::new(4096);
        let made: Vec<Manifest> =
            (1..=3).map(|n| f.backup(n, &image(n as u64, 1 << 20), None)).collect();
        let keys: Vec<SnapshotKey> = made.iter().map(SnapshotKey::of).collect();
        let directory =
            objects(&f).into_iter().find(|key| key.starts_with(names::DIRECTORIES)).unwrap();
        let sound = std::fs::read(f.path(&directory)).unwrap();
        let before = objects(&f);
        let lost = [keys[2].manifest(), keys[2].copy()];
        let damaged = [keys[0].manifest(), keys[1].copy(), directory.clone()];
        damaged.iter().chain(&lost).for_each(|key| f.flip(key, 90));
        let (report, said) = run(&f, Role::Keeper, false).unwrap();
        assert_eq!((report.copies, report.removed_objects), (3, 3));
        assert_eq!(BTreeSet::from_iter(said), BTreeSet::from(damaged));
        assert_eq!(objects(&f), before, "of two damaged ones none is taken away");
        assert_eq!(std::fs::read(f.path(&directory)).unwrap(), sound);
        for key in &keys[..2] {
            assert_eq!(f.manifests.read_first(key).unwrap(), f.manifests.read_copy(key).unwrap());
        }
        // What a crash between the two steps leaves: the copy tells the fate, and no number is given twice.
        std::fs::remove_file(f.path(&keys[0].manifest())).unwrap();
        assert_eq!(f.manifests.next_seq(keys[0].vm).unwrap(), keys[0].seq + 1);
        assert!(f.manifests.settle(keys[0].vm, keys[0].snapshot, "", NOW).unwrap());
        assert!(matches!(f.manifests.read(&keys[0]).unwrap(), Record::Manifest(_)));
        std::fs::remove_file(f.path(&keys[1].copy())).unwrap();
        let (report, _) = run(&f, Role::Keeper, false).unwrap();
        assert_eq!((report.copies, report.removed_objects), (2, 0));
        assert_eq!(objects(&f), before);
        assert!(!is_clean(&f));
        // Without those that are lost, all is well.
        lost.iter().for_each(|key| std::fs::remove_file(f.path(key)).unwrap());
        assert!(is_clean(&f));
        assert_eq!(run(&f, Role::Keeper, false).unwrap().0, Report::default());
    }
}
