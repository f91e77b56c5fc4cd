//! A local store that writes down what becomes durable in it, and stores as a power cut leaves them; with
//! bad sectors where a test wants them.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path as FsPath, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result as Stored, UploadPart,
};

use super::Objects;

/// What a store was asked to keep, in the order in which it was done.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    /// An object was created.
    Create { key: String, bytes: Vec<u8> },
    /// Bytes were staged of an object that does not exist yet.
    Part { key: String, bytes: Vec<u8> },
    /// What was staged is an object.
    Complete { key: String },
}

impl Operation {
    pub(crate) fn key(&self) -> &str {
        let (Operation::Create { key, .. }
        | Operation::Part { key, .. }
        | Operation::Complete { key }) = self;
        key
    }
}

type Hook = Box<dyn Fn(&Operation) + Send + Sync>;

/// What was done so far. A clone is the same record.
#[derive(Clone, Default)]
pub(crate) struct Record {
    operations: Arc<Mutex<Vec<Operation>>>,
    unreadable: Arc<Mutex<BTreeSet<String>>>,
}

impl Record {
    pub(crate) fn operations(&self) -> Vec<Operation> {
        self.operations.lock().unwrap().clone()
    }

    /// Under this object the disk has bad sectors from now on.
    pub(crate) fn wear_out(&self, key: &str) {
        self.unreadable.lock().unwrap().insert(key.to_owned());
    }
}

struct Recording {
    inner: LocalFileSystem,
    record: Record,
    /// Called with each operation, before the next one.
    after: Hook,
}

impl Objects {
    /// The objects in a directory; all that is done goes into `record`, and to `after`.
    pub(crate) fn recorded(
        directory: &FsPath,
        record: &Record,
        after: impl Fn(&Operation) + Send + Sync + 'static,
    ) -> Self {
        let root = fs::canonicalize(directory).unwrap();
        let inner = LocalFileSystem::new_with_prefix(&root).unwrap().with_fsync(true);
        let recording = Recording { inner, record: record.clone(), after: Box::new(after) };
        Self::over(Arc::new(Shared(Arc::new(recording))), Some(root.clone()), &root).unwrap()
    }
}

impl Recording {
    fn did(&self, operation: Operation) {
        let mut record = self.record.operations.lock().unwrap();
        (self.after)(&operation);
        record.push(operation);
    }

    fn can_read(&self, location: &Path) -> Stored<()> {
        match self.record.unreadable.lock().unwrap().contains(location.as_ref()) {
            false => Ok(()),
            true => Err(object_store::Error::Generic {
                store: "worn out",
                source: io::Error::from(rustix::io::Errno::IO).into(),
            }),
        }
    }
}

/// Uploads keep the recording alive.
#[derive(Clone)]
struct Shared(Arc<Recording>);

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0.inner)
    }
}

impl std::fmt::Display for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "recorded {}", self.0.inner)
    }
}

#[async_trait]
impl ObjectStore for Shared {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Stored<PutResult> {
        let bytes = payload.iter().flatten().copied().collect();
        let put = self.0.inner.put_opts(location, payload, opts).await?;
        self.0.did(Operation::Create { key: location.to_string(), bytes });
        Ok(put)
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Stored<Box<dyn MultipartUpload>> {
        let inner = self.0.inner.put_multipart_opts(location, opts).await?;
        let key = location.to_string();
        Ok(Box::new(Upload { inner, key, to: self.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Stored<GetResult> {
        // Sizes are not in the sectors of the data.
        if !options.head {
            self.0.can_read(location)?;
        }
        self.0.inner.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Stored<Vec<Bytes>> {
        self.0.can_read(location)?;
        self.0.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        _: BoxStream<'static, Stored<Path>>,
    ) -> BoxStream<'static, Stored<Path>> {
        panic!("hosts only create");
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Stored<ObjectMeta>> {
        self.0.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Stored<ListResult> {
        self.0.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Stored<()> {
        panic!("nothing is ever copied");
    }
}

#[derive(Debug)]
struct Upload {
    inner: Box<dyn MultipartUpload>,
    key: String,
    to: Shared,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let bytes = data.iter().flatten().copied().collect();
        let operation = Operation::Part { key: self.key.clone(), bytes };
        let (part, to) = (self.inner.put_part(data), self.to.clone());
        async move {
            part.await?;
            to.0.did(operation);
            Ok(())
        }
        .boxed()
    }

    async fn complete(&mut self) -> Stored<PutResult> {
        let completed = self.inner.complete().await?;
        self.to.0.did(Operation::Complete { key: self.key.clone() });
        Ok(completed)
    }

    async fn abort(&mut self) -> Stored<()> {
        self.inner.abort().await
    }
}

/// Puts into `directory` what is there when the power fails in the operation after `done`: of that
/// one, half has reached its staging file. `with_names`: a created object's staging file has not
/// gone yet.
pub(crate) fn cut(
    directory: &FsPath,
    done: &[Operation],
    torn: Option<&Operation>,
    with_names: bool,
) {
    let place = |key: &str| -> PathBuf {
        let path = directory.join(key);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    };
    let append = |key: &str, bytes: &[u8]| {
        let path = place(&format!("{key}#1"));
        let mut staged = fs::read(&path).unwrap_or_default();
        staged.extend_from_slice(bytes);
        fs::write(path, staged).unwrap();
    };
    for operation in done {
        match operation {
            Operation::Create { key, bytes } => {
                fs::write(place(key), bytes).unwrap();
                if with_names {
                    append(key, bytes);
                }
            }
            Operation::Part { key, bytes } => append(key, bytes),
            Operation::Complete { key } => {
                fs::rename(place(&format!("{key}#1")), place(key)).unwrap();
            }
        }
    }
    match torn {
        Some(Operation::Create { key, bytes } | Operation::Part { key, bytes }) => {
            append(key, &bytes[..bytes.len() / 2]);
        }
        // All is staged; its name is missing.
        Some(Operation::Complete { .. }) | None => {}
    }
}
