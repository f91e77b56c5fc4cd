//! Nodes in containers: read through the store's caches, written by a packer of nodes.

use super::node::{NodeRef, fingerprint};
use super::{NodeSource, NodeStore};
use crate::error::Result;
use crate::ids::Address;
use crate::store::container::{Directories, Packer};

impl NodeSource for Directories {
    fn get(&self, node: &NodeRef) -> Result<Vec<u8>> {
        self.read_node(node.address)
    }
}

/// Reads nodes from containers and writes new ones through a packer. The new ones are
/// durable once the packer was sealed.
pub struct StoredNodes<'p> {
    directories: Directories,
    packer: &'p mut Packer,
}

impl<'p> StoredNodes<'p> {
    /// Over a packer of nodes of the same store.
    pub fn new(directories: &Directories, packer: &'p mut Packer) -> Self {
        StoredNodes { directories: directories.clone(), packer }
    }
}

impl NodeSource for StoredNodes<'_> {
    fn get(&self, node: &NodeRef) -> Result<Vec<u8>> {
        self.directories.get(node)
    }
}

impl NodeStore for StoredNodes<'_> {
    fn put(&mut self, _level: u8, bytes: &[u8]) -> Result<Address> {
        self.packer.push(fingerprint(bytes), bytes)
    }
}
