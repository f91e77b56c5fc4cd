//! The harness is checked before it checks anything: what the guest is told to write is what the
//! truth holds, and a wrong byte is found.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use qemu_tests::cluster::Cluster;
use qemu_tests::content::{BLOCK, record, record_number};
use qemu_tests::wait::{SOON, wait_until};
use qemu_tests::{MIB, Machine, Result, image};

#[test]
fn a_guest_writes_what_it_is_told_and_the_truth_shows_it() -> Result {
    let folder = tempfile::tempdir()?;
    let machine = Machine::new(folder.path(), "plain")?
        .with_disk("qcow2", 32 * MIB)?
        .with_disk("raw", 16 * MIB)?;
    let mut guest = machine.start()?;
    for disk in ["vda", "vdb"] {
        guest.obey(&format!("write {disk} 0 {MIB} 7"))?;
        guest.obey(&format!("zero {disk} 8192 4096"))?;
    }
    let inside = guest.obey("sum vda 0 1048576")?;
    guest.pause()?;

    let expected = folder.path().join("expected.raw");
    image::raw(&expected, 32 * MIB, &[(0, MIB, 7)])?;
    OpenOptions::new().write(true).open(&expected)?.write_all_at(&[0; BLOCK], 8192)?;
    let truth = folder.path().join("truth.raw");
    image::convert(&machine.disks[0].path, "qcow2", &truth, "raw")?;
    image::same(&expected, &truth)?;
    assert_eq!(image::distinct_blocks(&[&truth, &expected])?, 255);
    let bytes = std::fs::read(&truth)?;
    assert_eq!(qemu_tests::content::sum(&bytes[..MIB as usize]).to_string(), inside);

    OpenOptions::new().write(true).open(&expected)?.write_all_at(&[1], 5 * MIB + 1)?;
    let error = image::same(&expected, &truth).expect_err("a wrong byte");
    assert!(error.to_string().contains("differ in 1 blocks, first at byte 5242880"), "{error}");

    guest.go_on()?;
    guest.power_off()
}

#[test]
fn a_writer_leaves_intact_records_in_order_on_both_disks() -> Result {
    let folder = tempfile::tempdir()?;
    let machine = Machine::new(folder.path(), "writer")?
        .with_disk("qcow2", 32 * MIB)?
        .with_disk("qcow2", 32 * MIB)?;
    let mut guest = machine.start()?;
    guest.obey(&format!("start 3 {MIB} {} 0 vda vdb", 16 * MIB))?;
    guest.keeps_writing()?;
    guest.pause()?;
    let mut numbers = Vec::new();
    for disk in &machine.disks {
        let truth = folder.path().join(&disk.name);
        image::convert(&disk.path, "qcow2", &truth, "raw")?;
        let bytes = std::fs::read(truth)?;
        let number = record_number(&bytes[..BLOCK]).expect("an intact record");
        assert_eq!(bytes[..BLOCK], record(3, number));
        numbers.push(number);
    }
    assert!(numbers[0] - numbers[1] <= 1, "{numbers:?}");
    Ok(())
}

#[test]
fn an_agent_answers() -> Result {
    let folder = tempfile::tempdir()?;
    let machine = Machine::new(folder.path(), "agent")?.with_disk("qcow2", 16 * MIB)?.with_agent();
    let mut guest = machine.start()?;
    wait_until(SOON, "the agent opening its port", || {
        let chardevs = guest.qmp.execute("query-chardev", &serde_json::json!({}))?;
        let agent =
            chardevs.as_array().into_iter().flatten().find(|one| one["label"] == "qga0").cloned();
        Ok(agent.is_some_and(|one| one["frontend-open"] == true))
    })
}

#[test]
fn a_link_is_cut_one_way() -> Result {
    let cluster = Cluster::of_a_list_on_hosts(2)?;
    // Each lists itself first.
    let reaches = |host: usize| -> Result<bool> {
        let hosts = cluster.ask(host, &["hosts"])?;
        Ok(hosts.get(1).is_some_and(|other| other["state"] != "silent"))
    };
    wait_until(SOON, "both reaching each other", || Ok(reaches(0)? && reaches(1)?))?;
    cluster.cut(0, 1, true)?;
    wait_until(SOON, "the first reaching the second no more", || Ok(!reaches(0)?))?;
    assert!(reaches(1)?, "it was to be cut one way only");
    cluster.cut(0, 1, false)?;
    wait_until(SOON, "both reaching each other again", || Ok(reaches(0)? && reaches(1)?))
}
