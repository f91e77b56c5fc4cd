//! The part `scale` of `ci/bench`: a cluster of up to 100 engines in one process, and what follows from
//! it for VMs of full size.

use qemu_tests::Result;
use qemu_tests::bench::report::{Report, number};
use qemu_tests::bench::scale::{Model, Rounds, Run, SCALE, call, line};
use qemu_tests::bench::{Bench, Table, Target};

/// Asked: full deduplication makes what dirty bitmaps leave so many times smaller, within a tenth.
const REDUCTION: f64 = 4.5;
/// Asked of the step from the fewest engines to the most: this part of what is ideal.
const LINEAR: f64 = 0.9;
/// Asked of the exchange, bytes for a request.
const BYTES: f64 = 44.0;

/// What the paper says of its 100 machines.
mod paper {
    /// GB a second of all machines.
    pub(crate) const THROUGHPUT: f64 = 8.76;
    pub(crate) const MACHINES: f64 = 100.0;
    /// MB of a machine.
    pub(crate) const MEMORY: f64 = 35.0;
    /// GB of a machine.
    pub(crate) const DISK: f64 = 8.0;
    /// Of one core of a machine, at most.
    pub(crate) const CORE: f64 = 0.13;
}

/// How large everything is.
struct Sizes {
    engines: &'static [usize],
    snapshots: usize,
    /// Entries of the index that the model's constants come from.
    large: u64,
}

impl Sizes {
    fn of(bench: &Bench) -> Self {
        if bench.quick {
            return Sizes { engines: &[4, 8], snapshots: 3, large: 800_000 };
        }
        Sizes { engines: &[10, 30, 100], snapshots: 10, large: 16_000_000 }
    }
}

fn main() -> Result {
    let bench = Bench::from_environment("scale")?;
    let sizes = Sizes::of(&bench);
    let mut report = bench.report("Scale")?;
    report.text(
        "A cluster in one process (`engine/examples/cluster_scale`): for every engine the real `Cluster` (map, \
         outboxes, frames) and the real `Detector` (logs, passes, index, merges), driven by one thread; frames \
         are carried from one to the other by hand. Every engine has 25 VMs of 40 GB at 1/1000 of their size: \
         10,240 blocks of 4 KiB. The first snapshot of a VM asks about all of them, every later one about \
         24 %: dirty bitmaps leave the other 76 % out. Of what is asked about, a part is new, half of the rest is the \
         same as one of the VM's own blocks, half comes from a pool that all VMs share, in which the block of rank r \
         comes with a probability proportional to 1/r.",
    );
    report.text(
        "What an engine costs is the processor time of its own stages, as if each had a machine of its own with one \
         core; the cluster is done when the busiest engine is. Not simulated, and in no figure: reading and hashing \
         blocks, packing and storing them, checking verdicts against directories, TLS and the system calls of the \
         network, waiting for disks. The settings are the engine's, but for the memtable: of 4,096 entries instead of \
         65,536, since at 1/1000 of the size nothing would ever be merged otherwise. Containers have 4,096 blocks, of all \
         VMs of an engine, so that there are as many for a block as at full size. All VMs of a round are backed up \
         at once, and rounds follow one another.",
    );
    let calls: Vec<Vec<String>> = sizes
        .engines
        .iter()
        .map(|engines| vec![engines.to_string(), sizes.snapshots.to_string()])
        .collect();
    let constants = vec![format!("--constants={}", sizes.large)];
    let commands = calls.iter().chain([&constants]);
    let commands: Vec<_> =
        commands.map(|words| format!("cluster_scale {}", words.join(" "))).collect();
    report.commands(&commands);
    let mut runs = Vec::new();
    for words in &calls {
        bench.step(&format!("{} engines", words[0]));
        runs.push(Run(line(&call(words)?, "run")?));
    }
    bench.step("costs on larger indexes");
    let larger = line(&call(&constants)?, "constants")?;
    let [fewest, .., most] = &runs[..] else { return Ok(()) };
    exactness(&mut report, &runs)?;
    speed(&bench, &mut report, &runs)?;
    stages(&mut report, fewest, most)?;
    resources(&mut report, &runs)?;
    balance(&mut report, &runs)?;
    let model = Model::new(most, &larger)?;
    full_size(&mut report, &model, &larger)?;
    beside(&mut report, most, &model)?;
    report.heading("Targets");
    report.targets(&targets(fewest, most, &runs, &model)?);
    bench.write(&report)
}

