//! What a well-behaved client sends, recorded.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use capnp_rpc::{RpcSystem, rpc_twoparty_capnp::Side, twoparty::VatNetwork};
use fleece_schema::engine_capnp::{self as wire, backup_session, block_sink, engine, event_sink};
use tokio::io::{AsyncWrite, WriteHalf};
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};

use super::Rig;
use crate::fingerprint::Fingerprinter;
use crate::rpc::server::converse;

const BLOCK: usize = 4096;

type Bytes = Rc<RefCell<Vec<u8>>>;
type Done = Result<(), capnp::Error>;

/// The writing half of a connection, with a copy of all that went through.
struct Recorded(WriteHalf<tokio::io::DuplexStream>, Bytes);

impl AsyncWrite for Recorded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.0).poll_write(cx, bytes);
        if let Poll::Ready(Ok(n)) = written {
            self.1.borrow_mut().extend(&bytes[..n]);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Takes what is sent to a client.
struct Sink;

impl block_sink::Server for Sink {
    async fn write(self: Rc<Self>, _: block_sink::WriteParams) -> Done {
        Ok(())
    }
}

impl event_sink::Server for Sink {
    async fn event(self: Rc<Self>, _: event_sink::EventParams) -> Done {
        Ok(())
    }
}

/// Named recordings, each the input of `calls`.
pub(crate) fn recordings() -> Vec<(&'static str, Vec<u8>)> {
    let rig = Rig::new().unwrap();
    let fingerprinter = rig.services().unwrap().context.store.fingerprinter().clone();
    vec![
        ("hello", record(&rig, hello)),
        ("looking", record(&rig, looking)),
        ("backup", record(&rig, |engine| backup(engine, fingerprinter.clone(), true))),
        ("abort", record(&rig, |engine| backup(engine, fingerprinter.clone(), false))),
        ("resume", record(&rig, resume)),
        ("restore", record(&rig, restore)),
        ("jobs", record(&rig, jobs)),
    ]
}

fn record<F: Future<Output = Done> + 'static>(
    rig: &Rig,
    talk: impl FnOnce(engine::Client) -> F,
) -> Vec<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bytes = Bytes::default();
    let services = Rc::new(rig.services().unwrap());
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (client, server) = tokio::io::duplex(1 << 20);
        tokio::task::spawn_local(converse(
            services,
            Rc::default(),
            (true, 0),
            tokio::io::split(server),
        ));
        let (read, write) = tokio::io::split(client);
        let write = Recorded(write, Rc::clone(&bytes));
        let network = VatNetwork::new(
            futures::io::BufReader::new(read.compat()),
            futures::io::BufWriter::new(write.compat_write()),
            Side::Client,
            Default::default(),
        );
        let mut system = RpcSystem::new(Box::new(network), None);
        let engine = system.bootstrap(Side::Server);
        tokio::task::spawn_local(system);
        talk(engine).await.unwrap();
    });
    let recorded = bytes.borrow();
    [&[1][..], &recorded].concat()
}

async fn hello(engine: engine::Client) -> Done {
    let mut hello = engine.hello_request();
    hello.get().set_program("fleece");
    hello.get().set_version("0");
    hello.get().set_protocol(wire::PROTOCOL_VERSION);
    hello.send().promise.await.map(drop)
}

async fn looking(engine: engine::Client) -> Done {
    engine.status_request().send().promise.await?;
    engine.sessions_request().send().promise.await?;
    engine.snapshots_request().send().promise.await?;
    let mut settle = engine.settle_request();
    settle.get().set_vm(&[9; 16]);
    let mut names = settle.get().init_snapshots(2);
    names.set(0, "abc234");
    names.set(1, "none");
    settle.send().promise.await?;
    Ok(())
}

async fn backup(engine: engine::Client, of: Fingerprinter, commit: bool) -> Done {
    let mut open = engine.open_backup_request();
    let mut request = open.get().init_request();
    request.set_vm(&[5; 16]);
    request.set_vm_name("web1");
    request.set_hypervisor("none");
    request.set_config(b"<domain/>");
    let mut disk = request.init_disks(1).get(0);
    disk.set_uuid(&[6; 16]);
    disk.set_name("vda");
    disk.set_size(4 * BLOCK as u64);
    let answer = open.send().promise.await?;
    let session = answer.get()?.get_session()?;
    let blocks: Vec<Vec<u8>> = (1..4).map(|n| vec![n; BLOCK]).collect();
    let mut submit = session.submit_request();
    let fingerprints: Vec<u8> = blocks.iter().flat_map(|block| of.of(block).0).collect();
    submit.get().set_fingerprints(&fingerprints);
    let mut extents = submit.get().init_extents(2);
    extents.reborrow().get(0).set_blocks(3);
    let mut zero = extents.get(1);
    zero.set_first_block(3);
    zero.set_blocks(1);
    zero.set_zero(true);
    submit.send().await?;
    session.end_scan_request().send().promise.await?;
    if !commit {
        session.progress_request().send().promise.await?;
        let mut abort = session.abort_request();
        abort.get().set_reason("enough");
        return abort.send().promise.await.map(drop);
    }
    write_all(&session, &blocks).await?;
    let mut commit = session.commit_request();
    commit.get().set_point_in_time_ms(1);
    commit.get().init_bitmaps(1).set(0, "fleece:x");
    commit.send().promise.await.map(drop)
}

async fn resume(engine: engine::Client) -> Done {
    let mut resume = engine.resume_backup_request();
    resume.get().set_snapshot("abc234");
    let mut request = resume.get().init_request();
    request.set_vm(&[5; 16]);
    request.set_vm_name("web1");
    let mut disk = request.init_disks(1).get(0);
    disk.set_name("vda");
    disk.set_size(BLOCK as u64);
    // No such session began.
    let refused = resume.send().promise.await.is_err();
    assert!(refused);
    Ok(())
}

async fn write_all(session: &backup_session::Client, blocks: &[Vec<u8>]) -> Done {
    loop {
        let answer = session.grants_request().send().promise.await?;
        let grants = answer.get()?;
        let extents = grants.get_extents()?;
        let mut data = Vec::new();
        for grant in extents {
            let first = grant.get_first_block();
            data.extend(blocks[first as usize..][..grant.get_blocks() as usize].concat());
        }
        if !data.is_empty() {
            let mut write = session.write_request();
            write.get().set_runs(extents)?;
            write.get().set_data(&data);
            write.send().await?;
        }
        if grants.get_done() {
            return Ok(());
        }
    }
}

async fn restore(engine: engine::Client) -> Done {
    let mut open = engine.open_disk_request();
    open.get().set_vm("web1");
    open.get().set_snapshot("latest");
    let answer = open.send().promise.await?;
    let image = answer.get()?.get_image()?;
    let mut read = image.read_request();
    read.get().set_length(5000);
    read.send().promise.await?;
    let mut extents = image.extents_request();
    extents.get().set_length(4 * BLOCK as u64);
    extents.send().promise.await?;
    let mut stream = image.stream_request();
    stream.get().set_sink(capnp_rpc::new_client(Sink));
    stream.send().promise.await?;
    let mut config = engine.vm_config_request();
    config.get().set_vm("web1");
    config.send().promise.await.map(drop)
}

async fn jobs(engine: engine::Client) -> Done {
    let mut verify = engine.verify_request();
    verify.get().set_events(capnp_rpc::new_client(Sink));
    verify.send().promise.await?;
    let mut rebuild = engine.rebuild_index_request();
    rebuild.get().set_events(capnp_rpc::new_client(Sink));
    rebuild.send().promise.await.map(drop)
}
