//! A guest of our own under a real QEMU: Debian's cloud kernel, a tiny initramfs, and a program
//! that obeys lines on its serial console (`guest/main.rs`).

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde_json::json;
use uuid::Uuid;

use crate::process::Running;
use crate::qmp::Qmp;
use crate::wait::{SOON, wait_for, wait_until};
use crate::{Result, image, tools};

/// A disk of a machine.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The device's id, and its name in the guest: `vda`, `vdb`, … in order.
    pub name: String,
    /// The image.
    pub path: PathBuf,
    /// `qcow2` or `raw`.
    pub format: String,
    /// Is it served by a thread of its own?
    pub iothread: bool,
    /// Bytes per second that whoever uses it has together, where that is less than it could.
    pub throttled: Option<u64>,
    /// What a write that fails does (`werror`), where it is not the default.
    pub on_error: Option<&'static str>,
}

/// What a guest is made of; starting it again is a restart.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The VM's name.
    pub name: String,
    /// The VM's UUID.
    pub uuid: Uuid,
    /// Where its images and sockets are.
    pub folder: PathBuf,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Does it have a guest agent's channel?
    pub agent: bool,
    /// An initramfs of its own, where that of `ci/setup` lacks something.
    pub initramfs: Option<PathBuf>,
    /// MiB of memory.
    pub memory: u32,
}

/// A running machine.
pub struct Guest {
    /// QEMU itself.
    pub qemu: Running,
    /// The harness's own monitor.
    pub qmp: Qmp,
    console: BufReader<UnixStream>,
}

impl Machine {
    /// A machine without disks; its files go to a folder of its name.
    ///
    /// # Errors
    /// The system's.
    pub fn new(folder: &Path, name: &str) -> Result<Self> {
        let folder = folder.join(name);
        fs::create_dir_all(&folder)?;
        Ok(Machine {
            name: name.into(),
            uuid: Uuid::new_v4(),
            folder,
            disks: Vec::new(),
            agent: false,
            initramfs: None,
            memory: 128,
        })
    }

    /// Adds an empty disk.
    ///
    /// # Errors
    /// qemu-img's.
    pub fn with_disk(self, format: &str, size: u64) -> Result<Self> {
        let name = self.next_name();
        let path = self.folder.join(format!("{name}.{format}"));
        image::create(&path, format, size)?;
        Ok(self.with_image(&path, format))
    }

    /// Adds a disk whose image is there.
    #[must_use]
    pub fn with_image(mut self, path: &Path, format: &str) -> Self {
        let name = self.next_name();
        let (path, format) = (path.into(), format.into());
        self.disks.push(Disk {
            name,
            path,
            format,
            iothread: false,
            throttled: None,
            on_error: None,
        });
        self
    }

    /// Gives the last disk an iothread.
    #[must_use]
    pub fn with_iothread(mut self) -> Self {
        if let Some(disk) = self.disks.last_mut() {
            disk.iothread = true;
        }
        self
    }

    /// Says what a write of the last disk that fails does (`werror`).
    #[must_use]
    pub fn on_error(mut self, what: &'static str) -> Self {
        if let Some(disk) = self.disks.last_mut() {
            disk.on_error = Some(what);
        }
        self
    }

    /// Makes the last disk slow: the guest, and who reads its view, share so many bytes per second.
    #[must_use]
    pub fn throttled(mut self, bytes_per_second: u64) -> Self {
        if let Some(disk) = self.disks.last_mut() {
            disk.throttled = Some(bytes_per_second);
        }
        self
    }

    /// Gives the machine a guest agent.
    #[must_use]
    pub fn with_agent(mut self) -> Self {
        self.agent = true;
        self
    }

    fn next_name(&self) -> String {
        format!("vd{}", char::from(b'a' + self.disks.len() as u8))
    }

