//! `fleecectl cluster`: the cluster's own CA, and what each host proves itself with.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use fleece_engine::error::{Context as _, Error, Kind, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// The CA's files in its folder.
const CERTIFICATE: &str = "ca.pem";
const KEY: &str = "ca.key";

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Make the CA of a new cluster. Whoever has its key can let hosts in: keep it off the hosts.
    Init {
        /// The folder for its certificate and key.
        #[arg(long)]
        dir: PathBuf,
    },
    /// Make what a host proves itself with: its certificate and key, and the CA's certificate.
    Invite {
        /// The host's name in cluster.static.
        host: String,
        /// The folder of the CA.
        #[arg(long)]
        dir: PathBuf,
        /// The file for it, to be moved to the host (cluster.identity).
        #[arg(long)]
        out: PathBuf,
    },
}

pub(crate) fn run(verb: &Verb, json: bool) -> Result<()> {
    let (files, hint) = match verb {
        Verb::Init { dir } => {
            fs::create_dir_all(dir).context(|| format!("cannot create {}", dir.display()))?;
            let key = KeyPair::generate().map_err(failed)?;
            let certificate = authority()?.self_signed(&key).map_err(failed)?;
            let (path, secret) = (dir.join(CERTIFICATE), dir.join(KEY));
            write(&secret, &key.serialize_pem())?;
            write(&path, &certificate.pem())?;
            (vec![path, secret], "fleecectl cluster invite HOST makes a host's certificate")
        }
        Verb::Invite { host, dir, out } => {
            let bundle = invite(host, dir)?;
            write(out, &bundle)?;
            (vec![out.clone()], "move it to the host and name it as cluster.identity there")
        }
    };
    for file in &files {
        if json {
            let line = serde_json::json!({ "message_type": "file", "path": file });
            println!("{line}");
        } else {
            println!("wrote {}", file.display());
        }
    }
    if !json {
        println!("{hint}");
    }
    Ok(())
}

/// A host's certificate, the CA's, and the host's key.
fn invite(host: &str, dir: &Path) -> Result<String> {
    let read = |name: &str| {
        let path = dir.join(name);
        let hint = || format!("cannot read {} (fleecectl cluster init makes it)", path.display());
        fs::read_to_string(&path).context(hint)
    };
    let (certificate, key) = (read(CERTIFICATE)?, read(KEY)?);
    let issuer = Issuer::new(authority()?, KeyPair::from_pem(&key).map_err(failed)?);
    let mut params = CertificateParams::new([host.to_owned()]).map_err(|error| {
        Error::caused(Kind::Usage, format!("'{host}' cannot be a host's name"), error)
    })?;
    params.distinguished_name.push(DnType::CommonName, host);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let own = KeyPair::generate().map_err(failed)?;
    let signed = params.signed_by(&own, &issuer).map_err(failed)?;
    Ok([signed.pem(), certificate, own.serialize_pem()].concat())
}

/// What the CA's certificate says; the same whenever it signs.
fn authority() -> Result<CertificateParams> {
    let mut params = CertificateParams::new([]).map_err(failed)?;
    params.distinguished_name.push(DnType::CommonName, "Fleece cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// Writes a file that only its owner can read, and that is not there yet.
fn write(path: &Path, text: &str) -> Result<()> {
    let mut options = fs::OpenOptions::new();
    options
        .write(true)
        .create_new(true)
        .mode(0o400)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .context(|| format!("cannot write {} (it must not be there yet)", path.display()))
}

fn failed(error: rcgen::Error) -> Error {
    Error::caused(Kind::Failed, "cannot make a certificate", error)
}
