//! Who numbers containers, and which exist: incarnations and their journals.
//!
//! An engine numbers containers within an incarnation, which it claimed by creating
//! `incarnations/<n>`. It goes on with the one of its state directory only when nothing
//! speaks against it; at the slightest doubt it claims the next. So no id is ever used twice.
//!
//! Order: container durable → journal entry durable → its addresses are given to detection
//! and recipes. Whatever refers to a container therefore finds it in a journal, and a
//! watermark {incarnation → n} says exactly what an index has seen.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::container::ContainerKind;
use super::format::{ObjectKind, SEALED_MAX, Sealer, damaged, le32, le64, random};
use super::names;
use super::objects::{Created, Objects};
use crate::error::{Context, Error, Kind, Result};
use crate::ids::{ContainerId, Incarnation, StoreId};

/// Numbers reserved by one write of the state file: about 1 GiB of containers. A crash skips them.
const BATCH: u32 = 64;
/// Containers in one journal entry at most: what a rewriting job records at once.
const ENTRIES_MAX: usize = 4096;
/// Bytes of one container in an entry: incarnation u32, counter u32, generation u32, kind u32,
/// slots u32, last counter in the object u32, stored bytes u64.
const ENTRY_LEN: usize = 32;
/// Claims tried in a row: so many engines would have to start at the same moment.
const CLAIMS: u32 = 1000;
/// The state file.
const STATE: &str = "incarnation.toml";
/// The file that one engine at a time has locked.
const LOCK: &str = "lock";

/// A place in the journals: everything up to entry `n` of an incarnation. `n` counts from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Position {
    /// Whose journal.
    pub incarnation: Incarnation,
    /// The entry.
    pub n: u32,
}

/// A container that was sealed or rewritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Which.
    pub container: ContainerId,
    /// As what.
    pub generation: u32,
    /// What its slots hold.
    pub kind: ContainerKind,
    /// How many.
    pub slots: u32,
    /// The last container of the object that holds it: its own number, unless small ones share one.
    pub last_in_object: u32,
    /// Bytes of its section.
    pub stored_bytes: u64,
}

/// Reads the journals of all engines.
#[derive(Clone)]
pub struct Journals {
    objects: Objects,
    sealer: Sealer,
}

impl Journals {
    /// Of the store of `sealer`.
    #[must_use]
    pub fn new(objects: Objects, sealer: Sealer) -> Self {
        Journals { objects, sealer }
    }

    /// All incarnations that were ever claimed, ascending; also those whose claim is missing,
    /// as long as a journal or a container of theirs is there.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn incarnations(&self) -> Result<Vec<Incarnation>> {
        let mut all = BTreeSet::new();
        self.objects.list(names::INCARNATIONS, |key, _| {
            all.extend(names::parse_incarnation(key));
            Ok(())
        })?;
        for folder in [names::JOURNAL, names::CONTAINERS] {
            let folders = self.objects.list_dirs(folder)?;
            all.extend(folders.iter().filter_map(|name| names::parse_incarnation_folder(name)));
        }
        Ok(all.into_iter().collect())
    }

    /// Makes sure that the claim of an incarnation can be read.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Damaged`].
    pub fn check_claim(&self, incarnation: Incarnation) -> Result<()> {
        let key = names::incarnation(incarnation);
        let bytes = self.objects.read_all(&key, SEALED_MAX)?;
        let plain = self.sealer.open(ObjectKind::Incarnation, &key, &bytes)?;
        match serde_json::from_slice::<Claim>(&plain) {
            Ok(_) => Ok(()),
            Err(_) => Err(damaged(&key, "it does not read as a claim")),
        }
    }

    /// Claims an incarnation whose claim is missing for nobody: no engine goes on with it, and
    /// none claims it anew. True if it was missing.
    ///
    /// # Errors
    /// When the claim cannot be created.
    pub fn heal_claim(&self, incarnation: Incarnation) -> Result<bool> {
        let claim = Claim { machine: String::new(), token: String::new() };
        let plain = serde_json::to_vec(&claim).context(|| "cannot write a claim".into())?;
        let key = names::incarnation(incarnation);
        let bytes = self.sealer.seal(ObjectKind::Incarnation, &key, &plain)?;
        Ok(self.objects.create(&key, bytes)? == Created::Ours)
    }

    /// One entry; `None` when the journal does not go so far.
    ///
    /// # Errors
    /// [`Kind::Damaged`]; when it cannot be read.
    pub fn read(&self, position: Position) -> Result<Option<Vec<Entry>>> {
        let key = names::journal(position.incarnation, position.n);
        let bytes = match self.objects.read_all(&key, SEALED_MAX) {
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            bytes => bytes?,
        };
        let plain = self.sealer.open(ObjectKind::Journal, &key, &bytes)?;
        decode_entries(&plain)
            .map(Some)
            .ok_or_else(|| damaged(&key, "it does not read as a journal entry"))
    }

    /// Calls `each` for the entries of an incarnation after entry `n`, in order, and returns
    /// the number of the last one.
    ///
    /// # Errors
    /// [`Kind::Damaged`], or the first of `each`.
    pub fn each_after(
        &self,
        incarnation: Incarnation,
        n: u32,
        mut each: impl FnMut(Position, &[Entry]) -> Result<()>,
    ) -> Result<u32> {
        let mut last = n;
        while let Some(next) = last.checked_add(1) {
            let position = Position { incarnation, n: next };
            let Some(entries) = self.read(position)? else { break };
            each(position, &entries)?;
            last = next;
        }
        Ok(last)
    }
}

