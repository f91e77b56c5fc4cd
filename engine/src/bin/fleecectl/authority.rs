//! The cluster's own CA: its folder, the certificates that it made, and those that it took back.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use fleece_engine::config::CRL_NAME;
use fleece_engine::error::{Context as _, Error, Kind, Result};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SerialNumber, date_time_ymd,
};
use serde::{Deserialize, Serialize};

/// The CA's files in its folder.
const CERTIFICATE: &str = "ca.pem";
const KEY: &str = "ca.key";
const RECORD: &str = "issued.toml";
/// Records of this version are read.
const VERSION: u32 = 1;
/// The last year of everything: a list that ends would let the hosts on it in again.
const FOR_EVER: i32 = 4096;

/// Every certificate that was made: none can be taken back without its number.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    #[serde(rename = "certificate", default)]
    certificates: Vec<Issued>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Issued {
    host: String,
    /// In hexadecimal.
    serial: String,
    /// When, Unix milliseconds.
    issued_ms: i64,
    /// When it was taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    revoked_ms: Option<i64>,
}

/// What was taken back.
pub(super) struct Revoked {
    /// The list of all that ever was.
    pub(super) list: PathBuf,
    /// Numbers of the host's certificates.
    pub(super) serials: Vec<String>,
}

/// The CA in a folder.
pub(super) struct Authority {
    dir: PathBuf,
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
    record: Record,
}

impl Authority {
    /// Makes a new one; gives its files.
    pub(super) fn make(dir: &Path) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(dir).context(|| format!("cannot create {}", dir.display()))?;
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = authority()?.self_signed(&key).map_err(failed)?;
        let (path, secret) = (dir.join(CERTIFICATE), dir.join(KEY));
        write(&secret, &key.serialize_pem())?;
        write(&path, &certificate.pem())?;
        Ok(vec![path, secret])
    }

    pub(super) fn open(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            let hint =
                || format!("cannot read {} (fleecectl cluster init makes it)", path.display());
            fs::read_to_string(&path).context(hint)
        };
        let (certificate, key) = (read(CERTIFICATE)?, read(KEY)?);
        let issuer = Issuer::new(authority()?, KeyPair::from_pem(&key).map_err(failed)?);
        let path = dir.join(RECORD);
        let record = match fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).context(|| format!("{}", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Record { version: VERSION, certificates: Vec::new() }
            }
            Err(error) => return Err(error).context(|| format!("cannot read {}", path.display())),
        };
        if record.version != VERSION {
            let what =
                format!("{} is of version {}: upgrade fleece", path.display(), record.version);
            return Err(Error::new(Kind::Usage, what));
        }
        Ok(Authority { dir: dir.to_owned(), certificate, issuer, record })
    }

    /// A host's certificate, the CA's, and the host's key.
    pub(super) fn invite(&mut self, host: &str) -> Result<String> {
        let mut params = CertificateParams::new([host.to_owned()]).map_err(|error| {
            Error::caused(Kind::Usage, format!("'{host}' cannot be a host's name"), error)
        })?;
        let mut serial = [0; 16];
        getrandom::fill(&mut serial)
            .map_err(|e| Error::caused(Kind::Failed, "the system gives no random numbers", e))?;
        // A positive number of the same length, always.
        serial[0] = serial[0] & 0x7f | 0x40;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.distinguished_name.push(DnType::CommonName, host);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let own = KeyPair::generate().map_err(failed)?;
        let signed = params.signed_by(&own, &self.issuer).map_err(failed)?;
        let serial = serial.iter().map(|byte| format!("{byte:02x}")).collect();
        let (host, issued_ms) = (host.to_owned(), now_ms());
        self.record.certificates.push(Issued { host, serial, issued_ms, revoked_ms: None });
        // Before anybody has the certificate.
        self.save()?;
        Ok([signed.pem(), self.certificate.clone(), own.serialize_pem()].concat())
    }

    /// Takes all certificates of a host back: signs the list of everything that was taken back.
    pub(super) fn revoke(&mut self, host: &str) -> Result<Revoked> {
        let of_host = self.record.certificates.iter_mut().filter(|issued| issued.host == host);
        let serials: Vec<String> = of_host
            .map(|issued| {
                issued.revoked_ms.get_or_insert_with(now_ms);
                issued.serial.clone()
            })
            .collect();
        if serials.is_empty() {
            let record = self.dir.join(RECORD);
            let what = format!(
                "{} has no certificate of a host {host}: it was never invited, or by a version that did \
                 not write that down; then make a new CA and invite all others anew",
                record.display()
            );
            return Err(Error::new(Kind::NotFound, what));
        }
        // What is written down is on every later list, whatever happens to this one.
        self.save()?;
        let list = self.dir.join(CRL_NAME);
        replace(&list, &self.list()?)?;
        Ok(Revoked { list, serials })
    }

    /// The list of everything that was taken back, if there is any.
    pub(super) fn revocations(&self) -> Result<Option<String>> {
        let any = self.record.certificates.iter().any(|issued| issued.revoked_ms.is_some());
        any.then(|| self.list()).transpose()
    }

    fn list(&self) -> Result<String> {
        let revoked = self.record.certificates.iter().filter_map(|issued| {
            let (year, month, day) = day_of(issued.revoked_ms?);
            Some(bytes_of(&issued.serial).map(|serial| RevokedCertParams {
                serial_number: SerialNumber::from_slice(&serial),
                revocation_time: date_time_ymd(year, month, day),
                reason_code: None,
                invalidity_date: None,
            }))
        });
        let damaged = || {
            let path = self.dir.join(RECORD);
            Error::new(Kind::Failed, format!("{}: a serial number is damaged", path.display()))
        };
        let revoked_certs = revoked.collect::<Option<_>>().ok_or_else(damaged)?;
        let (year, month, day) = day_of(now_ms());
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(year, month, day),
            next_update: date_time_ymd(FOR_EVER, 1, 1),
            crl_number: SerialNumber::from(now_ms().unsigned_abs()),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).and_then(|list| list.pem()).map_err(failed)
    }

    fn save(&self) -> Result<()> {
        let path = self.dir.join(RECORD);
        let text = toml::to_string(&self.record).map_err(|e| {
            Error::caused(Kind::Failed, format!("cannot write {}", path.display()), e)
        })?;
        replace(&path, &text)
    }
}