fn targets(fewest: &Run, most: &Run, runs: &[Run], model: &Model) -> Result<Vec<Target>> {
    let inexact = runs.iter().map(Run::inexact).sum::<Result<f64>>()?;
    let (few, many) = (fewest.get("/engines")?, most.get("/engines")?);
    let speedup = most.throughput(Rounds::All)? / fewest.throughput(Rounds::All)?;
    let later = most.throughput(Rounds::Later)? / fewest.throughput(Rounds::Later)?;
    let ideal = many / few;
    let share = model.of_a_core(paper::THROUGHPUT * 1e9 / paper::MACHINES);
    Ok(vec![
        Target::at_most("stored twice, missed, wrong or unexplained, all runs", inexact, 0.0, ""),
        Target::at_least("reduction of what is asked", most.reduction()?, REDUCTION * 0.9, "x"),
        Target::at_most("reduction of what is asked", most.reduction()?, REDUCTION * 1.1, "x"),
        Target::at_least(
            &format!("speed-up from {few} to {many} engines, all rounds"),
            speedup,
            ideal * LINEAR,
            "x",
        ),
        Target::at_least(
            &format!("speed-up from {few} to {many} engines, later rounds"),
            later,
            ideal * LINEAR,
            "x",
        ),
        Target::at_most("network, a block asked about", most.bytes_a_block()?, BYTES, "B"),
        Target::at_most(
            "at full size: of a core at the paper's rate",
            share * 100.0,
            paper::CORE * 100.0,
            "%",
        ),
        Target::at_most("at full size: index of an engine", model.index() / 1e9, paper::DISK, "GB"),
    ])
}

fn exactness(report: &mut Report, runs: &[Run]) -> Result {
    report.heading("Exactness");
    report.text(
        "Counted by the simulation itself, in a bit for each content that there can be: what was asked about, \
         and what was granted. Every address that a session was told is compared with what was stored there.",
    );
    let mut table = Table::new(&[
        "engines",
        "VMs",
        "blocks of all snapshots, M",
        "asked, M",
        "distinct",
        "granted",
        "in the indexes",
        "stored twice",
        "undetected",
        "wrong addresses",
        "asked / distinct",
    ]);
    for run in runs {
        let count = |path: &str| Ok::<_, anyhow::Error>(format!("{:.0}", run.get(path)?));
        let million = |path: &str| Ok::<_, anyhow::Error>(number(run.get(path)? / 1e6));
        table.row(&[
            count("/engines")?,
            count("/vms")?,
            million("/logical_blocks")?,
            million("/asked")?,
            count("/distinct")?,
            count("/granted")?,
            count("/entries")?,
            count("/doubles")?,
            count("/undetected")?,
            count("/wrong")?,
            number(run.reduction()?),
        ]);
    }
    report.table(&table);
    Ok(())
}

fn speed(bench: &Bench, report: &mut Report, runs: &[Run]) -> Result {
    report.heading("Speed");
    report.text(
        "GB/s: all blocks of all snapshots, what dirty bitmaps leave out included, over the processor time of the \
         busiest engine. Requests a second: blocks asked about over the mean time of an engine. Later rounds are \
         those after the first, a day's work; `ideal` is the fewest engines' throughput times as many engines.",
    );
    report.plot("scale-throughput", "GB/s of the cluster over engines");
    let mut table = Table::new(&[
        "engines",
        "rounds",
        "busiest engine s",
        "mean s",
        "blocks asked a second and engine",
        "GB/s",
        "speed-up",
        "ideal",
    ]);
    let mut csv = bench.csv("throughput", &["engines", "all rounds", "later rounds", "ideal"])?;
    let Some(fewest) = runs.first() else { return Ok(()) };
    for run in runs {
        let times = run.get("/engines")? / fewest.get("/engines")?;
        for rounds in [Rounds::All, Rounds::Later] {
            table.row(&[
                number(run.get("/engines")?),
                if rounds == Rounds::All { "all" } else { "later" }.to_owned(),
                number(run.seconds(rounds, "all", "max")?),
                number(run.seconds(rounds, "all", "mean")?),
                number(run.requests_a_second(rounds)?),
                number(run.throughput(rounds)?),
                number(run.throughput(rounds)? / fewest.throughput(rounds)?),
                number(times),
            ]);
        }
        csv.row(&[
            run.get("/engines")?.to_string(),
            number(run.throughput(Rounds::All)?),
            number(run.throughput(Rounds::Later)?),
            number(fewest.throughput(Rounds::All)? * times),
        ])?;
    }
    report.table(&table);
    Ok(())
}

