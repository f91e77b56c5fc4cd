//! The tools that are compared, each with the same three verbs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use qemu_tests::bench::{Cost, machine, measure};
use qemu_tests::{Fixture, Result, tools};
use tempfile::TempDir;

use crate::guests::{DAYS, Guests};

/// How long one command may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(3600);

/// Which tool.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Kind {
    Fleece,
    Restic,
    /// Fixed pieces of 64 KiB, zstd 1.
    Borg,
    /// As it comes: content-defined pieces, lz4.
    BorgDefault,
    Rustic,
}

impl Kind {
    /// Its column.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Fleece => "Fleece",
            Kind::Restic => "restic",
            Kind::Borg => "Borg",
            Kind::BorgDefault => "Borg as it comes",
            Kind::Rustic => "rustic",
        }
    }

    /// The program, ready for arguments.
    fn program(self) -> Result<Command> {
        Ok(match self {
            Kind::Fleece => tools::fleece("fleece")?,
            Kind::Restic => Command::new("restic"),
            Kind::Borg | Kind::BorgDefault => Command::new("borg"),
            Kind::Rustic => Command::new(tools::cache().join("tools/bin/rustic")),
        })
    }

    /// What it calls its version; an error where it is not installed.
    pub(crate) fn version(self) -> Result<String> {
        let built = self != Kind::Rustic || Path::new(self.program()?.get_program()).exists();
        ensure!(built, "ci/bench has not been able to build it");
        let argument = if self == Kind::Restic { "version" } else { "--version" };
        machine::version(self.program()?.arg(argument))
    }
}

/// What a tool is told to do.
enum Verb<'a> {
    Init,
    Backup { day: usize },
    Restore { guest: &'a str, target: &'a Path },
}

/// A tool at work on a fresh repository, which goes with it.
pub(crate) enum Tool {
    Fleece(Box<Fixture>),
    Peer(Peer),
}

/// One of the others.
pub(crate) struct Peer {
    kind: Kind,
    folder: TempDir,
}

impl Tool {
    /// A fresh repository.
    pub(crate) fn begin(kind: Kind, guests: &Guests) -> Result<Self> {
        if kind == Kind::Fleece {
            return Ok(Tool::Fleece(Box::new(Fixture::new()?)));
        }
        let peer = Peer { kind, folder: tempfile::Builder::new().prefix("peer").tempdir()? };
        tools::run(&mut peer.command(guests, &Verb::Init)?)?;
        Ok(Tool::Peer(peer))
    }

    /// Backs up all guests at a day: the peers all in one call, Fleece one call for each VM.
    pub(crate) fn backup(&mut self, guests: &Guests, day: usize) -> Result<Cost> {
        match self {
            Tool::Fleece(fixture) => {
                let mut sum = Cost::default();
                for name in &guests.names {
                    sum = sum.then(backup_image(fixture, name, &guests.image(name, day))?.0);
                }
                Ok(sum)
            }
            Tool::Peer(peer) => {
                let mut command = peer.command(guests, &Verb::Backup { day })?;
                Ok(measure(peer.kind.name(), &mut command, &[], LIMIT)?.0)
            }
        }
    }

    /// Restores the last day of one guest below a folder; the file that came.
    pub(crate) fn restore(
        &mut self,
        guests: &Guests,
        guest: &str,
        target: &Path,
    ) -> Result<(Cost, PathBuf)> {
        match self {
            Tool::Fleece(fixture) => {
                let file = target.join(format!("{guest}.raw"));
                Ok((restore_image(fixture, &format!("{guest}@latest"), &file)?, file))
            }
            Tool::Peer(peer) => {
                let mut command = peer.command(guests, &Verb::Restore { guest, target })?;
                let (cost, _) = measure(peer.kind.name(), &mut command, &[], LIMIT)?;
                let name = format!("{guest}.raw");
                let file = find(target, &name)?
                    .with_context(|| format!("{} restored no {name}", peer.kind.name()))?;
                Ok((until_durable(cost, &file)?, file))
            }
        }
    }