/// Numbers containers and records them. One per engine and state directory.
pub struct Journal {
    journals: Journals,
    file: PathBuf,
    incarnation: Incarnation,
    /// The last entry that certainly exists; changes only under `writing`.
    last: AtomicU32,
    /// Held while an entry is created: that is what makes the journal free of gaps.
    writing: Mutex<()>,
    counter: Mutex<Counter>,
    /// Held locked for the life of the engine.
    _lock: fs::File,
}

struct Counter {
    state: State,
    next: u32,
}

/// What the state directory remembers of the claim.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct State {
    store: StoreId,
    machine: String,
    incarnation: Incarnation,
    token: String,
    /// Container numbers up to here may have been given out.
    reserved: u32,
    /// Journal entries up to here certainly exist.
    journal: u32,
    /// crc32c of all the above.
    checksum: u32,
}

/// The content of a claim.
#[derive(Serialize, Deserialize)]
struct Claim {
    machine: String,
    token: String,
}

impl Journal {
    /// Goes on with the incarnation of the state directory, or claims one.
    ///
    /// # Errors
    /// [`Kind::Busy`] when another engine uses the directory; when nothing can be claimed.
    pub fn open(journals: Journals, state_dir: &Path) -> Result<Self> {
        let lock = lock_directory(state_dir)?;
        let file = state_dir.join(STATE);
        let kept = match State::load(&file) {
            Some(state) => journals.check(&state)?.map(|last| (state, last)),
            None => None,
        };
        let (state, last) = match kept {
            Some(kept) => kept,
            None => (journals.claim()?, 0),
        };
        // What was reserved may have been given out before a crash: it is skipped.
        let next = state.reserved;
        let journal = Journal {
            journals,
            file,
            incarnation: state.incarnation,
            last: AtomicU32::new(last),
            writing: Mutex::new(()),
            counter: Mutex::new(Counter { state, next }),
            _lock: lock,
        };
        lock_mutex(&journal.counter).state.save(&journal.file)?;
        Ok(journal)
    }

    /// The incarnation in which this engine numbers.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The last entry of this engine's journal.
    #[must_use]
    pub fn last(&self) -> Position {
        Position { incarnation: self.incarnation, n: self.last.load(Ordering::Acquire) }
    }

