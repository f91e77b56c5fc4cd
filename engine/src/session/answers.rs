//! Where an owner puts its verdicts: a sheet per open window, sorted by sequence.
//!
//! The owner never waits for a session: it writes here and goes on. A sheet spills to
//! the local disk, so that its memory is the same for ten answers and for millions.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::detect::Verdict;
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, Fingerprint, HostId, Sequence, SessionId};
use crate::sort::{Sorted, Sorter};

/// sequence (big endian), tag, and what it needs: an address, a session and a sequence
const RECORD: usize = 8 + 1 + 12;

const STORED: u8 = 0;
const GRANT: u8 = 1;
const SAME_AS: u8 = 2;
const NOBODY: u8 = 3;
/// The same answer as to an earlier request, of this session: session and sequence.
const LIKE: u8 = 4;
/// No answer: later requests get the same answer as this one.
const LIKED: u8 = 5;
/// A request is like one of so many before it at most; so many answers are remembered, twice.
pub const LIKE_REACH: usize = 8192;

/// The answers to one session's requests.
pub struct Answers {
    dir: PathBuf,
    run_bytes: usize,
    sheets: Mutex<Sheets>,
    failure: Mutex<Option<Error>>,
}

#[derive(Default)]
struct Sheets {
    open: VecDeque<Sheet>,
    /// Hosts from which no answers come any more.
    cut: Vec<HostId>,
}

struct Sheet {
    /// The window's first sequence; it reaches to the next sheet's.
    first: u64,
    answered: u64,
    /// How much other hosts were asked in this round, and have answered.
    elsewhere: Vec<Elsewhere>,
    sorter: Sorter<RECORD>,
}

struct Elsewhere {
    host: HostId,
    asked: u64,
    answered: u64,
}

impl Sheet {
    /// How it is with another host.
    fn of(&mut self, host: HostId) -> &mut Elsewhere {
        let at = self.elsewhere.iter().position(|one| one.host == host).unwrap_or_else(|| {
            self.elsewhere.push(Elsewhere { host, asked: 0, answered: 0 });
            self.elsewhere.len() - 1
        });
        &mut self.elsewhere[at]
    }
}

impl Sheets {
    fn at(&mut self, sequence: Sequence) -> Option<&mut Sheet> {
        self.open.iter_mut().rev().find(|sheet| sheet.first <= sequence.0)
    }

    /// Changes what a host is asked by how many of these each sheet has: what waited for a map or an index
    /// comes back in batches of several windows.
    fn book(
        &mut self,
        host: HostId,
        asked: &[(Fingerprint, Sequence)],
        change: impl Fn(&mut Elsewhere, u64),
    ) {
        let mut end = u64::MAX;
        for sheet in self.open.iter_mut().rev() {
            let of_it = |one: &&(Fingerprint, Sequence)| (sheet.first..end).contains(&one.1.0);
            let count = asked.iter().filter(of_it).count() as u64;
            end = sheet.first;
            if count > 0 {
                change(sheet.of(host), count);
            }
        }
    }
}

impl Answers {
    /// Sorts in `run_bytes` for each open window, spilling into `dir`.
    #[must_use]
    pub fn new(dir: &Path, run_bytes: usize) -> Self {
        Answers { dir: dir.into(), run_bytes, sheets: Mutex::default(), failure: Mutex::default() }
    }

