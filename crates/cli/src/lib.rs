//! overfill
