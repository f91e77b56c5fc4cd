//! Disks that are full for real (a tmpfs, filled at a moment that a seed chooses), read-only, slow, or
//! no longer ours: the backup ends and says what is the matter, the engine and the guest live on, what
//! was committed comes back, and once there is room again the next backup works with no help.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use qemu_tests::content::mix;
use qemu_tests::fixture::{Places, snapshot_id};
use qemu_tests::held::Brake;
use qemu_tests::mount::Tmpfs;
use qemu_tests::process::{Finished, Running};
use qemu_tests::scenario::begin;
use qemu_tests::wait::{LONG, wait_until};
use qemu_tests::{Fixture, MIB, Machine, Result, image, take, tools};
use rustix::process::geteuid;

/// What the images of these tests hold: some 12 MiB in the store.
const SIZE: u64 = 24 * MIB;
/// nobody's user and group on every Debian.
const NOBODY: u32 = 65534;

fn start(fixture: &Fixture, path: &Path, more: &[&str]) -> Result<Running> {
    let image = format!("--image=vda={}", path.display());
    let mut arguments = vec!["backup", "vm", &image];
    arguments.extend(more);
    Running::start("fleece backup", &mut fixture.fleece_command(&arguments)?)
}

/// A backup that must commit; the snapshot.
fn backs_up(fixture: &Fixture, path: &Path) -> Result<String> {
    let finished = start(fixture, path, &[])?.finish(LONG)?.code(0)?;
    Ok(format!("vm@{}", snapshot_id(&finished.printed())?))
}

fn restores(fixture: &Fixture, snapshot: &str, truth: &Path) -> Result {
    let restored = fixture.restore(snapshot, "vda")?;
    image::same(truth, &restored)?;
    Ok(fs::remove_file(restored)?)
}

/// The image of a round, with content of its own.
fn image_of(fixture: &Fixture, round: u64) -> Result<PathBuf> {
    let path = fixture.path(&format!("image{round}.raw"));
    image::raw(&path, SIZE, &[(0, SIZE, round)])?;
    Ok(path)
}

fn lives(fixture: &mut Fixture) -> Result {
    let engine = fixture.engine()?;
    assert!(engine.ended()?.is_none(), "the engine ended: {}", engine.printed());
    fixture.status().map(drop)
}

fn says(finished: &Finished, words: &[&str]) {
    let printed = finished.printed();
    assert!(words.iter().all(|word| printed.contains(word)), "not {words:?} in: {printed}");
}

/// Backups that meet a full disk before they begin, while they scan and while they write; each is followed
/// by one that has room. One that needed no more room than it had (the engine deletes files of its own
/// meanwhile) may commit, but then it is exact.
fn fill_at_random_moments(fixture: &mut Fixture, full: &Tmpfs, words: &[&str]) -> Result {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    println!("seed {seed}");
    let first = image_of(fixture, 1)?;
    let kept = backs_up(fixture, &first)?;
    for round in 0..5 {
        let path = image_of(fixture, 10 + round)?;
        let running = if round == 0 {
            full.fill()?;
            start(fixture, &path, &[])?
        } else {
            // The scan tells what it read in batches larger than this disk.
            let (stage, most) = [("scan", 0), ("write", SIZE / 2)][(round % 2) as usize];
            let enough = mix(seed + round) % (most + 1);
            println!("round {round}: full in the {stage} when {enough} bytes are written");
            let mut running = start(fixture, &path, &["--read-limit", "6M"])?;
            let met = |s: &serde_json::Value| s["new"].as_u64().is_some_and(|n| n >= enough);
            fixture.wait_stage(("vm", &mut running), stage, met)?;
            full.fill()?;
            running
        };
        let finished = running.finish(LONG)?;
        lives(fixture)?;
        if finished.code == 0 && round > 0 {
            println!("round {round}: it had the room that it needed");
            restores(fixture, &format!("vm@{}", snapshot_id(&finished.printed())?), &path)?;
        } else {
            says(&finished.code(1)?, words);
        }
        restores(fixture, &kept, &first)?;
        full.free()?;
        let snapshot = backs_up(fixture, &path)?;
        restores(fixture, &snapshot, &path)?;
    }
    restores(fixture, &kept, &first)
}

