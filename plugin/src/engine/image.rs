//! A stored disk: read at random, or streamed whole into a target.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use fleece_schema::engine_capnp as wire;
use tokio::sync::oneshot;

use super::convert::{self, engine_error, wire_error};
use super::types::{ImageExtent, Range};
use crate::error::{Error, Kind, Result};

/// How long the last writes may take after the engine has sent everything: they are few.
const RELEASE_LIMIT: Duration = Duration::from_secs(120);

/// Where the bytes of a stored disk go; called in any order of offsets.
pub trait BlockTarget {
    /// Takes bytes that are not known to be zero.
    ///
    /// # Errors
    /// Where the target cannot take them; ends the stream.
    fn write(&self, offset: u64, data: &[u8]) -> impl Future<Output = Result<()>>;
}

/// A stored disk; a model stands in for the engine in tests.
#[allow(async_fn_in_trait)]
pub trait DiskImage {
    /// Appends `length` bytes (at most [`super::MAX_WRITE`]) from `offset` on, zeros included.
    async fn read(&self, offset: u64, length: u32, into: &mut Vec<u8>) -> Result<()>;

    /// Runs of data and zeros from `offset` on; the engine may stop early.
    async fn extents(&self, offset: u64, length: u64) -> Result<Vec<ImageExtent>>;

    /// Sends everything that is not zero to `target`; in any order unless `ordered`.
    /// Returns the bytes sent and, with `damaged_zero`, the ranges left out as damaged.
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
}

impl Image {
    pub(super) fn new(client: wire::disk_image::Client) -> Image {
        Image { client }
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
        let (done, released) = oneshot::channel();
        let sink = Sink { target, failure: Rc::clone(&failure), _done: done };
        let mut request = self.client.stream_request();
        let mut params = request.get();
        params.set_sink(capnp_rpc::new_client(sink));
        params.set_ordered(ordered);
        params.set_damaged_zero(damaged_zero);
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
        if self.failure.borrow().is_some() {
            return Err(capnp::Error::failed("the target has failed".into()));
        }
        let params = params.get()?;
        if let Err(error) = self.target.write(params.get_offset(), params.get_data()?).await {
            let reason = wire_error(&error);
            *self.failure.borrow_mut() = Some(error);
            return Err(reason);
        }
        Ok(())
    }
}
