//! What links between hosts say: frames to send, frames that came.

use std::sync::Arc;

use super::frame::{FrameReader, Message};
use super::map::MapEpoch;
use super::outbox::FrameNumber;
use super::peer::{Peer, RemoteAsker};
use super::{Cluster, Instance};
use crate::detect::Verdict;
use crate::error::{Error, Kind, Result};
use crate::ids::{Fingerprint, HostId, Sequence, SessionId};
use crate::session::event::{Claim, Event};

/// A process that greeted us, by one of its links.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// Its host.
    pub host: HostId,
    /// What it says is of this instance.
    pub instance: Instance,
}

/// What a host is told that greets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Welcome {
    /// The last of its frames that was taken.
    pub received: FrameNumber,
    /// Its frames are not taken: who is greeted has given it up, and cannot reach it to answer.
    pub unreached: bool,
}

/// What a frame has for sessions of ours, who hear of it once it is taken.
#[derive(Default)]
struct Heard {
    answered: Vec<SessionId>,
    advanced: bool,
}

impl Cluster {
    /// The host that a link goes to, if what goes over it is still of this instance of ours: since the
    /// link was made it may have left the map and come back, and be told everything anew.
    fn linked(&self, host: HostId, ours: Instance) -> Result<Arc<Peer>> {
        let peer = self.peer(host).filter(|peer| peer.ours == ours);
        let what = || format!("the link to {} is from before a change of the map", self.name(host));
        peer.ok_or_else(|| Error::new(Kind::Busy, what()))
    }

    /// What waits for a host, from a frame on.
    ///
    /// # Errors
    /// When the link is outdated; when it cannot be read back: the host is given up.
    pub fn next(
        &self,
        (host, ours): (HostId, Instance),
        from: FrameNumber,
    ) -> Result<Option<(FrameNumber, Vec<u8>)>> {
        let peer = self.linked(host, ours)?;
        let next = peer.outbox.next(from);
        if let Err(error) = &next {
            self.lose(&peer, &error.to_string());
        }
        next
    }

    /// A host has taken everything up to a frame, or answered at least.
    ///
    /// # Errors
    /// When the link is outdated.
    pub fn taken(&self, (host, ours): (HostId, Instance), number: FrameNumber) -> Result<()> {
        let peer = self.linked(host, ours)?;
        peer.outbox.taken(number);
        peer.link().heard = self.now();
        Ok(())
    }

    /// We have a link to a host's process, which has taken frames of this instance of ours up to
    /// `received`. Gives the number to go on from.
    ///
    /// # Errors
    /// When the link is outdated already.
    pub fn connected(
        &self,
        (host, ours): (HostId, Instance),
        instance: Instance,
        received: FrameNumber,
    ) -> Result<FrameNumber> {
        let peer = self.linked(host, ours)?;
        self.meet(&peer, instance, true);
        peer.outbox.taken(received);
        Ok(FrameNumber(received.0 + 1))
    }

    /// A host answers us, but cannot reach us: it will not answer questions.
    pub fn unreached(&self, host: HostId, instance: Instance) {
        let Some(peer) = self.peer(host) else { return };
        self.meet(&peer, instance, false);
        peer.link().reached = true;
        self.lose(&peer, "it cannot reach this host");
    }

    /// A host's process says something, whichever way; `answers`: to us, and will again. What the process
    /// before it was asked is gone with that one, and what it was to be told is for nobody.
    fn meet(&self, peer: &Peer, instance: Instance, answers: bool) {
        let mut link = peer.link();
        let known = link.instance.replace(instance);
        // That it was silent says nothing of a process that is new.
        if answers || known != Some(instance) {
            (link.lost, link.heard) = (false, self.now());
        }
        link.reached |= answers;
        drop(link);
        if known.is_some_and(|known| known != instance) {
            eprintln!("fleece-engine: {} was started anew", self.name(peer.host));
            peer.outbox.restart();
            self.cut(peer.host);
            // It has read the journals at its start; what was stored since then it was not told.
            self.put(peer.host, &Message::Behind);
        }
    }

