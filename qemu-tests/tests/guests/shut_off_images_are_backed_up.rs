//! VMs that are shut off: from their images, with and without a valid dirty bitmap.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use qemu_tests::fixture::snapshot_id;
use qemu_tests::process::Running;
use qemu_tests::wait::LONG;
use qemu_tests::{Fixture, MIB, Machine, Result, image, take, tools};

#[test]
fn an_image_with_a_valid_bitmap_is_incremental_and_one_without_is_read_in_full() -> Result {
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "asleep")?.with_disk("qcow2", 64 * MIB)?;
    let path = &machine.disks[0].path;
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {MIB} {} 1", 16 * MIB))?;
    take(&fixture, &machine, &mut guest, "live")?;
    guest.obey(&format!("write vda {} {} 2", 20 * MIB, 2 * MIB))?;
    guest.power_off()?;

    let (id, printed) = fixture.backup_images("asleep", &[("vda", path)])?;
    assert!(printed.printed().contains("incremental since"), "{}", printed.printed());
    let truth = fixture.path("truth.raw");
    image::convert(path, "qcow2", &truth, "raw")?;
    image::same(&truth, &fixture.restore(&format!("asleep@{id}"), "vda")?)?;

    // The bitmap that the backup left carries on when the guest runs again.
    let mut guest = machine.start()?;
    guest.obey(&format!("write vda {} {MIB} 3", 30 * MIB))?;
    let taken = take(&fixture, &machine, &mut guest, "live-again")?;
    taken.mentions("incremental since")?;
    taken.restores_exactly(&fixture)?;
    guest.power_off()?;

    let listed = tools::run(tools::qemu("qemu-img")?.arg("info").arg(path))?;
    let name = listed
        .lines()
        .find_map(|line| line.trim().strip_prefix("name: fleece"))
        .map(|rest| format!("fleece{rest}"))
        .expect("a bitmap of ours");
    tools::run(tools::qemu("qemu-img")?.args(["bitmap", "--remove"]).arg(path).arg(&name))?;
    let (id, printed) = fixture.backup_images("asleep", &[("vda", path)])?;
    assert!(printed.printed().contains("FULL READ"), "{}", printed.printed());
    image::convert(path, "qcow2", &truth, "raw")?;
    image::same(&truth, &fixture.restore(&format!("asleep@{id}"), "vda")?)
}

#[test]
fn raw_images_with_holes_and_an_odd_size() -> Result {
    let fixture = Fixture::new()?;
    let path = fixture.path("odd.raw");
    // 512 bytes beyond the last block, and most of it holes.
    image::raw(
        &path,
        512 * MIB + 512,
        &[(3 * MIB + 512, 5 * MIB, 1), (400 * MIB, MIB, 2), (512 * MIB, 512, 3)],
    )?;
    let (id, _) = fixture.backup_images("odd", &[("vda", &path)])?;
    let restored = fixture.restore(&format!("odd@{id}"), "vda")?;
    image::same(&path, &restored)?;
    let taken = image::allocated(&restored)?;
    assert!(taken < 16 * MIB, "holes became {taken} bytes");
    assert_eq!(fixture.figure("unique_blocks")?, image::distinct_blocks(&[&path])?);
    Ok(())
}

#[test]
fn a_qcow2_target_reads_the_same() -> Result {
    let fixture = Fixture::new()?;
    let path = fixture.path("plain.raw");
    image::raw(&path, 96 * MIB, &[(MIB, 5 * MIB, 1), (80 * MIB, MIB, 2)])?;
    let (id, _) = fixture.backup_images("plain", &[("vda", &path)])?;
    let target = fixture.path("restored.qcow2");
    let to = target.display().to_string();
    fixture.fleece(&["restore", &format!("plain@{id}"), "--to", &to, "-O", "qcow2"])?;
    image::same_as_qemu_reads(&path, &target, "qcow2")?;
    let taken = image::allocated(&target)?;
    assert!(taken < 16 * MIB, "6 MiB of data became {taken} bytes");
    Ok(())
}

#[test]
fn all_disks_of_a_vm_go_to_a_folder() -> Result {
    let fixture = Fixture::new()?;
    let (a, b) = (fixture.path("a.raw"), fixture.path("b.raw"));
    image::raw(&a, 8 * MIB, &[(0, 4 * MIB, 1)])?;
    image::raw(&b, 16 * MIB, &[(8 * MIB, 4 * MIB, 1)])?;
    fixture.backup_images("both", &[("vda", &a), ("vdb", &b)])?;
    let folder = fixture.path("out");
    fs::create_dir(&folder)?;
    fixture.fleece(&["restore", "both@latest", "--to-dir", &fixture.text("out"), "-O", "raw"])?;
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        let truth = if path.display().to_string().contains("vda") { &a } else { &b };
        if image::same(truth, &path).is_ok() {
            found.push(path);
        }
    }
    assert_eq!(found.len(), 2, "{found:?}");
    Ok(())
}

#[test]
fn an_image_in_use_is_refused() -> Result {
    let fixture = Fixture::new()?;
    let machine = Machine::new(fixture.folder(), "awake")?.with_disk("qcow2", 16 * MIB)?;
    let _guest = machine.start()?;
    let argument = format!("--image=vda={}", machine.disks[0].path.display());
    let refused = fixture.try_fleece(&["backup", "awake", &argument])?.code(11)?;
    assert!(refused.err.contains("vda.qcow2"), "{}", refused.err);
    assert_eq!(fixture.figure("snapshots")?, 0);
    Ok(())
}

