//! The store's key: one secret that fingerprints come from, for ever, and encryption
//! keys that can be replaced. Without it nothing can be restored.
//!
//! One canonical binary form ([`StoreKey::encode`]) is behind the key file, the copy
//! under a passphrase and the form on paper.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use argon2::{Algorithm, Argon2, Params, Version};
use hkdf::Hkdf;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::format::{self, Header, KeyId, ObjectCipher, ObjectKind, damaged, random};
use super::names;
use crate::error::{Context, Error, Kind, Result};
use crate::fingerprint::{Fingerprinter, SECRET_LEN};
use crate::ids::StoreId;

/// The version of the binary form.
const KEY_VERSION: u16 = 1;
/// Characters of a deduplication domain's name: it must fit one length byte.
const DOMAIN_MAX: usize = 64;
/// Encryption keys that a store can have at a time; far beyond what rotation makes.
const KEYS_MAX: usize = 64;
/// Bytes of the key check value: enough to tell keys apart, tells nothing of the key.
pub(crate) const CHECK_LEN: usize = 16;
/// Largest key file that is read: 64 keys are less than a quarter of it.
const FILE_MAX: u64 = 64 << 10;
/// Argon2id within the engine's memory budget (12 MiB, 3 passes: the smallest
/// memory of OWASP's list of equally strong settings, with some passes to spare).
const ARGON_KIB: u32 = 12 << 10;
const ARGON_PASSES: u32 = 6;
/// What a wrapped key may ask for at most: it is read before anything is authenticated.
const ARGON_KIB_MAX: u32 = 16 << 10;
const ARGON_PASSES_MAX: u32 = 64;
/// Bytes of Argon2id's parameters before a wrapped key: memory, passes, lanes.
const ARGON_LEN: usize = 12;
/// Bytes of the key on one line of the paper form.
const PAPER_BYTES: usize = 16;

type Secret = Zeroizing<[u8; 32]>;

/// All secrets of one store. Overwritten when dropped.
pub struct StoreKey {
    store: StoreId,
    domain: String,
    fingerprint: Secret,
    /// Never empty. Which is used for what is new the store says (`agreed.rs`).
    encryption: Vec<(KeyId, Secret)>,
    /// Where it was read, for messages.
    file: Option<PathBuf>,
}

impl StoreKey {
    /// A new key of a new store. Stores of one `domain` and fingerprint secret could exchange blocks.
    ///
    /// # Errors
    /// [`Kind::Usage`] for a domain that is too long; when the system gives no random bytes.
    pub fn generate(domain: &str) -> Result<Self> {
        if domain.len() > DOMAIN_MAX {
            let limit =
                format!("the deduplication domain's name is longer than {DOMAIN_MAX} bytes");
            return Err(Error::new(Kind::Usage, limit));
        }
        Ok(StoreKey {
            store: StoreId(Uuid::new_v4()),
            domain: domain.to_owned(),
            fingerprint: Zeroizing::new(random()?),
            encryption: vec![(KeyId(1), Zeroizing::new(random()?))],
            file: None,
        })
    }

    /// The same with one more encryption key, to be used once all hosts have it.
    ///
    /// # Errors
    /// When there are too many, or no random bytes.
    pub fn rotated(&self) -> Result<Self> {
        if self.encryption.len() >= KEYS_MAX {
            return Err(Error::new(Kind::Usage, "the store has too many encryption keys"));
        }
        let mut rotated = Self::decode(&self.encode())?;
        rotated.encryption.push((KeyId(self.newest().0 + 1), Zeroizing::new(random()?)));
        Ok(rotated)
    }

    /// Whether it has all that `other` has up to an encryption key; those after it were never used.
    #[must_use]
    pub fn extends(&self, other: &Self, used: KeyId) -> bool {
        let has = |(id, secret): &(KeyId, Secret)| *id > used || self.secret(*id) == Some(secret);
        (self.store, &self.domain, &self.fingerprint)
            == (other.store, &other.domain, &other.fingerprint)
            && other.encryption.iter().all(has)
    }

    /// The store that it opens.
    #[must_use]
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// The deduplication domain.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The encryption key that the store was made with.
    #[must_use]
    pub fn first(&self) -> KeyId {
        self.encryption.first().map_or(KeyId(0), |(id, _)| *id)
    }

