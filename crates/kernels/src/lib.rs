//! overfill-kernels
