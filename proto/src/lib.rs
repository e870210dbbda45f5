//! The wire: generated gRPC code, and its mapping to and from the words of `overfill-types`.
//!
//! The `.proto` files in `overfill/v1` are the contract, and `inference` is the KServe v2 protocol, whose names and field
//! numbers are given; `src/gen` is made from them and checked in, so that building needs no protobuf compiler. `tests/generated_code_is_current.rs` makes it anew and compares.

pub mod convert;
pub mod error;

use overfill_types::{Code, ServiceError};

/// Generated from `overfill/v1/*.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod v1 {
    include!("gen/overfill.v1.rs");
}

/// Generated from `inference/grpc_service.proto`: the KServe v2 protocol.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod kserve {
    include!("gen/inference.rs");
}

/// All services' descriptors, for gRPC reflection (an encoded `FileDescriptorSet`).
pub const DESCRIPTORS: &[u8] = include_bytes!("gen/descriptors.bin");

/// Largest gRPC message that our services take, in bytes: a KV frame of [`MAX_FRAME_PAYLOAD`] and its header.
pub const MAX_MESSAGE: usize = 8 << 20;

/// Most of it that one part may be of a message on a stream that many requests share: the rest is for what is around it.
const MAX_SHARED: usize = MAX_MESSAGE - (128 << 10);

/// Bytes of a message, or a part of one, on a stream that many requests share. One that is too long would end it for all of them.
///
/// # Errors
/// [`Code::InvalidArgument`] where it is too long.
pub fn check_length(message: &impl prost::Message) -> Result<usize, ServiceError> {
    let bytes = message.encoded_len();
    if bytes <= MAX_SHARED {
        return Ok(bytes);
    }
    let message = format!(
        "the request takes a message of {bytes} bytes between router and node, where {MAX_SHARED} are the most: shorten the prompt, or ask for fewer log-probabilities"
    );
    Err(ServiceError::new(Code::InvalidArgument, message))
}

/// Largest payload (keys and values together) of one KV frame, in bytes.
pub const MAX_FRAME_PAYLOAD: usize = 4 << 20;
