//! The formats' one home: magics, versions, kinds, the header of every object, and
//! how an object's bytes are encrypted and authenticated.
//!
//! Every object begins with the same 80-byte [`Header`]. Its layout, up to and with
//! its checksum, is the same in every version, so that an old Fleece can say that an
//! object is too new. Small objects are `header ‖ body ‖ tag`; containers are laid
//! out in [`super::container`].

use std::sync::{Arc, PoisonError, RwLock};

use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce, Tag};
use uuid::Uuid;

use super::keys::StoreKey;
use crate::error::{Error, Kind, Result};
use crate::ids::StoreId;

/// The first bytes of every object: a name, and what breaks in a text-mode copy.
pub const MAGIC: [u8; 8] = *b"FLEECE\x1a\n";
/// The newest format that this program reads, and the one that it writes.
pub const VERSION: u16 = 1;
/// Bytes of [`Header`].
pub const HEADER_LEN: usize = 80;
/// Bytes of an authentication tag (AES-GCM).
pub const TAG_LEN: usize = 16;
/// Bytes of the random salt from which an object's key is derived.
pub const SALT_LEN: usize = 32;
/// The largest small object. The largest of them is a manifest with 256 KiB of VM configuration.
pub const SEALED_MAX: u64 = 4 << 20;

/// The object is authenticated, not encrypted.
const FLAG_PLAIN: u32 = 1;
/// Flags that this version understands; another one means a newer Fleece.
const KNOWN_FLAGS: u32 = FLAG_PLAIN;

const _: () = assert!(8 + 2 + 2 + 4 + 4 + 4 + 16 + SALT_LEN + 4 + 4 == HEADER_LEN);

/// What an object is; part of what is authenticated, so none can pass for another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum ObjectKind {
    /// The store's header object.
    Store = 1,
    /// The store's key under a passphrase.
    WrappedKey = 2,
    /// A claim of an incarnation.
    Incarnation = 3,
    /// A journal entry.
    Journal = 4,
    /// A container of data blocks.
    Blocks = 5,
    /// A container of recipe nodes.
    Nodes = 6,
    /// A manifest or a tombstone.
    Manifest = 7,
    /// A session that began.
    Session = 8,
    /// Damaged slots.
    Damage = 9,
    /// What a checkpoint of the index is of.
    Checkpoint = 10,
    /// Entries of the index.
    ShardPart = 11,
    /// The store's level.
    Level = 12,
    /// The encryption key for what is new.
    KeyInUse = 13,
}

impl ObjectKind {
    /// Every kind.
    pub(crate) const ALL: [ObjectKind; 13] = [
        ObjectKind::Store,
        ObjectKind::WrappedKey,
        ObjectKind::Incarnation,
        ObjectKind::Journal,
        ObjectKind::Blocks,
        ObjectKind::Nodes,
        ObjectKind::Manifest,
        ObjectKind::Session,
        ObjectKind::Damage,
        ObjectKind::Checkpoint,
        ObjectKind::ShardPart,
        ObjectKind::Level,
        ObjectKind::KeyInUse,
    ];

    fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == code)
    }
}

/// Which of the store's encryption keys an object is under.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KeyId(pub u32);

/// The first 80 bytes of every object, little endian: magic 8, version u16, kind u16,
/// flags u32, key id u32, zero u32, store 16, salt 32, zero u32, crc32c u32 of the rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the object is.
    pub kind: ObjectKind,
    /// Whether its content is encrypted; it is authenticated in any case.
    pub encrypted: bool,
    /// The key that it is under.
    pub key_id: KeyId,
    /// The store that it belongs to.
    pub store: StoreId,
    /// Random; the object's own key comes from it.
    pub salt: [u8; SALT_LEN],
}

impl Header {
    /// A header with a fresh salt.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn new(kind: ObjectKind, encrypted: bool, key_id: KeyId, store: StoreId) -> Result<Self> {
        Ok(Header { kind, encrypted, key_id, store, salt: random()? })
    }

    /// The on-disk form.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&(self.kind as u16).to_le_bytes());
        let flags = if self.encrypted { 0 } else { FLAG_PLAIN };
        bytes[12..16].copy_from_slice(&flags.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.key_id.0.to_le_bytes());
        bytes[24..40].copy_from_slice(self.store.0.as_bytes());
        bytes[40..72].copy_from_slice(&self.salt);
        let crc = crc32c::crc32c(&bytes[..76]);
        bytes[76..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the header at the start of `bytes`; `name` is the object's, for messages.
    ///
    /// # Errors
    /// [`Kind::Damaged`] for anything that is not a header, [`Kind::NoStore`] for one of a newer Fleece.
    pub fn decode(bytes: &[u8], name: &str) -> Result<Self> {
        let Some(bytes) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(damaged(name, "it is shorter than a header"));
        };
        if bytes[..8] != MAGIC {
            return Err(damaged(name, "it does not begin like a Fleece object"));
        }
        if le32(bytes, 76) != crc32c::crc32c(&bytes[..76]) {
            return Err(damaged(name, "its header's checksum does not match"));
        }
        let version = le16(bytes, 8);
        let flags = le32(bytes, 12);
        if version > VERSION || flags & !KNOWN_FLAGS != 0 {
            return Err(too_new(name, version));
        }
        let Some(kind) = ObjectKind::from_code(le16(bytes, 10)) else {
            return Err(too_new(name, version));
        };
        let mut store = [0; 16];
        store.copy_from_slice(&bytes[24..40]);
        let mut salt = [0; SALT_LEN];
        salt.copy_from_slice(&bytes[40..72]);
        Ok(Header {
            kind,
            encrypted: flags & FLAG_PLAIN == 0,
            key_id: KeyId(le32(bytes, 16)),
            store: StoreId(Uuid::from_bytes(store)),
            salt,
        })
    }

    /// That the object is what is looked for, and of our store.
    pub(crate) fn expect(&self, kind: ObjectKind, store: StoreId, name: &str) -> Result<()> {
        if self.store != store {
            let whose =
                format!("object {name} belongs to the store {}, not to {store}", self.store);
            return Err(Error::new(
                Kind::NoStore,
                format!("{whose}: objects of two stores are mixed"),
            ));
        }
        if self.kind != kind {
            return Err(damaged(name, &format!("it is a {:?} object, not {kind:?}", self.kind)));
        }
        Ok(())
    }
}

