//! A pass: one ascending sweep that joins a partition's requests with the index and with its
//! pending grants.
//!
//! Order of durability: log closed → verdicts and the new pending run written → pending run
//! replaced → verdicts sent → log removed. A failure anywhere leaves the log, and repeating the
//! pass repeats the same grants: a grant asked for again by its holder is granted again. None of
//! these files is synced, because none is read again after a crash: a crash of the engine ends all
//! sessions, and with them every request and every grant.

use std::collections::BTreeMap;

use super::Verdict;
use super::lookup::Lookup;
use super::pending::{Pending, PendingReader, PendingWriter};
use super::request_log::{Request, RequestKind, SORTED};
use super::verdict::VerdictSpool;
use crate::error::Error;
use crate::ids::{Address, Fingerprint, SessionId, Slice, Slices};
use crate::sort::Sorted;

/// What a pass did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PassReport {
    /// Requests answered.
    pub requests: u64,
    /// Requests of ended sessions, skipped.
    pub skipped: u64,
    /// Answers `Stored`.
    pub stored: u64,
    /// Answers `Grant`.
    pub grants: u64,
    /// Answers `SameAs`.
    pub same: u64,
    /// Grants of the partition that are open now.
    pub pending: u64,
}

/// An error with what it came from, as what to do about damage depends on that.
pub(super) enum Failure {
    /// A run of the index.
    Index(Error),
    /// The pending run.
    Pending(Error),
    /// Anything else.
    Other(Error),
}

/// Which sessions are not ended; remembers the answers, as requests come in long runs of few
/// sessions.
pub(super) struct Living<'a> {
    live: &'a dyn Fn(SessionId) -> bool,
    withdrawn: &'a dyn Fn(SessionId) -> bool,
    known: BTreeMap<SessionId, bool>,
}

impl<'a> Living<'a> {
    pub(super) fn new(
        live: &'a dyn Fn(SessionId) -> bool,
        withdrawn: &'a dyn Fn(SessionId) -> bool,
    ) -> Self {
        Living { live, withdrawn, known: BTreeMap::new() }
    }

    fn is_live(&mut self, session: SessionId) -> bool {
        let Living { live, withdrawn, known } = self;
        *known.entry(session).or_insert_with(|| live(session) && !withdrawn(session))
    }
}

/// Where it goes what is about slices of other hosts.
pub(super) struct Leaving<'r> {
    pub(super) kept: &'r Slices,
    pub(super) grants: PendingWriter,
    /// Those who ask, as if they were granted what they ask for.
    pub(super) questions: PendingWriter,
}

/// The three inputs of a pass and its outputs.
pub(super) struct Join<'r> {
    pub(super) requests: Sorted<SORTED>,
    pub(super) lookup: Lookup<'r>,
    pub(super) pending: PendingReader,
    pub(super) next_pending: PendingWriter,
    pub(super) leaving: Option<Leaving<'r>>,
    pub(super) verdicts: VerdictSpool,
    pub(super) living: Living<'r>,
    pub(super) report: PassReport,
}

impl<'r> Join<'r> {
    /// Runs to the end of all inputs.
    pub(super) fn run(&mut self) -> Result<(), Failure> {
        let mut request = self.next_request()?;
        let mut held = self.pending.next().map_err(Failure::Pending)?;
        loop {
            // Grants that nobody asks for stay as they are.
            while let Some(pending) = held
                && request.is_none_or(|request| pending.fingerprint < request.fingerprint)
            {
                self.keep(pending)?;
                held = self.pending.next().map_err(Failure::Pending)?;
            }
            let Some(first) = request else { return Ok(()) };
            let mut holder = None;
            if let Some(pending) = held.filter(|held| held.fingerprint == first.fingerprint) {
                holder = Some(pending);
                held = self.pending.next().map_err(Failure::Pending)?;
            }
            request = self.answer_all(first, holder)?;
        }
    }

    fn next_request(&mut self) -> Result<Option<Request>, Failure> {
        let record = self.requests.next().map_err(Failure::Other)?;
        Ok(record.map(|record| Request::from_sorted(&record)))
    }

    /// Carries a grant over, unless its session ended or its block is seen to be sealed.
    fn keep(&mut self, pending: Pending) -> Result<(), Failure> {
        if !self.living.is_live(pending.session) {
            return Ok(());
        }
        // Where it costs a seek, the block is found sealed when somebody asks for it.
        if self.lookup.is_sweeping()
            && self.lookup.get(&pending.fingerprint).map_err(Failure::Index)?.is_some()
        {
            return Ok(());
        }
        self.carry(pending)
    }

    fn carry(&mut self, pending: Pending) -> Result<(), Failure> {
        let next = match self.leaving(&pending.fingerprint) {
            Some(leaving) => &mut leaving.grants,
            None => {
                self.report.pending += 1;
                &mut self.next_pending
            }
        };
        next.push(pending).map_err(Failure::Other)
    }

    /// Where it goes what is about this block, if another host answers for it now.
    fn leaving(&mut self, fingerprint: &Fingerprint) -> Option<&mut Leaving<'r>> {
        let slice = Slice::of(fingerprint);
        self.leaving.as_mut().filter(|leaving| !leaving.kept.contains(slice))
    }

    /// Answers all requests for the fingerprint of `first`; returns the first one behind them. About a block
    /// of another host nothing is decided, as this index need not know any more what is stored: that one is
    /// told who holds the grant, and asked what was asked here.
    fn answer_all(
        &mut self,
        first: Request,
        holder: Option<Pending>,
    ) -> Result<Option<Request>, Failure> {
        let stored = match self.leaving(&first.fingerprint) {
            Some(_) => None,
            None => self.lookup.get(&first.fingerprint).map_err(Failure::Index)?,
        };
        let living = &mut self.living;
        let mut holder = holder.filter(|holder| stored.is_none() && living.is_live(holder.session));
        let mut request = Some(first);
        while let Some(asked) = request.filter(|r| r.fingerprint == first.fingerprint) {
            let own = asked.grant();
            match asked.kind {
                // What was given up may be granted again, from here on.
                RequestKind::Release => holder = holder.filter(|held| *held != own),
                _ if !self.living.is_live(asked.session) => self.report.skipped += 1,
                RequestKind::Claim if stored.is_none() => _ = holder.get_or_insert(own),
                RequestKind::Claim => {}
                RequestKind::Ask => match self.leaving(&own.fingerprint) {
                    Some(leaving) => leaving.questions.push(own).map_err(Failure::Other)?,
                    None => {
                        let verdict = decide(stored, &mut holder, own);
                        self.count(verdict);
                        self.verdicts
                            .push(own.session, own.sequence, verdict)
                            .map_err(Failure::Other)?;
                    }
                },
            }
            request = self.next_request()?;
        }
        if let Some(holder) = holder {
            self.carry(holder)?;
        }
        Ok(request)
    }

    fn count(&mut self, verdict: Verdict) {
        self.report.requests += 1;
        match verdict {
            Verdict::Stored(_) => self.report.stored += 1,
            Verdict::Grant => self.report.grants += 1,
            Verdict::SameAs(..) => self.report.same += 1,
        }
    }
}

/// The verdict on one request; `holder` is who may write the block, before and after.
fn decide(stored: Option<Address>, holder: &mut Option<Pending>, own: Pending) -> Verdict {
    if let Some(address) = stored {
        return Verdict::Stored(address);
    }
    match *holder {
        Some(held) if held == own => Verdict::Grant,
        Some(held) => Verdict::SameAs(held.session, held.sequence),
        None => {
            *holder = Some(own);
            Verdict::Grant
        }
    }
}
