//! What the NBD tests share: real servers and tools, ended by their pid, and known contents.
//!
//! A tool that is missing fails the test; nothing is skipped.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use fleece::nbd::{ConnectOptions, Export, NbdError, NbdTarget};

/// Longest that any single thing in these tests may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a test on a current-thread runtime within a `LocalSet`, as the plugin does.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        tokio::time::timeout(PATIENCE, test).await.expect("the test takes too long")
    })
}

/// A process that ends with the test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A scratch directory with a server socket in it.
pub struct Place {
    pub dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    pub fn target(&self, export: &str) -> NbdTarget {
        NbdTarget::unix(self.socket(), export)
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// Starts a server that listens on our socket; waits until it does.
    pub fn start(&self, program: &str, args: &[&str]) -> Running {
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{program} is needed for this test: {e}"));
        let mut running = Running(child);
        wait_for("the server listens", || {
            assert_eq!(running.0.try_wait().unwrap(), None, "{program} ended: {args:?}");
            std::os::unix::net::UnixStream::connect(self.socket()).is_ok()
        });
        running
    }

    /// nbdkit on our socket.
    pub fn nbdkit(&self, args: &[&str]) -> Running {
        let socket = self.socket();
        let mut all = vec!["-f", "--exit-with-parent", "-U", socket.to_str().unwrap()];
        all.extend(args);
        self.start("nbdkit", &all)
    }

    /// A persistent qemu-nbd on our socket, export `vda`.
    pub fn qemu_nbd(&self, args: &[&str]) -> Running {
        let socket = self.socket();
        let mut all = vec!["-t", "-x", "vda", "-k", socket.to_str().unwrap()];
        all.extend(args);
        self.start("qemu-nbd", &all)
    }
}

/// Waits for a condition, with a bound.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs a tool to its end (bounded by `timeout`); it must succeed.
pub fn tool(program: &str, args: &[&str]) -> Output {
    let out = tool_unchecked(program, args);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {} {said}", out.status);
    out
}

pub fn tool_unchecked(program: &str, args: &[&str]) -> Output {
    Command::new("timeout")
        .args(["60", program])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program} is needed for this test: {e}"))
}

/// The same for a tool that talks to a server in this very thread's runtime.
pub async fn tool_async(program: &'static str, args: Vec<String>) -> Output {
    let run = move || {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        tool_unchecked(program, &args)
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

pub fn stdout(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

pub async fn connect(target: &NbdTarget, contexts: &[&str]) -> Result<Export, NbdError> {
    Export::connect(target, &options(contexts)).await
}

pub fn options(contexts: &[&str]) -> ConnectOptions {
    let contexts = contexts.iter().map(|c| (*c).to_owned()).collect();
    ConnectOptions { contexts, ..ConnectOptions::default() }
}

/// Bytes that differ everywhere and repeat nowhere near: a seeded xorshift.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend(x.to_le_bytes());
    }
    out.truncate(length);
    out
}

/// Reads all of an export, several reads in flight.
pub async fn read_all(export: &Export) -> Result<Vec<u8>, NbdError> {
    use futures::stream::{StreamExt, TryStreamExt};
    const STEP: u64 = 256 * 1024;
    let size = export.size();
    let mut out = Vec::new();
    let mut reads = futures::stream::iter((0..size).step_by(STEP as usize))
        .map(|offset| export.read(offset, (size - offset).min(STEP) as u32))
        .buffered(32);
    while let Some(buffer) = reads.try_next().await? {
        out.extend_from_slice(&buffer);
    }
    Ok(out)
}

/// A sparse file with noise at some places: `(offset, length, seed)`.
pub fn sparse_file(path: &Path, size: u64, pieces: &[(u64, usize, u64)]) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut all = vec![0; size as usize];
    for (offset, length, seed) in pieces {
        let bytes = noise(*seed, *length);
        file.write_all_at(&bytes, *offset).unwrap();
        all[*offset as usize..*offset as usize + length].copy_from_slice(&bytes);
    }
    file.sync_all().unwrap();
    all
}