    fn sheets(&self) -> MutexGuard<'_, Sheets> {
        self.sheets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that answers cannot be given any more.
    pub fn fail(&self, error: &Error) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        let told = || Error::caused(error.kind(), "detection failed", error.retold());
        failure.get_or_insert_with(told);
    }

    /// Why there are no answers any more, if so.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.as_ref().map(Error::retold)
    }

    fn sorter(&self) -> Sorter<RECORD> {
        Sorter::new(&self.dir, self.run_bytes)
    }

    /// Begins a sheet for the window whose sequences start at `first`.
    pub fn open(&self, first: u64) {
        let sheet = Sheet { first, answered: 0, elsewhere: Vec::new(), sorter: self.sorter() };
        self.sheets().open.push_back(sheet);
    }

    /// Ends the oldest sheet.
    pub fn close_oldest(&self) {
        self.sheets().open.pop_front();
    }

    /// Another host is asked about these blocks; false if it is cut off: then nobody answers.
    pub fn expect(&self, host: HostId, asked: &[(Fingerprint, Sequence)]) -> bool {
        let mut sheets = self.sheets();
        sheets.book(host, asked, |one, count| one.asked += count);
        !sheets.cut.contains(&host)
    }

    /// Whether a host owes answers.
    #[must_use]
    pub fn waits_for(&self, host: HostId) -> bool {
        let sheets = self.sheets();
        let owes = |one: &Elsewhere| one.host == host && one.answered < one.asked;
        !sheets.cut.contains(&host) && sheets.open.iter().any(|s| s.elsewhere.iter().any(owes))
    }

    /// A host does not answer for these blocks that it was asked about.
    pub fn expect_less(&self, host: HostId, asked: &[(Fingerprint, Sequence)]) {
        let less = |one: &mut Elsewhere, count| one.asked = one.asked.saturating_sub(count);
        self.sheets().book(host, asked, less);
    }

    /// Nobody will answer this.
    ///
    /// # Errors
    /// When the answers cannot be spilled.
    pub fn put_nobody(&self, sequence: Sequence) -> Result<()> {
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(&sequence.0.to_be_bytes());
        record[8] = NOBODY;
        let mut sheets = self.sheets();
        let Some(sheet) = sheets.at(sequence) else { return Ok(()) };
        sheet.answered += 1;
        sheet.sorter.push(&record)
    }

    /// A request gets the same answer as an earlier one of the session, at most [`LIKE_REACH`] requests
    /// before it: the same as that one's block if that one is granted. False if they are not of the
    /// same window. `told`: of the earlier one this was said before.
    ///
    /// # Errors
    /// When the answers cannot be spilled.
    pub fn put_like(
        &self,
        sequence: Sequence,
        (session, first): (SessionId, Sequence),
        told: bool,
    ) -> Result<bool> {
        let mut sheets = self.sheets();
        let Some(sheet) = sheets.at(sequence) else { return Ok(true) };
        if first.0 < sheet.first {
            return Ok(false);
        }
        let record = |sequence: Sequence, tag, other: Sequence| {
            let mut record = [0; RECORD];
            record[..8].copy_from_slice(&sequence.0.to_be_bytes());
            record[8] = tag;
            record[9..13].copy_from_slice(&session.0.to_be_bytes());
            record[13..].copy_from_slice(&other.0.to_be_bytes());
            record
        };
        if !told {
            sheet.sorter.push(&record(first, LIKED, first))?;
        }
        sheet.sorter.push(&record(sequence, LIKE, first))?;
        sheet.answered += 1;
        Ok(true)
    }

    /// No answer of a host counts any more, and none is waited for.
    pub fn cut(&self, host: HostId) {
        let mut sheets = self.sheets();
        if !sheets.cut.contains(&host) {
            sheets.cut.push(host);
        }
    }

    /// Notes one answer of a host.
    ///
    /// # Errors
    /// When the answers cannot be spilled.
    pub fn put(&self, host: HostId, sequence: Sequence, verdict: &Verdict) -> Result<()> {
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(&sequence.0.to_be_bytes());
        match verdict {
            Verdict::Stored(address) => {
                record[8] = STORED;
                record[9..9 + Address::LEN].copy_from_slice(&address.to_bytes());
            }
            Verdict::Grant => record[8] = GRANT,
            Verdict::SameAs(session, theirs) => {
                record[8] = SAME_AS;
                record[9..13].copy_from_slice(&session.0.to_be_bytes());
                record[13..].copy_from_slice(&theirs.0.to_be_bytes());
            }
        }
        let mut sheets = self.sheets();
        if sheets.cut.contains(&host) {
            return Ok(());
        }
        // A repeated pass may answer what is over.
        let Some(sheet) = sheets.at(sequence) else { return Ok(()) };
        sheet.answered += 1;
        if let Some(one) = sheet.elsewhere.iter_mut().find(|one| one.host == host) {
            one.answered += 1;
        }
        sheet.sorter.push(&record)
    }

    /// How many answers the sheet that begins at `first` has, with those that will never come.
    #[must_use]
    pub fn count(&self, first: u64) -> u64 {
        let sheets = self.sheets();
        let Some(sheet) = sheets.open.iter().find(|s| s.first == first) else { return 0 };
        let cut = sheet.elsewhere.iter().filter(|one| sheets.cut.contains(&one.host));
        sheet.answered + cut.map(|one| one.asked - one.answered.min(one.asked)).sum::<u64>()
    }

    /// Takes the answers of a round off the sheet that begins at `first`.
    ///
    /// # Errors
    /// When the spilled answers cannot be read.
    pub fn take(&self, first: u64) -> Result<AnswerStream> {
        let fresh = self.sorter();
        let mut sheets = self.sheets();
        let cut = !sheets.cut.is_empty();
        let taken = sheets.open.iter_mut().find(|s| s.first == first).map(|sheet| {
            sheet.answered = 0;
            sheet.elsewhere.clear();
            std::mem::replace(&mut sheet.sorter, fresh)
        });
        drop(sheets);
        let sorter = taken.unwrap_or_else(|| self.sorter());
        let sorted = sorter.finish()?;
        Ok(AnswerStream { sorted, peeked: None, cut, asked: 0, liked: Default::default() })
    }
}