    /// The encryption key that was added last.
    #[must_use]
    pub fn newest(&self) -> KeyId {
        self.encryption.last().map_or(KeyId(0), |(id, _)| *id)
    }

    /// What tells for each of its encryption keys whether another one is the same, in hex, and nothing
    /// about it.
    #[must_use]
    pub fn checks(&self) -> BTreeMap<u32, String> {
        let check = |(id, _): &(KeyId, Secret)| {
            let check = self.check_value(*id).unwrap_or_default();
            (id.0, check.iter().map(|byte| format!("{byte:02x}")).collect())
        };
        self.encryption.iter().map(check).collect()
    }

    /// Whether it has an encryption key.
    #[must_use]
    pub fn has(&self, id: KeyId) -> bool {
        self.secret(id).is_some()
    }

    /// That it has not an encryption key, which `what` needs.
    pub(super) fn lacks(&self, id: KeyId, what: &str) -> Error {
        let lacking = match &self.file {
            Some(file) => format!("the key file {}", file.display()),
            None => "this copy of the key".to_owned(),
        };
        let what = format!("{what} needs the encryption key {}, which {lacking} lacks", id.0);
        Error::new(Kind::Key, format!("{what}: use the newest key file"))
    }

    /// Fingerprints of blocks of `block_size` bytes.
    #[must_use]
    pub fn fingerprinter(&self, block_size: u32) -> Fingerprinter {
        let size = block_size.to_le_bytes();
        let mut secret = Zeroizing::new([0; SECRET_LEN]);
        derive(
            &self.fingerprint[..],
            &[],
            &[b"fp", b"sha1", &size, self.domain.as_bytes()],
            &mut *secret,
        );
        Fingerprinter::new(&secret, block_size)
    }

    /// What tells whether an encryption key is the right one, and nothing about it.
    pub(crate) fn check_value(&self, id: KeyId) -> Option<[u8; CHECK_LEN]> {
        let mut check = [0; CHECK_LEN];
        derive(&self.secret(id)?[..], self.store.0.as_bytes(), &[b"check"], &mut check);
        Some(check)
    }

    /// The cipher of the object with this header.
    pub(crate) fn cipher(&self, header: &Header, name: &str) -> Result<ObjectCipher> {
        let lacks = || self.lacks(header.key_id, &format!("object {name}"));
        let secret = self.secret(header.key_id).ok_or_else(lacks)?;
        Ok(object_cipher(secret, header))
    }

    fn secret(&self, id: KeyId) -> Option<&Secret> {
        self.encryption.iter().find(|(key, _)| *key == id).map(|(_, secret)| secret)
    }

    /// The canonical form: version u16, store 16, domain length u8 and text, fingerprint
    /// secret 32, number of keys u8, each id u32 and secret 32, first 8 bytes of SHA-256 of it all.
    #[must_use]
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        // The capacity is enough for the whole: growing would leave copies behind.
        let mut bytes =
            Zeroizing::new(Vec::with_capacity(128 + DOMAIN_MAX + 36 * self.encryption.len()));
        bytes.extend_from_slice(&KEY_VERSION.to_le_bytes());
        bytes.extend_from_slice(self.store.0.as_bytes());
        bytes.push(self.domain.len() as u8);
        bytes.extend_from_slice(self.domain.as_bytes());
        bytes.extend_from_slice(&self.fingerprint[..]);
        bytes.push(self.encryption.len() as u8);
        for (id, secret) in &self.encryption {
            bytes.extend_from_slice(&id.0.to_le_bytes());
            bytes.extend_from_slice(&secret[..]);
        }
        let sum = Sha256::digest(&bytes[..]);
        bytes.extend_from_slice(&sum[..8]);
        bytes
    }

    /// A binary form with its checksum, for the fuzzer.
    #[cfg(any(test, fuzzing))]
    pub(super) fn summed(body: &[u8]) -> Vec<u8> {
        [body, &Sha256::digest(body)[..8]].concat()
    }

    /// Reads the canonical form.
    ///
    /// # Errors
    /// [`Kind::Key`] for anything else.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let bad = |what: &str| Error::new(Kind::Key, format!("the key is damaged: {what}"));
        if bytes.len() >= 2 && format::le16(bytes, 0) > KEY_VERSION {
            return Err(Error::new(
                Kind::Key,
                "the key was made by a newer Fleece: upgrade this one",
            ));
        }
        let (body, sum) = bytes.split_last_chunk::<8>().ok_or_else(|| bad("it is cut short"))?;
        if Sha256::digest(body)[..8] != sum[..] {
            return Err(bad("its checksum does not match"));
        }
        Self::decode_body(body).ok_or_else(|| bad("it does not read as a key"))
    }

    fn decode_body(body: &[u8]) -> Option<Self> {
        let (_version, rest) = body.split_first_chunk::<2>()?;
        let (store, rest) = rest.split_first_chunk::<16>()?;
        let (length, rest) = rest.split_first()?;
        let (domain, rest) = rest.split_at_checked(usize::from(*length))?;
        let (fingerprint, rest) = rest.split_first_chunk::<32>()?;
        let (count, mut rest) = rest.split_first()?;
        if *count == 0 || usize::from(*count) > KEYS_MAX || rest.len() != usize::from(*count) * 36 {
            return None;
        }
        let mut encryption = Vec::with_capacity(usize::from(*count));
        while let Some((id, after)) = rest.split_first_chunk::<4>() {
            let (secret, after) = after.split_first_chunk::<32>()?;
            encryption.push((KeyId(u32::from_le_bytes(*id)), Zeroizing::new(*secret)));
            rest = after;
        }
        Some(StoreKey {
            store: StoreId(Uuid::from_bytes(*store)),
            domain: String::from_utf8(domain.to_vec()).ok()?,
            fingerprint: Zeroizing::new(*fingerprint),
            encryption,
            file: None,
        })
    }
}

