//! The key space: the name of every object of the store is built here and nowhere else.

use crate::ids::{ContainerId, HostId, Incarnation, SnapshotId, VmId};

/// The store's header object; created last by `init`, read first by everyone.
pub const STORE: &str = "store";
/// The store's key under a passphrase, where one was given.
pub const WRAPPED_KEY: &str = "key.wrapped";
/// The same with further encryption keys.
pub const WRAPPED_KEYS: &str = "keys.wrapped";
/// Containers, a folder per incarnation.
pub const CONTAINERS: &str = "containers";
/// Every container's directory in an object of its own, a folder per incarnation.
pub const DIRECTORIES: &str = "directories";
/// What was sealed, a folder per incarnation.
pub const JOURNAL: &str = "journal";
/// Claims of the right to number containers.
pub const INCARNATIONS: &str = "incarnations";
/// Commit keys, a folder per VM.
pub const MANIFESTS: &str = "manifests";
/// The second copy of every manifest.
pub const MANIFEST_COPIES: &str = "manifests-copy";
/// Sessions that began, a folder per VM.
pub const SESSIONS: &str = "sessions";
/// Slots known to be damaged.
pub const DAMAGE: &str = "damage";
/// In a bucket: what shows that no object of it can be overwritten.
pub const PROBE: &str = "probe";
/// Checkpoints of the index, a folder each.
pub const SHARDS: &str = "shards";
/// What changed what all engines go by.
pub const AGREED: &str = "agreed";
/// Of these, what raised the store's level.
pub const LEVEL: &str = "agreed/level";
/// Of these, what changed the encryption key for what is new.
pub const KEY_IN_USE: &str = "agreed/key";

/// The object whose last container is `last`, in a generation (0 as first written).
#[must_use]
pub fn container(last: ContainerId, generation: u32) -> String {
    format!("{CONTAINERS}/{:08x}/{:08x}-{generation:04x}", last.incarnation.0, last.counter)
}

/// The folder of an incarnation's containers.
#[must_use]
pub fn containers_of(incarnation: Incarnation) -> String {
    format!("{CONTAINERS}/{:08x}", incarnation.0)
}

/// The last container and the generation that a container object's key names.
#[must_use]
pub fn parse_container(key: &str) -> Option<(ContainerId, u32)> {
    parse_generation(CONTAINERS, key)
}

/// The own object of the directory of a container in one generation.
#[must_use]
pub fn directory(container: ContainerId, generation: u32) -> String {
    let ContainerId { incarnation, counter } = container;
    format!("{DIRECTORIES}/{:08x}/{counter:08x}-{generation:04x}", incarnation.0)
}

/// The folder of the directories of an incarnation's containers.
#[must_use]
pub fn directories_of(incarnation: Incarnation) -> String {
    format!("{DIRECTORIES}/{:08x}", incarnation.0)
}

/// The container and the generation that a directory's key names.
#[must_use]
pub fn parse_directory(key: &str) -> Option<(ContainerId, u32)> {
    parse_generation(DIRECTORIES, key)
}

fn parse_generation(folder: &str, key: &str) -> Option<(ContainerId, u32)> {
    let mut parts = key.strip_prefix(folder)?.strip_prefix('/')?.split('/');
    let incarnation = hex(parts.next()?)?;
    let (counter, generation) = parts.next()?.split_once('-')?;
    let id = ContainerId { incarnation: Incarnation(incarnation), counter: hex(counter)? };
    (parts.next().is_none() && generation.len() >= 4)
        .then(|| u32::from_str_radix(generation, 16).ok())
        .flatten()
        .map(|generation| (id, generation))
}

/// The `n`th entry of an incarnation's journal, from 1.
#[must_use]
pub fn journal(incarnation: Incarnation, n: u32) -> String {
    format!("{JOURNAL}/{:08x}/{n:08x}", incarnation.0)
}

/// The claim of an incarnation.
#[must_use]
pub fn incarnation(incarnation: Incarnation) -> String {
    format!("{INCARNATIONS}/{:08x}", incarnation.0)
}

/// The incarnation that a claim's key names.
#[must_use]
pub fn parse_incarnation(key: &str) -> Option<Incarnation> {
    key.strip_prefix(INCARNATIONS)?.strip_prefix('/').and_then(hex).map(Incarnation)
}

/// The incarnation whose journal or containers a folder of this name holds.
#[must_use]
pub fn parse_incarnation_folder(name: &str) -> Option<Incarnation> {
    hex(name).map(Incarnation)
}

/// The commit key of a snapshot.
#[must_use]
pub fn manifest(vm: VmId, seq: u64, snapshot: SnapshotId) -> String {
    format!("{MANIFESTS}/{vm}/{seq:08x}-{snapshot}")
}

/// The second copy of a manifest.
#[must_use]
pub fn manifest_copy(vm: VmId, seq: u64, snapshot: SnapshotId) -> String {
    format!("{MANIFEST_COPIES}/{vm}/{seq:08x}-{snapshot}")
}

/// The session object of a snapshot.
#[must_use]
pub fn session(vm: VmId, seq: u64, snapshot: SnapshotId) -> String {
    format!("{SESSIONS}/{vm}/{seq:08x}-{snapshot}")
}