/// The answers of a round by ascending sequence.
pub struct AnswerStream {
    sorted: Sorted<RECORD>,
    peeked: Option<(Sequence, Said)>,
    /// Some answers never come.
    cut: bool,
    /// Requests that were asked for.
    asked: usize,
    /// Answers that later requests get too, in two generations.
    liked: [HashMap<Sequence, Option<Verdict>>; 2],
}

/// What a record says.
#[derive(Clone, Copy)]
enum Said {
    Verdict(Option<Verdict>),
    Like(SessionId, Sequence),
    Liked,
}

impl AnswerStream {
    /// The answer to `sequence`; sequences are asked for in ascending order. `None`: nobody answers.
    ///
    /// # Errors
    /// When a spilled answer cannot be read, or one is missing.
    pub fn answer(&mut self, sequence: Sequence) -> Result<Option<Verdict>> {
        self.asked += 1;
        if self.asked.is_multiple_of(LIKE_REACH) {
            self.liked.swap(0, 1);
            self.liked[0].clear();
        }
        let mut answer = None;
        while let Some((at, said)) = self.next()? {
            if at > sequence {
                self.peeked = Some((at, said));
                break;
            }
            if at < sequence {
                continue;
            }
            match said {
                Said::Verdict(verdict) => answer = answer.or(Some(verdict)),
                Said::Like(session, first) => answer = answer.or(self.like(session, first)),
                Said::Liked => {
                    self.liked[0].insert(at, answer.unwrap_or_default());
                }
            }
        }
        match answer {
            Some(verdict) => Ok(verdict),
            None if self.cut => Ok(None),
            None => Err(Error::new(Kind::Failed, format!("no answer to request {}", sequence.0))),
        }
    }

    /// The answer to a request that is like an earlier one.
    fn like(&self, session: SessionId, first: Sequence) -> Option<Option<Verdict>> {
        let verdict = self.liked.iter().find_map(|liked| liked.get(&first))?;
        Some(verdict.map(|verdict| match verdict {
            Verdict::Grant => Verdict::SameAs(session, first),
            other => other,
        }))
    }

