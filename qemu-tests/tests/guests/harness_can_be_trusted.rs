//! The harness is checked before it checks anything: what the guest is told to write is what the
//! truth holds, and a wrong byte is found.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use qemu_tests::cluster::Cluster;
use qemu_tests::content::{BLOCK, record, record_number};
use qemu_tests::network::Network;
use qemu_tests::wait::{SOON, wait_until};
use qemu_tests::wire::Conditions;
use qemu_tests::{MIB, Machine, Result, image, tools};

/// A port of a host on which nobody listens.
const CLOSED: u16 = 9;

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

/// How long a host takes to refuse a connection: a round trip.
fn round_trip(network: &Network, limit: Duration) -> Result<Duration> {
    let address = SocketAddr::new(network.address(0).parse()?, CLOSED);
    let begun = Instant::now();
    match TcpStream::connect_timeout(&address, limit) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(begun.elapsed()),
        other => bail!("it was to be refused: {other:?}"),
    }
}

#[test]
fn a_wire_delays_what_it_is_told() -> Result {
    let mut network = Network::new()?;
    network.add_host()?;
    let (delay, jitter) = (Duration::from_millis(20), Duration::from_millis(5));
    // A wire in place of a veth, and a wire in place of a wire.
    network.replace_cable(0, Conditions::default(), 1)?;
    let without: Vec<_> = (0..20).map(|_| round_trip(&network, SOON)).collect::<Result<_>>()?;
    assert!(without.iter().any(|one| *one < delay), "slow without a delay: {without:?}");
    network.replace_cable(0, Conditions { delay, jitter, loss: 0.0 }, 1)?;
    let with: Vec<_> = (0..50).map(|_| round_trip(&network, SOON)).collect::<Result<_>>()?;
    assert!(with.iter().all(|one| *one >= 2 * (delay - jitter)), "too quick: {with:?}");
    // The mean of so many lies within 3 ms of twice the delay, were all else done in no time.
    let sum: Duration = with.iter().sum();
    assert!(sum / 50 >= 2 * delay - Duration::from_millis(3), "too quick: {with:?}");

    let sent = network.sent(0)?;
    network.plug(0, false)?;
    assert!(round_trip(&network, 10 * delay).is_err(), "it was to be pulled out");
    network.plug(0, true)?;
    round_trip(&network, SOON)?;
    assert!(network.sent(0)? > sent, "nothing was sent");
    Ok(())
}

#[test]
fn a_wire_loses_and_reorders_what_it_is_told() -> Result {
    const SENT: u64 = 4000;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    println!("seed {seed}");
    let mut network = Network::new()?;
    network.add_host()?;
    let ms = Duration::from_millis;
    network.replace_cable(0, Conditions { delay: ms(2), jitter: ms(1), loss: 0.05 }, seed)?;
    // ARP, which gives up after three losses, is over then.
    wait_until(SOON, "a way to the host", || Ok(round_trip(&network, SOON).is_ok()))?;

    // What the kernel counts, not the wire.
    let arrived = || -> Result<u64> {
        let snmp = tools::run(&mut network.on(0, Command::new("cat").arg("/proc/net/snmp")))?;
        let mut udp = snmp.lines().filter(|line| line.starts_with("Udp:"));
        let (names, values) = udp.next().zip(udp.next()).context("no UDP")?;
        let mut pairs = names.split(' ').zip(values.split(' '));
        let (_, value) = pairs.find(|(name, _)| *name == "NoPorts").context("no NoPorts")?;
        Ok(value.parse()?)
    };
    let socket = UdpSocket::bind((network.ours(), 0))?;
    for sent in 1..=SENT {
        socket.send_to(&[0; 1000], (network.address(0), CLOSED))?;
        // No queue is to overflow.
        if sent % 200 == 0 {
            wait_until(SOON, "all being here or lost", || {
                Ok(arrived()? + network.counts(0)?.lost >= sent)
            })?;
        }
    }
    let (counts, missing) = (network.counts(0)?, SENT - arrived()?);
    println!("{missing} of {SENT} are missing; {counts:?}");
    // 200, or five standard deviations less or more.
    assert!((131..270).contains(&missing), "{missing} of {SENT} are missing; {counts:?}");
    assert!(counts.overtaken > 0 && counts.overflowed == 0, "{counts:?}");
    Ok(())
}
