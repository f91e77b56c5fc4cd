//! How `qemu-nbd` reads an image: by io_uring, where blocks at random places come three times as
//! fast (measured), or by threads.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::sync::OnceCell;
use tokio::time::timeout;

/// The first QEMU that is trusted with io_uring, the oldest that we test with: those before 7.1 went
/// on at a wrong place after a read that was cut short (its commit c06fc7ce, "io_uring: fix short
/// read slow path").
const TRUSTED: (u32, u32) = (7, 2);
/// Limit on asking for the version.
const LIMIT: Duration = Duration::from_secs(5);

/// A way of reading.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Aio {
    IoUring,
    Threads,
}

impl Aio {
    /// The fastest that this host's `qemu-nbd` can be trusted with.
    pub(super) async fn best() -> Aio {
        static BEST: OnceCell<Aio> = OnceCell::const_new();
        let ask = async || {
            let mut command = Command::new("qemu-nbd");
            command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
            // Where it cannot be called, opening the image will say so.
            let answer = timeout(LIMIT, command.output()).await.ok().and_then(Result::ok);
            let said = answer.map(|answer| answer.stdout).unwrap_or_default();
            match version(&String::from_utf8_lossy(&said)) {
                Some(version) if version >= TRUSTED => Aio::IoUring,
                _ => Aio::Threads,
            }
        };
        *BEST.get_or_init(ask).await
    }

    /// QEMU's word for it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Aio::IoUring => "io_uring",
            Aio::Threads => "threads",
        }
    }
}

/// Of `qemu-nbd 7.2.22 (Debian 1:7.2+dfsg-7)`.
fn version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.split_whitespace().nth(1)?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(version("qemu-nbd 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright"), Some((7, 2)));
        assert_eq!(version("qemu-nbd 10.0.2"), Some((10, 0)));
        assert_eq!(version("qemu-nbd: odd"), None);
        assert_eq!(version(""), None);
    }
}
