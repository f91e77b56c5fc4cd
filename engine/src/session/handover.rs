//! Taking blocks over from a session that holds their grants but does not get to them.
//!
//! A waiter asks the writer to give up what it has not packed. What is packed already is
//! sealed at once by the writer, and found by asking again. A writer that does not even
//! answer is given up on: the block is stored twice, which is counted, and harmless.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Context;
use super::event::{Claim, Event};
use super::stages::Session;
use super::window::{WaitingList, Window};
use crate::error::Result;
use crate::ids::SessionId;

/// How long a writer may be silent when asked to give something up: longer than it takes to go
/// through a window's verdicts or to write its recipe, when it does not listen.
const SILENCE: Duration = Duration::from_secs(30);
/// How long a writer may go on giving up, and its blocks be said to be its own all the same: longer than
/// the owner needs to hear of it, and to give its host up if it does not.
const VAIN: Duration = Duration::from_secs(60);
/// Claims in one message: 64 KiB.
const CLAIMS: usize = 4096;
/// A longer list is shared: the writer keeps its first half.
const SHARE_FROM: u64 = 65_536;

/// Between two rounds of asking again; doubled up to a second while nothing changes.
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_secs(1);
/// Requests sent to the owner at once when asking again.
const REQUESTS: usize = 4096;

/// How the front window waits for other writers.
pub(super) struct Patience {
    /// The owner passes at once while we wait for answers only.
    pub(super) told_waiting: bool,
    /// When our own writes of the window ended, at first.
    pub(super) own_ended: Option<Instant>,
    /// When we asked last, and what the owner's progress was then.
    pub(super) asked: Instant,
    pub(super) seen: u64,
    pub(super) backoff: Duration,
    pub(super) handover: Option<Handover>,
    /// Since when a writer cannot be told anything.
    pub(super) unheard: Option<(SessionId, Instant)>,
    /// What a writer had of ours when it was asked to give it up, if it does not become less, and since when.
    pub(super) vain: Option<(SessionId, u64, Instant)>,
    /// Writers that do not answer, or in vain: their blocks are written by us.
    pub(super) silent: Option<SessionId>,
}

impl Patience {
    pub(super) fn new(now: Instant) -> Self {
        Patience {
            told_waiting: false,
            own_ended: None,
            asked: now,
            seen: 0,
            backoff: FIRST_BACKOFF,
            handover: None,
            unheard: None,
            vain: None,
            silent: None,
        }
    }
}

/// The talk with one writer about one window's waiting list.
pub(super) struct Handover {
    writer: SessionId,
    list: WaitingList,
    /// Questions that wait for it.
    theirs: u64,
    /// Of them, those that are left to the writer.
    leave: u64,
    asked: Instant,
}

/// What became of a step.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Asked; its answer comes as an event.
    Asked,
    /// Nothing more to ask for.
    Complete,
    /// Its queue is full or gone; ask later.
    NotNow,
}

impl Handover {
    /// Begins with the writer of the first waiting question.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub(super) fn begin(mut list: WaitingList, now: Instant) -> Result<Option<Self>> {
        let Some(first) = list.next()? else { return Ok(None) };
        let writer = first.writer.0;
        let mut theirs = 1;
        while let Some(unsettled) = list.next()? {
            theirs += u64::from(unsettled.writer.0 == writer);
        }
        let leave = if theirs > SHARE_FROM { theirs / 2 } else { 0 };
        list.rewind();
        Ok(Some(Handover { writer, list, theirs, leave, asked: now }))
    }

    /// Who writes.
    #[must_use]
    pub(super) fn writer(&self) -> SessionId {
        self.writer
    }

    /// The next claims, empty at the end of the list.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub(super) fn claims(&mut self) -> Result<Vec<Claim>> {
        let mut claims = Vec::new();
        while claims.len() < CLAIMS {
            let Some(unsettled) = self.list.next()? else { break };
            if unsettled.writer.0 != self.writer {
                continue;
            }
            if self.leave > 0 {
                self.leave -= 1;
                continue;
            }
            let fingerprint = unsettled.question.fingerprint;
            claims.push(Claim { fingerprint, theirs: unsettled.writer.1 });
        }
        Ok(claims)
    }

    /// Asks the writer for the next claims.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub(super) fn ask(&mut self, context: &Context, us: SessionId, now: Instant) -> Result<Step> {
        let claims = self.claims()?;
        if claims.is_empty() {
            return Ok(Step::Complete);
        }
        self.asked = now;
        let heard = context.tell(self.writer, Event::GiveUp { to: us, claims });
        Ok(if heard { Step::Asked } else { Step::NotNow })
    }

    /// Whether the writer owes an answer for too long.
    #[must_use]
    pub(super) fn is_silent(&self, now: Instant) -> bool {
        now.duration_since(self.asked) > SILENCE
    }
}

