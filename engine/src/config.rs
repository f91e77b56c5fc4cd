//! The engine's configuration: `engine.toml`, overridden by the command line.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::budget::Budget;
use crate::cluster::map::{Member, PartitionMap};
use crate::detect::MAX_PARTITION_BITS;
use crate::error::{Context, Error, Kind, Result};
use crate::ids::HostId;
use crate::store::{Access, Location, Role};

/// The list of revoked certificates, beside the CA and beside the identity of each host.
pub const CRL_NAME: &str = "crl.pem";
/// Where the configuration is looked for.
pub const DEFAULT_CONFIG: &str = "/etc/fleece/engine.toml";
/// Where the engine listens.
pub const DEFAULT_SOCKET: &str = "/run/fleece/engine.sock";
/// Where the index and the sessions' working files live.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/fleece";

/// How endpoints begin that are spoken to by TLS.
const HTTPS: &str = "https://";

/// What `fleecectl init` writes and `fleece-engine` reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The store: a directory, or `s3://bucket/prefix`.
    pub store: String,
    /// The key file (mode 0400).
    pub key: PathBuf,
    /// What this engine may do with the store's objects: `host` creates and reads, `keeper` takes away, too.
    #[serde(default, skip_serializing_if = "is_host")]
    pub role: Role,
    /// The UNIX socket for `fleece` and `fleecectl`.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Local state: everything in it can be rebuilt from the store.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Memory of the engine, with a unit: `32M`.
    #[serde(default = "default_budget")]
    pub memory_budget: String,
    /// zstd level of new containers, 1 to 19.
    #[serde(default = "default_level")]
    pub compression_level: i32,
    /// The partitions of the index: 2 to the power of this.
    #[serde(default = "default_partition_bits")]
    pub partition_bits: u8,
    /// User ids, besides root and the engine's own, that may use the socket.
    #[serde(default)]
    pub allowed_uids: Vec<u32>,
    /// How a store of `s3://` is reached, as far as the environment does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<Access>,
    /// The other hosts; none: this engine answers for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterConfig>,
}

/// Hosts that answer for a part of the fingerprints each. They share the store and its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// This host's name among them, which its certificate proves.
    pub name: String,
    /// What `fleecectl cluster invite` made for this host: its certificate and key, and the CA's certificate (mode 0400).
    pub identity: PathBuf,
    /// The list of revoked certificates that `fleecectl cluster revoke` made; else `crl.pem` beside the
    /// identity, if it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crl: Option<PathBuf>,
    /// Where to listen, if not at the address in the list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// Without etcd: all hosts, this one too; the same list on each of them.
    #[serde(rename = "static", default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<HostConfig>,
    /// With etcd: its endpoints.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub etcd: Vec<String>,
    /// With etcd of https: the CAs that its certificate may be of (PEM); else the cluster's own, as in the identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etcd_ca: Option<PathBuf>,
    /// With etcd of https: what this host proves itself to it with (PEM); else the identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etcd_certificate: Option<PathBuf>,
    /// The key of that certificate (PEM, mode 0400).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etcd_key: Option<PathBuf>,
    /// With etcd: where the others reach this host's engine, host and port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// With etcd: this host's share beside the others'.
    #[serde(default = "default_capacity")]
    pub capacity: u32,
}

/// A host of the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Its name.
    pub name: String,
    /// Its host and port.
    pub address: String,
    /// Its share beside the others'.
    #[serde(default = "default_capacity")]
    pub capacity: u32,
}

impl ClusterConfig {
    fn check(&self) -> Result<()> {
        let wrong = |what: &str| Err(Error::new(Kind::Usage, format!("cluster: {what}")));
        let secure = self.etcd.iter().filter(|endpoint| endpoint.starts_with(HTTPS)).count();
        if secure > 0 && secure < self.etcd.len() {
            return wrong(
                "etcd has endpoints of https and others: what is said to one is said to all",
            );
        }
        if secure == 0
            && [&self.etcd_ca, &self.etcd_certificate, &self.etcd_key]
                .iter()
                .any(|path| path.is_some())
        {
            return wrong("etcd_ca, etcd_certificate and etcd_key are for endpoints of https://");
        }
        if self.etcd_certificate.is_some() != self.etcd_key.is_some() {
            return wrong("etcd_certificate and etcd_key go together: one of them is missing");
        }
        match (self.etcd.is_empty(), self.hosts.is_empty()) {
            (true, true) => wrong("neither etcd nor static says who is in it"),
            (false, false) => wrong("both etcd and static say who is in it"),
            (true, false) => self.fixed_map().map(drop),
            (false, true) if self.address.is_none() => {
                wrong("address is missing: where the others reach this host's engine")
            }
            (false, true) if self.capacity == 0 => wrong("capacity is 0: drain the host instead"),
            (false, true) => Ok(()),
        }
    }

