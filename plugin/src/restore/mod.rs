//! Stored disks become files, devices or a byte stream again.

mod device;
mod file;
mod qcow2;
mod stream;
mod writes;

use std::cell::Cell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::engine::{BlockTarget, Disk, DiskImage, OpenDisk, Range, Scattered, Snapshot};
use crate::error::{Context, Error, Kind, Result};
use crate::progress::{Message, Progress, Report};
use crate::units::{human_bytes, human_duration, human_rate};

pub use device::DeviceTarget;
pub use file::FileTarget;
pub use qcow2::Qcow2Target;
pub use stream::StreamTarget;

/// What the restored disk looks like.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Format {
    /// The disk's bytes, sparse.
    Raw,
    /// QEMU's image format.
    Qcow2,
}

impl Format {
    /// The usual ending of a file's name.
    #[must_use]
    pub fn extension(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// How to restore.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What to write.
    pub format: Format,
    /// Overwrite what exists.
    pub force: bool,
    /// Zeros where the store is damaged, and a list of the holes.
    pub damaged_zero: bool,
}

/// A place to restore to, checked before anything is read.
#[derive(Debug)]
pub enum Place {
    /// Standard output, or a pipe or character device.
    Stream(Option<PathBuf>),
    /// A block device.
    Device(PathBuf),
    /// A file, existing only if it may be overwritten.
    File(PathBuf),
}

impl Place {
    /// Looks at `to` and refuses what must not be overwritten or cannot hold the format.
    ///
    /// # Errors
    /// [`Kind::Target`] with the way out; nothing was changed.
    pub fn check(to: &Path, options: Options) -> Result<Place> {
        use std::os::unix::fs::FileTypeExt;
        let shown = to.display();
        let refuse = |why: &str| Err(Error::new(Kind::Target, format!("{shown} {why}")));
        let only_raw = |place| match options.format {
            Format::Raw => Ok(place),
            Format::Qcow2 => refuse("cannot hold a qcow2 image; use -O raw, or restore to a file"),
        };
        if to == Path::new("-") {
            return only_raw(Place::Stream(None));
        }
        let Ok(metadata) = std::fs::metadata(to) else {
            return Self::new_file(to, options);
        };
        let kind = metadata.file_type();
        if kind.is_dir() {
            refuse("is a folder; use --to-dir, or name a file in it")
        } else if kind.is_char_device() || kind.is_fifo() {
            only_raw(Place::Stream(Some(to.to_owned())))
        } else if kind.is_block_device() {
            match options.force {
                true => {
                    file::not_in_use(to)?;
                    only_raw(Place::Device(to.to_owned()))
                }
                false => refuse("is a block device; its contents would be lost: add --force"),
            }
        } else if !kind.is_file() {
            refuse("is neither a file nor a block device")
        } else if options.force {
            file::not_in_use(to)?;
            // The file behind a link is replaced, not the link.
            Ok(Place::File(to.canonicalize().context(|| format!("cannot resolve {shown}"))?))
        } else {
            refuse("exists; add --force to overwrite it")
        }
    }

    fn new_file(to: &Path, options: Options) -> Result<Place> {
        let (shown, folder) = (to.display(), file::folder_of(to));
        let refuse = |what: String| Err(Error::new(Kind::Target, what));
        if !folder.is_dir() {
            let folder = folder.display();
            refuse(format!("cannot create {shown}: there is no folder {folder}"))
        } else if to.is_symlink() && !options.force {
            // Its name is taken, which would be found at the end only.
            refuse(format!("{shown} is a link to nothing; add --force to overwrite it"))
        } else {
            Ok(Place::File(to.to_owned()))
        }
    }

    /// What to call it.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Place::Stream(None) => "standard output".to_owned(),
            Place::Stream(Some(path)) | Place::Device(path) | Place::File(path) => {
                path.display().to_string()
            }
        }
    }
}

/// A target that also knows how to begin and to end.
#[allow(async_fn_in_trait)]
pub trait Target: BlockTarget + Sized + 'static {
    /// Whether it needs the bytes in their order.
    const ORDERED: bool;

    /// Makes sure that what is never written reads as zeros.
    async fn prepare(&self, image: &impl DiskImage, size: u64) -> Result<()>;

    /// Everything was written; from here on the target is valid and durable.
    async fn finish(self, holes: &[Range]) -> Result<()>;
}

/// What a restore did.
#[derive(Serialize)]
pub struct Restored {
    vm: String,
    snapshot: String,
    disk: String,
    size: u64,
    target: String,
    format: &'static str,
    bytes_written: u64,
    seconds: f64,
    holes: Vec<Range>,
}

impl Message for Restored {
    const TYPE: &'static str = "restored";

    fn human(&self) -> String {
        let elapsed = Duration::from_secs_f64(self.seconds);
        let written = self.bytes_written;
        format!(
            "restored {}@{} {} ({}) to {}: {} written in {}, {}",
            self.vm,
            self.snapshot,
            self.disk,
            human_bytes(self.size),
            self.target,
            human_bytes(written),
            human_duration(elapsed),
            human_rate(written, elapsed),
        )
    }
}