    /// Bytes of all files of the repository: metadata included, local caches and keys not.
    pub(crate) fn stored(&self) -> Result<u64> {
        match self {
            Tool::Fleece(fixture) => bytes_below(&fixture.path("store")),
            Tool::Peer(peer) => bytes_below(&peer.repository()),
        }
    }

    /// The commands as a reader can repeat them.
    pub(crate) fn commands(&self, guests: &Guests) -> Result<Vec<String>> {
        let Tool::Peer(peer) = self else {
            return Ok([
                "fleecectl init --store $R/store --config $R/engine.toml",
                "fleece-engine --config $R/engine.toml --state-dir $R/state --memory-budget 32M &",
                "fleece backup NAME --image vda=$GUESTS/NAME/dayN.raw        # each guest, one after the other",
                "fleece restore NAME@latest --to $T/NAME.raw -O raw          # each guest",
            ]
            .map(str::to_owned)
            .to_vec());
        };
        let target = Path::new("$T");
        let verbs = [Verb::Init, Verb::Backup { day: 1 }, Verb::Restore { guest: "NAME", target }];
        verbs.iter().map(|verb| Ok(peer.shown(&peer.command(guests, verb)?))).collect()
    }
}

/// One backup with Fleece of a shut-off VM; and what it printed.
pub(crate) fn backup_image(
    fixture: &mut Fixture,
    vm: &str,
    image: &Path,
) -> Result<(Cost, String)> {
    let engine = fixture.engine()?.pid();
    let mut command =
        fixture.fleece_command(&["backup", vm, &format!("--image=vda={}", image.display())])?;
    let (cost, finished) = measure("fleece backup", &mut command, &[engine], LIMIT)?;
    Ok((cost, finished.printed()))
}

/// One restore with Fleece into a raw file.
pub(crate) fn restore_image(fixture: &mut Fixture, snapshot: &str, to: &Path) -> Result<Cost> {
    let engine = fixture.engine()?.pid();
    let mut command = fixture.fleece_command(&["restore", snapshot, "-O", "raw", "--to"])?;
    Ok(measure("fleece restore", command.arg(to), &[engine], LIMIT)?.0)
}

impl Peer {
    fn repository(&self) -> PathBuf {
        self.folder.path().join("repository")
    }

    /// The command for a verb. Backups read `current/` in the guests' folder.
    fn command(&self, guests: &Guests, verb: &Verb<'_>) -> Result<Command> {
        let mut command = self.kind.program()?;
        self.environment(&mut command);
        let folder = match verb {
            Verb::Restore { target, .. } if self.kind != Kind::Restic => target,
            _ => guests.folder(),
        };
        // `$T` of the printed commands is no folder.
        if folder.exists() {
            command.current_dir(folder);
        }
        match self.kind {
            Kind::Borg | Kind::BorgDefault => self.borg(&mut command, verb),
            Kind::Restic => restic(&mut command, verb),
            _ => rustic(&mut command, verb),
        }
        Ok(command)
    }

    fn environment(&self, command: &mut Command) {
        let (base, repository) = (self.folder.path(), self.repository());
        match self.kind {
            Kind::Borg | Kind::BorgDefault => {
                command.env("BORG_PASSPHRASE", "bench").env("BORG_BASE_DIR", base);
            }
            Kind::Restic => {
                command.env("RESTIC_PASSWORD", "bench").env("RESTIC_REPOSITORY", repository);
                command.env("RESTIC_CACHE_DIR", base.join("cache"));
            }
            _ => {
                command.env("RUSTIC_PASSWORD", "bench").env("RUSTIC_REPOSITORY", repository);
                command
                    .env("RUSTIC_CACHE_DIR", base.join("cache"))
                    .env("RUSTIC_NO_PROGRESS", "true");
            }
        }
    }

