//! Whoever has the store, the state directory, the scratch, the logs or what a crash leaves, and not the
//! key, learns nothing of what guests wrote; and whoever exchanges objects is found out.

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use qemu_tests::content::block;
use qemu_tests::guest::Guest;
use qemu_tests::scenario::begin;
use qemu_tests::wait::{LONG, SOON, wait_until};
use qemu_tests::{Fixture, MIB, Machine, Result, image, take, tools};
use rustix::process::Signal;

/// What the guest writes that must be found nowhere.
const SECRET_SEED: u64 = 4711;
/// What stands in the VM's configuration.
const CONFIGURATION: &str = "<secret>canary-of-the-configuration</secret>";

/// Bytes that must not be found, each with a name.
type Needles = Vec<(String, Vec<u8>)>;

/// Pieces of what the guest wrote, from the half of a block that does not compress.
fn guests_data() -> Needles {
    // The guest numbers blocks by their place on the disk: from 1 MiB on.
    let piece = |index: u64| block(SECRET_SEED, 256 + index)[512..544].to_vec();
    let mut needles: Needles =
        (0..64).map(|index| (format!("the guest's block {index}"), piece(index))).collect();
    needles.push(("the configuration".into(), CONFIGURATION.as_bytes()[8..].to_vec()));
    needles
}

/// The key's secrets, as bytes and as text: after version, store and domain 32 bytes for
/// fingerprints, then a count, and 4 and 32 bytes for each encryption key.
fn keys(fixture: &Fixture) -> Result<Needles> {
    let text = fs::read_to_string(fixture.path("engine.key"))?;
    let hex = text.lines().find_map(|line| line.strip_prefix("key = \"")).context("no key")?;
    let hex = hex.trim_end_matches('"');
    let bytes = (0..hex.len() / 2)
        .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16))
        .collect::<std::result::Result<Vec<u8>, _>>()?;
    let first = 2 + 16 + 1 + usize::from(bytes[18]);
    let second = first + 32 + 1 + 4;
    let mut needles = Needles::new();
    for (name, at) in [("fingerprint secret", first), ("encryption key", second)] {
        needles.push((name.into(), bytes[at..at + 32].to_vec()));
        needles.push((format!("{name} as text"), hex.as_bytes()[2 * at..2 * at + 64].to_vec()));
    }
    Ok(needles)
}

/// All regular files below a folder.
fn files(folder: &Path, found: &mut Vec<PathBuf>) -> Result {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files(&entry.path(), found)?;
        } else if entry.file_type()?.is_file() {
            found.push(entry.path());
        }
    }
    Ok(())
}

/// Files that a process has open and that have no name: spools, sheets, sort runs.
fn open_files(pid: u32) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        if fs::metadata(&path).is_ok_and(|file| file.is_file()) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Which needle is in which file.
fn search(paths: &[PathBuf], needles: &Needles) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for path in paths {
        let mut bytes = Vec::new();
        // A file that is gone by now holds nothing.
        let Ok(mut file) = File::open(path) else { continue };
        file.read_to_end(&mut bytes)?;
        for (name, needle) in needles {
            if bytes.windows(needle.len()).any(|window| window == needle) {
                found.push(format!("{name} is in {}", path.display()));
            }
        }
    }
    Ok(found)
}

/// A guest that wrote the secret, with a configuration that is one.
fn guest_with_a_secret(fixture: &Fixture) -> Result<(Machine, Guest)> {
    let machine = Machine::new(fixture.folder(), "secretive")?.with_disk("qcow2", 96 * MIB)?;
    let configuration = fixture.path("secretive.xml");
    fs::write(&configuration, CONFIGURATION)?;
    fixture.describe(&machine)?;
    let described = fixture.path("vms.d/secretive.toml");
    let text = fs::read_to_string(&described)?;
    fs::write(described, format!("{text}config = \"{}\"\n", configuration.display()))?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {MIB} {} {SECRET_SEED}", 8 * MIB))?;
    // More than one batch of the scan, so that a backup can be met between two of them.
    guest.obey(&format!("write vda {} {} 5", 16 * MIB, 72 * MIB))?;
    Ok((machine, guest))
}

