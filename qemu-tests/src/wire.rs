//! A cable with a delay and losses, as netem makes it, for kernels that have none. Its ends are TAPs, so the
//! TCP above it is the kernel's; a packet socket at a veth would be handed frames that the kernel has not
//! finished: without checksums, and many segments in one.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{PipeReader, PipeWriter, pipe};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::Result;
use crate::content::mix;

/// Frames under way at once; more are lost. As many as with netem: 75 MB/s at a delay of 20 ms, which only a
/// sender without any control of its rate exceeds.
const UNDER_WAY: usize = 1000;

/// Longer than any frame: a TAP cuts off what does not fit.
const FRAME: usize = 1 << 16;

/// What happens to a frame, whichever way it goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Conditions {
    /// How long it is under way.
    pub delay: Duration,
    /// By how much that is more or less, evenly spread: frames overtake one another.
    pub jitter: Duration,
    /// How probable it is that it is lost.
    pub loss: f64,
}

/// What has become of frames.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Arrived.
    pub passed: u64,
    /// Arrived after one that was sent later.
    pub overtaken: u64,
    /// Lost by chance.
    pub lost: u64,
    /// Lost as too many were under way.
    pub overflowed: u64,
}

/// A cable; it is cut with this value.
pub struct Wire {
    counts: Arc<Mutex<Counts>>,
    /// Closed, it ends the thread.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    /// Connects two TAPs that there are. Afterwards they may be moved and renamed.
    ///
    /// # Errors
    /// When they cannot be opened.
    pub fn between(taps: [&str; 2], conditions: Conditions, seed: u64) -> Result<Self> {
        let [one, other] = taps;
        let ends = [open(one)?, open(other)?];
        let counts = Arc::new(Mutex::new(Counts::default()));
        let (stopped, stop) = pipe()?;
        let line = Line {
            ends,
            conditions,
            chance: seed,
            sent: 0,
            newest: [0; 2],
            under_way: BinaryHeap::new(),
            counts: counts.clone(),
        };
        let thread = thread::Builder::new().name("wire".into()).spawn(move || {
            if let Err(error) = line.carry(&stopped) {
                eprintln!("a wire broke: {error:#}");
            }
        })?;
        Ok(Wire { counts, stop: Some(stop), thread: Some(thread) })
    }

    /// What has become of all frames so far.
    ///
    /// # Errors
    /// When the wire broke.
    pub fn counts(&self) -> Result<Counts> {
        ensure!(self.thread.as_ref().is_some_and(|thread| !thread.is_finished()), "a wire broke");
        Ok(*self.counts.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A frame under way; the first to arrive is the least.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Frame {
    arrives: Instant,
    number: u64,
    to: usize,
    bytes: Vec<u8>,
}

/// What the thread has.
struct Line {
    ends: [OwnedFd; 2],
    conditions: Conditions,
    chance: u64,
    sent: u64,
    /// The last sent of the frames that have arrived at each end.
    newest: [u64; 2],
    under_way: BinaryHeap<Reverse<Frame>>,
    counts: Arc<Mutex<Counts>>,
}

impl Line {
    fn carry(mut self, stopped: &PipeReader) -> Result {
        let mut buffer = vec![0; FRAME];
        loop {
            let next = self.under_way.peek().map(|Reverse(frame)| frame.arrives);
            let wait = next.map(|next| next.saturating_duration_since(Instant::now()));
            let wait = wait.map(Timespec::try_from).transpose()?;
            let [one, other] = &self.ends;
            let mut ready = [
                PollFd::new(one, PollFlags::IN),
                PollFd::new(other, PollFlags::IN),
                PollFd::new(stopped, PollFlags::IN),
            ];
            match poll(&mut ready, wait.as_ref()) {
                Err(Errno::INTR) => continue,
                polled => polled.context("poll")?,
            };
            let [one, other, stop] = ready.map(|end| !end.revents().is_empty());
            if stop {
                return Ok(());
            }
            for from in [one.then_some(0), other.then_some(1)].into_iter().flatten() {
                self.take(from, &mut buffer)?;
            }
            self.deliver()?;
        }
    }

    /// Takes a frame from an end.
    fn take(&mut self, from: usize, buffer: &mut [u8]) -> Result {
        let length = match rustix::io::read(&self.ends[from], &mut *buffer) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            read => read.context("a TAP cannot be read")?,
        };
        let Conditions { delay, jitter, loss } = self.conditions;
        // Both are drawn of every frame.
        let (fate, late) = (self.draw(), self.draw());
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if fate < loss {
            counts.lost += 1;
        } else if self.under_way.len() == UNDER_WAY {
            counts.overflowed += 1;
        } else {
            self.sent += 1;
            self.under_way.push(Reverse(Frame {
                arrives: Instant::now()
                    + (delay + jitter.mul_f64(2.0 * late)).saturating_sub(jitter),
                number: self.sent,
                to: 1 - from,
                bytes: buffer[..length].to_vec(),
            }));
        }
        Ok(())
    }

    /// Hands over what has arrived.
    fn deliver(&mut self) -> Result {
        let now = Instant::now();
        while self.under_way.peek().is_some_and(|Reverse(first)| first.arrives <= now) {
            let Some(Reverse(frame)) = self.under_way.pop() else { break };
            match rustix::io::write(&self.ends[frame.to], &frame.bytes) {
                // That end is down: nobody is there.
                Err(Errno::IO) => continue,
                written => written.context("a TAP cannot be written")?,
            };
            let newest = &mut self.newest[frame.to];
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            counts.passed += 1;
            counts.overtaken += u64::from(frame.number < *newest);
            *newest = frame.number.max(*newest);
        }
        Ok(())
    }

    /// At least 0 and less than 1.
    fn draw(&mut self) -> f64 {
        self.chance = mix(self.chance);
        (self.chance >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// `struct ifreq` of `linux/if.h`, as far as a TAP needs it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Attaches to a TAP by its name.
fn open(name: &str) -> Result<OwnedFd> {
    const TUNSETIFF: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<i32>(b'T', 202);
    const IFF_TAP: u16 = 0x0002;
    const IFF_NO_PI: u16 = 0x1000;
    let mut request = Request { name: [0; 16], flags: IFF_TAP | IFF_NO_PI, rest: [0; 22] };
    // The last byte stays zero.
    ensure!(name.len() < request.name.len(), "{name} is too long for an interface");
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let path = "/dev/net/tun";
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let tap = rustix::fs::open(path, flags, Mode::empty()).context(path)?;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, whose size and layout Request has, and keeps
    // no pointer to it. (The crates that wrap this bring dozens of others along.)
    #[allow(unsafe_code)]
    unsafe {
        rustix::ioctl::ioctl(&tap, rustix::ioctl::Updater::<TUNSETIFF, Request>::new(&mut request))
    }
    .with_context(|| format!("cannot attach to {name}"))?;
    Ok(tap)
}
