//! The detector: what the detector thread owns and calls.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::current::range_of;
use super::index::Index;
use super::lookup::Lookup;
use super::merge::Merge;
use super::options::MAX_PARTITION_BITS;
use super::pass::{Failure, Join, Leaving, Living, PassReport};
use super::pending::{Pending, PendingReader, PendingRun};
use super::rebuild::{Rebuild, Rebuilt};
use super::request_log::{Request, RequestKind, RequestLogs, SORTED};
use super::verdict::{SpooledVerdicts, VerdictSpool};
use super::{DetectOptions, JournalPosition, Partition, Verdict, Watermark};
use crate::error::{Context, Error, Kind, Result};
use crate::ids::{Address, Fingerprint, Sequence, SessionId, Slices};
use crate::sort::{Sorted, Sorter};

/// What is handed over at a time: 100 KiB.
const HANDED: usize = 4096;

/// Something of a session about slices that are not this host's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LeftOver {
    /// Grants that it holds.
    Grants(Vec<(Fingerprint, Sequence)>),
    /// What it asks.
    Questions(Vec<(Fingerprint, Sequence)>),
}

/// What was found when the index was opened.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OpenReport {
    /// What the index has; the caller learns the journals' entries after it.
    pub watermark: Watermark,
    /// Why an existing index was set aside and an empty one begun, if it was.
    pub set_aside: Option<String>,
}

/// Detection on one host: request logs, index and pending grants of all its partitions.
pub struct Detector {
    options: DetectOptions,
    pub(super) index: Index,
    logs: RequestLogs,
    pending: Vec<PendingRun>,
    /// Ended sessions, with the partitions whose log or pending run may still name them.
    withdrawn: BTreeMap<SessionId, BTreeSet<Partition>>,
    /// What this host answers for, if that is not everything.
    kept: Option<Slices>,
    /// Partitions that may have open grants for anything else.
    leaving: BTreeSet<Partition>,
    /// Such grants, and questions, of the last pass.
    handed: [PendingRun; 2],
    scratch: PathBuf,
    lost_requests: bool,
}

impl Detector {
    /// Opens the index in `dir` or begins one. A missing, damaged, foreign or outdated index is no
    /// error: it is set aside, and the caller learns the journals again from the watermark on.
    pub fn open(dir: &Path, options: DetectOptions) -> Result<(Self, OpenReport)> {
        if options.partition_bits > MAX_PARTITION_BITS {
            let bits = options.partition_bits;
            let message =
                format!("{bits} partition bits are too many: {MAX_PARTITION_BITS} at most");
            return Err(Error::new(Kind::Usage, message));
        }
        let (index, set_aside) = Index::open(dir, options.clone())?;
        let scratch = index.scratch()?;
        let report = OpenReport { watermark: index.current.watermark.clone(), set_aside };
        let pending = (0..options.partitions()).map(|p| PendingRun::new(&scratch, p)).collect();
        let logs = RequestLogs::new(&scratch, options.partitions());
        let handed =
            ["grants", "questions"].map(|of| PendingRun::named(&scratch, format!("handed-{of}")));
        Ok((
            Detector {
                options,
                index,
                logs,
                pending,
                withdrawn: BTreeMap::new(),
                kept: None,
                leaving: BTreeSet::new(),
                handed,
                scratch,
                lost_requests: false,
            },
            report,
        ))
    }

    /// Logs questions of `session`. Asking again under the same sequence is harmless. After an
    /// error some of them are logged; submit all of them again.
    pub fn submit(
        &mut self,
        session: SessionId,
        requests: &[(Fingerprint, Sequence)],
    ) -> Result<()> {
        self.log(session, requests, RequestKind::Ask)
    }

    /// Logs that `session` gives grants back: who asks for these blocks next may write them.
    pub fn release(
        &mut self,
        session: SessionId,
        grants: &[(Fingerprint, Sequence)],
    ) -> Result<()> {
        self.log(session, grants, RequestKind::Release)
    }

    /// Logs that `session` holds grants which somebody else gave: nobody is given these again. Without an
    /// answer.
    pub fn claim(&mut self, session: SessionId, grants: &[(Fingerprint, Sequence)]) -> Result<()> {
        self.log(session, grants, RequestKind::Claim)
    }

    /// Only these slices are this host's from here on: passes decide nothing about others, but hand what is
    /// asked about them, and the open grants, over.
    pub fn keep(&mut self, slices: Slices) {
        self.kept = Some(slices);
        self.leaving = self.partitions().filter(|partition| self.is_in_use(*partition)).collect();
    }

    /// Whether it has open grants, or something waits in its log.
    fn is_in_use(&self, partition: Partition) -> bool {
        self.has_pending(partition) || self.logs.waiting(partition) > 0
    }

