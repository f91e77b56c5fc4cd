//! A part of a session that is scanned, detected and written together.

use std::path::Path;

use super::answers::{AnswerStream, Answers};
use super::spool::{Found, Position, Records, RecordsReader, Spool, SpoolReader};
use crate::detect::Verdict;
use crate::error::{Error, Kind, Result};
use crate::ids::{Address, Fingerprint, Sequence, SessionId};
use crate::sort::{Sorted, Sorter};

/// sequence, disk, block, fingerprint
const QUESTION: usize = 8 + 2 + 8 + Fingerprint::LEN;
/// A question and who is said to write the block: session, sequence.
const UNSETTLED: usize = QUESTION + 4 + 8;
/// sequence, address
const PLACED: usize = 8 + Address::LEN;

/// A block that was asked about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Question {
    /// The request's number.
    pub(super) sequence: Sequence,
    /// Where the block is.
    pub(super) at: Position,
    /// What it is.
    pub(super) fingerprint: Fingerprint,
}

impl Question {
    fn to_bytes(self) -> [u8; QUESTION] {
        let mut bytes = [0; QUESTION];
        bytes[..8].copy_from_slice(&self.sequence.0.to_be_bytes());
        bytes[8..10].copy_from_slice(&self.at.disk.to_be_bytes());
        bytes[10..18].copy_from_slice(&self.at.block.to_be_bytes());
        bytes[18..].copy_from_slice(&self.fingerprint.0);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let number = |range: std::ops::Range<usize>| {
            bytes[range].iter().fold(0_u64, |n, &byte| n << 8 | u64::from(byte))
        };
        let mut fingerprint = [0; Fingerprint::LEN];
        fingerprint.copy_from_slice(&bytes[18..QUESTION]);
        Question {
            sequence: Sequence(number(0..8)),
            at: Position { disk: number(8..10) as u16, block: number(10..18) },
            fingerprint: Fingerprint(fingerprint),
        }
    }
}

/// A question whose block another request is said to write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Unsettled {
    /// What was asked.
    pub(super) question: Question,
    /// Who writes it.
    pub(super) writer: (SessionId, Sequence),
}

impl Unsettled {
    fn to_bytes(self) -> [u8; UNSETTLED] {
        let mut bytes = [0; UNSETTLED];
        bytes[..QUESTION].copy_from_slice(&self.question.to_bytes());
        bytes[QUESTION..QUESTION + 4].copy_from_slice(&self.writer.0.0.to_be_bytes());
        bytes[QUESTION + 4..].copy_from_slice(&self.writer.1.0.to_be_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; UNSETTLED]) -> Self {
        let number = |range: std::ops::Range<usize>| {
            bytes[range].iter().fold(0_u64, |n, &byte| n << 8 | u64::from(byte))
        };
        Unsettled {
            question: Question::from_bytes(bytes),
            writer: (
                SessionId(number(QUESTION..QUESTION + 4) as u32),
                Sequence(number(QUESTION + 4..UNSETTLED)),
            ),
        }
    }
}

/// What to do about a question once its verdict is known and checked.
pub(super) enum Settled {
    /// The block is stored there.
    At(Address),
    /// We write it.
    Ours,
    /// Somebody else writes it: ask again later.
    Later(SessionId, Sequence),
}

/// The questions of a round, in ascending sequence.
enum Questions {
    First {
        spool: SpoolReader,
        at: Position,
        asked: std::vec::IntoIter<Fingerprint>,
        sequence: u64,
    },
    Again {
        unsettled: RecordsReader<UNSETTLED>,
        index: u64,
    },
}

impl Questions {
    fn next(&mut self) -> Result<Option<Question>> {
        match self {
            Questions::Again { unsettled, index } => {
                let record = unsettled.get(*index)?;
                *index += 1;
                Ok(record.map(|r| Unsettled::from_bytes(&r).question))
            }
            Questions::First { spool, at, asked, sequence } => loop {
                if let Some(fingerprint) = asked.next() {
                    let question = Question { sequence: Sequence(*sequence), at: *at, fingerprint };
                    at.block += 1;
                    *sequence += 1;
                    return Ok(Some(question));
                }
                match spool.read_next()? {
                    None => return Ok(None),
                    Some((position, Found::Asked(fingerprints))) => {
                        *at = position;
                        *asked = fingerprints.into_iter();
                    }
                    Some(_) => {}
                }
            },
        }
    }
}

/// What a round left to do: blocks to write, in order, and questions to ask again.
pub(super) struct Round {
    grants: RecordsReader<QUESTION>,
    /// Grants handed to the plugin.
    served: u64,
    /// Grants packed or given up.
    written: u64,
    /// Given up before they were handed out: the plugin never sends them.
    withheld: GivenUp,
    unsettled: Records<UNSETTLED>,
}

