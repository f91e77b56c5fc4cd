//! `fleece backup`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use uuid::Uuid;

use super::{Session, interrupted};
use crate::backup::{ImageOf, Options, Stop, connect_again, live, offline};
use crate::error::{Context, Error, Kind, Result};
use crate::qmp::scratch::{self, DEFAULT_DIR};
use crate::qmp::view;
use crate::units::{parse_duration, parse_size};

/// An upgrade, or a crash and the start after it, takes an engine away for seconds, one that has to
/// make its index anew for minutes; meanwhile the guest's writes fill the scratch.
const ENGINE_WAIT: &str = "10m";

/// Back up VMs: live ones through QEMU, shut-off ones from their images.
///
/// Several VMs are backed up one after the other; the worst exit code counts.
#[derive(clap::Args)]
pub(super) struct Args {
    /// VMs, by name.
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,

    /// Monitor (QMP) socket of the VM, where it is not described in the VMs' folder.
    #[arg(long, value_name = "SOCK", conflicts_with = "images")]
    qmp: Option<PathBuf>,

    /// Image of a disk of a shut-off VM; once for each disk.
    ///
    /// A FORMAT (raw, qcow2, qcow, qed, vdi, vhdx, vmdk, vpc) is believed. Without one a file
    /// named *.raw is raw; others are looked at, and what seems to be another format on a block
    /// device, or names further files (a backing file, a data file), is refused: a guest can write
    /// such a header onto a raw disk. A FILE whose name begins with such a word and a colon is written with ./
    /// before it.
    #[arg(long = "image", value_name = "DISK=[FORMAT:]FILE", conflicts_with = "freeze")]
    images: Vec<ImageArg>,

    /// Only these disks.
    #[arg(long = "disk", value_name = "DISK", conflicts_with = "exclude")]
    disks: Vec<String>,

    /// All disks but these.
    #[arg(long = "exclude-disk", value_name = "DISK")]
    exclude: Vec<String>,

    /// Freeze the guest's file systems around the point in time: `try` goes on without an
    /// agent, `require` does not.
    #[arg(long, value_name = "MODE", value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "try")]
    freeze: Option<Freeze>,

    /// Folder for the data that the guest overwrites meanwhile.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DIR)]
    scratch_dir: PathBuf,

    /// Most of it [default: 20G, or half of what is free]; past it the backup ends and the
    /// guest goes on.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    scratch_max: Option<u64>,

    /// Most bytes per second to read from the VM's disks.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    read_limit: Option<u64>,

    /// Read at full speed, also beside a busy guest: else a backup slows down (to 16 MiB a second at
    /// least) until the guest waits a tenth longer on the mean.
    #[arg(long, conflicts_with = "images")]
    no_pacing: bool,

    /// Read everything, whatever the dirty bitmaps say.
    #[arg(long)]
    full: bool,

    /// Longest time to hold a view of the disks; past it the backup ends.
    #[arg(long, value_name = "TIME", default_value = "2h", value_parser = parse_duration)]
    max_hold: Duration,

    /// How long to keep the point in time for an engine that goes away in the middle of the backup, and
    /// how long the next VM waits for one; with 0s nobody does.
    #[arg(long, value_name = "TIME", default_value = ENGINE_WAIT, value_parser = parse_wait)]
    engine_wait: Duration,

    /// Age of the last full read at which the next one is due, bitmap or not.
    #[arg(long, value_name = "TIME", default_value = "90d", value_parser = parse_duration)]
    max_age_full: Duration,

    /// Show what would be read, and change nothing.
    #[arg(long)]
    dry_run: bool,

    /// Call the VM by this name in the store.
    #[arg(long = "as", value_name = "NAME", conflicts_with = "adopt")]
    rename: Option<String>,

    /// Continue the snapshots of the VM with this UUID.
    #[arg(long, value_name = "UUID")]
    adopt: Option<Uuid>,
}

/// A duration that may be none.
fn parse_wait(text: &str) -> std::result::Result<Duration, String> {
    match text {
        "0s" => Ok(Duration::ZERO),
        _ => parse_duration(text),
    }
}

/// `DISK=FILE` or `DISK=FORMAT:FILE`.
#[derive(Clone, Debug)]
struct ImageArg(ImageOf);

/// The formats that an image can be said to have: those that QEMU keeps disks in.
const FORMATS: [&str; 8] = ["raw", "qcow2", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"];

impl FromStr for ImageArg {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (disk, image) = text.split_once('=').unwrap_or_default();
        // Any other word before a colon belongs to the file's name.
        let named = image.split_once(':').and_then(|(word, file)| {
            let format = FORMATS.into_iter().find(|format| *format == word)?;
            Some((Some(format), file))
        });
        let (format, file) = named.unwrap_or((None, image));
        if disk.is_empty() || file.is_empty() {
            return Err(format!(
                "{text:?} is not DISK=FILE or DISK=FORMAT:FILE, for example \
                 vda=/images/web1.qcow2 or vda=raw:/images/web1.img"
            ));
        }
        Ok(ImageArg(ImageOf { disk: disk.to_owned(), file: file.into(), format }))
    }
}

