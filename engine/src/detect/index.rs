//! The index of one host: memtable, young runs, deltas and bases, newest first.
//!
//! | level | of | comes from | written |
//! |---|---|---|---|
//! | memtable | all partitions | sealed containers | in memory; refilled from the journals after a crash |
//! | young | all partitions | a full memtable | one run |
//! | delta | a partition | all young runs, merged; light deltas, merged | one run per partition |
//! | base | a partition | base and deltas, merged | one run |
//!
//! A run is synced before CURRENT names it; CURRENT is synced before the runs that it no longer
//! names are removed. Nothing else is synced, and a crash in between leaves the old index and a
//! file that the next opening sweeps away.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use rustix::fs::{Advice, fadvise};

use super::compaction::Work;
use super::current::{Current, Identity, Level, RunMeta, range_of, run_number, run_path};
use super::duplicates::Duplicates;
use super::header::Header;
use super::lookup::OpenRun;
use super::memtable::{Entry, Memtable};
use super::rebuild::Rebuilt;
use super::shard::{RunReader, RunWriter};
use super::watermark::Applied;
use super::{DetectOptions, JournalPosition, Partition, Watermark};
use crate::error::{Context, Error, Kind, Result, is_unreadable};
use crate::ids::Fingerprint;

/// Where an index goes that is of no use; kept until the next opening for whoever wants to see why.
const ASIDE: &str = "aside";
/// Directories of scratch files, one for each opening.
const SCRATCH: &str = "scratch-";
/// Held by the one process that uses the directory.
const LOCK: &str = "LOCK";
/// Bytes read at a time to check a run.
const CHECK_READ: usize = 256 << 10;

/// All that is known of where blocks are.
pub(super) struct Index {
    pub(super) dir: PathBuf,
    pub(super) options: DetectOptions,
    pub(super) current: Current,
    memtable: Memtable,
    applied: Applied,
    /// What was learned since a rebuild began.
    since: Applied,
    rebuilding: Weak<()>,
    /// Young runs below this number hold nothing that a rebuild did not read itself.
    rebuilt_from: u64,
    /// Runs whose checksum this process has seen to be right.
    checked: BTreeSet<u64>,
    pub(super) work: Option<Work>,
    /// Second addresses met in the memtable: with it they become durable.
    fresh_duplicates: Duplicates,
    _lock: File,
}

impl Index {
    /// Opens the index in `dir`, or sets it aside and begins an empty one; says why, if so.
    pub(super) fn open(dir: &Path, options: DetectOptions) -> Result<(Self, Option<String>)> {
        create_dir(dir)?;
        let lock = lock(dir)?;
        let identity = Identity::of(&options);
        let (mut current, useless) = match load(dir, &identity)? {
            Ok(Some(current)) => (current, None),
            Ok(None) => (Current::new(identity, first_instance()?), None),
            Err(why) => (Current::new(identity, first_instance()?), Some(why)),
        };
        if useless.is_some() {
            set_aside(dir)?;
        }
        let highest = sweep(dir, &current, useless.is_none())?;
        current.next_run = current.next_run.max(highest + 1);
        current.instance += 1;
        current.store(dir)?;
        let index = Index {
            dir: dir.into(),
            options,
            applied: Applied::up_to(current.watermark.clone()),
            current,
            memtable: Memtable::default(),
            since: Applied::default(),
            rebuilding: Weak::new(),
            rebuilt_from: 0,
            checked: BTreeSet::new(),
            work: None,
            fresh_duplicates: Duplicates::default(),
            _lock: lock,
        };
        Ok((index, useless))
    }

    /// A directory for this opening's scratch files.
    pub(super) fn scratch(&self) -> Result<PathBuf> {
        let path = self.dir.join(format!("{SCRATCH}{}", self.current.instance));
        create_dir(&path)?;
        Ok(path)
    }

    /// Up to where all was learned.
    pub(super) fn applied(&self) -> &Watermark {
        self.applied.mark()
    }

    /// Takes entries in; sorts them in place.
    pub(super) fn learn(&mut self, entries: &mut [Entry], position: JournalPosition) -> Result<()> {
        entries.sort_unstable_by_key(|(fingerprint, _)| *fingerprint);
        let capacity = self.options.memtable_entries.max(1);
        for part in entries.chunks_mut(capacity) {
            if self.memtable.len() + part.len() > capacity {
                self.freeze()?;
            }
            let (options, duplicates) = (&self.options, &mut self.fresh_duplicates);
            self.memtable.insert(part, &mut |fingerprint| {
                duplicates.add(options.partition_of(fingerprint), 1);
            });
        }
        // Only now: a young run that was frozen above does not have all of this position yet.
        self.applied.add(position.incarnation, position.n, position.n);
        if self.is_rebuilding() {
            self.since.add(position.incarnation, position.n, position.n);
        }
        Ok(())
    }

