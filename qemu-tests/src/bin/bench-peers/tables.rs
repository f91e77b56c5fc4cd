//! The report of this part, and the values of its plots.

use qemu_tests::Result;
use qemu_tests::bench::report::number;
use qemu_tests::bench::{Bench, Cost, Report, Table, Target, machine, mib, rate};
use qemu_tests::content::BLOCK;
use qemu_tests::tools;

use crate::chain::SEED;
use crate::guests::{DAYS, Guests, Survey};
use crate::limit::{self, STEPS};
use crate::results::{Results, Step};
use crate::tools::Kind;

/// Anonymous memory that engine and plugin together may take, MiB.
const MEMORY: f64 = 64.0;

/// Everything that the tables are made from.
struct Given<'a> {
    bench: &'a Bench,
    guests: &'a Guests,
    survey: &'a Survey,
    results: &'a Results,
}

/// Writes `peers.md` and the values of its plots.
pub(crate) fn write(
    bench: &Bench,
    guests: &Guests,
    survey: &Survey,
    results: &Results,
    absent: &[String],
) -> Result {
    let given = Given { bench, guests, survey, results };
    let mut report = bench.report("Fleece beside its peers")?;
    given.what_ran(&mut report, absent)?;
    given.guests(&mut report);
    given.exactness(&mut report);
    given.size(&mut report)?;
    given.backup(&mut report)?;
    given.limit(&mut report)?;
    given.restore(&mut report)?;
    given.chain(&mut report);
    given.memory(&mut report);
    bench.write(&report)
}

/// Wall time, CPU seconds, rate and memory as cells.
fn cells(cost: Cost, bytes: u64) -> [String; 4] {
    [
        format!("{} s", number(cost.wall)),
        format!("{} s", number(cost.cpu)),
        format!("{:.0} MiB/s", rate(bytes, cost.wall)),
        format!("{:.0} MiB", mib(cost.memory)),
    ]
}

/// Megabytes (10^6) a second.
fn megabytes(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { bytes as f64 / 1e6 / seconds } else { f64::NAN }
}