/// What a nonce counts within one object; no two pieces of an object share a nonce.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Piece {
    /// The whole body of a small object.
    Body = 0,
    /// A frame of a container.
    Frame = 1,
    /// A chunk of a container's fingerprint column.
    Chunk = 2,
    /// A container's frame table.
    Table = 3,
    /// A container's trailer.
    Trailer = 4,
}

/// The cipher of one object.
pub(crate) struct ObjectCipher {
    cipher: Aes256Gcm,
    encrypted: bool,
}

impl ObjectCipher {
    pub(crate) fn new(key: &[u8; 32], encrypted: bool) -> Self {
        ObjectCipher { cipher: Aes256Gcm::new(&(*key).into()), encrypted }
    }

    /// Encrypts `body` in place and returns the tag of it and of `associated`.
    pub(crate) fn seal(
        &self,
        piece: Piece,
        number: u32,
        associated: &[u8],
        body: &mut [u8],
    ) -> Result<[u8; TAG_LEN]> {
        let nonce = nonce(piece, number);
        let sealed = if self.encrypted {
            self.cipher.encrypt_inout_detached(&nonce, associated, body.into())
        } else {
            let all = plain_associated(associated, body);
            self.cipher.encrypt_inout_detached(&nonce, &all, (&mut [][..]).into())
        };
        // Fails only for more than 64 GiB.
        sealed.map(Into::into).map_err(|_| Error::new(Kind::Failed, "a piece is too long to seal"))
    }

    /// Decrypts `body` in place; false when it or `associated` is not what was sealed.
    #[must_use]
    pub(crate) fn open(
        &self,
        piece: Piece,
        number: u32,
        associated: &[u8],
        body: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> bool {
        let nonce = nonce(piece, number);
        let tag = Tag::from(*tag);
        let opened = if self.encrypted {
            self.cipher.decrypt_inout_detached(&nonce, associated, body.into(), &tag)
        } else {
            let all = plain_associated(associated, body);
            self.cipher.decrypt_inout_detached(&nonce, &all, (&mut [][..]).into(), &tag)
        };
        opened.is_ok()
    }
}

fn nonce(piece: Piece, number: u32) -> Nonce<aes_gcm::aead::consts::U12> {
    let mut nonce = [0; 12];
    nonce[0] = piece as u8;
    nonce[8..].copy_from_slice(&number.to_be_bytes());
    nonce.into()
}

/// Without encryption the body is authenticated as associated data (GMAC); the length
/// at the end keeps the two apart.
fn plain_associated(associated: &[u8], body: &[u8]) -> Vec<u8> {
    let mut all = Vec::with_capacity(associated.len() + body.len() + 8);
    all.extend_from_slice(associated);
    all.extend_from_slice(body);
    all.extend_from_slice(&(associated.len() as u64).to_le_bytes());
    all
}

/// What a small object's tag covers besides its body: its header (with version, kind,
/// store and salt) and its key path.
fn sealed_associated(header: &[u8; HEADER_LEN], path: &str) -> Vec<u8> {
    [&header[..], path.as_bytes()].concat()
}

/// Seals `plaintext` as `header ‖ body ‖ tag` for the object at `path`.
pub(crate) fn seal(
    cipher: &ObjectCipher,
    header: &Header,
    path: &str,
    plaintext: &[u8],
) -> Result<Vec<u8>> {
    let encoded = header.encode();
    let mut bytes = Vec::with_capacity(HEADER_LEN + plaintext.len() + TAG_LEN);
    bytes.extend_from_slice(&encoded);
    bytes.extend_from_slice(plaintext);
    let associated = sealed_associated(&encoded, path);
    let tag = cipher.seal(Piece::Body, 0, &associated, &mut bytes[HEADER_LEN..])?;
    bytes.extend_from_slice(&tag);
    Ok(bytes)
}

/// The plaintext of what [`seal`] made; `None` when the tag does not match.
pub(crate) fn open(cipher: &ObjectCipher, path: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_LEN>()?;
    let (body, tag) = rest.split_last_chunk::<TAG_LEN>()?;
    let mut body = body.to_vec();
    cipher.open(Piece::Body, 0, &sealed_associated(header, path), &mut body, tag).then_some(body)
}

/// A key of a store, which of its encryption keys, and whether objects are encrypted.
pub(crate) type Under<'k> = (&'k StoreKey, KeyId, bool);