    /// Makes the memtable a young run, and the watermark durable.
    pub(super) fn freeze(&mut self) -> Result<()> {
        if self.memtable.len() == 0 && self.current.watermark == *self.applied.mark() {
            return Ok(());
        }
        let mut next = self.current.clone();
        next.watermark = self.applied.mark().clone();
        next.duplicates.add_all(&self.fresh_duplicates);
        if self.memtable.len() > 0 {
            let number = self.new_number();
            let entries = self.memtable.len();
            let path = run_path(&self.dir, number);
            let mut writer = RunWriter::create(path, entries as u64, self.options.txn_entries)?;
            let mut left = self.memtable.entries().iter();
            if let Err(error) = writer.append(entries, || Ok(left.next().copied())) {
                writer.discard();
                return Err(error);
            }
            let run = self.finish_run(writer, number, Level::Young, &next.watermark)?;
            next.runs.push(run);
        }
        self.replace(next)?;
        self.memtable.clear();
        self.fresh_duplicates = Duplicates::default();
        Ok(())
    }

    /// A number, and so a path, that was never used.
    pub(super) fn new_number(&mut self) -> u64 {
        let number = self.current.next_run;
        self.current.next_run += 1;
        number
    }

    /// Ends a run; CURRENT may name it afterwards.
    pub(super) fn finish_run(
        &mut self,
        writer: RunWriter,
        number: u64,
        level: Level,
        watermark: &Watermark,
    ) -> Result<RunMeta> {
        let identity = self.current.identity;
        let run = finish_run(&self.dir, writer, number, level, identity, watermark)?;
        self.checked.insert(number);
        Ok(run)
    }

    /// Makes `next` the index; then removes the runs that it no longer names.
    pub(super) fn replace(&mut self, mut next: Current) -> Result<()> {
        next.runs.sort_by_key(|run| run.number);
        next.next_run = self.current.next_run;
        next.store(&self.dir)?;
        let old = std::mem::replace(&mut self.current, next);
        for run in old.runs {
            if self.current.runs.binary_search_by_key(&run.number, |r| r.number).is_err() {
                self.checked.remove(&run.number);
                // A leftover is swept at the next opening.
                let _ = fs::remove_file(run.path(&self.dir));
            }
        }
        Ok(())
    }

    /// Opens the runs that can have entries of the partition and that `wanted` picks, newest first.
    pub(super) fn open_runs(
        &mut self,
        partition: Partition,
        wanted: impl Fn(&RunMeta) -> bool,
    ) -> Result<Vec<OpenRun>> {
        let mut metas: Vec<RunMeta> = self
            .current
            .runs
            .iter()
            .filter(|r| r.touches(partition) && wanted(r))
            .cloned()
            .collect();
        metas.sort_by_key(|run| std::cmp::Reverse((run.level, run.number)));
        metas.iter().map(|run| self.open_run(run)).collect()
    }

    fn open_run(&mut self, run: &RunMeta) -> Result<OpenRun> {
        let path = run.path(&self.dir);
        // LMDB trusts its pages, so a damaged file must not reach it. One sequential read for each
        // run and process, which the first sweep would do anyway.
        if !self.checked.contains(&run.number) {
            if checksum(&path)? != (run.bytes, run.crc) {
                let message =
                    format!("index run {} is damaged: its checksum is wrong", path.display());
                return Err(Error::new(Kind::Damaged, message));
            }
            self.checked.insert(run.number);
        }
        let bits = self.options.partition_bits;
        let (range, entries) = match run.level {
            Level::Young => (
                range_of(Partition(0), 0),
                run.entries.div_ceil(u64::from(self.options.partitions())),
            ),
            Level::Delta(partition) | Level::Base(partition) => {
                (range_of(partition, bits), run.entries)
            }
        };
        let reader = RunReader::open(&path, range)?;
        let header = match reader.header()? {
            Some(header) => Header::decode(header),
            None => Err("is missing".into()),
        };
        let why = match header {
            Ok(header) if header.fits(&self.current.identity, run) => {
                return Ok(OpenRun { reader, entries, entries_at_most: run.entries });
            }
            Ok(_) => "is another run's".into(),
            Err(why) => why,
        };
        let message = format!("the header of index run {} {why}", path.display());
        Err(Error::new(Kind::Damaged, message))
    }

    /// The memtable's entries of a partition.
    pub(super) fn fresh(&mut self, range: &(Fingerprint, Fingerprint)) -> &[Entry] {
        self.memtable.range(&range.0, &range.1)
    }

