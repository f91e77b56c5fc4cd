//! One backup of one VM, as the engine keeps it.

use std::fs::File;
use std::rc::Rc;

use bytes::Bytes;
use capnp::ErrorKind;
use fleece_schema::engine_capnp as wire;

use super::convert::{self, Wire, engine_error};
use super::count;
use super::files::Files;
use super::types::{BackupRequest, BlockExtent, Counts, DiskIndex, Grant, Snapshot};
use crate::error::{Error, Kind, Result};

/// What scan and write need of a session; a model stands in for the engine in tests.
#[allow(async_fn_in_trait)]
pub trait BackupSession {
    /// The next blocks of a disk, ascending. `fingerprints`: 20 bytes for each block of
    /// data in `extents`. Waits while the engine has enough to do.
    async fn submit(
        &self,
        disk: DiskIndex,
        extents: &[BlockExtent],
        fingerprints: &[u8],
    ) -> Result<()>;

    /// Ends the scan of a window; returns when the next one may begin.
    async fn end_window(&self) -> Result<()>;

    /// Says that no window follows.
    async fn end_scan(&self) -> Result<()>;

    /// The next blocks to write, in order, and whether everything is settled.
    async fn grants(&self) -> Result<(Vec<Grant>, bool)>;

    /// Granted blocks in the order of the grants; whole blocks, at most [`super::MAX_WRITE`]
    /// bytes together. Waits while the engine has enough to do.
    async fn write(&self, blocks: &[(Grant, Bytes)]) -> Result<()>;

    /// Lends a disk's image to the engine: a file that has the disk's bytes at their offsets, and that
    /// nobody writes to while the session lives. `false`: it does not take it, the blocks must be sent.
    async fn lend(&self, disk: DiskIndex, image: &File) -> Result<bool>;

    /// Has the engine read granted blocks of disks that were lent, in the order of the grants; at most
    /// [`super::MAX_LENT`] bytes together. Returns when it has them.
    async fn write_lent(&self, grants: &[Grant]) -> Result<()>;
}

/// A session of the real engine. Dropping it ends the session without a snapshot.
pub struct Session {
    client: wire::backup_session::Client,
    /// Where files may be handed over.
    files: Option<Rc<Files>>,
}

impl Session {
    pub(super) fn new(client: wire::backup_session::Client, files: Option<Rc<Files>>) -> Session {
        Session { client, files }
    }

    /// Publishes the snapshot: from here on it can be restored.
    ///
    /// # Errors
    /// Where it was not published.
    pub async fn commit(&self, point_in_time_ms: i64, bitmaps: &[String]) -> Result<Snapshot> {
        let mut request = self.client.commit_request();
        request.get().set_point_in_time_ms(point_in_time_ms);
        let mut list = request.get().init_bitmaps(count(bitmaps.len()));
        for (i, name) in bitmaps.iter().enumerate() {
            list.set(count(i), name.as_str());
        }
        let decode = async {
            let response = request.send().promise.await?;
            convert::snapshot(response.get()?.get_snapshot()?)
        };
        decode.await.map_err(|error| engine_error(&error, "cannot commit"))
    }

    /// Ends the session without a snapshot.
    ///
    /// # Errors
    /// Where the engine could not be told; the end of the connection tells it too.
    pub async fn abort(&self, reason: &str) -> Result<()> {
        let mut request = self.client.abort_request();
        request.get().set_reason(reason);
        done(request.send().promise.await, "cannot end the session")
    }

    /// What the session counted so far, and its stage.
    ///
    /// # Errors
    /// Where the session has ended.
    pub async fn progress(&self) -> Result<(Counts, String)> {
        let request = self.client.progress_request();
        let decode = async {
            let response = request.send().promise.await?;
            let response = response.get()?;
            let stage = response.get_stage()?.to_str()?.to_owned();
            Ok((convert::counts(response.get_counts()?), stage))
        };
        decode.await.map_err(|error| engine_error(&error, "cannot read the progress"))
    }
}

fn done<T>(answer: std::result::Result<T, capnp::Error>, doing: &str) -> Result<()> {
    answer.map(drop).map_err(|error| engine_error(&error, doing))
}

impl BackupSession for Session {
    async fn submit(
        &self,
        disk: DiskIndex,
        extents: &[BlockExtent],
        fingerprints: &[u8],
    ) -> Result<()> {
        let mut request = self.client.submit_request();
        let mut params = request.get();
        params.set_disk(disk.0);
        params.set_fingerprints(fingerprints);
        let mut list = params.init_extents(count(extents.len()));
        for (i, extent) in extents.iter().enumerate() {
            let mut item = list.reborrow().get(count(i));
            item.set_first_block(extent.first);
            item.set_blocks(extent.blocks);
            item.set_zero(extent.zero);
        }
        done(request.send().await, "cannot hand over what was read")
    }

    async fn end_window(&self) -> Result<()> {
        done(self.client.end_window_request().send().promise.await, "cannot end a part of the scan")
    }

    async fn end_scan(&self) -> Result<()> {
        done(self.client.end_scan_request().send().promise.await, "cannot end the scan")
    }