/// The VM, the sequence and the snapshot that a key of the three kinds above names.
#[must_use]
pub fn parse_snapshot(key: &str) -> Option<(VmId, u64, SnapshotId)> {
    let mut parts = key.split('/').skip(1);
    let vm = VmId(parts.next()?.parse().ok()?);
    let (seq, snapshot) = parts.next()?.split_once('-')?;
    let seq = u64::from_str_radix(seq, 16).ok()?;
    parts.next().is_none().then_some((vm, seq, snapshot.parse().ok()?))
}

/// A damage record: those of a container stand together, `n` makes each one's key new.
#[must_use]
pub fn damage(container: ContainerId, n: u32) -> String {
    format!("{DAMAGE}/{container}/{n:08x}")
}

/// The folder of a container's damage records.
#[must_use]
pub fn damage_of(container: ContainerId) -> String {
    format!("{DAMAGE}/{container}")
}

/// The folder of the `n`th checkpoint that a host wrote, from 1.
#[must_use]
pub fn checkpoint(host: HostId, n: u32) -> String {
    format!("{SHARDS}/{:04x}-{n:08x}", host.0)
}

/// The host and the number that the name of a checkpoint's folder says.
#[must_use]
pub fn parse_checkpoint(folder: &str) -> Option<(HostId, u32)> {
    let (host, n) = folder.split_once('-')?;
    let host = (host.len() == 4).then(|| u16::from_str_radix(host, 16).ok()).flatten()?;
    Some((HostId(host), hex(n)?))
}

/// A part of a checkpoint, from 0.
#[must_use]
pub fn checkpoint_part(host: HostId, n: u32, part: u32) -> String {
    format!("{}/{part:08x}", checkpoint(host, n))
}

/// What says that a checkpoint is complete, and of what it is one.
#[must_use]
pub fn checkpoint_record(host: HostId, n: u32) -> String {
    format!("{}/record", checkpoint(host, n))
}

/// What raised the store to a level.
#[must_use]
pub fn level(n: u32) -> String {
    format!("{LEVEL}-{n:08x}")
}

/// What made an encryption key the one for what is new.
#[must_use]
pub fn key_in_use(id: u32) -> String {
    format!("{KEY_IN_USE}-{id:08x}")
}

/// The store's key under a passphrase, with all encryption keys up to one.
#[must_use]
pub fn wrapped_key(newest: u32) -> String {
    format!("{WRAPPED_KEYS}/{newest:08x}")
}

/// The number at the end of an object's name that begins like one of the three above.
#[must_use]
pub fn parse_number(beginning: &str, key: &str) -> Option<u32> {
    key.strip_prefix(beginning)?.strip_prefix(['-', '/']).and_then(hex)
}

/// The container and the number of a damage record.
#[must_use]
pub fn parse_damage(key: &str) -> Option<(ContainerId, u32)> {
    let (container, n) = key.strip_prefix(DAMAGE)?.strip_prefix('/')?.split_once('/')?;
    let (incarnation, counter) = container.split_once('-')?;
    let incarnation = Incarnation(hex(incarnation)?);
    Some((ContainerId { incarnation, counter: hex(counter)? }, hex(n)?))
}

fn hex(text: &str) -> Option<u32> {
    (text.len() == 8).then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_ids_round_trip() {
        let id = ContainerId { incarnation: Incarnation(7), counter: 0xabc };
        assert_eq!(container(id, 2), "containers/00000007/00000abc-0002");
        assert_eq!(parse_container(&container(id, 0x1_0000)), Some((id, 0x1_0000)));
        assert_eq!(parse_container("containers/00000007/00000abc"), None);
        assert_eq!(parse_container("containers/7/00000abc-0000"), None);
        assert_eq!(parse_directory(&directory(id, 2)), Some((id, 2)));
        assert_eq!(parse_directory(&container(id, 2)), None);
        assert_eq!(parse_damage(&damage(id, 3)), Some((id, 3)));
        assert_eq!(checkpoint_part(HostId(10), 2, 3), "shards/000a-00000002/00000003");
        assert_eq!(parse_checkpoint("000a-00000002"), Some((HostId(10), 2)));
        assert_eq!(parse_checkpoint("a-00000002"), None);
        assert_eq!(parse_damage("damage/00000007-00000abc"), None);
        assert_eq!(level(2), "agreed/level-00000002");
        assert_eq!(parse_number(LEVEL, &level(2)), Some(2));
        assert_eq!(parse_number(KEY_IN_USE, &key_in_use(3)), Some(3));
        assert_eq!(parse_number(WRAPPED_KEYS, &wrapped_key(4)), Some(4));
        assert_eq!(parse_number(LEVEL, "agreed/level-2"), None);
        assert_eq!(parse_number(KEY_IN_USE, &level(2)), None);
        assert_eq!(parse_incarnation(&incarnation(Incarnation(9))), Some(Incarnation(9)));
        let (vm, snapshot) = (VmId(uuid::Uuid::from_u128(5)), SnapshotId::from_random(77));
        assert_eq!(parse_snapshot(&manifest(vm, 3, snapshot)), Some((vm, 3, snapshot)));
        assert_eq!(parse_snapshot("manifests/nonsense"), None);
    }
}
