//! What hosts tell each other, as bytes: a frame of messages, small numbers first.
//!
//! A frame can be read alone. Fingerprints take their 20 bytes, everything else is variable-length
//! numbers (LEB128), sequences as differences: at 20 % new blocks a request, its verdict and what is
//! learned of it take some 36 bytes together.

use super::map::MapEpoch;
use crate::detect::{JournalPosition, Verdict};
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, ContainerId, Fingerprint, Incarnation, Sequence, SessionId, Slot};
use crate::session::event::Claim;

/// Things in one message at most: the slots of a container.
const MAX_THINGS: u64 = 65_536;
/// Bytes of a reason.
const MAX_REASON: u64 = 4096;

/// Something that one host tells another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// Questions of a session of the sender, who owns what by the map of that epoch.
    Ask(SessionId, MapEpoch, Vec<(Fingerprint, Sequence)>),
    /// Questions come back: by the map of that epoch the sender does not own what they are about.
    Moved(SessionId, MapEpoch, Vec<(Fingerprint, Sequence)>),
    /// Grants of a session of the receiver: by the map of that epoch another host answers for these blocks.
    Handed(SessionId, MapEpoch, Vec<(Fingerprint, Sequence)>),
    /// Grants that a session of the sender holds, for blocks that the receiver answers for by the map of that
    /// epoch.
    Claim(SessionId, MapEpoch, Vec<(Fingerprint, Sequence)>),
    /// Grants that a session of the sender gives back.
    Release(SessionId, Vec<(Fingerprint, Sequence)>),
    /// Whether a session of the sender waits for nothing but answers.
    Waiting(SessionId, bool),
    /// A session of the sender has ended.
    Withdraw(SessionId),
    /// A container of the sender is sealed and in the journal; of its blocks, those that are the
    /// receiver's by the map of that epoch.
    Learn(MapEpoch, JournalPosition, Vec<(Fingerprint, Address)>),
    /// An answer to a session of the receiver.
    Verdict(SessionId, Sequence, Verdict),
    /// There are no more answers for a session of the receiver, and why.
    Failed(SessionId, String),
    /// Blocks were sealed or a session ended: questions may have new answers.
    Advanced,
    /// A session of the sender asks one of the receiver to leave blocks to it.
    GiveUp {
        /// Who asks.
        to: SessionId,
        /// Who is asked.
        writer: SessionId,
        /// For what.
        claims: Vec<Claim>,
    },
    /// A session of the sender has done with what one of the receiver asked it for.
    GaveUp {
        /// Who has done.
        from: SessionId,
        /// Who asked.
        to: SessionId,
    },
    /// What was sent before is lost: of the sender's sessions and of the answers to the receiver's.
    Reset,
    /// The receiver was not told of everything that was stored: it is in the journals.
    Behind,
}

const ASK: u8 = 1;
const RELEASE: u8 = 2;
const WAITING: u8 = 3;
const WITHDRAW: u8 = 4;
const LEARN: u8 = 5;
const STORED: u8 = 6;
const GRANT: u8 = 7;
const SAME_AS: u8 = 8;
const FAILED: u8 = 9;
const ADVANCED: u8 = 10;
const GIVE_UP: u8 = 11;
const GAVE_UP: u8 = 12;
const RESET: u8 = 13;
const MOVED: u8 = 14;
const BEHIND: u8 = 16;
const HANDED: u8 = 17;
const CLAIM: u8 = 18;
/// No message: the epoch of all that follows.
const EPOCH: u8 = 15;

/// Bytes that a frame grows by at least. Not twofold: where there are many hosts, most of what waits for them
/// is in frames that are being filled.
const GROWTH: usize = 1 << 10;
/// Bytes of a message besides its things: mostly as few, and if there are more, the frame grows by itself.
const HEAD: usize = 32;
/// The same of a thing besides its fingerprint.
const NUMBERS: usize = 4;

/// A frame that is being filled.
#[derive(Default, Debug)]
pub struct FrameWriter {
    bytes: Vec<u8>,
    state: State,
}

/// What the next message is told in relation to.
#[derive(Default, Clone, Copy, Debug)]
struct State {
    session: u32,
    sequence: u64,
    container: (u32, u32),
    epoch: u64,
}

