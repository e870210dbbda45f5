//! overfill-decode-node
