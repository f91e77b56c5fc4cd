//! Whoever has the store, the state directory, the scratch, the logs or what a crash leaves, and not the
//! key, learns nothing of what guests wrote; and whoever exchanges objects is found out.

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use qemu_tests::content::block;
use qemu_tests::{Fixture, MIB, Result, image, tools};

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
