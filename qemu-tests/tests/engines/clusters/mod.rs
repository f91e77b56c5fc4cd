//! Clusters of engines. They wait much, and begin in the order of their names: the longest are among the first.

mod a_cluster_survives_chaos;
mod a_revoked_host_gets_nothing;
mod a_store_is_raised_and_gets_a_new_key;
mod etcd_and_hosts_prove_themselves;
mod hosts_join_leave_and_fail;
mod hosts_of_a_cluster_store_a_block_once;
mod hosts_of_two_versions;
