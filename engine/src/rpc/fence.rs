//! That this engine is its host, in a cluster by a list: whoever is found at the host's address in it is.
//!
//! Two engines of one name would answer for one another's questions. With etcd the lease says which one
//! is the host ([`crate::membership`]). A list has one address for each name, so an engine calls its own
//! and looks whether it finds itself there: until then it says nothing to others and writes no checkpoint,
//! and once it finds another one it ends. Nothing has to be kept or agreed on, and of two it is always the
//! same one that ends.

use std::rc::Rc;
use std::time::Duration;

use super::links::with_host;
use super::peers::{AGAIN, Peers};
use crate::error::{Error, Kind, Result};

/// Between two looks: as long as a lease lasts.
const LOOK: Duration = Duration::from_secs(15);

impl Peers {
    /// Looks for this engine at its own address, for ever; ends with [`Kind::Busy`] when another one is
    /// there. Where etcd knows who is in the cluster there is nothing to look for.
    pub(super) async fn fence(self: Rc<Self>) -> Error {
        if !self.listed {
            return std::future::pending().await;
        }
        let mut said = String::new();
        loop {
            match Box::pin(self.finds_itself()).await {
                Ok(true) => self.cluster.be_sure(true),
                Ok(false) => return self.is_another(),
                // It was found before; while nobody answers there, nobody else is taken for it.
                Err(_) if self.cluster.is_sure() => {}
                Err(error) => {
                    let why = error.to_string();
                    if why != said {
                        eprintln!(
                            "fleece-engine: not found at this host's own address in cluster.static: {why}; \
                             nothing is said to other hosts until it is"
                        );
                        said = why;
                    }
                }
            }
            tokio::time::sleep(if self.cluster.is_sure() { LOOK } else { AGAIN }).await;
        }
    }

    /// Whether it is this engine that answers at its address, and not another one.
    async fn finds_itself(&self) -> Result<bool> {
        let us = (self.cluster.us(), self.engine);
        with_host(self, us, async |_, found, _| Ok(found == self.engine)).await
    }

    fn is_another(&self) -> Error {
        let map = self.cluster.map();
        let address = map.member(self.cluster.us()).map_or("", |member| &member.address);
        let what = format!("another engine, at {address}, is {} already", self.name);
        Error::new(Kind::Busy, format!("{what}: give this host a name of its own"))
    }
}
