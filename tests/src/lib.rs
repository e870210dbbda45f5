//! overfill-tests
