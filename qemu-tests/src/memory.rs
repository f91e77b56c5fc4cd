//! Peak memory of a running program: what it keeps for itself (anonymous), not what it maps.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How often it is looked at: peaks of a buffer's lifetime, not of a function call.
const INTERVAL: Duration = Duration::from_millis(5);

/// Watches one process until it ends.
pub struct Watch {
    peak: Arc<AtomicU64>,
    _thread: JoinHandle<()>,
}

impl Watch {
    /// Begins to watch.
    #[must_use]
    pub fn start(pid: u32) -> Self {
        let peak = Arc::new(AtomicU64::new(0));
        let seen = peak.clone();
        let thread = thread::spawn(move || {
            while let Some(now) = anonymous(pid) {
                seen.fetch_max(now, Ordering::Relaxed);
                thread::sleep(INTERVAL);
            }
        });
        Watch { peak, _thread: thread }
    }

    /// The most that was seen so far, bytes.
    #[must_use]
    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }
}

/// `RssAnon` of a process, bytes; none when it has ended.
#[must_use]
pub fn anonymous(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