#[test]
fn the_store() -> Result {
    let full = Tmpfs::new(160 * MIB)?;
    let places = Places { store: Some(full.file("store")), ..Places::default() };
    let mut fixture = Fixture::at(places)?;
    fixture.start_engine()?;
    fill_at_random_moments(&mut fixture, &full, &["the store is full", "make room"])
}

#[test]
fn the_state_directory_with_spool_and_index() -> Result {
    let full = Tmpfs::new(24 * MIB)?;
    let places = Places { state: Some(full.file("state")), ..Places::default() };
    let mut fixture = Fixture::at(places)?;
    fixture.start_engine()?;
    let state = fixture.state().display().to_string();
    fill_at_random_moments(&mut fixture, &full, &["full", "make room", &state])?;
    // The index cannot be written out at the engine's end: it is made again from the store.
    full.fill()?;
    fixture.stop_engine()?;
    full.free()?;
    fixture.start_engine()?;
    let unique = fixture.figure("unique_blocks")?;
    let again = image_of(&fixture, 1)?;
    let snapshot = backs_up(&fixture, &again)?;
    restores(&fixture, &snapshot, &again)?;
    assert_eq!(fixture.figure("unique_blocks")?, unique, "what is stored was not found");
    Ok(())
}

#[test]
fn the_index_while_it_grows() -> Result {
    let full = Tmpfs::new(40 * MIB)?;
    let places = Places { state: Some(full.file("state")), ..Places::default() };
    let mut fixture = Fixture::at(places)?;
    fixture.start_engine()?;
    // More blocks than the newest level of the index holds; each compresses to nothing.
    let path = fixture.path("many.raw");
    let blocks = 80_000_u64;
    let file = fs::File::create(&path)?;
    let mut block = [0x11; 4096];
    for number in 0..blocks {
        block[..8].copy_from_slice(&number.to_le_bytes());
        std::os::unix::fs::FileExt::write_all_at(&file, &block, number * 4096)?;
    }
    let mut running = start(&fixture, &path, &[])?;
    fixture.wait_stage(("vm", &mut running), "write", |s| s["new"].as_u64() > Some(0))?;
    full.fill()?;
    let finished = running.finish(LONG)?;
    // What it needed may have been there already; then the commit is what counts.
    assert!([0, 1].contains(&finished.code), "{} {}", finished.code, finished.printed());
    lives(&mut fixture)?;
    full.free()?;
    let snapshot = backs_up(&fixture, &path)?;
    restores(&fixture, &snapshot, &path)?;
    wait_until(LONG, "the index knowing all blocks", || {
        Ok(fixture.figure("unique_blocks")? == blocks)
    })
}

#[test]
fn the_disk_of_the_scratch() -> Result {
    let full = Tmpfs::new(32 * MIB)?;
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "scratchy")?.with_disk("qcow2", 64 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda 0 {} 1", 48 * MIB))?;
    let kept = take(&fixture, &machine, &mut guest, "kept")?;
    let scratch = full.path();
    // The harness's scratch directory is that disk.
    let elsewhere = fixture.path("scratch");
    fs::remove_dir(&elsewhere)?;
    std::os::unix::fs::symlink(scratch, &elsewhere)?;
    let more = ["--full", "--read-limit", "2M", "--scratch-max", "24M"];
    let reading = begin(&fixture, &machine, &mut guest, "full", &more)?;
    full.fill()?;
    for part in 0..4 {
        guest.obey(&format!("write vda {} {} {}", part * 8 * MIB, 8 * MIB, 50 + part))?;
    }
    guest.obey(&format!("start 6 {MIB} {} 1 vda", 16 * MIB))?;
    says(&reading.running.finish(LONG)?.code(1)?, &["scratch"]);
    guest.keeps_writing()?;
    guest.is_left_alone(&machine, 1)?;
    kept.restores_exactly(&fixture)?;
    full.free()?;
    take(&fixture, &machine, &mut guest, "next")?.restores_exactly(&fixture)
}

