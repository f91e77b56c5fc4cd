//! `fleecectl cluster`: the cluster's own CA, and what each host proves itself with.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use fleece_engine::config::{CRL_NAME, Config};
use fleece_engine::error::{Context as _, Error, Kind, Result};
use fleece_engine::store::keys::StoreKey;
use serde::{Deserialize, Serialize};

use super::authority::{Authority, Revoked, bytes_of, write};
use super::init::{key_name, read_passphrase, write_config};

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
    /// Take a host's certificates back: sign the list of all that were, which every host has to get, and
    /// say what is left to do. The host can be invited again.
    Revoke {
        /// The host's name.
        host: String,
        /// The folder of the CA.
        #[arg(long)]
        dir: PathBuf,
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
    /// What the CA has taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crl: Option<String>,
    /// What cluster.etcd_ca names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    etcd_ca: Option<String>,
    config: Config,
}

/// Bundles of this version are read.
const VERSION: u32 = 1;

/// What a host that joins has for etcd, beside its configuration: the CA's certificate from the bundle; and
/// where it is to have a certificate of its own, if the other host has one.
const ETCD_CA: &str = "etcd-ca.pem";
const ETCD_CERTIFICATE: &str = "etcd.pem";
const ETCD_KEY: &str = "etcd.key";

pub(crate) fn run(verb: &Verb, config: &Path, json: bool) -> Result<()> {
    let (files, hint) = match verb {
        Verb::Init { dir } => {
            (Authority::make(dir)?, "fleecectl cluster invite HOST makes a host's certificate")
        }
        Verb::Invite { host, dir, out, passphrase_file: None } => {
            let mut authority = Authority::open(dir)?;
            write(out, &authority.invite(host)?)?;
            let hint = match authority.revocations()? {
                None => "move it to the host and name it as cluster.identity there",
                Some(_) => {
                    "move it to the host and name it as cluster.identity there, and put the CA's \
                     crl.pem beside it"
                }
            };
            (vec![out.clone()], hint)
        }
        Verb::Invite { host, dir, out, passphrase_file: Some(passphrase) } => {
            let bundle = bundle(host, &mut Authority::open(dir)?, config, passphrase)?;
            write(out, &bundle)?;
            (vec![out.clone()], "move it to the host; fleecectl cluster join makes the rest of it")
        }
        Verb::Revoke { host, dir } => {
            return say_revoked(host, &Authority::open(dir)?.revoke(host)?, json);
        }
        Verb::Join { bundle, passphrase_file, address, capacity } => {
            let place = (address.clone(), *capacity);
            let (files, has_own) = join(bundle, passphrase_file, place, config)?;
            let hint = if has_own {
                "put this host's certificate for etcd and its key (mode 0400) where cluster.etcd_certificate \
                 and cluster.etcd_key say, etcd.pem and etcd.key beside the configuration; then start \
                 fleece-engine"
            } else {
                "now start fleece-engine"
            };
            (files, hint)
        }
    };
    say_written(&files, json);
    if !json {
        println!("{hint}");
    }
    Ok(())
}

fn say_written(files: &[PathBuf], json: bool) {
    for file in files {
        if json {
            let line = serde_json::json!({ "message_type": "file", "path": file });
            println!("{line}");
        } else {
            println!("wrote {}", file.display());
        }
    }
}

/// What is left to do, of which nothing can be done from here.
fn say_revoked(host: &str, Revoked { list, serials }: &Revoked, json: bool) -> Result<()> {
    say_written(std::slice::from_ref(list), json);
    let steps = [
        format!(
            "copy {CRL_NAME} to every other host, beside the file that cluster.identity names there (or \
             where cluster.crl says), so that the engine's user can read it. Engines that run follow it within seconds: they hang up on {host} \
             and refuse it from then on"
        ),
        format!(
            "run fleecectl drain {host} on another host, so that the others take its part over (with \
             cluster.static take it out of every list). Keep it from etcd: whoever that lets in is \
             believed. An etcd whose CA is this one takes {CRL_NAME} as --client-crl-file"
        ),
        format!(
            "{host} can still read everything in the store, and add to it, with the credentials that it \
             has: revoke its S3 credentials (give the other hosts new ones, if they had the same), or its \
             access to the directory"
        ),
        format!(
            "give the store a new encryption key: fleecectl key rotate on a host, its key file to every other \
             one, then fleecectl key rotate --use. {host} had the store's key, and cannot read what is stored \
             from then on. What was stored before stays under the keys that it had, also where new \
             snapshots share it: what {host} has copied it can read for ever, the rest as long as it \
             reaches the store (step 3)"
        ),
        format!(
            "delete bundles that were made for {host}: their passphrase opens the key that it had, too. Bundles \
             that are made after step 4 have the new one"
        ),
    ];
    if json {
        let line = serde_json::json!({
            "message_type": "revoked", "host": host, "serials": serials, "steps": steps,
        });
        println!("{line}");
        return Ok(());
    }
    println!("{host} is revoked ({} of its certificates). Left to do:", serials.len());
    for (n, step) in steps.iter().enumerate() {
        println!("{}. {step}", n + 1);
    }
    Ok(())
}

