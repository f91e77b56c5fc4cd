//! What waits to be sent to one host: frames in order, until that host has taken them.
//!
//! Whoever puts something in never waits: beyond the share of memory that all outboxes have together
//! frames go to a file without a name. A host that takes nothing for so long that the file is full
//! is given up ([`Outbox::put`] says so).

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::frame::{FrameWriter, Message};
use crate::error::{Context, Error, Kind, Result};

/// A frame is closed at this length: long enough to make calls rare, and 16 of them are a link's share.
const FRAME: usize = 48 << 10;
/// What a frame that is being filled takes besides the share: without memory left frames are no shorter,
/// and 255 hosts take a MiB.
const OWN: usize = 4 << 10;
/// Bytes of a file at most, of one host: an hour of verdicts at full speed is less.
const SPILL_MAX: u64 = 4 << 30;

/// The memory that all outboxes of an engine share.
#[derive(Debug)]
pub struct Share {
    used: AtomicUsize,
    limit: usize,
}

impl Share {
    /// Of so many bytes.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Share { used: AtomicUsize::new(0), limit })
    }

    fn take(&self, bytes: usize) -> bool {
        let take = |used: usize| used.checked_add(bytes).filter(|used| *used <= self.limit);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }

    /// Bytes in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }
}

/// The number of a frame among those of a stream, from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FrameNumber(pub u64);