/// Where a window stands.
enum Stage {
    /// Its requests of a round are with their owners.
    Asking(Option<RecordsReader<UNSETTLED>>),
    /// Its grants are being written.
    Writing(Round),
    /// All that was ours is sealed; others write the rest.
    Waiting(RecordsReader<UNSETTLED>),
}

/// A window of a session.
pub(super) struct Window {
    /// Its first request's number.
    pub(super) first: u64,
    /// The number after its last request's.
    pub(super) end: u64,
    /// Whether its scan is complete.
    pub(super) scanned: bool,
    spool: Spool,
    stage: Stage,
    asked_now: u64,
    placed: Sorter<PLACED>,
    given_up: GivenUp,
    dir: std::path::PathBuf,
}

impl Window {
    /// A window whose requests begin at `first`; working files go to `dir`.
    ///
    /// # Errors
    /// When its spool cannot be created.
    pub(super) fn begin(
        dir: &Path,
        run_bytes: usize,
        first: u64,
        answers: &Answers,
    ) -> Result<Self> {
        answers.open(first);
        Ok(Window {
            first,
            end: first,
            scanned: false,
            spool: Spool::create(dir)?,
            stage: Stage::Asking(None),
            asked_now: 0,
            placed: Sorter::new(dir, run_bytes),
            given_up: GivenUp::default(),
            dir: dir.into(),
        })
    }

    /// Spools what the scan found.
    ///
    /// # Errors
    /// When the spool cannot be written.
    pub(super) fn found(&mut self, at: Position, found: &Found) -> Result<()> {
        if let Found::Asked(fingerprints) = found {
            self.end += fingerprints.len() as u64;
            self.asked_now += fingerprints.len() as u64;
        }
        self.spool.push(at, found)
    }

    /// Whether every request of the round is answered, and the next step is [`Window::settle`].
    #[must_use]
    pub(super) fn is_answered(&self, answers: &Answers) -> bool {
        self.scanned
            && matches!(self.stage, Stage::Asking(_))
            && answers.count(self.first) >= self.asked_now
    }

    /// Whether it waits for nothing but answers.
    #[must_use]
    pub(super) fn waits_for_answers(&self) -> bool {
        self.scanned && matches!(self.stage, Stage::Asking(_))
    }

    /// Goes through the round's questions and their answers; `judge` checks each verdict, which is
    /// none when nobody answers.
    ///
    /// # Errors
    /// Those of `judge`, and of the working files.
    pub(super) fn settle(
        &mut self,
        answers: &Answers,
        mut judge: impl FnMut(&Question, Option<Verdict>) -> Result<Settled>,
    ) -> Result<()> {
        let mut answered: AnswerStream = answers.take(self.first)?;
        let mut questions = match &mut self.stage {
            Stage::Asking(again) => match again.take() {
                Some(unsettled) => Questions::Again { unsettled, index: 0 },
                None => Questions::First {
                    spool: self.spool.read()?,
                    at: Position { disk: 0, block: 0 },
                    asked: Vec::new().into_iter(),
                    sequence: self.first,
                },
            },
            _ => return Ok(()),
        };
        let mut grants = Records::create(&self.dir)?;
        let mut unsettled = Records::create(&self.dir)?;
        while let Some(question) = questions.next()? {
            let verdict = answered.answer(question.sequence)?;
            match judge(&question, verdict)? {
                Settled::At(address) => self.place(question.sequence, address)?,
                Settled::Ours if self.given_up.contains(question.sequence.0 - self.first) => {
                    unsettled.push(&given_up(question).to_bytes())?;
                }
                Settled::Ours => grants.push(&question.to_bytes())?,
                Settled::Later(session, sequence) => {
                    let record = Unsettled { question, writer: (session, sequence) };
                    unsettled.push(&record.to_bytes())?;
                }
            }
        }
        self.given_up = GivenUp::default();
        self.asked_now = 0;
        self.stage = Stage::Writing(Round {
            grants: grants.finish()?,
            served: 0,
            written: 0,
            withheld: GivenUp::default(),
            unsettled,
        });
        Ok(())
    }

    /// Notes where a block is.
    ///
    /// # Errors
    /// When the places cannot be spilled.
    pub(super) fn place(&mut self, sequence: Sequence, address: Address) -> Result<()> {
        let mut record = [0; PLACED];
        record[..8].copy_from_slice(&sequence.0.to_be_bytes());
        record[8..].copy_from_slice(&address.to_bytes());
        self.placed.push(&record)
    }

