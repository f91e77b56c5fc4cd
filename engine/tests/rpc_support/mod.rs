//! An engine of its own and clients that are made by hand from the schema, so that they can do
//! what ours never do.
#![allow(clippy::unwrap_used, unreachable_pub, dead_code, missing_docs)]

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as Std;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::{Child, Command, Output, Stdio};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use capnp_rpc::{RpcSystem, rpc_twoparty_capnp, twoparty};
use fleece_engine::fingerprint::Fingerprinter;
use fleece_engine::store::keys::StoreKey;
use fleece_schema::engine_capnp::{backup_session, block_sink, disk_image, engine};
use futures::{AsyncRead, AsyncWrite};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::net::UnixStream;
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};

pub const BLOCK: usize = 4096;
pub const MIB: u64 = 1 << 20;
/// How long anything may take here on a busy machine.
pub const SOON: Duration = Duration::from_secs(60);

/// A running engine with a store of its own.
pub struct Engine {
    child: Child,
    folder: tempfile::TempDir,
    fingerprinter: Fingerprinter,
}

impl Engine {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let made = Command::new(env!("CARGO_BIN_EXE_fleecectl"))
            .args(["init", "--store"])
            .arg(at("store"))
            .arg("--config")
            .arg(at("engine.toml"))
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let key = StoreKey::load(&at("engine.key")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_fleece-engine"))
            .arg("--config")
            .arg(at("engine.toml"))
            .arg("--socket")
            .arg(at("engine.sock"))
            .arg("--state-dir")
            .arg(at("state"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let engine = Engine { child, fingerprinter: key.fingerprinter(BLOCK as u32), folder };
        let begun = Instant::now();
        while Std::connect(engine.socket()).is_err() {
            assert!(begun.elapsed() < SOON, "the engine does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        engine
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("engine.sock")
    }

    /// Anonymous memory, bytes.
    pub fn anonymous(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    pub fn fleecectl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fleecectl"));
        command.args(arguments).arg("--engine").arg(self.socket()).output().unwrap()
    }

    pub fn fingerprint(&self, block: &[u8]) -> [u8; 20] {
        self.fingerprinter.of(block).0
    }

    /// The end of every scenario: an honest client's backup commits and comes back bit for bit,
    /// the store is whole.
    pub async fn serves_others(&self, vm: u8) {
        let client = Client::connect(self).await;
        let image = image(vm, 600);
        let snapshot = client.backs_up(self, vm, &image).await;
        assert!(client.restored(vm, &snapshot).await == image, "the restored image differs");
        let verified = self.fleecectl(&["verify"]);
        assert!(verified.status.success(), "{verified:?}");
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs on a `LocalSet`, with a bound.
pub fn on_local<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async { tokio::time::timeout(4 * SOON, work).await.unwrap() })
}

/// Blocks that no other seed has; every seventh is zero.
pub fn image(seed: u8, blocks: usize) -> Vec<u8> {
    let mut bytes = vec![0; blocks * BLOCK];
    for (number, block) in bytes.chunks_mut(BLOCK).enumerate() {
        if number % 7 != 3 {
            block.fill(seed);
            block[..8].copy_from_slice(&(number as u64).to_le_bytes());
        }
    }
    bytes
}

/// Reads nothing any more once it is told so.
struct Gate<R> {
    inner: R,
    shut: Rc<Cell<bool>>,
}

impl<R: AsyncRead + Unpin> AsyncRead for Gate<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<std::io::Result<usize>> {
        if self.shut.get() {
            return Poll::Pending;
        }
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

/// Writes with one file after the other, as long as there are some.
struct Handing<W> {
    inner: W,
    socket: Std,
    files: Rc<RefCell<Vec<File>>>,
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Handing<W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let Some(file) = self.files.borrow_mut().pop() else {
            return Pin::new(&mut self.inner).poll_write(context, bytes);
        };
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&files));
        // A call for each byte, so that there are enough for all files; so little always fits.
        let byte = [IoSlice::new(&bytes[..1])];
        Poll::Ready(Ok(sendmsg(&self.socket, &byte, &mut control, SendFlags::empty())?))
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_close(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(context)
    }
}

/// A connection; it ends when the client is dropped.
pub struct Client {
    pub engine: engine::Client,
    /// What it hands over next, the last one first.
    pub files: Rc<RefCell<Vec<File>>>,
    /// Set it, and the client reads nothing more.
    pub deaf: Rc<Cell<bool>>,
    system: tokio::task::JoinHandle<Result<(), capnp::Error>>,
}

impl Client {
    pub async fn connect(engine: &Engine) -> Self {
        let stream = UnixStream::connect(engine.socket()).await.unwrap();
        let socket = Std::from(stream.as_fd().try_clone_to_owned().unwrap());
        let (read, write) = stream.into_split();
        let files = Rc::<RefCell<Vec<File>>>::default();
        let deaf = Rc::<Cell<bool>>::default();
        let network = twoparty::VatNetwork::new(
            Gate { inner: read.compat(), shut: Rc::clone(&deaf) },
            Handing { inner: write.compat_write(), socket, files: Rc::clone(&files) },
            rpc_twoparty_capnp::Side::Client,
            capnp::message::ReaderOptions::new(),
        );
        let mut system = RpcSystem::new(Box::new(network), None);
        let engine: engine::Client = system.bootstrap(rpc_twoparty_capnp::Side::Server);
        let system = tokio::task::spawn_local(system);
        Client { engine, files, deaf, system }
    }

    pub async fn open(
        &self,
        vm: u8,
        blocks: u64,
    ) -> Result<(String, backup_session::Client), capnp::Error> {
        let mut request = self.engine.open_backup_request();
        let mut params = request.get().init_request();
        params.set_vm(&[vm; 16]);
        params.set_vm_name(format!("vm{vm}"));
        params.set_hypervisor("none");
        let mut disk = params.init_disks(1).get(0);
        disk.set_uuid(&[vm; 16]);
        disk.set_name("vda");
        disk.set_size(blocks * BLOCK as u64);
        let answer = request.send().promise.await?;
        let answer = answer.get()?;
        let snapshot = answer.get_plan()?.get_snapshot()?.to_str()?.to_owned();
        Ok((snapshot, answer.get_session()?))
    }

    /// A backup as it should be; gives the snapshot.
    pub async fn backs_up(&self, engine: &Engine, vm: u8, image: &[u8]) -> String {
        let blocks = (image.len() / BLOCK) as u64;
        let (snapshot, session) = self.open(vm, blocks).await.unwrap();
        scan(engine, &session, image).await.unwrap();
        session.end_scan_request().send().promise.await.unwrap();
        loop {
            let answer = session.grants_request().send().promise.await.unwrap();
            let answer = answer.get().unwrap();
            for grant in answer.get_extents().unwrap() {
                let first = grant.get_first_block();
                for block in first..first + u64::from(grant.get_blocks()) {
                    write(&session, block, &image[block as usize * BLOCK..][..BLOCK])
                        .await
                        .unwrap();
                }
            }
            if answer.get_done() {
                break;
            }
        }
        let mut commit = session.commit_request();
        commit.get().set_point_in_time_ms(1);
        commit.send().promise.await.unwrap();
        snapshot
    }

    pub async fn disk(&self, vm: u8, snapshot: &str) -> disk_image::Client {
        let mut request = self.engine.open_disk_request();
        request.get().set_vm(format!("vm{vm}"));
        request.get().set_snapshot(snapshot);
        let answer = request.send().promise.await.unwrap();
        answer.get().unwrap().get_image().unwrap()
    }

    /// The whole disk of a snapshot.
    pub async fn restored(&self, vm: u8, snapshot: &str) -> Vec<u8> {
        self.streamed(vm, snapshot, 0).await.unwrap()
    }

    /// What is sent of a disk where that file is named as the one to write to.
    pub async fn streamed(
        &self,
        vm: u8,
        snapshot: &str,
        file: u32,
    ) -> Result<Vec<u8>, capnp::Error> {
        let disk = self.disk(vm, snapshot).await;
        let target = Rc::new(RefCell::new(vec![0; 600 * BLOCK]));
        let mut stream = disk.stream_request();
        stream.get().set_sink(capnp_rpc::new_client(Sink(Rc::clone(&target))));
        stream.get().set_file(file);
        stream.send().promise.await?;
        Ok(target.take())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.system.abort();
    }
}

struct Sink(Rc<RefCell<Vec<u8>>>);

impl block_sink::Server for Sink {
    async fn write(self: Rc<Self>, params: block_sink::WriteParams) -> Result<(), capnp::Error> {
        let params = params.get()?;
        let mut data = params.get_data()?;
        for run in params.get_runs()? {
            let (bytes, rest) = data.split_at(run.get_length() as usize);
            self.0.borrow_mut()[run.get_offset() as usize..][..bytes.len()].copy_from_slice(bytes);
            data = rest;
        }
        assert!(data.is_empty(), "bytes without a place");
        Ok(())
    }

    async fn wrote(self: Rc<Self>, _: block_sink::WroteParams) -> Result<(), capnp::Error> {
        Ok(())
    }
}

/// Sends one batch of extents (first block, blocks, zero) and fingerprints.
pub async fn submit(
    session: &backup_session::Client,
    disk: u16,
    extents: &[(u64, u32, bool)],
    fingerprints: &[u8],
) -> Result<(), capnp::Error> {
    let mut request = session.submit_request();
    let mut params = request.get();
    params.set_disk(disk);
    params.set_fingerprints(fingerprints);
    let mut list = params.init_extents(extents.len() as u32);
    for (i, (first, blocks, zero)) in extents.iter().enumerate() {
        let mut extent = list.reborrow().get(i as u32);
        extent.set_first_block(*first);
        extent.set_blocks(*blocks);
        extent.set_zero(*zero);
    }
    request.send().await?;
    // A streaming call's error comes with the next call that is none.
    session.progress_request().send().promise.await.map(drop)
}

/// Scans a whole image.
pub async fn scan(
    engine: &Engine,
    session: &backup_session::Client,
    image: &[u8],
) -> Result<(), capnp::Error> {
    let mut extents = Vec::new();
    let mut fingerprints = Vec::new();
    for (number, block) in image.chunks(BLOCK).enumerate() {
        let zero = block.iter().all(|byte| *byte == 0);
        extents.push((number as u64, 1, zero));
        if !zero {
            fingerprints.extend(engine.fingerprint(block));
        }
    }
    submit(session, 0, &extents, &fingerprints).await
}

pub async fn write(
    session: &backup_session::Client,
    block: u64,
    data: &[u8],
) -> Result<(), capnp::Error> {
    let mut request = session.write_request();
    request.get().set_data(data);
    let mut run = request.get().init_runs(1).get(0);
    run.set_first_block(block);
    run.set_blocks(data.len().div_ceil(BLOCK) as u32);
    request.send().await
}
