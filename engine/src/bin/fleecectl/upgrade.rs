//! `fleecectl upgrade`: the level of the store, and which hosts stand against the next one.

use std::path::Path;
use std::time::{Duration, Instant};

use fleece_engine::error::Result;
use fleece_engine::hosts::HostReport;
use fleece_engine::rpc::client::EngineClient;

use super::report::{print_json, with_engine};

/// Within this all engines see what was changed: they look every 10 s.
const FOLLOWED: Duration = Duration::from_secs(30);
/// Between two questions whether they did.
const AGAIN: Duration = Duration::from_millis(500);

pub(crate) fn show(socket: &Path, json: bool) -> Result<()> {
    let (hosts, _) = with_engine(socket, async |engine| engine.hosts().await)?;
    let Some(own) = hosts.first() else { return Ok(()) };
    if json {
        hosts.iter().try_for_each(|host| print_json("host", host))?;
        let levels = serde_json::json!({ "level": own.level, "newest_level": own.newest_level });
        return print_json("upgrade", &levels);
    }
    println!(
        "the store is at level {}; {} knows levels up to {}",
        own.level, own.name, own.newest_level
    );
    println!("{:16} {:8} {:10} {:>5}  knows up to", "host", "state", "version", "level");
    for host in &hosts {
        let (name, state) = (&host.name, &host.state);
        if host.answers() {
            println!(
                "{name:16} {state:8} {:10} {:>5}  {}",
                host.version, host.level, host.newest_level
            );
        } else {
            println!("{name:16} {state:8} at {}", host.address);
        }
    }
    if own.level < own.newest_level {
        println!("fleecectl upgrade --finalize raises it, once all hosts know the newest");
    }
    Ok(())
}

pub(crate) fn finalize(socket: &Path, json: bool) -> Result<()> {
    let (level, behind) = with_engine(socket, async |engine| {
        let level = engine.finalize().await?;
        Ok((level, followed(&engine, |host| host.level >= level).await?))
    })?;
    if json {
        let line = serde_json::json!({ "level": level, "behind": behind });
        return print_json("finalized", &line);
    }
    println!("the store is at level {level}");
    say_behind(&behind);
    Ok(())
}

/// Waits until all hosts go by what was changed; gives the names of those that do not say so in time.
pub(crate) async fn followed(
    engine: &EngineClient,
    follows: impl Fn(&HostReport) -> bool,
) -> Result<Vec<String>> {
    let begun = Instant::now();
    loop {
        let (hosts, _) = engine.hosts().await?;
        let behind = hosts.into_iter().filter(|host| !follows(host)).map(|host| host.name);
        let behind: Vec<String> = behind.collect();
        if behind.is_empty() || begun.elapsed() > FOLLOWED {
            return Ok(behind);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

pub(crate) fn say_behind(behind: &[String]) {
    match behind {
        [] => println!("all hosts go by that"),
        behind => println!(
            "{} did not say yet to go by that: an engine that runs sees it when it reaches the store, \
             one that is started begins with it",
            behind.join(", ")
        ),
    }
}