#[test]
fn a_store_that_became_read_only() -> Result {
    let medium = Tmpfs::new(96 * MIB)?;
    let places = Places { store: Some(medium.file("store")), ..Places::default() };
    let mut fixture = Fixture::at(places)?;
    fixture.start_engine()?;
    let (first, second) = (image_of(&fixture, 1)?, image_of(&fixture, 2)?);
    let kept = backs_up(&fixture, &first)?;
    // As in a store that was written before there were second copies.
    fs::remove_dir_all(fixture.store().join("directories"))?;
    medium.remount("ro")?;
    says(&start(&fixture, &second, &[])?.finish(LONG)?.code(1)?, &["read-only"]);
    restores(&fixture, &kept, &first)?;
    says(&fixture.verify()?, &["the second copy of its directory is missing, and stays so"]);
    lives(&mut fixture)?;
    medium.remount("rw")?;
    let snapshot = backs_up(&fixture, &second)?;
    restores(&fixture, &snapshot, &second)
}

#[test]
fn a_store_that_is_slow() -> Result {
    let mut fixture = Fixture::new()?;
    let path = image_of(&fixture, 1)?;
    let calls = "fsync,fdatasync,linkat,rename,write,pwrite64,pread64";
    let brake = Brake::calls(fixture.engine()?.pid(), calls, Duration::from_millis(20))?;
    let mut running = start(&fixture, &path, &[])?;
    fixture.wait_stage(("vm", &mut running), "write", |_| true)?;
    // Others are answered meanwhile.
    lives(&mut fixture)?;
    let printed = running.finish(LONG)?.code(0)?.printed();
    drop(brake);
    restores(&fixture, &format!("vm@{}", snapshot_id(&printed)?), &path)
}

/// An engine that is not root, to whom permissions mean something.
fn engine_of_nobody() -> Result<Fixture> {
    let mut fixture = Fixture::without_engine()?;
    if geteuid().is_root() {
        let ids = format!("{NOBODY}:{NOBODY}");
        tools::run(tools::as_root("chown").args(["-R", &ids]).arg(fixture.folder()))?;
        let program = fixture.path("fleece-engine");
        fs::copy(tools::fleece("fleece-engine")?.get_program(), &program)?;
        fs::set_permissions(&program, Permissions::from_mode(0o755))?;
        let (user, group) = (format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"));
        let by = ["setpriv", &user, &group, "--clear-groups", "--inh-caps=-all"];
        fixture.start_engine_by(by.map(str::to_owned).to_vec());
        fixture.use_engine(&program);
    }
    fixture.start_engine()?;
    Ok(fixture)
}

fn chmod(mode: &str, path: &Path) -> Result {
    tools::run(tools::as_root("chmod").args(["-R", mode]).arg(path))?;
    Ok(())
}

#[test]
fn a_store_that_is_no_longer_ours() -> Result {
    let mut fixture = engine_of_nobody()?;
    let (first, second) = (image_of(&fixture, 1)?, image_of(&fixture, 2)?);
    let kept = backs_up(&fixture, &first)?;
    let store = fixture.store();

    chmod("a-w", &store)?;
    says(&start(&fixture, &second, &[])?.finish(LONG)?.code(17)?, &["the engine's user"]);
    restores(&fixture, &kept, &first)?;
    lives(&mut fixture)?;

    chmod("u+w", &store)?;
    chmod("a-rwx", &store.join("containers"))?;
    let target = fixture.text("never.raw");
    let refused = fixture.try_fleece(&["restore", &kept, "--to", &target, "-O", "raw"])?;
    says(&refused.code(17)?, &["the engine's user"]);
    let verified = fixture.try_fleecectl(&["verify"])?;
    says(&verified.code(17)?, &["the engine's user"]);

    chmod("u+rwX", &store)?;
    // What could not be read is not damaged: nothing may be marked so.
    assert_eq!(fixture.figure("damaged_blocks")?, 0);
    let snapshot = backs_up(&fixture, &second)?;
    restores(&fixture, &snapshot, &second)?;
    restores(&fixture, &kept, &first)
}

#[test]
fn an_engine_leaves_no_core() -> Result {
    let mut fixture = engine_of_nobody()?;
    let process = format!("/proc/{}", fixture.engine()?.pid());
    let limits = fs::read_to_string(format!("{process}/limits"))?;
    let core = limits.lines().find(|line| line.starts_with("Max core file size"));
    let none = |line: &str| line.split_whitespace().skip(4).take(2).all(|limit| limit == "0");
    assert!(core.is_some_and(none), "{core:?}");
    // The kernel gives the files of a process that must not be dumped to root.
    assert_eq!(fs::metadata(format!("{process}/environ"))?.uid(), 0);
    Ok(())
}