    /// A host greets, or is greeted, and this is the newest protocol that both speak. Of who did not yet the
    /// newest is taken for granted.
    pub fn speaks(&self, host: HostId, protocol: u16) {
        if let Some(peer) = self.peer(host) {
            peer.link().protocol = protocol;
        }
    }

    /// A host cannot be reached, or its link broke.
    pub fn disconnected(&self, host: HostId) {
        if let Some(peer) = self.peer(host) {
            peer.link().reached = false;
        }
    }

    /// A host's process begins to send.
    pub fn greeted(&self, Caller { host, instance }: Caller) -> Welcome {
        let received = FrameNumber(0);
        let Some(peer) = self.peer(host) else { return Welcome { received, unreached: false } };
        // Before anything of it is answered.
        self.meet(&peer, instance, false);
        let mut link = peer.link();
        let unreached = link.lost && !link.reached;
        if link.theirs.replace(instance) != Some(instance) {
            link.received = received;
            let ended = std::mem::take(&mut link.sessions);
            drop(link);
            ended.into_iter().for_each(|session| self.owner.withdraw(session));
            return Welcome { received, unreached };
        }
        Welcome { received: link.received, unreached }
    }

    /// Whether frames of a caller are taken. A link may be older than the map, and than the process that
    /// calls now; and whoever is given up gets no answers: it must not go on waiting for them.
    ///
    /// # Errors
    /// When they are not: it has to greet again.
    pub fn hears(&self, caller: Caller) -> Result<()> {
        let known = self.peer(caller.host).map(|peer| {
            let link = peer.link();
            (link.theirs == Some(caller.instance), link.lost)
        });
        let why = match known {
            Some((true, false)) => return Ok(()),
            Some((true, true)) => "it is given up until it can be reached",
            Some((false, _)) => {
                "its link is of another process, or from before a change of the map"
            }
            None => "it is not in the cluster",
        };
        let name = self.name(caller.host);
        Err(Error::new(Kind::Busy, format!("what {name} says is not heard: {why}")))
    }

    /// Takes a frame of a host in; one that was taken before is passed over. Frames of a host come one
    /// after the other.
    ///
    /// # Errors
    /// As [`Cluster::hears`]; [`Kind::Usage`] for a frame that no engine writes; when this engine is
    /// ending.
    pub fn take(&self, caller: Caller, number: FrameNumber, frame: &[u8]) -> Result<()> {
        self.hears(caller)?;
        let Some(peer) = self.peer(caller.host) else { return Ok(()) };
        if number <= peer.link().received {
            return Ok(());
        }
        let mut reader = FrameReader::new(frame);
        let mut heard = Heard::default();
        while let Some(message) = reader.read_next()? {
            self.obey((&peer, caller.instance), message, &mut heard)?;
        }
        if heard.advanced {
            self.owner.advanced();
            self.wake_all();
        }
        heard.answered.dedup();
        for session in heard.answered {
            if let Some(asking) = self.sessions().get(&session) {
                (asking.wake)();
            }
        }
        let mut link = peer.link();
        // A process that was started meanwhile begins at its own first frame.
        if link.theirs == Some(caller.instance) {
            link.received = number;
        }
        Ok(())
    }