    async fn grants(&self) -> Result<(Vec<Grant>, bool)> {
        let request = self.client.grants_request();
        let decode = async {
            let response = request.send().promise.await?;
            let response = response.get()?;
            let grants = response.get_extents()?.iter().map(|grant| Grant {
                disk: DiskIndex(grant.get_disk()),
                first: grant.get_first_block(),
                blocks: grant.get_blocks(),
            });
            Ok((grants.collect(), response.get_done()))
        };
        decode.await.map_err(|error| engine_error(&error, "cannot learn what is new"))
    }

    async fn write(&self, blocks: &[(Grant, Bytes)]) -> Result<()> {
        let length: usize = blocks.iter().map(|(_, data)| data.len()).sum();
        if length > super::MAX_WRITE as usize {
            return Err(Error::new(Kind::Failed, format!("a write of {length} bytes")));
        }
        let mut request = self.client.write_request();
        let mut rest = request.get().init_data(count(length));
        for (_, data) in blocks {
            let (here, behind) = rest.split_at_mut(data.len());
            here.copy_from_slice(data);
            rest = behind;
        }
        let runs = request.get().init_runs(count(blocks.len()));
        set_runs(runs, blocks.iter().map(|(grant, _)| grant));
        done(request.send().await, "cannot hand over new blocks")
    }

    async fn lend(&self, disk: DiskIndex, image: &File) -> Result<bool> {
        let Some(files) = &self.files else { return Ok(false) };
        // Without a descriptor for it the blocks can still be sent.
        let Ok(file) = files.hand_over(image) else { return Ok(false) };
        let mut request = self.client.lend_request();
        request.get().set_disk(disk.0);
        request.get().set_file(file);
        let decode = async { Wire::Ok(request.send().promise.await?.get()?.get_taken()) };
        match decode.await {
            // An engine of the version before.
            Err(error) if error.kind == ErrorKind::Unimplemented => Ok(false),
            taken => taken.map_err(|error| engine_error(&error, "cannot lend a disk's image")),
        }
    }

    async fn write_lent(&self, grants: &[Grant]) -> Result<()> {
        let mut request = self.client.write_lent_request();
        set_runs(request.get().init_runs(count(grants.len())), grants.iter());
        done(request.send().promise.await, "cannot have new blocks read")
    }
}

fn set_runs<'a>(
    mut runs: capnp::struct_list::Builder<'_, wire::grant::Owned>,
    grants: impl Iterator<Item = &'a Grant>,
) {
    for (i, grant) in grants.enumerate() {
        let mut run = runs.reborrow().get(count(i));
        run.set_disk(grant.disk.0);
        run.set_first_block(grant.first);
        run.set_blocks(grant.blocks);
    }
}

/// Writes what we want into the request.
pub(super) fn fill(mut request: wire::backup_request::Builder<'_>, wanted: &BackupRequest) {
    request.set_vm(wanted.vm.as_bytes());
    request.set_vm_name(wanted.vm_name.as_str());
    request.set_adopt(wanted.adopt);
    request.set_config(&wanted.config);
    request.set_hypervisor(wanted.hypervisor.as_str());
    let mut disks = request.init_disks(count(wanted.disks.len()));
    for (i, disk) in wanted.disks.iter().enumerate() {
        let mut item = disks.reborrow().get(count(i));
        item.set_uuid(disk.uuid.as_bytes());
        item.set_name(disk.name.as_str());
        item.set_size(disk.size);
        item.set_parent(disk.parent.as_ref().map_or("", |id| id.0.as_str()));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod refusing {
    use std::cell::RefCell;
    use std::path::Path;
    use std::rc::Rc;

    use super::super::{Connection, DiskIndex, Engine, EngineInfo};
    use super::{BackupSession, Session, wire};

    /// An engine that answers a commit with these words, or goes away.
    struct Refusing(Option<&'static str>);

    impl wire::backup_session::Server for Refusing {
        async fn commit(
            self: Rc<Self>,
            _: wire::backup_session::CommitParams,
            _: wire::backup_session::CommitResults,
        ) -> Result<(), capnp::Error> {
            Err(match self.0 {
                Some(words) => capnp::Error::failed(words.into()),
                None => capnp::Error::disconnected("gone".into()),
            })
        }
    }

    /// An engine that answers nothing.
    struct Silent;

    impl wire::engine::Server for Silent {}

    impl Engine {
        /// An engine whose connection has ended.
        pub(crate) fn that_is_gone(socket: &Path) -> Engine {
            let info = EngineInfo {
                version: String::new(),
                store: uuid::Uuid::nil(),
                block_size: 4096,
                segment_size: 2 << 20,
                fingerprint_state: [0; 5],
                host: "hv3".into(),
                encrypted: true,
                takes_files: false,
            };
            let client = capnp_rpc::new_client(Silent);
            let connection = RefCell::new(Connection { client, files: None });
            Engine { socket: socket.to_owned(), connection, info }
        }
    }

    #[test]
    fn an_engine_that_cannot_be_lent_images_does_not_take_them() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let image = tempfile::tempfile().unwrap();
        for files in [None, Some(Rc::default())] {
            let session = Session::new(capnp_rpc::new_client(Refusing(None)), files);
            let taken = runtime.block_on(session.lend(DiskIndex(0), &image)).unwrap();
            assert!(!taken);
        }
    }

    impl Session {
        /// A session whose engine does not commit.
        pub(crate) fn that_cannot_commit(answer: Option<&'static str>) -> Session {
            Session::new(capnp_rpc::new_client(Refusing(answer)), None)
        }
    }
}
