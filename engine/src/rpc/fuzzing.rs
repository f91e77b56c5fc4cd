//! Clients that send any bytes, for the fuzzer: a whole engine, and one connection per input.

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod seeds;

use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::Semaphore;

use super::server::{Services, converse};
use crate::config::Config;
use crate::error::{Context as _, Result};
use crate::start::{Started, start};

/// The engine says nothing for so long: it has done what it was asked, or waits for more.
const SILENCE: Duration = Duration::from_millis(4);
/// A connection that closed, and what it opened, ends within this.
const END: Duration = Duration::from_secs(5);
/// Inputs after which store and engine are made anew: their sessions and readers add up.
const INPUTS: u32 = 3000;

/// An engine on a copy of a committed store: its key is the same in every run, so that recorded
/// calls fit.
pub(crate) struct Rig {
    pub(crate) started: Option<Started>,
    inputs: u32,
    dir: tempfile::TempDir,
}

impl Rig {
    pub(crate) fn new() -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let dir = match memory.is_dir() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        let dir = dir.context(|| "a place for the engine".into())?;
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/store-v1");
        let (store, key) = (dir.path().join("store"), dir.path().join("key"));
        copy(&fixture.join("store"), &store).context(|| fixture.display().to_string())?;
        std::fs::copy(fixture.join("key"), &key)
            .and_then(|_| std::fs::set_permissions(&key, private()))
            .context(|| fixture.display().to_string())?;
        let config = Config {
            state_dir: dir.path().join("state"),
            ..Config::new(store.display().to_string(), key)
        };
        let started = Some(start(&config)?);
        Ok(Rig { started, inputs: 0, dir })
    }

    pub(crate) fn services(&self) -> Option<Services> {
        let context = self.started.as_ref()?.context.clone();
        let budget = context.budget;
        Some(Services {
            peers: None,
            membership: None,
            context,
            readers: Arc::new(Semaphore::new(budget.sessions)),
            messages: Arc::new(Semaphore::new(2048)),
            restores: Arc::new(Semaphore::new(2)),
            allowed_uids: Vec::new(),
            key_file: self.dir.path().join("key"),
            store_name: "fuzz".into(),
        })
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(started) = self.started.take() {
            started.stop();
        }
    }
}

fn private() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o400)
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy(&from, &to)?;
        } else {
            std::fs::copy(&from, &to)?;
        }
    }
    Ok(())
}

/// A client's bytes, from its connection to its end. The first byte says whether its user is
/// permitted.
pub fn calls(data: &[u8]) {
    static RIG: OnceLock<Mutex<Option<Rig>>> = OnceLock::new();
    let Some((permitted, bytes)) = data.split_first() else { return };
    let mut rig = RIG.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if rig.as_ref().is_none_or(|rig| rig.inputs >= INPUTS) {
        *rig = None;
        match Rig::new() {
            Ok(new) => *rig = Some(new),
            Err(error) => panic!("there is no engine to try: {error}"),
        }
    }
    let Some(rig) = rig.as_mut() else { return };
    rig.inputs += 1;
    let Some(services) = rig.services() else { return };
    let context = services.context.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return };
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (client, server) = tokio::io::duplex(64 << 10);
        let connection = tokio::task::spawn_local(converse(
            Rc::new(services),
            Rc::default(),
            (*permitted != 0, 1000),
            tokio::io::split(server),
        ));
        send(client, bytes).await;
        let ended = tokio::time::timeout(END, connection).await;
        assert!(
            ended.is_ok_and(|joined| joined.is_ok()),
            "the connection did not end with its client"
        );
    });
    drop(runtime);
    let deadline = Instant::now() + END;
    while !context.registry.list().is_empty() {
        assert!(Instant::now() < deadline, "a session outlives its client");
        std::thread::park_timeout(Duration::from_micros(100));
    }
}

/// Sends all, takes whatever comes back until nothing does, and hangs up.
async fn send(client: DuplexStream, bytes: &[u8]) {
    let (mut answers, mut calls) = tokio::io::split(client);
    let all = async {
        // A connection that was ended takes no more.
        let _ = calls.write_all(bytes).await;
        let _ = calls.flush().await;
    };
    let listen = async {
        let mut buffer = vec![0; 16 << 10];
        let mut last = Instant::now();
        while last.elapsed() < SILENCE {
            match tokio::time::timeout(SILENCE, answers.read(&mut buffer)).await {
                Ok(Ok(0) | Err(_)) => return,
                Ok(Ok(_)) => last = Instant::now(),
                Err(_) => {}
            }
        }
    };
    tokio::join!(all, listen);
}
