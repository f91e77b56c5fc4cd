//! The one place that sleeps: every wait is for a condition and has a bound.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;

use crate::Result;

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(10);

/// How long anything may take that is not a whole backup: a guest's boot under TCG on a busy
/// machine with two cores is the slowest of them.
pub const SOON: Duration = Duration::from_secs(60);

/// How long a whole backup, restore or verify of a test's small disks may take.
pub const LONG: Duration = Duration::from_secs(180);

/// Looks at a condition until it gives a value; an error of the condition ends the wait.
///
/// # Errors
/// The condition's own, or that `limit` has passed, naming `what`.
pub fn wait_for<T>(
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if start.elapsed() > limit {
            bail!("waited {} s in vain: {what}", limit.as_secs());
        }
        thread::sleep(STEP);
    }
}

/// Waits until a condition is true.
///
/// # Errors
/// As [`wait_for`].
pub fn wait_until(
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result {
    wait_for(limit, what, || Ok(condition()?.then_some(())))
}

/// Watches that a condition stays true for a while.
///
/// # Errors
/// The condition's own, or that it became false, naming `what`.
pub fn stays(time: Duration, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result {
    let start = Instant::now();
    while start.elapsed() < time {
        if !condition()? {
            bail!("no longer so after {} ms: {what}", start.elapsed().as_millis());
        }
        thread::sleep(STEP);
    }
    Ok(())
}