/// What waits for one host.
pub struct Outbox {
    dir: PathBuf,
    share: Arc<Share>,
    state: Mutex<State>,
    /// Told when there is something to send.
    ready: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct State {
    open: FrameWriter,
    /// What of it is counted in the share.
    counted: usize,
    /// The open frame says that questions may have new answers; once is enough, as it is not sent yet.
    advanced: bool,
    /// Closed frames that are not taken yet.
    frames: VecDeque<Frame>,
    /// The number of the first of them.
    first: u64,
    spill: Option<Spill>,
}

enum Frame {
    Memory(Vec<u8>),
    Spilled { offset: u64, length: usize },
}

struct Spill {
    file: File,
    end: u64,
    /// Frames in it that are not taken.
    left: u64,
}

impl Outbox {
    /// An empty one. It spills into `dir`, and calls `ready` when there is something to send.
    pub fn new(dir: &Path, share: &Arc<Share>, ready: impl Fn() + Send + Sync + 'static) -> Self {
        let state = State { first: 1, ..State::default() };
        Outbox {
            dir: dir.into(),
            share: Arc::clone(share),
            state: Mutex::new(state),
            ready: Box::new(ready),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a message behind all others.
    ///
    /// # Errors
    /// When it can be kept neither in memory nor on disk: the host is to be given up.
    pub fn put(&self, message: &Message) -> Result<()> {
        let mut state = self.state();
        if *message == Message::Advanced && std::mem::replace(&mut state.advanced, true) {
            return Ok(());
        }
        let was_empty = state.open.is_empty();
        state.open.push(message);
        if state.open.len() >= FRAME || !self.count(&mut state) {
            self.close(&mut state)?;
        }
        drop(state);
        if was_empty {
            (self.ready)();
        }
        Ok(())
    }

    /// Counts the frame that is being filled; false where there is no memory for it.
    fn count(&self, state: &mut State) -> bool {
        let more = state.open.capacity().saturating_sub(OWN + state.counted);
        let counted = self.share.take(more);
        state.counted += if counted { more } else { 0 };
        counted
    }

    /// The frame that is being filled, no longer counted.
    fn take_open(&self, state: &mut State) -> Vec<u8> {
        self.share.give_back(std::mem::take(&mut state.counted));
        state.advanced = false;
        state.open.take()
    }

    /// Ends the frame that is being filled.
    fn close(&self, state: &mut State) -> Result<()> {
        if state.open.is_empty() {
            return Ok(());
        }
        let mut frame = self.take_open(state);
        frame.shrink_to_fit();
        // What is on disk is sent first, so what comes after it goes there, too: the memory is
        // for those who are quick.
        let spilling = state.spill.as_ref().is_some_and(|spill| spill.left > 0);
        if !spilling && self.share.take(frame.capacity()) {
            state.frames.push_back(Frame::Memory(frame));
            return Ok(());
        }
        let spill = match &mut state.spill {
            Some(spill) => spill,
            none => {
                let file = tempfile::tempfile_in(&self.dir).context(|| self.cannot())?;
                none.insert(Spill { file, end: 0, left: 0 })
            }
        };
        if spill.end + frame.len() as u64 > SPILL_MAX {
            return Err(Error::new(Kind::Failed, format!("{SPILL_MAX} bytes wait for it")));
        }
        spill.file.write_all_at(&frame, spill.end).context(|| self.cannot())?;
        let (offset, length) = (spill.end, frame.len());
        spill.end += length as u64;
        spill.left += 1;
        state.frames.push_back(Frame::Spilled { offset, length });
        Ok(())
    }

    fn cannot(&self) -> String {
        format!("cannot keep what waits for another host in {}", self.dir.display())
    }

    /// The frame with the first number from `from` on; what is being filled is closed for it.
    ///
    /// # Errors
    /// When it cannot be read back: the host is to be given up.
    pub fn next(&self, from: FrameNumber) -> Result<Option<(FrameNumber, Vec<u8>)>> {
        let mut state = self.state();
        let at = from.0.saturating_sub(state.first) as usize;
        if at >= state.frames.len() {
            self.close(&mut state)?;
        }
        let number = FrameNumber(state.first + at as u64);
        let Some(frame) = state.frames.get(at) else { return Ok(None) };
        let bytes = match (frame, &state.spill) {
            (Frame::Memory(bytes), _) => bytes.clone(),
            (Frame::Spilled { offset, length }, Some(spill)) => {
                let mut bytes = vec![0; *length];
                spill.file.read_exact_at(&mut bytes, *offset).context(|| self.cannot())?;
                bytes
            }
            (Frame::Spilled { .. }, None) => {
                return Err(Error::new(Kind::Failed, "a spilled frame has no file (a bug)"));
            }
        };
        Ok(Some((number, bytes)))
    }

    /// The host has taken everything up to a frame.
    pub fn taken(&self, number: FrameNumber) {
        let mut state = self.state();
        while state.first <= number.0 && self.forget_first(&mut state) {}
        self.trim(&mut state);
    }

    /// Drops everything; numbers go on.
    pub fn clear(&self) {
        let mut state = self.state();
        self.take_open(&mut state);
        while self.forget_first(&mut state) {}
        self.trim(&mut state);
    }

    /// Numbers frames from 1 again, for a host that has forgotten the ones before.
    pub fn restart(&self) {
        self.clear();
        self.state().first = 1;
    }

    fn forget_first(&self, state: &mut State) -> bool {
        match state.frames.pop_front() {
            Some(Frame::Memory(bytes)) => self.share.give_back(bytes.capacity()),
            Some(Frame::Spilled { .. }) => {
                if let Some(spill) = &mut state.spill {
                    spill.left -= 1;
                }
            }
            None => return false,
        }
        state.first += 1;
        true
    }

    /// Gives the disk back once all of it was taken.
    fn trim(&self, state: &mut State) {
        if state.spill.as_ref().is_some_and(|spill| spill.left == 0) {
            state.spill = None;
        }
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let state = self.state();
        state.open.is_empty() && state.frames.is_empty()
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cluster::frame::FrameReader;
    use crate::detect::Verdict;
    use crate::ids::{Sequence, SessionId};

    fn message(n: u64) -> Message {
        Message::Verdict(SessionId(5), Sequence(n * 977), Verdict::Grant)
    }

    fn read(frame: &[u8]) -> Vec<Message> {
        let mut reader = FrameReader::new(frame);
        std::iter::from_fn(|| reader.read_next().unwrap()).collect()
    }

    #[test]
    fn everything_comes_once_and_in_order_through_little_memory() {
        let dir = tempfile::tempdir().unwrap();
        let share = Share::new(3 * FRAME);
        let outboxes: Vec<_> = (0..3).map(|_| Outbox::new(dir.path(), &share, || ())).collect();
        let count = 100_000;
        for n in 0..count {
            outboxes.iter().for_each(|outbox| outbox.put(&message(n)).unwrap());
            assert!(share.used() <= 3 * FRAME);
        }
        for outbox in &outboxes {
            let (mut from, mut expected) = (FrameNumber(1), 0);
            while let Some((number, frame)) = outbox.next(from).unwrap() {
                assert_eq!(number, from);
                // A frame that was not taken is there again.
                assert_eq!(outbox.next(from).unwrap().unwrap().1, frame);
                for found in read(&frame) {
                    assert_eq!(found, message(expected));
                    expected += 1;
                }
                if number.0 % 3 == 0 {
                    outbox.taken(number);
                }
                from = FrameNumber(number.0 + 1);
            }
            assert_eq!(expected, count);
            outbox.taken(from);
            assert!(outbox.is_empty());
        }
        assert_eq!(share.used(), 0);
    }

    #[test]
    fn a_frame_says_once_that_questions_may_have_new_answers() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = Outbox::new(dir.path(), &Share::new(FRAME), || ());
        for number in 1..=2 {
            for n in 0..10 {
                outbox.put(&Message::Advanced).unwrap();
                outbox.put(&message(n)).unwrap();
            }
            let (_, frame) = outbox.next(FrameNumber(number)).unwrap().unwrap();
            let advanced = read(&frame).into_iter().filter(|m| *m == Message::Advanced).count();
            assert_eq!((advanced, read(&frame).len()), (1, 11));
        }
    }

    #[test]
    fn a_restart_numbers_from_one_and_a_clear_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = Outbox::new(dir.path(), &Share::new(FRAME), || ());
        for n in 0..100_000 {
            outbox.put(&message(n)).unwrap();
        }
        let frames = outbox.state().frames.len() as u64;
        assert!(frames > 2);
        outbox.clear();
        outbox.put(&message(1)).unwrap();
        assert_eq!(outbox.next(FrameNumber(1)).unwrap().unwrap().0, FrameNumber(frames + 1));
        outbox.restart();
        assert!(outbox.is_empty());
        outbox.put(&message(2)).unwrap();
        let (number, frame) = outbox.next(FrameNumber(1)).unwrap().unwrap();
        assert_eq!((number, read(&frame)), (FrameNumber(1), vec![message(2)]));
    }
}
