//! The VMs of this host: `/etc/fleece/vms.d/NAME.toml`, or a monitor socket given by hand.

use crate::error::{Context, Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where VMs are described.
pub const DIRECTORY: &str = "/etc/fleece/vms.d";

/// How one VM is reached.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Vm {
    /// Its label; empty for a bare socket (then QEMU's `-name` is taken).
    pub name: String,
    /// The QMP socket.
    pub qmp: PathBuf,
    /// The guest agent's socket, where it is not to be asked of QEMU.
    pub agent: Option<PathBuf>,
    /// A file to keep in the manifest, e.g. the libvirt XML.
    pub config: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: Option<String>,
    qmp: PathBuf,
    agent: Option<PathBuf>,
    config: Option<PathBuf>,
}

impl Vm {
    /// A VM that is known by its monitor only.
    #[must_use]
    pub fn at_socket(qmp: &Path, name: Option<&str>) -> Vm {
        Vm {
            name: name.unwrap_or_default().to_owned(),
            qmp: qmp.to_owned(),
            agent: None,
            config: None,
        }
    }
}

/// Every VM described in `directory`, by name. A directory that does not exist holds none.
///
/// # Errors
/// A file that cannot be read or is no description, or two of one name.
pub fn list(directory: &Path) -> Result<Vec<Vm>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).context(|| format!("{}", directory.display())),
    };
    let mut vms = Vec::new();
    for entry in entries {
        let path = entry.context(|| format!("{}", directory.display()))?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            vms.push(read(&path)?);
        }
    }
    vms.sort_by(|a: &Vm, b| a.name.cmp(&b.name));
    if let Some(pair) = vms.windows(2).find(|p| p[0].name == p[1].name) {
        let message =
            format!("{}: two files describe a VM named {}", directory.display(), pair[0].name);
        return Err(Error::new(Kind::Usage, message));
    }
    Ok(vms)
}

/// The VM of that name.
///
/// # Errors
/// `NotFound`, or as [`list`].
pub fn find(directory: &Path, name: &str) -> Result<Vm> {
    list(directory)?.into_iter().find(|vm| vm.name == name).ok_or_else(|| {
        let message = format!(
            "no VM named {name} in {}: describe it there (qmp = \"/path/of/its/monitor\"), or use --qmp SOCKET",
            directory.display()
        );
        Error::new(Kind::NotFound, message)
    })
}

fn read(path: &Path) -> Result<Vm> {
    let text = std::fs::read_to_string(path).context(|| format!("{}", path.display()))?;
    let file: File = toml::from_str(&text)
        .map_err(|e| Error::caused(Kind::Usage, format!("{}", path.display()), e))?;
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Vm {
        name: file.name.unwrap_or(stem),
        qmp: file.qmp,
        agent: file.agent,
        config: file.config,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn vms_are_read_by_name() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join("web1.toml"),
            "qmp = \"/run/web1.qmp\"\nagent = \"/run/web1.qga\"\n",
        )
        .unwrap();
        std::fs::write(dir.path().join("x.toml"), "name = \"db\"\nqmp = \"/run/db.qmp\"\n")
            .unwrap();
        std::fs::write(dir.path().join("README"), "not a VM").unwrap();
        let names: Vec<_> = list(dir.path()).unwrap().into_iter().map(|vm| vm.name).collect();
        assert_eq!(names, ["db", "web1"]);
        assert_eq!(find(dir.path(), "web1").unwrap().agent.unwrap(), Path::new("/run/web1.qga"));
        assert_eq!(find(dir.path(), "nope").unwrap_err().kind(), Kind::NotFound);
        assert!(list(&dir.path().join("absent")).unwrap().is_empty());
    }

    #[test]
    fn a_wrong_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.toml"), "qpm = \"/run/a\"\n").unwrap();
        let error = list(dir.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().contains("a.toml"), "{error}");
        std::fs::write(dir.path().join("a.toml"), "qmp = \"/a\"\n").unwrap();
        std::fs::write(dir.path().join("b.toml"), "name = \"a\"\nqmp = \"/b\"\n").unwrap();
        assert!(list(dir.path()).unwrap_err().to_string().contains("two files"));
    }
}
