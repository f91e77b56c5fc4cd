//! Names that we give to things inside QEMU. Each begins with `fleece-`, so that what a dead run
//! left is found again without anything but a monitor.

/// The first word of every name of ours (bitmaps have names of their own).
pub(crate) const PREFIX: &str = "fleece-";
/// QEMU takes node names of at most 31 bytes.
const MAX_NODE_NAME: usize = 31;

/// The names for one disk of one view.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Names {
    /// The scratch image.
    pub(crate) scratch: String,
    /// The copy-before-write filter, ours or the job's.
    pub(crate) filter: String,
    /// The snapshot-access node.
    pub(crate) view: String,
    /// The export.
    pub(crate) export: String,
    /// The backup job.
    pub(crate) job: String,
}

impl Names {
    pub(crate) fn new(snapshot: &str, disk: usize) -> Names {
        let name = |what| format!("{}{disk}-{what}", of_snapshot(snapshot));
        Names {
            scratch: name("scratch"),
            filter: name("filter"),
            view: name("view"),
            export: name("export"),
            job: name("job"),
        }
    }
}

/// What all names of one snapshot's view begin with.
pub(crate) fn of_snapshot(snapshot: &str) -> String {
    format!("{PREFIX}{snapshot}-")
}

/// Can names be made of this snapshot id? QEMU's node names are short and of few characters.
pub(crate) fn fits(snapshot: &str, disks: usize) -> bool {
    let longest = Names::new(snapshot, disks).scratch.len();
    !snapshot.is_empty()
        && snapshot.bytes().all(|b| b.is_ascii_alphanumeric())
        && longest <= MAX_NODE_NAME
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ones_that_qemu_takes() {
        assert!(fits("8d4x1c", 99));
        assert!(!fits("", 1));
        assert!(!fits("a:b", 1));
        assert!(!fits("a-snapshot-id-that-is-too-long", 1));
        assert_eq!(Names::new("8d4x1c", 0).filter, "fleece-8d4x1c-0-filter");
    }
}
