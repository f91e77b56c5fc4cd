//! Who another engine is: certificates of the cluster's own CA, on both sides.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::error::{Context as _, Error, Kind, Result};

/// What this host proves itself with, and how it knows others.
pub(super) struct Identity {
    pub(super) acceptor: TlsAcceptor,
    pub(super) connector: TlsConnector,
}

impl Identity {
    /// Reads a bundle: this host's certificate first, the CA's after it, and the key.
    ///
    /// # Errors
    /// [`Kind::Key`] when something of it is missing or wrong, or others may read it.
    pub(super) fn load(bundle: &Path) -> Result<Self> {
        let wrong = |what: String| Error::new(Kind::Key, format!("{}: {what}", bundle.display()));
        let mode = std::fs::metadata(bundle)
            .context(|| format!("cannot read {}", bundle.display()))?
            .permissions()
            .mode();
        if mode & 0o077 != 0 {
            return Err(wrong(format!(
                "it can be read by others (mode {:04o}): chmod 0400",
                mode & 0o777
            )));
        }
        let text = std::fs::read(bundle).context(|| format!("cannot read {}", bundle.display()))?;
        let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&text)
            .collect::<std::result::Result<_, _>>()
            .map_err(|error| wrong(error.to_string()))?;
        let key = PrivateKeyDer::from_pem_slice(&text).map_err(|e| wrong(e.to_string()))?;
        let [own, authority @ ..] = &certificates[..] else {
            return Err(wrong("there is no certificate in it".into()));
        };
        let mut roots = RootCertStore::empty();
        for certificate in authority {
            roots.add(certificate.clone()).map_err(|error| wrong(error.to_string()))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|error| wrong(error.to_string()))?;
        let failed = |error: rustls::Error| wrong(error.to_string());
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![own.clone()], key.clone_key())
            .map_err(failed)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![own.clone()], key)
            .map_err(failed)?;
        Ok(Identity {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connector: TlsConnector::from(Arc::new(client)),
        })
    }
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
