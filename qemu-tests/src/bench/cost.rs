//! What a command costs: wall time, CPU seconds, peak anonymous memory. Of the command with all its
//! children, and of the daemons that work for it.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::median;
use crate::Result;
use crate::memory::anonymous;
use crate::process::{Finished, Running, children};

/// How often memory is looked at: buffers live longer, and looking costs about a percent of a core.
const INTERVAL: Duration = Duration::from_millis(10);

/// Ticks of a second in `/proc/PID/stat`: part of Linux's ABI.
const TICKS: f64 = 100.0;

/// What a command cost.
#[derive(Clone, Copy, Default, Debug, PartialEq)]
pub struct Cost {
    /// Seconds from start to end.
    pub wall: f64,
    /// CPU seconds, user and system, of the command, its children and the daemons.
    pub cpu: f64,
    /// Most anonymous memory of the command, its children and the daemons at one instant, bytes,
    /// QEMU's own tools left out.
    pub memory: u64,
    /// The same of QEMU's tools among them (`qemu-nbd` reads the images of shut-off VMs).
    pub helpers: u64,
}

impl Cost {
    /// One after the other: times add up, the higher peak counts.
    #[must_use]
    pub fn then(self, next: Cost) -> Cost {
        Cost {
            wall: self.wall + next.wall,
            cpu: self.cpu + next.cpu,
            memory: self.memory.max(next.memory),
            helpers: self.helpers.max(next.helpers),
        }
    }

    /// The median of each time; of the peaks the highest, which is what has to fit.
    #[must_use]
    pub fn median(runs: &[Cost]) -> Cost {
        let of = |field: fn(&Cost) -> f64| median(&runs.iter().map(field).collect::<Vec<_>>());
        Cost {
            wall: of(|run| run.wall),
            cpu: of(|run| run.cpu),
            memory: runs.iter().map(|run| run.memory).max().unwrap_or(0),
            helpers: runs.iter().map(|run| run.helpers).max().unwrap_or(0),
        }
    }
}

/// Runs a command to its end, which must be success; `daemons` are processes that work for it.
///
/// # Errors
/// When it fails or is not done in time.
pub fn measure(
    name: &str,
    command: &mut Command,
    daemons: &[u32],
    limit: Duration,
) -> Result<(Cost, Finished)> {
    let before: f64 = daemons.iter().map(|pid| cpu(*pid)).sum::<Result<f64>>()?;
    let start = Instant::now();
    let running = Running::start(name, command)?;
    let watch = Watch::start(daemons.iter().copied().chain([running.pid()]).collect());
    let left = ended(running.pid(), limit);
    let wall = start.elapsed().as_secs_f64();
    let (memory, helpers) = watch.stop();
    left.with_context(|| format!("{name} printed:\n{}", running.printed()))?;
    // Before it is waited for: a zombie still says what it used.
    let own = cpu(running.pid())?;
    let after: f64 = daemons.iter().map(|pid| cpu(*pid)).sum::<Result<f64>>()?;
    let finished = running.finish(limit)?.code(0)?;
    Ok((Cost { wall, cpu: own + after - before, memory, helpers }, finished))
}

/// Waits for a child's end to the millisecond, and leaves it to be waited for.
fn ended(pid: u32, limit: Duration) -> Result {
    let id = Pid::from_raw(i32::try_from(pid)?).context("no process id")?;
    let descriptor = pidfd_open(id, PidfdFlags::empty())?;
    let mut wanted = [PollFd::new(&descriptor, PollFlags::IN)];
    let ready = poll(&mut wanted, Some(&Timespec::try_from(limit)?))?;
    ensure!(ready == 1, "it was not done after {} s", limit.as_secs());
    Ok(())
}