impl std::fmt::Debug for StoreKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StoreKey({}, {} keys)", self.store, self.encryption.len())
    }
}

impl PartialEq for StoreKey {
    fn eq(&self, other: &Self) -> bool {
        *self.encode() == *other.encode()
    }
}

fn object_cipher(secret: &Secret, header: &Header) -> ObjectCipher {
    let mut key = Zeroizing::new([0; 32]);
    let protection: &[u8] = if header.encrypted { b"sealed" } else { b"plain" };
    let kind = (header.kind as u16).to_le_bytes();
    let info = [b"object", protection, header.store.0.as_bytes(), &kind];
    derive(&secret[..], &header.salt, &info, &mut *key);
    ObjectCipher::new(&key, header.encrypted)
}

/// HKDF-SHA256; every part of the info is preceded by its length, so that no two lists run together.
fn derive(secret: &[u8], salt: &[u8], info: &[&[u8]], out: &mut [u8]) {
    let mut joined = b"fleece 1".to_vec();
    for part in info {
        joined.extend_from_slice(&(part.len() as u32).to_le_bytes());
        joined.extend_from_slice(part);
    }
    let expanded = Hkdf::<Sha256>::new(Some(salt), secret).expand(&joined, out);
    debug_assert!(expanded.is_ok(), "fails only for more than 8160 bytes");
}

/// The key file: what a person sees when opening it.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct KeyFile {
    store: StoreId,
    key: String,
}

const FILE_COMMENT: &str = "# The key of a Fleece store. Whoever has it can read every backup;\n\
    # without it nothing can be restored. Keep a copy in another place: fleecectl key export\n";

impl StoreKey {
    /// Reads a key file.
    ///
    /// # Errors
    /// [`Kind::Key`] when it is missing, damaged, or readable by others than its owner.
    pub fn load(path: &Path) -> Result<Self> {
        let shown = path.display();
        let failed = |error| {
            let ways = "put a copy of the key there, or get it back from the store with \
                        `fleecectl key export --passphrase-file FILE`";
            Error::caused(Kind::Key, format!("cannot read the key file {shown} ({ways})"), error)
        };
        let metadata = fs::metadata(path).map_err(failed)?;
        if metadata.mode() & 0o077 != 0 {
            let mode = metadata.mode() & 0o777;
            let what = format!("the key file {shown} can be read by others (mode {mode:04o})");
            return Err(Error::new(Kind::Key, format!("{what}: chmod 0400 {shown}")));
        }
        if metadata.len() > FILE_MAX {
            return Err(Error::new(Kind::Key, format!("{shown} is too long to be a key file")));
        }
        let text = Zeroizing::new(fs::read_to_string(path).map_err(failed)?);
        let key = Self::from_text(&text).context(|| format!("the key file {shown}"))?;
        Ok(StoreKey { file: Some(path.to_owned()), ..key })
    }

