//! A man in the middle of a monitor: passes QMP through until a command of interest, and falls
//! silent there, so that a test can kill the plugin between two exact steps.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::Context;

use crate::Result;

/// Where a command is held.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// It never reaches QEMU.
    Before,
    /// QEMU obeys it, but nobody hears the answer.
    After,
}

/// A monitor socket of the harness's that leads to QEMU's.
pub struct Proxy {
    path: PathBuf,
    reached: Receiver<()>,
}

struct Trigger {
    command: String,
    hold: Hold,
    /// The trigger works once: other connections pass freely.
    armed: AtomicBool,
    reached: SyncSender<()>,
}

impl Proxy {
    /// Listens on `path` and passes on to `upstream`. The first command with `command` in its
    /// line is held, and its connection is silent from there on.
    ///
    /// # Errors
    /// The system's.
    pub fn start(path: &Path, upstream: &Path, command: &str, hold: Hold) -> Result<Self> {
        let _ = fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        let (sender, reached) = sync_channel(1);
        let trigger = Arc::new(Trigger {
            command: command.into(),
            hold,
            armed: AtomicBool::new(true),
            reached: sender,
        });
        let upstream = upstream.to_path_buf();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (upstream, trigger) = (upstream.clone(), trigger.clone());
                thread::spawn(move || serve(&client, &upstream, &trigger));
            }
        });
        Ok(Proxy { path: path.into(), reached })
    }

    /// The socket that the plugin is given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the command was held.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn wait_held(&self, limit: Duration) -> Result {
        self.reached.recv_timeout(limit).context("the command to hold never came")
    }
}

/// One connection. When either end closes, so does the other.
fn serve(client: &UnixStream, upstream: &Path, trigger: &Arc<Trigger>) {
    let Ok(qemu) = UnixStream::connect(upstream) else { return };
    let silent = Arc::new(AtomicBool::new(false));
    let (Ok(answers), Ok(listener)) = (qemu.try_clone(), client.try_clone()) else { return };
    let back = {
        let (silent, trigger) = (silent.clone(), trigger.clone());
        thread::spawn(move || pass_answers(&answers, &listener, &silent, &trigger))
    };
    pass_commands(client, &qemu, &silent, trigger);
    let _ = qemu.shutdown(Shutdown::Both);
    let _ = back.join();
}

fn pass_commands(
    client: &UnixStream,
    mut qemu: &UnixStream,
    silent: &AtomicBool,
    trigger: &Trigger,
) {
    for line in BufReader::new(client).lines() {
        let Ok(mut line) = line else { return };
        if silent.load(Ordering::SeqCst) {
            continue;
        }
        if line.contains(&trigger.command) && trigger.armed.swap(false, Ordering::SeqCst) {
            silent.store(true, Ordering::SeqCst);
            if trigger.hold == Hold::Before {
                let _ = trigger.reached.send(());
                continue;
            }
        }
        line.push('\n');
        if qemu.write_all(line.as_bytes()).is_err() {
            return;
        }
    }
}

fn pass_answers(
    qemu: &UnixStream,
    mut client: &UnixStream,
    silent: &AtomicBool,
    trigger: &Trigger,
) {
    for line in BufReader::new(qemu).lines() {
        let Ok(mut line) = line else { break };
        if silent.load(Ordering::SeqCst) {
            if line.contains("\"return\"") && trigger.hold == Hold::After {
                let _ = trigger.reached.try_send(());
            }
            continue;
        }
        line.push('\n');
        if client.write_all(line.as_bytes()).is_err() {
            break;
        }
    }
    let _ = client.shutdown(Shutdown::Both);
}
