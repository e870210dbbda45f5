//! A cluster in one thread, under virtual time, of which a seed says all that happens.
//!
//! Routers and nodes are those of production. What is not is what they would wait for: the models (`model`, over `cache`), whose
//! answers are known beforehand, and the threads that nodes compute on (`node`), whose place tasks take.

pub mod cache;
pub mod model;
pub mod node;