fn back_up(fixture: &Fixture) -> Result {
    let scratch = fixture.text("scratch");
    fixture.fleece(&["backup", "secretive", "--scratch-dir", &scratch]).map(drop)
}

#[test]
fn nothing_of_guests_or_keys_is_left_anywhere() -> Result {
    let mut fixture = Fixture::new()?;
    let (machine, mut guest) = guest_with_a_secret(&fixture)?;
    let mut needles = guests_data();
    // The search can find it: it is on the guest's disk.
    let image = [machine.disks[0].path.clone()];
    ensure!(search(&image, &needles)?.len() == 64, "the canary is not on the disk");
    needles.extend(keys(&fixture)?);
    back_up(&fixture)?;

    // What runs, and what it leaves when it crashes: plugin and engine, each in mid-backup.
    let mut said = String::new();
    for (round, signal) in [Signal::SEGV, Signal::ABORT].into_iter().enumerate() {
        let more = ["--full", "--read-limit", "12M", "--engine-wait", "0s"];
        let mut reading = begin(&fixture, &machine, &mut guest, &format!("crash{round}"), &more)?;
        let some = |s: &serde_json::Value| s["read"].as_u64().is_some_and(|n| n > MIB);
        fixture.wait_stage(("secretive", &mut reading.running), "scan", some)?;
        let open = open_files(fixture.engine()?.pid())?;
        ensure!(!open.is_empty(), "a spool is open");
        assert_eq!(search(&open, &needles)?, Vec::<String>::new());
        if round == 0 {
            reading.running.signal(signal)?;
            said += &reading.running.finish(LONG)?.printed();
        } else {
            fixture.engine()?.signal(signal)?;
            let engine = fixture.engine()?;
            wait_until(SOON, "the engine's end", || Ok(engine.ended()?.is_some()))?;
            said += &reading.running.finish(LONG)?.printed();
            said += &fixture.engine()?.printed();
            fixture.kill_engine()?;
            fixture.start_engine()?;
        }
        guest.is_left_alone(&machine, 2)?;
    }
    fs::write(fixture.path("what-was-said"), said)?;

    let mut left = vec![fixture.path("what-was-said"), PathBuf::from("/run/fleece/guard.log")];
    for folder in [fixture.store(), fixture.state(), fixture.path("scratch")] {
        files(&folder, &mut left)?;
    }
    // A core would lie where the programs ran.
    for entry in fs::read_dir(std::env::current_dir()?)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        assert!(name != "core" && !name.starts_with("core."), "a core: {}", path.display());
    }
    ensure!(left.len() > 10, "the store is not there");
    assert_eq!(search(&left, &needles)?, Vec::<String>::new());
    take(&fixture, &machine, &mut guest, "last")?.restores_exactly(&fixture)
}

#[test]
fn without_encryption_the_search_would_find_it() -> Result {
    let mut fixture = Fixture::without_engine()?;
    let (store, config) = (fixture.text("plain"), fixture.text("plain.toml"));
    fixture.fleecectl(&["init", "--store", &store, "--config", &config, "--no-encryption"])?;
    fs::rename(fixture.path("plain.toml"), fixture.path("engine.toml"))?;
    fixture.start_engine()?;
    let path = fixture.path("secret.raw");
    image::raw(&path, 8 * MIB, &[(0, 8 * MIB, SECRET_SEED)])?;
    fixture.backup_images("plain", &[("vda", &path)])?;
    let mut stored = Vec::new();
    files(&fixture.path("plain"), &mut stored)?;
    let found = search(&stored, &guests_data())?;
    assert!(found.len() > 32, "only {} of 64 pieces are found: it proves nothing", found.len());
    Ok(())
}

