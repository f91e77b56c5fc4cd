//! QEMU through QMP: sessions, bitmaps, views, the guest agent, the guard.