impl FrameWriter {
    /// Bytes so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Bytes of memory that it takes.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The frame; a new one begins.
    pub fn take(&mut self) -> Vec<u8> {
        self.state = State::default();
        std::mem::take(&mut self.bytes)
    }

    /// Appends a message.
    pub fn push(&mut self, message: &Message) {
        self.reserve(0);
        match message {
            Message::Ask(session, epoch, asked) => self.of(*epoch).questions(ASK, *session, asked),
            Message::Moved(session, epoch, asked) => {
                self.of(*epoch).questions(MOVED, *session, asked);
            }
            Message::Handed(session, epoch, grants) => {
                self.of(*epoch).questions(HANDED, *session, grants);
            }
            Message::Claim(session, epoch, grants) => {
                self.of(*epoch).questions(CLAIM, *session, grants);
            }
            Message::Release(session, grants) => self.questions(RELEASE, *session, grants),
            Message::Waiting(session, waiting) => {
                self.begin(WAITING, *session);
                self.number(u64::from(*waiting));
            }
            Message::Withdraw(session) => self.begin(WITHDRAW, *session),
            Message::Learn(epoch, position, entries) => self.of(*epoch).learn(*position, entries),
            Message::Verdict(session, sequence, verdict) => {
                self.verdict(*session, *sequence, verdict);
            }
            Message::Failed(session, reason) => {
                self.begin(FAILED, *session);
                let mut end = reason.len().min(MAX_REASON as usize);
                while !reason.is_char_boundary(end) {
                    end -= 1;
                }
                self.number(end as u64);
                self.bytes.extend_from_slice(&reason.as_bytes()[..end]);
            }
            Message::Advanced => self.bytes.push(ADVANCED),
            Message::GiveUp { to, writer, claims } => {
                self.begin(GIVE_UP, *to);
                self.number(u64::from(writer.0));
                self.number(claims.len() as u64);
                claims.iter().for_each(|claim| self.sequence(claim.theirs));
                claims.iter().for_each(|c| self.bytes.extend_from_slice(&c.fingerprint.0));
            }
            Message::GaveUp { from, to } => {
                self.begin(GAVE_UP, *from);
                self.number(u64::from(to.0));
            }
            Message::Reset => self.bytes.push(RESET),
            Message::Behind => self.bytes.push(BEHIND),
        }
    }

    /// The kind, and the session that it is about as the difference to the one before.
    fn begin(&mut self, kind: u8, session: SessionId) {
        self.bytes.push(kind);
        self.number(u64::from(session.0 ^ self.state.session));
        if session.0 != self.state.session {
            self.state.session = session.0;
            self.state.sequence = 0;
        }
    }

    /// Says the epoch, where the one said last is another.
    fn of(&mut self, epoch: MapEpoch) -> &mut Self {
        if epoch.0 != self.state.epoch {
            self.bytes.push(EPOCH);
            self.number(epoch.0);
            self.state.epoch = epoch.0;
        }
        self
    }

    /// Makes room for a message about so many fingerprints.
    fn reserve(&mut self, things: usize) {
        let needed = HEAD + things * (size_of::<Fingerprint>() + NUMBERS);
        if self.bytes.capacity() - self.bytes.len() < needed {
            self.bytes.reserve_exact(needed.max(GROWTH).max(self.bytes.len() / 4));
        }
    }

    fn questions(&mut self, kind: u8, session: SessionId, all: &[(Fingerprint, Sequence)]) {
        self.reserve(all.len());
        self.begin(kind, session);
        self.number(all.len() as u64);
        all.iter().for_each(|(_, sequence)| self.sequence(*sequence));
        all.iter().for_each(|(fingerprint, _)| self.bytes.extend_from_slice(&fingerprint.0));
    }

    fn learn(&mut self, position: JournalPosition, entries: &[(Fingerprint, Address)]) {
        self.reserve(entries.len());
        self.bytes.push(LEARN);
        self.number(u64::from(position.incarnation.0));
        self.number(position.n);
        self.number(entries.len() as u64);
        entries.iter().for_each(|(_, address)| self.address(*address));
        entries.iter().for_each(|(fingerprint, _)| self.bytes.extend_from_slice(&fingerprint.0));
    }

