//! A stored disk: read at random, or streamed whole into a target.

use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use fleece_schema::engine_capnp as wire;
use tokio::sync::oneshot;

use super::convert::{self, engine_error, wire_error};
use super::files::Files;
use super::types::{ImageExtent, Range};
use crate::error::{Context, Error, Kind, Result};

/// How long the last writes may take after the engine has sent everything: they are few.
const RELEASE_LIMIT: Duration = Duration::from_secs(120);

/// Where the bytes of a stored disk go; called in any order of offsets.
pub trait BlockTarget {
    /// Takes bytes that are not known to be zero.
    ///
    /// # Errors
    /// Where the target cannot take them; ends the stream.
    fn write(&self, piece: Scattered) -> impl Future<Output = Result<()>>;

    /// What the engine may write to itself, in any order; it then says how much it [`BlockTarget::wrote`].
    fn file(&self) -> Option<&File> {
        None
    }

    /// So many more bytes are in [`BlockTarget::file`].
    ///
    /// # Errors
    /// Where they cannot stay there; ends the stream.
    fn wrote(&self, _bytes: u64) -> impl Future<Output = Result<()>> {
        std::future::ready(Ok(()))
    }
}

/// Bytes of one or more runs of a disk.
#[derive(Clone, Debug)]
pub struct Scattered {
    runs: Vec<Range>,
    bytes: Bytes,
}

impl Scattered {
    /// `bytes` are those of all runs, one after the other.
    ///
    /// # Errors
    /// Where they are more or fewer than the runs need.
    pub fn new(runs: Vec<Range>, bytes: Bytes) -> Result<Scattered> {
        let needed = runs.iter().try_fold(0, |sum: u64, run| sum.checked_add(run.length));
        match needed == Some(bytes.len() as u64) {
            true => Ok(Scattered { runs, bytes }),
            false => {
                let what = format!("{} bytes came for runs of another length", bytes.len());
                Err(Error::new(Kind::Failed, what))
            }
        }
    }

    /// Where the bytes belong.
    #[must_use]
    pub fn runs(&self) -> &[Range] {
        &self.runs
    }

    /// How many they are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Each run: its offset and its bytes.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Bytes)> {
        let mut rest = self.bytes.clone();
        // As long as `bytes` together, so each fits into memory.
        self.runs.iter().map(move |run| (run.offset, rest.split_to(run.length as usize)))
    }
}

/// A stored disk; a model stands in for the engine in tests.
#[allow(async_fn_in_trait)]
pub trait DiskImage {
    /// Appends `length` bytes (at most [`super::MAX_WRITE`]) from `offset` on, zeros included.
    async fn read(&self, offset: u64, length: u32, into: &mut Vec<u8>) -> Result<()>;

    /// Runs of data and zeros from `offset` on; the engine may stop early.
    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<ImageExtent>>;

    /// Gives everything that is not zero to `target`, or right into its file; in any order unless
    /// `ordered`. Returns the bytes given and, with `damaged_zero`, the ranges left out as damaged.
    async fn stream<T: BlockTarget + 'static>(
        &self,
        target: Rc<T>,
        ordered: bool,
        damaged_zero: bool,
    ) -> Result<(u64, Vec<Range>)>;
}

/// A disk of the real engine's store.
#[derive(Clone)]
pub struct Image {
    client: wire::disk_image::Client,
    /// Where files may be handed over.
    files: Option<Rc<Files>>,
}

impl Image {
    pub(super) fn new(client: wire::disk_image::Client, files: Option<Rc<Files>>) -> Image {
        Image { client, files }
    }
}