    /// The next grant to hand to the plugin.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub(super) fn next_grant(&mut self) -> Result<Option<Question>> {
        let Stage::Writing(round) = &mut self.stage else { return Ok(None) };
        while let Some(record) = round.grants.get(round.served)? {
            let grant = Question::from_bytes(&record);
            round.served += 1;
            if !self.given_up.contains(grant.sequence.0 - self.first) {
                return Ok(Some(grant));
            }
            round.withheld.insert(grant.sequence.0 - self.first);
        }
        Ok(None)
    }

    /// The grant for the block at `at`, which the plugin has written, or `None` when it
    /// was given up meanwhile. `Err(None)` when the block was not granted, or not now.
    ///
    /// # Errors
    /// `Err(Some(_))` when the list cannot be read.
    pub(super) fn written(
        &mut self,
        at: Position,
    ) -> std::result::Result<Option<Question>, Option<Error>> {
        let Stage::Writing(round) = &mut self.stage else { return Err(None) };
        while let Some(record) = round.grants.get(round.written).map_err(Some)? {
            if round.written >= round.served {
                return Err(None);
            }
            let grant = Question::from_bytes(&record);
            let given_up = self.given_up.contains(grant.sequence.0 - self.first);
            if grant.at == at {
                round.written += 1;
                return Ok((!given_up).then_some(grant));
            }
            if !round.withheld.contains(grant.sequence.0 - self.first) {
                return Err(None);
            }
            round.written += 1;
        }
        Err(None)
    }

    /// Whether all grants of the round are packed or given up. What was handed out comes,
    /// given up or not: the plugin knows nothing of it.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub(super) fn is_written(&mut self) -> Result<bool> {
        let Stage::Writing(round) = &mut self.stage else { return Ok(false) };
        while let Some(record) = round.grants.get(round.written)? {
            let index = Question::from_bytes(&record).sequence.0 - self.first;
            let never_comes = if round.written < round.served {
                round.withheld.contains(index)
            } else {
                self.given_up.contains(index)
            };
            if !never_comes {
                return Ok(false);
            }
            if round.written == round.served {
                round.served += 1;
                round.withheld.insert(index);
            }
            round.written += 1;
        }
        Ok(true)
    }

    /// Ends the writing of a round: what was given up becomes a question again.
    ///
    /// # Errors
    /// When a working file cannot be read or written.
    pub(super) fn end_writing(&mut self) -> Result<()> {
        let stage = std::mem::replace(&mut self.stage, Stage::Asking(None));
        let Stage::Writing(mut round) = stage else {
            self.stage = stage;
            return Ok(());
        };
        if !self.given_up.is_empty() {
            for index in 0..round.grants.len() {
                let Some(record) = round.grants.get(index)? else { break };
                let question = Question::from_bytes(&record);
                if self.given_up.contains(question.sequence.0 - self.first) {
                    round.unsettled.push(&given_up(question).to_bytes())?;
                }
            }
            self.given_up = GivenUp::default();
        }
        self.stage = Stage::Waiting(by_sequence(&self.dir, round.unsettled)?);
        Ok(())
    }

    /// Whether nothing is unsettled any more.
    #[must_use]
    pub(super) fn is_settled(&self) -> bool {
        matches!(&self.stage, Stage::Waiting(unsettled) if unsettled.is_empty())
    }

    /// The questions that wait for other writers, if it is time for them.
    ///
    /// # Errors
    /// When a descriptor cannot be duplicated.
    pub(super) fn waiting(&self) -> Result<Option<WaitingList>> {
        match &self.stage {
            Stage::Waiting(list) if !list.is_empty() => {
                Ok(Some(WaitingList { list: list.reader()?, index: 0 }))
            }
            _ => Ok(None),
        }
    }

    /// Asks everything that is unsettled again; `ask` sends a question to its owner.
    ///
    /// # Errors
    /// Those of `ask` and of the working file.
    pub(super) fn ask_again(&mut self, mut ask: impl FnMut(&Question) -> Result<()>) -> Result<()> {
        let Some(mut waiting) = self.waiting()? else { return Ok(()) };
        self.asked_now = waiting.list.len();
        while let Some(unsettled) = waiting.next()? {
            ask(&unsettled.question)?;
        }
        self.stage = Stage::Asking(Some(waiting.list));
        Ok(())
    }

    /// Gives up writing the block of request `sequence` in favour of another session.
    /// `false`: too late, it is packed, or it was given up before.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub(super) fn give_up(&mut self, sequence: Sequence) -> Result<bool> {
        let open = match &mut self.stage {
            Stage::Asking(None) => true,
            // A question asked again was packed or given up in an earlier round; who
            // holds it now is for the next answer to say.
            Stage::Asking(Some(_)) | Stage::Waiting(_) => false,
            Stage::Writing(round) => match find(&mut round.grants, sequence)? {
                Some(index) => index >= round.written,
                None => false,
            },
        };
        Ok(open && self.given_up.insert(sequence.0 - self.first))
    }

    /// Everything that was scanned, in disk order, with its place.
    ///
    /// # Errors
    /// When the working files cannot be read.
    pub(super) fn placements(mut self) -> Result<Placements> {
        Ok(Placements {
            spool: self.spool.read()?,
            sequence: self.first,
            placed: self.placed.finish()?,
            asked: 0,
            at: Position { disk: 0, block: 0 },
        })
    }
}