#[test]
fn by_threads_where_io_uring_is_refused_or_not_to_be_trusted() -> Result {
    let fixture = Fixture::new()?;
    let (truth, path) = (fixture.path("truth.raw"), fixture.path("vda.qcow2"));
    image::raw(&truth, 16 * MIB, &[(MIB, 5 * MIB, 1)])?;
    image::convert(&truth, "raw", &path, "qcow2")?;
    let (bin, tried) = (fixture.path("bin"), fixture.path("tried"));
    fs::create_dir(&bin)?;
    for (version, trusted) in [("7.2.22 (Debian)", true), ("7.0.0", false)] {
        // In front of the real one: it answers as another one would, or one without io_uring.
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in\n--version) echo 'qemu-nbd {version}';;\n\
             *--aio=io_uring*) touch {}; echo 'Unable to use io_uring' >&2; exit 1;;\n\
             *) exec {} \"$@\";;\nesac\n",
            tried.display(),
            tools::qemu("qemu-nbd")?.get_program().display()
        );
        let program = bin.join("qemu-nbd");
        fs::write(&program, script)?;
        fs::set_permissions(&program, Permissions::from_mode(0o755))?;
        let image = format!("--image=vda={}", path.display());
        let mut command = fixture.fleece_command(&["backup", "vm", "--full", &image])?;
        let paths = format!("{}:{}", bin.display(), tools::search_path()?.display());
        let finished = Running::start("backup", command.env("PATH", paths))?.finish(LONG)?;
        let id = snapshot_id(&finished.code(0)?.printed())?;
        assert_eq!(tried.exists(), trusted, "qemu-nbd {version}");
        image::same(&truth, &fixture.restore(&format!("vm@{id}"), "vda")?)?;
        if trusted {
            fs::remove_file(&tried)?;
        }
    }
    Ok(())
}

#[test]
fn stdout_is_a_target() -> Result {
    let fixture = Fixture::new()?;
    let path = fixture.path("piped.raw");
    image::raw(&path, 8 * MIB, &[(MIB, 2 * MIB, 1)])?;
    fixture.backup_images("piped", &[("vda", &path)])?;
    let out = fixture.path("out.raw");
    let file = OpenOptions::new().create(true).truncate(true).write(true).open(&out)?;
    let status =
        fixture.fleece_command(&["restore", "piped", "--to", "-"])?.stdout(file).status()?;
    assert!(status.success());
    image::same(&path, &out)
}

#[test]
fn an_image_that_cannot_keep_track_is_read_in_full_each_time() -> Result {
    let fixture = Fixture::new()?;
    let truth = fixture.path("truth.raw");
    let outside = format!("data_file={}", fixture.path("data.raw").display());
    for (name, with) in [("old", "compat=0.10"), ("outside", outside.as_str())] {
        let path = fixture.path(&format!("{name}.qcow2"));
        let create = ["create", "-q", "-f", "qcow2", "-o", with];
        tools::run(tools::qemu("qemu-img")?.args(create).arg(&path).arg("16M"))?;
        // One that names another file is an image of that format only where that is said.
        let named = format!("qcow2:{}", path.display());
        for round in 1..=2 {
            let write = format!("write -P {round} {round}M 1M");
            tools::run(tools::qemu("qemu-io")?.args(["-f", "qcow2", "-c", &write]).arg(&path))?;
            let (id, printed) = fixture.backup_images(name, &[("vda", Path::new(&named))])?;
            assert!(printed.printed().contains("FULL READ"), "{}", printed.printed());
            image::convert(&path, "qcow2", &truth, "raw")?;
            image::same(&truth, &fixture.restore(&format!("{name}@{id}"), "vda")?)?;
        }
    }
    Ok(())
}

#[test]
fn what_a_guest_writes_does_not_say_which_files_are_backed_up() -> Result {
    let fixture = Fixture::new()?;
    let (secret, disk) = (fixture.path("secret.raw"), fixture.path("disk.img"));
    image::raw(&secret, 8 * MIB, &[(0, 8 * MIB, 1)])?;
    let behind = secret.display().to_string();
    let headers: [(&str, &[&str]); 2] =
        [("qcow2", &["-b", &behind, "-F", "raw"]), ("vmdk", &["-o", "subformat=monolithicFlat"])];
    for (format, with) in headers {
        let header = fixture.path(&format!("header.{format}"));
        let mut create = tools::qemu("qemu-img")?;
        create.args(["create", "-q", "-f", format]).args(with).arg(&header).arg("8M");
        tools::run(&mut create)?;
        image::raw(&disk, 8 * MIB, &[(MIB, 4 * MIB, 2)])?;
        OpenOptions::new().write(true).open(&disk)?.write_all(&fs::read(&header)?)?;

        let probed = format!("--image=vda={}", disk.display());
        let refused = fixture.try_fleece(&["backup", "disk", &probed])?.code(2)?;
        for word in ["disk.img", "guest", &format!("vda={format}:"), "vda=raw:"] {
            assert!(refused.err.contains(word), "'{word}' is not named: {}", refused.err);
        }
        let raw = format!("raw:{}", disk.display());
        let (id, _) = fixture.backup_images("disk", &[("vda", Path::new(&raw))])?;
        image::same(&disk, &fixture.restore(&format!("disk@{id}"), "vda")?)?;
    }
    // An overlay that the operator says is one.
    let overlay = format!("qcow2:{}", fixture.path("header.qcow2").display());
    let (id, _) = fixture.backup_images("overlay", &[("vda", Path::new(&overlay))])?;
    image::same(&secret, &fixture.restore(&format!("overlay@{id}"), "vda")?)
}