    fn has_pending(&self, partition: Partition) -> bool {
        self.pending.get(usize::from(partition.0)).is_some_and(|run| run.len() > 0)
    }

    fn log(
        &mut self,
        session: SessionId,
        requests: &[(Fingerprint, Sequence)],
        kind: RequestKind,
    ) -> Result<()> {
        for &(fingerprint, sequence) in requests {
            let request = Request { fingerprint, session, sequence, kind };
            self.logs.push(self.options.partition_of(&fingerprint), request)?;
        }
        Ok(())
    }

    /// Whether requests were lost with a damaged log since the last call: those who wait for
    /// answers must be told.
    pub fn take_lost_requests(&mut self) -> bool {
        std::mem::take(&mut self.lost_requests)
    }

    /// A session's end, whatever the end: its grants die, its logged requests are skipped.
    pub fn withdraw(&mut self, session: SessionId) {
        let traces: BTreeSet<Partition> =
            self.partitions().filter(|partition| self.is_in_use(*partition)).collect();
        if !traces.is_empty() {
            self.withdrawn.insert(session, traces);
        }
    }

    /// Takes in the blocks of a sealed container; sorts `entries` in place. `position` is the
    /// journal entry that has them (also with no entries, so that the journal has no gap).
    /// The grants of these blocks end with it.
    pub fn learn(
        &mut self,
        entries: &mut [(Fingerprint, Address)],
        position: JournalPosition,
    ) -> Result<()> {
        self.index.learn(entries, position)
    }

    /// The partition whose log should be passed now: with grants for others' slices, big enough, old
    /// enough, or any log at all if sessions wait for nothing else (`waiting`).
    pub fn due(&mut self, now: Instant, waiting: bool) -> Option<Partition> {
        if let Some(partition) = self.leaving.first() {
            return Some(*partition);
        }
        self.logs.due(now, waiting, self.options.pass_requests, self.options.pass_age)
    }

    /// Requests that wait in the log of `partition`.
    #[must_use]
    pub fn waiting(&self, partition: Partition) -> u64 {
        self.logs.waiting(partition)
    }

    /// Answers all requests in the log of `partition`. `live` tells which sessions are not ended.
    ///
    /// After an error the requests are still logged, and the pass can be repeated: what was answered
    /// is answered again, the last answer counts. [`Kind::Damaged`]: a file was damaged and is out of the way. If
    /// [`Detector::watermark`] is empty now, that was the index: learn the journals first.
    pub fn pass(
        &mut self,
        partition: Partition,
        live: &dyn Fn(SessionId) -> bool,
        answers: &mut dyn FnMut(SessionId, Sequence, Verdict) -> Result<()>,
    ) -> Result<PassReport> {
        self.logs.close(partition)?;
        if self.logs.waiting(partition) == 0 && !self.leaving.contains(&partition) {
            return Ok(PassReport::default());
        }
        let requests = match self.sort(partition) {
            Err(error) if error.kind() == Kind::Damaged => {
                self.lost_requests = true;
                self.logs.remove_closed(partition)?;
                return Err(error);
            }
            sorted => sorted?,
        };
        let (verdicts, report) = match self.join(partition, requests, live) {
            Ok(done) => done,
            Err(failure) => return Err(self.repair(partition, failure)),
        };
        if let Err(error) = verdicts.send(answers) {
            // What was asked is asked again with the next pass; who holds grants is only told now.
            self.handed[1].forget();
            return Err(error);
        }
        verdicts.remove();
        self.logs.remove_closed(partition)?;
        self.leaving.remove(&partition);
        self.withdrawn.retain(|_, traces| {
            traces.remove(&partition);
            !traces.is_empty()
        });
        Ok(report)
    }

    /// Hands out what the last pass found about slices that are not this host's: some of one session at a
    /// time, grants first. What is not taken before the next pass is forgotten.
    pub fn hand_over(&mut self, mut each: impl FnMut(SessionId, LeftOver)) -> Result<()> {
        let [grants, questions] = &mut self.handed;
        drain(grants, |session, grants| each(session, LeftOver::Grants(grants)))?;
        drain(questions, |session, asked| each(session, LeftOver::Questions(asked)))
    }

    fn sort(&self, partition: Partition) -> Result<Sorted<SORTED>> {
        // The last quarter of the pass's memory is for reading the inputs of the merge.
        let mut sorter = Sorter::new(&self.scratch, self.options.pass_memory / 4 * 3);
        self.logs.read(partition, &mut |request| sorter.push(request))?;
        sorter.finish()
    }

