//! Guests and images under QEMU: run on each QEMU that is supported. One program, so that scenarios run side by
//! side all the time.

mod a_backup_outlives_its_engine;
mod a_chain_of_incrementals_restores_exactly;
mod a_frozen_guest_is_always_thawed;
mod a_full_disk_breaks_the_backup_only;
mod a_full_scratch_disk_does_not_harm_the_guest;
mod a_guest_boots_from_serve;
mod a_store_in_a_bucket_is_like_any_other;
mod an_iothread_disk_is_backed_up_without_harm;
mod bad_input_is_refused_clearly;
mod disks_of_a_vm_are_taken_at_one_instant;
mod harness_can_be_trusted;
mod killed_at_any_stage_nothing_is_lost;
mod lost_change_tracking_means_a_full_read;
mod no_plaintext_and_no_exchange_of_objects;
mod shut_off_images_are_backed_up;
mod whatever_dies_the_guest_lives_and_nothing_dirty_is_forgotten;
