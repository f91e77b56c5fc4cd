//! A real QEMU without a guest: its firmware idles, and `qemu-io` writes through the disk's device
//! as a guest would. Everything is bounded, and ended by its process id.

#![allow(
    dead_code,
    clippy::needless_pass_by_value,
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub
)]

use fleece::qmp::bitmap::{self, Base, DiskPlan, Fate, Known, KnownDisk};
use fleece::qmp::disk::{self, Disk};
use fleece::qmp::guard::{Guard, Options};
use fleece::qmp::recover;
use fleece::qmp::session::Session;
use fleece::qmp::view::{Freeze, Request, Target, View, Way};
use fleece::vms::Vm;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use uuid::Uuid;

pub const STORE: &str = "0123456789abcdef0123456789abcdef";
pub const MIB: u64 = 1 << 20;
const WAIT: Duration = Duration::from_secs(30);

/// Waits on a condition, 30 s at most.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + WAIT;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "waited 30 s for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The tests' own monitor, apart from the code under test.
pub struct Monitor(BufReader<UnixStream>);

impl Monitor {
    pub fn connect(path: &Path) -> Monitor {
        let stream = wait_for("the monitor", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(WAIT)).unwrap();
        let mut monitor = Monitor(BufReader::new(stream));
        monitor.line();
        monitor.call("qmp_capabilities", json!({}));
        monitor
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    pub fn try_call(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let request = json!({"execute": command, "arguments": arguments});
        // In one piece: a QEMU told to quit is gone before a second one.
        self.0.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
        loop {
            let mut answer = self.line();
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            if answer.get("error").is_some() {
                return Err(answer["error"].take());
            }
        }
    }

    pub fn call(&mut self, command: &str, arguments: Value) -> Value {
        self.try_call(command, arguments).unwrap_or_else(|e| panic!("{command}: {e}"))
    }

    pub fn status(&mut self) -> String {
        self.call("query-status", json!({}))["status"].as_str().unwrap().to_owned()
    }
}

/// One disk: its image, and what a guest would read from it.
pub struct Image {
    pub label: String,
    pub path: PathBuf,
    pub content: Vec<u8>,
}

pub struct Qemu {
    pub dir: PathBuf,
    child: Child,
    pub monitor: Monitor,
    pub images: Vec<Image>,
    arguments: Vec<String>,
    _temp: Option<tempfile::TempDir>,
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// A disk for [`Qemu::start`].
#[derive(Clone, Copy)]
pub struct Spec {
    pub format: &'static str,
    pub size: u64,
    pub iothread: bool,
}

pub const QCOW2: Spec = Spec { format: "qcow2", size: 8 * MIB, iothread: false };

impl Qemu {
    pub fn start(specs: &[Spec]) -> Qemu {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().to_owned();
        let mut arguments: Vec<String> = Vec::new();
        let mut images = Vec::new();
        for (i, spec) in specs.iter().enumerate() {
            let label = format!("vd{}", char::from(b'a' + u8::try_from(i).unwrap()));
            let path = dir.join(format!("{label}.{}", spec.format));
            run(
                "qemu-img",
                &[
                    "create",
                    "-q",
                    "-f",
                    spec.format,
                    path.to_str().unwrap(),
                    &spec.size.to_string(),
                ],
            );
            arguments.extend([
                "-blockdev".into(),
                format!(
                    "driver={},node-name=disk{i},discard=unmap,file.driver=file,file.filename={}",
                    spec.format,
                    path.display()
                ),
            ]);
            let thread = if spec.iothread { format!(",iothread=io{i}") } else { String::new() };
            if spec.iothread {
                arguments.extend(["-object".into(), format!("iothread,id=io{i}")]);
            }
            arguments.extend([
                "-device".into(),
                format!("virtio-blk-pci,drive=disk{i},id={label}{thread}"),
            ]);
            images.push(Image {
                label,
                path,
                content: vec![0; usize::try_from(spec.size).unwrap()],
            });
        }
        Qemu::launch(dir, arguments, images, Some(temp))
    }

