//! Real-QEMU tests of Fleece.