#[test]
fn the_key_is_for_its_owner_alone() -> Result {
    let mut fixture = Fixture::without_engine()?;
    let key = fixture.path("engine.key");
    assert_eq!(fs::metadata(&key)?.permissions().mode() & 0o777, 0o400);
    for mode in [0o440, 0o404, 0o644] {
        fs::set_permissions(&key, Permissions::from_mode(mode))?;
        let refused = format!("{:#}", fixture.start_engine().err().context("it started")?);
        assert!(
            refused.contains("can be read by others") && refused.contains("chmod"),
            "{refused}"
        );
        let config = fixture.text("engine.toml");
        fixture.try_fleecectl(&["--config", &config, "key", "export"])?.code(12)?;
    }
    fs::set_permissions(&key, Permissions::from_mode(0o400))?;
    fixture.start_engine()?;
    // Nothing of ours can be read by others, and what listens is a socket for owner and group.
    let mut ours = Vec::new();
    files(&fixture.store(), &mut ours)?;
    files(&fixture.state(), &mut ours)?;
    for path in ours {
        let mode = fs::metadata(&path)?.permissions().mode();
        assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", path.display());
    }
    let socket = fs::metadata(fixture.socket())?;
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o660);
    Ok(())
}

/// A store with two VMs, the first with two snapshots; a copy of it, as it was.
struct Stored {
    fixture: Fixture,
    /// The first VM's snapshots, the older one first, with what they hold.
    snapshots: Vec<(String, PathBuf)>,
}

impl Stored {
    fn new() -> Result<Self> {
        let fixture = Fixture::new()?;
        let mut snapshots = Vec::new();
        for (vm, seed) in [("first", 1), ("second", 2), ("first", 3)] {
            let path = fixture.path(&format!("{vm}{seed}.raw"));
            image::raw(&path, 8 * MIB, &[(0, 6 * MIB, seed)])?;
            let (id, _) = fixture.backup_images(vm, &[("vda", &path)])?;
            if vm == "first" {
                snapshots.push((format!("{vm}@{id}"), path));
            }
        }
        let mut stored = Stored { fixture, snapshots };
        stored.fixture.stop_engine()?;
        copy(&stored.fixture.store(), &stored.fixture.path("good"))?;
        Ok(stored)
    }

    /// Objects of a kind, in the order of their names, as they were.
    fn objects(&self, kind: &str) -> Result<Vec<String>> {
        let good = self.fixture.path("good");
        let mut paths = Vec::new();
        files(&good.join(kind), &mut paths)?;
        paths.sort();
        let relative = |path: &PathBuf| Ok(path.strip_prefix(&good)?.display().to_string());
        paths.iter().map(relative).collect()
    }

    /// Puts the content of objects under other names, and sees that verify says so and that no
    /// restore gives anything but the truth. Then all is as it was.
    fn attacked(&mut self, what: &str, moves: &[(&str, &str)]) -> Result {
        println!("{what}");
        let (good, store) = (self.fixture.path("good"), self.fixture.store());
        for (from, to) in moves {
            if let Some(folder) = store.join(to).parent() {
                fs::create_dir_all(folder)?;
            }
            fs::copy(good.join(from), store.join(to))?;
        }
        self.fixture.start_engine()?;
        let verified = self.fixture.try_fleecectl(&["verify"])?;
        assert_eq!(verified.code, 16, "{what}: verify says\n{}", verified.printed());
        let mut refused = 0;
        for (snapshot, truth) in &self.snapshots {
            refused += self.restores_or_refuses(snapshot, truth, what)?;
        }
        let newest = &self.snapshots[self.snapshots.len() - 1].1;
        self.restores_or_refuses("first@latest", newest, what)?;
        println!("  {refused} of {} restores are refused", self.snapshots.len());
        self.fixture.kill_engine()?;
        fs::remove_dir_all(&store)?;
        copy(&good, &store)
    }

    /// 1 if it is refused as damaged.
    fn restores_or_refuses(&self, snapshot: &str, truth: &Path, what: &str) -> Result<u32> {
        let target = self.fixture.path("attacked.raw");
        let to = target.display().to_string();
        let arguments = ["restore", snapshot, "--to", &to, "-O", "raw", "--force"];
        let finished = self.fixture.try_fleece(&arguments)?;
        match finished.code {
            0 => {
                image::same(truth, &target).with_context(|| format!("{what}: {snapshot}"))?;
                Ok(0)
            }
            16 => Ok(1),
            code => panic!("{what}: {snapshot} ended with {code}: {}", finished.printed()),
        }
    }
}

