//! Frames, written and read again.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn fingerprint() -> impl Strategy<Value = Fingerprint> {
    any::<[u8; 20]>().prop_map(Fingerprint)
}

fn session() -> impl Strategy<Value = SessionId> {
    prop_oneof![Just(SessionId(7)), any::<u32>().prop_map(SessionId)]
}

fn sequence() -> impl Strategy<Value = Sequence> {
    prop_oneof![(0..99_u64).prop_map(Sequence), any::<u64>().prop_map(Sequence)]
}

fn address() -> impl Strategy<Value = Address> {
    any::<[u8; 10]>().prop_map(Address::from_bytes)
}

fn questions() -> impl Strategy<Value = Vec<(Fingerprint, Sequence)>> {
    prop::collection::vec((fingerprint(), sequence()), 0..20)
}

fn epoch() -> impl Strategy<Value = MapEpoch> {
    (0..3_u64).prop_map(MapEpoch)
}

fn verdict() -> impl Strategy<Value = Verdict> {
    prop_oneof![
        address().prop_map(Verdict::Stored),
        Just(Verdict::Grant),
        (session(), sequence()).prop_map(|(s, n)| Verdict::SameAs(s, n)),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    let position = (any::<u32>(), any::<u64>())
        .prop_map(|(i, n)| JournalPosition { incarnation: Incarnation(i), n });
    let entries = prop::collection::vec((fingerprint(), address()), 0..20);
    let claim =
        (fingerprint(), sequence()).prop_map(|(fingerprint, theirs)| Claim { fingerprint, theirs });
    let claims = prop::collection::vec(claim, 0..20);
    prop_oneof![
        (session(), epoch(), questions()).prop_map(|(s, e, q)| Message::Ask(s, e, q)),
        (session(), epoch(), questions()).prop_map(|(s, e, q)| Message::Moved(s, e, q)),
        (session(), epoch(), questions()).prop_map(|(s, e, q)| Message::Handed(s, e, q)),
        (session(), epoch(), questions()).prop_map(|(s, e, q)| Message::Claim(s, e, q)),
        (session(), questions()).prop_map(|(s, q)| Message::Release(s, q)),
        (session(), any::<bool>()).prop_map(|(s, w)| Message::Waiting(s, w)),
        session().prop_map(Message::Withdraw),
        (epoch(), position, entries).prop_map(|(m, p, e)| Message::Learn(m, p, e)),
        (session(), sequence(), verdict()).prop_map(|(s, n, v)| Message::Verdict(s, n, v)),
        (session(), "[a-zé ]{0,30}").prop_map(|(s, r)| Message::Failed(s, r)),
        Just(Message::Advanced),
        (session(), session(), claims).prop_map(|(to, writer, claims)| Message::GiveUp {
            to,
            writer,
            claims
        }),
        (session(), session()).prop_map(|(from, to)| Message::GaveUp { from, to }),
        Just(Message::Reset),
        Just(Message::Behind),
    ]
}

fn read(bytes: &[u8]) -> Result<Vec<Message>> {
    let mut reader = FrameReader::new(bytes);
    let mut messages = Vec::new();
    while let Some(message) = reader.read_next()? {
        messages.push(message);
    }
    Ok(messages)
}

proptest! {
    #[test]
    fn what_is_written_is_read(messages in prop::collection::vec(message(), 0..30)) {
        let mut writer = FrameWriter::default();
        messages.iter().for_each(|message| writer.push(message));
        let frame = writer.take();
        prop_assert_eq!(read(&frame).unwrap(), messages);
        // Cut anywhere it is refused, or ends early; it never panics.
        for cut in 0..frame.len() {
            let _ = read(&frame[..cut]);
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = read(&bytes);
    }
}

#[test]
fn a_reason_is_utf8_and_never_longer_than_it_was_sent() {
    let mut writer = FrameWriter::default();
    writer.push(&Message::Failed(SessionId(7), "é".repeat(MAX_REASON as usize)));
    let mut frame = writer.take();
    let cut = Message::Failed(SessionId(7), "é".repeat(MAX_REASON as usize / 2));
    assert_eq!(read(&frame).unwrap(), [cut]);
    // Replaced by marks of three bytes, what is wrong would be more than a frame has room for.
    frame.iter_mut().rev().take(MAX_REASON as usize).for_each(|byte| *byte = 0xff);
    assert!(read(&frame).unwrap_err().to_string().contains("not UTF-8"));
}

#[test]
fn a_request_its_verdict_and_what_is_learned_take_less_than_44_bytes() {
    // One in four of a session's blocks is this owner's; a fifth is new, and stored as it comes.
    let session = SessionId(3 << 24 | 1_234_567);
    let scatter = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let print = |n: u64| {
        let mut bytes = [0; 20];
        bytes[..8].copy_from_slice(&scatter(n).to_be_bytes());
        Fingerprint(bytes)
    };
    let at = |n: u64| Address {
        container: ContainerId { incarnation: Incarnation(5), counter: (n >> 14) as u32 },
        slot: Slot(n as u16 & 0x3fff),
    };
    let count = 1_u64 << 16;
    let mut asked: Vec<_> = (0..count).map(|n| (print(n), Sequence(4 * n))).collect();
    let mut writer = FrameWriter::default();
    for batch in asked.chunks(2048) {
        writer.push(&Message::Ask(session, MapEpoch(7), batch.to_vec()));
    }
    // The answers come in the order of the fingerprints.
    asked.sort();
    for (n, (_, sequence)) in asked.iter().enumerate() {
        let verdict = match n % 5 {
            0 => Verdict::Grant,
            _ => Verdict::Stored(at(scatter(sequence.0) >> 34)),
        };
        writer.push(&Message::Verdict(session, *sequence, verdict));
    }
    let learned: Vec<_> = (0..count / 5).map(|n| (print(n), at(4 * n))).collect();
    for (n, batch) in learned.chunks(4096).enumerate() {
        let position = JournalPosition { incarnation: Incarnation(5), n: n as u64 };
        writer.push(&Message::Learn(MapEpoch(1), position, batch.to_vec()));
    }
    let each = writer.len() as f64 / count as f64;
    println!("{each:.1} bytes a request");
    assert!(each < 44.0, "{each}");
}
