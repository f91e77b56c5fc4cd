//! Disk images of VMs that are shut off: what they are, their bitmaps, and reading them.
//!
//! Images are opened by a `qemu-nbd` of our own: it knows every format, takes QEMU's locks (so no
//! VM can start on an image while it is read, and a running VM's image is refused), and reports
//! holes of sparse files, which are then never read. What it need not translate, the data of a
//! raw image, is read straight from the file ([`ImageDisk`]). On a block device the locks do not
//! suffice: there it is looked who else has it open (`in_use`).

mod aio;
mod disk;
pub(crate) mod in_use;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

use crate::error::{Context, Error, Kind, Result};
use crate::nbd::{ConnectOptions, Export, NbdTarget};
use crate::source::NbdDisk;

pub use disk::ImageDisk;

use aio::Aio;

/// Limit on a call of qemu-img; its bitmap commands rewrite metadata only.
const QEMU_IMG_LIMIT: Duration = Duration::from_secs(60);
/// Limit on qemu-nbd's start: it opens the image and listens.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Limit on qemu-nbd's end after it was told.
const END_LIMIT: Duration = Duration::from_secs(10);
/// How often we look whether it listens.
const LOOK: Duration = Duration::from_millis(5);
/// The server of a run that was killed lets go of an image in this time: it is killed too, at once.
const LET_GO: Duration = Duration::from_secs(2);
/// Between two looks whether it did.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Most that qemu-img may say; an image has 65,535 bitmaps at most, in practice a few.
const MAX_OUTPUT: u64 = 4 << 20;
/// Most that we keep of an error message.
const MAX_COMPLAINT: usize = 4096;

/// What an image is.
#[derive(Clone, Debug)]
pub struct ImageInfo {
    /// The file or device.
    pub file: PathBuf,
    /// Its format, as QEMU names it.
    pub format: String,
    /// The disk's size in bytes.
    pub size: u64,
    /// The image that it is an overlay of.
    pub backing: Option<String>,
    /// Its data are in other files: qcow2 with a data file, or a vmdk that only describes.
    pub external_data: bool,
    /// qcow2 of version 2 (`compat=0.10`), which has no bitmaps.
    pub old_version: bool,
    /// Its persistent dirty bitmaps.
    pub bitmaps: Vec<BitmapInfo>,
}

/// What the file of an image was like at a moment: where it differs later, somebody wrote to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    size: u64,
    /// Device and inode.
    file: (u64, u64),
}

/// A persistent dirty bitmap in a qcow2 image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Writers record into it.
    pub enabled: bool,
    /// It was not closed properly, or a writer has it loaded: not to be used now.
    pub in_use: bool,
}

impl ImageInfo {
    /// Looks at an image, which may be in use. Give the `format` where it is known: a guest
    /// can make the probing of a raw image find anything.
    pub async fn read(file: &Path, format: Option<&str>) -> Result<Self> {
        let mut command = qemu_img("info");
        command.args(["-U", "--output=json"]);
        if let Some(format) = format {
            command.args(["-f", format]);
        }
        let json = run(command.arg("--").arg(file), file, "look at").await?;
        let info: QemuInfo = serde_json::from_slice(&json)
            .context(|| format!("qemu-img says something strange about {}", file.display()))?;
        let data = info.format_specific.and_then(|specific| specific.data);
        let data = data.unwrap_or_default();
        let elsewhere = data.extents.iter().flatten().any(|extent| extent.filename != file);
        Ok(ImageInfo {
            file: file.to_owned(),
            format: info.format,
            size: info.virtual_size,
            backing: info.backing_filename,
            external_data: data.data_file.is_some() || elsewhere,
            old_version: data.compat.as_deref() == Some("0.10"),
            bitmaps: data.bitmaps.unwrap_or_default().into_iter().map(BitmapInfo::from).collect(),
        })
    }

    /// The bitmap of that name.
    #[must_use]
    pub fn bitmap(&self, name: &str) -> Option<&BitmapInfo> {
        self.bitmaps.iter().find(|bitmap| bitmap.name == name)
    }

    /// Whether a bitmap can be kept in it: qcow2 of version 3 only.
    #[must_use]
    pub fn can_keep_bitmaps(&self) -> bool {
        self.format == "qcow2" && !self.old_version
    }

