//! A run: a sorted, read-only LMDB file of fingerprints and addresses. The only file that knows
//! LMDB.
//!
//! A run is written once, by ascending APPEND in bounded transactions, and read in ascending order.
//! A record is a group of entries under the fingerprint of its first one. The last record, behind
//! every fingerprint, is the run's header.

use std::fs::File;
use std::num::NonZeroU64;
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
use crate::error::{Context, Error, Kind, Result};
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
const WINDOW: u64 = 4 << 20;
/// Bytes after which a sweep renews its map, to let go what is behind it: so much of a run is
/// mapped at most. Renewing takes some 50 microseconds.
const MAPPED: u64 = 4 * WINDOW;
/// Entries read at a time: 32 KiB for each of some 17 runs, and a seek for each of them.
const BATCH: usize = 16 * GROUP;
/// Bytes by which a place in the file may be guessed wrongly.
const WINDOW_SLACK: u64 = 256 << 10;

type Pairs = Database<'static, Bytes, Bytes>;

fn failed(error: heed::Error, what: &str, path: &Path) -> Error {
    let kind = match &error {
        heed::Error::Mdb(heed::MdbError::MapFull) | heed::Error::Io(_) => Kind::Failed,
        _ => Kind::Damaged,
    };
    Error::caused(kind, format!("cannot {what} index run {}", path.display()), error)
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
        let (txn, pairs, bytes) = begin().map_err(|e| failed(e, "open", path))?;
        let message = || format!("index run {} has no database", path.display());
        let pairs = pairs.ok_or_else(|| Error::new(Kind::Damaged, message()))?;
        Ok(RunReader { txn, pairs, path: path.into(), bytes, range })
    }

    /// The run's header.
    pub(super) fn header(&self) -> Result<Option<&[u8]>> {
        self.pairs.get(&self.txn, &HEADER_KEY).map_err(|e| failed(e, "read", &self.path))
    }

    /// Whether all of it fits into one window. Such runs are left in the page cache.
    pub(super) fn is_small(&self) -> bool {
        self.bytes <= WINDOW
    }

    /// Looks one fingerprint up.
    pub(super) fn get(&self, fingerprint: &Fingerprint) -> Result<Option<Address>> {
        let record = self.pairs.get_lower_than_or_equal_to(&self.txn, &fingerprint.0);
        let Some((_, record)) = record.map_err(|e| failed(e, "read", &self.path))? else {
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

    /// A sweep over the entries from `first` (or behind it) to `last`.
    pub(super) fn sweep(self, first: Bound<Fingerprint>, last: Fingerprint) -> Result<Sweep> {
        let file =
            File::open(&self.path).context(|| format!("cannot open {}", self.path.display()))?;
        let at = match &first {
            Bound::Included(first) | Bound::Excluded(first) => self.place(first),
            Bound::Unbounded => 0,
        };
        let end = self.place(&last).saturating_add(WINDOW_SLACK).min(self.bytes);
        let (path, range, small) = (self.path.clone(), self.range, self.is_small());
        Ok(Sweep {
            run: Some(self),
            file,
            path,
            range,
            small,
            next: first,
            last,
            batch: Vec::new(),
            taken: 0,
            ahead: at,
            behind: at,
            end,
        })
    }

    /// About where in the file a fingerprint is: sorted APPEND lays leaves out in order, and
    /// fingerprints are spread evenly over the run's range.
    fn place(&self, fingerprint: &Fingerprint) -> u64 {
        let (first, last) = (u128::from(self.range.0.lead()), u128::from(self.range.1.lead()));
        let span = (last + 1).saturating_sub(first).max(1);
        let share = u128::from(fingerprint.lead()).saturating_sub(first).min(span);
        (u128::from(self.bytes) * share / span) as u64
    }

    /// Appends entries from `first` to `last` to `batch`, up to [`BATCH`] of them.
    fn read(
        &self,
        first: Bound<Fingerprint>,
        last: &Fingerprint,
        batch: &mut Vec<Packed>,
    ) -> Result<()> {
        let failed = |e| failed(e, "sweep", &self.path);
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
            let group = self.group(record)?;
            let begin = group.partition_point(|packed| match &first {
                Bound::Included(first) => *group::key(packed) < first.0[..],
                Bound::Excluded(first) => *group::key(packed) <= first.0[..],
                Bound::Unbounded => false,
            });
            let end = group.partition_point(|packed| group::lead(packed) <= last.lead());
            if end == 0 || batch.len() + GROUP > BATCH {
                break;
            }
            batch.extend_from_slice(group.get(begin..end).unwrap_or(&[]));
        }
        Ok(())
    }
}

