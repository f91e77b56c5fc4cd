//! A run: a sorted, read-only LMDB file of fingerprints and addresses. The only file that knows
//! LMDB.
//!
//! A run is written once, by ascending APPEND in bounded transactions, and read in ascending order.
//! A record is a group of entries under the fingerprint of its first one. The last record, behind
//! every fingerprint, is the run's header.

use std::fs::File;
use std::ops::Bound;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use heed::types::Bytes;
use heed::{
    CommitOrAbort, Database, Env, EnvFlags, EnvOpenOptions, PutFlags, RoTxn, RwTxn, WithoutTls,
};
use rustix::fs::{Advice, fadvise};

use super::group::{self, GROUP, Packed};
use super::memtable::{Entry, Lead};
use crate::error::{Context, Error, Kind, Result, is_unreadable};
use crate::ids::{Address, Fingerprint};

/// Sorts behind every fingerprint.
const HEADER_KEY: [u8; Fingerprint::LEN + 1] = [0xff; Fingerprint::LEN + 1];
/// Bytes of the map per entry while writing. Full leaf pages take 30.6; what is above is never
/// touched and costs address space only.
const MAP_PER_ENTRY: u64 = 64;
/// Bytes of the map besides: meta pages, branch pages, pages freed by the last transactions.
const MAP_BESIDES: u64 = 16 << 20;
/// Pages of any platform divide this.
const MAP_UNIT: u64 = 1 << 20;
/// Bytes read ahead of a sweep and let go behind it.
pub(super) const WINDOW: u64 = 4 << 20;
/// Entries read at a time: 32 KiB for each of some 13 runs, and a seek for each of them.
pub(super) const BATCH: usize = 16 * GROUP;

type Pairs = Database<'static, Bytes, Bytes>;

fn failed(error: heed::Error, what: &str, path: &Path) -> Error {
    let kind = match &error {
        heed::Error::Mdb(heed::MdbError::MapFull) | heed::Error::Io(_) => Kind::Failed,
        _ => Kind::Damaged,
    };
    Error::caused(kind, format!("cannot {what} index run {}", path.display()), error)
}

/// As [`failed`], of a read: a run that its disk cannot read is damaged. One that cannot be written only is
/// not there yet.
fn unread(error: heed::Error, what: &str, path: &Path) -> Error {
    match error {
        heed::Error::Io(cause) if is_unreadable(&cause) => Error::caused(
            Kind::Damaged,
            format!("cannot {what} index run {}", path.display()),
            cause,
        ),
        other => failed(other, what, path),
    }
}

/// Opens a run. LMDB's own locking is off: a run has one writer, which is done before the first
/// reader comes, and its path is never used again.
fn open(path: &Path, map: Option<u64>, flags: EnvFlags) -> heed::Result<Env<WithoutTls>> {
    let mut options = EnvOpenOptions::new().read_txn_without_tls();
    if let Some(map) = map {
        options.map_size(map as usize);
    }
    let flags = flags | EnvFlags::NO_SUB_DIR | EnvFlags::NO_LOCK | EnvFlags::NO_READ_AHEAD;
    // SAFETY: nobody changes the file under a reader's map: the index directory is locked to one
    // process, a run is opened for reading only after its writer is closed, and it is removed, never
    // truncated. NO_LOCK is sound as writer and readers never meet; NO_SYNC, as an unfinished run
    // is named by no CURRENT file and is removed at the next opening.
    #[allow(unsafe_code)]
    unsafe {
        options.flags(flags);
        options.open(path)
    }
}

fn pairs(env: &Env<WithoutTls>) -> heed::Result<Option<Pairs>> {
    let opened = env.open_databases_and_commit(env.read_txn()?, |opener, txn| {
        opener.open_database::<Bytes, Bytes>(txn, None).map(CommitOrAbort::<_, ()>::Commit)
    })?;
    Ok(opened.commit().flatten())
}

/// Writes a run.
pub(super) struct RunWriter {
    env: Env<WithoutTls>,
    pairs: Pairs,
    path: PathBuf,
    txn_entries: usize,
    entries: u64,
    /// The group that is not full yet.
    group: Vec<Packed>,
}