    /// The monitor that Fleece is given.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join("qmp")
    }

    /// The nodes that are the guest's own.
    #[must_use]
    pub fn nodes(&self) -> Vec<String> {
        self.disks
            .iter()
            .flat_map(|Disk { name, .. }| {
                ["node", "file", "slow"].map(|part| format!("{name}-{part}"))
            })
            .collect()
    }

    /// Starts it and waits until the program inside is ready.
    ///
    /// # Errors
    /// QEMU's, or that the guest does not come up.
    pub fn start(&self) -> Result<Guest> {
        let mut command = tools::qemu("qemu-system-x86_64")?;
        let guest = tools::cache().join("guest");
        let share = tools::qemu_folder().join("usr");
        for folder in ["share/qemu", "share/seabios", "lib/ipxe/qemu"] {
            command.arg("-L").arg(share.join(folder));
        }
        command.args("-machine pc -accel tcg -nodefaults -no-user-config -display none".split(' '));
        command.args(["-m", &self.memory.to_string()]);
        command.args(["-name", &self.name, "-uuid", &self.uuid.to_string(), "-no-reboot"]);
        command.arg("-kernel").arg(guest.join("vmlinuz"));
        let usual = guest.join(if self.agent { "initramfs-agent" } else { "initramfs" });
        command.arg("-initrd").arg(self.initramfs.as_ref().unwrap_or(&usual));
        // On a host that is busy with something else the timer's self-test fails, and panics.
        command.args(["-append", "console=ttyS1 quiet panic=-1 no_timer_check"]);
        for name in ["console", "qmp", "monitor"] {
            let path = self.folder.join(name);
            let _ = fs::remove_file(&path);
            command
                .arg("-chardev")
                .arg(format!("socket,id={name},path={},server=on,wait=off", path.display()));
        }
        command.args(["-serial", "chardev:console", "-mon", "chardev=qmp,mode=control"]);
        command.args(["-mon", "chardev=monitor,mode=control"]);
        command.arg("-serial").arg(format!("file:{}", self.folder.join("kernel.log").display()));
        for disk in &self.disks {
            command.args(disk.arguments());
        }
        if self.agent {
            let path = self.folder.join("agent");
            let _ = fs::remove_file(&path);
            command
                .arg("-chardev")
                .arg(format!("socket,id=qga0,path={},server=on,wait=off", path.display()));
            command.args(["-device", "virtio-serial-pci"]);
            command.args(["-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"]);
        }
        self.connect(Running::start(&format!("QEMU of {}", self.name), &mut command)?)
    }

    fn connect(&self, qemu: Running) -> Result<Guest> {
        let path = self.folder.join("console");
        let console = wait_for(SOON, &format!("{}'s console", self.name), || {
            Ok(UnixStream::connect(&path).ok())
        })
        .with_context(|| qemu.printed())?;
        console.set_read_timeout(Some(SOON))?;
        let qmp = Qmp::connect(&self.folder.join("monitor"))?;
        let mut guest = Guest { qemu, qmp, console: BufReader::new(console) };
        let kernel = || fs::read_to_string(self.folder.join("kernel.log")).unwrap_or_default();
        while guest
            .line()
            .with_context(|| format!("{} coming up; its kernel: {}", self.name, kernel()))?
            != "ready"
        {}
        if self.agent {
            guest.obey("agent")?;
        }
        Ok(guest)
    }
}

