//! Whether two programs of different versions can talk: if there is a protocol that both speak.

use std::fmt;

/// The protocols that a program speaks: all from one to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Spoken {
    pub(super) oldest: u16,
    pub(super) newest: u16,
}

impl Spoken {
    /// By what a greeting says. Programs that knew of no range said the one protocol that they spoke, and 0.
    pub(super) fn said(oldest: u16, newest: u16) -> Self {
        let or = |said, other| if said == 0 { other } else { said };
        Spoken { oldest: or(oldest, newest), newest: or(newest, oldest) }
    }
}

impl fmt::Display for Spoken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.oldest == self.newest {
            true => write!(f, "protocol {}", self.newest),
            false => write!(f, "protocols {} to {}", self.oldest, self.newest),
        }
    }
}

/// A program that talks.
pub(super) struct Speaker<'a> {
    pub(super) name: &'a str,
    pub(super) version: &'a str,
    pub(super) speaks: Spoken,
}

impl Speaker<'_> {
    /// The newest protocol that both speak; otherwise who is to be upgraded.
    pub(super) fn agrees_with(&self, other: &Speaker<'_>) -> Result<u16, String> {
        let newest = self.speaks.newest.min(other.speaks.newest);
        if newest >= self.speaks.oldest.max(other.speaks.oldest) {
            return Ok(newest);
        }
        let older = if newest == other.speaks.newest { other } else { self };
        Err(format!("{other}, {self}: upgrade {}", older.name))
    }
}

impl fmt::Display for Speaker<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}) speaks {}", self.name, self.version, self.speaks)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// All ranges of the protocols 1 to 5.
    fn ranges() -> impl Iterator<Item = Spoken> + Clone {
        (1..=5).flat_map(|oldest| (oldest..=5).map(move |newest| Spoken { oldest, newest }))
    }

    #[test]
    fn any_two_speak_the_newest_that_both_know_or_say_who_is_too_old() {
        for (ours, theirs) in ranges().flat_map(|ours| ranges().map(move |theirs| (ours, theirs))) {
            let us = Speaker { name: "hv1", version: "0.3", speaks: ours };
            let them = Speaker { name: "hv2", version: "0.7", speaks: theirs };
            let knows = |who: Spoken, n| (who.oldest..=who.newest).contains(&n);
            let common = (1..=5).rev().find(|n| knows(ours, *n) && knows(theirs, *n));
            // Both come to the same.
            match (us.agrees_with(&them), them.agrees_with(&us)) {
                (Ok(here), Ok(there)) => assert_eq!((Some(here), here), (common, there)),
                (Err(here), Err(there)) => {
                    assert_eq!(common, None, "{here}");
                    let older = if ours.newest < theirs.newest { "hv1" } else { "hv2" };
                    for said in [here, there] {
                        assert!(said.ends_with(&format!("upgrade {older}")), "{said}");
                        assert!(said.contains("hv1 (0.3)") && said.contains("hv2 (0.7)"), "{said}");
                    }
                }
                (here, there) => panic!("{here:?} here, {there:?} there"),
            }
        }
    }

    #[test]
    fn who_names_one_protocol_speaks_one() {
        for said in [(0, 2), (2, 0)] {
            assert_eq!(Spoken::said(said.0, said.1), Spoken { oldest: 2, newest: 2 });
        }
        assert_eq!(Spoken::said(1, 2).to_string(), "protocols 1 to 2");
        // What nobody says in earnest agrees with nobody.
        let (us, them) = (Spoken::said(1, 3), Spoken::said(9, 2));
        let speaker = |speaks| Speaker { name: "x", version: "0", speaks };
        assert!(speaker(us).agrees_with(&speaker(them)).is_err());
    }
}