/// Whether the guest agent has to help.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Freeze {
    Try,
    Require,
}

pub(super) async fn run(session: &Session, args: Args) -> Result<()> {
    if args.vms.len() > 1 && (args.qmp.is_some() || !args.images.is_empty()) {
        let what = "--qmp and --image belong to one VM; back up the others in calls of their own";
        return Err(Error::new(Kind::Usage, what));
    }
    // Looked up before anything is touched, so that a typing error costs nothing.
    let mut found = Vec::new();
    if args.images.is_empty() {
        for name in &args.vms {
            found.push(session.vm(Some(name), args.qmp.as_deref())?);
        }
    }
    if args.images.is_empty() && !args.dry_run {
        scratch::ready(&args.scratch_dir)?;
    }
    let engine = session.engine().await?;
    let options = args.options(session);
    let stop = Stop::watch(interrupted());
    if let [name] = args.vms.as_slice()
        && !args.images.is_empty()
    {
        let images: Vec<ImageOf> = args.images.into_iter().map(|image| image.0).collect();
        return offline(&session.report, &engine, (name, &images), &options, &stop).await;
    }
    let mut wait = options.engine_wait;
    for (nth, vm) in found.iter().enumerate() {
        // Between two VMs nothing is undone that an error would have to tell.
        stop.check()?;
        let turn = async {
            if nth > 0 {
                connect_again((&session.report, &stop), &engine, &vm.name, wait).await?;
            }
            live(&session.report, &engine, vm, &options, &stop).await
        };
        let result = turn.await;
        // Who waited in vain did so for all that come after, too: they try once.
        let away = |error: &Error| matches!(error.kind(), Kind::NoEngine | Kind::EngineGone);
        wait = if result.as_ref().is_err_and(away) { Duration::ZERO } else { options.engine_wait };
        if let Err(error) = result.context(|| vm.name.clone()) {
            session.fail(&error);
            if error.kind() == Kind::Interrupted {
                break;
            }
        }
    }
    Ok(())
}

impl Args {
    fn options(&self, session: &Session) -> Options {
        Options {
            disks: self.disks.clone(),
            exclude: self.exclude.clone(),
            freeze: match self.freeze {
                None => view::Freeze::No,
                Some(Freeze::Try) => view::Freeze::Try,
                Some(Freeze::Require) => view::Freeze::Require,
            },
            scratch_dir: self.scratch_dir.clone(),
            scratch_max: self.scratch_max,
            read_limit: self.read_limit,
            pacing: !self.no_pacing,
            full: self.full,
            max_hold: self.max_hold,
            engine_wait: self.engine_wait,
            max_age_full: self.max_age_full,
            dry_run: self.dry_run,
            rename: self.rename.clone(),
            adopt: self.adopt,
            run_dir: session.run_dir.clone(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_image_may_have_its_format_named() {
        let parsed = |text: &str| text.parse::<ImageArg>().map(|image| image.0);
        let read = |text: &str| {
            let ImageOf { disk, file, format } = parsed(text).unwrap();
            (disk, file.display().to_string(), format)
        };
        let is = |file: &str, format| ("vda".to_owned(), file.to_owned(), format);
        assert_eq!(read("vda=/images/a.qcow2"), is("/images/a.qcow2", None));
        assert_eq!(read("vda=qcow2:/images/a.img"), is("/images/a.img", Some("qcow2")));
        assert_eq!(read("vda=raw:/dev/vg/a"), is("/dev/vg/a", Some("raw")));
        assert_eq!(read("vda=raw:a=b"), is("a=b", Some("raw")));
        // Names with colons: only a format right at the beginning counts, and only once.
        assert_eq!(read("vda=/images/raw:a"), is("/images/raw:a", None));
        assert_eq!(read("vda=./raw:a"), is("./raw:a", None));
        assert_eq!(read("vda=raw:./raw:a"), is("./raw:a", Some("raw")));
        assert_eq!(read("vda=/dev/disk/by-path/pci-0:1"), is("/dev/disk/by-path/pci-0:1", None));
        assert_eq!(read("vda=RAW:a"), is("RAW:a", None));
        assert_eq!(read("vda=rawer:a"), is("rawer:a", None));
        for wrong in ["vda", "vda=", "=a", "vda=raw:", "", "raw:a"] {
            assert!(parsed(wrong).unwrap_err().contains("DISK=FORMAT:FILE"), "{wrong}");
        }
    }
}
