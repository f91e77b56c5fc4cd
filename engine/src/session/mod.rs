//! One backup of one VM, from the first batch of fingerprints to the commit.
