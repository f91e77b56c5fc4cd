//! A real etcd of one member.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::Result;
use crate::process::Running;
use crate::wait::{SOON, wait_until};

/// An etcd that can go and come back.
pub struct Etcd {
    folder: PathBuf,
    client: String,
    peer: String,
    server: Option<Running>,
}

impl Etcd {
    /// Starts one that listens at `ip`; its data are in `folder`.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(folder: &Path, ip: &str) -> Result<Self> {
        // Held together, so that they differ.
        let ports = [TcpListener::bind((ip, 0))?, TcpListener::bind(("127.0.0.1", 0))?];
        let [client, peer] = ports.each_ref().map(|port| port.local_addr());
        let (client, peer) = (format!("http://{}", client?), format!("http://{}", peer?));
        drop(ports);
        let mut etcd = Etcd { folder: folder.into(), client, peer, server: None };
        etcd.start_again()?;
        Ok(etcd)
    }

    /// Starts it after a kill, with what it had.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_again(&mut self) -> Result {
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(&self.folder).args(["--logger", "zap"]);
        command.args(["--listen-client-urls", &self.client]);
        command.args(["--advertise-client-urls", &self.client]);
        command.args(["--listen-peer-urls", &self.peer]);
        command.args(["--initial-advertise-peer-urls", &self.peer]);
        command.arg(format!("--initial-cluster=default={}", self.peer));
        let mut server = Running::start("etcd", &mut command)?;
        let address = self.client.trim_start_matches("http://").to_owned();
        wait_until(SOON, "etcd", || {
            ensure!(server.ended()?.is_none(), "it ended: {}", server.printed());
            Ok(std::net::TcpStream::connect(&address).is_ok())
        })?;
        self.server = Some(server);
        Ok(())
    }

    /// SIGKILLs it.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> Result {
        self.server.take().context("no etcd runs")?.kill()
    }

    /// Where clients find it.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.client
    }
}
