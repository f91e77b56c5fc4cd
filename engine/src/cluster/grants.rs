//! Grants of blocks whose slices move: who answers for them next has to know of them, or it would let
//! somebody else write the same block.
//!
//! Who loses a slice hands its open grants to the hosts of the sessions that hold them
//! ([`Message::Handed`]), and they claim them where the slice is now ([`Message::Claim`]): so a claim comes
//! before the session's end, as everything that its host says. A host that fills its index holds
//! questions until all hosts have its map and some seconds more, in which claims are there; one that comes
//! later, over a slow link, may find the block granted again, which is counted as a double one.

use std::sync::Arc;
use std::time::Instant;

use super::frame::Message;
use super::map::{MapEpoch, PartitionMap};
use super::{Cluster, split};
use crate::error::{Error, Result};
use crate::ids::{Fingerprint, Sequence, SessionId};
use crate::part::HandOver;

type Grants = Vec<(Fingerprint, Sequence)>;

impl Cluster {
    /// Tells our owner what is ours by a map: it hands over what is not.
    pub(super) fn keep(&self, map: &PartitionMap) -> Result<()> {
        let cluster = self.me.clone();
        let hand: HandOver = Arc::new(move |session, grants| {
            if let Some(cluster) = cluster.upgrade() {
                cluster.hand_over(session, grants);
            }
        });
        self.owner.keep(map.slices(self.us), hand)
    }

    /// From our owner, on its thread: grants for what we do not answer for.
    fn hand_over(&self, session: SessionId, mut grants: Grants) {
        let map = self.map();
        if session.host() != self.us {
            return self.put(session.host(), &Message::Handed(session, map.epoch(), grants));
        }
        // The owner cannot wait for itself: what came back to us a moment ago may be granted again.
        grants.retain(|(fingerprint, _)| map.owner(fingerprint) != self.us);
        if let Err(error) = self.claim_each(session, &map, grants) {
            could_not_keep(&error);
        }
    }

    /// Grants of a session of ours, for what another host answers for by the map of that epoch.
    pub(super) fn handed(&self, session: SessionId, epoch: MapEpoch, grants: Grants) -> Result<()> {
        if self.claim_later(session, epoch, &grants)? {
            return Ok(());
        }
        self.claim_each(session, &self.map(), grants)
    }

    fn claim_each(&self, session: SessionId, map: &PartitionMap, grants: Grants) -> Result<()> {
        if !self.sessions().contains_key(&session) {
            return Ok(());
        }
        for (host, grants) in split(map, grants) {
            if host == self.us {
                self.owner.claim(session, grants)?;
            } else {
                self.put(host, &Message::Claim(session, map.epoch(), grants));
                self.withdraw_if_gone(session, host);
            }
        }
        Ok(())
    }

    /// A session of another host claims grants for what we answer for by the map of that epoch.
    pub(super) fn claimed(
        &self,
        session: SessionId,
        epoch: MapEpoch,
        grants: Grants,
    ) -> Result<()> {
        if self.claim_later(session, epoch, &grants)? {
            return Ok(());
        }
        let map = self.map();
        let ours = |one: &(Fingerprint, Sequence)| map.owner(&one.0) == self.us;
        let (ours, moved): (Grants, Grants) = grants.into_iter().partition(ours);
        if !moved.is_empty() {
            self.put(session.host(), &Message::Handed(session, map.epoch(), moved));
        }
        // One that has ended meanwhile is not known to the owner any more.
        if ours.is_empty() { Ok(()) } else { self.owner.claim(session, ours) }
    }

    /// Keeps claims by a map that we do not have yet; false if we have it.
    fn claim_later(&self, session: SessionId, epoch: MapEpoch, grants: &Grants) -> Result<bool> {
        // Under the lock: whoever adopts a map looks here afterwards.
        let mut claims = self.claims();
        let later = self.map().epoch() < epoch;
        if later {
            claims.push(session, grants, self.now())?;
        }
        Ok(later)
    }

    /// Claims that waited for the map that we have now.
    pub(super) fn look_at_claims(&self) {
        let (claims, map) = (self.claims().take(), self.map());
        let claimed = claims.each(|session, grants| {
            if session.host() == self.us {
                self.claim_each(session, &map, grants)
            } else {
                self.claimed(session, map.epoch(), grants)
            }
        });
        if let Err(error) = claimed {
            could_not_keep(&error);
        }
    }

    /// Claims that have waited too long for a newer map.
    pub(super) fn give_claims_up(&self, now: Instant) {
        drop(self.claims().take_old(now));
    }
}

fn could_not_keep(error: &Error) {
    eprintln!("fleece-engine: blocks that are being written may be stored twice: {error}");
}
