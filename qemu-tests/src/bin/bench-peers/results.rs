//! What was measured, run by run, and the middle of it.

use std::collections::BTreeMap;

use qemu_tests::bench::{Cost, Csv};
use qemu_tests::{Result, bench::Bench};

use crate::bitmaps::Increments;
use crate::chain::Chain;
use crate::limit::Costs;
use crate::tools::Kind;

/// What a tool did.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Step {
    /// A backup of all guests on a day, from 1, all of the images read.
    Day(usize),
    /// A restore of all guests on the last day.
    Restore,
}

impl Step {
    /// Its name in the values.
    pub(crate) fn name(self) -> String {
        match self {
            Step::Day(day) => format!("backup day {day}"),
            Step::Restore => "restore".to_owned(),
        }
    }
}

/// Everything.
pub(crate) struct Results {
    costs: BTreeMap<(Kind, Step), Vec<Cost>>,
    stored: BTreeMap<(Kind, usize), u64>,
    csv: Csv,
    /// Unique blocks as Fleece counts them, of each day.
    pub(crate) unique: Vec<u64>,
    /// `stored_bytes` as Fleece says it and bytes of the files of its store, at the end.
    pub(crate) stored_bytes: [u64; 2],
    /// The plain compressed copies, unpacked.
    pub(crate) plain: Vec<Cost>,
    /// Increments through bitmaps.
    pub(crate) increments: Vec<Increments>,
    /// Single costs.
    pub(crate) limits: Vec<Costs>,
    /// Thirty increments.
    pub(crate) chain: Chain,
    /// Commands of every tool.
    pub(crate) commands: BTreeMap<Kind, Vec<String>>,
}

impl Results {
    /// Nothing yet; runs are written to `peers-runs.csv` as they come.
    pub(crate) fn new(bench: &Bench) -> Result<Self> {
        let columns = ["tool", "step", "wall_s", "cpu_s", "anonymous_bytes", "qemu_tools_bytes"];
        Ok(Results {
            costs: BTreeMap::new(),
            stored: BTreeMap::new(),
            csv: bench.csv("runs", &columns)?,
            unique: Vec::new(),
            stored_bytes: [0; 2],
            plain: Vec::new(),
            increments: Vec::new(),
            limits: Vec::new(),
            chain: Chain::default(),
            commands: BTreeMap::new(),
        })
    }

    /// One more run of a step.
    pub(crate) fn add(&mut self, kind: Kind, step: Step, cost: Cost) -> Result {
        self.costs.entry((kind, step)).or_default().push(cost);
        self.note(kind.name(), &step.name(), cost)
    }

    /// One more line of `peers-runs.csv`.
    pub(crate) fn note(&mut self, tool: &str, step: &str, cost: Cost) -> Result {
        eprintln!("peers: {tool}, {step}: {:.2} s, CPU {:.2} s", cost.wall, cost.cpu);
        let number = |value: f64| format!("{value:.3}");
        let (memory, helpers) = (cost.memory.to_string(), cost.helpers.to_string());
        let (wall, cpu) = (number(cost.wall), number(cost.cpu));
        self.csv.row(&[tool, step, &wall, &cpu, &memory, &helpers])
    }

    /// What a tool's repository took after a day; the same in every run but for a few bytes.
    pub(crate) fn keep_stored(&mut self, kind: Kind, day: usize, bytes: u64) {
        self.stored.insert((kind, day), bytes);
    }

    /// Leaves a tool out of all tables; its runs stay in `peers-runs.csv`.
    pub(crate) fn forget(&mut self, kind: Kind) {
        self.commands.remove(&kind);
    }

    /// Bytes after a day.
    pub(crate) fn stored(&self, kind: Kind, day: usize) -> Option<u64> {
        self.stored.get(&(kind, day)).copied()
    }

    /// The middle of a step.
    pub(crate) fn cost(&self, kind: Kind, step: Step) -> Option<Cost> {
        self.costs.get(&(kind, step)).map(|runs| Cost::median(runs))
    }

    /// How often a step was run.
    pub(crate) fn runs(&self, kind: Kind, step: Step) -> usize {
        self.costs.get(&(kind, step)).map_or(0, Vec::len)
    }

    /// The tools that did a step.
    pub(crate) fn kinds(&self) -> Vec<Kind> {
        self.commands.keys().copied().collect()
    }

    /// The peer that did a step in the shortest time, and its cost.
    pub(crate) fn fastest_peer(&self, step: Step) -> Option<(Kind, Cost)> {
        let peers = self.kinds().into_iter().filter(|kind| *kind != Kind::Fleece);
        let costs = peers.filter_map(|kind| Some((kind, self.cost(kind, step)?)));
        costs.min_by(|(_, a), (_, b)| a.wall.total_cmp(&b.wall))
    }

    /// Increments of a day through bitmaps, the middle.
    pub(crate) fn increment(&self, day: usize) -> Cost {
        let runs: Vec<Cost> = self.increments.iter().map(|run| run.days[day - 2]).collect();
        Cost::median(&runs)
    }

    /// Backups of one VM with nothing dirty, the middle.
    pub(crate) fn idle(&self) -> Cost {
        let runs: Vec<Cost> = self.increments.iter().flat_map(|run| run.idle.clone()).collect();
        Cost::median(&runs)
    }
}
