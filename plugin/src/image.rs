//! Disk images of VMs that are shut off.