impl Given<'_> {
    /// Bytes that are not zero, of all guests on a day.
    fn bytes(&self, day: usize) -> u64 {
        self.survey.days[day - 1].bytes()
    }

    /// Fleece's middle cost of a step; a target about what was not measured is missed.
    fn ours(&self, step: Step) -> Cost {
        let none = Cost { wall: f64::NAN, cpu: f64::NAN, ..Cost::default() };
        self.results.cost(Kind::Fleece, step).unwrap_or(none)
    }

    /// Wall time and CPU seconds of the fastest peer, and which it is.
    fn fastest(&self, step: Step) -> (&'static str, f64, f64) {
        self.results.fastest_peer(step).map_or(("no peer", f64::NAN, f64::NAN), |(kind, cost)| {
            (kind.name(), cost.wall, cost.cpu)
        })
    }

    fn what_ran(&self, report: &mut Report, absent: &[String]) -> Result {
        report.heading("What ran");
        let mut versions = Table::new(&["tool", "version", "runs"]);
        for kind in self.results.kinds() {
            let runs = self.results.runs(kind, Step::Day(1)).to_string();
            versions.row(&[kind.name(), &kind.version()?, &runs]);
        }
        let zstd = machine::version(std::process::Command::new("zstd").arg("--version"))?;
        versions.row(&["zstd", &zstd, &self.results.plain.len().to_string()]);
        let qemu = machine::version(tools::qemu("qemu-nbd")?.arg("--version"))?;
        versions.row(&["qemu-nbd, which reads images for Fleece", &qemu, ""]);
        report.table(&versions);
        for tool in absent {
            report.text(&format!("Left out: {tool}."));
        }
        report.text(
            "Times are medians of the runs, in which the tools take turns; memory is the highest \
             peak of all runs. All tools encrypt. Before every timed command the images that it reads \
             are read once, so that they come from the page cache, and dirty pages are synced. CPU \
             seconds are user and system time of the command, its children and the engine. `$R` is a \
             fresh folder, `$T` an empty one, `current` holds the images of the day under the same \
             names every day, passwords come from the environment. Every store of Fleece ends with \
             `fleecectl verify`, and restored images are compared byte by byte with the originals.",
        );
        for (kind, commands) in &self.results.commands {
            report.text(&format!("{}:", kind.name()));
            report.commands(commands);
        }
        Ok(())
    }

    fn guests(&self, report: &mut Report) {
        report.heading("Guests");
        report.text("MiB of 4 KiB blocks that are not zero, in raw images with one ext4 (`ci/bench-guests`):");
        let days = (1..=DAYS).map(|day| format!("day {day}"));
        let mut table = Table::new(&[vec!["guest".to_owned()], days.collect()].concat());
        let row = |name: &str, value: &dyn Fn(usize) -> u64| {
            let values = (0..DAYS).map(|day| format!("{:.0}", mib(value(day))));
            [vec![name.to_owned()], values.collect()].concat()
        };
        let days = &self.survey.days;
        for (index, name) in self.guests.names.iter().enumerate() {
            table.row(&row(name, &|day| days[day].nonzero[index]));
        }
        table.row(&row("all", &|day| days[day].bytes()));
        table.row(&row("distinct, up to this day", &|day| days[day].distinct * BLOCK as u64));
        report.table(&table);
    }

    fn exactness(&self, report: &mut Report) {
        report.heading("Exactness");
        report.text(
            "Unique blocks as `fleecectl status` counts them, and distinct non-zero blocks counted by \
             the benchmark with SHA-256, from the images alone.",
        );
        let mut table = Table::new(&["", "Fleece", "counted"]);
        let mut off = 0;
        for (day, (unique, counted)) in
            self.results.unique.iter().zip(&self.survey.days).enumerate()
        {
            let row =
                [format!("day {}", day + 1), unique.to_string(), counted.distinct.to_string()];
            table.row(&row);
            off = off.max(unique.abs_diff(counted.distinct));
        }
        report.table(&table);
        let [told, found] = self.results.stored_bytes;
        report.targets(&[
            Target::at_most("blocks that they differ by, at most", off as f64, 0.0, "blocks"),
            Target::at_most(
                "`stored_bytes` and the store's files differ by",
                told.abs_diff(found) as f64,
                0.0,
                "bytes",
            ),
        ]);
    }

    fn size(&self, report: &mut Report) -> Result {
        report.heading("Size");
        report.text(
            "All files of the repository, MiB, metadata included, local caches not. The floor is the \
             distinct blocks in disk order in frames of 64 KiB, compressed by zstd 1, and nothing else.",
        );
        let kinds = self.results.kinds();
        let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
        let columns = [vec![""], names, vec!["floor"]].concat();
        let mut table = Table::new(&columns);
        let mut csv = self.bench.csv("size", &[vec!["day"], columns[1..].to_vec()].concat())?;
        for day in 1..=DAYS {
            let stored = |kind: &Kind| self.results.stored(*kind, day).map_or(f64::NAN, mib);
            let floor = mib(self.survey.days[day - 1].floor);
            let values: Vec<f64> = kinds.iter().map(stored).chain([floor]).collect();
            let values = values.iter().map(|value| format!("{value:.1}"));
            let row = [vec![format!("day {day}")], values.collect()].concat();
            table.row(&row);
            csv.row(&row)?;
        }
        report.table(&table);
        report.plot("peers-size", "size of the repositories after each day");
        let stored = |kind| self.results.stored(kind, DAYS).map_or(f64::NAN, |bytes| bytes as f64);
        let smaller = stored(Kind::Borg).min(stored(Kind::Restic));
        let floor = self.survey.days[DAYS - 1].floor as f64;
        report.targets(&[
            Target::at_most(
                "after three days, of the smaller of Borg (fixed,65536, zstd,1) and restic",
                stored(Kind::Fleece) / smaller,
                0.75,
                "×",
            ),
            Target::at_most("of the floor", stored(Kind::Fleece) / floor, 1.05, "×"),
        ]);
        Ok(())
    }

    fn backup(&self, report: &mut Report) -> Result {
        report.heading("Speed of backup");
        report.text("All of the images read; rates are bytes that are not zero.");
        let steps: Vec<Step> = (1..=DAYS).map(Step::Day).collect();
        self.step_table(report, &steps);
        report.text(
            "Increments of the same guests as shut-off qcow2 images through their dirty bitmaps. The \
             changes of the day were written to and freed in the image through `qemu-nbd`. The peers have \
             no such way: they read the raw images of that day, as above.",
        );
        let mut table = Table::new(&["", "changed", "wall", "CPU", "", "memory", "fastest peer"]);
        let mut targets =
            vec![self.faster(Step::Day(1), 3.0, "first day, wall time of the fastest peer")];
        targets.push(Target::at_most(
            "first day, CPU seconds of that peer",
            self.ours(Step::Day(1)).cpu / self.fastest(Step::Day(1)).2,
            0.5,
            "×",
        ));
        for day in 2..=DAYS {
            let cost = self.results.increment(day);
            let changed = self.results.increments.first().map_or(0, |run| run.changed[day - 2]);
            let (peer, wall, _) = self.fastest(Step::Day(day));
            let [time, cpu, _, memory] = cells(cost, changed);
            let name = format!("day {day} by bitmap");
            let fastest = format!("{peer}: {} s", number(wall));
            let changed_cell = format!("{:.0} MiB", mib(changed));
            let speed = format!("{:.0} MiB/s of changes", rate(changed, cost.wall));
            table.row(&[name, changed_cell, time, cpu, speed, memory, fastest]);
            let what = format!("day {day} by bitmap, wall time of the fastest peer");
            targets.push(Target::at_least(&what, wall / cost.wall, 10.0, "×"));
        }
        let idle = self.results.idle();
        let [time, cpu, _, memory] = cells(idle, 0);
        table.row(&["one VM, nothing dirty".into(), "0".into(), time, cpu, String::new(), memory]);
        report.table(&table);
        targets.push(Target::at_most("one VM with nothing dirty", idle.wall, 0.2, "s"));
        report.plot("peers-backup", "seconds of backups");
        report.targets(&targets);
        self.backup_values(&steps)
    }

    /// One table of several steps, the tools below each other.
    fn step_table(&self, report: &mut Report, steps: &[Step]) {
        let mut table = Table::new(&["", "tool", "wall", "CPU", "", "memory", "wall ÷ Fleece's"]);
        for step in steps {
            let bytes = if let Step::Day(day) = step { self.bytes(*day) } else { self.bytes(DAYS) };
            for kind in self.results.kinds() {
                let Some(cost) = self.results.cost(kind, *step) else { continue };
                let ratio = format!("{:.2}", cost.wall / self.ours(*step).wall);
                let row = [
                    vec![step.name(), kind.name().to_owned()],
                    cells(cost, bytes).to_vec(),
                    vec![ratio],
                ];
                table.row(&row.concat());
            }
        }
        report.table(&table);
    }

    /// How much faster than the fastest peer a step is.
    fn faster(&self, step: Step, bound: f64, what: &str) -> Target {
        let (peer, wall, _) = self.fastest(step);
        Target::at_least(&format!("{what} ({peer})"), wall / self.ours(step).wall, bound, "×")
    }

    /// `peers-backup.csv`: seconds, a line for each kind of backup.
    fn backup_values(&self, steps: &[Step]) -> Result {
        let kinds = self.results.kinds();
        let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
        let columns = [vec!["backup"], names, vec!["Fleece by bitmap"]].concat();
        let mut csv = self.bench.csv("backup", &columns)?;
        for (index, step) in steps.iter().enumerate() {
            let day = index + 1;
            let mut row = vec![format!("day {day}")];
            row.extend(kinds.iter().map(|kind| seconds(self.results.cost(*kind, *step))));
            row.push(if day == 1 {
                String::new()
            } else {
                seconds(Some(self.results.increment(day)))
            });
            csv.row(&row)?;
        }
        Ok(())
    }

    fn limit(&self, report: &mut Report) -> Result {
        report.heading("The limit of this machine");
        report.text(
            "What the steps of the first backup cost by themselves: one thread, nothing else running, \
             over the same images in the page cache (the copy: CPU seconds of both ends of a UNIX \
             socket, for the new blocks and 20 bytes for every block; the write: one file and one fsync). \
             The limit is their sum spread over the cores.",
        );
        let costs = limit::medians(&self.results.limits);
        let mut table = Table::new(&["step", "seconds"]);
        let mut csv = self.bench.csv("limit", &["step", "seconds"])?;
        for (step, cost) in STEPS.iter().zip(costs) {
            table.row(&[step, number(cost).as_str()]);
            csv.row(&[step.to_string(), format!("{cost:.3}")])?;
        }
        table.row(&["sum".to_owned(), number(costs.iter().sum())]);
        let limit = limit::seconds(&costs)?;
        table.row(&[format!("limit: spread over {} cores", limit::cores()?), number(limit)]);
        let ours = self.ours(Step::Day(1));
        table.row(&["Fleece, first day: wall".to_owned(), number(ours.wall)]);
        table.row(&["Fleece, first day: CPU seconds".to_owned(), number(ours.cpu)]);
        report.table(&table);
        report.plot("peers-limit", "seconds of the single steps");
        report.targets(&[Target::at_least("of the limit's rate", limit / ours.wall, 0.7, "×")]);
        Ok(())
    }

    fn restore(&self, report: &mut Report) -> Result {
        report.heading("Restore");
        report.text(
            "All guests of the last day, one after the other, into raw files; rates are bytes that are \
             not zero. A restore ends when the file is on the disk: Fleece syncs it before it says so, after \
             the others it is synced, and that time is theirs. `zstd -d` unpacks a plain compressed copy of \
             each image (`zstd -1`), into a sparse file as well.",
        );
        self.step_table(report, &[Step::Restore]);
        let plain = Cost::median(&self.results.plain);
        let [wall, cpu, speed, memory] = cells(plain, self.bytes(DAYS));
        report.text(&format!("`zstd -d`: {wall}, CPU {cpu}, {speed}, memory {memory}."));
        let ours = self.ours(Step::Restore).wall;
        let speed = megabytes(self.bytes(DAYS), ours);
        report.targets(&[
            self.faster(Step::Restore, 2.0, "wall time of the fastest peer"),
            Target::at_least("wall time of `zstd -d`", plain.wall / ours, 1.0, "×"),
            Target::at_least("rate of data that is not zero", speed, 800.0, "MB/s"),
        ]);
        report.plot("peers-restore", "rates of restores");
        let mut csv = self.bench.csv("restore", &["tool", "MB/s"])?;
        for kind in self.results.kinds() {
            let wall = self.results.cost(kind, Step::Restore).map_or(f64::NAN, |cost| cost.wall);
            csv.row(&[
                kind.name().to_owned(),
                format!("{:.1}", megabytes(self.bytes(DAYS), wall)),
            ])?;
        }
        csv.row(&["zstd -d".to_owned(), format!("{:.1}", megabytes(self.bytes(DAYS), plain.wall))])
    }

    fn chain(&self, report: &mut Report) {
        let chain = &self.results.chain;
        report.heading(&format!("After {} increments", chain.increments));
        report.text(&format!(
            "The guest `{}` as qcow2, changed in 1,000 random blocks of 4 KiB before each backup (seed \
             {SEED}; the bitmap's pieces are 64 KiB, so each reads up to 16 times as much). One \
             increment took {} s.",
            chain.guest,
            number(chain.increment)
        ));
        self.little_changed(report);
        let mut table = Table::new(&["restored", "wall", "CPU", "", "memory", "MB/s"]);
        let mut targets = Vec::new();
        let names = ["before the increments", "the newest snapshot", "the oldest snapshot"];
        for ((name, cost), bytes) in names.iter().zip(chain.restores).zip(chain.bytes) {
            let speed = megabytes(bytes, cost.wall);
            let name = (*name).to_owned();
            table.row(
                &[vec![name.clone()], cells(cost, bytes).to_vec(), vec![number(speed)]].concat(),
            );
            if name != names[0] {
                // 70 % of the 800 MB/s that every restore is asked for.
                targets.push(Target::at_least(&name, speed, 560.0, "MB/s"));
            }
        }
        report.table(&table);
        report.targets(&targets);
        let served = &chain.served;
        report.text("The newest snapshot read through `fleece serve`:");
        let mut table = Table::new(&["reads", "result"]);
        let rows = [
            ("random 4 KiB, one reader", format!("{:.0} reads/s", served.single)),
            (
                "random 4 KiB, one reader, time of a read",
                format!("p50 {} ms, p99 {} ms", number(served.p50), number(served.p99)),
            ),
            ("random 4 KiB, 16 readers", format!("{:.0} reads/s", served.many)),
            (
                "from beginning to end (`nbdcopy URI null:`)",
                format!("{:.0} MiB/s that are not zero", served.sequential),
            ),
        ];
        for (what, result) in rows {
            table.row(&[what, result.as_str()]);
        }
        report.table(&table);
    }

    /// One increment of the chain beside the peers.
    fn little_changed(&self, report: &mut Report) {
        let chain = &self.results.chain;
        report.text(
            "The peers on the first of these increments, once each: the raw image before it is in \
             their repository, and they read the one after it, from the page cache.",
        );
        let mut table = Table::new(&["tool", "wall", "wall ÷ Fleece's"]);
        table.row(&["Fleece".to_owned(), format!("{} s", number(chain.first)), "1.00".into()]);
        for (kind, cost) in &chain.peers {
            let ratio = format!("{:.2}", cost.wall / chain.first);
            table.row(&[kind.name().to_owned(), format!("{} s", number(cost.wall)), ratio]);
        }
        report.table(&table);
        let fastest = chain.peers.iter().map(|(_, cost)| cost.wall).fold(f64::INFINITY, f64::min);
        report.targets(&[Target::at_least(
            "1,000 blocks changed, wall time of the fastest peer",
            fastest / chain.first,
            10.0,
            "×",
        )]);
    }

    fn memory(&self, report: &mut Report) {
        report.heading("Memory");
        report.text(
            "Highest anonymous memory (RssAnon, summed at one instant) in any run. Fleece's is engine \
             and plugin together; the `qemu-nbd` that reads a shut-off image for it is QEMU's and stands \
             beside it.",
        );
        let steps: Vec<Step> = (1..=DAYS).map(Step::Day).chain([Step::Restore]).collect();
        let names = steps.iter().map(|step| step.name());
        let mut table = Table::new(&[vec![String::new()], names.collect()].concat());
        for kind in self.results.kinds() {
            let peaks = steps.iter().map(|step| {
                self.results.cost(kind, *step).map_or_else(String::new, |cost| match cost.helpers {
                    0 => format!("{:.1} MiB", mib(cost.memory)),
                    helpers => format!("{:.1} MiB (+ {:.1})", mib(cost.memory), mib(helpers)),
                })
            });
            table.row(&[vec![kind.name().to_owned()], peaks.collect()].concat());
        }
        report.table(&table);
        let increments = (2..=DAYS).map(|day| self.results.increment(day));
        let others = increments.chain([self.results.idle()]).chain(self.results.chain.restores);
        let peaks = steps.iter().map(|step| self.ours(*step)).chain(others);
        let peak = peaks.map(|cost| cost.memory).max().unwrap_or(0);
        report.targets(&[Target::at_most(
            "engine and plugin, in all of the above",
            mib(peak),
            MEMORY,
            "MiB",
        )]);
    }
}

/// Seconds as a value; empty where there is none.
fn seconds(cost: Option<Cost>) -> String {
    cost.map_or_else(String::new, |cost| format!("{:.3}", cost.wall))
}
