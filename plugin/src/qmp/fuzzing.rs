//! Monitors and guest agents that say anything, for the fuzzer.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::agent::Agent;
use super::session::Session;
use super::{bitmap, disk};
use crate::vms::Vm;

/// A peer that has hung up is noticed at once, long before this.
const LIMIT: Duration = Duration::from_secs(5);
/// No command comes within this: the client does not understand what was said, and its own limit
/// on waiting for more is far longer.
const SILENCE: Duration = Duration::from_millis(50);
/// The number that begins a conversation with an agent.
const SYNC: i64 = 7;

/// The lines of a monitor, first its greeting: one is said for each command, events before it.
/// Bit 0 of the first byte: it is an agent instead, which says everything at once.
pub fn qmp(data: &[u8]) {
    let Some((what, data)) = data.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return };
    runtime.block_on(async {
        let Ok((ours, theirs)) = UnixStream::pair() else { return };
        let (read, write) = theirs.into_split();
        let ended = if what & 1 == 0 {
            let both = async { tokio::join!(look(ours), monitor(read, write, data)) };
            tokio::time::timeout(LIMIT, both).await.is_ok()
        } else {
            let both = async { tokio::join!(freeze(ours), guest(read, write, data)) };
            tokio::time::timeout(LIMIT, both).await.is_ok()
        };
        assert!(ended, "a peer that hung up is waited for");
    });
}

/// All that a backup asks before it changes anything.
async fn look(socket: UnixStream) {
    let vm = Vm::at_socket(std::path::Path::new("socket"), Some("web1"));
    let Ok(session) = Session::over(&vm, socket).await else { return };
    if let Ok(disks) = disk::list(&session).await {
        for disk in &disks.disks {
            let _ = disk.is_called("vda");
        }
        let _ = bitmap::named_snapshots(&disks.disks, "00000000-0000-0000-0000-000000000000");
    }
    let _ = super::agent::find(&session).await;
    let _ = session.configuration().await;
}

async fn monitor(read: OwnedReadHalf, mut write: OwnedWriteHalf, data: &[u8]) {
    let mut commands = BufReader::new(read).split(b'\n');
    let mut lines = data.split_inclusive(|byte| *byte == b'\n');
    loop {
        let mut said = false;
        for line in lines.by_ref() {
            // They may be gone: then the rest is for nobody.
            if write.write_all(line).await.is_err() {
                return;
            }
            said = true;
            if !line.windows(7).any(|word| word == b"\"event\"") {
                break;
            }
        }
        let asked = tokio::time::timeout(SILENCE, commands.next_segment()).await;
        if !said || !matches!(asked, Ok(Ok(Some(_)))) {
            return;
        }
    }
}

async fn freeze(socket: UnixStream) {
    let Ok(mut agent) = Agent::over(socket, SYNC).await else { return };
    let _ = agent.freeze().await;
    let _ = agent.status().await;
    let _ = agent.thaw().await;
}

async fn guest(mut read: OwnedReadHalf, mut write: OwnedWriteHalf, data: &[u8]) {
    let said = async {
        let _ = write.write_all(data).await;
        let _ = write.shutdown().await;
    };
    let mut buffer = [0; 4096];
    let heard = async { while read.read(&mut buffer).await.is_ok_and(|n| n > 0) {} };
    tokio::join!(said, heard);
}