    fn obey(
        &self,
        (peer, instance): (&Arc<Peer>, Instance),
        message: Message,
        heard: &mut Heard,
    ) -> Result<()> {
        match message {
            Message::Ask(session, epoch, asked) => {
                self.asked((peer, instance), (session, epoch, asked))
            }
            Message::Moved(session, epoch, asked) => self.came_back(peer, (session, epoch, asked)),
            Message::Handed(session, epoch, grants) => self.handed(session, epoch, grants),
            Message::Claim(session, epoch, grants) => match self.enter(peer, instance, session)? {
                true => self.claimed(session, epoch, grants),
                false => Ok(()),
            },
            Message::Release(session, grants) => match self.enter(peer, instance, session)? {
                true => self.owner.release(session, grants),
                false => Ok(()),
            },
            Message::Waiting(session, waiting) => {
                if peer.link().sessions.contains(&session) {
                    self.owner.waiting(session, waiting)?;
                }
                Ok(())
            }
            Message::Withdraw(session) => {
                if peer.link().sessions.remove(&session) {
                    self.owner.withdraw(session);
                }
                Ok(())
            }
            Message::Learn(epoch, position, entries) => self.learn_from(epoch, position, entries),
            Message::Verdict(session, sequence, verdict) => {
                self.answer(peer, (session, sequence, verdict), &mut heard.answered);
                Ok(())
            }
            Message::Failed(session, reason) => {
                let name = self.name(peer.host);
                eprintln!("fleece-engine: {name} cannot answer, so blocks are missed: {reason}");
                if let Some(asking) = self.sessions().get(&session) {
                    asking.answers.cut(peer.host);
                    heard.answered.push(session);
                }
                Ok(())
            }
            Message::Advanced => {
                heard.advanced = true;
                Ok(())
            }
            Message::GiveUp { to, writer, claims } => {
                self.asked_to_give_up(writer, to, claims);
                Ok(())
            }
            Message::GaveUp { from, to } => {
                if let Some(waiter) = self.registry.events_of(to) {
                    let _ = waiter.try_send(Event::GaveUp { from });
                }
                Ok(())
            }
            Message::Behind => self.owner.refill(),
            Message::Reset => {
                let ended = std::mem::take(&mut peer.link().sessions);
                ended.into_iter().for_each(|session| self.owner.withdraw(session));
                self.cut(peer.host);
                self.owner.refill()
            }
        }
    }

    /// A session of another host wants blocks of one of ours.
    fn asked_to_give_up(&self, writer: SessionId, to: SessionId, claims: Vec<Claim>) {
        match self.registry.events_of(writer) {
            // One that is overloaded says nothing: the other one asks again.
            Some(writer) => drop(writer.try_send(Event::GiveUp { to, claims })),
            None => {
                // One that is gone has nothing any more. If it was of a process before this one, owners
                // that this one has not spoken to yet still keep its grants.
                let message = Message::Withdraw(writer);
                self.others().iter().for_each(|host| self.put(*host, &message));
                self.gave_up(writer, to);
            }
        }
    }

    /// Questions of another host.
    fn asked(
        &self,
        (peer, instance): (&Arc<Peer>, Instance),
        (session, epoch, asked): (SessionId, MapEpoch, Vec<(Fingerprint, Sequence)>),
    ) -> Result<()> {
        if self.enter(peer, instance, session)?
            && let Err(error) = self.ask_here(session, epoch, asked)
        {
            // The frame is taken all the same: what else is in it must not be obeyed twice.
            self.put(peer.host, &Message::Failed(session, error.to_string()));
        }
        Ok(())
    }

    /// Questions of ours come back from a host that does not own them.
    fn came_back(
        &self,
        peer: &Peer,
        (session, epoch, asked): (SessionId, MapEpoch, Vec<(Fingerprint, Sequence)>),
    ) -> Result<()> {
        let asking = self.sessions().get(&session).cloned();
        let Some(asking) = asking else { return Ok(()) };
        asking.answers.expect_less(peer.host, &asked);
        if let Err(error) = self.ask_again(session, epoch, asked) {
            asking.answers.fail(&error);
            (asking.wake)();
        }
        Ok(())
    }

    /// An answer to a session of ours.
    fn answer(
        &self,
        peer: &Peer,
        (session, sequence, verdict): (SessionId, Sequence, Verdict),
        answered: &mut Vec<SessionId>,
    ) {
        let asking = self.sessions().get(&session).cloned();
        let Some(asking) = asking else { return };
        if let Err(error) = asking.answers.put(peer.host, sequence, &verdict) {
            asking.answers.fail(&error);
        }
        answered.push(session);
    }

    /// A session of another host, known to our owner from its first word on. False if it is not one of
    /// the process that says so.
    fn enter(&self, peer: &Arc<Peer>, instance: Instance, session: SessionId) -> Result<bool> {
        {
            let mut link = peer.link();
            if session.host() != peer.host || link.theirs != Some(instance) || link.lost {
                return Ok(false);
            }
            if !link.sessions.insert(session) {
                return Ok(true);
            }
        }
        let asker = Arc::new(RemoteAsker::new(session, Arc::clone(peer)));
        self.owner.register(session, asker).map(|()| true)
    }
}