    fn borg(&self, command: &mut Command, verb: &Verb<'_>) {
        let repository = self.repository().display().to_string();
        match verb {
            Verb::Init => command.args(["init", "--encryption", "repokey"]).arg(repository),
            Verb::Backup { day } => {
                command.arg("create");
                if self.kind == Kind::Borg {
                    command.args(["--sparse", "--chunker-params", "fixed,65536", "-C", "zstd,1"]);
                }
                command.arg(format!("{repository}::day{day}")).arg("current")
            }
            Verb::Restore { guest, .. } => command
                .args(["extract", "--sparse"])
                .arg(format!("{repository}::day{DAYS}"))
                .arg(format!("current/{guest}.raw")),
        };
    }

    /// The command with `$R` for the repository's folder.
    fn shown(&self, command: &Command) -> String {
        let base = self.folder.path().display().to_string();
        let program = Path::new(command.get_program()).file_name().unwrap_or_default();
        let words = command.get_args().map(|word| word.to_string_lossy().replace(&base, "$R"));
        format!("{} {}", program.to_string_lossy(), words.collect::<Vec<_>>().join(" "))
    }
}

fn restic(command: &mut Command, verb: &Verb<'_>) {
    match verb {
        Verb::Init => command.args(["init", "--repository-version", "2"]),
        Verb::Backup { .. } => command.args(["backup", "--quiet", "current"]),
        Verb::Restore { guest, target } => command
            .args(["restore", "latest", "--quiet", "--include", &format!("/current/{guest}.raw")])
            .arg("--target")
            .arg(target),
    };
}

fn rustic(command: &mut Command, verb: &Verb<'_>) {
    match verb {
        Verb::Init => command.arg("init"),
        Verb::Backup { .. } => command.args(["backup", "current"]),
        Verb::Restore { guest, .. } => command
            .arg("restore")
            .arg(format!("latest:current/{guest}.raw"))
            .arg(format!("{guest}.raw")),
    };
}

/// Bytes of all files below a folder, as long as they are (not as the file system rounds them).
pub(crate) fn bytes_below(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?
    {
        let entry = entry?;
        let kind = entry.file_type()?;
        bytes += if kind.is_dir() { bytes_below(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(bytes)
}

/// A file of this name below a folder.
fn find(folder: &Path, name: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if let Some(found) = find(&path, name)? {
                return Ok(Some(found));
            }
        } else if entry.file_name() == name {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// A plain compressed copy of every guest's last day, to be unpacked with `zstd -d`: no backup,
/// but what a restore should not be slower than.
pub(crate) struct Plain {
    folder: TempDir,
}

impl Plain {
    /// Compresses all guests.
    pub(crate) fn make(guests: &Guests) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("plain").tempdir()?;
        for name in &guests.names {
            let mut command = Command::new("zstd");
            command.args(["-q", "-1", "-T0"]).arg(guests.image(name, DAYS));
            tools::run(command.arg("-o").arg(folder.path().join(format!("{name}.zst"))))?;
        }
        Ok(Plain { folder })
    }

    /// Unpacks one.
    pub(crate) fn restore(&self, guest: &str, target: &Path) -> Result<(Cost, PathBuf)> {
        let from = self.folder.path().join(format!("{guest}.zst"));
        ensure!(from.exists(), "{} is missing", from.display());
        let file = target.join(format!("{guest}.raw"));
        let mut command = Command::new("zstd");
        command.args(["-q", "-d"]).arg(from).arg("-o").arg(&file);
        let (cost, _) = measure("zstd -d", &mut command, &[], LIMIT)?;
        Ok((until_durable(cost, &file)?, file))
    }
}

/// Adds the time until a file is on the disk: Fleece syncs what it restores, the others leave that
/// to whoever calls them.
fn until_durable(mut cost: Cost, file: &Path) -> Result<Cost> {
    let begun = Instant::now();
    fs::File::open(file)?.sync_all().context("cannot sync a restored file")?;
    cost.wall += begun.elapsed().as_secs_f64();
    Ok(cost)
}