    /// Whether it can be changed, by us as who we are.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        rustix::fs::access(&self.file, rustix::fs::Access::WRITE_OK).is_ok()
    }

    /// What its file is like now. None of a block device: its node does not tell of writes, so there
    /// only who still has it open to write is noticed, when it is opened.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn stamp(&self) -> Result<Option<Stamp>> {
        use std::os::unix::fs::MetadataExt;
        let file = std::fs::metadata(&self.file)
            .context(|| format!("cannot look at {}", self.file.display()))?;
        Ok(file.is_file().then(|| Stamp {
            modified: (file.mtime(), file.mtime_nsec()),
            size: file.size(),
            file: (file.dev(), file.ino()),
        }))
    }

    /// Changes a bitmap of the image. [`Kind::Busy`] while the image is in use, by an
    /// [`OpenImage`] of ours too.
    pub async fn change_bitmap(&self, name: &str, change: BitmapChange<'_>) -> Result<()> {
        once_free(async || self.try_change_bitmap(name, change).await).await
    }

    async fn try_change_bitmap(&self, name: &str, change: BitmapChange<'_>) -> Result<()> {
        in_use::not_written(&self.file)?;
        let mut command = qemu_img("bitmap");
        match change {
            BitmapChange::Add { granularity, enabled } => {
                command.arg("--add");
                if let Some(bytes) = granularity {
                    command.args(["-g", &bytes.to_string()]);
                }
                if !enabled {
                    command.arg("--disable");
                }
            }
            BitmapChange::Enable => drop(command.arg("--enable")),
            BitmapChange::Disable => drop(command.arg("--disable")),
            BitmapChange::Merge { from } => drop(command.args(["--merge", from])),
            BitmapChange::Remove => drop(command.arg("--remove")),
        }
        command.args(["-f", &self.format, "--"]).arg(&self.file).arg(name);
        run(&mut command, &self.file, &format!("change the bitmap {name} of")).await.map(drop)
    }
}

/// A change of a bitmap in an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BitmapChange<'a> {
    /// Makes it, empty.
    Add {
        /// Bytes for each bit; QEMU's default (the cluster size, at most 64 KiB) if not given.
        granularity: Option<u64>,
        /// Whether later writers record into it.
        enabled: bool,
    },
    /// Lets writers record into it.
    Enable,
    /// Freezes it.
    Disable,
    /// Adds what another bitmap of the image has.
    Merge {
        /// The other bitmap.
        from: &'a str,
    },
    /// Removes it; the only change possible for one that is inconsistent.
    Remove,
}

/// An image being served to us by a `qemu-nbd` of its own.
///
/// It cannot outlive us: the kernel kills it when we die (`setpriv`, because a parent-death signal
/// of our own making would need unsafe code between fork and exec); and it runs without
/// `--persistent`, so it ends when the last connection closes. An orphan would keep the VM from
/// starting.
#[derive(Debug)]
pub struct OpenImage {
    file: PathBuf,
    disk: ImageDisk,
    child: Child,
}

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// The bitmap that the disk's dirty map comes from; without one everything is dirty.
    pub bitmap: Option<String>,
    /// To restore into it; else it is opened read-only.
    pub writable: bool,
    /// Connections, memory and limits; contexts are set here.
    pub connect: ConnectOptions,
}

impl OpenImage {
    /// Serves the image and connects. [`Kind::Busy`] if a VM or another program writes to it.
    /// Call it where the runtime's thread lives as long as the program.
    pub async fn open(info: &ImageInfo, options: &OpenOptions) -> Result<Self> {
        let open = async |aio| once_free(async || Self::try_open(info, options, aio).await).await;
        if !options.writable && Aio::best().await == Aio::IoUring {
            match open(Aio::IoUring).await {
                // Kernels, containers and builds of QEMU may be without it, and say so in many ways.
                Err(error) if error.kind() != Kind::Busy => {}
                other => return other,
            }
        }
        open(Aio::Threads).await
    }

