//! overfill-text
