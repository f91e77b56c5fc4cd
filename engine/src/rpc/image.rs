//! A disk of a snapshot as `fleece restore` and `fleece serve` see it, and the way of
//! long jobs' output back to who asked.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fleece_schema::engine_capnp::{block_sink, disk_image, event_sink};
use tokio::sync::{Semaphore, mpsc};

use super::blocking::{blocking, long};
use super::convert;
use super::flow::Flow;
use super::to_wire;
use crate::error::{Error, Kind, Result};
use crate::jobs::restore::{
    DiskImage, IntoFile, MAX_WRITE, Messages, Options, Outcome, Scattered, Target,
};
use crate::session::Context;
use crate::store::manifest::{Disk, Manifest};
use crate::upkeep;

type Answer = std::result::Result<(), capnp::Error>;

/// Pieces that wait between the restoring thread and the socket: 1 MiB.
const PIECES: usize = 2;
/// Lines that wait between a job and the socket.
const LINES: usize = 64;
/// Jobs with lines (verify, rebuild) at once, some MiB each; more wait.
static JOBS: Semaphore = Semaphore::const_new(2);
/// How long a client may leave a piece or a line where it is: a restore into a pipe may rest.
const STALLED: Duration = Duration::from_secs(600);

/// A disk, open for reading.
pub(super) struct ImageServer {
    context: Context,
    disk: Disk,
    /// `VM@snapshot disk`, for messages.
    what: String,
    /// For reads at random: recipe nodes stay cached from one to the next.
    image: Arc<Mutex<Option<DiskImage>>>,
    manifest: Manifest,
    /// When its reader's registration is to be renewed.
    renew: Cell<Instant>,
    /// Places for restores.
    restores: Arc<Semaphore>,
    /// The connection's messages.
    flow: Rc<Flow>,
}

/// How long a registered reader is respected by whoever deletes; one that goes on renews it.
const LEASE: Duration = Duration::from_secs(24 * 3600);

impl ImageServer {
    /// Opens the disk and registers as a reader of its snapshot.
    pub(super) async fn open(
        context: Context,
        restores: Arc<Semaphore>,
        flow: Rc<Flow>,
        mut manifest: Manifest,
        disk: Disk,
    ) -> std::result::Result<Self, capnp::Error> {
        manifest.config = Vec::new();
        let what = format!("{}@{} disk {}", manifest.vm_name, manifest.snapshot, disk.name);
        let (image, renew) = (Arc::default(), Cell::new(Instant::now()));
        let opened = ImageServer { context, disk, what, image, manifest, renew, restores, flow };
        opened.register().await?;
        Ok(opened)
    }

    /// Registers as a reader, if it is time to.
    async fn register(&self) -> Answer {
        let now = Instant::now();
        if now < self.renew.get() {
            return Ok(());
        }
        self.renew.set(now + LEASE / 2);
        let (context, manifest) = (self.context.clone(), self.manifest.clone());
        blocking(move || {
            if let Err(error) = upkeep::register_reader(&context, &manifest, LEASE) {
                // Better a restore that nobody knows of than none, as from a read-only store.
                eprintln!("fleece-engine: a reader is not registered: {error}");
            }
            Ok(())
        })
        .await
    }

    /// Does something with the image open at random.
    async fn with_image<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut DiskImage) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, capnp::Error> {
        self.register().await?;
        let (context, disk, what) = (self.context.clone(), self.disk.clone(), self.what.clone());
        let image = Arc::clone(&self.image);
        blocking(move || {
            let mut image = image.lock().unwrap_or_else(PoisonError::into_inner);
            let open = match image.take() {
                Some(open) => open,
                None => upkeep::restorer(&context).image(&disk)?,
            };
            let open = image.insert(open);
            let outcome = work(open);
            context.damage.met(&context.store, &open.take_found(), &format!("reading {what}"));
            outcome
        })
        .await
    }
}

impl disk_image::Server for ImageServer {
    async fn read(
        self: Rc<Self>,
        params: disk_image::ReadParams,
        mut results: disk_image::ReadResults,
    ) -> Answer {
        let params = params.get()?;
        let (offset, length) = (params.get_offset(), params.get_length() as usize);
        if length > MAX_WRITE {
            let message = format!("{length} bytes read at once; at most {MAX_WRITE}");
            return Err(to_wire(&Error::new(Kind::Usage, message)));
        }
        let _place = self.flow.place_for_answer().await?;
        let data = self
            .with_image(move |image| {
                let mut data = vec![0; length];
                image.read_at(offset, &mut data)?;
                Ok(data)
            })
            .await?;
        results.get().set_data(&data);
        Ok(())
    }