    async fn try_open(info: &ImageInfo, options: &OpenOptions, aio: Aio) -> Result<Self> {
        in_use::not_written(&info.file)?;
        let dir = PrivateDir::new()?;
        let socket = dir.0.join("nbd");
        let mut connect = options.connect.clone();
        connect.writable = options.writable;
        // One more: the connection that asks what the export is like.
        let clients = connect.connections.max(1) + 1;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "qemu-nbd"]);
        command.args(["-f", &info.format, "-x", EXPORT, "-e", &clients.to_string(), "-k"]);
        command.arg(&socket);
        if options.writable {
            command.args(["--discard=unmap", "--detect-zeroes=off"]);
        } else {
            command.arg("-r");
        }
        command.arg(format!("--aio={}", aio.word()));
        if let Some(bitmap) = &options.bitmap {
            command.args(["-B", bitmap]);
        }
        let mut child = command
            .arg("--")
            .arg(&info.file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context(|| "cannot start setpriv (Debian: package util-linux)".to_owned())?;
        wait_until_listening(&mut child, &socket, &info.file).await?;
        let target = NbdTarget::unix(socket, EXPORT);
        match NbdDisk::connect(&target, connect, options.bitmap.as_deref(), true).await {
            Ok(export) => {
                drain(child.stderr.take());
                // Nobody else is to connect, and a kill of us leaves no directory behind.
                drop(dir);
                let disk = match info.format == "raw" && !options.writable {
                    true => {
                        let (file, idle) = (&info.file, options.connect.in_flight);
                        ImageDisk::raw(export, file, child.id(), idle)?
                    }
                    false => ImageDisk::translated(export),
                };
                Ok(OpenImage { file: info.file.clone(), disk, child })
            }
            // It listens before it opens the image; why it could not, it says at its end.
            Err(error) => match timeout(END_LIMIT, child.wait()).await {
                Ok(_) => Err(refused(&info.file, "open", &complaint(child.stderr.take()).await)),
                Err(_) => Err(error.into()),
            },
        }
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &ImageDisk {
        &self.disk
    }

    /// What its `qemu-nbd` serves.
    #[must_use]
    pub fn export(&self) -> &Export {
        self.disk.export().export()
    }

    /// Whether nobody could change it until now.
    ///
    /// # Errors
    /// The `qemu-nbd` that holds QEMU's locks has ended, or another process can write to the block
    /// device ([`Kind::Busy`]).
    pub fn still_held(&mut self) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) => in_use::not_written(&self.file),
            _ => Err(Error::new(Kind::Failed, "the qemu-nbd of an image has ended")),
        }
    }

    /// Ends it and waits until the image is free again; what was written and flushed stays.
    /// Clones of its export must be gone by then: qemu-nbd ends with the last connection.
    pub async fn close(self) -> Result<()> {
        let OpenImage { disk, mut child, .. } = self;
        // It ends by itself after the last connection; then everything is written back.
        drop(disk);
        if let Ok(ended) = timeout(END_LIMIT, child.wait()).await {
            let status = ended.context(|| "cannot wait for qemu-nbd".to_owned())?;
            if status.success() {
                return Ok(());
            }
            return Err(Error::new(Kind::Failed, format!("qemu-nbd ended with {status}")));
        }
        child.kill().await.context(|| "cannot end qemu-nbd".to_owned())?;
        Err(Error::new(Kind::Failed, "qemu-nbd did not end by itself and was killed"))
    }
}

/// The name of the only export of our qemu-nbd.
const EXPORT: &str = "disk";

async fn wait_until_listening(child: &mut Child, socket: &Path, file: &Path) -> Result<()> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let ended = child.try_wait().context(|| "cannot watch qemu-nbd".to_owned())?;
        if ended.is_some() {
            let said = complaint(child.stderr.take()).await;
            return Err(refused(file, "open", &said));
        }
        if std::os::unix::net::UnixStream::connect(socket).is_ok() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let message = format!("qemu-nbd does not get {} open in time", file.display());
            return Err(Error::new(Kind::Failed, message));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Takes what qemu-nbd says later, so that it never waits for us to listen.
fn drain(stderr: Option<tokio::process::ChildStderr>) {
    if let Some(mut stderr) = stderr {
        tokio::spawn(async move { tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await });
    }
}

/// A directory for a socket, for our eyes only.
#[derive(Debug)]
struct PrivateDir(PathBuf);

