//! The admin's tool: store and engine.

mod authority;
mod cluster;
mod hosts;
mod init;
mod key;
mod report;
mod upgrade;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use fleece_engine::config::{Config, DEFAULT_CONFIG, DEFAULT_SOCKET};
use fleece_engine::detect::MAX_PARTITION_BITS;
use fleece_engine::error::{Context as _, Error, Kind, Result};

/// No index has more; the engine knows how many its own has.
const LAST_PARTITION: i64 = (1 << MAX_PARTITION_BITS) - 1;

/// Admin of Fleece: the store, its key, the engine of this host.
#[derive(Parser)]
#[command(name = "fleecectl", version, arg_required_else_help = true)]
struct Options {
    /// The engine's configuration.
    #[arg(long, global = true, default_value = DEFAULT_CONFIG)]
    config: PathBuf,
    /// The engine's socket, instead of the configuration's.
    #[arg(long, global = true, env = "FLEECE_ENGINE")]
    engine: Option<PathBuf>,
    /// Print lines of JSON with a message_type each.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make a store, its key, and the engine's configuration.
    Init(init::Options),
    /// What the store holds, what it takes, and what runs.
    Status,
    /// The backups that run now, on all hosts.
    Sessions,
    /// The hosts of the cluster: what each owns and holds.
    Hosts,
    /// The partitions of all hosts' indexes.
    Partitions {
        /// Draw who owns which slice of the fingerprints.
        #[arg(long)]
        map: bool,
    },
    /// Say what would move between hosts if shares were computed now. They follow the hosts that live,
    /// their capacity and drain by themselves, so there is nothing else to do.
    Rebalance {
        /// Only say it: there is no other way.
        #[arg(long)]
        dry_run: bool,
        /// As if this host were drained.
        #[arg(long, value_name = "HOST")]
        without: Option<String>,
    },
    /// Let a host own nothing, so that it can go; its backups go on.
    Drain {
        /// Its name.
        host: String,
        /// Give it its share again.
        #[arg(long)]
        undo: bool,
    },
    /// The store's level, and which hosts' engines know the next one.
    Upgrade {
        /// Raise the store to the newest level, so that new formats are used: engines that do not know it
        /// are refused from then on. There is no way back.
        #[arg(long)]
        finalize: bool,
    },
    /// Check everything that restoring needs, or what one VM or snapshot needs.
    Verify {
        /// VM or VM@SNAPSHOT; everything if absent.
        what: Option<String>,
    },
    /// Put good copies in the place of what verify or a restore found damaged.
    Repair {
        /// Only say what would be done.
        #[arg(long)]
        dry_run: bool,
    },
    /// Take away what nobody needs: only on a keeper (role = "keeper" in engine.toml).
    Tidy {
        /// Only say what would be taken away: that any host can.
        #[arg(long)]
        dry_run: bool,
    },
    /// Build this host's index anew from the store, while backups go on.
    RebuildIndex {
        /// Only this partition of it, as `fleecectl partitions` numbers them.
        #[arg(long, value_name = "P", value_parser = clap::value_parser!(u16).range(..=LAST_PARTITION))]
        partition: Option<u16>,
    },
    /// The store's key.
    #[command(subcommand)]
    Key(key::Verb),
    /// The hosts that work as one: their certificates.
    #[command(subcommand)]
    Cluster(cluster::Verb),
    /// Print shell completions.
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
    /// Print the man page.
    Man,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let json = options.json;
    match fleece_engine::start::harden().and_then(|()| run(options)) {
        Ok(code) => code,
        Err(error) => {
            let code = error.kind().exit_code();
            if json {
                let line = serde_json::json!({
                    "message_type": "error",
                    "code": code,
                    "message": error.to_string(),
                });
                println!("{line}");
            }
            eprintln!("fleecectl: {error}");
            ExitCode::from(code)
        }
    }
}

fn run(options: Options) -> Result<ExitCode> {
    match options.verb {
        Verb::Init(init) => init::run(&init, &options.config, options.json)?,
        Verb::Key(key::Verb::Rotate { used: true, .. }) => {
            key::use_newest(&socket(&options)?, options.json)?;
        }
        Verb::Key(ref verb) => key::run(verb, &options.config, options.json)?,
        Verb::Cluster(verb) => cluster::run(&verb, &options.config, options.json)?,
        Verb::Completions { shell } => {
            let mut command = Options::command();
            clap_complete::generate(shell, &mut command, "fleecectl", &mut std::io::stdout());
        }
        Verb::Man => clap_mangen::Man::new(Options::command())
            .render(&mut std::io::stdout())
            .context(|| "cannot print".into())?,
        Verb::Status => report::status(&socket(&options)?, options.json)?,
        Verb::Sessions => report::sessions(&socket(&options)?, options.json)?,
        Verb::Hosts => hosts::hosts(&socket(&options)?, options.json)?,
        Verb::Partitions { map } => hosts::partitions(&socket(&options)?, map, options.json)?,
        Verb::Rebalance { dry_run, ref without } => {
            hosts::rebalance(&socket(&options)?, dry_run, without.as_deref(), options.json)?;
        }
        Verb::Drain { ref host, undo } => {
            hosts::drain(&socket(&options)?, host, undo, options.json)?;
        }
        Verb::Upgrade { finalize: false } => upgrade::show(&socket(&options)?, options.json)?,
        Verb::Upgrade { finalize: true } => upgrade::finalize(&socket(&options)?, options.json)?,
        Verb::Verify { ref what } => {
            return report::verify(&socket(&options)?, what.as_deref(), options.json);
        }
        Verb::Repair { dry_run } => {
            return report::repair(&socket(&options)?, dry_run, options.json);
        }
        Verb::Tidy { dry_run } => report::tidy(&socket(&options)?, dry_run, options.json)?,
        Verb::RebuildIndex { partition } => {
            report::rebuild_index(&socket(&options)?, partition, options.json)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Where the engine listens: as told, as configured, or as usual.
fn socket(options: &Options) -> Result<PathBuf> {
    if let Some(socket) = &options.engine {
        return Ok(socket.clone());
    }
    if options.config.exists() {
        return Ok(Config::load(&options.config)?.socket);
    }
    if options.config.as_os_str() == DEFAULT_CONFIG {
        return Ok(DEFAULT_SOCKET.into());
    }
    Err(Error::new(Kind::Usage, format!("there is no configuration {}", options.config.display())))
}
