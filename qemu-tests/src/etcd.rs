//! A real etcd of one member.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::Result;
use crate::process::Running;
use crate::wait::{SOON, wait_until};

/// What etcd proves itself with, and whose clients it lets in.
pub struct Proofs {
    /// Its certificate and key.
    pub identity: PathBuf,
    /// The CA of its clients.
    pub clients: PathBuf,
    /// The clients that it does not let in, if any.
    pub revoked: Option<PathBuf>,
}

/// An etcd that can go and come back.
pub struct Etcd {
    folder: PathBuf,
    /// None: it trusts the network.
    pub proofs: Option<Proofs>,
    client: String,
    peer: String,
    server: Option<Running>,
}

impl Etcd {
    /// Starts one that listens at `ip`, with `proofs` by TLS; its data are in `folder`.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(folder: &Path, ip: &str, proofs: Option<Proofs>) -> Result<Self> {
        // Held together, so that they differ.
        let ports = [TcpListener::bind((ip, 0))?, TcpListener::bind(("127.0.0.1", 0))?];
        let [client, peer] = ports.each_ref().map(|port| port.local_addr());
        let scheme = if proofs.is_some() { "https" } else { "http" };
        let (client, peer) = (format!("{scheme}://{}", client?), format!("http://{}", peer?));
        drop(ports);
        let mut etcd = Etcd { folder: folder.into(), proofs, client, peer, server: None };
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
        if let Some(Proofs { identity, clients, revoked }) = &self.proofs {
            command.arg("--cert-file").arg(identity).arg("--key-file").arg(identity);
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(clients);
            command.args(revoked.iter().flat_map(|list| [Path::new("--client-crl-file"), list]));
        }
        let mut server = Running::start("etcd", &mut command)?;
        let (_, address) = self.client.split_once("://").context("an endpoint has a scheme")?;
        wait_until(SOON, "etcd", || {
            ensure!(server.ended()?.is_none(), "it ended: {}", server.printed());
            Ok(std::net::TcpStream::connect(address).is_ok())
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
