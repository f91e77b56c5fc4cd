//! Every line of the "Bad input": a clear error that names the thing and the way out,
//! the exit code of the table, nothing changed.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use qemu_tests::mount::Tmpfs;
use qemu_tests::process::{Finished, Running};
use qemu_tests::wait::{SOON, wait_until};
use qemu_tests::{Fixture, MIB, Machine, Result, image, take, tools};
use rustix::process::Signal;

/// The error must name all of these words, in any case.
fn names(finished: &Finished, words: &[&str]) {
    let said = finished.err.to_lowercase();
    for word in words {
        assert!(
            said.contains(&word.to_lowercase()),
            "'{word}' is not named by {}: {said}",
            finished.name
        );
    }
}

/// A store with one snapshot `plain@…` of a small image; gives the image.
fn stored(fixture: &Fixture) -> Result<std::path::PathBuf> {
    let path = fixture.path("plain.raw");
    image::raw(&path, 8 * MIB, &[(MIB, 2 * MIB, 1)])?;
    fixture.backup_images("plain", &[("vda", &path)])?;
    Ok(path)
}

/// Starts an engine that must refuse to start.
fn engine_refuses(config: &Path, state: &Path, code: i32) -> Result<Finished> {
    let mut command = tools::fleece("fleece-engine")?;
    command.arg("--config").arg(config).arg("--state-dir").arg(state);
    command.arg("--socket").arg(state.with_extension("refused.sock"));
    Running::start("fleece-engine", &mut command)?.finish(SOON)?.code(code)
}

#[test]
fn usage() -> Result {
    let fixture = Fixture::new()?;
    let table: &[(&[&str], &[&str])] = &[
        (&["backup", "x", "--qmp", "/nowhere", "--scratch-max", "20"], &["unit", "20"]),
        (&["backup", "x", "--qmp", "/nowhere", "--read-limit", "200"], &["unit", "200"]),
        (&["backup", "x", "--image", "vda=/nowhere", "--no-pacing"], &["--no-pacing", "--image"]),
        (&["backup", "x", "--image", "vda"], &["vda", "DISK=FILE"]),
        (&["backup", "x", "--image", "vda=raw:"], &["vda=raw:", "DISK=FORMAT:FILE"]),
        (&["backup", "x", "--qmp", "/a", "--image", "vda=/b"], &["--image", "--qmp"]),
        (&["backup"], &["VM"]),
        (&["restore", "plain"], &["--to"]),
        (&["restore", "@x", "--to", "/tmp/x"], &["@x"]),
    ];
    for (arguments, words) in table {
        let refused = fixture.try_fleece(arguments)?.code(2)?;
        names(&refused, words);
    }
    assert_eq!(fixture.figure("snapshots")?, 0);
    Ok(())
}

#[test]
fn no_engine() -> Result {
    let fixture = Fixture::without_engine()?;
    let path = fixture.path("plain.raw");
    image::raw(&path, MIB, &[])?;
    let image = format!("--image=vda={}", path.display());
    let table: &[&[&str]] = &[
        &["status"],
        &["snapshots"],
        &["backup", "x", &image],
        &["restore", "x", "--to", "/tmp/x"],
    ];
    for arguments in table {
        let refused = fixture.try_fleece(arguments)?.code(13)?;
        names(&refused, &["engine.sock", "engine"]);
    }
    names(&fixture.try_fleecectl(&["status"])?.code(13)?, &["engine"]);
    Ok(())
}

#[test]
fn monitors_that_are_not_qemu() -> Result {
    let fixture = Fixture::new()?;
    let missing = fixture.text("missing.sock");
    let refused = fixture.try_fleece(&["backup", "x", "--qmp", &missing])?;
    assert!([1, 14].contains(&refused.code), "{}", refused.code);
    names(&refused, &["missing.sock"]);

    let silent = fixture.text("silent.sock");
    let _silent = UnixListener::bind(&silent)?;
    // Most likely another client holds it.
    names(&fixture.try_fleece(&["backup", "x", "--qmp", &silent])?.code(11)?, &["silent.sock"]);

    let stranger = fixture.text("stranger.sock");
    let listener = UnixListener::bind(&stranger)?;
    let talker = std::thread::spawn(move || {
        if let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(b"220 mail.example.org ESMTP\r\n");
            std::mem::forget(stream);
        }
    });
    names(
        &fixture.try_fleece(&["backup", "x", "--qmp", &stranger])?.code(1)?,
        &["stranger.sock", "QEMU"],
    );
    talker.join().expect("the stranger");
    assert_eq!(fixture.figure("snapshots")?, 0);
    Ok(())
}