    /// Whether etcd is spoken to by TLS.
    #[must_use]
    pub fn is_etcd_secure(&self) -> bool {
        self.etcd.iter().any(|endpoint| endpoint.starts_with(HTTPS))
    }

    /// The list of revoked certificates, and whether it has to be there.
    #[must_use]
    pub fn revocations(&self) -> (PathBuf, bool) {
        match &self.crl {
            Some(path) => (path.clone(), true),
            None => (self.identity.with_file_name(CRL_NAME), false),
        }
    }

    /// Where to listen for other hosts, if not at this host's address in `map`.
    #[must_use]
    pub fn listen_at<'a>(&'a self, map: &'a PartitionMap) -> &'a str {
        let of_the_list = || map.members().iter().find(|member| member.name == self.name);
        match (&self.listen, &self.address) {
            (Some(address), _) | (None, Some(address)) => address,
            (None, None) => of_the_list().map_or("", |member| &member.address),
        }
    }

    /// The partition map of `static`, and this host's number in it.
    ///
    /// # Errors
    /// [`Kind::Usage`] when the list is no cluster, or this host is not in it.
    pub fn fixed_map(&self) -> Result<(PartitionMap, HostId)> {
        let member = |host: &HostConfig| Member {
            number: HostId::default(),
            name: host.name.clone(),
            address: host.address.clone(),
            capacity: host.capacity,
        };
        let map = PartitionMap::fixed(self.hosts.iter().map(member).collect())?;
        match map.host(&self.name) {
            Some(us) => Ok((map, us)),
            None => {
                let what = format!("cluster.name is {}, which is not in cluster.static", self.name);
                Err(Error::new(Kind::Usage, what))
            }
        }
    }
}

fn is_host(role: &Role) -> bool {
    *role == Role::Host
}

fn default_capacity() -> u32 {
    1
}

fn default_socket() -> PathBuf {
    DEFAULT_SOCKET.into()
}

fn default_state_dir() -> PathBuf {
    DEFAULT_STATE_DIR.into()
}

fn default_budget() -> String {
    "32M".into()
}

fn default_level() -> i32 {
    1
}

fn default_partition_bits() -> u8 {
    4
}

impl Config {
    /// A configuration with the defaults for everything but the store and its key.
    #[must_use]
    pub fn new(store: String, key: PathBuf) -> Self {
        Config {
            store,
            key,
            role: Role::default(),
            socket: default_socket(),
            state_dir: default_state_dir(),
            memory_budget: default_budget(),
            compression_level: default_level(),
            partition_bits: default_partition_bits(),
            allowed_uids: Vec::new(),
            s3: None,
            cluster: None,
        }
    }

