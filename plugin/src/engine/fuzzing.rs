//! Engines that answer anything, for the fuzzer.

use capnp::message::{Reader, ReaderOptions};
use capnp::serialize::BufferSegments;
use fleece_schema::engine_capnp as wire;

use super::convert::{self, Wire, engine_error};
use super::{MESSAGE_WORDS, types};

/// A message as an answer of the engine: the first byte says which.
pub fn answers(data: &[u8]) {
    let Some((which, mut data)) = data.split_first() else { return };
    if which % 7 == 6 {
        let text = String::from_utf8_lossy(data).into_owned();
        let _ = engine_error(&capnp::Error::failed(text), "asked").to_string();
        return;
    }
    let mut options = ReaderOptions::new();
    options.traversal_limit_in_words(Some(MESSAGE_WORDS));
    let Ok(message) = capnp::serialize::read_message_from_flat_slice(&mut data, options) else {
        return;
    };
    // An answer that is not understood is refused.
    let _ = convert_one(*which, &message);
}

fn convert_one(which: u8, message: &Reader<BufferSegments<&[u8]>>) -> Wire<()> {
    match which % 7 {
        0 => {
            let info: types::EngineInfo = convert::info(message.get_root()?)?;
            assert!(info.block_size.is_power_of_two(), "blocks that cannot be");
        }
        1 => drop(convert::snapshot(message.get_root()?)?),
        2 => drop(convert::disk_plan(message.get_root()?)?),
        3 => drop(convert::status(message.get_root()?)?),
        4 => {
            let root: wire::backup_session::grants_results::Reader<'_> = message.get_root()?;
            for grant in root.get_extents()? {
                let _ = (grant.get_first_block(), grant.get_blocks(), grant.get_disk());
            }
        }
        _ => {
            let root: wire::disk_image::stream_results::Reader<'_> = message.get_root()?;
            root.get_holes()?.iter().map(convert::range).for_each(drop);
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod seeds {
    //! Real answers.

    use super::wire;
    use capnp::message::{Builder, HeapAllocator};

    fn with(which: u8, message: &Builder<HeapAllocator>) -> Vec<u8> {
        [&[which][..], &capnp::serialize::write_message_to_words(message)].concat()
    }

    pub(crate) fn answers() -> Vec<(&'static str, Vec<u8>)> {
        let mut info = Builder::new_default();
        let mut root = info.init_root::<wire::engine_info::Builder<'_>>();
        root.set_version("0.1.0");
        root.set_store_id(&[7; 16]);
        root.set_block_size(4096);
        root.set_host("hv3");
        let mut words = root.init_fingerprint_state(5);
        (0..5).for_each(|n| words.set(n, n));
        let mut snapshot = Builder::new_default();
        fill(snapshot.init_root());
        let mut plan = Builder::new_default();
        let mut root = plan.init_root::<wire::disk_plan::Builder<'_>>();
        root.set_reason("disk is new");
        root.init_forced(2).get(1).set_length(4096);
        let mut status = Builder::new_default();
        let mut root = status.init_root::<wire::status::Builder<'_>>();
        root.set_store_id(&[7; 16]);
        let mut session = root.init_sessions(1).get(0);
        session.set_vm(&[5; 16]);
        session.set_vm_name("web1");
        session.init_counts().set_read(5);
        let mut grants = Builder::new_default();
        let root = grants.init_root::<wire::backup_session::grants_results::Builder<'_>>();
        root.init_extents(3).get(2).set_blocks(9);
        let mut holes = Builder::new_default();
        let root = holes.init_root::<wire::disk_image::stream_results::Builder<'_>>();
        root.init_holes(1).get(0).set_length(9);
        vec![
            ("info", with(0, &info)),
            ("snapshot", with(1, &snapshot)),
            ("plan", with(2, &plan)),
            ("status", with(3, &status)),
            ("grants", with(4, &grants)),
            ("holes", with(5, &holes)),
            ("error", b"\x06remote exception: fleece:busy: web1 has a session".to_vec()),
        ]
    }

    fn fill(mut root: wire::snapshot::Builder<'_>) {
        root.set_id("abc234");
        root.set_vm(&[5; 16]);
        root.set_vm_name("web1");
        let mut disk = root.reborrow().init_disks(1).get(0);
        disk.set_uuid(&[6; 16]);
        disk.set_name("vda");
        root.init_counts().set_new(9);
    }
}
