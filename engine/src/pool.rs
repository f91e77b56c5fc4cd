//! A small fixed pool for what costs CPU: compressing, encrypting, and back.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::error::{Error, Kind, Result};

/// Jobs that wait per thread: enough to keep it busy, each holds a few frames at most.
const QUEUED_PER_THREAD: usize = 2;
/// Jobs that queues may have at a time beyond their limits, all of them together: one that is alone
/// keeps all threads busy whichever of its jobs take longest, and many need no more than their limits.
const BEYOND: usize = 4;
/// Stack of a pool thread: zstd's contexts are on the heap.
const STACK: usize = 512 << 10;

type Job = Box<dyn FnOnce() + Send>;

/// A handle to the pool; its threads end with the last handle.
#[derive(Clone)]
pub struct Pool {
    jobs: Arc<Sender<Job>>,
    threads: usize,
    /// What is left of [`BEYOND`].
    beyond: Arc<AtomicUsize>,
}

impl Pool {
    /// A pool of `threads` threads (at least one).
    ///
    /// # Errors
    /// When they cannot be started.
    pub fn new(threads: usize) -> Result<Self> {
        let threads = threads.max(1);
        let (jobs, queue) = bounded::<Job>(threads * QUEUED_PER_THREAD);
        for n in 0..threads {
            let queue: Receiver<Job> = queue.clone();
            thread::Builder::new()
                .name(format!("cpu-{n}"))
                .stack_size(STACK)
                .spawn(move || queue.iter().for_each(|job| job()))
                .map_err(|error| Error::caused(Kind::Failed, "cannot start the CPU pool", error))?;
        }
        Ok(Pool { jobs: Arc::new(jobs), threads, beyond: Arc::new(AtomicUsize::new(BEYOND)) })
    }

    /// Its threads.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Gives a job to the pool; waits while its queue is full. Never call it from a job.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Pending<T> {
        let (answer, result) = bounded(1);
        let job: Job = Box::new(move || {
            // A job that panics answers by dropping its end; the thread lives on.
            if let Ok(value) = catch_unwind(AssertUnwindSafe(job)) {
                // Nobody may be waiting any more.
                let _ = answer.send(value);
            }
        });
        // The threads outlive every handle, so the queue is open.
        let _ = self.jobs.send(job);
        Pending { result }
    }
}

/// A job's result to come.
pub struct Pending<T> {
    result: Receiver<T>,
}

impl<T> Pending<T> {
    /// Waits for it.
    ///
    /// # Errors
    /// When the job panicked.
    pub fn wait(self) -> Result<T> {
        self.result
            .recv()
            .map_err(|_| Error::new(Kind::Failed, "a job of the CPU pool panicked (a bug)"))
    }

    /// Whether [`wait`](Self::wait) would return at once.
    #[must_use]
    pub fn is_done(&self) -> bool {
        !self.result.is_empty()
    }
}

/// Jobs whose results come out in the order in which they went in, at most `limit` at a time, and
/// some more while other queues of the pool do not have them.
pub struct InOrder<T> {
    pool: Pool,
    limit: usize,
    pending: VecDeque<Pending<T>>,
}