/// A fresh header for an object of `kind`, and its cipher.
fn begin_under((key, id, encrypt): Under<'_>, kind: ObjectKind) -> Result<(Header, ObjectCipher)> {
    let header = Header::new(kind, encrypt, id, key.store())?;
    let cipher = key.cipher(&header, "a new object")?;
    Ok((header, cipher))
}

/// The bytes of the object of `kind` to create at `path`.
pub(crate) fn seal_under(
    under: Under<'_>,
    kind: ObjectKind,
    path: &str,
    plaintext: &[u8],
) -> Result<Vec<u8>> {
    let (header, cipher) = begin_under(under, kind)?;
    seal(&cipher, &header, path, plaintext)
}

/// Seals and opens the objects of one store. All copies of one follow when the key changes.
#[derive(Clone)]
pub struct Sealer {
    keys: Arc<RwLock<Keys>>,
    encrypt: bool,
}

/// The store's key, and the encryption key of it for what is new.
#[derive(Clone)]
struct Keys {
    key: Arc<StoreKey>,
    current: KeyId,
}

impl Sealer {
    /// For the store of `key`, under its first encryption key; without `encrypt` objects are only
    /// authenticated.
    #[must_use]
    pub fn new(key: Arc<StoreKey>, encrypt: bool) -> Self {
        let current = key.first();
        Sealer { keys: Arc::new(RwLock::new(Keys { key, current })), encrypt }
    }

    fn keys(&self) -> Keys {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The store's key.
    #[must_use]
    pub fn key(&self) -> Arc<StoreKey> {
        self.keys().key
    }

    /// The encryption key that new objects are sealed under.
    #[must_use]
    pub fn current(&self) -> KeyId {
        self.keys().current
    }

    /// Seals what is new under another encryption key. One that is lacking is met when it is needed.
    pub(super) fn use_key(&self, id: KeyId) {
        self.keys.write().unwrap_or_else(PoisonError::into_inner).current = id;
    }

    /// Takes the store's key with other encryption keys after the current one; false if it lacks any up to
    /// that.
    pub(super) fn take(&self, key: StoreKey) -> bool {
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        let extends = key.extends(&keys.key, keys.current);
        if extends {
            keys.key = Arc::new(key);
        }
        extends
    }

    /// A fresh header for an object of `kind`, and its cipher.
    pub(crate) fn begin(&self, kind: ObjectKind) -> Result<(Header, ObjectCipher)> {
        let Keys { key, current } = self.keys();
        begin_under((&key, current, self.encrypt), kind)
    }

    /// The cipher of an object of ours with this header.
    pub(crate) fn cipher(
        &self,
        header: &Header,
        kind: ObjectKind,
        name: &str,
    ) -> Result<ObjectCipher> {
        let key = self.key();
        header.expect(kind, key.store(), name)?;
        if header.encrypted != self.encrypt {
            return Err(damaged(name, "it is not protected the way this store's objects are"));
        }
        key.cipher(header, name)
    }

    /// The bytes of the object of `kind` to create at `path`. Two calls give different bytes.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn seal(&self, kind: ObjectKind, path: &str, plaintext: &[u8]) -> Result<Vec<u8>> {
        let Keys { key, current } = self.keys();
        seal_under((&key, current, self.encrypt), kind, path, plaintext)
    }

    /// The plaintext of the object of `kind` at `path`.
    ///
    /// # Errors
    /// [`Kind::Damaged`], [`Kind::NoStore`] for another store's or a newer one, [`Kind::Key`]
    /// when the key file lacks its key.
    pub fn open(&self, kind: ObjectKind, path: &str, bytes: &[u8]) -> Result<Vec<u8>> {
        let header = Header::decode(bytes, path)?;
        let cipher = self.cipher(&header, kind, path)?;
        open(&cipher, path, bytes).ok_or_else(|| damaged(path, "its authentication failed"))
    }
}

/// Random bytes from the system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::caused(Kind::Failed, "the system gives no random bytes", error))?;
    Ok(bytes)
}

pub(crate) fn damaged(name: &str, what: &str) -> Error {
    Error::new(Kind::Damaged, format!("object {name} is damaged: {what}"))
}

fn too_new(name: &str, version: u16) -> Error {
    let what = format!("object {name} was written by a newer Fleece (format {version})");
    Error::new(Kind::NoStore, format!("{what}; this one reads up to {VERSION}: upgrade it"))
}

/// A little-endian number at a place that the caller has checked to exist; 0 beyond the end.
pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}

/// See [`le16`].
pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

/// See [`le16`].
pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