    fn next(&mut self) -> Result<Option<(Sequence, Said)>> {
        if let Some(peeked) = self.peeked.take() {
            return Ok(Some(peeked));
        }
        let Some(record) = self.sorted.next()? else { return Ok(None) };
        let number = |range: std::ops::Range<usize>| {
            record[range].iter().fold(0_u64, |n, &byte| n << 8 | u64::from(byte))
        };
        let other = (SessionId(number(9..13) as u32), Sequence(number(13..21)));
        let said = match record[8] {
            STORED => {
                let mut address = [0; Address::LEN];
                address.copy_from_slice(&record[9..9 + Address::LEN]);
                Said::Verdict(Some(Verdict::Stored(Address::from_bytes(address))))
            }
            GRANT => Said::Verdict(Some(Verdict::Grant)),
            NOBODY => Said::Verdict(None),
            LIKE => Said::Like(other.0, other.1),
            LIKED => Said::Liked,
            _ => Said::Verdict(Some(Verdict::SameAs(other.0, other.1))),
        };
        Ok(Some((Sequence(number(0..8)), said)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::ids::{ContainerId, Incarnation, Slot};

    #[test]
    fn answers_come_back_by_sequence_and_window() {
        let dir = tempfile::tempdir().unwrap();
        let answers = Answers::new(dir.path(), 1000);
        let address = Address {
            container: ContainerId { incarnation: Incarnation(1), counter: 2 },
            slot: Slot(3),
        };
        answers.open(0);
        answers.open(500);
        for n in (0..1000).rev() {
            let verdict = match n % 3 {
                0 => Verdict::Stored(address),
                1 => Verdict::Grant,
                _ => Verdict::SameAs(SessionId(9), Sequence(n / 2)),
            };
            answers.put(HostId(0), Sequence(n), &verdict).unwrap();
        }
        assert_eq!((answers.count(0), answers.count(500)), (500, 500));
        let mut stream = answers.take(500).unwrap();
        for n in 500..1000 {
            let verdict = stream.answer(Sequence(n)).unwrap().unwrap();
            match n % 3 {
                0 => assert!(matches!(verdict, Verdict::Stored(a) if a == address)),
                1 => assert!(matches!(verdict, Verdict::Grant)),
                _ => assert!(
                    matches!(verdict, Verdict::SameAs(SessionId(9), Sequence(m)) if m == n / 2)
                ),
            }
        }
        assert_eq!((answers.count(0), answers.count(500)), (500, 0));
        answers.close_oldest();
        answers.put(HostId(0), Sequence(3), &Verdict::Grant).unwrap();
        assert_eq!((answers.count(0), answers.count(500)), (0, 0));
    }

    fn asked<const N: usize>(sequences: [u64; N]) -> [(Fingerprint, Sequence); N] {
        sequences.map(|n| (Fingerprint([7; Fingerprint::LEN]), Sequence(n)))
    }

    #[test]
    fn what_comes_back_together_is_booked_on_the_window_of_each() {
        let dir = tempfile::tempdir().unwrap();
        let answers = Answers::new(dir.path(), 1000);
        answers.open(0);
        answers.open(100);
        let (first, second) = (HostId(5), HostId(6));
        assert!(answers.expect(first, &asked([110, 90, 120, 95, 130])));
        answers.expect_less(first, &asked([95, 120]));
        assert!(answers.expect(second, &asked([95, 120])));
        answers.put(first, Sequence(110), &Verdict::Grant).unwrap();
        assert_eq!((answers.count(0), answers.count(100)), (0, 1));
        answers.cut(first);
        assert_eq!((answers.count(0), answers.count(100)), (1, 2));
        answers.cut(second);
        assert_eq!((answers.count(0), answers.count(100)), (2, 3));
        assert!(!answers.expect(first, &asked([99])), "nobody answers");
    }

    #[test]
    fn a_request_that_is_like_an_earlier_one_gets_its_answer() {
        let dir = tempfile::tempdir().unwrap();
        let answers = Answers::new(dir.path(), 1000);
        let (us, other, host) = (SessionId(3), SessionId(9), HostId(0));
        let container = ContainerId { incarnation: Incarnation(1), counter: 2 };
        let stored = Verdict::Stored(Address { container, slot: Slot(3) });
        answers.open(0);
        answers.expect(HostId(5), &asked([3]));
        for (first, told) in [(0, false), (1, false), (2, false), (3, false), (0, true)] {
            let at = if told { 14 } else { 10 + first };
            assert!(answers.put_like(Sequence(at), (us, Sequence(first)), told).unwrap());
        }
        assert_eq!(answers.count(0), 5);
        answers.put(host, Sequence(2), &Verdict::SameAs(other, Sequence(77))).unwrap();
        answers.put(host, Sequence(1), &stored).unwrap();
        answers.put(host, Sequence(0), &Verdict::Grant).unwrap();
        // The owner of the last one is lost.
        answers.cut(HostId(5));
        assert_eq!(answers.count(0), 9);
        let mut stream = answers.take(0).unwrap();
        let own = Verdict::SameAs(us, Sequence(0));
        let same = Verdict::SameAs(other, Sequence(77));
        let expected = [
            (0, Some(Verdict::Grant)),
            (1, Some(stored)),
            (2, Some(same)),
            (3, None),
            (10, Some(own)),
            (11, Some(stored)),
            (12, Some(same)),
            (13, None),
            (14, Some(own)),
        ];
        for (at, verdict) in expected {
            assert_eq!(stream.answer(Sequence(at)).unwrap(), verdict, "{at}");
        }
        // Of another window it is asked about by itself.
        answers.open(100);
        assert!(!answers.put_like(Sequence(100), (us, Sequence(99)), false).unwrap());
    }
}
