//! Claims and journals: what they said can be told from the objects that are there.

use super::{Event, Repairer};
use crate::error::{Kind, Result};
use crate::ids::ContainerId;
use crate::jobs::journals::walk;
use crate::jobs::rebuild::{id_bytes, read_id};
use crate::sort::Sorter;
use crate::store::journal::Entry;
use crate::store::names;

/// Memory of each of the two sorts of container ids.
const SORT_BYTES: usize = 512 << 10;
/// Containers recorded by one entry.
const RECORDED: usize = 1024;

impl Repairer<'_> {
    pub(super) fn repair_journals(&mut self) -> Result<()> {
        let journals = self.store.journals();
        let mut recorded = Sorter::new(&self.options.scratch, SORT_BYTES);
        let mut lost = 0_u64;
        for incarnation in journals.incarnations()? {
            if journals.check_claim(incarnation).is_err_and(|e| e.kind() == Kind::NotFound) {
                self.repair_claim(incarnation)?;
            }
            walk(self.store, incarnation, 0, &mut |_, read| match read {
                Ok(entries) => {
                    entries.iter().try_for_each(|entry| recorded.push(&id_bytes(entry.container)))
                }
                Err(_) => {
                    lost += 1;
                    Ok(())
                }
            })?;
        }
        if lost > 0 { self.record_again(lost, recorded) } else { Ok(()) }
    }

    fn repair_claim(&mut self, incarnation: crate::ids::Incarnation) -> Result<()> {
        let object = names::incarnation(incarnation);
        let message = "the claim is missing: the number is claimed for nobody, so that no engine \
                       ever uses it again";
        self.plan(&object, message)?;
        if !self.options.dry_run && self.store.journals().heal_claim(incarnation)? {
            self.repaired(&object, "claimed again")?;
        }
        Ok(())
    }

    /// Records the containers that are there and in no readable entry.
    fn record_again(&mut self, lost: u64, recorded: Sorter<8>) -> Result<()> {
        let mut there = Sorter::new(&self.options.scratch, SORT_BYTES);
        self.store.objects().list(names::CONTAINERS, |key, _| {
            names::parse_container(key).map_or(Ok(()), |(id, _)| there.push(&id_bytes(id)))
        })?;
        let (mut there, mut recorded) = (there.finish()?, recorded.finish()?);
        let (mut known, mut last) = (recorded.next()?, None);
        let (mut entries, mut count) = (Vec::new(), 0_u64);
        while let Some(id) = there.next()? {
            if last.replace(id) == Some(id) {
                continue;
            }
            while known.is_some_and(|known| known < id) {
                known = recorded.next()?;
            }
            if known != Some(id)
                && let Some(entry) = self.entry_of(read_id(&id))?
            {
                entries.push(entry);
                count += 1;
                if entries.len() == RECORDED {
                    self.record(&mut entries)?;
                }
            }
        }
        self.record(&mut entries)?;
        let message = format!("{lost} entries are lost; {count} containers are recorded anew");
        if count > 0 {
            self.tell(&Event::Plan { object: "journal".into(), copies: 0, lost: 0, message })
        } else {
            Ok(())
        }
    }

    fn entry_of(&self, container: ContainerId) -> Result<Option<Entry>> {
        let summary = match self.store.directories().summary(container) {
            Err(error) if error.kind() == Kind::Damaged => return Ok(None),
            summary => summary?,
        };
        Ok(summary.map(|summary| Entry {
            container,
            generation: summary.generation,
            kind: summary.kind,
            slots: summary.slots,
            last_in_object: names::parse_container(&summary.object)
                .map_or(container.counter, |(last, _)| last.counter),
            stored_bytes: summary.stored_bytes,
        }))
    }

    fn record(&mut self, entries: &mut Vec<Entry>) -> Result<()> {
        if !entries.is_empty() && !self.options.dry_run {
            let position = self.store.journal()?.record_all(entries)?;
            // What the index lacks of them it learns when it is built anew.
            (self.recorded)(position, Vec::new())?;
        }
        entries.clear();
        Ok(())
    }
}
