//! Objects by name: created once, read, listed; taken away by the keeper only. The only file that knows `object_store`.
//!
//! The core is synchronous: all calls block and must come from threads of their own,
//! never from inside an async task. A local directory's small operations run on the
//! calling thread; what should overlap (many reads, a container's fsync) goes to a
//! small private runtime. A store across a network uses that runtime for everything.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::staging;
use crate::error::{Error, Kind, Result};

/// Reads in flight of one [`Objects::read_many`]: what it took PBS to go from 573 to 2,386 MB/s.
const READS_IN_FLIGHT: usize = 16;
/// Ranges closer than this are read as one: a local disk delivers 32 KiB in the time of a request.
const COALESCE_GAP: u64 = 32 << 10;
/// One coalesced read is at most this long, so that 16 in flight stay within a restore's share.
const COALESCE_MAX: u64 = 512 << 10;
/// Blocking threads: the reads in flight, and some for uploads that are being finished.
const BLOCKING_THREADS: usize = READS_IN_FLIGHT + 4;
/// Stack of each: they only copy and make system calls.
const THREAD_STACK: usize = 256 << 10;
/// Idle blocking threads end soon: their stacks count.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(2);
/// How often an ambiguous create is tried when nothing is found at its key.
const CREATE_ATTEMPTS: u32 = 4;
/// Between attempts.
const CREATE_PAUSE: Duration = Duration::from_millis(200);

/// What became of a create.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Created {
    /// The object is there with our bytes, durable.
    Ours,
    /// Someone else's is.
    Exists,
}

/// The objects of one store. A cheap handle.
#[derive(Clone)]
pub struct Objects {
    inner: Arc<Inner>,
    /// Whether this engine has the keeper's role.
    may_remove: bool,
}

struct Inner {
    store: Arc<dyn ObjectStore>,
    /// The directory of a local store: its calls need no runtime.
    local: Option<PathBuf>,
    /// Where bytes for another store wait until they are sent.
    staging: PathBuf,
    runtime: Handle,
    /// Ends the runtime's thread when dropped.
    _stop: oneshot::Sender<()>,
}

impl Objects {
    /// The objects in a directory, which must exist. Everything written is synced
    /// (file, then directory) before a call returns.
    ///
    /// # Errors
    /// [`Kind::NoStore`] when there is no such directory.
    pub fn local(directory: &FsPath) -> Result<Self> {
        let no_store = |error| {
            let what = format!(
                "there is no store at {}: the directory cannot be opened",
                directory.display()
            );
            Error::caused(Kind::NoStore, what, error)
        };
        let root = fs::canonicalize(directory).map_err(no_store)?;
        let store = LocalFileSystem::new_with_prefix(&root)
            .map_err(|error| {
                Error::caused(Kind::NoStore, format!("cannot open {}", root.display()), error)
            })?
            .with_fsync(true);
        Self::over(Arc::new(store), Some(root.clone()), &root)
    }

    /// Over any store; `local` is the directory behind it where there is one, else what is
    /// written is staged in `staging`.
    fn over(store: Arc<dyn ObjectStore>, local: Option<PathBuf>, staging: &FsPath) -> Result<Self> {
        let (runtime, stop) = start_runtime()?;
        let inner = Inner { store, local, staging: staging.into(), runtime, _stop: stop };
        Ok(Objects { inner: Arc::new(inner), may_remove: false })
    }