impl RunWriter {
    /// Begins a run of at most `entries` entries at a path that was never used.
    pub(super) fn create(path: PathBuf, entries: u64, txn_entries: usize) -> Result<Self> {
        let create = File::options().write(true).create_new(true).mode(0o600).open(&path);
        create.context(|| format!("cannot create {}", path.display()))?;
        let map = (entries * MAP_PER_ENTRY + MAP_BESIDES).next_multiple_of(MAP_UNIT);
        let begin = || -> heed::Result<_> {
            let env = open(&path, Some(map), EnvFlags::NO_SYNC)?;
            let txn = env.write_txn()?;
            let created = env.create_databases_and_commit(txn, |opener, txn| {
                opener
                    .create_database::<Bytes, Bytes>(txn, None)
                    .map(CommitOrAbort::<_, ()>::Commit)
            })?;
            Ok(created.commit().map(|pairs| (env, pairs)))
        };
        match begin() {
            Ok(Some((env, pairs))) => {
                let (txn_entries, group) = (txn_entries.max(1), Vec::with_capacity(GROUP));
                Ok(RunWriter { env, pairs, path, txn_entries, entries: 0, group })
            }
            Ok(None) => Err(Error::new(Kind::Failed, "LMDB made no database")),
            Err(error) => Err(failed(error, "create", &path)),
        }
    }

    /// Appends up to `limit` of the ascending entries that `next` gives. False: there are no more.
    pub(super) fn append(
        &mut self,
        limit: usize,
        mut next: impl FnMut() -> Result<Option<Entry>>,
    ) -> Result<bool> {
        let mut left = limit;
        while left > 0 {
            let batch = left.min(self.txn_entries);
            let mut txn = self.env.write_txn().map_err(|e| failed(e, "write", &self.path))?;
            for _ in 0..batch {
                let Some(entry) = next()? else {
                    txn.commit().map_err(|e| failed(e, "write", &self.path))?;
                    return Ok(false);
                };
                self.group.push(group::pack(&entry));
                self.entries += 1;
                if self.group.len() == GROUP {
                    put(&self.pairs, &mut txn, &mut self.group)
                        .map_err(|e| failed(e, "append to", &self.path))?;
                }
            }
            txn.commit().map_err(|e| failed(e, "write", &self.path))?;
            left -= batch;
        }
        Ok(true)
    }

    /// Writes what is dirty to the disk, so that a long merge never has much to sync at its end.
    pub(super) fn sync(&self) -> Result<()> {
        self.env.force_sync().map_err(|e| failed(e, "sync", &self.path))
    }

    /// Entries appended so far.
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// Ends the run with its header; it is durable then, but for its name in the directory.
    pub(super) fn finish(mut self, header: &[u8]) -> Result<()> {
        let mut finish = || -> heed::Result<()> {
            let mut txn = self.env.write_txn()?;
            put(&self.pairs, &mut txn, &mut self.group)?;
            self.pairs.put_with_flags(&mut txn, PutFlags::APPEND, &HEADER_KEY, header)?;
            txn.commit()?;
            self.env.force_sync()
        };
        finish().map_err(|e| failed(e, "finish", &self.path))
    }

    /// Gives the run up and removes its file.
    pub(super) fn discard(self) {
        let RunWriter { env, path, .. } = self;
        drop(env);
        // A leftover is swept at the next opening.
        let _ = std::fs::remove_file(path);
    }
}

/// Appends a group, if there is anything in it, and empties it.
fn put(pairs: &Pairs, txn: &mut RwTxn<'_>, group: &mut Vec<Packed>) -> heed::Result<()> {
    if let Some(first) = group.first() {
        pairs.put_with_flags(txn, PutFlags::APPEND, group::key(first), group.as_flattened())?;
    }
    group.clear();
    Ok(())
}

/// An open run.
pub(super) struct RunReader {
    txn: RoTxn<'static, WithoutTls>,
    pairs: Pairs,
    path: PathBuf,
    bytes: u64,
    /// Where its fingerprints can lie.
    range: (Fingerprint, Fingerprint),
}

impl RunReader {
    /// Opens a finished run whose fingerprints lie in `range`.
    pub(super) fn open(path: &Path, range: (Fingerprint, Fingerprint)) -> Result<Self> {
        let begin = || -> heed::Result<_> {
            let env = open(path, None, EnvFlags::READ_ONLY)?;
            let pairs = pairs(&env)?;
            let bytes = env.real_disk_size()?;
            Ok((env.static_read_txn()?, pairs, bytes))
        };
        let (txn, pairs, bytes) = begin().map_err(|e| unread(e, "open", path))?;
        let message = || format!("index run {} has no database", path.display());
        let pairs = pairs.ok_or_else(|| Error::new(Kind::Damaged, message()))?;
        Ok(RunReader { txn, pairs, path: path.into(), bytes, range })
    }

