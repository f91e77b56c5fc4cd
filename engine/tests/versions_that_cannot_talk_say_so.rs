//! Programs of other versions, made by hand from the schemas: they talk by the newest protocol that both
//! speak, and where there is none they hear which of them is to be upgraded.
#![allow(clippy::unwrap_used, missing_docs)]

mod rpc_support;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use capnp_rpc::{RpcSystem, rpc_twoparty_capnp::Side, twoparty::VatNetwork};
use fleece_engine::config::Config;
use fleece_schema::engine_capnp::{OLDEST_PROTOCOL, PROTOCOL_VERSION};
use fleece_schema::peer_capnp::{OLDEST_PEER_PROTOCOL, PEER_PROTOCOL, peer};
use rpc_support::{Client, Engine, SOON, on_local};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};

/// A host's engine, and all that another host of its cluster has.
struct Host {
    child: Child,
    folder: tempfile::TempDir,
    address: String,
}

impl Host {
    /// hv0, whose cluster has hv1, too: that is us.
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let config = at("engine.toml");
        fleecectl(&["--config", &config, "init", "--store", &at("store")]);
        fleecectl(&["cluster", "init", "--dir", &at("ca")]);
        for host in ["hv0", "hv1"] {
            let identity = at(&format!("{host}.pem"));
            fleecectl(&["cluster", "invite", host, "--dir", &at("ca"), "--out", &identity]);
        }
        let ports = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [address, ours] = ports.map(|port| port.local_addr().unwrap().to_string());
        let list = format!(
            "[cluster]\nname = 'hv0'\nidentity = '{}'\nstatic = [{{ name = 'hv0', address = '{address}' }}, \
             {{ name = 'hv1', address = '{ours}' }}]\n",
            at("hv0.pem")
        );
        fs::write(&config, fs::read_to_string(&config).unwrap() + "\n" + &list).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_fleece-engine"))
            .args(["--config", &config, "--socket", &at("sock"), "--state-dir", &at("state")])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while std::net::TcpStream::connect(&address).is_err() {
            assert!(begun.elapsed() < SOON, "the engine does not come up");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Host { child, folder, address }
    }

    /// A link of hv1 to it.
    async fn link(&self) -> peer::Client {
        let text = fs::read(self.folder.path().join("hv1.pem")).unwrap();
        let mut chain: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().unwrap();
        let mut roots = rustls::RootCertStore::empty();
        chain.split_off(1).into_iter().for_each(|root| roots.add(root).unwrap());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(&text).unwrap())
            .unwrap();
        let stream = TcpStream::connect(&self.address).await.unwrap();
        let name = ServerName::try_from("hv0").unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        let (read, write) = tokio::io::split(stream);
        let options = capnp::message::ReaderOptions::new();
        let network = VatNetwork::new(read.compat(), write.compat_write(), Side::Client, options);
        let mut system = RpcSystem::new(Box::new(network), None);
        let client = system.bootstrap(Side::Server);
        tokio::task::spawn_local(system);
        client
    }

    /// hv1 greets, of a version that speaks these protocols; gives those of hv0.
    async fn greet(&self, oldest: u16, newest: u16) -> Result<(u16, u16), String> {
        let config = Config::load(&self.folder.path().join("engine.toml")).unwrap();
        let (map, _) = config.cluster.unwrap().fixed_map().unwrap();
        let store = store_id(&self.folder.path().join("engine.key"));
        let mut request = self.link().await.greet_request();
        let mut us = request.get().init_us();
        us.set_host("hv1");
        us.set_store(&store);
        us.set_map_digest(map.digest());
        us.set_instance(7);
        us.set_version("0.9.9");
        us.set_protocol(oldest);
        us.set_newest_protocol(newest);
        let answer = request.send().promise.await.map_err(|error| error.to_string())?;
        let you = answer.get().unwrap().get_you().unwrap();
        Ok((you.get_protocol(), you.get_newest_protocol()))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn store_id(key: &Path) -> [u8; 16] {
    *fleece_engine::store::keys::StoreKey::load(key).unwrap().store().0.as_bytes()
}

fn fleecectl(arguments: &[&str]) {
    let done = Command::new(env!("CARGO_BIN_EXE_fleecectl")).args(arguments).output().unwrap();
    assert!(done.status.success(), "{done:?}");
}

#[test]
fn hosts_talk_by_a_protocol_that_both_speak() {
    let host = Host::start();
    on_local(async {
        let ours = (OLDEST_PEER_PROTOCOL, PEER_PROTOCOL);
        // The next version speaks one more; the one before knew of no range.
        let next = (PEER_PROTOCOL, PEER_PROTOCOL + 1);
        for (oldest, newest) in [ours, next, (OLDEST_PEER_PROTOCOL, 0)] {
            assert_eq!(host.greet(oldest, newest).await, Ok(ours), "{oldest} to {newest}");
        }
        let this = format!("hv0 ({}) speaks protocol", env!("CARGO_PKG_VERSION"));
        let newer = host.greet(PEER_PROTOCOL + 1, PEER_PROTOCOL + 2).await.unwrap_err();
        assert!(newer.contains("hv1 (0.9.9) speaks protocols") && newer.contains(&this), "{newer}");
        assert!(newer.ends_with("upgrade hv0"), "{newer}");
        let older = host.greet(OLDEST_PEER_PROTOCOL - 1, 0).await.unwrap_err();
        assert!(older.contains(&this) && older.ends_with("upgrade hv1"), "{older}");
    });
}

#[test]
fn a_program_of_the_next_version_talks_to_this_engine() {
    let engine = Engine::start();
    on_local(async {
        let client = Client::connect(&engine).await;
        let hello = async |oldest: u16, newest: u16| {
            let mut hello = client.engine.hello_request();
            hello.get().set_program("fleece");
            hello.get().set_version("0.9.9");
            hello.get().set_oldest_protocol(oldest);
            hello.get().set_protocol(newest);
            hello.send().promise.await.map(drop).map_err(|error| error.to_string())
        };
        hello(PROTOCOL_VERSION, PROTOCOL_VERSION + 1).await.unwrap();
        hello(0, PROTOCOL_VERSION).await.unwrap();
        let newer = hello(PROTOCOL_VERSION + 1, PROTOCOL_VERSION + 2).await.unwrap_err();
        assert!(newer.contains("fleece (0.9.9) speaks protocols"), "{newer}");
        assert!(newer.ends_with("upgrade the engine"), "{newer}");
        let older = hello(0, OLDEST_PROTOCOL - 1).await.unwrap_err();
        assert!(older.ends_with("upgrade fleece"), "{older}");
    });
}