    /// Runs a future of the object store to its end.
    fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        if self.inner.local.is_some() {
            // Outside of a runtime the local store works on the calling thread: no hop, no wake-up.
            // A blocking thread of another runtime counts as inside of it: there the local store
            // would queue behind the very threads that wait here. Ours never wait.
            let elsewhere = Handle::try_current().is_ok();
            let _ours = elsewhere.then(|| self.inner.runtime.enter());
            futures::executor::block_on(future)
        } else {
            self.inner.runtime.block_on(future)
        }
    }

    /// Creates an object unless its key is taken. After any failure the key is read
    /// back, so the answer is sure: our bytes are there, or another's.
    ///
    /// # Errors
    /// When the object is certainly not there, or nothing certain can be said.
    pub fn create(&self, key: &str, bytes: impl Into<Bytes>) -> Result<Created> {
        let bytes: Bytes = bytes.into();
        let path = parse(key)?;
        for attempt in 1.. {
            let put = self.inner.store.put_opts(
                &path,
                PutPayload::from(bytes.clone()),
                PutMode::Create.into(),
            );
            let error = match self.wait(put) {
                Ok(_) => return Ok(Created::Ours),
                Err(error) => error,
            };
            match self.holds(key, &bytes) {
                Ok(true) => {
                    self.sync(key)?;
                    return Ok(Created::Ours);
                }
                Ok(false) => return Ok(Created::Exists),
                Err(read) if read.kind() != Kind::NotFound => return Err(read),
                Err(_) if attempt >= CREATE_ATTEMPTS || hopeless(&error) => {
                    return Err(failed("create object", key, error));
                }
                Err(_) => std::thread::sleep(CREATE_PAUSE),
            }
        }
        unreachable!("attempts are bounded")
    }

    /// Whether an object is these bytes; piece by piece, as containers are large.
    fn holds(&self, key: &str, bytes: &[u8]) -> Result<bool> {
        if self.size(key)? != bytes.len() as u64 {
            return Ok(false);
        }
        let mut at = 0;
        for piece in bytes.chunks(COALESCE_MAX as usize) {
            let end = at + piece.len() as u64;
            if self.read(key, at..end)? != piece {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    /// Makes sure that an object that was found is durable: whoever created it may have died, or failed,
    /// before it was.
    ///
    /// # Errors
    /// When that cannot be done.
    pub(super) fn sync(&self, key: &str) -> Result<()> {
        let Some(root) = &self.inner.local else { return Ok(()) };
        let path = root.join(key);
        let folder = path.parent().unwrap_or(root);
        fs::File::open(&path)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::File::open(folder)?.sync_all())
            .map_err(|error| {
                Error::caused(Kind::Failed, format!("cannot make {key} durable"), error)
            })
    }

    /// Begins to write an object piece by piece; it appears at [`ObjectWriter::finish`].
    ///
    /// # Errors
    /// When it cannot be staged.
    pub fn writer(&self, key: &str) -> Result<ObjectWriter> {
        ObjectWriter::begin(self, key)
    }

    /// Exactly the bytes of `range`.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Damaged`] when the object is shorter.
    pub fn read(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let path = parse(key)?;
        let bytes = self
            .wait(self.inner.store.get_range(&path, range.clone()))
            .map_err(|error| self.range_error(key, &path, range.end, error))?;
        check_length(key, &range, bytes)
    }

    /// The bytes of each range, in their order; near ones are read together, up to 16 reads
    /// at a time.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_many(&self, key: &str, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let path = parse(key)?;
        if let [range] = ranges {
            return Ok(vec![self.read(key, range.clone())?]);
        }
        let plan = coalesce(ranges);
        let reads = futures::stream::iter(plan.clone()).map(|range| {
            let (store, path) = (self.inner.store.clone(), path.clone());
            self.inner.runtime.spawn(async move { store.get_range(&path, range).await })
        });
        let fetched: Vec<Bytes> = self
            .inner
            .runtime
            .block_on(
                reads
                    .buffered(READS_IN_FLIGHT)
                    .map_err(join_error)
                    .and_then(futures::future::ready)
                    .try_collect(),
            )
            .map_err(|error| {
                self.range_error(key, &path, plan.last().map_or(0, |r| r.end), error)
            })?;
        ranges
            .iter()
            .map(|range| {
                let n = plan.partition_point(|read| read.end < range.end);
                let (read, bytes) = (&plan[n], &fetched[n]);
                let (from, to) =
                    ((range.start - read.start) as usize, (range.end - read.start) as usize);
                check_length(
                    key,
                    range,
                    if to <= bytes.len() { bytes.slice(from..to) } else { Bytes::new() },
                )
            })
            .collect()
    }

    /// The last `n` bytes, or all of a shorter object, and the object's size.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; when it cannot be read.
    pub fn read_tail(&self, key: &str, n: u64) -> Result<(Bytes, u64)> {
        let path = parse(key)?;
        if self.inner.local.is_none() {
            // Servers of S3 disagree about a suffix that is longer than the object.
            let size = self.size(key)?;
            return Ok((self.read(key, size.saturating_sub(n)..size)?, size));
        }
        let options = GetOptions { range: Some(GetRange::Suffix(n)), ..GetOptions::default() };
        let tail = self.wait(async {
            let result = self.inner.store.get_opts(&path, options).await?;
            let size = result.meta.size;
            result.bytes().await.map(|bytes| (bytes, size))
        });
        tail.map_err(|error| unread(key, error))
    }

    /// All of an object of at most `max` bytes.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Damaged`] when it is longer.
    pub fn read_all(&self, key: &str, max: u64) -> Result<Bytes> {
        let path = parse(key)?;
        let whole = self.wait(async {
            let result = self.inner.store.get_opts(&path, GetOptions::default()).await?;
            if result.meta.size > max { Ok(None) } else { result.bytes().await.map(Some) }
        });
        whole.map_err(|error| unread(key, error))?.ok_or_else(|| {
            Error::new(Kind::Damaged, format!("object {key} is longer than {max} bytes"))
        })
    }

    /// Whether there is an object.
    ///
    /// # Errors
    /// When that cannot be said.
    pub fn exists(&self, key: &str) -> Result<bool> {
        match self.size(key) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == Kind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Its bytes.
    ///
    /// # Errors
    /// [`Kind::NotFound`].
    pub fn size(&self, key: &str) -> Result<u64> {
        let path = parse(key)?;
        let head = self.wait(self.inner.store.head(&path)).map_err(|error| unread(key, error))?;
        Ok(head.size)
    }

    /// Calls `each` with the key and the size of every object in the folder `prefix` ("" =
    /// all) and below, in no order, as they come. A missing folder is empty.
    ///
    /// # Errors
    /// The first of the store or of `each`.
    pub fn list(&self, prefix: &str, mut each: impl FnMut(&str, u64) -> Result<()>) -> Result<()> {
        let path = parse(prefix)?;
        let mut stream = self.inner.store.list((!prefix.is_empty()).then_some(&path));
        // `each` runs outside of the executor, so that it can use the objects, too.
        while let Some(meta) = self.wait(stream.next()) {
            let meta = meta.map_err(|error| failed("list the objects in", prefix, error))?;
            each(meta.location.as_ref(), meta.size)?;
        }
        Ok(())
    }

    /// The names of the folders directly in the folder `prefix`.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        let path = parse(prefix)?;
        let listed = self
            .wait(self.inner.store.list_with_delimiter((!prefix.is_empty()).then_some(&path)))
            .map_err(|error| failed("list the objects in", prefix, error))?;
        Ok(listed.common_prefixes.iter().filter_map(|p| p.filename().map(str::to_owned)).collect())
    }

    /// Registers as a writer of a local directory, for as long as the file is kept. The only
    /// one sweeps what writers that died left behind.
    ///
    /// # Errors
    /// When the directory cannot be opened.
    pub fn join_writers(&self) -> Result<Option<fs::File>> {
        self.inner.local.as_deref().map(staging::join_writers).transpose()
    }

    /// Says "shorter than expected" where the cause is that, not "invalid range".
    fn range_error(&self, key: &str, path: &Path, end: u64, error: object_store::Error) -> Error {
        if matches!(error, object_store::Error::Generic { .. })
            && let Ok(meta) = self.wait(self.inner.store.head(path))
            && meta.size < end
        {
            let size = meta.size;
            let what = format!("object {key} is damaged: it has {size} bytes, {end} are needed");
            return Error::caused(Kind::Damaged, what, error);
        }
        unread(key, error)
    }
}