    /// The run's header.
    pub(super) fn header(&self) -> Result<Option<&[u8]>> {
        self.pairs.get(&self.txn, &HEADER_KEY).map_err(|e| unread(e, "read", &self.path))
    }

    /// Whether all of it fits into one window. Such runs are left in the page cache.
    pub(super) fn is_small(&self) -> bool {
        self.bytes <= WINDOW
    }

    /// Looks one fingerprint up.
    pub(super) fn get(&self, fingerprint: &Fingerprint) -> Result<Option<Address>> {
        let record = self.pairs.get_lower_than_or_equal_to(&self.txn, &fingerprint.0);
        let Some((_, record)) = record.map_err(|e| unread(e, "read", &self.path))? else {
            return Ok(None);
        };
        let group = self.group(record)?;
        let found = group.binary_search_by(|packed| group::key(packed).cmp(&fingerprint.0));
        Ok(found.ok().and_then(|at| group.get(at)).map(|packed| group::unpack(packed).1))
    }

    fn group<'r>(&self, record: &'r [u8]) -> Result<&'r [Packed]> {
        let message = || format!("index run {} has a record that is no group", self.path.display());
        group::group(record).ok_or_else(|| Error::new(Kind::Damaged, message()))
    }

    /// Asks the kernel for all of it, if it is small.
    pub(super) fn prefetch(&self) {
        if self.is_small()
            && let Ok(file) = File::open(&self.path)
        {
            // Advice only: without it the reads are slower.
            let _ = fadvise(&file, 0, None, Advice::WillNeed);
        }
    }

    /// Its file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Length of its file.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where its fingerprints can lie.
    pub(super) fn range(&self) -> (Fingerprint, Fingerprint) {
        self.range
    }

    /// About where in the file a fingerprint is: sorted APPEND lays leaves out in order, and
    /// fingerprints are spread evenly over the run's range.
    pub(super) fn place(&self, fingerprint: &Fingerprint) -> u64 {
        let (first, last) = (u128::from(self.range.0.lead()), u128::from(self.range.1.lead()));
        let span = (last + 1).saturating_sub(first).max(1);
        let share = u128::from(fingerprint.lead()).saturating_sub(first).min(span);
        (u128::from(self.bytes) * share / span) as u64
    }

    /// Appends entries from `first` to `last` to `batch`, up to [`BATCH`] of them.
    pub(super) fn read(
        &self,
        first: Bound<Fingerprint>,
        last: &Fingerprint,
        batch: &mut Vec<Packed>,
    ) -> Result<()> {
        let failed = |e| unread(e, "sweep", &self.path);
        // The first entry may be in the middle of a group.
        let start = match &first {
            Bound::Included(first) | Bound::Excluded(first) => {
                self.pairs.get_lower_than_or_equal_to(&self.txn, &first.0).map_err(failed)?
            }
            Bound::Unbounded => None,
        };
        let start = start.map_or(Bound::Unbounded, |(key, _)| Bound::Included(key));
        let records = self.pairs.range(&self.txn, &(start, Bound::Unbounded)).map_err(failed)?;
        for record in records {
            let (key, record) = record.map_err(failed)?;
            // The header, the last record, has a longer key.
            if key.len() != Fingerprint::LEN {
                break;
            }
            let mut group = self.group(record)?;
            if batch.is_empty() {
                let before = |packed: &Packed| match &first {
                    Bound::Included(first) => *group::key(packed) < first.0[..],
                    Bound::Excluded(first) => *group::key(packed) <= first.0[..],
                    Bound::Unbounded => false,
                };
                group = group.get(group.partition_point(before)..).unwrap_or(&[]);
            }
            if batch.len() + group.len() > BATCH {
                break;
            }
            let beyond = |packed: &Packed| group::lead(packed) > last.lead();
            if group.last().is_some_and(beyond) {
                let end = group.partition_point(|packed| !beyond(packed));
                batch.extend_from_slice(group.get(..end).unwrap_or(&[]));
                break;
            }
            batch.extend_from_slice(group);
        }
        Ok(())
    }
}
