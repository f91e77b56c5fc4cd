//! A run: a sorted, read-only LMDB file of fingerprints and addresses. The only file that knows
//! LMDB.
//!
//! A run is written once, by ascending APPEND in bounded transactions, and read in ascending order.
//! The key is the fingerprint, the value the address and two bytes that are zero for now. The last
//! record, behind every fingerprint, is the run's header.

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Bound;
use std::path::{Path, PathBuf};

use heed::types::Bytes;
use heed::{
    CommitOrAbort, Database, Env, EnvFlags, EnvOpenOptions, PutFlags, RoRange, RoTxn, WithoutTls,
};
use rustix::fs::{Advice, fadvise};

use super::memtable::Entry;
use super::records::take;
use crate::error::{Context, Error, Kind, Result};
use crate::ids::{Address, Fingerprint};

/// Bytes of a value: an address and two reserved bytes.
const VALUE: usize = Address::LEN + 2;
/// Sorts behind every fingerprint.
const HEADER_KEY: [u8; Fingerprint::LEN + 1] = [0xff; Fingerprint::LEN + 1];
/// Bytes of the map per entry while writing. Full leaf pages take 42.2; what is above is never
/// touched and costs address space only.
const MAP_PER_ENTRY: u64 = 64;
/// Bytes of the map besides: meta pages, branch pages, pages freed by the last transactions.
const MAP_BESIDES: u64 = 16 << 20;
/// Pages of any platform divide this.
const MAP_UNIT: u64 = 1 << 20;
/// Bytes read ahead of a sweep and let go behind it.
const WINDOW: u64 = 4 << 20;
/// Entries between two looks at the window: about 170 KiB.
const WINDOW_CHECK: u64 = 4096;
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
}