    fn launch(
        dir: PathBuf,
        arguments: Vec<String>,
        images: Vec<Image>,
        temp: Option<tempfile::TempDir>,
    ) -> Qemu {
        let monitor = |name: &str| format!("unix:{},server=on,wait=off", dir.join(name).display());
        let log = std::fs::File::create(dir.join("qemu.log")).unwrap();
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-accel",
                "tcg",
                "-machine",
                "pc",
                "-m",
                "32",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
            ])
            .args(["-name", "test", "-uuid", "5f2c8b1e-7a54-4d0f-9c53-000000000001"])
            .args(["-qmp", &monitor("qmp.sock"), "-qmp", &monitor("test.sock")])
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("qemu-system-x86_64 is needed for this test (apt-get install qemu-system-x86)");
        let monitor = Monitor::connect(&dir.join("test.sock"));
        let mut qemu = Qemu { dir, child, monitor, images, arguments, _temp: temp };
        qemu.wait_for_firmware();
        qemu
    }

    /// Until the firmware has found nothing to boot and idles. While it sets up its disks, a job on
    /// one with an iothread can abort QEMU 7.2.
    fn wait_for_firmware(&mut self) {
        /// One look after the other that must find it idle: it waits for devices now and then.
        const IDLE: u32 = 20;
        let mut idle = 0;
        wait_for("the firmware", || {
            let registers = json!({"command-line": "info registers"});
            let text = self.monitor.call("human-monitor-command", registers);
            idle = if text.as_str().unwrap().contains("HLT=1") { idle + 1 } else { 0 };
            (idle >= IDLE).then_some(())
        });
    }

    /// Ends QEMU (cleanly: bitmaps are stored) or kills it, and starts it again.
    pub fn restart(mut self, cleanly: bool) -> Qemu {
        if cleanly {
            self.monitor.call("quit", json!({}));
        } else {
            self.child.kill().unwrap();
        }
        self.child.wait().unwrap();
        for name in ["qmp.sock", "test.sock"] {
            drop(std::fs::remove_file(self.dir.join(name)));
        }
        let temp = self._temp.take();
        let images = std::mem::take(&mut self.images);
        Qemu::launch(self.dir.clone(), self.arguments.clone(), images, temp)
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn vm(&self) -> Vm {
        Vm::at_socket(&self.dir.join("qmp.sock"), Some("test"))
    }

    /// Writes as the guest does: through the device, not the node.
    pub fn write(&mut self, disk: usize, pattern: u8, offset: u64, length: u64) {
        let label = self.images[disk].label.clone();
        let line = format!(
            "qemu-io -d /machine/peripheral/{label}/virtio-backend \"write -P {pattern} {offset} {length}\""
        );
        let answer = self.monitor.call("human-monitor-command", json!({"command-line": line}));
        assert!(!answer.as_str().unwrap().to_lowercase().contains("error"), "{answer}");
        let at = usize::try_from(offset).unwrap();
        self.images[disk].content[at..at + usize::try_from(length).unwrap()].fill(pattern);
    }

    pub fn contents(&self) -> Vec<Vec<u8>> {
        self.images.iter().map(|i| i.content.clone()).collect()
    }

    /// Nothing of ours is left in QEMU, and it runs as before.
    pub fn assert_clean(&mut self) {
        let exports = self.monitor.call("query-block-exports", json!({}));
        assert_eq!(exports, json!([]));
        assert_eq!(self.monitor.call("query-jobs", json!({})), json!([]));
        let nodes = self.monitor.call("query-named-block-nodes", json!({"flat": true}));
        let names: Vec<&str> =
            nodes.as_array().unwrap().iter().map(|n| n["node-name"].as_str().unwrap()).collect();
        assert!(!names.iter().any(|n| n.starts_with("fleece-")), "{names:?}");
        for (i, device) in
            self.monitor.call("query-block", json!({})).as_array().unwrap().iter().enumerate()
        {
            assert_eq!(device["inserted"]["node-name"], format!("disk{i}"));
        }
        assert_eq!(
            self.monitor.try_call("nbd-server-stop", json!({})).unwrap_err()["desc"],
            "NBD server not running"
        );
        assert_eq!(self.monitor.status(), "running");
    }

    /// Names and recording of our bitmaps on a disk.
    pub fn bitmaps(&mut self, disk: usize) -> Vec<(String, bool)> {
        let nodes = self.monitor.call("query-named-block-nodes", json!({"flat": true}));
        let node = nodes
            .as_array()
            .unwrap()
            .iter()
            .find(|n| n["node-name"] == format!("disk{disk}"))
            .unwrap();
        let none = Vec::new();
        let bitmaps = node["dirty-bitmaps"].as_array().unwrap_or(&none);
        bitmaps
            .iter()
            .filter_map(|b| {
                let name = b["name"].as_str()?.split(':').nth(2)?.to_owned();
                Some((name, b["recording"].as_bool().unwrap()))
            })
            .collect()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "qemu said: {}",
                std::fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default()
            );
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub fn guard(dir: &Path, vm: &Vm) -> Guard {
    let options = Options {
        program: PathBuf::from(env!("CARGO_BIN_EXE_fleece")),
        log: dir.join("guard.log"),
        run_dir: dir.join("run"),
    };
    Guard::spawn(&options, vm).unwrap()
}

pub fn request(
    dir: &Path,
    snapshot: &str,
    disks: Vec<(Disk, DiskPlan)>,
    way: Option<Way>,
) -> Request {
    Request {
        store: STORE.into(),
        snapshot: snapshot.into(),
        disks,
        scratch_dir: dir.to_owned(),
        scratch_max: Some(64 * MIB),
        read_limit: None,
        freeze: Freeze::No,
        way,
    }
}

/// What the engine would remember.
#[derive(Default)]
pub struct Memory {
    pub fates: BTreeMap<String, Fate>,
    pub latest: String,
    pub known: Vec<KnownDisk>,
}

impl Memory {
    pub fn committed(&mut self, snapshot: &str, disks: &[(Disk, DiskPlan)]) {
        self.fates.insert(snapshot.into(), Fate::Committed);
        self.latest = snapshot.into();
        self.known = disks
            .iter()
            .map(|(d, p)| KnownDisk { uuid: p.uuid, label: d.label.clone(), size: d.size })
            .collect();
    }

    /// As the engine does: whoever has not committed, never will.
    pub fn settle(&mut self, named: &[String]) {
        for snapshot in named {
            self.fates.entry(snapshot.clone()).or_insert(Fate::Ended);
        }
    }

    /// Lists, plans and recovers, as a backup begins.
    pub async fn plan(&mut self, session: &Session) -> Vec<(Disk, DiskPlan)> {
        let run = session.vm().qmp.with_file_name("run");
        recover::end_leftovers(&run, session, &mut recover::Report::default()).await.unwrap();
        let disks = disk::list(session).await.unwrap().disks;
        self.settle(&bitmap::named_snapshots(&disks, STORE));
        let known =
            Known { store: STORE, fates: &self.fates, latest: &self.latest, known: &self.known };
        let plan = bitmap::plan(&disks, known, Uuid::new_v4);
        bitmap::carry_out(session, &plan.recovery).await.unwrap();
        disks.into_iter().zip(plan.disks).collect()
    }
}

fn uri(target: &Target) -> String {
    format!("nbd+unix:///{}?socket={}", target.export, target.socket.display())
}

/// Everything that a view shows.
pub fn read_all(dir: &Path, target: &Target) -> Vec<u8> {
    let out = dir.join("read.raw");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri(target), out.to_str().unwrap()]);
    std::fs::read(out).unwrap()
}

