//! The two doors: gRPC and OpenAI-compatible HTTP. Both lead to the same relay.

pub(crate) mod grpc;
pub(crate) mod http;
mod openai;