    /// A container id that was never given out before.
    ///
    /// # Errors
    /// When the state directory cannot be written, or all numbers are used up.
    pub fn next_container(&self) -> Result<ContainerId> {
        let mut counter = lock_mutex(&self.counter);
        let used_up = || {
            Error::new(
                Kind::Failed,
                "all container numbers are used up: restart the engine without its state directory's incarnation.toml",
            )
        };
        if counter.next >= counter.state.reserved {
            let reserved = counter.next.checked_add(BATCH).ok_or_else(used_up)?;
            let state = State { reserved, journal: self.last().n, ..counter.state.clone() };
            state.save(&self.file)?;
            counter.state = state;
        }
        counter.next += 1;
        Ok(ContainerId { incarnation: self.incarnation, counter: counter.next })
    }

    /// Records a durable container; returns the entry's place.
    ///
    /// # Errors
    /// When the entry cannot be made durable: the container must not be referred to.
    pub fn record(&self, entry: Entry) -> Result<Position> {
        self.record_all(&[entry])
    }

    /// Records durable containers in one entry.
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub fn record_all(&self, entries: &[Entry]) -> Result<Position> {
        if entries.is_empty() || entries.len() > ENTRIES_MAX {
            return Err(Error::new(
                Kind::Failed,
                "a journal entry of no or too many containers (a bug)",
            ));
        }
        let plain = encode_entries(entries);
        let _writing = lock_mutex(&self.writing);
        loop {
            let position = Position { incarnation: self.incarnation, n: self.last().n + 1 };
            let key = names::journal(position.incarnation, position.n);
            let bytes = self.journals.sealer.seal(ObjectKind::Journal, &key, &plain)?;
            let created = self.journals.objects.create(&key, bytes)?;
            self.last.store(position.n, Ordering::Release);
            if created == Created::Ours {
                return Ok(position);
            }
            // An entry of ours that failed ambiguously before; its containers were durable, too.
        }
    }
}

impl Journals {
    /// The last journal entry of the incarnation, if the state may be gone on with. `None` is doubt.
    fn check(&self, state: &State) -> Result<Option<u32>> {
        if state.store != self.sealer.key().store() || state.machine != machine_id() {
            return Ok(None);
        }
        let key = names::incarnation(state.incarnation);
        let claim = match self.objects.read_all(&key, SEALED_MAX) {
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Damaged) => {
                return Ok(None);
            }
            claim => claim?,
        };
        let claim = self.sealer.open(ObjectKind::Incarnation, &key, &claim).ok();
        let claim = claim.and_then(|plain| serde_json::from_slice::<Claim>(&plain).ok());
        if claim.is_none_or(|claim| claim.token != state.token) {
            return Ok(None);
        }
        // A number beyond the reserved ones: the state directory was set back.
        let mut set_back = false;
        let last = self.each_after(state.incarnation, state.journal, |_, entries| {
            set_back |= entries.iter().any(|entry| {
                entry.container.incarnation == state.incarnation
                    && entry.container.counter > state.reserved
            });
            Ok(())
        });
        match last {
            Ok(last) if !set_back => Ok(Some(last)),
            Err(error) if error.kind() != Kind::Damaged => Err(error),
            _ => Ok(None),
        }
    }

    /// Claims the incarnation after the last one.
    fn claim(&self) -> Result<State> {
        let machine = machine_id();
        let token = random::<16>()?.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let claim = Claim { machine: machine.clone(), token: token.clone() };
        let plain = serde_json::to_vec(&claim).context(|| "cannot write a claim".into())?;
        let last = self.incarnations()?.last().map_or(0, |last| last.0);
        for n in (last..u32::MAX).take(CLAIMS as usize) {
            let incarnation = Incarnation(n + 1);
            let key = names::incarnation(incarnation);
            let bytes = self.sealer.seal(ObjectKind::Incarnation, &key, &plain)?;
            if self.objects.create(&key, bytes)? == Created::Ours {
                let store = self.sealer.key().store();
                return Ok(State {
                    store,
                    machine,
                    incarnation,
                    token,
                    reserved: 0,
                    journal: 0,
                    checksum: 0,
                });
            }
        }
        Err(Error::new(
            Kind::Failed,
            format!("cannot claim an incarnation after {last}: all keys are taken"),
        ))
    }
}

