//! Taking blocks over from a session that holds their grants but does not get to them.
//!
//! A waiter asks the writer to give up what it has not packed. What is packed already is
//! sealed at once by the writer, and found by asking again. A writer that does not even
//! answer is given up on: the block is stored twice, which is counted, and harmless.

use std::time::{Duration, Instant};

use super::event::{Claim, Event};
use super::window::WaitingList;
use crate::error::Result;
use crate::ids::{Sequence, SessionId};

/// How long a writer may be silent when asked to give something up.
const SILENCE: Duration = Duration::from_secs(10);
/// Claims in one message: 64 KiB.
const CLAIMS: usize = 4096;
/// A longer list is shared: the writer keeps its first half.
const SHARE_FROM: u64 = 65_536;

/// The talk with one writer about one window's waiting list.
pub(super) struct Handover {
    writer: SessionId,
    list: WaitingList,
    /// Questions to leave to the writer.
    leave: u64,
    asked: Instant,
    /// The requests that were given to us, relative to the window's first: a bit each.
    taken: Vec<u64>,
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
        let len = list.len();
        let leave = if len > SHARE_FROM { len / 2 } else { 0 };
        list.rewind();
        Ok(Some(Handover { writer, list, leave, asked: now, taken: Vec::new() }))
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
            if self.leave > 0 {
                self.leave -= 1;
            } else if unsettled.writer.0 == self.writer {
                let mine = unsettled.question.sequence;
                claims.push(Claim { theirs: unsettled.writer.1, mine });
            }
        }
        Ok(claims)
    }

    /// Asks the writer for the next claims.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub(super) fn ask(
        &mut self,
        writer: &crossbeam_channel::Sender<Event>,
        us: &crossbeam_channel::Sender<Event>,
        now: Instant,
    ) -> Result<Step> {
        let claims = self.claims()?;
        if claims.is_empty() {
            return Ok(Step::Complete);
        }
        self.asked = now;
        match writer.try_send(Event::GiveUp { to: us.clone(), claims }) {
            Ok(()) => Ok(Step::Asked),
            Err(_) => Ok(Step::NotNow),
        }
    }

    /// Whether the writer owes an answer for too long.
    #[must_use]
    pub(super) fn is_silent(&self, now: Instant) -> bool {
        now.duration_since(self.asked) > SILENCE
    }

    /// Notes what was given to us, of a window that begins at `first`.
    pub(super) fn take(&mut self, first: u64, claims: &[Claim]) {
        for claim in claims {
            let index = claim.mine.0.saturating_sub(first);
            let word = (index / 64) as usize;
            if self.taken.len() <= word {
                self.taken.resize(word + 1, 0);
            }
            self.taken[word] |= 1 << (index % 64);
        }
    }

    /// Whether the request's block was given to us.
    #[must_use]
    pub(super) fn has(&self, first: u64, sequence: Sequence) -> bool {
        let index = sequence.0 - first;
        self.taken.get((index / 64) as usize).is_some_and(|word| word >> (index % 64) & 1 == 1)
    }
}