    /// The key file's text.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(1024 + 72 * self.encryption.len()));
        text.push_str(FILE_COMMENT);
        // Writing into a string cannot fail.
        let _ = write!(text, "store = \"{}\"\nkey = \"", self.store);
        push_hex(&mut text, &self.encode());
        text.push_str("\"\n");
        text
    }

    /// Reads a key file's text.
    ///
    /// # Errors
    /// [`Kind::Key`] for anything else.
    pub fn from_text(text: &str) -> Result<Self> {
        // toml's own message would show the line, and with it the key.
        let file: KeyFile = toml::from_str(text)
            .map_err(|_| Error::new(Kind::Key, "it is not a Fleece key file"))?;
        let text = Zeroizing::new(file.key);
        let key = Self::decode(&from_hex(&text)?)?;
        if key.store != file.store {
            return Err(Error::new(
                Kind::Key,
                "the key is damaged: its store's name does not match",
            ));
        }
        Ok(key)
    }

    /// Writes a new key file, 0400, durable. An existing one is never replaced.
    ///
    /// # Errors
    /// [`Kind::Key`] when it exists or cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let failed = |error| {
            Error::caused(
                Kind::Key,
                format!("cannot create the key file {}", path.display()),
                error,
            )
        };
        let mut options = fs::OpenOptions::new();
        let mut file =
            options.write(true).create_new(true).mode(0o400).open(path).map_err(failed)?;
        file.write_all(self.to_text().as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
    }

    /// Puts itself into the place of a key file that it extends: 0400, of the same owner, durable, and
    /// whole at any moment.
    ///
    /// # Errors
    /// [`Kind::Key`] when it cannot be written.
    pub fn replace(&self, path: &Path) -> Result<()> {
        let failed = |error| {
            let what = format!("cannot replace the key file {}", path.display());
            Error::caused(Kind::Key, what, error)
        };
        // Not a link to it.
        let path = fs::canonicalize(path).map_err(failed)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        let owner = fs::metadata(&path).map_err(failed)?;
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        let written = file.write_all(self.to_text().as_bytes());
        written
            .and_then(|()| fchown(&file, Some(owner.uid()), Some(owner.gid())))
            .map_err(failed)?;
        let private = fs::Permissions::from_mode(0o400);
        file.as_file().set_permissions(private).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
    }

    /// The key under a passphrase: the bytes of the object [`names::WRAPPED_KEY`].
    ///
    /// # Errors
    /// When the system gives no random bytes or not the 12 MiB that this takes.
    pub fn wrap(&self, passphrase: &str) -> Result<Vec<u8>> {
        let header = Header::new(ObjectKind::WrappedKey, true, KeyId(0), self.store)?;
        let mut params = [0; ARGON_LEN];
        for (bytes, number) in params.chunks_exact_mut(4).zip([ARGON_KIB, ARGON_PASSES, 1]) {
            bytes.copy_from_slice(&number.to_le_bytes());
        }
        let cipher = passphrase_cipher(passphrase, &header, &params)?;
        // The parameters need no authentication of their own: others give another key.
        let sealed = format::seal(&cipher, &header, names::WRAPPED_KEY, &self.encode())?;
        let (header, body) = sealed.split_at(format::HEADER_LEN);
        Ok([header, &params, body].concat())
    }

    /// Reads what [`wrap`](Self::wrap) made.
    ///
    /// # Errors
    /// [`Kind::Key`] for a wrong passphrase (or a damaged object; nothing can tell them apart).
    pub fn unwrap(bytes: &[u8], passphrase: &str) -> Result<Self> {
        let header = Header::decode(bytes, names::WRAPPED_KEY)?;
        header.expect(ObjectKind::WrappedKey, header.store, names::WRAPPED_KEY)?;
        let (encoded, rest) = bytes.split_at(format::HEADER_LEN);
        let Some((params, body)) = rest.split_first_chunk::<ARGON_LEN>() else {
            return Err(damaged(names::WRAPPED_KEY, "it is cut short"));
        };
        let cipher = passphrase_cipher(passphrase, &header, params)?;
        let sealed = [encoded, body].concat();
        let plain = format::open(&cipher, names::WRAPPED_KEY, &sealed).map(Zeroizing::new);
        let key = plain.ok_or_else(|| {
            let what = "the passphrase is wrong, or the wrapped key in the store is damaged";
            Error::new(
                Kind::Key,
                format!("{what}: try again, or use the key file or its paper copy"),
            )
        })?;
        let key = Self::decode(&key)?;
        if key.store == header.store {
            Ok(key)
        } else {
            Err(damaged(names::WRAPPED_KEY, "store ids differ"))
        }
    }
}

