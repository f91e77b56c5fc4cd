//! Blocks whose slices move: who answers for them next has to know whose grants are open, or it would
//! let somebody else write the same block.
//!
//! Who loses a slice decides nothing about it any more. Questions go back to whoever asks
//! ([`Message::Moved`]), open grants to the hosts of the sessions that hold them ([`Message::Handed`]), which
//! claim them where the slice is now ([`Message::Claim`]): so a claim comes before the session's end, as
//! everything that its host says. A host that fills its index holds questions until all hosts have its map
//! and some seconds more, in which claims are there; one that comes later, over a slow link, may find the
//! block granted again, which is counted as a double one.

use std::sync::Arc;
use std::time::Instant;

use super::frame::Message;
use super::map::{MapEpoch, PartitionMap};
use super::{Cluster, split};
use crate::detect::LeftOver;
use crate::error::{Error, Result};
use crate::ids::{Fingerprint, HostId, Sequence, SessionId};
use crate::part::HandOver;

/// The first protocol that has [`Message::Handed`] and [`Message::Claim`].
const HANDS_OVER: u16 = 2;

type Grants = Vec<(Fingerprint, Sequence)>;

impl Cluster {
    /// Tells our owner what is ours by a map: it hands over what is not.
    pub(super) fn keep(&self, map: &PartitionMap) -> Result<()> {
        let cluster = self.me.clone();
        let hand: HandOver = Arc::new(move |session, what| {
            cluster.upgrade().map_or_else(Vec::new, |cluster| cluster.hand_over(session, what))
        });
        self.owner.keep(map.slices(self.us), hand)
    }

    /// From our owner, on its thread: what there is about what it does not own. Gives back the grants for
    /// what is ours by the map of now.
    fn hand_over(&self, session: SessionId, what: LeftOver) -> Grants {
        let map = self.map();
        let ours = |one: &(Fingerprint, Sequence)| map.owner(&one.0) == self.us;
        let (here, epoch) = (session.host() == self.us, map.epoch());
        match what {
            LeftOver::Grants(grants) => {
                let (ours, moved): (Grants, Grants) = grants.into_iter().partition(ours);
                if here {
                    self.claim_there(session, &map, moved);
                } else if !moved.is_empty() {
                    self.put_grants(session.host(), &Message::Handed(session, epoch, moved));
                }
                ours
            }
            LeftOver::Questions(asked) => {
                let (ours, moved): (Grants, Grants) = asked.into_iter().partition(ours);
                // It came back to us, so our index is not filled for it yet.
                if let Err(error) = self.early().push(session, &ours) {
                    self.fail_all(&error);
                }
                if here {
                    for (host, asked) in split(&map, moved) {
                        self.ask_there(host, session, epoch, asked);
                    }
                } else if !moved.is_empty() {
                    self.put(session.host(), &Message::Moved(session, epoch, moved));
                }
                Vec::new()
            }
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
        let ours = |one: &(Fingerprint, Sequence)| map.owner(&one.0) == self.us;
        let (ours, theirs): (Grants, Grants) = grants.into_iter().partition(ours);
        self.claim_there(session, map, theirs);
        // One that has ended is not known to the owner any more.
        if ours.is_empty() { Ok(()) } else { self.owner.claim(session, ours) }
    }

    /// A session of ours claims grants for what others answer for.
    fn claim_there(&self, session: SessionId, map: &PartitionMap, grants: Grants) {
        if !self.sessions().contains_key(&session) {
            return;
        }
        for (host, grants) in split(map, grants) {
            self.put_grants(host, &Message::Claim(session, map.epoch(), grants));
            self.withdraw_if_gone(session, host);
        }
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
            self.put_grants(session.host(), &Message::Handed(session, map.epoch(), moved));
        }
        // One that has ended meanwhile is not known to the owner any more.
        if ours.is_empty() { Ok(()) } else { self.owner.claim(session, ours) }
    }

    /// Tells a host of grants. One of an older version cannot hear it, and may have blocks granted again.
    fn put_grants(&self, host: HostId, message: &Message) {
        if self.peer(host).is_some_and(|peer| peer.link().protocol >= HANDS_OVER) {
            self.put(host, message);
        }
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
