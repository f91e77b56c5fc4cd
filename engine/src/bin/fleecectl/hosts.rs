//! `fleecectl hosts`, `partitions`, `rebalance` and `drain`: the cluster, as its engines tell it.

use std::path::Path;

use fleece_engine::error::{Error, Kind, Result};
use fleece_engine::hosts::HostReport;

use super::report::{human, print_json, with_engine};

/// Slices in a line of the map.
const LINE: usize = 64;

pub(crate) fn hosts(socket: &Path, json: bool) -> Result<()> {
    let (hosts, _) = with_engine(socket, async |engine| engine.hosts().await)?;
    if json {
        return hosts.iter().try_for_each(|host| print_json("host", host));
    }
    println!(
        "{:16} {:8} {:>8} {:>7} {:>12} {:>10} {:>9} {:>9}  version",
        "host", "state", "capacity", "share", "blocks", "index", "backups", "memory"
    );
    for host in &hosts {
        let share = format!("{:.1} %", host.slices as f64 * 100.0 / 4096.0);
        let (name, state, capacity) = (&host.name, &host.state, host.capacity);
        if !host.answers() {
            println!("{name:16} {state:8} {capacity:>8} {share:>7}  at {}", host.address);
            continue;
        }
        println!(
            "{name:16} {state:8} {capacity:>8} {share:>7} {:>12} {:>10} {:>9} {:>9}  {}{}",
            host.unique_blocks,
            human(host.index_bytes),
            host.sessions,
            human(host.peak_anonymous),
            host.version,
            if host.index_epoch == host.map_epoch { "" } else { ", its index is being filled" },
        );
    }
    Ok(())
}

pub(crate) fn partitions(socket: &Path, map: bool, json: bool) -> Result<()> {
    let (hosts, owners) = with_engine(socket, async |engine| engine.hosts().await)?;
    if json {
        for host in &hosts {
            for partition in &host.partitions {
                let line = serde_json::json!({ "owner": host.name, "of": partition });
                print_json("partition", &line)?;
            }
        }
        return if map {
            print_json("map", &serde_json::json!({ "owners": owners }))
        } else {
            Ok(())
        };
    }
    if map {
        draw(&hosts, &owners);
        return Ok(());
    }
    println!(
        "{:16} {:>9} {:>12} {:>10} {:>8}  last pass",
        "owner", "partition", "blocks", "bytes", "waiting"
    );
    for host in &hosts {
        if host.partitions.is_empty() {
            println!("{:16} {}", host.name, host.state);
        }
        for one in &host.partitions {
            let last = match one.last_pass_ms {
                Some(ms) => format!("{} s ago", ms / 1000),
                None => "–".into(),
            };
            println!(
                "{:16} {:>9} {:>12} {:>10} {:>8}  {last}",
                host.name,
                one.partition,
                one.entries,
                human(one.bytes),
                one.waiting
            );
        }
    }
    Ok(())
}

/// A sign for each slice: whose it is.
fn draw(hosts: &[HostReport], owners: &[u8]) {
    const SIGNS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let sign = |number: u8| char::from(SIGNS[usize::from(number) % SIGNS.len()]);
    for line in owners.chunks(LINE) {
        println!("{}", line.iter().map(|owner| sign(*owner)).collect::<String>());
    }
    for host in hosts {
        println!(
            "{} {} ({} of {} slices)",
            sign(host.number as u8),
            host.name,
            host.slices,
            owners.len()
        );
    }
}

/// What a new map would move. There is nothing else to do: maps are made by the engines themselves.
pub(crate) fn rebalance(
    socket: &Path,
    dry_run: bool,
    without: Option<&str>,
    json: bool,
) -> Result<()> {
    if !dry_run {
        let what = "nothing is to be done: shares follow the hosts that live, their capacity \
                    (cluster.capacity) and fleecectl drain by themselves. --dry-run says what would move";
        return Err(Error::new(Kind::Usage, what));
    }
    let plan = with_engine(socket, async |engine| engine.rebalance(without).await)?;
    if json {
        plan.hosts.iter().try_for_each(|share| print_json("share", share))?;
        let total = serde_json::json!({
            "map_epoch": plan.map_epoch,
            "slices_moving": plan.slices_moving,
            "blocks_moving": plan.blocks_moving,
        });
        return print_json("rebalance", &total);
    }
    println!(
        "{:16} {:>8} {:>8} {:>8} {:>14} {:>14}",
        "host", "capacity", "now", "then", "gets", "gives"
    );
    let percent = |slices: usize| format!("{:.1} %", slices as f64 * 100.0 / 4096.0);
    for share in &plan.hosts {
        println!(
            "{:16} {:>8} {:>8} {:>8} {:>14} {:>14}",
            share.name,
            share.capacity,
            percent(share.slices),
            percent(share.slices_then),
            share.blocks_gained,
            share.blocks_given
        );
    }
    match plan.slices_moving {
        0 => println!("nothing would move"),
        moving => println!(
            "{} of the fingerprints, about {} blocks, would move to other hosts' indexes; nothing was changed",
            percent(moving),
            plan.blocks_moving
        ),
    }
    Ok(())
}

pub(crate) fn drain(socket: &Path, host: &str, undo: bool, json: bool) -> Result<()> {
    with_engine(socket, async |engine| engine.drain(host, !undo).await)?;
    if json {
        let line = serde_json::json!({ "host": host, "drained": !undo });
        return print_json("drain", &line);
    }
    if undo {
        println!("{host} gets its share again; fleecectl hosts shows when its index is filled");
    } else {
        println!(
            "{host} will own nothing; fleecectl hosts shows when the others have filled theirs"
        );
    }
    Ok(())
}