/// Stages as the example names them, and what they are.
const STAGES: [(&str, &str); 10] = [
    ("ask", "batches split by owner and encoded"),
    ("send", "frames out of outboxes"),
    ("receive", "frames read: questions, verdicts, what others learned"),
    ("log", "questions into the logs of partitions"),
    ("pass", "passes; verdicts into outboxes and sheets"),
    ("settle", "a session's answers sorted and read"),
    ("tell", "what is stored, split by owner and encoded"),
    ("learn", "what was stored into the memtable, young runs"),
    ("merge", "runs merged"),
    ("sessions", "sessions begin, wait, end"),
];

fn stages(report: &mut Report, fewest: &Run, most: &Run) -> Result {
    let (few, many) = (fewest.get("/engines")?, most.get("/engines")?);
    report.heading("Stages");
    report.text(&format!(
        "All rounds: processor time of an engine, and of each block that it asked about. Logs, passes, merges and a \
         session's answers are as much work for an engine with {few} engines as with {many}. Where they cost more \
         with {many}, it is the smaller messages, and that all engines use the caches of one processor in turns, \
         which machines of their own would not do; the two are not told apart here.",
    ));
    let more = format!("ns a block, {few} engines");
    let columns =
        ["stage", "", "mean s", "most s", "of all", &format!("ns a block, {many} engines"), &more];
    let mut table = Table::new(&columns);
    let all = most.seconds(Rounds::All, "all", "mean")?;
    let each = |run: &Run, stage| {
        let blocks = run.asked(Rounds::All)? / run.get("/engines")?;
        Ok::<_, anyhow::Error>(run.seconds(Rounds::All, stage, "mean")? * 1e9 / blocks)
    };
    for (stage, what) in STAGES.iter().copied().chain([("all", "")]) {
        let mean = most.seconds(Rounds::All, stage, "mean")?;
        table.row(&[
            stage.to_owned(),
            what.to_owned(),
            number(mean),
            number(most.seconds(Rounds::All, stage, "max")?),
            format!("{:.0} %", mean / all * 100.0),
            number(each(most, stage)?),
            number(each(fewest, stage)?),
        ]);
    }
    report.table(&table);
    Ok(())
}

fn resources(report: &mut Report, runs: &[Run]) -> Result {
    report.heading("Network, disk, memory");
    report.text(
        "Network: payloads of frames, without TLS, TCP and the RPC around them (`cluster.md` has a measurement \
         with all of these); each byte once, where it is sent. Disk: files of index, logs and pending grants of an engine \
         at the ends of scans and rounds; unlinked sort files are not in it. Memory: the peak of anonymous memory of \
         the whole process, less what the simulation itself remembers, divided by the engines. As they \
         pass one after the other, a pass's buffers are in it once and not once for each: it is not what one engine \
         takes. What a real engine takes with 100 hosts is measured in `cluster.md`, its budget in `memory.md`.",
    );
    let mut table = Table::new(&[
        "engines",
        "B a block asked",
        "of it asking",
        "answering",
        "learning",
        "the rest",
        "B a frame",
        "disk MB, mean",
        "most",
        "index MB, mean",
        "memory MB an engine",
        "process MB",
        "of it the simulation's",
    ]);
    for run in runs {
        let asked = run.asked(Rounds::All)?;
        let bytes =
            |kind: &str| Ok::<_, anyhow::Error>(run.get(&format!("/network/{kind}"))? / asked);
        let mb = |path: &str| Ok::<_, anyhow::Error>(run.get(path)? / 1e6);
        let own = mb("/anonymous_bytes")? - mb("/driver_bytes")?;
        let cells = [
            run.get("/engines")?,
            run.bytes_a_block()?,
            bytes("asking")?,
            bytes("answering")?,
            bytes("learning")?,
            bytes("ending")?,
            run.bytes_a_block()? * asked / run.get("/network/frames")?,
            mb("/disk_bytes/mean")?,
            mb("/disk_bytes/max")?,
            mb("/index_bytes/mean")?,
            own / run.get("/engines")?,
            mb("/anonymous_bytes")?,
            mb("/driver_bytes")?,
        ];
        table.row(&cells.map(number));
    }
    report.table(&table);
    Ok(())
}

fn balance(report: &mut Report, runs: &[Run]) -> Result {
    report.heading("Balance");
    report.text(
        "The most over the mean, all rounds: 1 is even. Slices: what the map gives to each host. Partitions: entries of \
         all partitions of all hosts (16 each), and of the largest partition of a host over that host's mean, as the \
         mean of hosts.",
    );
    let columns = [
        "engines",
        "slices",
        "entries",
        "requests",
        "sent",
        "received",
        "time",
        "partitions",
        "within a host",
    ];
    let mut table = Table::new(&columns);
    for run in runs {
        let cells = [
            run.get("/engines")?,
            run.get("/balance/slices/imbalance")?,
            run.get("/balance/entries/imbalance")?,
            run.get("/balance/requests/imbalance")?,
            run.get("/network/sent/imbalance")?,
            run.get("/network/received/imbalance")?,
            run.seconds(Rounds::All, "all", "imbalance")?,
            run.get("/balance/partitions/imbalance")?,
            run.get("/balance/partitions_within_host/mean")?,
        ];
        table.row(&cells.map(number));
    }
    report.table(&table);
    Ok(())
}

