//! How large a KV cache is.

use std::str::FromStr;

use overfill_types::flags::parse_bytes;

/// What is left to everything else where a cache takes what is free: workspaces, connections, code.
const REST: u64 = 256 << 20;

/// Memory of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvMemory {
    /// So many bytes.
    Bytes(u64),
    /// Nine tenths of what is free once the model is loaded, and 256 MiB less.
    Auto,
}

impl KvMemory {
    /// Bytes; `free` tells how many are free, where that is asked for.
    ///
    /// # Errors
    /// Those of `free`.
    pub fn bytes<E>(self, free: impl FnOnce() -> Result<u64, E>) -> Result<u64, E> {
        Ok(match self {
            Self::Bytes(bytes) => bytes,
            Self::Auto => (free()? / 10 * 9).saturating_sub(REST),
        })
    }
}

impl FromStr for KvMemory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => parse_bytes(text).map(Self::Bytes).map_err(|error| format!("{error}, or auto")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_or_follow_what_is_free() {
        assert_eq!("2G".parse(), Ok(KvMemory::Bytes(2 << 30)));
        assert_eq!("auto".parse(), Ok(KvMemory::Auto));
        assert!("all".parse::<KvMemory>().unwrap_err().contains("or auto"));
        let free = |bytes: u64| KvMemory::Auto.bytes(|| Ok::<_, ()>(bytes)).unwrap();
        assert_eq!((free(10 << 30), free(1 << 20)), ((9 << 30) - REST, 0));
        assert_eq!(KvMemory::Bytes(7).bytes(|| Err::<u64, _>("is not asked")), Ok(7));
    }
}