    /// Answers sorted requests into a spool and replaces the pending run.
    fn join(
        &mut self,
        partition: Partition,
        requests: Sorted<SORTED>,
        live: &dyn Fn(SessionId) -> bool,
    ) -> std::result::Result<(SpooledVerdicts, PassReport), Failure> {
        let range = range_of(partition, self.options.partition_bits);
        let runs = self.index.open_runs(partition, |_| true).map_err(Failure::Index)?;
        let fresh = self.index.fresh(&range);
        let lookup = Lookup::new(fresh, runs, requests.len(), range).map_err(Failure::Index)?;
        let Some(pending) = self.pending.get_mut(usize::from(partition.0)) else {
            let message = format!("no partition {}", partition.0);
            return Err(Failure::Other(Error::new(Kind::Usage, message)));
        };
        let withdrawn = |session| self.withdrawn.contains_key(&session);
        let spool = self.scratch.join(format!("verdicts-{:03}", partition.0));
        let [grants, questions] = &mut self.handed;
        let leaving = self.kept.as_ref().map(|kept| {
            Ok(Leaving { kept, grants: grants.rewrite()?, questions: questions.rewrite()? })
        });
        let leaving = leaving.transpose().map_err(Failure::Other)?;
        let mut join = Join {
            requests,
            lookup,
            pending: pending.read().map_err(Failure::Pending)?,
            next_pending: pending.rewrite().map_err(Failure::Other)?,
            leaving,
            verdicts: VerdictSpool::create(spool).map_err(Failure::Other)?,
            living: Living::new(live, &withdrawn),
            report: PassReport::default(),
        };
        join.run()?;
        let Join { next_pending, leaving, verdicts, report, .. } = join;
        // All or nothing: a pass that fails is made again.
        let verdicts = verdicts.finish().map_err(Failure::Other)?;
        let next_pending = next_pending.finish().map_err(Failure::Other)?;
        if let Some(leaving) = leaving {
            let handed = leaving.grants.finish().and_then(|g| Ok((g, leaving.questions.finish()?)));
            let (next_grants, next_questions) = handed.map_err(Failure::Other)?;
            grants.replace(next_grants);
            questions.replace(next_questions);
        }
        pending.replace(next_pending);
        Ok((verdicts, report))
    }

    /// Takes a damaged file out of the way, so that the pass can be repeated.
    fn repair(&mut self, partition: Partition, failure: Failure) -> Error {
        match failure {
            Failure::Index(error) => self.set_damaged_aside(error),
            Failure::Pending(error) => {
                if error.kind() == Kind::Damaged
                    && let Some(pending) = self.pending.get_mut(usize::from(partition.0))
                {
                    pending.forget();
                }
                error
            }
            Failure::Other(error) => error,
        }
    }

    fn set_damaged_aside(&mut self, error: Error) -> Error {
        if error.kind() != Kind::Damaged {
            return error;
        }
        match self.index.give_up() {
            Ok(()) => error,
            Err(worse) => worse,
        }
    }

    /// One bounded step of merging, for the time between passes. False: nothing to do.
    /// [`Kind::Damaged`] as in [`Detector::pass`].
    pub fn maintain(&mut self) -> Result<bool> {
        self.index.maintain().map_err(|error| self.set_damaged_aside(error))
    }

    /// Makes all that was learned durable, so that a restart has nothing to refill.
    pub fn flush(&mut self) -> Result<()> {
        self.index.freeze()
    }

    /// Distinguishes this opening of the index from every other one.
    #[must_use]
    pub fn instance(&self) -> u64 {
        self.index.current.instance
    }

    /// The partitions of this index.
    pub fn partitions(&self) -> impl Iterator<Item = Partition> + use<> {
        (0..self.options.partitions()).map(Partition)
    }

    /// Whose log `fingerprint` goes to.
    #[must_use]
    pub fn partition_of(&self, fingerprint: &Fingerprint) -> Partition {
        self.options.partition_of(fingerprint)
    }

