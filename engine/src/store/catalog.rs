//! Finding VMs and snapshots by what people call them.

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use uuid::Uuid;

use super::commit::Manifests;
use super::manifest::{Manifest, Record};
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;

/// Candidates that a message names: more do not help anyone.
const MAX_CANDIDATES: usize = 8;

impl Manifests {
    /// The VM that `which` names by UUID or by its name in its newest snapshot.
    ///
    /// # Errors
    /// [`Kind::NotFound`] with the candidates when there is none, or several of the name;
    /// [`Kind::Damaged`] when it may be one whose snapshots cannot be read.
    pub fn find_vm(&self, which: &str) -> Result<VmId> {
        let vms = self.vms()?;
        if let Ok(uuid) = which.parse::<Uuid>() {
            return match vms.binary_search(&VmId(uuid)) {
                Ok(_) => Ok(VmId(uuid)),
                Err(_) => Err(not_found(format!("the store has no VM {uuid}"))),
            };
        }
        let (mut found, mut others, mut nameless) = (Vec::new(), Vec::new(), None);
        for vm in vms {
            let Some(newest) = self.latest(vm)? else {
                // Its name stands in what cannot be read.
                if nameless.is_none() && self.newest_for_restore(vm).is_err() {
                    nameless = Some(vm);
                }
                continue;
            };
            if newest.vm_name == which {
                found.push(vm);
            } else if others.len() < MAX_CANDIDATES {
                others.push(newest.vm_name);
            }
        }
        if found.is_empty()
            && let Some(vm) = nameless
        {
            let what = format!(
                "no VM {which:?} can be read; it may be {vm}, whose snapshots are damaged: run \
                 fleecectl verify"
            );
            return Err(Error::new(Kind::Damaged, what));
        }
        match found.as_slice() {
            [only] => Ok(*only),
            [] if others.is_empty() => {
                Err(not_found(format!("the store has no VM {which:?}: it has no snapshot yet")))
            }
            [] => {
                let others = others.join(", ");
                Err(not_found(format!(
                    "the store has no VM {which:?}; it has, among others: {others}"
                )))
            }
            several => {
                let uuids: Vec<String> =
                    several.iter().take(MAX_CANDIDATES).map(VmId::to_string).collect();
                let uuids = uuids.join(", ");
                Err(not_found(format!(
                    "several VMs are called {which:?}: say which by its UUID: {uuids}"
                )))
            }
        }
    }

    /// Refuses a new VM under a name that another VM's newest snapshot has.
    ///
    /// # Errors
    /// [`Kind::NotPermitted`] with the two ways out.
    pub fn check_name(&self, vm: VmId, name: &str) -> Result<()> {
        for other in self.vms()? {
            if other != vm
                && let Some(newest) = self.latest(other)?
                && newest.vm_name == name
            {
                let message = format!(
                    "the store has another VM called {name:?} (UUID {other}, this one is {vm}): if \
                     this one takes its place, use --adopt {other}; if they are two VMs, use --as NAME"
                );
                return Err(Error::new(Kind::NotPermitted, message));
            }
        }
        Ok(())
    }

    /// The snapshot of a VM that `which` names: an id or the beginning of one, `latest` or
    /// "", or a date (`2026-11-20`: the last one of that day in `zone`).
    ///
    /// # Errors
    /// [`Kind::NotFound`], with the candidates when several fit; [`Kind::Damaged`].
    pub fn find_snapshot(&self, vm: VmId, which: &str, zone: &TimeZone) -> Result<Manifest> {
        if which.is_empty() || which == "latest" {
            let none = || not_found(format!("the VM {vm} has no snapshot"));
            return self.newest_for_restore(vm)?.ok_or_else(none);
        }
        match which.parse::<Date>() {
            Ok(day) if which.len() > crate::ids::SnapshotId::LEN => self.last_of_day(vm, day, zone),
            _ => self.find_id(vm, which),
        }
    }

    /// The newest snapshot, as people mean it: an older one must not pass for it because it is damaged.
    fn newest_for_restore(&self, vm: VmId) -> Result<Option<Manifest>> {
        let mut below = None;
        loop {
            let newest = self.newest(vm, below)?;
            let Some(last) = newest.last().copied() else { return Ok(None) };
            for key in newest {
                match self.read(&key) {
                    Ok(Record::Manifest(manifest)) => return Ok(Some(*manifest)),
                    Ok(Record::Tombstone(_)) => {}
                    Err(error) if error.kind() == Kind::Damaged => {
                        let what = format!(
                            "the newest snapshot {} of VM {vm} is damaged; name an older one by its id",
                            key.snapshot
                        );
                        return Err(Error::caused(Kind::Damaged, what, error));
                    }
                    Err(error) => return Err(error),
                }
            }
            below = Some(last);
        }
    }

    fn find_id(&self, vm: VmId, which: &str) -> Result<Manifest> {
        let (mut keys, mut found) = (self.list(vm)?, Vec::new());
        while let Some(key) = keys.next_key()? {
            if key.snapshot.as_str().starts_with(which) && found.len() < MAX_CANDIDATES {
                found.push(key);
            }
        }
        let mut committed = Vec::new();
        for key in found {
            match self.read(&key)? {
                Record::Manifest(manifest) => committed.push(manifest),
                Record::Tombstone(_) => {}
            }
        }
        match committed.len() {
            0 => Err(not_found(format!("the VM {vm} has no snapshot {which:?}"))),
            1 => Ok(*committed.remove(0)),
            _ => {
                let ids: Vec<&str> =
                    committed.iter().map(|found| found.snapshot.as_str()).collect();
                let ids = ids.join(", ");
                Err(not_found(format!("several snapshots begin with {which:?}: {ids}")))
            }
        }
    }

    fn last_of_day(&self, vm: VmId, day: Date, zone: &TimeZone) -> Result<Manifest> {
        let (mut snapshots, mut last, mut nearest) = (self.list(vm)?, None, None);
        while let Some(manifest) = snapshots.next()? {
            let its = local_day(manifest.point_in_time_ms, zone);
            if its == Some(day) {
                last = Some(manifest);
            } else if its.is_some_and(|its| its < day) {
                nearest = its;
            }
        }
        last.ok_or_else(|| {
            let before =
                nearest.map_or(String::new(), |day| format!("; the last before is of {day}"));
            not_found(format!("the VM {vm} has no snapshot of {day}{before}"))
        })
    }
}

fn local_day(time_ms: i64, zone: &TimeZone) -> Option<Date> {
    Some(Timestamp::from_millisecond(time_ms).ok()?.to_zoned(zone.clone()).date())
}

fn not_found(message: String) -> Error {
    Error::new(Kind::NotFound, message)
}
