//! A whole cluster of real processes under load while things are done to it: processes killed, stopped and asked to leave,
//! connections cut, hosts cut off, links that are slow or lose packets, an etcd that stops, forgets or is slow.
//!
//! Each process is on a host of its own: a network namespace, whose packets go through this program (`network`). It needs root,
//! Linux and iproute2. `cluster` starts the processes, `load` asks and compares answers token for token with undisturbed ones,
//! `fault` is what is done, `run` does it and tells what came of it (`report`).

pub mod balancer;
pub mod cluster;
pub mod fault;
pub mod load;
pub mod network;
pub mod report;
pub mod run;
pub mod storm;
