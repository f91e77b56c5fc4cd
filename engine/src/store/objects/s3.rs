//! A store in a bucket of S3, or of anything that speaks it.
//!
//! Every object is made by one request that succeeds only if its key is free (`If-None-Match: *`):
//! a bucket's policy can forbid hosts everything else. A request whose answer is lost is settled by
//! reading the key back ([`super::Objects::create`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::path::Path as Prefix;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, RetryConfig};
use serde::{Deserialize, Serialize};

use super::resend::Connector;
use super::{Created, Objects, READS_IN_FLIGHT};
use crate::error::{Context, Error, Kind, Result};
use crate::store::format::random;
use crate::store::names;

/// One request, with its whole body: 16 MiB in this time are 140 KB/s.
const REQUEST: Duration = Duration::from_secs(120);
/// A connection.
const CONNECT: Duration = Duration::from_secs(5);
/// A request is tried again for so long, however often that is: a server starts anew in less.
const RETRY: Duration = Duration::from_secs(60);
/// Between two tries at most.
const PAUSE: Duration = Duration::from_secs(5);

/// A bucket, and the folder in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bucket {
    /// Its name.
    pub name: String,
    /// What all keys begin with; may be empty.
    pub prefix: String,
    /// How it is reached.
    pub access: Access,
}

/// How a server of S3 is reached. What is absent is taken from the environment, as other programs
/// do: `AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, or the role of
/// the machine.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// The server, `https://s3.example.org`; Amazon's own if nothing says another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// A file (mode 0400) with `access_key_id = "…"` and `secret_access_key = "…"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Credentials {
    access_key_id: String,
    secret_access_key: String,
}

impl Bucket {
    /// Reads `bucket` or `bucket/prefix`.
    ///
    /// # Errors
    /// [`Kind::Usage`] without a bucket.
    pub fn parse(text: &str) -> Result<Self> {
        let (name, prefix) = text.split_once('/').unwrap_or((text, ""));
        let prefix = prefix.trim_matches('/');
        if name.is_empty() || Prefix::parse(prefix).is_err() {
            let what = format!("'s3://{text}' is not a bucket and a folder (s3://bucket/prefix)");
            return Err(Error::new(Kind::Usage, what));
        }
        let (name, prefix) = (name.to_owned(), prefix.to_owned());
        Ok(Bucket { name, prefix, access: Access::default() })
    }
}

impl std::fmt::Display for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let slash = if self.prefix.is_empty() { "" } else { "/" };
        write!(f, "s3://{}{slash}{}", self.name, self.prefix)
    }
}

impl Objects {
    /// Makes sure that what is there cannot be overwritten: claims, journals and commits rest on that, and
    /// there are servers that pass `If-None-Match` over. Leaves one object, [`names::PROBE`].
    ///
    /// # Errors
    /// [`Kind::NoStore`] for such a server; when it does not answer.
    pub fn must_keep_what_is_there(&self) -> Result<()> {
        // The second one comes to a key that is taken, by us or by whoever was here before.
        for _ in 0..2 {
            if self.create(names::PROBE, random::<16>()?.to_vec())? == Created::Exists {
                return Ok(());
            }
        }
        let what = "the S3 server overwrites objects that it is told to create (If-None-Match: *)";
        Err(Error::new(
            Kind::NoStore,
            format!("{what}: blocks would be lost, use one that knows conditional writes"),
        ))
    }

    /// The objects in a bucket. What is to be sent is staged in `staging`. Nothing is asked yet.
    ///
    /// # Errors
    /// [`Kind::Key`] when the credentials cannot be used, [`Kind::Usage`] for what is no server.
    pub fn in_bucket(bucket: &Bucket, staging: &Path) -> Result<Self> {
        let Access { endpoint, region, credentials } = &bucket.access;
        // The only cipher library of this program; an earlier call has done it otherwise.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = AmazonS3Builder::from_env().with_bucket_name(&bucket.name);
        // One at a time, so that what is forbidden is an error of its own; a keeper takes few away.
        builder = builder.with_disable_bulk_delete(true);
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(region) = region {
            builder = builder.with_region(region);
        }
        if let Some(path) = credentials {
            let Credentials { access_key_id, secret_access_key } = read_credentials(path)?;
            builder =
                builder.with_access_key_id(access_key_id).with_secret_access_key(secret_access_key);
        }
        let options = ClientOptions::new()
            .with_timeout(REQUEST)
            .with_connect_timeout(CONNECT)
            .with_pool_max_idle_per_host(READS_IN_FLIGHT)
            // Plain HTTP where the endpoint says so: objects are sealed in any case.
            .with_allow_http(true);
        let backoff = BackoffConfig { max_backoff: PAUSE, ..BackoffConfig::default() };
        let retry = RetryConfig { backoff, max_retries: usize::MAX, retry_timeout: RETRY };
        let store = builder
            .with_client_options(options)
            .with_http_connector(Connector)
            .with_retry(retry)
            .build()
            .map_err(|error| {
                Error::caused(Kind::Usage, format!("cannot use the store at {bucket}"), error)
            })?;
        if bucket.prefix.is_empty() {
            return Self::over(Arc::new(store), None, staging);
        }
        Self::over(Arc::new(PrefixStore::new(store, bucket.prefix.as_str())), None, staging)
    }
}

fn read_credentials(path: &Path) -> Result<Credentials> {
    use std::os::unix::fs::MetadataExt;
    let what = || format!("cannot read the credentials {}", path.display());
    let mode = std::fs::metadata(path).context(what)?.mode();
    if mode & 0o077 != 0 {
        let open = format!("{}: others may read it (mode {:o})", path.display(), mode & 0o777);
        return Err(Error::new(Kind::Key, format!("{open}: chmod 0400")));
    }
    let text = std::fs::read_to_string(path).context(what)?;
    // The cause would quote the line, and so the secret.
    toml::from_str(&text).map_err(|_| {
        let wanted = "access_key_id = \"…\" and secret_access_key = \"…\"";
        Error::new(Kind::Key, format!("{} has not just {wanted}", path.display()))
    })
}