/// A host's bundle with this host's configuration, and the key under a passphrase.
fn bundle(
    host: &str,
    authority: &mut Authority,
    config: &Path,
    passphrase: &Path,
) -> Result<String> {
    let config = Config::load(config)?;
    let Some(cluster) = &config.cluster else {
        let what = "this host's configuration has no [cluster]: who is in it, and how they meet";
        return Err(Error::new(Kind::Usage, what));
    };
    let read = |path: &PathBuf| {
        fs::read_to_string(path).context(|| format!("cannot read {}", path.display()))
    };
    let etcd_ca = cluster.etcd_ca.as_ref().map(read).transpose()?;
    let wrapped = StoreKey::load(&config.key)?.wrap(&read_passphrase(passphrase)?)?;
    let store_key = wrapped.iter().map(|byte| format!("{byte:02x}")).collect();
    let (identity, crl) = (authority.invite(host)?, authority.revocations()?);
    let host = host.to_owned();
    let bundle = Bundle { version: VERSION, host, store_key, identity, crl, etcd_ca, config };
    toml::to_string(&bundle)
        .map_err(|error| Error::caused(Kind::Failed, "cannot write the bundle", error))
}

/// Writes what a bundle says; gives the files, and whether the host has to have a certificate of its own for
/// etcd. Nothing is replaced.
fn join(
    bundle: &Path,
    passphrase: &Path,
    (address, capacity): (Option<String>, u32),
    config_path: &Path,
) -> Result<(Vec<PathBuf>, bool)> {
    let text =
        fs::read_to_string(bundle).context(|| format!("cannot read {}", bundle.display()))?;
    // The cause would quote what is in it.
    let bad = |_| Error::new(Kind::Key, format!("{} is no bundle of a host", bundle.display()));
    let Bundle { version, host, store_key, identity, crl, etcd_ca, mut config } =
        toml::from_str(&text).map_err(bad)?;
    if version != VERSION {
        let what = format!("{} is of version {version}: upgrade fleece", bundle.display());
        return Err(Error::new(Kind::Usage, what));
    }
    let wrapped =
        bytes_of(&store_key).ok_or_else(|| Error::new(Kind::Key, "the bundle's key is damaged"))?;
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
        // The other host's may be anywhere; ours is beside our identity.
        cluster.crl = None;
        cluster.etcd_ca = etcd_ca.as_ref().map(|_| folder.join(ETCD_CA));
        let own = cluster.etcd_certificate.is_some();
        cluster.etcd_certificate = own.then(|| folder.join(ETCD_CERTIFICATE));
        cluster.etcd_key = own.then(|| folder.join(ETCD_KEY));
    }
    config.check()?;
    fs::create_dir_all(&folder).context(|| format!("cannot create {}", folder.display()))?;
    let public = [(CRL_NAME, crl), (ETCD_CA, etcd_ca)];
    let public = public.into_iter().filter_map(|(name, text)| Some((folder.join(name), text?)));
    let public: Vec<(PathBuf, String)> = public.collect();
    let mut files = vec![config_path.to_owned(), config.key.clone(), identity_path.clone()];
    files.extend(public.iter().map(|(path, _)| path.clone()));
    for path in &files {
        if path.exists() {
            let what = format!("{} is there already: nothing is replaced", path.display());
            return Err(Error::new(Kind::Usage, what));
        }
    }
    public.iter().try_for_each(|(path, text)| write(path, text))?;
    write(&identity_path, &identity)?;
    key.save(&config.key)?;
    write_config(config_path, &config)?;
    let has_own = config.cluster.is_some_and(|cluster| cluster.etcd_certificate.is_some());
    Ok((files, has_own))
}
