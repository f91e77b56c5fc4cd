//! What links between hosts say: frames to send, frames that came.

use std::sync::Arc;

use super::frame::{FrameReader, Message};
use super::map::MapEpoch;
use super::outbox::FrameNumber;
use super::peer::{Peer, RemoteAsker};
use super::{Cluster, Instance};
use crate::detect::Verdict;
use crate::error::Result;
use crate::ids::{Fingerprint, HostId, Sequence, SessionId};
use crate::session::event::Event;

/// What a frame has for sessions of ours, who hear of it once it is taken.
#[derive(Default)]
struct Heard {
    answered: Vec<SessionId>,
    advanced: bool,
}

impl Cluster {
    /// What waits for a host, from a frame on.
    ///
    /// # Errors
    /// When it cannot be read back; the host is given up.
    pub fn next(&self, host: HostId, from: FrameNumber) -> Result<Option<(FrameNumber, Vec<u8>)>> {
        let Some(peer) = self.peer(host) else { return Ok(None) };
        let next = peer.outbox.next(from);
        if let Err(error) = &next {
            self.lose(&peer, &error.to_string());
        }
        next
    }

    /// A host has taken everything up to a frame, or answered at least.
    pub fn taken(&self, host: HostId, number: FrameNumber) {
        if let Some(peer) = self.peer(host) {
            peer.outbox.taken(number);
            peer.link().heard = self.now();
        }
    }

    /// We have a link to a host's process, which has taken frames up to `received`. Gives the number to go
    /// on from.
    pub fn connected(
        &self,
        host: HostId,
        instance: Instance,
        received: FrameNumber,
    ) -> FrameNumber {
        let Some(peer) = self.peer(host) else { return FrameNumber(1) };
        self.meet(&peer, instance);
        peer.link().connected = true;
        peer.outbox.taken(received);
        FrameNumber(received.0 + 1)
    }

    /// A host's process says something, whichever way. What the process before it was asked is gone
    /// with that one, and what it was to be told is for nobody.
    fn meet(&self, peer: &Peer, instance: Instance) {
        let mut link = peer.link();
        let known = link.instance.replace(instance);
        (link.lost, link.heard) = (false, self.now());
        drop(link);
        if known.is_some_and(|known| known != instance) {
            eprintln!("fleece-engine: {} was started anew", self.name(peer.host));
            peer.outbox.restart();
            self.cut(peer.host);
            // It has read the journals at its start; what was stored since then it was not told.
            self.put(peer.host, &Message::Behind);
        }
    }

    /// The link to a host has ended.
    pub fn disconnected(&self, host: HostId) {
        if let Some(peer) = self.peer(host) {
            peer.link().connected = false;
        }
    }

    /// A host's process begins to send. Gives the last of its frames that we took.
    pub fn greeted(&self, host: HostId, instance: Instance) -> FrameNumber {
        let Some(peer) = self.peer(host) else { return FrameNumber(0) };
        // Before anything of it is answered.
        self.meet(&peer, instance);
        let mut link = peer.link();
        if link.theirs.replace(instance) != Some(instance) {
            link.received = FrameNumber(0);
            let ended = std::mem::take(&mut link.sessions);
            drop(link);
            ended.into_iter().for_each(|session| self.owner.withdraw(session));
            return FrameNumber(0);
        }
        link.received
    }

    /// Takes a frame of a host in; one that was taken before is passed over. Frames of a host come one
    /// after the other.
    ///
    /// # Errors
    /// [`crate::error::Kind::Usage`] for a frame that no engine writes; when this engine is ending.
    pub fn take(&self, host: HostId, number: FrameNumber, frame: &[u8]) -> Result<()> {
        let Some(peer) = self.peer(host) else { return Ok(()) };
        if number <= peer.link().received {
            return Ok(());
        }
        let mut reader = FrameReader::new(frame);
        let mut heard = Heard::default();
        while let Some(message) = reader.read_next()? {
            self.obey(&peer, message, &mut heard)?;
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
        peer.link().received = number;
        Ok(())
    }

    fn obey(&self, peer: &Arc<Peer>, message: Message, heard: &mut Heard) -> Result<()> {
        match message {
            Message::Ask(session, epoch, asked) => {
                self.enter(peer, session)?;
                self.ask_here(session, epoch, asked)
            }
            Message::Moved(session, epoch, asked) => self.came_back(peer, (session, epoch, asked)),
            Message::Release(session, grants) => {
                self.enter(peer, session)?;
                self.owner.release(session, grants)
            }
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
            Message::Learn(position, entries) => self.learn_from(position, entries),
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
                // A session that is gone or overloaded says nothing: the other one asks again.
                if let Some(writer) = self.registry.events_of(writer) {
                    let _ = writer.try_send(Event::GiveUp { to, claims });
                }
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

    /// Questions of ours come back from a host that does not own them.
    fn came_back(
        &self,
        peer: &Peer,
        (session, epoch, asked): (SessionId, MapEpoch, Vec<(Fingerprint, Sequence)>),
    ) -> Result<()> {
        let asking = self.sessions().get(&session).cloned();
        let (Some(asking), Some((_, first))) = (asking, asked.first()) else { return Ok(()) };
        asking.answers.expect_less(peer.host, *first, asked.len() as u64);
        self.ask_again(session, epoch, asked)
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

    /// A session of another host, known to our owner from its first word on.
    fn enter(&self, peer: &Arc<Peer>, session: SessionId) -> Result<()> {
        if session.host() != peer.host || !peer.link().sessions.insert(session) {
            return Ok(());
        }
        self.owner.register(session, Arc::new(RemoteAsker::new(session, Arc::clone(peer))))
    }
}
