//! One other host: what waits for it, how the link to it is, and its sessions that ask us.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::Instance;
use super::frame::Message;
use super::outbox::{FrameNumber, Outbox, Share};
use crate::detect::Verdict;
use crate::error::{Error, Result};
use crate::ids::{HostId, Sequence, SessionId};
use crate::part::Asker;

/// One other host.
pub(super) struct Peer {
    pub(super) host: HostId,
    /// What we say to it is of this instance.
    pub(super) ours: Instance,
    pub(super) outbox: Outbox,
    link: Mutex<Link>,
    /// The owner's progress that it was told last.
    advanced: AtomicU64,
    /// An answer to it could not be kept: it would wait for ever.
    broken: AtomicBool,
}

/// How it is with a host.
pub(super) struct Link {
    /// The process that our frames go to.
    pub(super) instance: Option<Instance>,
    /// The protocol that both speak.
    pub(super) protocol: u16,
    /// It answered when we called it last.
    pub(super) reached: bool,
    /// When it answered last, or we began to wait for it.
    pub(super) heard: Instant,
    /// It was silent for too long: nothing is asked until it is back.
    pub(super) lost: bool,
    /// The process that sends to us, and the last frame of it that was taken.
    pub(super) theirs: Option<Instance>,
    pub(super) received: FrameNumber,
    /// Its sessions that our owner knows.
    pub(super) sessions: HashSet<SessionId>,
}

impl Peer {
    pub(super) fn new(
        (host, ours): (HostId, Instance),
        dir: &Path,
        share: &Arc<Share>,
        ready: Box<dyn Fn() + Send + Sync>,
        now: Instant,
    ) -> Self {
        let link = Link {
            instance: None,
            protocol: u16::MAX,
            reached: false,
            heard: now,
            lost: false,
            theirs: None,
            received: FrameNumber(0),
            sessions: HashSet::new(),
        };
        let outbox = Outbox::new(dir, share, ready);
        Peer {
            host,
            ours,
            outbox,
            link: Mutex::new(link),
            advanced: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        }
    }

    pub(super) fn link(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts something into the outbox; what cannot be kept is lost with its host a little later.
    fn send(&self, message: &Message) -> Result<()> {
        if self.link().lost {
            return Ok(());
        }
        self.outbox.put(message).inspect_err(|_| self.broken.store(true, Ordering::Release))
    }

    /// Whether something for it was lost since the last call.
    pub(super) fn take_broken(&self) -> bool {
        self.broken.swap(false, Ordering::AcqRel)
    }
}

/// A session of another host, as our owner knows it.
pub(super) struct RemoteAsker {
    session: SessionId,
    peer: Arc<Peer>,
}

impl RemoteAsker {
    pub(super) fn new(session: SessionId, peer: Arc<Peer>) -> Self {
        RemoteAsker { session, peer }
    }
}

impl Asker for RemoteAsker {
    fn answer(&self, sequence: Sequence, verdict: &Verdict) -> Result<()> {
        self.peer.send(&Message::Verdict(self.session, sequence, *verdict))
    }

    fn fail(&self, error: &Error) {
        // Nobody hears it if this cannot be kept either: then the host is given up.
        let _ = self.peer.send(&Message::Failed(self.session, error.to_string()));
    }

    fn answered(&self) {}

    fn advanced(&self, progress: u64) {
        if self.peer.advanced.swap(progress, Ordering::AcqRel) != progress {
            let _ = self.peer.send(&Message::Advanced);
        }
    }
}