#[test]
fn unknown_snapshots_disks_and_vms() -> Result {
    let fixture = Fixture::new()?;
    stored(&fixture)?;
    let to = fixture.text("out.raw");
    let table: &[(&[&str], &[&str])] = &[
        (&["restore", "nobody", "--to", &to], &["nobody"]),
        (&["restore", "plain@zzzzzz", "--to", &to], &["zzzzzz", "snapshots"]),
        (&["restore", "plain@1999-01-01", "--to", &to], &["1999-01-01"]),
        (&["restore", "plain", "--disk", "vdz", "--to", &to], &["vdz", "vda"]),
        (&["snapshots", "nobody"], &["nobody"]),
        (&["serve", "plain@zzzzzz", "--socket", &fixture.text("n.sock")], &["zzzzzz"]),
        (&["check", "nobody"], &["nobody"]),
    ];
    for (arguments, words) in table {
        names(&fixture.try_fleece(arguments)?.code(14)?, words);
    }
    assert!(!Path::new(&to).exists(), "a refused restore leaves no file");
    names(&fixture.try_fleecectl(&["verify", "nobody"])?.code(14)?, &["nobody"]);
    Ok(())
}

#[test]
fn a_vm_without_the_named_disk() -> Result {
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "narrow")?.with_disk("qcow2", 16 * MIB)?;
    let mut guest = machine.start()?;
    let refused = fixture.backup(&machine, &["--disk", "vdz"])?.finish(SOON)?.code(14)?;
    names(&refused, &["vdz", "vda"]);
    let refused = fixture.backup(&machine, &["--exclude-disk", "vda"])?.finish(SOON)?;
    assert!([2, 14].contains(&refused.code), "{} {}", refused.code, refused.err);
    guest.is_left_alone(&machine, 0)?;
    assert_eq!(fixture.figure("snapshots")?, 0);
    Ok(())
}

#[test]
fn the_same_name_with_another_uuid() -> Result {
    let fixture = Fixture::new()?;
    let first = Machine::new(fixture.folder(), "web")?.with_disk("qcow2", 16 * MIB)?;
    let mut guest = first.start()?;
    guest.obey("write vda 0 1048576 1")?;
    take(&fixture, &first, &mut guest, "first")?;
    guest.power_off()?;

    let mut second = Machine::new(&fixture.path("other"), "web")?.with_disk("qcow2", 16 * MIB)?;
    let mut guest = second.start()?;
    guest.obey("write vda 0 1048576 2")?;
    let refused = fixture.backup(&second, &[])?.finish(SOON)?;
    assert_ne!(refused.code, 0);
    names(&refused, &["web", "--adopt", "--as"]);
    guest.is_left_alone(&second, 0)?;
    assert_eq!(fixture.figure("snapshots")?, 1);

    fixture.backup(&second, &["--as", "web-new"])?.finish(SOON)?.code(0)?;
    image::convert(&second.disks[0].path, "qcow2", &fixture.path("truth.raw"), "raw")?;
    image::same(&fixture.path("truth.raw"), &fixture.restore("web-new", "vda")?)?;

    guest.power_off()?;
    second.uuid = uuid::Uuid::new_v4();
    let mut guest = second.start()?;
    let uuid = first.uuid.to_string();
    fixture.backup(&second, &["--adopt", &uuid])?.finish(SOON)?.code(0)?;
    image::same(&fixture.path("truth.raw"), &fixture.restore("web", "vda")?)?;
    guest.is_left_alone(&second, 2)
}

#[test]
fn targets_that_exist_are_too_small_or_contradict() -> Result {
    let fixture = Fixture::new()?;
    let truth = stored(&fixture)?;
    let to = fixture.text("there.raw");
    fs::write(&to, b"precious")?;
    names(
        &fixture.try_fleece(&["restore", "plain", "--to", &to])?.code(15)?,
        &["there.raw", "--force"],
    );
    assert_eq!(fs::read(&to)?, b"precious");
    fixture.fleece(&["restore", "plain", "--to", &to, "--force"])?;
    image::same(&truth, Path::new(&to))?;

    let missing = fixture.text("no/such/folder/x.raw");
    names(&fixture.try_fleece(&["restore", "plain", "--to", &missing])?.code(15)?, &["folder"]);
    let refused = fixture.try_fleece(&["restore", "plain", "--to", "-", "-O", "qcow2"])?;
    assert!([2, 15].contains(&refused.code), "{}", refused.code);

    // A device that is too small: a loop device where the machine has them.
    let small = fixture.path("small.raw");
    image::raw(&small, MIB, &[])?;
    let Some(small) = Loop::over(&small) else { return Ok(()) };
    let device = small.0.as_str();
    let refused = fixture.try_fleece(&["restore", "plain", "--to", device, "--force"])?.code(15)?;
    names(&refused, &[device]);
    let contradicting =
        fixture.try_fleece(&["restore", "plain", "--to", device, "--force", "-O", "qcow2"])?;
    assert!([2, 15].contains(&contradicting.code));
    Ok(())
}