impl DiskImage for Image {
    async fn read(&self, offset: u64, length: u32, into: &mut Vec<u8>) -> Result<()> {
        let mut request = self.client.read_request();
        request.get().set_offset(offset);
        request.get().set_length(length);
        let decode = async {
            let response = request.send().promise.await?;
            let data = response.get()?.get_data()?;
            if data.len() != length as usize {
                let got = data.len();
                return Err(capnp::Error::failed(format!("{got} of {length} bytes came back")));
            }
            into.extend_from_slice(data);
            Ok(())
        };
        decode.await.map_err(|error| engine_error(&error, &format!("cannot read at {offset}")))
    }

    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<ImageExtent>> {
        let mut request = self.client.extents_request();
        request.get().set_offset(offset);
        request.get().set_length(length);
        let decode = async {
            let response = request.send().promise.await?;
            let extents = response.get()?.get_extents()?;
            Ok(extents.iter().map(convert::image_extent).collect())
        };
        decode
            .await
            .map_err(|error| engine_error(&error, &format!("cannot map the disk at {offset}")))
    }

    async fn stream<T: BlockTarget + 'static>(
        &self,
        target: Rc<T>,
        ordered: bool,
        damaged_zero: bool,
    ) -> Result<(u64, Vec<Range>)> {
        let failure = Rc::new(RefCell::new(None));
        let file = match self.files.as_ref().zip(target.file()) {
            Some((files, file)) => {
                files.hand_over(file).context(|| "the engine gets no file".into())?
            }
            None => 0,
        };
        let (done, released) = oneshot::channel();
        let sink = Sink { target, failure: Rc::clone(&failure), _done: done };
        let mut request = self.client.stream_request();
        let mut params = request.get();
        params.set_sink(capnp_rpc::new_client(sink));
        params.set_ordered(ordered);
        params.set_damaged_zero(damaged_zero);
        params.set_file(file);
        let decode = async {
            let response = request.send().promise.await?;
            let response = response.get()?;
            Ok((response.get_written(), response.get_holes()?.iter().map(convert::range).collect()))
        };
        let answer = decode.await;
        // The last writes may still be under way: they hold the sink.
        let released = tokio::time::timeout(RELEASE_LIMIT, released).await;
        // What went wrong here says more than what the engine made of it.
        if let Some(error) = failure.take() {
            return Err(error);
        }
        let answer = answer.map_err(|error| engine_error(&error, "cannot restore the disk"))?;
        match released {
            // Nobody ever sends: the sink's end is the message.
            Ok(_) => Ok(answer),
            Err(_) => Err(Error::new(Kind::Failed, "the target does not take the last writes")),
        }
    }
}

/// Receives the stream and keeps the target's first error, which ends it.
struct Sink<T> {
    target: Rc<T>,
    failure: Rc<RefCell<Option<Error>>>,
    /// Dropped with the sink, after its last write.
    _done: oneshot::Sender<()>,
}

impl<T: BlockTarget + 'static> wire::block_sink::Server for Sink<T> {
    async fn write(
        self: Rc<Self>,
        params: wire::block_sink::WriteParams,
    ) -> std::result::Result<(), capnp::Error> {
        self.alive()?;
        let params = params.get()?;
        let runs = params.get_runs()?.iter().map(convert::range).collect();
        let piece = Scattered::new(runs, Bytes::copy_from_slice(params.get_data()?));
        let written = match piece {
            Ok(piece) => self.target.write(piece).await,
            Err(error) => Err(error),
        };
        self.keep(written)
    }

    async fn wrote(
        self: Rc<Self>,
        params: wire::block_sink::WroteParams,
    ) -> std::result::Result<(), capnp::Error> {
        self.alive()?;
        let bytes = params.get()?.get_bytes();
        self.keep(self.target.wrote(bytes).await)
    }
}

impl<T> Sink<T> {
    fn alive(&self) -> std::result::Result<(), capnp::Error> {
        match self.failure.borrow().is_some() {
            true => Err(capnp::Error::failed("the target has failed".into())),
            false => Ok(()),
        }
    }

    /// Keeps what the target failed with, and ends the stream with it.
    fn keep(&self, done: Result<()>) -> std::result::Result<(), capnp::Error> {
        done.map_err(|error| {
            let reason = wire_error(&error);
            *self.failure.borrow_mut() = Some(error);
            reason
        })
    }
}
