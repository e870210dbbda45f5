//! Which models write an answer: the client's choice, and named in every answer.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which models write an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quality {
    /// The full model reads the prompt and writes the first token, the decode model writes the rest.
    #[default]
    Overfill,
    /// The full model reads and writes all of it.
    Full,
    /// The decode model reads and writes all of it: the baseline.
    Decode,
}

impl Quality {
    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Quality::Overfill => "overfill",
            Quality::Full => "full",
            Quality::Decode => "decode",
        }
    }
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Quality {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "overfill" => Ok(Quality::Overfill),
            "full" => Ok(Quality::Full),
            "decode" => Ok(Quality::Decode),
            other => Err(format!("'{other}' is no quality: use overfill, full or decode")),
        }
    }
}
