//! What the end-to-end tests share: tiny random pairs, clusters in this process and of real processes, clients.

pub mod authority;
pub mod cluster;
pub mod file_server;
pub mod kubernetes;
pub mod nodes;
pub mod process_cluster;
pub mod processes;
pub mod scrape;
pub mod security;
pub mod stub_node;
pub mod tiny;
