//! The journals from end to end, whatever of them cannot be read.

use crate::error::{Error, Kind, Result};
use crate::ids::Incarnation;
use crate::store::Store;
use crate::store::journal::{Entry, Position};
use crate::store::names;

/// What an entry says; [`Kind::Damaged`] where it is missing or damaged.
pub type Read = Result<Vec<Entry>>;

/// Calls `each` for every entry of an incarnation's journal after entry `after`, in order, gaps and all; gives
/// the number of the last one.
///
/// # Errors
/// When the store cannot be read, or the first of `each`.
pub fn walk(
    store: &Store,
    incarnation: Incarnation,
    after: u32,
    each: &mut dyn FnMut(Position, Read) -> Result<()>,
) -> Result<u32> {
    let (end, mut last) = (last_entry(store, incarnation)?, after);
    while let Some(n) = last.checked_add(1) {
        let position = Position { incarnation, n };
        let read = match store.journals().read(position) {
            Ok(Some(entries)) => Ok(entries),
            // What came after the look at the folder is behind no gap.
            Ok(None) if n > end => break,
            Ok(None) => {
                let what = format!("{} is missing", names::journal(incarnation, n));
                Err(Error::new(Kind::Damaged, what))
            }
            Err(error) if error.kind() == Kind::Damaged => Err(error),
            Err(error) => return Err(error),
        };
        each(position, read)?;
        last = n;
    }
    Ok(last)
}

/// The number of the last entry in an incarnation's folder, gaps or not.
///
/// # Errors
/// When it cannot be listed.
pub fn last_entry(store: &Store, incarnation: Incarnation) -> Result<u32> {
    let mut last = 0;
    store.objects().list(&format!("{}/{:08x}", names::JOURNAL, incarnation.0), |key, _| {
        let n = key.rsplit('/').next().and_then(|n| u32::from_str_radix(n, 16).ok());
        last = last.max(n.unwrap_or(0));
        Ok(())
    })?;
    Ok(last)
}
