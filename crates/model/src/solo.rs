//! Both halves of a pair in one process, without a network: the plain reference that the cluster must agree with.
