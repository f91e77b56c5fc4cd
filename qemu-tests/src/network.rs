//! Hosts with addresses of their own: network namespaces at one bridge.

use std::collections::BTreeMap;
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;

use crate::wire::{Conditions, Counts, Wire};
use crate::{Result, tools};

/// Networks of this process: each has a number, and so addresses, of its own.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A bridge, and the namespaces at it; all of it goes with this.
pub struct Network {
    /// What all names begin with.
    tag: String,
    /// `10.a.b`.
    subnet: String,
    hosts: usize,
    /// Instead of veths.
    wires: BTreeMap<usize, Wire>,
}

fn ip(arguments: &str) -> Result {
    tools::run(tools::as_root("ip").args(arguments.split(' '))).map(drop)
}

impl Network {
    /// A bridge of our side, and no host yet.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn new() -> Result<Self> {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = process::id();
        let tag = format!("f{id:x}{n}");
        // Test processes run beside one another.
        let subnet = format!("10.{}.{}", 64 + id % 128, (id / 128 * 8 + n) % 256);
        let network = Network { tag, subnet, hosts: 0, wires: BTreeMap::new() };
        // An address of its own: it would take that of a port, and change it once that port goes, while hosts
        // go on sending there for half a minute.
        ip(&format!("link add {} address 02:00:00:00:00:01 type bridge", network.tag))?;
        ip(&format!("addr add {}/24 dev {}", network.ours(), network.tag))?;
        ip(&format!("link set {} up", network.tag))?;
        Ok(network)
    }

    /// Our address at the bridge.
    #[must_use]
    pub fn ours(&self) -> String {
        format!("{}.1", self.subnet)
    }

    /// A host's address.
    #[must_use]
    pub fn address(&self, host: usize) -> String {
        format!("{}.{}", self.subnet, host + 10)
    }

    fn namespace(&self, host: usize) -> String {
        format!("{}h{host}", self.tag)
    }

    /// Our end of a host's cable.
    fn cable(&self, host: usize) -> String {
        format!("{}v{host}", self.tag)
    }

    /// A host's end of a wire, until it has it.
    fn far_end(&self, host: usize) -> String {
        format!("{}w{host}", self.tag)
    }

    /// Adds the next host.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn add_host(&mut self) -> Result {
        let (namespace, cable) = (self.namespace(self.hosts), self.cable(self.hosts));
        ip(&format!("netns add {namespace}"))?;
        self.hosts += 1;
        ip(&format!("link add {cable} type veth peer name eth0 netns {namespace}"))?;
        ip(&format!("link set {cable} master {} up", self.tag))?;
        ip(&format!("-n {namespace} link set lo up"))?;
        self.connect(self.hosts - 1)
    }

    /// A host's end of its cable is there.
    fn connect(&self, host: usize) -> Result {
        let (namespace, address) = (self.namespace(host), self.address(host));
        ip(&format!("-n {namespace} addr add {address}/24 dev eth0"))?;
        ip(&format!("-n {namespace} link set eth0 up"))
    }

    /// The same command on a host.
    #[must_use]
    pub fn on(&self, host: usize, command: &Command) -> Command {
        let mut on = tools::as_root("ip");
        on.args(["netns", "exec", &self.namespace(host)]).arg(command.get_program());
        on.args(command.get_args());
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                on.env(name, value);
            }
        }
        on
    }

    /// Bytes that a host has sent so far, with all headers; if its cable was replaced, those that have come
    /// through the new one.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn sent(&self, host: usize) -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/rx_bytes", self.cable(host));
        Ok(std::fs::read_to_string(&path).context(path)?.trim().parse()?)
    }

    /// Pulls a host's cable out at the bridge, or puts it in again.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn plug(&self, host: usize, plugged: bool) -> Result {
        ip(&format!("link set {} {}", self.cable(host), if plugged { "up" } else { "down" }))
    }

    /// What a host sends to a port of another one gets nowhere from here on, or goes again. What the other
    /// one begins goes on, both ways.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn cut(&self, from: usize, (to, port): (usize, u16), cut: bool) -> Result {
        let verb = if cut { "add" } else { "del" };
        let (namespace, address) = (self.namespace(from), self.address(to));
        let rule = format!("to {address} ipproto tcp dport {port} blackhole");
        ip(&format!("-n {namespace} rule {verb} {rule}"))
    }

    /// Gives a running host another cable. Its addresses stay, of both kinds, so connections go on; what is
    /// under way is lost, and so are the rate and the counts of the cable before.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn replace_cable(&mut self, host: usize, conditions: Conditions, seed: u64) -> Result {
        let (namespace, cable) = (self.namespace(host), self.cable(host));
        let far = self.far_end(host);
        let old =
            tools::run(tools::as_root("ip").args(["-n", &namespace, "link", "show", "eth0"]))?;
        let mac = old.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        let mac = mac.with_context(|| format!("no link/ether in: {old}"))?;
        let was_wire = self.wires.remove(&host).is_some();
        // With a veth, our end goes, too.
        ip(&format!("-n {namespace} link del eth0"))?;
        if was_wire {
            ip(&format!("link del {cable}"))?;
        }
        let user = rustix::process::geteuid().as_raw();
        ip(&format!("tuntap add dev {cable} mode tap user {user}"))?;
        ip(&format!("tuntap add dev {far} mode tap user {user}"))?;
        self.wires.insert(host, Wire::between([&cable, &far], conditions, seed)?);
        ip(&format!("link set {cable} master {} up", self.tag))?;
        ip(&format!("link set {far} address {mac}"))?;
        ip(&format!("link set {far} netns {namespace} name eth0"))?;
        self.connect(host)
    }

    /// What has become of frames at a host's cable that replaced another.
    ///
    /// # Errors
    /// When there is none, or it broke.
    pub fn counts(&self, host: usize) -> Result<Counts> {
        self.wires.get(&host).context("the cable was not replaced")?.counts()
    }

    /// What a host sends goes at this rate (`20mbit`) from here on; what does not fit into a short queue
    /// is lost. For a delay, see [`Network::replace_cable`].
    ///
    /// # Errors
    /// When the system refuses.
    pub fn slow(&self, host: usize, rate: &str) -> Result {
        let namespace = self.namespace(host);
        let mut tc = tools::as_root("ip");
        tc.args(["netns", "exec", &namespace, "tc", "qdisc", "replace", "dev", "eth0", "root"]);
        tc.args(["tbf", "rate", rate, "burst", "16k", "latency", "5ms"]);
        tools::run(&mut tc).map(drop).context("tc")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.wires.clear();
        for host in 0..self.hosts {
            // The kernel keeps a namespace while a connection there is closing.
            for end in [self.cable(host), self.far_end(host)] {
                let _ = ip(&format!("link del {end}"));
            }
            let _ = ip(&format!("netns del {}", self.namespace(host)));
        }
        let _ = ip(&format!("link del {}", self.tag));
    }
}