impl<T: Send + 'static> InOrder<T> {
    /// At most `limit` (at least one) jobs at a time.
    #[must_use]
    pub fn new(pool: Pool, limit: usize) -> Self {
        let limit = limit.max(1);
        InOrder { pool, limit, pending: VecDeque::with_capacity(limit) }
    }

    /// Gives a job to the pool; when no more may be there, waits for the oldest and returns its result.
    ///
    /// # Errors
    /// When that one panicked.
    pub fn push(&mut self, job: impl FnOnce() -> T + Send + 'static) -> Result<Option<T>> {
        let full = self.pending.len() >= self.limit && !self.go_beyond();
        // The new one has the place of the oldest, whichever that was.
        let oldest = if full { self.make_room()? } else { None };
        let pending = self.pool.run(job);
        self.pending.push_back(pending);
        Ok(oldest)
    }

    /// The oldest result, waiting for it; `None` when there is none to come.
    ///
    /// # Errors
    /// When its job panicked.
    #[allow(clippy::should_implement_trait, reason = "it is fallible and waits")]
    pub fn next(&mut self) -> Result<Option<T>> {
        if self.pending.len() > self.limit {
            self.pool.beyond.fetch_add(1, Ordering::Relaxed);
        }
        self.pop()
    }

    /// The oldest result, whose place is kept for another job; given back if there will be none.
    fn make_room(&mut self) -> Result<Option<T>> {
        let beyond = self.pending.len() > self.limit;
        let oldest = self.pop();
        if oldest.is_err() && beyond {
            self.pool.beyond.fetch_add(1, Ordering::Relaxed);
        }
        oldest
    }

    fn pop(&mut self) -> Result<Option<T>> {
        self.pending.pop_front().map(Pending::wait).transpose()
    }

    /// Takes one of the places that all queues share.
    fn go_beyond(&self) -> bool {
        let take = |left: usize| left.checked_sub(1);
        self.pool.beyond.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// The oldest result, if it is there.
    ///
    /// # Errors
    /// When its job panicked.
    pub fn ready(&mut self) -> Result<Option<T>> {
        if self.pending.front().is_some_and(Pending::is_done) { self.next() } else { Ok(None) }
    }

    /// Jobs whose results are to come.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pending.len()
    }

    /// Whether no result is to come.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }
}

impl<T> Drop for InOrder<T> {
    fn drop(&mut self) {
        let beyond = self.pending.len().saturating_sub(self.limit);
        self.pool.beyond.fetch_add(beyond, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_never_more_than_the_limit_wait() {
        let mut jobs = InOrder::new(Pool::new(3).unwrap(), 4);
        let mut results = Vec::new();
        for n in 0..200_u64 {
            // Every job takes another time: later ones overtake earlier ones.
            let work =
                move || (0..(n * 7919) % 20_000).fold(n, |a, b| std::hint::black_box(a ^ b ^ b));
            results.extend(jobs.push(work).unwrap());
            assert!(jobs.len() <= 4 + BEYOND);
        }
        while let Some(result) = jobs.next().unwrap() {
            results.push(result);
        }
        assert_eq!(results, (0..200).collect::<Vec<_>>());
    }

    #[test]
    fn places_beyond_the_limits_are_shared_and_come_back() {
        let pool = Pool::new(1).unwrap();
        let (go, wait) = bounded::<()>(0);
        let mut first = InOrder::new(pool.clone(), 1);
        let mut second = InOrder::new(pool.clone(), 1);
        // Nothing is done before the word: no queue gets a place back.
        let job = |wait: &Receiver<()>| {
            let wait = wait.clone();
            move || {
                let _ = wait.recv();
            }
        };
        // As many as the pool takes without waiting.
        let most = 1 + QUEUED_PER_THREAD;
        for n in 0..most {
            assert!(first.push(job(&wait)).unwrap().is_none());
            assert_eq!(pool.beyond.load(Ordering::Relaxed), BEYOND - n);
        }
        drop(go);
        while first.next().unwrap().is_some() {}
        assert_eq!(pool.beyond.load(Ordering::Relaxed), BEYOND);
        // What is dropped with them gives them back, too.
        for _ in 0..most {
            second.push(job(&wait)).unwrap();
        }
        drop(second);
        assert_eq!(pool.beyond.load(Ordering::Relaxed), BEYOND);
        // So do those whose jobs panic.
        let mut third = InOrder::new(pool.clone(), 1);
        let mut panicked = 0;
        for _ in 0..20 {
            panicked += usize::from(third.push(|| panic!("on purpose")).is_err());
        }
        assert!(panicked > 0, "nothing was waited for");
        drop(third);
        assert_eq!(pool.beyond.load(Ordering::Relaxed), BEYOND);
        // Where others have them all, the limit is the limit.
        pool.beyond.store(0, Ordering::Relaxed);
        for n in 0..5 {
            assert_eq!(first.push(job(&wait)).unwrap().is_some(), n > 0);
            assert_eq!(first.len(), 1);
        }
    }

    #[test]
    fn a_panic_is_the_jobs_error_and_the_pool_goes_on() {
        let pool = Pool::new(1).unwrap();
        assert!(pool.run(|| panic!("on purpose")).wait().map(|(): ()| ()).is_err());
        assert_eq!(pool.run(|| 5).wait().unwrap(), 5);
    }
}