impl PrivateDir {
    fn new() -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let name = format!("fleece-{}", uuid::Uuid::new_v4().simple());
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .context(|| format!("cannot make the directory {}", path.display()))?;
        Ok(PrivateDir(path))
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        // Best effort: an empty directory in /tmp harms nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Does something with an image that the server of a killed run may still hold.
async fn once_free<T>(mut work: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + LET_GO;
    loop {
        match work().await {
            Err(error) if error.kind() == Kind::Busy && Instant::now() < end => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            other => return other,
        }
    }
}

fn qemu_img(verb: &str) -> Command {
    let mut command = Command::new("qemu-img");
    command.arg(verb).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.kill_on_drop(true);
    command
}

/// Runs qemu-img to its end; what it prints.
async fn run(command: &mut Command, file: &Path, doing: &str) -> Result<Vec<u8>> {
    let mut child = command
        .spawn()
        .context(|| "cannot start qemu-img (Debian: package qemu-utils)".to_owned())?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let all = async {
        let mut out = Vec::new();
        let output = async {
            match stdout {
                Some(stdout) => stdout.take(MAX_OUTPUT).read_to_end(&mut out).await.map(drop),
                None => Ok(()),
            }
        };
        let (output, said) = tokio::join!(output, complaint(stderr));
        output?;
        std::io::Result::Ok((out, said, child.wait().await?))
    };
    let ended = timeout(QEMU_IMG_LIMIT, all).await;
    let Ok(ended) = ended else {
        let message = format!("qemu-img cannot {doing} {} in time", file.display());
        return Err(Error::new(Kind::Failed, message));
    };
    let (out, said, status) =
        ended.context(|| format!("cannot run qemu-img to {doing} {}", file.display()))?;
    if status.success() { Ok(out) } else { Err(refused(file, doing, &said)) }
}

/// The beginning of what a tool complains about; the rest is swallowed.
async fn complaint(stderr: Option<impl AsyncRead + Unpin>) -> String {
    let mut said = Vec::new();
    if let Some(mut stderr) = stderr {
        let mut beginning = (&mut stderr).take(MAX_COMPLAINT as u64);
        // Whatever could be read is better than nothing.
        let _ = beginning.read_to_end(&mut said).await;
        let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
    }
    String::from_utf8_lossy(&said).trim().replace('\n', "; ")
}

/// An error out of what a QEMU tool says.
fn refused(file: &Path, doing: &str, said: &str) -> Error {
    let name = file.display();
    if said.contains(" lock") {
        let message = format!(
            "cannot {doing} {name}: it is in use, by a running VM or another program; \
             back a running VM up through its QMP socket ({said})"
        );
        return Error::new(Kind::Busy, message);
    }
    if said.starts_with("setpriv") {
        let message = format!("cannot start qemu-nbd (Debian: package qemu-utils): {said}");
        return Error::new(Kind::Failed, message);
    }
    let kind = if said.contains("No such file") { Kind::NotFound } else { Kind::Failed };
    Error::new(kind, format!("cannot {doing} {name}: {said}"))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct QemuInfo {
    format: String,
    virtual_size: u64,
    backing_filename: Option<String>,
    format_specific: Option<QemuSpecific>,
}

#[derive(Deserialize)]
struct QemuSpecific {
    data: Option<QemuData>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct QemuData {
    compat: Option<String>,
    data_file: Option<serde_json::Value>,
    bitmaps: Option<Vec<QemuBitmap>>,
    /// Of a vmdk: the files that it consists of.
    extents: Option<Vec<QemuExtent>>,
}

#[derive(Deserialize)]
struct QemuExtent {
    filename: PathBuf,
}

#[derive(Deserialize)]
struct QemuBitmap {
    name: String,
    granularity: u64,
    #[serde(default)]
    flags: Vec<String>,
}

impl From<QemuBitmap> for BitmapInfo {
    fn from(bitmap: QemuBitmap) -> Self {
        let has = |flag: &str| bitmap.flags.iter().any(|known| known == flag);
        let (enabled, in_use) = (has("auto"), has("in-use"));
        BitmapInfo { name: bitmap.name, granularity: bitmap.granularity, enabled, in_use }
    }
}
