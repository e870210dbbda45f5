//! Names: of nodes, requests, reservations, attempts and pairs.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Takes the name as it is.
            pub fn new(name: impl Into<String>) -> Self {
                Self(name.into())
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

string_id! {
    /// Names one run of one node process. A restarted process has another one.
    NodeId
}
string_id! {
    /// Names what a client asked for; stays the same over all attempts at it.
    RequestId
}
string_id! {
    /// Names one reservation on one decode node. It is random, so it cannot be guessed, and is used for one handoff only.
    Ticket
}
string_id! {
    /// Hash of the parts of a pair that decide whether two nodes may work together; 64 hexadecimal digits.
    ///
    /// What goes into it: [`crate::PairManifest::fingerprint`].
    Fingerprint
}

impl Fingerprint {
    /// The first twelve digits, for people to read. Never compare these.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

/// Number of an attempt at a request, from 1. It grows with each attempt, so that what is stale is known as stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
