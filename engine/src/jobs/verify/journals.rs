//! Journals: no entry is missing, every one can be read; what they record is noted.

use super::containers::ContainerKey;
use super::{Event, Verifier};
use crate::error::{Error, Kind, Result};
use crate::ids::Incarnation;
use crate::jobs::journals::last_entry;
use crate::store::journal::Position;
use crate::store::names;

impl Verifier<'_> {
    pub(super) fn check_journals(&mut self) -> Result<()> {
        for incarnation in self.store.journals().incarnations()? {
            let last = last_entry(self.store, incarnation)?;
            for n in 1..=last {
                self.progress("journals", self.report.journal_entries)?;
                self.check_entry(incarnation, n)?;
            }
        }
        let containers = &mut self.containers;
        let mut strangers = Vec::new();
        self.store.objects().list(names::CONTAINERS, |key, _| {
            match names::parse_container(key) {
                Some((id, _)) => containers.push(&ContainerKey { id, recorded: false }.to_record()),
                None => {
                    // A writer that was killed leaves these; a few are named, all are harmless.
                    if strangers.len() < 16 {
                        strangers.push(key.to_owned());
                    }
                    Ok(())
                }
            }
        })?;
        for object in strangers {
            let message = "this is no container: perhaps left by a writer that was killed";
            self.tell(&Event::Note { object, message: message.into() })?;
        }
        Ok(())
    }

    fn check_entry(&mut self, incarnation: Incarnation, n: u32) -> Result<()> {
        let name = names::journal(incarnation, n);
        let entries = match self.store.journals().read(Position { incarnation, n }) {
            Ok(Some(entries)) => entries,
            Ok(None) => {
                let gap = Error::new(Kind::Damaged, "the journal has a gap here");
                return self.lost_entry(name, &gap);
            }
            Err(error) if error.kind() == Kind::Damaged => return self.lost_entry(name, &error),
            Err(error) => return self.problem("journal", &name, &error.to_string()),
        };
        self.report.journal_entries += 1;
        for entry in entries {
            let key = ContainerKey { id: entry.container, recorded: true };
            self.containers.push(&key.to_record())?;
        }
        Ok(())
    }
}