    /// Sets a damaged index aside and begins an empty one; the memtable stays.
    pub(super) fn give_up(&mut self) -> Result<()> {
        if let Some(work) = self.work.take() {
            work.abandon(&self.dir);
        }
        let mut next = Current::new(self.current.identity, self.current.instance);
        next.next_run = self.current.next_run;
        set_aside(&self.dir)?;
        next.store(&self.dir)?;
        self.current = next;
        self.checked.clear();
        self.applied = Applied::default();
        Ok(())
    }

    /// Reserves numbers for new bases; until the token is dropped nothing is merged. What was
    /// learned before is in the journals, and so in the new bases: it goes into runs now, so that
    /// it can be told from what is learned meanwhile.
    pub(super) fn begin_rebuild(&mut self) -> Result<(Arc<()>, u64)> {
        self.freeze()?;
        if let Some(work) = self.work.take() {
            work.abandon(&self.dir);
        }
        let token = Arc::new(());
        self.rebuilding = Arc::downgrade(&token);
        self.since = Applied::default();
        let first = self.current.next_run;
        self.current.next_run += u64::from(self.options.partitions());
        self.rebuilt_from = first;
        Ok((token, first))
    }

    /// The same for one partition. What young runs have of it must not outlive it, so they become deltas
    /// first, which are of one partition each: a step at a time, `None` while there are more.
    pub(super) fn begin_rebuild_of_partition(&mut self) -> Result<Option<(Arc<()>, u64)>> {
        if self.part_young()? {
            return Ok(None);
        }
        // A memtable at most, so no more than a step: whatever is learned before the next one is new.
        self.freeze()?;
        while self.part_young()? {}
        self.begin_rebuild().map(Some)
    }

    pub(super) fn is_rebuilding(&self) -> bool {
        self.rebuilding.strong_count() > 0
    }

    /// Puts new bases in place of the runs that there were when the rebuild began: of all, or of the
    /// partition that was rebuilt. Later young runs and the memtable stay: they have what was learned since.
    pub(super) fn install(&mut self, rebuilt: &mut Rebuilt) -> Result<()> {
        let before = self.applied.clone();
        // Of one partition more may have been read than the others have.
        if rebuilt.only.is_none() {
            self.applied = Applied::up_to(rebuilt.watermark.clone());
            self.applied.add_all(&self.since);
        }
        let mut install = |index: &mut Self| -> Result<Vec<u64>> {
            index.freeze()?;
            let mut next = index.current.clone();
            next.watermark = index.applied.mark().clone();
            next.identity.part = rebuilt.part;
            match rebuilt.only {
                None => {
                    let since = index.rebuilt_from;
                    next.runs.retain(|run| run.level == Level::Young && run.number > since);
                    next.duplicates = Duplicates::default();
                }
                Some(partition) => {
                    next.runs.retain(|run| run.level == Level::Young || !run.touches(partition));
                    next.duplicates.forget(partition);
                }
            }
            next.duplicates.add_all(&rebuilt.duplicates);
            // Even where that fails CURRENT may name them.
            let bases = rebuilt.bases.take();
            let numbers = bases.iter().map(|run| run.number).collect();
            next.runs.extend(bases);
            index.replace(next).map(|()| numbers)
        };
        let numbers = install(self).inspect_err(|_| self.applied = before)?;
        self.checked.extend(numbers);
        self.rebuilding = Weak::new();
        Ok(())
    }

    /// Times that a fingerprint was found under a second address.
    pub(super) fn duplicates(&self) -> u64 {
        self.current.duplicates.total().saturating_add(self.fresh_duplicates.total())
    }

    /// Entries in runs and memtable.
    pub(super) fn entries(&self) -> u64 {
        self.current.runs.iter().map(|run| run.entries).sum::<u64>() + self.memtable.len() as u64
    }

    /// Entries and bytes of a partition's runs, and its part of the young ones and of the memtable.
    pub(super) fn size_of(&self, partition: Partition) -> (u64, u64) {
        let partitions = u64::from(self.options.partitions());
        let mut size = (self.memtable.len() as u64 / partitions, 0);
        for run in self.current.runs.iter().filter(|run| run.touches(partition)) {
            let share = if run.level == Level::Young { partitions } else { 1 };
            size.0 += run.entries / share;
            size.1 += run.bytes / share;
        }
        size
    }

    /// Bytes of all runs.
    pub(super) fn bytes(&self) -> u64 {
        self.current.runs.iter().map(|run| run.bytes).sum()
    }
}

