//! `fleece restore`.

use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use super::{Session, SnapshotName, interrupted};
use crate::engine::{Disk, Engine, OpenDisk, Snapshot};
use crate::error::{Context, Error, Kind, Result};
use crate::restore::{Format, Options, Place, restore, safe_name};

/// Restore a disk of a snapshot, or all of them.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("target").required(true))]
pub(super) struct Args {
    /// VM (its latest snapshot), or VM@ID, VM@latest, VM@2026-11-20.
    #[arg(value_name = "VM[@ID]")]
    name: SnapshotName,

    /// File or block device to restore one disk to, or - for standard output.
    #[arg(long, value_name = "FILE|DEV|-", group = "target")]
    to: Option<PathBuf>,

    /// Folder to restore all disks to, each as a file with its name.
    #[arg(long, value_name = "DIR", group = "target")]
    to_dir: Option<PathBuf>,

    /// Disk, by name or UUID; needed with --to where there are several.
    #[arg(long, value_name = "DISK")]
    disk: Option<String>,

    /// Format of the restored disk; raw, or what the file's name says.
    #[arg(short = 'O', long, value_enum)]
    output_format: Option<Format>,

    /// Overwrite an existing file, or a block device.
    #[arg(long)]
    force: bool,

    /// What to do with damaged data: restore zeros there and list the holes in FILE.holes.
    #[arg(long, value_enum, value_name = "zero")]
    damaged: Option<Damaged>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Damaged {
    Zero,
}

impl Args {
    /// Whether standard output will carry the disk.
    pub(super) fn to_stdout(&self) -> bool {
        self.to.as_deref() == Some(Path::new("-"))
    }

