//! Frames of another host for the fuzzer.

use super::frame::{FrameReader, FrameWriter, Message};

/// A frame that is read whole comes out of the writer as it was meant.
pub fn frames(data: &[u8]) {
    let Some(messages) = read(data) else { return };
    let mut writer = FrameWriter::default();
    messages.iter().for_each(|message| writer.push(message));
    assert_eq!(read(&writer.take()).as_ref(), Some(&messages), "it has two meanings");
}

fn read(bytes: &[u8]) -> Option<Vec<Message>> {
    let mut reader = FrameReader::new(bytes);
    let mut messages = Vec::new();
    while let Some(message) = reader.read_next().ok()? {
        messages.push(message);
    }
    Some(messages)
}

/// A frame of every kind of message, as a seed.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use super::map::MapEpoch;
    use crate::detect::{JournalPosition, Verdict};
    use crate::ids::{
        Address, ContainerId, Fingerprint, HostId, Incarnation, Sequence, SessionId, Slot,
    };
    use crate::session::event::Claim;

    let session = SessionId::on(HostId(2), 7);
    let (fingerprint, theirs) = (Fingerprint([9; 20]), Sequence(40));
    let asked = || vec![(fingerprint, theirs), (Fingerprint([1; 20]), Sequence(3))];
    let container = ContainerId { incarnation: Incarnation(3), counter: 5 };
    let at = Address { container, slot: Slot(11) };
    let position = JournalPosition { incarnation: Incarnation(3), n: 12 };
    let answer = |verdict| Message::Verdict(session, theirs, verdict);
    let all = [
        Message::Ask(session, MapEpoch(4), asked()),
        Message::Moved(session, MapEpoch(5), asked()),
        Message::Release(session, asked()),
        Message::Waiting(session, true),
        Message::Learn(MapEpoch(5), position, vec![(fingerprint, at)]),
        answer(Verdict::Stored(at)),
        answer(Verdict::Grant),
        answer(Verdict::SameAs(SessionId(1), Sequence(2))),
        Message::Failed(session, "no room".into()),
        Message::Advanced,
        Message::GiveUp {
            to: session,
            writer: SessionId(1),
            claims: vec![Claim { fingerprint, theirs }],
        },
        Message::GaveUp { from: SessionId(1), to: session },
        Message::Reset,
        Message::Behind,
        Message::Withdraw(session),
    ];
    let mut writer = FrameWriter::default();
    all.iter().for_each(|message| writer.push(message));
    vec![("every-message", writer.take())]
}
