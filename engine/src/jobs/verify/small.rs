//! Small objects that no restore needs: each is read, none of them is part of a snapshot.

use super::{Event, Verifier};
use crate::error::{Error, Kind, Result};
use crate::jobs::restore::is_damage;
use crate::store::damage;
use crate::store::format::{Header, ObjectKind, SEALED_MAX};
use crate::store::{StoreInfo, names, shards};

impl Verifier<'_> {
    pub(super) fn check_small(&mut self) -> Result<()> {
        let (objects, sealer) = (self.store.objects(), self.store.sealer());
        let info = StoreInfo::check(objects, self.store.location(), &sealer.key()).map(drop);
        self.check_object("store", names::STORE, info)?;
        self.check_wrapped_keys()?;
        self.check_agreed()?;
        let journals = self.store.journals();
        for incarnation in journals.incarnations()? {
            let claim = journals.check_claim(incarnation);
            self.check_object("incarnation", &names::incarnation(incarnation), claim)?;
        }
        self.check_sessions()?;
        self.check_marks()?;
        self.check_checkpoints()
    }

    /// One that is damaged is a note: directories have all that it had.
    fn check_checkpoints(&mut self) -> Result<()> {
        let store = self.store;
        for id in shards::list(store)? {
            let record = match shards::read_record(store, id) {
                // It is being written, or was never finished.
                Err(error) if error.kind() == Kind::NotFound => continue,
                record => record,
            };
            let read = record.and_then(|record| {
                (0..record.parts).try_for_each(|part| shards::read_part(store, id, part).map(drop))
            });
            match read {
                Err(error) if is_damage(&error) => {
                    let object = names::checkpoint(id.host, id.n);
                    let message = format!("{error}; hosts read directories instead");
                    self.tell(&Event::Note { object, message })?;
                }
                read => read?,
            }
        }
        Ok(())
    }

    /// Says what is wrong with an object; an error that is no damage ends the verify.
    fn check_object(&mut self, what: &'static str, object: &str, read: Result<()>) -> Result<()> {
        match read {
            Ok(()) => Ok(()),
            // A header that is damaged may read as another store's, or as none.
            Err(error)
                if is_damage(&error) || matches!(error.kind(), Kind::NoStore | Kind::Key) =>
            {
                self.problem(what, object, &error.to_string())
            }
            Err(error) => Err(error),
        }
    }

    /// What changed what engines go by.
    fn check_agreed(&mut self) -> Result<()> {
        let store = self.store;
        store.objects().list(names::AGREED, |key, _| {
            let kind = match names::parse_number(names::LEVEL, key) {
                Some(_) => ObjectKind::Level,
                None => ObjectKind::KeyInUse,
            };
            self.check_object("agreement", key, store.check_agreed(kind, key))
        })
    }

    /// Their passphrases are not known here: only their headers can be checked.
    fn check_wrapped_keys(&mut self) -> Result<()> {
        let store = self.store;
        self.check_wrapped_key(names::WRAPPED_KEY)?;
        store.objects().list(names::WRAPPED_KEYS, |key, _| self.check_wrapped_key(key))
    }

    fn check_wrapped_key(&mut self, name: &str) -> Result<()> {
        let store = self.store.id();
        let checked = match self.store.objects().read_all(name, SEALED_MAX) {
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            read => read.and_then(|bytes| {
                Header::decode(&bytes, name)?.expect(ObjectKind::WrappedKey, store, name)
            }),
        };
        self.check_object("key", name, checked)
    }

    fn check_sessions(&mut self) -> Result<()> {
        let store = self.store;
        store.objects().list(names::SESSIONS, |key, _| {
            let read = store.read_sealed(ObjectKind::Session, key).map(drop);
            self.check_object("session", key, read)
        })
    }

    /// A mark that cannot be read condemns its container until a later one takes it back.
    fn check_marks(&mut self) -> Result<()> {
        let store = self.store;
        store.objects().list(names::DAMAGE, |key, _| {
            let Some((container, _)) = names::parse_damage(key) else { return Ok(()) };
            match damage::read(store.objects(), store.sealer(), key) {
                Err(error) if is_damage(&error) && !self.damage.names(container) => {
                    let message = format!("{error}; a later mark stands in its place");
                    self.tell(&Event::Note { object: key.to_owned(), message })
                }
                read => self.check_object("mark", key, read.map(drop)),
            }
        })
    }

    /// Journal entries that are lost: nothing depends on one once all its containers are
    /// recorded elsewhere.
    pub(super) fn name_lost_entries(&mut self) -> Result<()> {
        let lost = std::mem::take(&mut self.lost_entries);
        for (object, why) in &lost {
            if self.unrecorded > 0 {
                self.problem("journal", object, why)?;
            } else {
                let message = format!("{why}; all containers are recorded elsewhere");
                self.tell(&Event::Note { object: object.clone(), message })?;
            }
        }
        Ok(())
    }

    pub(super) fn lost_entry(&mut self, object: String, why: &Error) -> Result<()> {
        if self.lost_entries.len() < super::LOST_ENTRIES {
            self.lost_entries.push((object, why.to_string()));
            return Ok(());
        }
        self.problem("journal", &object, &why.to_string())
    }
}