fn full_size(report: &mut Report, model: &Model, larger: &serde_json::Value) -> Result {
    report.heading("A model of the full size");
    report.text(&format!(
        "One incremental round of an engine whose VMs have {SCALE} times the blocks. Everything that is done for a block \
         costs what it cost above with the most engines. Passes, learning and merging cost what they cost on indexes of {} and {} \
         entries with the engine's own settings and {} requests at once (the difference of the two is the sweep), \
         new entries learned as one of 100 hosts learns them; larger indexes than these were not run.",
        larger["entries"][0], larger["entries"][1], larger["requests"],
    ));
    report.commands(&[
        "swept     = asked × again / 262,144 × entries / 16        every pass over a partition steps over all of it",
        "processor = asked × (ask + send + receive + settle) + asked × again × (log + pass) + swept × sweep",
        "            + new × (tell + learn + merge) + sessions",
        "busiest   = processor × uneven",
    ]);
    let mut table = Table::new(&["constant", "", "measured", "unit"]);
    for constant in model.constants() {
        let cells = [
            constant.name.into(),
            constant.what.into(),
            number(constant.value),
            constant.unit.into(),
        ];
        table.row::<String>(&cells);
    }
    report.table(&table);
    let mut table = Table::new(&["of an engine in a round", "", ""]);
    let hashing = larger["hash_ns"].as_f64().unwrap_or(f64::NAN) * model.asked / 1e9;
    let rows = [
        ("blocks of its VMs", model.logical / 1e6, "M"),
        ("asked about", model.asked / 1e6, "M"),
        ("new", model.new / 1e6, "M"),
        ("entries of the index after the last round", model.entries / 1e6, "M"),
        ("entries swept", model.swept() / 1e9, "G"),
        ("processor", model.processor(), "s"),
        ("busiest engine", model.busiest(), "s"),
        ("beside it, fingerprints of what is asked (in the plugins)", hashing, "s"),
        ("index", model.index() / 1e9, "GB"),
        ("read by sweeps", model.read() / 1e9, "GB"),
        ("network, sent and received", model.network() / 1e9, "GB"),
    ];
    for (what, value, unit) in rows {
        table.row(&[what.to_owned(), number(value), unit.to_owned()]);
    }
    report.table(&table);
    Ok(())
}

fn beside(report: &mut Report, most: &Run, model: &Model) -> Result {
    report.heading("Beside the paper");
    let rate = paper::THROUGHPUT * 1e9 / paper::MACHINES;
    report.text(&format!(
        "Zhang, Yang, Narayanasamy and Tang, HotStorage 2013, 100 machines. Its throughput is that of a whole \
         backup under limits on disk and processor; ours is what detection allows for, with one core of every machine, \
         when nothing else is slower. So the share of a core at the paper's own rate, {} MB/s of each machine, is what \
         compares best; it, too, is of detection only.",
        number(rate / 1e6)
    ));
    let mut table = Table::new(&["100 machines", "paper", "simulated, 1/1000", "model, full size"]);
    let own = (most.get("/anonymous_bytes")? - most.get("/driver_bytes")?) / 1e6;
    let engines = most.get("/engines")?;
    let mut row = |what: &str, paper: String, simulated: String, model: String| {
        table.row(&[what.to_owned(), paper, simulated, model]);
    };
    row(
        "GB/s in all, later rounds",
        number(paper::THROUGHPUT),
        number(most.throughput(Rounds::Later)?),
        number(model.throughput(paper::MACHINES)),
    );
    row(
        "of one core, at the paper's rate",
        format!("10 to {:.0} %", paper::CORE * 100.0),
        String::new(),
        format!("{:.1} %", model.of_a_core(rate) * 100.0),
    );
    row(
        "local disk of a machine",
        format!("{} GB", number(paper::DISK)),
        format!("{} MB", number(most.get("/disk_bytes/mean")? / 1e6)),
        format!("{} GB of index", number(model.index() / 1e9)),
    );
    row(
        "memory of a machine",
        format!("{} MB", number(paper::MEMORY)),
        format!("{} MB, of one process", number(own / engines)),
        "its budget, 32 MiB".to_owned(),
    );
    report.table(&table);
    Ok(())
}
