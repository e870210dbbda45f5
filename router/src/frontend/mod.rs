//! The doors: gRPC (ours, and the KServe v2 protocol) and OpenAI-compatible HTTP. All lead to the same relay.

mod docs;
pub(crate) mod grpc;
pub(crate) mod http;
pub(crate) mod kserve;
mod openai;
mod stack;

pub(crate) use stack::stack;