    fn options(&self) -> Options {
        let by_name = |path: &PathBuf| path.extension().is_some_and(|end| end == "qcow2");
        let guessed = match self.to.as_ref().is_some_and(by_name) {
            true => Format::Qcow2,
            false => Format::Raw,
        };
        Options {
            format: self.output_format.unwrap_or(guessed),
            force: self.force,
            damaged_zero: self.damaged == Some(Damaged::Zero),
        }
    }
}

pub(super) async fn run(session: &Session, args: Args) -> Result<()> {
    let options = args.options();
    if let Some(to) = &args.to {
        named_as_written(to, options.format)?;
    }
    let work = async {
        match (&args.to, &args.to_dir) {
            (Some(to), _) => one(session, &args, to, options).await,
            (_, Some(folder)) => all(session, &args, folder, options).await,
            (None, None) => Err(Error::new(Kind::Usage, "--to or --to-dir is missing")),
        }
    };
    if args.to_stdout() {
        // A write to a pipe that nobody reads blocks us; the default action of a
        // signal ends us even then, and there is nothing to tidy up.
        return work.await;
    }
    tokio::select! {
        result = work => result,
        error = interrupted() => Err(error),
    }
}

/// A raw disk in a file called `.qcow2`, or the other way round, is a mistake that shows late.
fn named_as_written(to: &Path, format: Format) -> Result<()> {
    let other = match format {
        Format::Raw => Format::Qcow2,
        Format::Qcow2 => Format::Raw,
    };
    if to.extension().is_some_and(|end| end == other.extension()) {
        let (to, format) = (to.display(), format.extension());
        let what = format!("{to} says another format than -O {format}: change one of them");
        return Err(Error::new(Kind::Target, what));
    }
    Ok(())
}

async fn one(session: &Session, args: &Args, to: &Path, options: Options) -> Result<()> {
    let place = Place::check(to, options)?;
    let engine = session.engine().await?;
    let snapshot = resolve(&engine, &args.name).await?;
    let disks = wanted_disks(&snapshot, args.disk.as_deref())?;
    let [disk] = disks.as_slice() else {
        let (vm, names) = (&args.name.vm, names(&snapshot));
        let what =
            format!("{vm} has several disks; choose one of {names} with --disk, or use --to-dir");
        return Err(Error::new(Kind::Usage, what));
    };
    let open = open(&engine, &snapshot, disk).await?;
    restore(&session.report, &open, &place, options).await
}

/// The disks that are meant: the named one, or all.
pub(super) fn wanted_disks(snapshot: &Snapshot, wanted: Option<&str>) -> Result<Vec<Disk>> {
    let is_wanted = |disk: &&Disk| {
        wanted.is_none_or(|wanted| wanted == disk.name || wanted == disk.uuid.to_string())
    };
    let disks: Vec<Disk> = snapshot.disks.iter().filter(is_wanted).cloned().collect();
    if disks.is_empty() {
        let Snapshot { vm_name, id, .. } = snapshot;
        let (wanted, names) = (wanted.unwrap_or("at all"), names(snapshot));
        let what = format!("{vm_name}@{id} has no disk {wanted}; it has {names}");
        return Err(Error::new(Kind::NotFound, what));
    }
    Ok(disks)
}

fn names(snapshot: &Snapshot) -> String {
    snapshot.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// Opens a disk by what never changes: ids.
pub(super) async fn open(engine: &Engine, snapshot: &Snapshot, disk: &Disk) -> Result<OpenDisk> {
    engine.open_disk(&snapshot.vm.to_string(), &snapshot.id.0, &disk.uuid.to_string()).await
}

async fn all(session: &Session, args: &Args, folder: &Path, options: Options) -> Result<()> {
    let engine = session.engine().await?;
    let name = &args.name;
    let snapshot = resolve(&engine, name).await?;
    std::fs::create_dir_all(folder).map_err(|error| {
        Error::caused(Kind::Target, format!("cannot create {}", folder.display()), error)
    })?;
    let mut places = Vec::new();
    for disk in wanted_disks(&snapshot, args.disk.as_deref())? {
        let file = format!("{}.{}", safe_name(&disk), options.format.extension());
        let place = Place::check(&folder.join(file), options)?;
        places.push((disk, place));
    }
    let config = engine.vm_config(&snapshot.vm.to_string(), &snapshot.id.0).await?;
    let file = folder.join("vm-config");
    if !config.is_empty() && file.exists() && !options.force {
        let what = format!("{} exists; add --force to overwrite it", file.display());
        return Err(Error::new(Kind::Target, what));
    }
    for (disk, place) in places {
        let open = open(&engine, &snapshot, &disk).await?;
        restore(&session.report, &open, &place, options).await?;
    }
    if config.is_empty() {
        return Ok(());
    }
    write_config(&file, &config).context(|| format!("cannot write {}", file.display()))
}

/// Keeps the VM's configuration beside its disks; it can hold passwords.
fn write_config(file: &Path, config: &[u8]) -> std::io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut out = options.write(true).create(true).truncate(true).mode(0o600).open(file)?;
    out.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    out.write_all(config)
}

/// The snapshot that a name means, with its disks.
pub(super) async fn resolve(engine: &Engine, name: &SnapshotName) -> Result<Snapshot> {
    let wanted = name.snapshot.as_str();
    // The list passes over what cannot be read; asked for it, the engine says so. What is not
    // there at all is told below, with the way to what is.
    if let Err(error) = engine.vm_config(&name.vm, wanted).await
        && error.kind() == Kind::Damaged
    {
        return Err(error);
    }
    let mut snapshots = engine.snapshots(&name.vm).await?;
    let found = match wanted {
        "" | "latest" => snapshots.pop(),
        _ => {
            let day = |snapshot: &Snapshot| {
                crate::units::local_time(snapshot.time_ms).starts_with(wanted)
            };
            let dated = wanted.len() == "2026-11-20".len();
            snapshots
                .into_iter()
                .rfind(|snapshot| snapshot.id.0 == wanted || dated && day(snapshot))
        }
    };
    let shown = if wanted.is_empty() { "latest" } else { wanted };
    found.ok_or_else(|| {
        let what =
            format!("there is no snapshot {}@{shown}; see fleece snapshots {}", name.vm, name.vm);
        Error::new(Kind::NotFound, what)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_says_another_format_is_refused() {
        let refused = |to: &str, format| {
            named_as_written(Path::new(to), format).is_err_and(|e| e.kind() == Kind::Target)
        };
        assert!(refused("a.qcow2", Format::Raw));
        assert!(refused("a.raw", Format::Qcow2));
        assert!(!refused("a.qcow2", Format::Qcow2));
        assert!(!refused("a.img", Format::Qcow2));
        assert!(!refused("-", Format::Raw));
    }

    #[test]
    fn the_configuration_is_for_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vm-config");
        std::fs::write(&file, "something longer than that").unwrap();
        write_config(&file, b"secret").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"secret");
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
}
