//! `fleecectl key`: getting the key away from this host, and knowing that a copy is good.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Subcommand;
use fleece_engine::config::Config;
use fleece_engine::error::{Context as _, Result};
use fleece_engine::store::Store;
use fleece_engine::store::keys::StoreKey;

use super::init::read_passphrase;

#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Print the key, to be kept away from this host.
    Export {
        /// As numbered lines with a checksum each, to be printed and typed in again.
        #[arg(long)]
        paper: bool,
        /// From the copy in the store, under the passphrase in this file: the way back when
        /// the key file is lost.
        #[arg(long)]
        passphrase_file: Option<PathBuf>,
    },
    /// Check that a copy of the key (a file or a typed paper copy) opens the store.
    Check {
        /// The copy.
        file: PathBuf,
    },
}

pub(crate) fn run(verb: Verb, config: &Path, json: bool) -> Result<()> {
    let config = Config::load(config)?;
    match verb {
        Verb::Export { paper, passphrase_file } => {
            let key = match passphrase_file {
                None => Arc::new(StoreKey::load(&config.key)?),
                Some(file) => {
                    let location = config.location()?;
                    Store::recover_key(&location, &read_passphrase(&file)?)?
                }
            };
            let text = if paper { key.to_paper() } else { key.to_text() };
            if json {
                let form = if paper { "paper" } else { "file" };
                let line = serde_json::json!({
                    "message_type": "key",
                    "store_id": key.store().to_string(),
                    "form": form,
                    "key": text.as_str(),
                });
                println!("{line}");
            } else {
                print!("{}", text.as_str());
            }
        }
        Verb::Check { file } => {
            let key = read_copy(&file)?;
            let location = config.location()?;
            let store = key.store();
            Store::check_key(&location, key)?;
            if json {
                let line = serde_json::json!({
                    "message_type": "key_check",
                    "store_id": store.to_string(),
                    "good": true,
                });
                println!("{line}");
            } else {
                println!("{} opens the store {location}", file.display());
            }
        }
    }
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