/// CPU seconds that a process and the children it waited for have used so far.
///
/// # Errors
/// When there is no such process.
pub fn cpu(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = text.rsplit_once(')').context("no name in /proc/PID/stat")?;
    // utime, stime, cutime and cstime are fields 14 to 17; the first behind the name is 3.
    let ticks = fields.split_whitespace().skip(11).take(4).map(str::parse::<u64>);
    let ticks = ticks.sum::<std::result::Result<u64, _>>()?;
    Ok(ticks as f64 / TICKS)
}

/// Watches the anonymous memory of process trees.
pub struct Watch {
    stop: Arc<AtomicBool>,
    peaks: Arc<[AtomicU64; 2]>,
    thread: JoinHandle<()>,
}

impl Watch {
    /// Begins to watch these processes and all below them, until they are gone or it is told to stop.
    #[must_use]
    pub fn start(roots: Vec<u32>) -> Self {
        let (stop, peaks) = (Arc::new(AtomicBool::new(false)), Arc::<[AtomicU64; 2]>::default());
        let (stopped, seen) = (stop.clone(), peaks.clone());
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let mut now = [0, 0];
                roots.iter().for_each(|pid| add(*pid, &mut now));
                for (peak, now) in seen.iter().zip(now) {
                    peak.fetch_max(now, Ordering::Relaxed);
                }
                thread::sleep(INTERVAL);
            }
        });
        Watch { stop, peaks, thread }
    }

    /// The highest sums seen so far, bytes: of the programs, and of QEMU's tools among them.
    #[must_use]
    pub fn peaks(&self) -> (u64, u64) {
        (self.peaks[0].load(Ordering::Relaxed), self.peaks[1].load(Ordering::Relaxed))
    }

    /// Ends it; the highest sums.
    #[must_use]
    pub fn stop(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let peaks = self.peaks();
        // A thread that only reads and adds has nothing to say at its end.
        let _ = self.thread.join();
        peaks
    }
}

/// Adds what a process and those below it hold; one that has just ended holds nothing.
fn add(pid: u32, sums: &mut [u64; 2]) {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    sums[usize::from(name.starts_with("qemu-"))] += anonymous(pid).unwrap_or(0);
    children(pid).into_iter().for_each(|child| add(child, sums));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_costs_what_its_children_use() -> Result {
        // A child of the command works for a while: about 64 MiB are held, CPU time passes.
        let script =
            "(head -c 64M /dev/zero | tail -c 64M | sha256sum; sleep 0.2) >/dev/null; exit 0";
        let limit = Duration::from_secs(60);
        let (cost, _) = measure("sh", Command::new("sh").args(["-c", script]), &[], limit)?;
        assert!(cost.wall >= 0.2, "{cost:?}");
        assert!(cost.cpu > 0.0 && cost.cpu < 60.0, "{cost:?}");
        assert!(cost.memory >= 60 << 20 && cost.memory < 200 << 20, "{cost:?}");
        assert_eq!(cost.helpers, 0);
        Ok(())
    }

    #[test]
    fn a_daemon_is_counted_with_the_command() -> Result {
        let mut daemon = Command::new("sh");
        let daemon = Running::start("sh", daemon.args(["-c", "while :; do :; done"]))?;
        // The command ends when the daemon has worked for a fifth of a second.
        let (pid, ticks) = (daemon.pid(), (cpu(daemon.pid())? * TICKS) as u64 + 20);
        let script = format!(
            "while [ $(awk '{{print $14}}' /proc/{pid}/stat) -lt {ticks} ]; do sleep 0.02; done"
        );
        let limit = Duration::from_secs(60);
        let (cost, _) = measure("sh", Command::new("sh").args(["-c", &script]), &[pid], limit)?;
        assert!(cost.cpu >= 0.1 && cost.memory > 0, "{cost:?}");
        crate::process::send(daemon.pid(), rustix::process::Signal::KILL)
    }

    #[test]
    fn what_takes_too_long_is_an_error() {
        let limit = Duration::from_millis(50);
        let result = measure("sleep", Command::new("sleep").arg("60"), &[], limit);
        assert!(result.is_err_and(|error| format!("{error:#}").contains("not done after")));
    }
}