/// What the CA's certificate says; the same whenever it signs.
fn authority() -> Result<CertificateParams> {
    let mut params = CertificateParams::new([]).map_err(failed)?;
    params.distinguished_name.push(DnType::CommonName, "Fleece cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

/// Year, month and day.
fn day_of(ms: i64) -> (i32, u8, u8) {
    let date = Timestamp::from_millisecond(ms).unwrap_or_default().to_zoned(TimeZone::UTC).date();
    (i32::from(date.year()), date.month().unsigned_abs(), date.day().unsigned_abs())
}

/// Bytes that are written in hexadecimal.
pub(super) fn bytes_of(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes().chunks(2);
    digits.map(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok()).collect()
}

/// Writes a file that only its owner can read, and that is not there yet.
pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    create(path, text, 0o400)
        .context(|| format!("cannot write {} (it must not be there yet)", path.display()))
}

/// Puts a file in the place of the one that is there.
fn replace(path: &Path, text: &str) -> Result<()> {
    let next = path.with_extension("new");
    let replaced = match fs::remove_file(&next) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => create(&next, text, 0o600).and_then(|()| fs::rename(&next, path)),
    };
    replaced.context(|| format!("cannot write {}", path.display()))
}

fn create(path: &Path, text: &str, mode: u32) -> std::io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn failed(error: rcgen::Error) -> Error {
    Error::caused(Kind::Failed, "cannot make a certificate", error)
}
