//! overfill-prefill-node