/// A thread that drives a runtime until the sender is dropped.
fn start_runtime() -> Result<(Handle, oneshot::Sender<()>)> {
    let cannot = |error| Error::caused(Kind::Failed, "cannot start the store's threads", error);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(THREAD_STACK)
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .thread_name("store-io")
        .build()
        .map_err(cannot)?;
    let handle = runtime.handle().clone();
    let (stop, stopped) = oneshot::channel::<()>();
    std::thread::Builder::new()
        .name("store".to_owned())
        .stack_size(2 * THREAD_STACK)
        .spawn(move || {
            // An error is the sender's end, too.
            let _ = runtime.block_on(stopped);
        })
        .map_err(cannot)?;
    Ok((handle, stop))
}

fn parse(key: &str) -> Result<Path> {
    Path::parse(key).map_err(|error| {
        Error::caused(Kind::Failed, format!("{key} is not an object's name"), error)
    })
}

/// Sorted reads that cover the ranges, near ones together.
fn coalesce(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable_by_key(|range| (range.start, range.end));
    let mut reads: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        match reads.last_mut() {
            Some(read) if range.end <= read.end => {}
            // An overlapping range is always joined: each range lies in one read.
            Some(read)
                if range.start < read.end
                    || (range.start <= read.end + COALESCE_GAP
                        && range.end - read.start <= COALESCE_MAX) =>
            {
                read.end = range.end;
            }
            _ => reads.push(range),
        }
    }
    reads
}

