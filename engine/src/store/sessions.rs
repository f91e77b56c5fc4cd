//! Session objects: who is at work on what, for garbage collection.
//!
//! A backup creates one before anything else: its parent is a root until the session is
//! over. Hosts only create, so they leave it there: a backup is over when its commit
//! key exists, a reader when its time is up; then the keeper tidies it away. Body: `S`, version 1, JSON.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::commit::{Manifests, SnapshotKey};
use super::format::{ObjectKind, SEALED_MAX, random};
use super::manifest::{id_text, optional_id_text};
use super::names;
use super::objects::Created;
use crate::error::{Error, Kind, Result};
use crate::ids::{SnapshotId, VmId};

const MAGIC: [u8; 2] = *b"S\x01";
/// Folder of the readers, beside the folders of the VMs.
const READERS: &str = "readers";

/// What a session object says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SessionRecord {
    /// The snapshot that is being made, or read.
    #[serde(with = "id_text")]
    pub snapshot: SnapshotId,
    /// The VM.
    pub vm: VmId,
    /// The VM's name.
    pub vm_name: String,
    /// The sequence of the snapshot.
    pub seq: u64,
    /// The snapshot whose tree is shared.
    #[serde(with = "optional_id_text")]
    pub parent: Option<SnapshotId>,
    /// The host of the engine.
    pub host: String,
    /// The engine's version.
    pub engine: String,
    /// The epoch of garbage collection at the start.
    pub gc_epoch: u64,
    /// Unix milliseconds.
    pub started_ms: i64,
    /// When a reader gives up at the latest, Unix milliseconds; null for a backup.
    pub expires_ms: Option<i64>,
}

impl SessionRecord {
    /// Reads a body; `name` is the object's, for messages.
    pub(super) fn decode(body: &[u8], name: &str) -> Result<Self> {
        let text = body.strip_prefix(&MAGIC).ok_or_else(|| {
            Error::new(Kind::Damaged, format!("object {name} is no session of this version"))
        })?;
        serde_json::from_slice(text).map_err(|error| {
            Error::caused(Kind::Damaged, format!("object {name} is no session"), error)
        })
    }

    /// The commit key that ends the session.
    #[must_use]
    pub fn key(&self) -> SnapshotKey {
        SnapshotKey { vm: self.vm, seq: self.seq, snapshot: self.snapshot }
    }
}

impl Manifests {
    /// Registers a backup at its start; false when its key is taken: choose another id.
    ///
    /// # Errors
    /// When the object cannot be created.
    pub fn begin_session(&self, session: &SessionRecord) -> Result<bool> {
        let key = names::session(session.vm, session.seq, session.snapshot);
        Ok(self.create_session(&key, session)? == Created::Ours)
    }

    /// Registers a reader (restore, serve); `session.expires_ms` says until when.
    ///
    /// # Errors
    /// When the object cannot be created.
    pub fn begin_reader(&self, session: &SessionRecord) -> Result<()> {
        let unique = u64::from_le_bytes(random()?);
        let key = format!("{}/{READERS}/{unique:016x}", names::SESSIONS);
        match self.create_session(&key, session)? {
            Created::Ours => Ok(()),
            Created::Exists => {
                Err(Error::new(Kind::Failed, format!("object {key} exists already")))
            }
        }
    }

    fn create_session(&self, key: &str, session: &SessionRecord) -> Result<Created> {
        let mut body = MAGIC.to_vec();
        serde_json::to_writer(&mut body, session)
            .map_err(|error| Error::caused(Kind::Failed, "cannot encode a session", error))?;
        let sealed = self.sealer().seal(ObjectKind::Session, key, &body)?;
        self.objects().create(key, Bytes::from(sealed))
    }

    /// Reads the session object of a snapshot.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`].
    pub fn session(&self, key: &SnapshotKey) -> Result<SessionRecord> {
        self.session_at(&names::session(key.vm, key.seq, key.snapshot))
    }

    fn session_at(&self, name: &str) -> Result<SessionRecord> {
        let bytes = self.objects().read_all(name, SEALED_MAX)?;
        SessionRecord::decode(&self.sealer().open(ObjectKind::Session, name, &bytes)?, name)
    }

    /// The sessions of a VM that began and have neither committed nor ended: alive, or dead
    /// without a word. Memory is proportional to them alone: what has ended is passed over.
    ///
    /// # Errors
    /// When the keys cannot be listed.
    pub fn open_sessions(&self, vm: VmId) -> Result<Vec<SnapshotKey>> {
        let mut open = Vec::new();
        self.each_session(vm, |session, is_over| {
            if !is_over {
                open.push(session);
            }
            Ok(())
        })?;
        Ok(open)
    }

    /// Calls `each` with every session of a VM that began, ascending, and whether its commit key exists.
    ///
    /// # Errors
    /// When the keys cannot be listed, or the first of `each`.
    pub fn each_session(
        &self,
        vm: VmId,
        mut each: impl FnMut(SnapshotKey, bool) -> Result<()>,
    ) -> Result<()> {
        let mut begun = self.sorted_keys(names::SESSIONS, vm)?;
        let mut ended = self.sorted_keys(names::MANIFESTS, vm)?;
        let mut end = ended.next_key()?;
        while let Some(session) = begun.next_key()? {
            while end.is_some_and(|end| end < session) {
                end = ended.next_key()?;
            }
            each(session, end == Some(session))?;
        }
        Ok(())
    }

    /// The VMs of which sessions began, in order.
    ///
    /// # Errors
    /// When the folders cannot be listed.
    pub fn vms_with_sessions(&self) -> Result<Vec<VmId>> {
        self.vms_in(names::SESSIONS)
    }

    /// Calls `each` with the key of every registered reader and what it says.
    ///
    /// # Errors
    /// When they cannot be listed, or the first of `each`.
    pub fn each_reader(
        &self,
        mut each: impl FnMut(&str, Result<SessionRecord>) -> Result<()>,
    ) -> Result<()> {
        let folder = format!("{}/{READERS}", names::SESSIONS);
        self.objects().list(&folder, |name, _| each(name, self.session_at(name)))
    }
}
