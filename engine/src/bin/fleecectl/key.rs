//! `fleecectl key`: getting the key away from this host, knowing that a copy is good, and changing the part
//! of it that encrypts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Subcommand;
use fleece_engine::config::Config;
use fleece_engine::error::{Context as _, Result};
use fleece_engine::store::Store;
use fleece_engine::store::keys::StoreKey;
use fleece_engine::upgrade::must_allow_keys;

use super::init::read_passphrase;
use super::report::{print_json, with_engine};
use super::upgrade::{followed, say_behind};

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Print the key, to be kept away from this host.
    Export {
        /// As numbered lines with a checksum each, to be printed and typed in again.
        #[arg(long)]
        paper: bool,
        /// From the newest copy in the store, under the passphrase in this file: the way back when
        /// the key file is lost.
        #[arg(long)]
        passphrase_file: Option<PathBuf>,
    },
    /// Check that a copy of the key (a file or a typed paper copy) opens the store.
    Check {
        /// The copy.
        file: PathBuf,
    },
    /// Add an encryption key to the key file. It is used once every host has the file, and --use says so.
    Rotate {
        /// Have all hosts seal what is new under the key that was added; refused while one lacks it. There
        /// is no way back.
        #[arg(long = "use")]
        used: bool,
        /// Put a copy of the whole key into the store, under the passphrase in this file: older copies lack
        /// the key that is added.
        #[arg(long, conflicts_with = "used")]
        passphrase_file: Option<PathBuf>,
    },
}

pub(crate) fn run(verb: &Verb, config: &Path, json: bool) -> Result<()> {
    let config = Config::load(config)?;
    match verb {
        Verb::Export { paper, passphrase_file } => {
            export(&config, *paper, passphrase_file.as_deref(), json)
        }
        Verb::Check { file } => check(&config, file, json),
        Verb::Rotate { passphrase_file, .. } => rotate(&config, passphrase_file.as_deref(), json),
    }
}

fn export(config: &Config, paper: bool, passphrase: Option<&Path>, json: bool) -> Result<()> {
    let key = match passphrase {
        None => Arc::new(StoreKey::load(&config.key)?),
        Some(file) => {
            let location = config.location()?;
            let key = Store::recover_key(&location, &read_passphrase(file)?)?;
            // It opens what was stored before, at least.
            if let Err(error) = Store::check_key(&location, Arc::clone(&key)) {
                eprintln!("fleecectl: {error}");
            }
            key
        }
    };
    let text = if paper { key.to_paper() } else { key.to_text() };
    if json {
        let form = if paper { "paper" } else { "file" };
        let line = serde_json::json!({
            "store_id": key.store().to_string(),
            "form": form,
            "key": text.as_str(),
        });
        return print_json("key", &line);
    }
    print!("{}", text.as_str());
    Ok(())
}

fn check(config: &Config, file: &Path, json: bool) -> Result<()> {
    let key = Arc::new(read_copy(file)?);
    let location = config.location()?;
    Store::check_key(&location, Arc::clone(&key))?;
    if json {
        let line = serde_json::json!({ "store_id": key.store().to_string(), "good": true });
        return print_json("key_check", &line);
    }
    println!("{} opens the store {location}", file.display());
    Ok(())
}

/// A copy may come from anywhere: its mode is not looked at, its form is found out.
fn read_copy(file: &Path) -> Result<StoreKey> {
    let text = std::fs::read_to_string(file)
        .context(|| format!("cannot read the copy of the key {}", file.display()))?;
    StoreKey::from_text(&text)
        .or_else(|error| StoreKey::from_paper(&text).map_err(|_| error))
        .context(|| format!("{} is no copy of a key", file.display()))
}

/// Adds a key to the file, unless there is one that waits to be used.
fn rotate(config: &Config, passphrase: Option<&Path>, json: bool) -> Result<()> {
    let location = config.location()?;
    let mut key = Arc::new(StoreKey::load(&config.key)?);
    let agreed = Store::check_key(&location, Arc::clone(&key))?;
    must_allow_keys(agreed.level)?;
    let passphrase = passphrase.map(read_passphrase).transpose()?;
    if key.newest() == agreed.key {
        key = Arc::new(key.rotated()?);
        key.replace(&config.key)?;
    }
    if let Some(passphrase) = &passphrase {
        Store::keep_key(&location, &key, passphrase)?;
    }
    let (id, file) = (key.newest().0, config.key.display());
    let steps = [
        format!(
            "copy {file} to every other host of the store, to where `key` in its engine.toml says (mode 0400), \
             and to nobody else. Engines that run take it within seconds"
        ),
        "run fleecectl key rotate --use: it asks all hosts whether they have the key, and names those that do \
         not"
        .to_owned(),
        match passphrase {
            Some(_) => "export the key again (fleecectl key export): older copies away from here lack it".to_owned(),
            None => "export the key again (fleecectl key export): older copies lack it, one under a passphrase \
                     in the store, too (--passphrase-file makes a new one)"
                .to_owned(),
        },
    ];
    if json {
        let line = serde_json::json!({ "key": id, "file": config.key, "steps": steps });
        return print_json("key_rotated", &line);
    }
    println!("{file} has the encryption key {id}, which is not used yet. Left to do:");
    for (n, step) in steps.iter().enumerate() {
        println!("{}. {step}", n + 1);
    }
    Ok(())
}

/// Has all hosts go over to the key that was added.
pub(crate) fn use_newest(socket: &Path, json: bool) -> Result<()> {
    let (key, behind) = with_engine(socket, async |engine| {
        let key = engine.use_key().await?;
        Ok((key, followed(&engine, |host| host.key >= key).await?))
    })?;
    if json {
        let line = serde_json::json!({ "key": key, "behind": behind });
        return print_json("key_used", &line);
    }
    println!(
        "what is new is sealed under the encryption key {key}; what was stored before stays as it is"
    );
    say_behind(&behind);
    Ok(())
}