    fn verdict(&mut self, session: SessionId, sequence: Sequence, verdict: &Verdict) {
        match verdict {
            Verdict::Stored(address) => {
                self.begin(STORED, session);
                self.sequence(sequence);
                self.address(*address);
            }
            Verdict::Grant => {
                self.begin(GRANT, session);
                self.sequence(sequence);
            }
            Verdict::SameAs(writer, theirs) => {
                self.begin(SAME_AS, session);
                self.sequence(sequence);
                self.number(u64::from(writer.0));
                self.number(theirs.0);
            }
        }
    }

    fn sequence(&mut self, sequence: Sequence) {
        self.difference(sequence.0, self.state.sequence);
        self.state.sequence = sequence.0;
    }

    fn address(&mut self, address: Address) {
        let ContainerId { incarnation, counter } = address.container;
        self.number(u64::from(incarnation.0 ^ self.state.container.0));
        self.difference(u64::from(counter), u64::from(self.state.container.1));
        self.number(u64::from(address.slot.0));
        self.state.container = (incarnation.0, counter);
    }

    /// The signed difference, zigzag.
    fn difference(&mut self, number: u64, before: u64) {
        let difference = number.wrapping_sub(before) as i64;
        self.number(((difference << 1) ^ (difference >> 63)) as u64);
    }

    fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.bytes.push(number as u8);
    }
}

/// A frame that is being read.
pub struct FrameReader<'f> {
    bytes: &'f [u8],
    state: State,
}

impl<'f> FrameReader<'f> {
    /// Reads a frame from its beginning.
    #[must_use]
    pub fn new(bytes: &'f [u8]) -> Self {
        FrameReader { bytes, state: State::default() }
    }

    /// The next message; `None` at the end.
    ///
    /// # Errors
    /// [`Kind::Usage`] for anything that no [`FrameWriter`] writes.
    pub fn read_next(&mut self) -> Result<Option<Message>> {
        let kind = loop {
            let Some((kind, rest)) = self.bytes.split_first() else { return Ok(None) };
            self.bytes = rest;
            if *kind != EPOCH {
                break kind;
            }
            self.state.epoch = self.number()?;
        };
        let epoch = MapEpoch(self.state.epoch);
        let message = match *kind {
            ASK => {
                let (session, asked) = self.questions()?;
                Message::Ask(session, epoch, asked)
            }
            MOVED => {
                let (session, asked) = self.questions()?;
                Message::Moved(session, epoch, asked)
            }
            HANDED => {
                let (session, grants) = self.questions()?;
                Message::Handed(session, epoch, grants)
            }
            CLAIM => {
                let (session, grants) = self.questions()?;
                Message::Claim(session, epoch, grants)
            }
            RELEASE => {
                let (session, grants) = self.questions()?;
                Message::Release(session, grants)
            }
            WAITING => Message::Waiting(self.session()?, self.number()? == 1),
            WITHDRAW => Message::Withdraw(self.session()?),
            LEARN => self.learn(epoch)?,
            STORED => {
                let (session, sequence) = (self.session()?, self.sequence()?);
                Message::Verdict(session, sequence, Verdict::Stored(self.address()?))
            }
            GRANT => Message::Verdict(self.session()?, self.sequence()?, Verdict::Grant),
            SAME_AS => {
                let (session, sequence) = (self.session()?, self.sequence()?);
                let (writer, theirs) = (SessionId(self.small()?), Sequence(self.number()?));
                Message::Verdict(session, sequence, Verdict::SameAs(writer, theirs))
            }
            FAILED => {
                let session = self.session()?;
                let length = self.count(MAX_REASON)?;
                let reason = str::from_utf8(self.take(length)?);
                let reason = reason.map_err(|_| wrong("a reason that is not UTF-8"))?;
                Message::Failed(session, reason.to_owned())
            }
            ADVANCED => Message::Advanced,
            GIVE_UP => {
                let (to, writer) = (self.session()?, SessionId(self.small()?));
                let (sequences, fingerprints) = self.sequences()?;
                let claims = fingerprints.into_iter().zip(sequences);
                let claim = |(fingerprint, theirs)| Claim { fingerprint, theirs };
                Message::GiveUp { to, writer, claims: claims.map(claim).collect() }
            }
            GAVE_UP => {
                let from = self.session()?;
                Message::GaveUp { from, to: SessionId(self.small()?) }
            }
            RESET => Message::Reset,
            BEHIND => Message::Behind,
            other => return Err(wrong(&format!("a message of kind {other}"))),
        };
        Ok(Some(message))
    }

