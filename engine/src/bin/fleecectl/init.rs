//! `fleecectl init`: a store, its key, a configuration.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use fleece_engine::config::{Config, parse_size};
use fleece_engine::error::{Context as _, Error, Kind, Result};
use fleece_engine::store::{Access, InitOptions, Location, Store};

/// What `init` is told.
#[derive(Args)]
pub(crate) struct Options {
    /// Where the store shall be: a directory, new or empty, or s3://bucket/prefix.
    #[arg(long)]
    store: String,
    /// The server of a store at s3://, instead of AWS_ENDPOINT_URL or Amazon's.
    #[arg(long)]
    s3_endpoint: Option<String>,
    /// The region of a store at s3://, instead of AWS_REGION.
    #[arg(long)]
    s3_region: Option<String>,
    /// The file (mode 0400) with access_key_id and secret_access_key of a store at s3://, instead of
    /// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
    #[arg(long)]
    s3_credentials: Option<PathBuf>,
    /// Keep a copy of the key in the store, under the passphrase in this file.
    #[arg(long, conflicts_with = "no_encryption")]
    passphrase_file: Option<PathBuf>,
    /// Authenticate the guests' data, but do not encrypt it.
    #[arg(long)]
    no_encryption: bool,
    /// The unit of deduplication, 4K to 64K: fixed for ever.
    #[arg(long, default_value = "4K")]
    block_size: String,
    /// Where the engine shall listen.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Where the engine shall keep its index.
    #[arg(long)]
    state_dir: Option<PathBuf>,
    /// The engine's memory, with a unit (32M).
    #[arg(long)]
    memory_budget: Option<String>,
}

pub(crate) fn run(options: &Options, config_path: &Path, json: bool) -> Result<()> {
    let access = access(options)?;
    let location = Location::parse(&absolute(&options.store)?, &access)?;
    if config_path.exists() {
        return Err(Error::new(
            Kind::Usage,
            format!(
                "there is a configuration {} already: choose another --config, or remove it",
                config_path.display()
            ),
        ));
    }
    let block_size = u32::try_from(parse_size(&options.block_size)?)
        .map_err(|_| Error::new(Kind::Usage, "block sizes go from 4K to 64K"))?;
    let folder = config_path.parent().filter(|p| !p.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let key_path = folder.join(key_name(config_path));
    let mut config = configuration(options, location.to_string(), absolute_path(&key_path)?)?;
    config.s3 = Some(access).filter(|access| *access != Access::default());
    let passphrase = options.passphrase_file.as_deref().map(read_passphrase).transpose()?;
    std::fs::create_dir_all(folder).context(|| format!("cannot create {}", folder.display()))?;
    let wrapped = passphrase.is_some();
    let init = InitOptions {
        block_size,
        encrypt: !options.no_encryption,
        passphrase,
        ..InitOptions::default()
    };
    let key = Store::init(&location, &init, |key| key.save(&key_path))?;
    write_config(config_path, &config)?;
    if json {
        let line = serde_json::json!({
            "message_type": "init",
            "store": location.to_string(),
            "store_id": key.store().to_string(),
            "key": config.key,
            "config": config_path,
            "encrypted": !options.no_encryption,
        });
        println!("{line}");
        return Ok(());
    }
    println!("store {location} ({})", key.store());
    println!("configuration {}", config_path.display());
    println!("key {} (mode 0400)", key_path.display());
    println!();
    println!("Nothing can be restored without this key. Keep a copy away from this host:");
    println!("  fleecectl --config {} key export --paper | lp", config_path.display());
    if wrapped {
        println!("A copy under your passphrase is in the store; to get it back:");
        println!(
            "  fleecectl --config {} key export --passphrase-file FILE",
            config_path.display()
        );
    }
    if options.no_encryption {
        println!("The store is NOT encrypted: whoever reads it reads your guests' data.");
    }
    println!();
    println!("Now start the engine: fleece-engine --config {}", config_path.display());
    Ok(())
}

/// The key beside `engine.toml` is `engine.key`.
pub(crate) fn key_name(config_path: &Path) -> PathBuf {
    let stem = config_path.file_stem().unwrap_or(std::ffi::OsStr::new("store"));
    Path::new(stem).with_extension("key")
}

fn access(options: &Options) -> Result<Access> {
    let credentials = options.s3_credentials.as_deref().map(absolute_path).transpose()?;
    let (endpoint, region) = (options.s3_endpoint.clone(), options.s3_region.clone());
    Ok(Access { endpoint, region, credentials })
}

fn configuration(options: &Options, store: String, key: PathBuf) -> Result<Config> {
    let mut config = Config::new(store, key);
    if let Some(socket) = &options.socket {
        config.socket = absolute_path(socket)?;
    }
    if let Some(state_dir) = &options.state_dir {
        config.state_dir = absolute_path(state_dir)?;
    }
    if let Some(budget) = &options.memory_budget {
        config.memory_budget.clone_from(budget);
    }
    config.budget()?;
    Ok(config)
}

fn absolute(store: &str) -> Result<String> {
    if store.contains("://") {
        return Ok(store.to_owned());
    }
    Ok(absolute_path(Path::new(store))?.to_string_lossy().into_owned())
}

fn absolute_path(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context(|| format!("cannot make {} absolute", path.display()))
}

/// The file's first line: editors end it with a newline that nobody types again.
pub(crate) fn read_passphrase(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path)
        .context(|| format!("cannot read the passphrase file {}", path.display()))?;
    let line = text.lines().next().unwrap_or_default();
    if line.is_empty() {
        return Err(Error::new(
            Kind::Usage,
            format!("the passphrase file {} is empty", path.display()),
        ));
    }
    Ok(line.to_owned())
}

pub(crate) fn write_config(path: &Path, config: &Config) -> Result<()> {
    let text = toml::to_string(config)
        .map_err(|e| Error::caused(Kind::Failed, "cannot write the configuration", e))?;
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o640)
        .open(path)
        .context(|| format!("cannot create {}", path.display()))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .context(|| format!("cannot write {}", path.display()))
}
