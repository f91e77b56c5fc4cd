//! What this process takes of the host's memory.

use std::sync::atomic::{AtomicU64, Ordering};

static PEAK: AtomicU64 = AtomicU64::new(0);

/// The most anonymous memory seen so far, bytes. Page cache is the kernel's to give and
/// take; anonymous memory is what guests lose.
#[must_use]
pub fn peak_anonymous() -> u64 {
    sample();
    PEAK.load(Ordering::Relaxed)
}

/// Looks at the present anonymous memory; called regularly, so that the peak is one.
pub fn sample() {
    PEAK.fetch_max(anonymous().unwrap_or(0), Ordering::Relaxed);
}

fn anonymous() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib << 10)
}
