//! Who another engine is: certificates of the cluster's own CA, on both sides, but for those that it
//! took back.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::config::ClusterConfig;
use crate::error::{Error, Kind, Result};
use crate::pem::Pem;

/// Where a host finds who it is, and who is none of the cluster any more.
#[derive(Clone)]
pub(super) struct Files {
    bundle: PathBuf,
    revoked: PathBuf,
    /// Whether there must be a list of revoked certificates.
    needed: bool,
}

/// Distinguishes a file from what it was before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct State {
    written: (i64, i64),
    inode: u64,
    length: u64,
}

impl Files {
    pub(super) fn of(settings: &ClusterConfig) -> Self {
        let (revoked, needed) = settings.revocations();
        Files { bundle: settings.identity.clone(), revoked, needed }
    }

    /// What the list of revoked certificates is like; `None` where there is none, and none is needed.
    fn state(&self) -> Result<Option<State>> {
        match std::fs::metadata(&self.revoked) {
            Ok(file) => Ok(Some(State {
                written: (file.mtime(), file.mtime_nsec()),
                inode: file.ino(),
                length: file.len(),
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.needed => Ok(None),
            Err(error) => Err(self.bad_list(error)),
        }
    }

    fn bad_list(&self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        let what = format!(
            "the list of revoked certificates {} cannot be used (fleecectl cluster revoke makes it)",
            self.revoked.display()
        );
        Error::caused(Kind::Key, what, cause)
    }

    fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>> {
        let text = std::fs::read(&self.revoked).map_err(|error| self.bad_list(error))?;
        let lists = CertificateRevocationListDer::pem_slice_iter(&text);
        let lists: Vec<_> = lists
            .collect::<std::result::Result<_, _>>()
            .map_err(|error| self.bad_list(error.to_string()))?;
        // A file that is still being written must not let anybody in again.
        if lists.is_empty() { Err(self.bad_list("it is empty")) } else { Ok(lists) }
    }
}

/// What this host proves itself with, and how it knows others.
pub(super) struct Identity {
    pub(super) acceptor: TlsAcceptor,
    pub(super) connector: TlsConnector,
    /// Whether it is this host's certificate that was taken back.
    pub(super) is_revoked: bool,
    /// The list of revoked certificates that it goes by.
    pub(super) list: Option<State>,
}

/// What a bundle holds: this host's certificate first, the CA's after it, and the key.
struct Bundle {
    own: CertificateDer<'static>,
    authority: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Bundle {
    fn read(path: &Path) -> Result<Self> {
        let file = Pem::read_secret(path)?;
        let mut certificates = file.certificates()?;
        let own = certificates.remove(0);
        Ok(Bundle { own, authority: certificates, key: file.key()? })
    }
}

impl Identity {
    /// Reads it, and what the CA took back.
    ///
    /// # Errors
    /// [`Kind::Key`] when something of it is missing or wrong.
    pub(super) fn load(files: &Files) -> Result<Self> {
        let wrong =
            |what: String| Error::new(Kind::Key, format!("{}: {what}", files.bundle.display()));
        // Before the list: one that is replaced meanwhile is read again.
        let list = files.state()?;
        let revoked = if list.is_some() { files.revoked()? } else { Vec::new() };
        let Bundle { own, authority, key } = Bundle::read(&files.bundle)?;
        let mut roots = RootCertStore::empty();
        for certificate in authority {
            roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .with_crls(revoked.iter().cloned())
                .build()
                .map_err(|error| wrong(error.to_string()))?;
        let servers = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .with_crls(revoked)
            .build()
            .map_err(|error| wrong(error.to_string()))?;
        let is_revoked = list.is_some() && is_taken_back(files, &*clients, &own)?;
        let failed = |error: rustls::Error| wrong(error.to_string());
        // No session is resumed: it would show no certificate again, and what is kept for that grows with
        // the hosts.
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![own.clone()], key.clone_key())
            .map_err(failed)?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_webpki_verifier(servers)
            .with_client_auth_cert(vec![own], key)
            .map_err(failed)?;
        (server.session_storage, server.send_tls13_tickets) =
            (Arc::new(NoServerSessionStorage {}), 0);
        client.resumption = Resumption::disabled();
        let (acceptor, connector) =
            (TlsAcceptor::from(Arc::new(server)), TlsConnector::from(Arc::new(client)));
        Ok(Identity { acceptor, connector, is_revoked, list })
    }

    /// Reads it again if the list of revoked certificates is not the one that was `before`.
    ///
    /// # Errors
    /// As [`Identity::load`]; when the list is gone.
    pub(super) fn renewed(files: &Files, before: Option<State>) -> Result<Option<Self>> {
        let now = files.state()?;
        if now == before {
            return Ok(None);
        }
        // Nobody is let in again by a file that is lost.
        if now.is_none() { Err(files.bad_list("it is gone")) } else { Self::load(files).map(Some) }
    }
}

/// Whether a list takes our own certificate back. One that is not signed by our CA says nothing of
/// anybody, and would have every link refused.
fn is_taken_back(
    files: &Files,
    verifier: &dyn ClientCertVerifier,
    own: &CertificateDer<'_>,
) -> Result<bool> {
    match verifier.verify_client_cert(own, &[], UnixTime::now()) {
        Ok(_) => Ok(false),
        Err(rustls::Error::InvalidCertificate(CertificateError::Revoked)) => Ok(true),
        Err(error) => Err(files.bad_list(error)),
    }
}

/// Whether a handshake failed because the other side's certificate was taken back.
pub(super) fn is_of_revoked(error: &io::Error) -> bool {
    let of_tls = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    of_tls == Some(&rustls::Error::InvalidCertificate(CertificateError::Revoked))
}

/// Whether the certificate that a client showed is that host's.
pub(super) fn proves(shown: Option<&[CertificateDer<'_>]>, host: &str) -> bool {
    let Some(certificate) = shown.and_then(<[CertificateDer<'_>]>::first) else { return false };
    let (Ok(certificate), Ok(name)) =
        (ParsedCertificate::try_from(certificate), ServerName::try_from(host))
    else {
        return false;
    };
    verify_server_name(&certificate, &name).is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rcgen::{
        CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair,
        KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
    };

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A CA. All have one name.
    struct Authority {
        pem: String,
        issuer: Issuer<'static, KeyPair>,
    }

    impl Authority {
        fn new() -> Self {
            let mut params = CertificateParams::new([]).unwrap();
            params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let key = KeyPair::generate().unwrap();
            let pem = params.self_signed(&key).unwrap().pem();
            Authority { pem, issuer: Issuer::new(params, key) }
        }

        /// The files of a host with that number, in a folder of its own.
        fn host(&self, dir: &Path, number: u8) -> Files {
            let mut params = CertificateParams::new([format!("hv{number}")]).unwrap();
            params.serial_number = Some(SerialNumber::from_slice(&[0x40, number]));
            let key = KeyPair::generate().unwrap();
            let own = params.signed_by(&key, &self.issuer).unwrap().pem();
            let folder = dir.join(format!("hv{number}"));
            std::fs::create_dir_all(&folder).unwrap();
            let bundle = folder.join("identity.pem");
            std::fs::write(&bundle, [own, self.pem.clone(), key.serialize_pem()].concat()).unwrap();
            // Not while others may read it.
            let open = Bundle::read(&bundle).err().map(|error| error.to_string());
            assert!(open.is_some_and(|error| error.contains("chmod 0400")));
            std::fs::set_permissions(&bundle, PermissionsExt::from_mode(0o400)).unwrap();
            Files { bundle, revoked: folder.join("crl.pem"), needed: false }
        }

        fn revoke(&self, numbers: &[u8]) -> String {
            let revoked = |number: &u8| RevokedCertParams {
                serial_number: SerialNumber::from_slice(&[0x40, *number]),
                revocation_time: date_time_ymd(2026, 11, 28),
                reason_code: None,
                invalidity_date: None,
            };
            let list = CertificateRevocationListParams {
                this_update: date_time_ymd(2026, 11, 28),
                next_update: date_time_ymd(4096, 1, 1),
                crl_number: SerialNumber::from(1_795_000_000_000_u64),
                issuing_distribution_point: None,
                revoked_certs: numbers.iter().map(revoked).collect(),
                key_identifier_method: KeyIdMethod::Sha256,
            };
            list.signed_by(&self.issuer).unwrap().pem().unwrap()
        }
    }

    /// Whether a client and a server that calls itself `name` come to talk, and whose revoked
    /// certificate is in the way if not.
    async fn talk(
        client: &Identity,
        server: &Identity,
        name: &str,
    ) -> std::result::Result<(), &'static str> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (here, there) = tokio::io::duplex(64 << 10);
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let (connected, accepted) =
            tokio::join!(client.connector.connect(name, here), server.acceptor.accept(there));
        if connected.as_ref().is_err_and(is_of_revoked) {
            return Err("the server's");
        }
        if accepted.as_ref().is_err_and(is_of_revoked) {
            return Err("the client's");
        }
        let (mut connected, mut accepted) = (connected.unwrap(), accepted.unwrap());
        connected.write_all(b"hello").await.unwrap();
        connected.flush().await.unwrap();
        let mut heard = [0; 5];
        accepted.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello");
        Ok(())
    }

    #[tokio::test]
    async fn who_was_revoked_is_refused_both_ways_and_nobody_else() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Authority::new());
        let files: Vec<Files> = (0..3).map(|n| ca.host(dir.path(), n)).collect();
        let load = |n: usize| Identity::load(&files[n]).unwrap();
        let before: Vec<Identity> = (0..3).map(load).collect();
        assert!(before.iter().all(|one| one.list.is_none() && !one.is_revoked));
        assert_eq!(talk(&before[0], &before[2], "hv2").await, Ok(()));
        assert_eq!(talk(&before[2], &before[0], "hv0").await, Ok(()));

        std::fs::write(&files[0].revoked, ca.revoke(&[7, 2])).unwrap();
        let first = Identity::renewed(&files[0], before[0].list).unwrap().unwrap();
        assert!(!first.is_revoked);
        assert_eq!(talk(&first, &before[2], "hv2").await, Err("the server's"));
        assert_eq!(talk(&before[2], &first, "hv0").await, Err("the client's"));
        assert_eq!(talk(&first, &before[1], "hv1").await, Ok(()));
        assert_eq!(talk(&before[1], &first, "hv0").await, Ok(()));
        // It knows that of itself, once it has the list.
        std::fs::write(&files[2].revoked, ca.revoke(&[7, 2])).unwrap();
        assert!(load(2).is_revoked);
    }

    #[test]
    fn a_list_counts_only_if_it_is_whole_and_of_this_ca() {
        let (dir, ca) = (tempfile::tempdir().unwrap(), Authority::new());
        let files = ca.host(dir.path(), 1);
        let list = ca.revoke(&[2]);
        std::fs::write(&files.revoked, &list).unwrap();
        let loaded = Identity::load(&files).unwrap();
        assert!(Identity::renewed(&files, loaded.list).unwrap().is_none());
        // The same again, by another file, is read again.
        let next = files.revoked.with_extension("next");
        std::fs::write(&next, &list).unwrap();
        std::fs::rename(&next, &files.revoked).unwrap();
        assert!(Identity::renewed(&files, loaded.list).unwrap().is_some());
        let others = [Authority::new().revoke(&[2]), list[..list.len() / 2].into(), String::new()];
        for other in others {
            std::fs::write(&files.revoked, &other).unwrap();
            for outcome in
                [Identity::renewed(&files, loaded.list).map(drop), Identity::load(&files).map(drop)]
            {
                let error = outcome.unwrap_err();
                assert_eq!(error.kind(), Kind::Key, "{error}");
                assert!(error.to_string().contains("crl.pem"), "{error}");
            }
        }
        std::fs::remove_file(&files.revoked).unwrap();
        assert!(Identity::renewed(&files, loaded.list).is_err(), "nobody is let in by a lost file");
        assert!(Identity::load(&files).unwrap().list.is_none());
        let needed = Files { needed: true, ..files };
        assert_eq!(Identity::load(&needed).map(drop).unwrap_err().kind(), Kind::Key);
    }
}