fn check_length(key: &str, range: &Range<u64>, bytes: Bytes) -> Result<Bytes> {
    if bytes.len() as u64 == range.end - range.start {
        return Ok(bytes);
    }
    let end = range.end;
    Err(Error::new(Kind::Damaged, format!("object {key} is damaged: it ends before byte {end}")))
}

fn join_error(error: tokio::task::JoinError) -> object_store::Error {
    object_store::Error::JoinError { source: error }
}

/// The operating system's error at the bottom of a chain.
fn io_error(error: &object_store::Error) -> Option<&io::Error> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(this) = cause {
        if let Some(io) = this.downcast_ref::<io::Error>() {
            return Some(io);
        }
        cause = this.source();
    }
    None
}

fn io_kind(error: &object_store::Error) -> Option<io::ErrorKind> {
    io_error(error).map(io::Error::kind)
}

/// Whether trying again at once cannot help.
fn hopeless(error: &object_store::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(
        error,
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. }
    ) || matches!(
        io_kind(error),
        Some(PermissionDenied | QuotaExceeded | ReadOnlyFilesystem | StorageFull)
    )
}

/// As [`failed`], of a read. A sector that its disk cannot read is as lost as one with other bytes: what
/// there is against damage (copies, marks, reading again, repair) helps against it.
fn unread(key: &str, error: object_store::Error) -> Error {
    if io_error(&error).is_some_and(crate::error::is_unreadable) {
        let what = format!("object {key} is damaged: its disk cannot read it");
        return Error::caused(Kind::Damaged, what, error);
    }
    failed("read object", key, error)
}

/// Says what failed on which object, and what to do where that is known.
fn failed(what: &str, key: &str, error: object_store::Error) -> Error {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    let (kind, advice) = match (&error, io_kind(&error)) {
        (object_store::Error::NotFound { .. }, _) => (Kind::NotFound, ""),
        (
            object_store::Error::PermissionDenied { .. }
            | object_store::Error::Unauthenticated { .. },
            _,
        )
        | (_, Some(PermissionDenied)) => (
            Kind::NotPermitted,
            " (the engine's user needs to create and read there, a keeper's to remove)",
        ),
        (_, Some(StorageFull)) => {
            (Kind::Failed, " (the store is full: make room and run it again)")
        }
        (_, Some(QuotaExceeded)) => {
            (Kind::Failed, " (the quota is used up: raise it and run it again)")
        }
        (_, Some(ReadOnlyFilesystem)) => {
            (Kind::Failed, " (the file system is read-only: check its disk)")
        }
        _ => (Kind::Failed, ""),
    };
    Error::caused(kind, format!("cannot {what} {key}{advice}"), error).of_the_store()
}

mod keeper;
#[cfg(any(test, fuzzing))]
mod memory;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod recording;
mod resend;
pub mod s3;
mod staged;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod writer;

pub use self::keeper::Keeper;
pub use self::writer::{Finishing, ObjectWriter};