/// Ends a run and measures its file.
pub(super) fn finish_run(
    dir: &Path,
    writer: RunWriter,
    number: u64,
    level: Level,
    identity: Identity,
    watermark: &Watermark,
) -> Result<RunMeta> {
    let entries = writer.entries();
    let header = Header { identity, number, level, entries, watermark: watermark.clone() };
    let path = run_path(dir, number);
    let finish = || {
        writer.finish(&header.encode())?;
        checksum(&path)
    };
    let (bytes, crc) = finish().inspect_err(|_| {
        // A leftover is swept at the next opening.
        let _ = fs::remove_file(&path);
    })?;
    Ok(RunMeta { number, level, entries, bytes, crc })
}

fn create_dir(dir: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .context(|| format!("cannot create {}", dir.display()))
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let file = File::create(&path).context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            let message = format!("the index in {} is used by another engine", dir.display());
            Err(Error::new(Kind::Busy, message))
        }
        Err(fs::TryLockError::Error(error)) => {
            Err(error).context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Where the count of openings begins where it is not known: no earlier opening can have had it.
fn first_instance() -> Result<u64> {
    let random = getrandom::u64().context(|| "no random numbers from the system".into())?;
    Ok(random >> 16)
}

/// Reads CURRENT and looks at the files it names. `Ok(Err(_))`: why they are of no use.
fn load(dir: &Path, identity: &Identity) -> Result<std::result::Result<Option<Current>, String>> {
    let Some(loaded) = Current::load(dir)? else {
        let runs = names(dir)?.iter().any(|name| run_number(name).is_some());
        return Ok(if runs { Err("its file CURRENT is missing".into()) } else { Ok(None) });
    };
    let current = match loaded {
        Ok(current) => current,
        Err(why) => return Ok(Err(why)),
    };
    if let Some(why) = current.identity.differs(identity) {
        return Ok(Err(why));
    }
    for run in &current.runs {
        let path = run.path(dir);
        match fs::metadata(&path) {
            Ok(found) if found.len() == run.bytes => {}
            Ok(found) => {
                let length = found.len();
                return Ok(Err(format!(
                    "{} has {length} bytes, not {}",
                    path.display(),
                    run.bytes
                )));
            }
            Err(error) => return Ok(Err(format!("{} cannot be read: {error}", path.display()))),
        }
    }
    Ok(Ok(Some(current)))
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let list = || -> std::io::Result<Vec<String>> {
        fs::read_dir(dir)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect()
    };
    list().context(|| format!("cannot list {}", dir.display()))
}

/// Moves CURRENT and all runs out of the way.
fn set_aside(dir: &Path) -> Result<()> {
    let aside = dir.join(ASIDE);
    let moved = || -> std::io::Result<()> {
        if aside.exists() {
            fs::remove_dir_all(&aside)?;
        }
        fs::create_dir(&aside)
    };
    moved().context(|| format!("cannot make room in {}", aside.display()))?;
    for name in names(dir)? {
        if name == "CURRENT" || run_number(&name).is_some() {
            fs::rename(dir.join(&name), aside.join(&name))
                .context(|| format!("cannot set {name} in {} aside", dir.display()))?;
        }
    }
    Ok(())
}

/// Removes what an earlier opening left and no CURRENT names; returns the highest run number seen.
fn sweep(dir: &Path, current: &Current, aside: bool) -> Result<u64> {
    let mut highest = 0;
    for name in names(dir)? {
        let path = dir.join(&name);
        let removed = if let Some(number) = run_number(&name) {
            highest = highest.max(number);
            if current.runs.iter().any(|run| run.number == number) {
                continue;
            }
            fs::remove_file(&path)
        } else if name.starts_with(SCRATCH) || (aside && name == ASIDE) {
            fs::remove_dir_all(&path)
        } else {
            continue;
        };
        removed.context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(highest)
}

/// Length and CRC-32C of a file.
fn checksum(path: &Path) -> Result<(u64, u32)> {
    let read = || -> std::io::Result<(u64, u32)> {
        let mut file = File::open(path)?;
        // Advice only.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        let mut buffer = vec![0; CHECK_READ];
        let (mut bytes, mut crc) = (0, 0);
        loop {
            let n = file.read(&mut buffer)?;
            let Some(read) = buffer.get(..n).filter(|read| !read.is_empty()) else {
                return Ok((bytes, crc));
            };
            crc = crc32c::crc32c_append(crc, read);
            bytes += n as u64;
        }
    };
    read().map_err(|error| {
        // What is there can be had from the journals.
        let kind = if is_unreadable(&error) { Kind::Damaged } else { Kind::Failed };
        Error::caused(kind, format!("cannot read index run {}", path.display()), error)
    })
}