/// A loop device; it goes with its owner.
struct Loop(String);

impl Loop {
    /// One over a file; none where the machine has none.
    fn over(file: &Path) -> Option<Self> {
        let mut command = Command::new("losetup");
        let device = tools::run(command.args(["--find", "--show"]).arg(file)).ok()?;
        Some(Loop(device.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = tools::run(Command::new("losetup").args(["--detach", &self.0]));
    }
}

/// libvirt gives every VM device nodes of its own: QEMU's locks on these do not meet ours.
#[test]
fn a_block_device_that_another_process_has_open_by_a_node_of_its_own() -> Result {
    let fixture = Fixture::new()?;
    stored(&fixture)?;
    let content = fixture.path("content.img");
    image::raw(&content, 8 * MIB, &[(0, 4 * MIB, 2)])?;
    let Some(disk) = Loop::over(&content) else { return Ok(()) };
    let device = disk.0.as_str();
    // In a file system that surely allows devices.
    let place = Tmpfs::new(MIB)?;
    let node = place.file("node");
    let number = fs::metadata(device)?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let mut mknod = Command::new("mknod");
    tools::run(mknod.arg(&node).args(["b", &major.to_string(), &minor.to_string()]))?;

    let image = format!("--image=vda={device}");
    // Who only reads disturbs no backup; a restore disturbs whoever has it open.
    for (writes, expected) in [(true, 11), (false, 0)] {
        let opened = fs::File::options().read(true).write(writes).open(&node)?;
        let mut holder = Command::new("sleep").arg("600").stdin(opened).spawn()?;
        let backup = fixture.try_fleece(&["backup", "device", &image]);
        let restore = fixture.try_fleece(&["restore", "plain", "--to", device, "--force"]);
        holder.kill()?;
        holder.wait()?;
        let (backup, restore) = (backup?.code(expected)?, restore?.code(11)?);
        let words = [device, "sleep", &holder.id().to_string()];
        names(&restore, &words);
        if writes {
            names(&backup, &words);
        }
    }
    image::same(&content, &fixture.restore("device", "vda")?)?;

    // What looks like another format there may be what a guest wrote.
    let inside = fixture.path("inside.qcow2");
    image::create(&inside, "qcow2", MIB)?;
    let Some(disk) = Loop::over(&inside) else { return Ok(()) };
    let image = format!("--image=vda={}", disk.0);
    let refused = fixture.try_fleece(&["backup", "inside", &image])?.code(2)?;
    names(&refused, &[&disk.0, "qcow2 on a block device", "=raw:"]);
    Ok(())
}

#[test]
fn a_target_disk_that_is_full() -> Result {
    let fixture = Fixture::new()?;
    stored(&fixture)?;
    // /dev/full: every write fails, as on a full disk.
    let refused = fixture.try_fleece(&["restore", "plain", "--to", "/dev/full", "--force"])?;
    assert!([1, 15].contains(&refused.code), "{}", refused.code);
    names(&refused, &["/dev/full"]);
    let small = Tmpfs::new(MIB / 2)?;
    let target = small.path().join("plain.raw");
    let refused = fixture.try_fleece(&["restore", "plain", "--to", &target.display().to_string()]);
    names(&refused?.code(15)?, &[&target.display().to_string(), "cannot write to the target at"]);
    assert_eq!(fs::read_dir(small.path())?.count(), 0, "something is left of it");
    Ok(())
}

#[test]
fn images_that_are_missing_or_none() -> Result {
    let fixture = Fixture::new()?;
    let refused = fixture.try_fleece(&["backup", "x", "--image", "vda=/nowhere/x.qcow2"])?;
    assert_ne!(refused.code, 0);
    names(&refused, &["/nowhere/x.qcow2"]);
    let folder = fixture.folder().display().to_string();
    let refused = fixture.try_fleece(&["backup", "x", &format!("--image=vda={folder}")])?;
    assert_ne!(refused.code, 0);
    names(&refused, &[&folder]);
    assert_eq!(fixture.figure("snapshots")?, 0);
    Ok(())
}

#[test]
fn foreign_damaged_newer_and_absent_stores() -> Result {
    let mut fixture = Fixture::new()?;
    fixture.leave_damaged();
    stored(&fixture)?;
    fixture.stop_engine()?;
    let (config, state) = (fixture.path("engine.toml"), fixture.path("state"));

    // Another store's folder in this configuration.
    let other = Fixture::without_engine()?;
    let text = fs::read_to_string(&config)?;
    let foreign = fixture.path("foreign.toml");
    fs::write(&foreign, text.replace(&fixture.text("store"), &other.text("store")))?;
    let refused = engine_refuses(&foreign, &fixture.path("state2"), 12)?;
    names(&refused, &["key"]);

    let empty = fixture.path("empty");
    fs::create_dir(&empty)?;
    let nothing = fixture.path("nothing.toml");
    fs::write(&nothing, text.replace(&fixture.text("store"), &empty.display().to_string()))?;
    names(&engine_refuses(&nothing, &fixture.path("state3"), 10)?, &["empty", "init"]);

    // Another store under an old state directory: the index is only a hint, and made anew.
    let mut command = tools::fleece("fleece-engine")?;
    command.arg("--config").arg(other.path("engine.toml")).arg("--state-dir").arg(&state);
    command.arg("--socket").arg(other.socket());
    let mut engine = Running::start("fleece-engine", &mut command)?;
    engine.wait_printed(SOON, "belongs to store")?;
    wait_until(SOON, "the engine's socket", || Ok(other.socket().exists()))?;
    other.verify()?;
    engine.signal(Signal::TERM)?;
    engine.finish(SOON)?.code(0)?;

    // init never overwrites.
    let again = fixture.path("again.toml").display().to_string();
    let refused =
        fixture.try_fleecectl(&["init", "--store", &fixture.text("store"), "--config", &again])?;
    assert_ne!(refused.code, 0);
    names(&refused, &["store"]);
    let elsewhere = fixture.text("elsewhere");
    let refused = fixture.try_fleecectl(&[
        "init",
        "--store",
        &elsewhere,
        "--config",
        &fixture.text("engine.toml"),
    ])?;
    assert_ne!(refused.code, 0);
    names(&refused, &["engine.toml"]);
    let refused = engine_refuses(Path::new("/nowhere/engine.toml"), &state, 10)?;
    names(&refused, &["/nowhere/engine.toml", "init"]);
    Ok(())
}

#[test]
fn passphrases_and_keys() -> Result {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::write(path("right"), "correct horse battery staple\n")?;
    fs::write(path("wrong"), "incorrect horse\n")?;
    let run = |arguments: &[&str]| -> Result<Finished> {
        Running::start("fleecectl", tools::fleece("fleecectl")?.args(arguments))?.finish(SOON)
    };
    let (store, config) = (path("store"), path("engine.toml"));
    let made = run(&[
        "init",
        "--store",
        &store,
        "--config",
        &config,
        "--passphrase-file",
        &path("right"),
    ])?
    .code(0)?;
    assert!(made.printed().contains("key export"), "{}", made.printed());
    let exported = run(&["key", "export", "--config", &config])?.code(0)?;
    fs::write(path("exported"), &exported.out)?;
    run(&["key", "check", &path("exported"), "--config", &config])?.code(0)?;
    fs::write(path("garbage"), "this is not a key")?;
    let refused = run(&["key", "check", &path("garbage"), "--config", &config])?.code(12)?;
    names(&refused, &["garbage"]);

    // The key file is lost: refused with the ways out, and only the right passphrase brings it back.
    let lost = folder.path().join("engine.key");
    fs::remove_file(&lost)?;
    let refused = engine_refuses(Path::new(&config), &folder.path().join("state"), 12)?;
    names(&refused, &["engine.key", "--passphrase-file"]);
    let export = |passphrase: &str| {
        run(&["key", "export", "--config", &config, "--passphrase-file", &path(passphrase)])
    };
    names(&export("wrong")?.code(12)?, &["passphrase"]);
    fs::write(&lost, export("right")?.code(0)?.out)?;
    fs::set_permissions(&lost, fs::Permissions::from_mode(0o400))?;
    assert_eq!(fs::read_to_string(&lost)?.trim(), exported.out.trim());
    Ok(())
}