/// Where some blocks of a disk are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Placed {
    /// This many are zero.
    Zero(u64),
    /// This many are at consecutive slots from here on.
    At(Address, u64),
}

/// The scan of a window joined with the places of what was asked about.
pub(super) struct Placements {
    spool: SpoolReader,
    placed: Sorted<PLACED>,
    /// The next request's number.
    sequence: u64,
    /// Blocks of the present record that are still to come.
    asked: u64,
    at: Position,
}

impl Placements {
    /// The next blocks and where they are.
    ///
    /// # Errors
    /// When the working files cannot be read, or a block was never placed.
    pub(super) fn next(&mut self) -> Result<Option<(Position, Placed)>> {
        while self.asked == 0 {
            let Some((at, found)) = self.spool.read_next()? else { return Ok(None) };
            match found {
                Found::Zero(blocks) => return Ok(Some((at, Placed::Zero(blocks)))),
                Found::Unchanged(blocks, address) => {
                    return Ok(Some((at, Placed::At(address, u64::from(blocks)))));
                }
                Found::Asked(fingerprints) => {
                    self.asked = fingerprints.len() as u64;
                    self.at = at;
                }
            }
        }
        let at = self.at;
        self.at.block += 1;
        self.asked -= 1;
        Ok(Some((at, Placed::At(self.next_place()?, 1))))
    }

    fn next_place(&mut self) -> Result<Address> {
        let sequence = self.sequence;
        let missing =
            || Error::new(Kind::Failed, format!("block of request {sequence} was never placed"));
        self.sequence += 1;
        let record = self.placed.next()?.ok_or_else(missing)?;
        let (at, address) = record.split_at(8);
        if at != sequence.to_be_bytes() {
            return Err(missing());
        }
        Ok(Address::from_bytes(address.try_into().map_err(|_| missing())?))
    }
}

/// The questions that wait for other writers.
pub(super) struct WaitingList {
    list: RecordsReader<UNSETTLED>,
    index: u64,
}

impl WaitingList {
    /// Back to the first one.
    pub(super) fn rewind(&mut self) {
        self.index = 0;
    }

    /// The next one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn next(&mut self) -> Result<Option<Unsettled>> {
        let record = self.list.get(self.index)?;
        self.index += 1;
        Ok(record.map(|r| Unsettled::from_bytes(&r)))
    }
}

/// A question that we gave up: nobody in particular is known to write it.
fn given_up(question: Question) -> Unsettled {
    Unsettled { question, writer: (SessionId::NOBODY, question.sequence) }
}

/// The index of the grant `sequence` in the list, which is sorted.
fn find(grants: &mut RecordsReader<QUESTION>, sequence: Sequence) -> Result<Option<u64>> {
    let mut list = grants.reader()?;
    let (mut low, mut high) = (0, list.len());
    while low < high {
        let middle = low + (high - low) / 2;
        let Some(record) = list.get(middle)? else { return Ok(None) };
        match Question::from_bytes(&record).sequence.cmp(&sequence) {
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
            std::cmp::Ordering::Equal => return Ok(Some(middle)),
        }
    }
    Ok(None)
}

/// Brings the unsettled questions into ascending sequence: those given up came last.
fn by_sequence(dir: &Path, records: Records<UNSETTLED>) -> Result<RecordsReader<UNSETTLED>> {
    /// Enough for a window's worth in some hundred runs, which one merge can read.
    const RUN_BYTES: usize = 256 << 10;
    let mut list = records.finish()?;
    let mut sorter = Sorter::new(dir, RUN_BYTES);
    for index in 0..list.len() {
        let Some(record) = list.get(index)? else { break };
        sorter.push(&record)?;
    }
    let mut sorted = sorter.finish()?;
    let mut ordered = Records::create(dir)?;
    while let Some(record) = sorted.next()? {
        ordered.push(&record)?;
    }
    ordered.finish()
}

/// The requests of a window whose blocks were left to other sessions: a bit each, and
/// no memory while there are none.
#[derive(Default)]
struct GivenUp {
    bits: Vec<u64>,
}

impl GivenUp {
    fn contains(&self, index: u64) -> bool {
        self.bits.get((index / 64) as usize).is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    /// `false` if it was in already.
    fn insert(&mut self, index: u64) -> bool {
        let word = (index / 64) as usize;
        if self.bits.len() <= word {
            self.bits.resize(word + 1, 0);
        }
        let before = self.bits[word];
        self.bits[word] |= 1 << (index % 64);
        before != self.bits[word]
    }

    fn is_empty(&self) -> bool {
        self.bits.is_empty()
    }
}