/// Restores one opened disk to a checked place.
///
/// # Errors
/// Where it could not be restored whole; a new file is gone again.
pub async fn restore(
    report: &Report,
    disk: &OpenDisk,
    place: &Place,
    options: Options,
) -> Result<()> {
    let OpenDisk { snapshot, disk, image } = disk;
    let begun = Instant::now();
    let size = disk.size;
    let (written, holes) = match place {
        Place::Stream(path) => {
            let target = StreamTarget::open(path.as_deref(), size)?;
            run(report, image, disk, target, options).await
        }
        Place::Device(path) => {
            let target = DeviceTarget::open(path, size)?;
            run(report, image, disk, target, options).await
        }
        Place::File(path) => match options.format {
            Format::Raw => {
                let target = FileTarget::create(path, size, options.force)?;
                run(report, image, disk, target, options).await
            }
            Format::Qcow2 => {
                let target = Qcow2Target::create(path, size, options.force).await?;
                run(report, image, disk, target, options).await
            }
        },
    }
    .context(|| {
        format!("{}@{} {} to {}", snapshot.vm_name, snapshot.id, disk.name, place.name())
    })?;
    if !holes.is_empty() {
        let list = hole_list(place, disk);
        write_holes(&list, snapshot, disk, &holes)?;
        let bytes: u64 = holes.iter().map(|hole| hole.length).sum();
        report.warn(&format!(
            "{} of {} were damaged in the store and are zeros now; see {}",
            human_bytes(bytes),
            disk.name,
            list.display()
        ));
    }
    report.send(&Restored {
        vm: snapshot.vm_name.clone(),
        snapshot: snapshot.id.0.clone(),
        disk: disk.name.clone(),
        size,
        target: place.name(),
        format: options.format.extension(),
        bytes_written: written,
        seconds: begun.elapsed().as_secs_f64(),
        holes,
    });
    Ok(())
}

async fn run<T: Target>(
    report: &Report,
    image: &impl DiskImage,
    disk: &Disk,
    target: T,
    options: Options,
) -> Result<(u64, Vec<Range>)> {
    target.prepare(image, disk.size).await?;
    let counted = Rc::new(Counted { target, size: disk.size, written: Cell::new(0) });
    let progress = report.progress(&format!("restore {}", disk.name), disk.size);
    let stream = image.stream(Rc::clone(&counted), T::ORDERED, options.damaged_zero);
    let (sent, holes) = watch(stream, &counted, &progress).await?;
    drop(progress);
    let written = counted.written.get();
    if sent != written {
        let what = format!("the engine says that it gave {sent} bytes, and {written} came");
        return Err(Error::new(Kind::Failed, what));
    }
    let target = Rc::try_unwrap(counted)
        .map_err(|_| Error::new(Kind::Failed, "the target is still in use after the end"))?
        .target;
    target.finish(&holes).await?;
    Ok((written, holes))
}

/// Runs the stream and shows how far it is.
async fn watch<T, R>(
    stream: impl Future<Output = R>,
    counted: &Counted<T>,
    progress: &Progress<'_>,
) -> R {
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    let mut stream = std::pin::pin!(stream);
    loop {
        tokio::select! {
            result = &mut stream => return result,
            _ = ticks.tick() => progress.update(counted.written.get(), None),
        }
    }
}

/// Checks bounds and counts what goes through.
struct Counted<T> {
    target: T,
    size: u64,
    written: Cell<u64>,
}

impl<T: BlockTarget> BlockTarget for Counted<T> {
    async fn write(&self, piece: Scattered) -> Result<()> {
        let inside =
            |run: &Range| run.offset.checked_add(run.length).is_some_and(|end| end <= self.size);
        if let Some(outside) = piece.runs().iter().find(|run| !inside(run)) {
            let Range { offset, length } = outside;
            return Err(Error::new(
                Kind::Failed,
                format!("{length} bytes at {offset}, behind the disk's end"),
            ));
        }
        let length = piece.len() as u64;
        self.target.write(piece).await?;
        self.written.set(self.written.get() + length);
        Ok(())
    }

    fn file(&self) -> Option<&File> {
        self.target.file()
    }

    async fn wrote(&self, bytes: u64) -> Result<()> {
        let all = self.written.get().checked_add(bytes).filter(|all| *all <= self.size);
        let all = all.ok_or_else(|| {
            Error::new(Kind::Failed, "the engine says that it wrote more than the disk has")
        })?;
        self.target.wrote(bytes).await?;
        self.written.set(all);
        Ok(())
    }
}

fn hole_list(place: &Place, disk: &Disk) -> PathBuf {
    match place {
        Place::File(path) => {
            let mut name = path.clone().into_os_string();
            name.push(".holes");
            name.into()
        }
        Place::Stream(_) | Place::Device(_) => PathBuf::from(format!("{}.holes", safe_name(disk))),
    }
}

fn write_holes(list: &Path, snapshot: &Snapshot, disk: &Disk, holes: &[Range]) -> Result<()> {
    let mut text = format!(
        "# {}@{} {}: damaged in the store, restored as zeros\n# offset length (bytes)\n",
        snapshot.vm_name, snapshot.id, disk.name
    );
    for hole in holes {
        text.push_str(&format!("{} {}\n", hole.offset, hole.length));
    }
    std::fs::write(list, text).context(|| format!("cannot write {}", list.display()))
}

/// A disk's label as a file name; its UUID where the label would lead elsewhere.
#[must_use]
pub fn safe_name(disk: &Disk) -> String {
    let harmless = |c: char| c.is_ascii_alphanumeric() || "-_.+:".contains(c);
    match !disk.name.is_empty() && !disk.name.starts_with('.') && disk.name.chars().all(harmless) {
        true => disk.name.clone(),
        false => disk.uuid.to_string(),
    }
}

#[cfg(test)]
mod tests;