impl RunWriter {
    /// Begins a run of at most `entries` entries at a path that was never used.
    pub(super) fn create(path: PathBuf, entries: u64, txn_entries: usize) -> Result<Self> {
        File::create_new(&path).context(|| format!("cannot create {}", path.display()))?;
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
                Ok(RunWriter { env, pairs, path, txn_entries: txn_entries.max(1), entries: 0 })
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
                let Some((fingerprint, address)) = next()? else {
                    txn.commit().map_err(|e| failed(e, "write", &self.path))?;
                    return Ok(false);
                };
                let mut value = [0; VALUE];
                value[..Address::LEN].copy_from_slice(&address.to_bytes());
                self.pairs
                    .put_with_flags(&mut txn, PutFlags::APPEND, &fingerprint.0, &value)
                    .map_err(|e| failed(e, "append to", &self.path))?;
                self.entries += 1;
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
    pub(super) fn finish(self, header: &[u8]) -> Result<()> {
        let finish = || -> heed::Result<()> {
            let mut txn = self.env.write_txn()?;
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

/// An open run.
pub(super) struct RunReader {
    txn: RoTxn<'static, WithoutTls>,
    pairs: Pairs,
    file: File,
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
            Ok((env.static_read_txn()?, pairs))
        };
        let (txn, pairs) = begin().map_err(|e| failed(e, "open", path))?;
        let message = || format!("index run {} has no database", path.display());
        let pairs = pairs.ok_or_else(|| Error::new(Kind::Damaged, message()))?;
        let opened = || -> std::io::Result<_> {
            let file = File::open(path)?;
            let bytes = file.metadata()?.len();
            Ok((file, bytes))
        };
        let (file, bytes) = opened().context(|| format!("cannot open {}", path.display()))?;
        Ok(RunReader { txn, pairs, file, path: path.into(), bytes, range })
    }

    /// The run's header.
    pub(super) fn header(&self) -> Result<Option<&[u8]>> {
        self.pairs.get(&self.txn, &HEADER_KEY).map_err(|e| failed(e, "read", &self.path))
    }

    /// Whether all of it fits into one window.
    pub(super) fn is_small(&self) -> bool {
        self.bytes <= WINDOW
    }

    /// Looks one fingerprint up.
    pub(super) fn get(&self, fingerprint: &Fingerprint) -> Result<Option<Address>> {
        let value = self.pairs.get(&self.txn, &fingerprint.0);
        match value.map_err(|e| failed(e, "read", &self.path))? {
            Some(value) => address(value, &self.path).map(Some),
            None => Ok(None),
        }
    }

    /// Asks the kernel for all of it, if it is small.
    pub(super) fn prefetch(&self) {
        if self.is_small() {
            // Advice only: without it the reads are slower.
            let _ = fadvise(&self.file, 0, None, Advice::WillNeed);
        }
    }

    /// A sweep over the entries from `first` (or behind it) to `last`.
    pub(super) fn sweep(&self, first: Bound<Fingerprint>, last: Fingerprint) -> Result<Sweep<'_>> {
        let start = match &first {
            Bound::Included(first) => Bound::Included(&first.0[..]),
            Bound::Excluded(first) => Bound::Excluded(&first.0[..]),
            Bound::Unbounded => Bound::Unbounded,
        };
        let range = (start, Bound::Included(&last.0[..]));
        let entries =
            self.pairs.range(&self.txn, &range).map_err(|e| failed(e, "sweep", &self.path))?;
        let at = match &first {
            Bound::Included(first) | Bound::Excluded(first) => self.place(first),
            Bound::Unbounded => 0,
        };
        let end = self.place(&last).saturating_add(WINDOW_SLACK).min(self.bytes);
        let mut sweep = Sweep { run: self, entries, swept: 0, ahead: at, behind: at, end };
        sweep.slide(at);
        Ok(sweep)
    }

    /// About where in the file a fingerprint is: sorted APPEND lays leaves out in order, and
    /// fingerprints are spread evenly over the run's range.
    fn place(&self, fingerprint: &Fingerprint) -> u64 {
        let lead = |f: &Fingerprint| u128::from(u64::from_be_bytes(take(&f.0)));
        let (first, last) = (lead(&self.range.0), lead(&self.range.1));
        let span = (last + 1).saturating_sub(first).max(1);
        let share = lead(fingerprint).saturating_sub(first).min(span);
        (u128::from(self.bytes) * share / span) as u64
    }
}

fn address(value: &[u8], path: &Path) -> Result<Address> {
    match value.first_chunk::<{ Address::LEN }>() {
        Some(bytes) if value.len() == VALUE => Ok(Address::from_bytes(*bytes)),
        _ => {
            let message = format!("index run {} has a value of a wrong size", path.display());
            Err(Error::new(Kind::Damaged, message))
        }
    }
}

/// Entries of a run in ascending order, read ahead and let go in windows.
pub(super) struct Sweep<'r> {
    run: &'r RunReader,
    entries: RoRange<'r, Bytes, Bytes>,
    swept: u64,
    /// Bytes of the file up to which the kernel was asked to read.
    ahead: u64,
    /// Bytes of the file up to which the kernel was told to forget.
    behind: u64,
    /// Where the sweep ends in the file.
    end: u64,
}

impl Sweep<'_> {
    /// The next entry.
    #[allow(clippy::should_implement_trait)] // It can fail.
    #[inline]
    pub(super) fn next(&mut self) -> Result<Option<Entry>> {
        let Some(entry) = self.entries.next() else { return Ok(None) };
        let (key, value) = entry.map_err(|e| failed(e, "sweep", &self.run.path))?;
        let Some(fingerprint) = key.first_chunk() else { return Ok(None) };
        let fingerprint = Fingerprint(*fingerprint);
        self.swept += 1;
        if self.swept.is_multiple_of(WINDOW_CHECK) {
            self.slide(self.run.place(&fingerprint));
        }
        Ok(Some((fingerprint, address(value, &self.run.path)?)))
    }

    /// Keeps a window ahead of `at` in flight and lets go what is more than a window behind.
    /// All of it is advice: if the kernel does not take it, the sweep is slower or fatter.
    fn slide(&mut self, at: u64) {
        let file = &self.run.file;
        while self.ahead < self.end.min(at + WINDOW) {
            let _ = fadvise(file, self.ahead, NonZeroU64::new(WINDOW), Advice::WillNeed);
            self.ahead += WINDOW;
        }
        if !self.run.is_small() && at > self.behind + 2 * WINDOW {
            let length = at - WINDOW - self.behind;
            let _ = fadvise(file, self.behind, NonZeroU64::new(length), Advice::DontNeed);
            self.behind += length;
        }
    }
}
