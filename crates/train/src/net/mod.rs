//! A Llama-family network (Qwen2's biases too) that can be trained: forward and backward written out, on plain f32 memory.
//!
//! Why not a tensor library's: training on a CPU lives from large products and from touching memory seldom. Here all
//! parameters lie in one run of memory, query, key and value matrices side by side, so they are one product; attention
//! keeps no scores; logits exist for some rows at a time.
//!
//! A sequence's prompt may have been read by another model: its keys and values are then a [`Context`], which is attended to
//! like the sequence's own. Everything runs on the rayon pool that it is called in.
//!
//! **Invariant:** results do not depend on the number of threads or on timing: every sum has one order. Nothing else makes
//! a run that was stopped and resumed the same run.

mod attention;
mod batch;
mod divergence;
mod layer;
mod layer_shape;
mod loss;
mod model;
mod parameters;
mod projection;
mod rows;
mod states;
#[cfg(test)]
mod tests;

pub use batch::{Context, KvRows, Packed, Sequence};
pub use divergence::Divergence;
pub use layer::{LayerBuffers, LayerGradients, LayerWeights, Saved};
pub use layer_shape::LayerShape;
pub use loss::{Mix, RowLoss, Target, Teacher};
pub use model::{Batch, Net, Objective, State};
pub(crate) use parameters::STATE_MAP;
pub use parameters::{Entry, Shape};
pub use rows::rms_norm;
