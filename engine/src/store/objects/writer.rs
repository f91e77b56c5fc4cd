//! An object that is written piece by piece.
//!
//! A local directory takes the pieces as they come and publishes them by a rename. A store across a
//! network gets the object whole, by one conditional request: the pieces are staged in a file without
//! a name until then. So nothing is ever half there, no key is overwritten, and however many
//! containers are open, none of them waits in memory.

use bytes::Bytes;
use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};
use tokio::task::JoinHandle;

use super::staged::Staged;
use super::{Created, Objects, failed, parse};
use crate::error::{Error, Kind, Result};

/// An object that is being written. Dropped before it is finished, it never was.
pub struct ObjectWriter {
    objects: Objects,
    key: String,
    pieces: Option<Pieces>,
    written: u64,
    broken: bool,
}

/// Where the pieces are until the object is there.
enum Pieces {
    Local(Box<dyn MultipartUpload>),
    Staged(Staged),
}

impl ObjectWriter {
    pub(super) fn begin(objects: &Objects, key: &str) -> Result<Self> {
        let path = parse(key)?;
        let pieces = if objects.inner.local.is_some() {
            let upload = objects.wait(objects.inner.store.put_multipart(&path));
            Pieces::Local(upload.map_err(|error| failed("begin object", key, error))?)
        } else {
            Pieces::Staged(Staged::new(&objects.inner.staging)?)
        };
        let (objects, key) = (objects.clone(), key.to_owned());
        Ok(ObjectWriter { objects, key, pieces: Some(pieces), written: 0, broken: false })
    }

    /// Its key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Bytes written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    fn broken(&self) -> Error {
        Error::new(Kind::Failed, format!("object {} could not be written before", self.key))
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// When they cannot be written; the object can then not be finished.
    pub fn write(&mut self, bytes: Bytes) -> Result<()> {
        let broken = self.broken();
        let length = bytes.len() as u64;
        let written = match self.pieces.as_mut().filter(|_| !self.broken).ok_or(broken)? {
            Pieces::Local(upload) => {
                let part = upload.put_part(PutPayload::from(bytes));
                self.objects.wait(part).map_err(|error| failed("write object", &self.key, error))
            }
            Pieces::Staged(staged) => staged.write(&bytes),
        };
        self.broken = written.is_err();
        self.written += length;
        written
    }

    /// Makes the object durable and visible; returns its size.
    ///
    /// # Errors
    /// When that failed: the object must be written again under another key.
    pub fn finish(self) -> Result<u64> {
        self.finish_in_background()?.wait()
    }

    /// The same, while the caller goes on.
    ///
    /// # Errors
    /// When a write had failed, or the key is taken.
    pub fn finish_in_background(mut self) -> Result<Finishing> {
        let broken = self.broken();
        let pieces = self.pieces.take().filter(|_| !self.broken).ok_or(broken)?;
        let (objects, key, size) = (self.objects.clone(), self.key.clone(), self.written);
        let runtime = self.objects.inner.runtime.clone();
        let task = match pieces {
            Pieces::Local(mut upload) => {
                // Local publishing is a rename, which would replace: keys are never overwritten.
                if self.objects.exists(&key)? {
                    return Err(taken(&key));
                }
                runtime.spawn(async move {
                    let complete = upload.complete().await;
                    complete.map(drop).map_err(|error| failed("finish object", &key, error))
                })
            }
            Pieces::Staged(staged) => {
                let bytes = staged.into_bytes()?;
                runtime.spawn_blocking(move || match objects.create(&key, bytes)? {
                    Created::Ours => Ok(()),
                    Created::Exists => Err(taken(&key)),
                })
            }
        };
        Ok(Finishing { objects: self.objects.clone(), key: self.key.clone(), size, task })
    }
}

fn taken(key: &str) -> Error {
    let what = format!("object {key} exists already and is never overwritten");
    Error::new(Kind::Failed, what)
}

impl Drop for ObjectWriter {
    fn drop(&mut self) {
        if let Some(Pieces::Local(mut upload)) = self.pieces.take() {
            // A staging file that cannot be removed now is swept by the next engine.
            let _ = self.objects.wait(upload.abort());
        }
    }
}

/// An object that is being made durable.
pub struct Finishing {
    objects: Objects,
    key: String,
    size: u64,
    task: JoinHandle<Result<()>>,
}

impl Finishing {
    /// Whether [`wait`](Self::wait) would return at once.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.task.is_finished()
    }

    /// Waits until it is durable; returns its size.
    ///
    /// # Errors
    /// When it is not.
    pub fn wait(self) -> Result<u64> {
        let Finishing { objects, key, size, task } = self;
        objects
            .inner
            .runtime
            .block_on(task)
            .map_err(|error| failed("finish object", &key, super::join_error(error)))
            .and_then(|finished| finished)?;
        Ok(size)
    }
}
