//! What is the same with every QEMU, and so runs once: engines, their stores, their clusters. One program, so
//! that scenarios run side by side all the time.

mod an_engine_killed_at_any_stage_loses_nothing;
mod clusters;
mod damage_is_found_named_and_healed;
mod sessions_never_wait_for_ever;
mod unique_blocks_are_counted_exactly;
mod who_may_not_use_the_engine_is_refused;