impl State {
    fn sum(&self) -> u32 {
        let State { store, machine, incarnation, token, reserved, journal, checksum: _ } = self;
        let all = format!("{store}\n{machine}\n{}\n{token}\n{reserved}\n{journal}", incarnation.0);
        crc32c::crc32c(all.as_bytes())
    }

    /// `None` when it is missing or anything is wrong with it.
    fn load(file: &Path) -> Option<Self> {
        Self::decode(&fs::read_to_string(file).ok()?)
    }

    fn decode(text: &str) -> Option<Self> {
        let state: State = toml::from_str(text).ok()?;
        (state.checksum == state.sum()).then_some(state)
    }

    /// Replaces the file atomically.
    fn save(&self, file: &Path) -> Result<()> {
        let failed =
            || format!("cannot write {}: the engine needs its state directory", file.display());
        let state = State { checksum: self.sum(), ..self.clone() };
        let text = toml::to_string(&state).context(failed)?;
        let new = file.with_extension("new");
        let mut options = fs::OpenOptions::new();
        let mut out = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .context(failed)?;
        out.write_all(text.as_bytes()).context(failed)?;
        out.sync_all().context(failed)?;
        fs::rename(&new, file).context(failed)?;
        let folder = file.parent().unwrap_or(Path::new("."));
        fs::File::open(folder).and_then(|folder| folder.sync_all()).context(failed)
    }
}

/// What tells a machine from its clone; empty where the system has none.
fn machine_id() -> String {
    fs::read_to_string("/etc/machine-id").unwrap_or_default().trim().to_owned()
}

fn lock_directory(state_dir: &Path) -> Result<fs::File> {
    let failed = || format!("cannot use the state directory {}", state_dir.display());
    fs::create_dir_all(state_dir).context(failed)?;
    let mut options = fs::OpenOptions::new();
    let path = state_dir.join(LOCK);
    let file =
        options.write(true).create(true).truncate(false).mode(0o600).open(&path).context(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let what = format!("another engine uses the state directory {}", state_dir.display());
            Err(Error::new(
                Kind::Busy,
                format!("{what}: stop it, or give this one its own --state-dir"),
            ))
        }
        Err(error) => Err(error).context(failed),
    }
}

fn lock_mutex<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind it changes only after what it stands for has happened.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Number of containers u32, then [`ENTRY_LEN`] bytes for each.
pub(super) fn encode_entries(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4 + entries.len() * ENTRY_LEN);
    bytes.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    for entry in entries {
        let kind: u32 = match entry.kind {
            ContainerKind::Blocks => 0,
            ContainerKind::Nodes => 1,
        };
        let id = entry.container;
        for number in [
            id.incarnation.0,
            id.counter,
            entry.generation,
            kind,
            entry.slots,
            entry.last_in_object,
        ] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&entry.stored_bytes.to_le_bytes());
    }
    bytes
}

/// Whether a state file's text is one, for the fuzzer.
#[cfg(any(test, fuzzing))]
pub(super) fn decode_state(text: &str) -> bool {
    State::decode(text).is_some()
}

pub(super) fn decode_entries(bytes: &[u8]) -> Option<Vec<Entry>> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let (entries, rest) = rest.as_chunks::<ENTRY_LEN>();
    if !rest.is_empty() || entries.len() != u32::from_le_bytes(*count) as usize {
        return None;
    }
    entries
        .iter()
        .map(|entry| {
            let kind = match le32(entry, 12) {
                0 => ContainerKind::Blocks,
                1 => ContainerKind::Nodes,
                _ => return None,
            };
            Some(Entry {
                container: ContainerId {
                    incarnation: Incarnation(le32(entry, 0)),
                    counter: le32(entry, 4),
                },
                generation: le32(entry, 8),
                kind,
                slots: le32(entry, 16),
                last_in_object: le32(entry, 20),
                stored_bytes: le64(entry, 24),
            })
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