impl Session {
    /// Asks everything unsettled in the front window again.
    pub(super) fn ask_again(&mut self) -> Result<bool> {
        self.patience.handover = None;
        self.patience.asked = Instant::now();
        self.patience.seen = self.context.owners.figures().progress.load(Ordering::Acquire);
        let Some(window) = self.windows.front_mut() else { return Ok(true) };
        let (owner, id) = (&self.context.owners, self.id);
        let mut requests = Vec::new();
        window.ask_again(|question| {
            requests.push((question.fingerprint, question.sequence));
            if requests.len() == REQUESTS {
                owner.ask(id, std::mem::take(&mut requests))?;
            }
            Ok(())
        })?;
        if !requests.is_empty() {
            owner.ask(id, requests)?;
        }
        Ok(true)
    }

    /// What is left is with other writers: ask again when something changed, ask them
    /// to give it up when it takes too long.
    pub(super) fn wait_for_others(&mut self) -> Result<bool> {
        let now = Instant::now();
        if let Some(handover) = &self.patience.handover {
            if handover.is_silent(now) {
                self.patience.silent = Some(handover.writer());
                return self.ask_again();
            }
            return Ok(false);
        }
        let (writer, sequence) =
            match self.windows.front().map(Window::waiting).transpose()?.flatten() {
                Some(mut list) => match list.next()? {
                    Some(unsettled) => unsettled.writer,
                    None => return Ok(true),
                },
                None => return Ok(true),
            };
        let later = self.windows.front().is_some_and(|w| sequence.0 >= w.end);
        let limit = self.context.patience;
        let impatient =
            self.patience.own_ended.is_some_and(|ended| now.duration_since(ended) >= limit);
        if (writer == self.id && later) || impatient {
            return self.begin_handover(now);
        }
        let progress = self.context.owners.figures().progress.load(Ordering::Acquire);
        let due = now.duration_since(self.patience.asked) >= self.patience.backoff;
        if due && progress != self.patience.seen {
            self.patience.backoff = (self.patience.backoff * 2).min(LAST_BACKOFF);
            return self.ask_again();
        }
        Ok(false)
    }

    pub(super) fn begin_handover(&mut self, now: Instant) -> Result<bool> {
        let list = self.windows.front().map(Window::waiting).transpose()?.flatten();
        let Some(list) = list else { return Ok(true) };
        let Some(mut handover) = Handover::begin(list, now)? else { return Ok(true) };
        if handover.writer() == self.id {
            // We hold the grants ourselves, for a later window that waits for this one.
            loop {
                let claims = handover.claims()?;
                if claims.is_empty() {
                    return self.ask_again();
                }
                self.give_up(&claims)?;
            }
        }
        let writer = handover.writer();
        let since = match self.patience.vain {
            Some((same, left, since)) if same == writer && handover.theirs >= left => since,
            _ => self.patience.vain.insert((writer, handover.theirs, now)).2,
        };
        if now.duration_since(since) > VAIN {
            self.patience.silent = Some(writer);
            return self.ask_again();
        }
        if handover.ask(&self.context, self.id, now)? == Step::Asked {
            self.patience.unheard = None;
            self.patience.handover = Some(handover);
            return Ok(false);
        }
        let since = match self.patience.unheard {
            Some((same, since)) if same == writer => since,
            _ => self.patience.unheard.insert((writer, now)).1,
        };
        if now.duration_since(since) > SILENCE {
            self.patience.silent = Some(writer);
            return self.ask_again();
        }
        // It ended, or is overloaded: the owner knows more, a little later.
        let later = now.duration_since(self.patience.asked) >= LAST_BACKOFF;
        if later { self.ask_again() } else { Ok(false) }
    }

    /// Another session wants blocks of ours: the grants of what is not packed are given back,
    /// what is packed is sealed, so that it is found stored.
    pub(super) fn give_up(&mut self, claims: &[Claim]) -> Result<()> {
        let mut released = Vec::new();
        for claim in claims {
            let window =
                self.windows.iter_mut().find(|w| (w.first..w.end).contains(&claim.theirs.0));
            if let Some(window) = window
                && window.give_up(claim.theirs)?
            {
                released.push((claim.fingerprint, claim.theirs));
            }
        }
        if released.len() < claims.len() {
            self.seal_blocks()?;
        }
        if !released.is_empty() {
            // Before the answer goes out, and before we ask for these blocks ourselves.
            self.context.owners.release(self.id, released)?;
        }
        Ok(())
    }

    /// The writer has answered: go on with the next claims, or ask for the blocks.
    pub(super) fn gave_up(&mut self, from: SessionId) -> Result<()> {
        let Some(handover) = self.patience.handover.as_mut().filter(|h| h.writer() == from) else {
            return Ok(());
        };
        let step = handover.ask(&self.context, self.id, Instant::now())?;
        if step != Step::Asked {
            // The writer gets some more time for what it keeps.
            self.patience.own_ended = Some(Instant::now());
            self.ask_again()?;
        }
        Ok(())
    }
}
