//! How numbers are stored: f32 or half precision. Products and attention compute in f32 whatever the storage.

use crate::simd::Simd;

/// A stored number.
pub(crate) trait Number: Copy + Default + Send + Sync {
    /// # Safety
    /// `LANES` values can be read at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
    fn from_f32(x: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
    fn from_f32(x: f32) -> Self {
        x
    }
    fn to_f32(self) -> f32 {
        self
    }
}

/// The bits of a half-precision number.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(crate) struct F16(pub(crate) u16);

impl Number for F16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's promise; the type is a transparent u16.
        unsafe { s.load_f16(p.cast()) }
    }
    fn from_f32(x: f32) -> Self {
        Self(half::f16::from_f32(x).to_bits())
    }
    fn to_f32(self) -> f32 {
        half::f16::from_bits(self.0).to_f32()
    }
}