    /// Reads and checks `path`.
    ///
    /// # Errors
    /// [`Kind::NoStore`] when there is no such file (`fleecectl init` makes it),
    /// [`Kind::Usage`] when its content is wrong.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::caused(
                Kind::NoStore,
                format!(
                    "cannot read the configuration {} (fleecectl init --store DIR --config {} makes one)",
                    path.display(),
                    path.display()
                ),
                error,
            )
        })?;
        let config: Config = toml::from_str(&text).map_err(|error| {
            Error::caused(Kind::Usage, format!("configuration {}", path.display()), error)
        })?;
        config.check().context(|| format!("configuration {}", path.display()))?;
        Ok(config)
    }

    /// Whether it can be used.
    ///
    /// # Errors
    /// [`Kind::Usage`] says what is wrong.
    pub fn check(&self) -> Result<()> {
        if !(1..=19).contains(&self.compression_level) {
            return Err(Error::new(
                Kind::Usage,
                format!("compression_level is {}, not within 1 to 19", self.compression_level),
            ));
        }
        if self.partition_bits > MAX_PARTITION_BITS {
            return Err(Error::new(
                Kind::Usage,
                format!(
                    "partition_bits is {}, more than {MAX_PARTITION_BITS}",
                    self.partition_bits
                ),
            ));
        }
        self.location()?;
        if let Some(cluster) = &self.cluster {
            cluster.check()?;
        }
        self.budget().map(|_| ())
    }

    /// Where the store is.
    ///
    /// # Errors
    /// [`Kind::Usage`] for what is no place for one.
    pub fn location(&self) -> Result<Location> {
        Location::parse(&self.store, self.s3.as_ref().unwrap_or(&Access::default()))
    }

    /// The memory budget, carved up.
    ///
    /// # Errors
    /// [`Kind::Usage`] for a size without a unit or below the minimum.
    pub fn budget(&self) -> Result<Budget> {
        Budget::new(parse_size(&self.memory_budget).context(|| "memory_budget".into())?)
    }
}

/// Reads a size with its unit: `512K`, `32M`, `20G`, `1T` (powers of 1024).
///
/// # Errors
/// [`Kind::Usage`] for anything else; a bare number has no unit and is refused.
pub fn parse_size(text: &str) -> Result<u64> {
    let wrong = || {
        Error::new(Kind::Usage, format!("'{text}' is not a size with a unit (such as 32M or 20G)"))
    };
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_size_needs_a_unit() {
        assert_eq!(parse_size("32M").unwrap(), 32 << 20);
        assert_eq!(parse_size("1TiB").unwrap(), 1 << 40);
        for wrong in ["32", "", "M", "3.5G", "-1M", "99999999999999T", "5Q"] {
            assert_eq!(parse_size(wrong).unwrap_err().kind(), Kind::Usage, "{wrong}");
        }
    }

    #[test]
    fn what_etcd_is_spoken_to_with_is_all_there_or_refused() {
        let check = |etcd: &str, more: &str| {
            let text = format!(
                "store = '/s'\nkey = '/k'\n[cluster]\nname = 'a'\nidentity = '/i'\naddress = 'a:1'\n{etcd}\n{more}"
            );
            toml::from_str::<Config>(&text).unwrap().check()
        };
        let (plain, secure) = ("etcd = ['http://e:1']", "etcd = ['https://e:1', 'https://f:1']");
        let pair = "etcd_certificate = '/c'\netcd_key = '/y'";
        for (etcd, more) in [(plain, ""), (secure, ""), (secure, "etcd_ca = '/a'"), (secure, pair)]
        {
            check(etcd, more).unwrap();
        }
        let listed = "static = [{ name = 'a', address = 'a:1' }]";
        for (etcd, more) in [
            (plain, "etcd_ca = '/a'"),
            (plain, pair),
            (listed, "etcd_ca = '/a'"),
            (secure, "etcd_certificate = '/c'"),
            (secure, "etcd_key = '/y'"),
            ("etcd = ['http://e:1', 'https://f:1']", ""),
        ] {
            assert_eq!(check(etcd, more).unwrap_err().kind(), Kind::Usage, "{etcd} {more}");
        }
    }

    #[test]
    fn an_engine_is_a_host_unless_it_is_made_a_keeper() {
        let read = |more: &str| toml::from_str::<Config>(&format!("store='/s'\nkey='/k'\n{more}"));
        assert_eq!(read("").unwrap().role, Role::Host);
        assert_eq!(read("role='keeper'").unwrap().role, Role::Keeper);
        assert!(read("role='owner'").unwrap_err().to_string().contains("keeper"));
        let written = toml::to_string(&Config::new("/s".into(), "/k".into())).unwrap();
        assert!(!written.contains("role"), "an older engine reads it, too: {written}");
    }

    #[test]
    fn unknown_settings_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("engine.toml");
        std::fs::write(&path, "store='/s'\nkey='/k'\nmemroy_budget='32M'\n").unwrap();
        let error = Config::load(&path).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().contains("memroy_budget"), "{error}");
    }
}