/// Entries of a run in ascending order.
///
/// They are read in batches, so that between two of them the map can be renewed: pages that are
/// mapped cannot be let go, and a large run would fill the memory with pages of no more use.
pub(super) struct Sweep {
    run: Option<RunReader>,
    file: File,
    path: PathBuf,
    range: (Fingerprint, Fingerprint),
    small: bool,
    /// Where the next batch begins.
    next: Bound<Fingerprint>,
    last: Fingerprint,
    batch: Vec<Packed>,
    taken: usize,
    /// Bytes of the file up to which the kernel was asked to read.
    ahead: u64,
    /// Bytes of the file up to which the kernel was told to forget.
    behind: u64,
    /// Where the sweep ends in the file.
    end: u64,
}

impl Sweep {
    /// The next entry.
    #[allow(clippy::should_implement_trait)] // It can fail.
    #[inline]
    pub(super) fn next(&mut self) -> Result<Option<Entry>> {
        if self.taken == self.batch.len() {
            self.fill()?;
        }
        let entry = self.batch.get(self.taken).map(group::unpack);
        self.taken += usize::from(entry.is_some());
        Ok(entry)
    }

    /// Steps over what is before `fingerprint`; where its block is, if it comes next.
    #[inline]
    pub(super) fn seek_forward(&mut self, fingerprint: &Fingerprint) -> Result<Option<Address>> {
        let wanted = fingerprint.lead();
        loop {
            let rest = self.batch.get(self.taken..).unwrap_or(&[]);
            let before = |packed: &Packed| {
                let lead = group::lead(packed);
                lead < wanted || (lead == wanted && *group::key(packed) < fingerprint.0[..])
            };
            if let Some(steps) = rest.iter().position(|packed| !before(packed)) {
                self.taken += steps;
                let found = rest.get(steps).filter(|p| *group::key(p) == fingerprint.0[..]);
                return Ok(found.map(|packed| group::unpack(packed).1));
            }
            self.fill()?;
            if self.batch.is_empty() {
                return Ok(None);
            }
        }
    }

    /// Reads the next batch; an empty one at the end.
    fn fill(&mut self) -> Result<()> {
        self.batch.clear();
        self.taken = 0;
        self.slide()?;
        let Some(run) = &self.run else { return Ok(()) };
        self.batch.reserve_exact(BATCH);
        run.read(self.next, &self.last, &mut self.batch)?;
        match self.batch.last() {
            Some(packed) => self.next = Bound::Excluded(group::unpack(packed).0),
            None => {
                self.run = None;
                self.forget(self.end);
            }
        }
        Ok(())
    }

    /// Keeps a window ahead of us in flight, and lets go what is behind us.
    fn slide(&mut self) -> Result<()> {
        let Some(run) = &self.run else { return Ok(()) };
        let at = match &self.next {
            Bound::Included(next) | Bound::Excluded(next) => run.place(next),
            Bound::Unbounded => 0,
        };
        while self.ahead < self.end.min(at + WINDOW) {
            // Advice only: if the kernel does not take it, the sweep is slower.
            let _ = fadvise(&self.file, self.ahead, NonZeroU64::new(WINDOW), Advice::WillNeed);
            self.ahead += WINDOW;
        }
        if !self.small && at > self.behind + MAPPED {
            self.run = None;
            self.forget(at);
            self.run = Some(RunReader::open(&self.path, self.range)?);
        }
        Ok(())
    }

    /// Lets the page cache before `at` go, which must not be mapped. Small runs stay.
    fn forget(&mut self, at: u64) {
        if let Some(length) = NonZeroU64::new(at.saturating_sub(self.behind))
            && !self.small
        {
            // Advice only: if the kernel does not take it, the page cache is fatter.
            let _ = fadvise(&self.file, self.behind, Some(length), Advice::DontNeed);
            self.behind = at;
        }
    }
}
