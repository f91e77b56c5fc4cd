//! The part `peers` of `ci/bench`: Fleece beside restic, Borg and rustic on the same guests, in the
//! same run, alternating; the floor of the size; the limit of the machine; increments, restores.

mod bitmaps;
mod chain;
mod guests;
mod limit;
mod results;
mod tables;
mod tools;

use anyhow::{Context, ensure};
use qemu_tests::Result;
use qemu_tests::bench::{Bench, Cost, blocks};

use crate::guests::{DAYS, Guests, Survey};
use crate::results::{Results, Step};
use crate::tools::{Kind, Plain, Tool};

/// Tools that are run as often as is asked for.
const ALTERNATING: [Kind; 4] = [Kind::Fleece, Kind::Restic, Kind::Borg, Kind::Rustic];

fn main() -> Result {
    let bench = Bench::from_environment("peers")?;
    let guests = Guests::find(&bench)?;
    bench.step("counting blocks");
    let survey = Survey::make(&guests)?;
    let mut results = Results::new(&bench)?;
    let mut order = Vec::new();
    let mut absent = Vec::new();
    for kind in ALTERNATING {
        match kind.version() {
            Ok(_) => order.push(kind),
            Err(error) if kind == Kind::Rustic => absent.push(format!("rustic: {error:#}")),
            Err(error) => return Err(error.context(format!("{} does not run", kind.name()))),
        }
    }

    bench.step("making plain compressed copies");
    let plain = Plain::make(&guests)?;
    for run in 0..bench.runs() {
        bench.step(&format!("run {} of {}", run + 1, bench.runs()));
        for kind in order.clone() {
            let done = round(&guests, &survey, kind, &mut results)
                .with_context(|| format!("{} in run {}", kind.name(), run + 1));
            match done {
                // It comes from no distribution, and must not cost the others their run.
                Err(error) if kind == Kind::Rustic => {
                    absent.push(format!("{error:#}"));
                    results.forget(kind);
                    order.retain(|other| *other != kind);
                }
                done => done?,
            }
        }
        // Another one begins next time.
        order.rotate_left(1);
        let cost = restore_all(&guests, run == 0, |guest, target| plain.restore(guest, target))?;
        results.plain.push(cost);
        results.note("zstd -d", "restore", cost)?;
        guests.warm(1)?;
        results.limits.push(limit::measure(&guests, &survey)?);
        let increments = bitmaps::measure(&bench, &guests, run == 0)?;
        note_increments(&mut results, &increments)?;
        results.increments.push(increments);
    }
    drop(plain);
    if !bench.quick {
        round(&guests, &survey, Kind::BorgDefault, &mut results)?;
    }
    let peers: Vec<Kind> = order.into_iter().filter(|kind| *kind != Kind::Fleece).collect();
    results.chain = chain::measure_chain(&bench, &guests, &peers)?;
    tables::write(&bench, &guests, &survey, &results, &absent)
}

/// One tool: a fresh repository, all days, a restore of the last one.
fn round(guests: &Guests, survey: &Survey, kind: Kind, results: &mut Results) -> Result {
    let mut tool = Tool::begin(kind, guests)?;
    let first = results.commands.insert(kind, tool.commands(guests)?).is_none();
    for day in 1..=DAYS {
        guests.put(day)?;
        guests.warm(day)?;
        rustix::fs::sync();
        results.add(kind, Step::Day(day), tool.backup(guests, day)?)?;
        results.keep_stored(kind, day, tool.stored()?);
        if let Tool::Fleece(fixture) = &tool
            && first
        {
            results.unique.push(fixture.figure("unique_blocks")?);
            results.stored_bytes = [fixture.figure("stored_bytes")?, tool.stored()?];
        }
    }
    ensure!(survey.days.len() == DAYS, "the survey is not complete");
    // What comes back is compared once for each tool, and every time for Fleece.
    let compare = first || kind == Kind::Fleece;
    let cost = restore_all(guests, compare, |guest, target| tool.restore(guests, guest, target))?;
    results.add(kind, Step::Restore, cost)
}

/// Restores the last day of all guests, one after the other; with `compare` against the originals.
fn restore_all(
    guests: &Guests,
    compare: bool,
    mut restore: impl FnMut(&str, &std::path::Path) -> Result<(Cost, std::path::PathBuf)>,
) -> Result<Cost> {
    let mut sum = Cost::default();
    for guest in &guests.names {
        let target = tempfile::Builder::new().prefix("restored").tempdir()?;
        rustix::fs::sync();
        let (cost, file) = restore(guest, target.path())?;
        sum = sum.then(cost);
        if compare {
            blocks::same(&guests.image(guest, DAYS), &file)?;
        }
    }
    Ok(sum)
}

fn note_increments(results: &mut Results, increments: &bitmaps::Increments) -> Result {
    results.note("Fleece", "backup day 1 of qcow2", increments.first)?;
    for (index, cost) in increments.days.iter().enumerate() {
        results.note("Fleece", &format!("backup day {} by bitmap", index + 2), *cost)?;
    }
    increments
        .idle
        .iter()
        .try_for_each(|cost| results.note("Fleece", "backup with nothing dirty", *cost))
}