fn copy(from: &Path, to: &Path) -> Result {
    tools::run(std::process::Command::new("cp").arg("-a").arg(from).arg(to))?;
    Ok(())
}

#[test]
fn exchanged_replayed_and_renamed_objects_are_found_out() -> Result {
    let mut stored = Stored::new()?;
    let containers = stored.objects("containers")?;
    let (manifests, copies) = (stored.objects("manifests")?, stored.objects("manifests-copy")?);
    let journal = stored.objects("journal")?;
    ensure!(containers.len() >= 4 && manifests.len() == 3 && copies.len() == 3);
    for other in 1..containers.len() {
        let (a, b) = (containers[0].as_str(), containers[other].as_str());
        stored.attacked(&format!("containers 1 and {} exchanged", other + 1), &[(a, b), (b, a)])?;
    }
    let last = containers.len() - 1;
    stored.attacked("a container replayed", &[(&containers[0], &containers[last])])?;
    stored.attacked(
        "journal entries exchanged",
        &[(&journal[0], &journal[1]), (&journal[1], &journal[0])],
    )?;

    // Two manifests of one VM, and one of another VM.
    let folder = |path: &str| path.rsplit_once('/').map(|(folder, _)| folder.to_owned());
    let twin = (1..3).find(|i| folder(&manifests[*i]) == folder(&manifests[0]));
    let (a, b) = twin.map_or((1, 2), |twin| (0, twin));
    let other = (0..3).find(|i| *i != a && *i != b).context("no other VM")?;
    for list in [&manifests, &copies] {
        let (a, b) = (list[a].as_str(), list[b].as_str());
        stored.attacked("one list of manifests exchanged", &[(a, b), (b, a)])?;
    }
    stored.attacked(
        "manifests and copies exchanged",
        &[
            (&manifests[a], &manifests[b]),
            (&manifests[b], &manifests[a]),
            (&copies[a], &copies[b]),
            (&copies[b], &copies[a]),
        ],
    )?;
    stored.attacked(
        "manifest and copy of another VM",
        &[(&manifests[other], &manifests[b]), (&copies[other], &copies[b])],
    )?;
    let (older, newer) = (&manifests[a], later(&manifests[a])?);
    stored.attacked(
        "an old manifest as the newest",
        &[(older, &newer), (&copies[a], &later(&copies[a])?)],
    )?;
    stored.attacked("a copy in place of its manifest", &[(&copies[b], &manifests[b])])?;
    stored.fixture.start_engine()
}

/// The name of a manifest with a sequence number that is not taken.
fn later(key: &str) -> Result<String> {
    let (folder, name) = key.rsplit_once('/').context("no folder")?;
    let (sequence, snapshot) = name.split_once('-').context("no sequence")?;
    let digits = sequence.len();
    ensure!(sequence.chars().all(|c| c.is_ascii_hexdigit()), "{key}");
    Ok(format!("{folder}/{}9-{snapshot}", &sequence[..digits - 1]))
}

#[test]
fn pieces_of_a_container_exchanged_are_found_out() -> Result {
    let mut stored = Stored::new()?;
    let containers = stored.objects("containers")?;
    let good = stored.fixture.path("good");
    let length = |name: &String| fs::metadata(good.join(name)).map_or(0, |file| file.len());
    let largest = containers.iter().max_by_key(|name| length(name)).context("no container")?;
    let bytes = fs::read(good.join(largest))?;
    // Frames of some 35 KiB: two places that lie in different ones, moved and repeated.
    for (from, to) in [(8 << 10, 256 << 10), (256 << 10, 8 << 10), (512 << 10, 520 << 10)] {
        let mut changed = bytes.clone();
        changed.copy_within(from..from + 4096, to);
        fs::write(good.join("changed"), &changed)?;
        stored.attacked("a piece of a container repeated", &[("changed", largest)])?;
        fs::remove_file(good.join("changed"))?;
    }
    stored.fixture.start_engine()
}