    /// Entries of the index. A fingerprint learned twice counts twice until the two are merged.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.index.entries()
    }

    /// Times that a fingerprint was found under a second address; what is not merged yet is not found.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        self.index.duplicates()
    }

    /// Entries and bytes of a partition; of what all partitions share its part.
    #[must_use]
    pub fn size_of(&self, partition: Partition) -> (u64, u64) {
        self.index.size_of(partition)
    }

    /// Bytes of the index's files.
    #[must_use]
    pub fn index_bytes(&self) -> u64 {
        self.index.bytes()
    }

    /// What is durable in the index.
    #[must_use]
    pub fn watermark(&self) -> Watermark {
        self.index.current.watermark.clone()
    }

    /// The same, with what is in memory only: a crash forgets it.
    #[must_use]
    pub fn applied(&self) -> &Watermark {
        self.index.applied()
    }

    /// Entries of `partition` after a fingerprint, ascending, the newest address of each, at
    /// most `limit` of them; none at the end. [`Kind::Damaged`] as in [`Detector::pass`].
    pub fn export(
        &mut self,
        partition: Partition,
        after: Option<Fingerprint>,
        limit: usize,
    ) -> Result<Vec<(Fingerprint, Address)>> {
        let range = range_of(partition, self.options.partition_bits);
        let runs = match self.index.open_runs(partition, |_| true) {
            Ok(runs) => runs,
            Err(error) => return Err(self.set_damaged_aside(error)),
        };
        let first = after.map_or(Bound::Included(range.0), Bound::Excluded);
        let entries = Merge::new(self.index.fresh(&range), runs, first, range.1)
            .and_then(|mut merge| merge.take(limit));
        entries.map_err(|error| self.set_damaged_aside(error))
    }

    /// Looks ascending `fingerprints` up, whatever their partitions; calls `each` for every one.
    /// [`Kind::Damaged`] as in [`Detector::pass`].
    pub fn lookup(
        &mut self,
        fingerprints: &[Fingerprint],
        each: &mut dyn FnMut(Fingerprint, Option<Address>) -> Result<()>,
    ) -> Result<()> {
        if !fingerprints.is_sorted() {
            return Err(Error::new(Kind::Usage, "fingerprints to look up must ascend"));
        }
        let options = self.options.clone();
        for part in fingerprints.chunk_by(|a, b| options.partition_of(a) == options.partition_of(b))
        {
            let found = match self.lookup_part(part) {
                Ok(found) => found,
                Err(error) => return Err(self.set_damaged_aside(error)),
            };
            for (fingerprint, address) in part.iter().zip(found) {
                each(*fingerprint, address)?;
            }
        }
        Ok(())
    }

    /// Looks ascending fingerprints of one partition up.
    fn lookup_part(&mut self, part: &[Fingerprint]) -> Result<Vec<Option<Address>>> {
        let Some(first) = part.first() else { return Ok(Vec::new()) };
        let partition = self.options.partition_of(first);
        let range = range_of(partition, self.options.partition_bits);
        let runs = self.index.open_runs(partition, |_| true)?;
        let mut lookup = Lookup::new(self.index.fresh(&range), runs, part.len() as u64, range)?;
        part.iter().map(|fingerprint| lookup.get(fingerprint)).collect()
    }

    /// Begins a new index beside the present one; until it is installed or dropped no merge runs.
    pub fn rebuild(&mut self) -> Result<Rebuild> {
        self.rebuild_as(self.options.part)
    }

    /// The same for another part of the fingerprints.
    pub fn rebuild_as(&mut self, part: u64) -> Result<Rebuild> {
        let begun = self.index.begin_rebuild()?;
        let options = DetectOptions { part, ..self.options.clone() };
        Ok(Rebuild::new(&self.index.dir, &self.scratch, (options, None), begun))
    }

    /// The same for one partition, beside the others. `None`: a bounded step of merging was made first, ask
    /// again. [`Kind::Damaged`] as in [`Detector::pass`].
    pub fn rebuild_partition(&mut self, partition: Partition) -> Result<Option<Rebuild>> {
        let begun = match self.index.begin_rebuild_of_partition() {
            Ok(begun) => begun,
            Err(error) => return Err(self.set_damaged_aside(error)),
        };
        let what = (self.options.clone(), Some(partition));
        Ok(begun.map(|begun| Rebuild::new(&self.index.dir, &self.scratch, what, begun)))
    }

    /// Puts the new index in place of the present one, but for what was learned since
    /// [`Detector::rebuild`].
    pub fn install(&mut self, mut rebuilt: Rebuilt) -> Result<()> {
        let installed = self.index.install(&mut rebuilt);
        installed.context(|| "cannot install the rebuilt index".into())?;
        self.options.part = rebuilt.part;
        // With its token: merges go on.
        drop(rebuilt);
        Ok(())
    }
}

/// Reads a run and forgets it; what of a session comes near together goes together.
fn drain(
    run: &mut PendingRun,
    each: impl FnMut(SessionId, Vec<(Fingerprint, Sequence)>),
) -> Result<()> {
    let read = run.read().and_then(|reader| hand_out(reader, each));
    run.forget();
    read
}

fn hand_out(
    mut reader: PendingReader,
    mut each: impl FnMut(SessionId, Vec<(Fingerprint, Sequence)>),
) -> Result<()> {
    let mut batches = BTreeMap::<SessionId, Vec<_>>::new();
    let mut batched = 0;
    while let Some(Pending { fingerprint, session, sequence }) = reader.next()? {
        batches.entry(session).or_default().push((fingerprint, sequence));
        batched += 1;
        if batched == HANDED {
            std::mem::take(&mut batches).into_iter().for_each(|(of, batch)| each(of, batch));
            batched = 0;
        }
    }
    batches.into_iter().for_each(|(of, batch)| each(of, batch));
    Ok(())
}