    async fn extents(
        self: Rc<Self>,
        params: disk_image::ExtentsParams,
        mut results: disk_image::ExtentsResults,
    ) -> Answer {
        let params = params.get()?;
        let (offset, length) = (params.get_offset(), params.get_length());
        let _place = self.flow.place_for_answer().await?;
        let extents = self.with_image(move |image| image.extents(offset, length)).await?;
        let mut list = results.get().init_extents(extents.len() as u32);
        for (i, extent) in extents.iter().enumerate() {
            let mut to = list.reborrow().get(i as u32);
            to.set_offset(extent.offset);
            to.set_length(extent.length);
            to.set_zero(extent.zero);
        }
        Ok(())
    }

    async fn stream(
        self: Rc<Self>,
        params: disk_image::StreamParams,
        mut results: disk_image::StreamResults,
    ) -> Answer {
        let params = params.get()?;
        let options =
            Options { ordered: params.get_ordered(), damaged_zero: params.get_damaged_zero() };
        let sink = params.get_sink()?;
        let file = params.get_file();
        self.register().await?;
        let place = Arc::clone(&self.restores).acquire_owned().await;
        let place = place.map_err(|_| to_wire(&gone()))?;
        // One that did not arrive is no error: the client takes data, too.
        let file = self.flow.files.take(file);
        let (send, mut waiting) = mpsc::channel::<Done>(PIECES);
        let (context, disk, what) = (self.context.clone(), self.disk.clone(), self.what.clone());
        let restored = tokio::task::spawn_local(long(move || {
            // Kept until nothing is written any more, whatever became of the client.
            let _place = place;
            let say = |done| send.blocking_send(done).map_err(|_| gone());
            let target: &mut dyn Target = match file {
                Some(file) => &mut IntoFile::new(file, |bytes| say(Done::Wrote(bytes)))?,
                None => &mut Messages::new(|piece| say(Done::Piece(piece))),
            };
            upkeep::restore(&context, &disk, &what, options, target)
        }));
        while let Some(done) = waiting.recv().await {
            tell(&sink, done).await?;
        }
        let outcome: Outcome = joined(restored.await)?;
        let mut results = results.get();
        results.set_written(outcome.written);
        let holes = results.init_holes(outcome.holes.len() as u32);
        convert::set_ranges(holes, &outcome.holes);
        Ok(())
    }
}

/// What the restoring thread has for the client.
enum Done {
    /// Bytes to send.
    Piece(Scattered),
    /// So many bytes are in its file.
    Wrote(u64),
}

/// Tells the client; returns when it may be told the next.
async fn tell(sink: &block_sink::Client, done: Done) -> Answer {
    match done {
        Done::Wrote(bytes) => {
            let mut request = sink.wrote_request();
            request.get().set_bytes(bytes);
            taken(request.send()).await
        }
        Done::Piece(piece) => {
            let mut request = sink.write_request();
            let mut params = request.get();
            params.set_data(&piece.bytes);
            convert::set_ranges(params.init_runs(piece.runs.len() as u32), &piece.runs);
            drop(piece);
            taken(request.send()).await
        }
    }
}

/// Waits until the client took something. One that stopped reading must not keep its place from
/// others for ever.
async fn taken(sent: impl Future<Output = Answer>) -> Answer {
    taken_within(STALLED, sent).await
}

async fn taken_within(limit: Duration, sent: impl Future<Output = Answer>) -> Answer {
    tokio::time::timeout(limit, sent).await.unwrap_or_else(|_| {
        let minutes = limit.as_secs() / 60;
        let what = format!("the client took nothing for {minutes} minutes");
        Err(to_wire(&Error::new(Kind::Failed, what)))
    })
}

fn gone() -> Error {
    Error::new(Kind::Failed, "whoever asked is gone")
}

/// Runs a long job away from the LocalSet thread; its lines go to `sink` as they come.
pub(super) async fn with_events<T: Send + 'static>(
    sink: event_sink::Client,
    work: impl FnOnce(upkeep::Emit<'_>) -> Result<T> + Send + 'static,
) -> std::result::Result<T, capnp::Error> {
    let (lines, mut waiting) = mpsc::channel::<String>(LINES);
    let _place = JOBS.acquire().await.map_err(|_| to_wire(&gone()))?;
    let job = tokio::task::spawn_local(long(move || {
        work(&mut |line| lines.blocking_send(line).map_err(|_| gone()))
    }));
    while let Some(line) = waiting.recv().await {
        let mut request = sink.event_request();
        request.get().set_json(&line);
        taken(request.send()).await?;
    }
    joined(job.await)
}

/// What a task of this thread gave.
fn joined<T>(
    outcome: std::result::Result<std::result::Result<T, capnp::Error>, tokio::task::JoinError>,
) -> std::result::Result<T, capnp::Error> {
    outcome.unwrap_or_else(|e| Err(capnp::Error::failed(format!("a task failed: {e}"))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_takes_nothing_loses_its_place() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let short = Duration::from_millis(100);
            assert!(taken_within(short, std::future::ready(Ok(()))).await.is_ok());
            let error = taken_within(short, std::future::pending()).await.unwrap_err();
            assert!(error.extra.contains("the client took nothing for"), "{error}");
        });
    }
}
