//! The part `detection` of `ci/bench`: passes over an index of 64 M entries that lies cold on the
//! disk, in 64 MiB of memory with its page cache.

use serde_json::Value;

use qemu_tests::bench::detect::{Detection, figure, sum};
use qemu_tests::bench::report::number;
use qemu_tests::bench::{Bench, Cgroup, Csv, Table, Target, median};
use qemu_tests::{MIB, Result};

/// Memory of everything, page cache included.
const LIMIT: u64 = 64 * MIB;
/// Asked: fingerprints per second with learning and merging, 20 % new.
const TARGET_NEW: f64 = 500_000.0;
/// Asked: fingerprints per second where nothing is new.
const TARGET_KNOWN: f64 = 1_000_000.0;

/// How large everything is.
struct Sizes {
    entries: u64,
    requests: u64,
    batches: u64,
    /// Requests of the smallest and of the largest batch on the curve.
    curve: (u64, u64),
}

impl Sizes {
    fn of(bench: &Bench) -> Self {
        if bench.quick {
            let (entries, requests) = (2_000_000, 200_000);
            return Sizes { entries, requests, batches: 3, curve: (1_000, 64_000) };
        }
        let (entries, requests) = (64_000_000, 4_000_000);
        Sizes { entries, requests, batches: 10, curve: (1_000, 16_384_000) }
    }
}

fn main() -> Result {
    let bench = Bench::from_environment("detection")?;
    let sizes = Sizes::of(&bench);
    let folder = tempfile::Builder::new().prefix("fleece-index").tempdir()?;
    let index = folder.path().join("index");
    let of = |requests, new, batches| Detection {
        index: &index,
        entries: sizes.entries,
        requests,
        new,
        batches,
        store: None,
    };
    bench.step(&format!("building an index of {} entries", sizes.entries));
    // One request besides: the whole call is shown to work before the long ones.
    of(1, 0, 1).run(None)?;

    let mut report = bench.report("Detection")?;
    let group = Cgroup::limited("detection", LIMIT)?;
    report.text(&format!(
        "The detector of the engine alone (`engine/examples/detect_speed.rs`), an index of {} M \
         entries, dropped from the page cache before every batch; the process in a {}. A batch is timed from the \
         first request to the last verdict; `with merges` adds learning all new ones and merging until \
         nothing was left to merge. The index is opened anew for each table, so the first pass over each \
         partition also checks its checksum.",
        sizes.entries as f64 / 1e6,
        group.describe()
    ));
    report.commands(&[format!(
        "detect_speed {}",
        of(sizes.requests, 20, sizes.batches).arguments().join(" ")
    )]);

    bench.step("curve");
    report.heading("From seeks to sweeps");
    report.plot("detection-curve", "fingerprints per second over requests of a batch");
    report.table(&curve(&bench, &sizes, &of, &group)?);

    bench.step("nothing new");
    let known = of(sizes.requests, 0, sizes.batches.min(3)).run(Some(&group))?;
    report.heading("Nothing new");
    report.table(&table(&known, None)?);
    bench.step("20 % new");
    let new = of(sizes.requests, 20, sizes.batches).run(Some(&group))?;
    report.heading("20 % new");
    let names = ["batch", "detecting", "learning", "merging", "fp_per_s", "fp_per_s_with_merges"];
    report.table(&table(&new, Some(bench.csv("batches", &names)?))?);
    report.text(&format!(
        "Over all batches {} MiB were read and {} MiB written; what is still in deltas at the end is merged into \
         the bases by later batches.",
        number(sum(&new, "read_mib")?),
        number(sum(&new, "written_mib")?)
    ));

    report.heading("Targets");
    let anonymous = new.iter().chain(&known).map(|batch| figure(batch, "anonymous_mib"));
    let anonymous = anonymous.collect::<Result<Vec<_>>>()?.into_iter().fold(0.0, f64::max);
    report.targets(&[
        Target::at_least("20 % new, all merges included", with_merges(&new)?, TARGET_NEW, "fp/s"),
        Target::at_least("nothing new", detecting(&known)?, TARGET_KNOWN, "fp/s"),
        Target::at_most("processes killed for memory", group.killed()? as f64, 0.0, ""),
        Target::at_most("memory with page cache", group.peak()? as f64 / MIB as f64, 64.0, "MiB"),
        Target::at_most("anonymous memory", anonymous, 32.0, "MiB"),
    ]);
    bench.write(&report)
}

/// Fingerprints per second over all batches, until their verdicts.
fn detecting(batches: &[Value]) -> Result<f64> {
    Ok(sum(batches, "requests")? / sum(batches, "detecting")?)
}

/// The same with learning and merging.
fn with_merges(batches: &[Value]) -> Result<f64> {
    let seconds = ["detecting", "learning", "merging"].map(|name| sum(batches, name));
    Ok(sum(batches, "requests")? / seconds.into_iter().sum::<Result<f64>>()?)
}

/// Nothing new, batches of ever more requests.
fn curve<'a>(
    bench: &Bench,
    sizes: &Sizes,
    of: &impl Fn(u64, u64, u64) -> Detection<'a>,
    group: &Cgroup,
) -> Result<Table> {
    let mut csv = bench.csv("curve", &["requests", "fingerprints per second"])?;
    let mut table = Table::new(&["requests", "fp/s", "s", "MiB read"]);
    let mut requests = sizes.curve.0;
    while requests <= sizes.curve.1 {
        // The first batch after opening checks every run: the others are what a running engine has.
        let batches = of(requests, 0, 1 + bench.runs() as u64).run(Some(group))?;
        let each =
            |name| batches.iter().skip(1).map(|b| figure(b, name)).collect::<Result<Vec<_>>>();
        let (seconds, read) = (median(&each("detecting")?), median(&each("read_mib")?));
        let rate = requests as f64 / seconds;
        csv.row(&[requests.to_string(), format!("{rate:.0}")])?;
        table.row(&[requests.to_string(), number(rate), number(seconds), number(read)]);
        requests *= 4;
    }
    Ok(table)
}

fn table(batches: &[Value], mut csv: Option<Csv>) -> Result<Table> {
    let mut table = Table::new(&[
        "batch",
        "new",
        "fp/s",
        "fp/s with merges",
        "detecting s",
        "learning s",
        "merging s",
        "longest step s",
        "anonymous MiB",
        "entries after it",
    ]);
    for (at, batch) in batches.iter().enumerate() {
        let one = std::slice::from_ref(batch);
        let (alone, all) = (detecting(one)?, with_merges(one)?);
        let mut cells = vec![(at + 1).to_string(), number(figure(batch, "granted")?)];
        cells.extend([number(alone), number(all)]);
        for name in ["detecting", "learning", "merging", "longest_step", "anonymous_mib", "entries"]
        {
            cells.push(number(figure(batch, name)?));
        }
        table.row(&cells);
        if let Some(csv) = &mut csv {
            let mut values = vec![(at + 1).to_string()];
            for name in ["detecting", "learning", "merging"] {
                values.push(figure(batch, name)?.to_string());
            }
            values.extend([format!("{alone:.0}"), format!("{all:.0}")]);
            csv.row(&values)?;
        }
    }
    let mut cells = vec!["all".to_owned(), number(sum(batches, "granted")?)];
    cells.extend([number(detecting(batches)?), number(with_merges(batches)?)]);
    table.row(&cells);
    Ok(table)
}
