//! Manifests and tombstones: of each there are two copies.

use super::{Event, Repairer};
use crate::error::{Kind, Result};
use crate::jobs::restore::is_damage;
use crate::store::commit::SnapshotKey;

impl Repairer<'_> {
    pub(super) fn repair_manifests(&mut self) -> Result<()> {
        let manifests = self.manifests.clone();
        manifests.each_of_both(|key| self.repair_manifest(&key))
    }

    fn repair_manifest(&mut self, key: &SnapshotKey) -> Result<()> {
        let kind = |kind: &Result<_>| kind.as_ref().err().map(crate::error::Error::kind);
        let (first, copy) = (self.manifests.read_first(key), self.manifests.read_copy(key));
        match (kind(&first), kind(&copy)) {
            (None, None) => Ok(()),
            (Some(Kind::NotFound), None) => self.make_again(&key.manifest(), |repairer| {
                repairer.manifests.heal_first(key).map(drop)
            }),
            (None, Some(Kind::NotFound)) => {
                self.make_again(&key.copy(), |repairer| repairer.manifests.heal_copy(key).map(drop))
            }
            (Some(Kind::Damaged), None) => self.one_is_enough(&key.manifest()),
            (None, Some(Kind::Damaged)) => self.one_is_enough(&key.copy()),
            _ => match [first.err(), copy.err()].into_iter().flatten().find(|e| !is_damage(e)) {
                Some(error) => Err(error),
                None => self.lost_manifest(key),
            },
        }
    }

    fn make_again(
        &mut self,
        object: &str,
        make: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let message = "it is missing and its second copy is sound: it is made again from that";
        self.plan(object, message)?;
        self.report.repaired_manifests += 1;
        if self.options.dry_run {
            return Ok(());
        }
        make(self)?;
        self.repaired(object, "made again from the second copy")
    }

    /// A key is never overwritten, and there is a sound copy.
    fn one_is_enough(&mut self, object: &str) -> Result<()> {
        let message = "it is damaged, and its second copy is read instead. No object is ever \
                       overwritten: fleecectl tidy, on a keeper, takes it away and makes it again";
        self.plan(object, message)
    }

    fn lost_manifest(&mut self, key: &SnapshotKey) -> Result<()> {
        self.report.lost_manifests += 1;
        let message = format!(
            "both copies are damaged or missing: the snapshot {} is lost. The next backup of its \
             VM reads in full",
            key.snapshot
        );
        self.plan(&key.manifest(), &message)
    }

    pub(super) fn plan(&mut self, object: &str, message: &str) -> Result<()> {
        let (object, message) = (object.to_owned(), message.to_owned());
        self.tell(&Event::Plan { object, copies: 0, lost: 0, message })
    }
}