fn passphrase_cipher(
    passphrase: &str,
    header: &Header,
    params: &[u8; ARGON_LEN],
) -> Result<ObjectCipher> {
    let [memory, passes, lanes] = [0, 4, 8].map(|at| format::le32(params, at));
    if memory > ARGON_KIB_MAX || passes > ARGON_PASSES_MAX || lanes != 1 {
        return Err(damaged(names::WRAPPED_KEY, "its Argon2 parameters are out of bounds"));
    }
    let failed = |error| Error::caused(Kind::Key, "cannot derive a key from the passphrase", error);
    let params = Params::new(memory, passes, lanes, Some(32)).map_err(failed)?;
    let mut key: Secret = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into(passphrase.as_bytes(), &header.salt, &mut key[..])
        .map_err(failed)?;
    Ok(object_cipher(&key, header))
}

impl StoreKey {
    /// The key for a sheet of paper: numbered lines of 16 bytes in hex, each with a checksum,
    /// so that a slip of the pen is found in its line.
    #[must_use]
    pub fn to_paper(&self) -> Zeroizing<String> {
        let bytes = self.encode();
        let mut text = Zeroizing::new(String::with_capacity(64 * (4 + bytes.len() / PAPER_BYTES)));
        // Writing into a string cannot fail.
        let _ = writeln!(text, "# Fleece store {}", self.store);
        for (n, line) in bytes.chunks(PAPER_BYTES).enumerate() {
            let _ = write!(text, "{:02}:", n + 1);
            for pair in line.chunks(2) {
                text.push(' ');
                push_hex(&mut text, pair);
            }
            let _ = writeln!(text, " -- {:04x}", paper_sum(n + 1, line));
        }
        text
    }

    /// Reads the paper form, typed in again: case and spaces do not matter.
    ///
    /// # Errors
    /// [`Kind::Key`], naming the line with the slip.
    pub fn from_paper(text: &str) -> Result<Self> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(text.len().min(FILE_MAX as usize)));
        let lines =
            text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        for (n, line) in lines.enumerate() {
            let n = n + 1;
            let slip =
                |what: &str| Error::new(Kind::Key, format!("line {n:02} of the paper key: {what}"));
            let (number, rest) = line.split_once(':').ok_or_else(|| slip("no line number"))?;
            if number.trim().parse() != Ok(n) {
                return Err(slip(&format!(
                    "its number is {}: a line is missing or twice",
                    number.trim()
                )));
            }
            let (body, sum) =
                rest.split_once("--").ok_or_else(|| slip("no checksum at its end"))?;
            let body = from_hex(body)
                .map_err(|_| slip("a character is not a hex digit, or one is missing"))?;
            let sum = u16::from_str_radix(sum.trim(), 16)
                .map_err(|_| slip("its checksum is not readable"))?;
            if paper_sum(n, &body) != sum {
                return Err(slip("its checksum does not match: compare it with the paper"));
            }
            bytes.extend_from_slice(&body);
        }
        Self::decode(&bytes)
    }
}

fn paper_sum(line: usize, bytes: &[u8]) -> u16 {
    let digest =
        Sha256::new().chain_update((line as u32).to_le_bytes()).chain_update(bytes).finalize();
    u16::from_be_bytes([digest[0], digest[1]])
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        // Writing into a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
}

/// Hex digits, white space between them ignored.
fn from_hex(text: &str) -> Result<Zeroizing<Vec<u8>>> {
    let bad = || Error::new(Kind::Key, "the key is damaged: it is not hexadecimal");
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len() / 2));
    let mut high = None;
    for c in text.chars().filter(|c| !c.is_whitespace()) {
        let digit = c.to_digit(16).ok_or_else(bad)? as u8;
        match high.take() {
            None => high = Some(digit),
            Some(first) => bytes.push(first << 4 | digit),
        }
    }
    if high.is_some() { Err(bad()) } else { Ok(bytes) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