/// The dirty ranges.
pub fn dirty(target: &Target) -> Vec<(u64, u64)> {
    let context = target.dirty_context.as_ref().unwrap();
    let options = format!(
        "driver=nbd,export={},server.type=unix,server.path={},x-dirty-bitmap={context}",
        target.export,
        target.socket.display()
    );
    let map: Value =
        serde_json::from_str(&run("qemu-img", &["map", "--output=json", "--image-opts", &options]))
            .unwrap();
    let is_dirty = |e: &&Value| e["data"] == false;
    map.as_array()
        .unwrap()
        .iter()
        .filter(is_dirty)
        .map(|e| (e["start"].as_u64().unwrap(), e["length"].as_u64().unwrap()))
        .collect()
}

/// A replica kept as a store would keep it: only what is dirty is taken from the view.
pub fn update(dir: &Path, replica: &mut Vec<u8>, target: &Target, plan: &DiskPlan) {
    let all = read_all(dir, target);
    match plan.base {
        Base::Full { .. } => *replica = all,
        Base::Incremental { .. } => {
            for (start, length) in dirty(target) {
                let range =
                    usize::try_from(start).unwrap()..usize::try_from(start + length).unwrap();
                replica[range.clone()].copy_from_slice(&all[range]);
            }
        }
    }
}

/// Views cannot be compared with a short message: offsets of the first difference.
pub fn assert_same(what: &str, left: &[u8], right: &[u8]) {
    assert_eq!(left.len(), right.len(), "{what}: size");
    let differs = left.iter().zip(right).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: first difference at this offset");
}

pub async fn open(session: &Session, guard: &mut Guard, request: Request) -> View {
    View::open(session, guard, request).await.unwrap_or_else(|e| panic!("{e}"))
}
