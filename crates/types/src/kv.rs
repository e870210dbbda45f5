//! The KV cache's shape, and the way from the full model's to the decode model's.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Shape of a KV cache: for every token `layers` times one key row and one value row of `[kv_heads, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvGeometry {
    /// Transformer layers.
    pub layers: usize,
    /// Key/value heads (grouped-query attention: at most the number of query heads).
    pub kv_heads: usize,
    /// Values in one head.
    pub head_dim: usize,
}

impl KvGeometry {
    /// Values in one key row (and as many in one value row) of one layer: `kv_heads * head_dim`.
    pub fn row(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Values of all layers' keys and values for one token.
    pub fn values_per_token(&self) -> usize {
        2 * self.layers * self.row()
    }
}

impl fmt::Display for KvGeometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layers x {} KV heads x {}", self.layers, self.kv_heads, self.head_dim)
    }
}

/// How keys and values are stored in a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvFormat {
    /// 32-bit floats.
    #[default]
    F32,
    /// Half precision: half the memory and half the reading, at a relative error of 2^-11.
    F16,
    /// Integers from -127 to 127, with a 32-bit scale for each head of each token; queries and weights of the values are rounded too,
    /// and multiplied as integers. A quarter of the memory and of the reading, and a quarter of the arithmetic.
    Int8,
}

/// How keys and values travel from a prefill node to a decode node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WireFormat {
    /// 32-bit floats.
    #[default]
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Integers from -127 to 127, with a 32-bit scale for each head of each token.
    Int8,
}

/// The numbers that a pair's KV cache is made of. Both decide which tokens are written, so both are in the fingerprint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvFormats {
    /// In the caches of prefill and decode nodes.
    pub cache: KvFormat,
    /// In a handoff.
    pub wire: WireFormat,
}

macro_rules! names {
    ($type:ident, $what:literal, $($name:literal => $variant:ident),*) => {
        impl FromStr for $type {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($name => Ok(Self::$variant),)*
                    other => Err(format!("'{other}' is no {}: use {}", $what, [$($name),*].join(", "))),
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $name),* })
            }
        }
    };
}
names!(KvFormat, "KV cache format", "f32" => F32, "f16" => F16, "int8" => Int8);
names!(WireFormat, "wire format", "f32" => F32, "f16" => F16, "bf16" => Bf16, "int8" => Int8);

/// Which of the full model's layers a depth-pruned decode model keeps (the reference's `kv_prune`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PruneStrategy {
    /// Layer 0 and the last `n - 1`.
    FirstLast,
    /// The first `n`.
    First,
    /// The last `n`.
    Last,
}

impl PruneStrategy {
    /// The `keep` kept layers' indices out of `layers`, ascending; `None` where `keep` is 0 or exceeds `layers`.
    pub fn kept(self, layers: usize, keep: usize) -> Option<Vec<usize>> {
        if keep == 0 || keep > layers {
            return None;
        }
        Some(match self {
            PruneStrategy::FirstLast => std::iter::once(0).chain(layers - (keep - 1)..layers).collect(),
            PruneStrategy::First => (0..keep).collect(),
            PruneStrategy::Last => (layers - keep..layers).collect(),
        })
    }
}

impl FromStr for PruneStrategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "firstlast" => Ok(Self::FirstLast),
            "first" => Ok(Self::First),
            "last" => Ok(Self::Last),
            other => Err(format!("'{other}' is no pruning strategy: use firstlast, first or last")),
        }
    }
}

/// How the full model's KV cache becomes the decode model's. The prefill node applies it, layer by layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum KvTransform {
    /// As it is: both geometries are equal.
    Identity,
    /// Some of the full model's layers; rows stay as they are.
    Prune {
        /// The rule that chose the layers.
        strategy: PruneStrategy,
        /// Full-model layer of each decode-model layer, ascending.
        layers: Vec<usize>,
    },
    /// One linear map `kv_dim -> kv_dim'` with bias per kept layer, shared by keys (after the rotary embedding) and values.
    Projection {
        /// File in the pair's folder, safetensors with `embedding_proj.{i}.weight` `[kv_dim', kv_dim]` and `embedding_proj.{i}.bias` `[kv_dim']`.
        file: String,
        /// sha256 of that file.
        sha256: String,
        /// Full-model layer of each decode-model layer, ascending: rounded `linspace(0, L - 1, n)`.
        layers: Vec<usize>,
    },
}

impl KvTransform {
    /// Full-model layer that feeds decode-model layer `i`, for all `decode_layers` of them.
    pub fn source_layers(&self, decode_layers: usize) -> Vec<usize> {
        match self {
            KvTransform::Identity => (0..decode_layers).collect(),
            KvTransform::Prune { layers, .. } | KvTransform::Projection { layers, .. } => layers.clone(),
        }
    }

    /// Layers that a projection reads: `linspace(0, full - 1, keep)`, rounded half to even as PyTorch and numpy do.
    pub fn projection_layers(full: usize, keep: usize) -> Vec<usize> {
        if keep <= 1 {
            return vec![0; keep];
        }
        let step = (full - 1) as f64 / (keep - 1) as f64;
        (0..keep).map(|i| (i as f64 * step).round_ties_even() as usize).collect()
    }
}

impl fmt::Display for KvTransform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvTransform::Identity => f.write_str("identity"),
            KvTransform::Prune { strategy, layers } => {
                write!(f, "prune:{} (layers {layers:?})", format!("{strategy:?}").to_lowercase())
            }
            KvTransform::Projection { layers, .. } => write!(f, "projection (layers {layers:?})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strategies_keep_the_layers_of_the_reference() {
        assert_eq!(PruneStrategy::FirstLast.kept(6, 3), Some(vec![0, 4, 5]));
        assert_eq!(PruneStrategy::FirstLast.kept(6, 1), Some(vec![0]));
        assert_eq!(PruneStrategy::First.kept(6, 3), Some(vec![0, 1, 2]));
        assert_eq!(PruneStrategy::Last.kept(6, 3), Some(vec![3, 4, 5]));
        assert_eq!(PruneStrategy::Last.kept(6, 7), None);
        assert_eq!(PruneStrategy::Last.kept(6, 0), None);
    }

    #[test]
    fn projection_layers_are_a_rounded_linspace() {
        assert_eq!(KvTransform::projection_layers(28, 16), [0, 2, 4, 5, 7, 9, 11, 13, 14, 16, 18, 20, 22, 23, 25, 27]);
        assert_eq!(KvTransform::projection_layers(6, 6), [0, 1, 2, 3, 4, 5]);
        assert_eq!(KvTransform::projection_layers(6, 1), [0]);
    }
}
