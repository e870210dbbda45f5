//! overfill-router