impl Disk {
    fn arguments(&self) -> Vec<String> {
        let Disk { name, format, .. } = self;
        let path = self.path.display();
        let mut arguments = vec![
            "-blockdev".into(),
            format!("driver=file,node-name={name}-file,filename={path},discard=unmap"),
        ];
        let mut file = format!("{name}-file");
        if let Some(rate) = self.throttled {
            let group = format!("throttle-group,id={name}-rate,x-bps-total={rate}");
            let slow = format!(
                "driver=throttle,node-name={name}-slow,throttle-group={name}-rate,file={file}"
            );
            arguments.extend(["-object".into(), group, "-blockdev".into(), slow]);
            file = format!("{name}-slow");
        }
        // Where its host is slow to flush, that is all that the guest would wait for.
        let flush = if self.throttled.is_some() { ",cache.no-flush=on" } else { "" };
        let image =
            format!("driver={format},node-name={name}-node,file={file},discard=unmap{flush}");
        arguments.extend(["-blockdev".into(), image]);
        let mut device = format!("virtio-blk-pci,id={name},drive={name}-node");
        if self.iothread {
            arguments.extend(["-object".into(), format!("iothread,id={name}-io")]);
            device.push_str(&format!(",iothread={name}-io"));
        }
        if let Some(what) = self.on_error {
            device.push_str(&format!(",werror={what}"));
        }
        arguments.extend(["-device".into(), device]);
        arguments
    }
}

impl Guest {
    /// Has the guest obey a line (see `guest/main.rs`) and gives its answer without the `ok`.
    ///
    /// # Errors
    /// The guest's `err`, or that it does not answer.
    pub fn obey(&mut self, line: &str) -> Result<String> {
        self.send(line)?;
        self.answer(line)
    }

    /// Sends a line without waiting for its answer.
    ///
    /// # Errors
    /// The connection's.
    pub fn send(&mut self, line: &str) -> Result {
        Ok(self.console.get_mut().write_all(format!("{line}\n").as_bytes())?)
    }

    /// Waits for the answer to a line that was sent.
    ///
    /// # Errors
    /// As [`Guest::obey`].
    pub fn answer(&mut self, line: &str) -> Result<String> {
        let answer = self.line().with_context(|| format!("the guest obeying '{line}'"))?;
        Ok(answer.strip_prefix("ok").with_context(|| answer.clone())?.trim().into())
    }

    /// How many records its writer has written; fails with the writer's error.
    ///
    /// # Errors
    /// As [`Guest::obey`].
    pub fn written(&mut self) -> Result<u64> {
        Ok(self.obey("count")?.parse()?)
    }

    /// Asserts that its writer gets on: the guest is well.
    ///
    /// # Errors
    /// When it does not in time, or met an error.
    pub fn keeps_writing(&mut self) -> Result {
        let before = self.written()?;
        wait_for(SOON, "the guest's writer getting on", || {
            Ok((self.written()? > before + 3).then_some(()))
        })
    }

    /// Stops the guest's processors.
    ///
    /// # Errors
    /// QEMU's.
    pub fn pause(&mut self) -> Result {
        self.qmp.execute("stop", &json!({}))?;
        Ok(())
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// QEMU's.
    pub fn go_on(&mut self) -> Result {
        self.qmp.execute("cont", &json!({}))?;
        Ok(())
    }

    /// Asserts that a backup left nothing behind in QEMU: no job, export, node or server; at most
    /// `bitmaps` bitmaps of Fleece's, and the guest runs.
    ///
    /// # Errors
    /// What is left, when it does not go within a bound.
    pub fn is_left_alone(&mut self, machine: &Machine, bitmaps: usize) -> Result {
        let mut left = Vec::new();
        let gone = wait_until(SOON, "QEMU being as it was", || {
            left = self.qmp.leftovers(&machine.nodes())?;
            if !self.qmp.runs()? {
                left.push(format!("the guest is {}", self.qmp.status()?));
            }
            let found = self.qmp.bitmaps()?;
            if found.len() > bitmaps {
                left.push(format!("bitmaps {found:?}"));
            }
            Ok(left.is_empty())
        });
        gone.with_context(|| left.join(", "))
    }

    /// Powers it off from inside and waits for QEMU's end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn power_off(mut self) -> Result {
        self.send("poweroff")?;
        self.qemu.finish(SOON)?;
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let length =
            self.console.read_line(&mut line).context("reading from the guest's console")?;
        ensure!(length > 0, "QEMU closed the console: {}", self.qemu.printed());
        Ok(line.trim().into())
    }
}
