//! `fleecectl cluster`: the cluster's own CA, and what each host proves itself with.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use fleece_engine::config::Config;
use fleece_engine::error::{Context as _, Error, Kind, Result};
use fleece_engine::store::keys::StoreKey;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde::{Deserialize, Serialize};

use super::init::{key_name, read_passphrase, write_config};

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
        /// The file for it, to be moved to the host.
        #[arg(long)]
        out: PathBuf,
        /// Put the store's key, under the passphrase in this file, and this host's configuration into it,
        /// too: then `fleecectl cluster join` is all that the host needs. Without it the file is what
        /// cluster.identity names.
        #[arg(long)]
        passphrase_file: Option<PathBuf>,
    },
    /// Make this host's configuration, key and identity from what `invite --passphrase-file` made.
    Join {
        /// That file.
        bundle: PathBuf,
        /// The passphrase is in this file.
        #[arg(long)]
        passphrase_file: PathBuf,
        /// With etcd: where the others reach this host's engine, host and port.
        #[arg(long)]
        address: Option<String>,
        /// With etcd: this host's share beside the others'.
        #[arg(long, default_value_t = 1)]
        capacity: u32,
    },
}

/// All that a host needs, in one file. TOML; the key as `StoreKey::wrap` gives it, in hexadecimal.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bundle {
    version: u32,
    host: String,
    store_key: String,
    identity: String,
    config: Config,
}

/// Bundles of this version are read.
const VERSION: u32 = 1;

pub(crate) fn run(verb: &Verb, config: &Path, json: bool) -> Result<()> {
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
        Verb::Invite { host, dir, out, passphrase_file: None } => {
            write(out, &invite(host, dir)?)?;
            (vec![out.clone()], "move it to the host and name it as cluster.identity there")
        }
        Verb::Invite { host, dir, out, passphrase_file: Some(passphrase) } => {
            let bundle = bundle(host, invite(host, dir)?, config, passphrase)?;
            write(out, &bundle)?;
            (vec![out.clone()], "move it to the host; fleecectl cluster join makes the rest of it")
        }
        Verb::Join { bundle, passphrase_file, address, capacity } => {
            let place = (address.clone(), *capacity);
            (join(bundle, passphrase_file, place, config)?, "now start fleece-engine")
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

/// A host's bundle with this host's configuration, and the key under a passphrase.
fn bundle(host: &str, identity: String, config: &Path, passphrase: &Path) -> Result<String> {
    let config = Config::load(config)?;
    if config.cluster.is_none() {
        let what = "this host's configuration has no [cluster]: who is in it, and how they meet";
        return Err(Error::new(Kind::Usage, what));
    }
    let wrapped = StoreKey::load(&config.key)?.wrap(&read_passphrase(passphrase)?)?;
    let store_key = wrapped.iter().map(|byte| format!("{byte:02x}")).collect();
    let bundle = Bundle { version: VERSION, host: host.to_owned(), store_key, identity, config };
    toml::to_string(&bundle)
        .map_err(|error| Error::caused(Kind::Failed, "cannot write the bundle", error))
}

/// Writes what a bundle says; gives the files. Nothing is replaced.
fn join(
    bundle: &Path,
    passphrase: &Path,
    (address, capacity): (Option<String>, u32),
    config_path: &Path,
) -> Result<Vec<PathBuf>> {
    let text =
        fs::read_to_string(bundle).context(|| format!("cannot read {}", bundle.display()))?;
    // The cause would quote what is in it.
    let bad = |_| Error::new(Kind::Key, format!("{} is no bundle of a host", bundle.display()));
    let Bundle { version, host, store_key, identity, mut config } =
        toml::from_str(&text).map_err(bad)?;
    if version != VERSION {
        let what = format!("{} is of version {version}: upgrade fleece", bundle.display());
        return Err(Error::new(Kind::Usage, what));
    }
    let digits = store_key.as_bytes().chunks(2);
    let bytes = digits
        .map(|two| std::str::from_utf8(two).ok().and_then(|two| u8::from_str_radix(two, 16).ok()));
    let wrapped: Option<Vec<u8>> = bytes.collect();
    let wrapped = wrapped.ok_or_else(|| Error::new(Kind::Key, "the bundle's key is damaged"))?;
    let key = StoreKey::unwrap(&wrapped, &read_passphrase(passphrase)?)?;
    let folder = config_path.parent().filter(|p| !p.as_os_str().is_empty());
    let folder = std::path::absolute(folder.unwrap_or(Path::new(".")))
        .context(|| "cannot find the configuration's folder".into())?;
    let identity_path = folder.join(format!("{host}.pem"));
    config.key = folder.join(key_name(config_path));
    if let Some(cluster) = &mut config.cluster {
        cluster.name.clone_from(&host);
        cluster.identity.clone_from(&identity_path);
        (cluster.address, cluster.capacity, cluster.listen) = (address, capacity, None);
    }
    config.check()?;
    fs::create_dir_all(&folder).context(|| format!("cannot create {}", folder.display()))?;
    for path in [config_path, &config.key, &identity_path] {
        if path.exists() {
            let what = format!("{} is there already: nothing is replaced", path.display());
            return Err(Error::new(Kind::Usage, what));
        }
    }
    write(&identity_path, &identity)?;
    key.save(&config.key)?;
    write_config(config_path, &config)?;
    Ok(vec![config_path.to_owned(), config.key, identity_path])
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