    fn session(&mut self) -> Result<SessionId> {
        let session = self.small()? ^ self.state.session;
        if session != self.state.session {
            self.state.session = session;
            self.state.sequence = 0;
        }
        Ok(SessionId(session))
    }

    fn questions(&mut self) -> Result<(SessionId, Vec<(Fingerprint, Sequence)>)> {
        let session = self.session()?;
        let (sequences, fingerprints) = self.sequences()?;
        Ok((session, fingerprints.into_iter().zip(sequences).collect()))
    }

    fn sequences(&mut self) -> Result<(Vec<Sequence>, Vec<Fingerprint>)> {
        let count = self.count(MAX_THINGS)?;
        let sequences = (0..count).map(|_| self.sequence()).collect::<Result<_>>()?;
        Ok((sequences, self.fingerprints(count)?))
    }

    fn learn(&mut self, epoch: MapEpoch) -> Result<Message> {
        let incarnation = Incarnation(self.small()?);
        let n = self.number()?;
        let count = self.count(MAX_THINGS)?;
        let addresses = (0..count).map(|_| self.address()).collect::<Result<Vec<_>>>()?;
        let entries = self.fingerprints(count)?.into_iter().zip(addresses).collect();
        Ok(Message::Learn(epoch, JournalPosition { incarnation, n }, entries))
    }

    fn fingerprints(&mut self, count: usize) -> Result<Vec<Fingerprint>> {
        let bytes = self.take(count * Fingerprint::LEN)?;
        let (fingerprints, _) = bytes.as_chunks::<{ Fingerprint::LEN }>();
        Ok(fingerprints.iter().map(|bytes| Fingerprint(*bytes)).collect())
    }

    fn sequence(&mut self) -> Result<Sequence> {
        self.state.sequence = self.difference(self.state.sequence)?;
        Ok(Sequence(self.state.sequence))
    }

    fn address(&mut self) -> Result<Address> {
        let incarnation = self.small()? ^ self.state.container.0;
        let counter = self.difference(u64::from(self.state.container.1))?;
        let counter = u32::try_from(counter).map_err(|_| wrong("a container's number"))?;
        self.state.container = (incarnation, counter);
        let slot = u16::try_from(self.number()?).map_err(|_| wrong("a slot"))?;
        let container = ContainerId { incarnation: Incarnation(incarnation), counter };
        Ok(Address { container, slot: Slot(slot) })
    }

    fn difference(&mut self, before: u64) -> Result<u64> {
        let zigzag = self.number()?;
        let difference = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
        Ok(before.wrapping_add(difference as u64))
    }

    /// A number of things, each of which takes a byte at least.
    fn count(&mut self, most: u64) -> Result<usize> {
        let count = self.number()?;
        if count > most || count > self.bytes.len() as u64 {
            return Err(wrong(&format!("{count} things in one message")));
        }
        Ok(count as usize)
    }

    fn small(&mut self) -> Result<u32> {
        u32::try_from(self.number()?).map_err(|_| wrong("a number beyond 32 bits"))
    }

    fn number(&mut self) -> Result<u64> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let [byte] = *self.take(1)? else { break };
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(wrong("a number without an end"))
    }

    fn take(&mut self, count: usize) -> Result<&'f [u8]> {
        let taken = self.bytes.split_at_checked(count);
        let (taken, rest) = taken.ok_or_else(|| wrong("less than it says"))?;
        self.bytes = rest;
        Ok(taken)
    }
}

fn wrong(what: &str) -> Error {
    Error::new(Kind::Usage, format!("a frame of another host has {what}"))
}

#[cfg(test)]
mod tests;
