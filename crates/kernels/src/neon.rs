//! NEON, which every aarch64 CPU has: eight lanes, as two vectors of four.

use std::arch::aarch64::*;
use std::arch::asm;

use crate::simd::{LINE, Simd};

/// NEON, and with `DOT` the instruction `sdot` too: such a value is proof that the CPU has it, made by [`Neon::detect`] alone.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const DOT: bool>(());

impl Neon<false> {
    #[inline]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

impl Neon<true> {
    /// The proof, where this CPU can give it.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("dotprod").then_some(Self(()))
    }
}

impl<const DOT: bool> Neon<DOT> {
    /// Adds to each of four sums the products of its four codes with its four values, which are from -127 to 127.
    #[inline(always)]
    fn add_quads(self, sum: int32x4_t, codes: int8x16_t, values: int8x16_t) -> int32x4_t {
        if DOT {
            let mut sum = sum;
            // SAFETY: `self` proves `sdot`, which reads and writes these registers only. (Its intrinsic is not stable yet.)
            unsafe {
                asm!(
                    ".arch_extension dotprod",
                    "sdot {sum:v}.4s, {codes:v}.16b, {values:v}.16b",
                    sum = inout(vreg) sum,
                    codes = in(vreg) codes,
                    values = in(vreg) values,
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
            return sum;
        }
        // SAFETY: the target has NEON. A pair of products is at most 2 x 128 x 127, which fits 16 bits.
        unsafe {
            let (low, high) = (vmull_s8(vget_low_s8(codes), vget_low_s8(values)), vmull_high_s8(codes, values));
            vpadalq_s16(sum, vpaddq_s16(low, high))
        }
    }
}

/// Four values, as often as a vector holds them.
///
/// # Safety
/// Four values can be read at `x`.
#[inline(always)]
unsafe fn quad(x: *const i8) -> int8x16_t {
    // SAFETY: the target has NEON; the caller says that the values are there.
    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned())) }
}

// SAFETY of every block below: the target has NEON; what a pointer must bear, the trait's contract says, and loads and
// stores need no alignment beyond that of their elements.
impl<const DOT: bool> Simd for Neon<DOT> {
    const LANES: usize = 8;
    type V = [float32x4_t; 2];
    type I = [int32x4_t; 2];

    #[inline(always)]
    fn prefetch<T>(self, p: *const T) {
        // SAFETY: a prefetch of any address does nothing worse than nothing. (Its intrinsic is not stable yet.)
        unsafe { asm!("prfm pldl1keep, [{}]", in(reg) p, options(nomem, nostack, preserves_flags)) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: see above.
        unsafe { [vdupq_n_f32(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: see above.
        unsafe { [vld1q_f32(p), vld1q_f32(p.add(4))] }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u32) -> [Self::V; 2] {
        // SAFETY: see above; a bfloat16 is the upper half of an f32.
        unsafe {
            let pairs = [vld1q_u32(p), vld1q_u32(p.add(4))];
            [
                pairs.map(|pairs| vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs))),
                pairs.map(|pairs| vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000)))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::V {
        // SAFETY: see above.
        unsafe {
            let raw = vld1q_u16(p);
            [vget_low_u16(raw), vget_high_u16(raw)].map(|half| vcvt_f32_f16(vreinterpret_f16_u16(half)))
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: see above.
        unsafe {
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(4), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: Self::V) {
        // SAFETY: see above.
        unsafe {
            let halves = v.map(|v| vqmovn_s32(vcvtnq_s32_f32(v)));
            vst1_s8(p, vqmovn_s16(vcombine_s16(halves[0], halves[1])));
        }
    }
    #[inline(always)]
    unsafe fn sum_i8(self, p: *const i8) -> i32 {
        // SAFETY: see above.
        unsafe { i32::from(vaddlvq_s8(vld1q_s8(p))) }
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])] }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [vsubq_f32(a[0], b[0]), vsubq_f32(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])] }
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [vdivq_f32(a[0], b[0]), vdivq_f32(a[1], b[1])] }
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above. NEON's own maximum would give what is not a number.
        unsafe { [vbslq_f32(vcgtq_f32(a[0], b[0]), a[0], b[0]), vbslq_f32(vcgtq_f32(a[1], b[1]), a[1], b[1])] }
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: see above, as for the maximum.
        unsafe { [vbslq_f32(vcltq_f32(a[0], b[0]), a[0], b[0]), vbslq_f32(vcltq_f32(a[1], b[1]), a[1], b[1])] }
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { [vrndnq_f32(a[0]), vrndnq_f32(a[1])] }
    }
    #[inline(always)]
    fn exp2_integral(self, a: Self::V) -> Self::V {
        // SAFETY: see above.
        unsafe { a.map(|a| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(a), vdupq_n_s32(127))))) }
    }
    #[inline(always)]
    unsafe fn dot_u4<const R: usize, const P: usize>(
        self,
        codes: [*const u8; P],
        x: *const i8,
        start: Option<*const i32>,
    ) -> [[Self::I; P]; R] {
        // SAFETY: see above.
        unsafe {
            let mut sums: [[Self::I; P]; R] = std::array::from_fn(|r| [[vdupq_n_s32(start.map_or(0, |start| *start.add(r))); 2]; P]);
            for line in 0..4 {
                for (p, codes) in codes.into_iter().enumerate() {
                    for half in 0..2 {
                        let both = vld1q_u8(codes.add(line * LINE + half * 16));
                        let first = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
                        let second = vreinterpretq_s8_u8(vshrq_n_u8::<4>(both));
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let sum = &mut sums[p][half];
                            *sum = self.add_quads(*sum, first, quad(x.add(r * 32 + line * 4)));
                            *sum = self.add_quads(*sum, second, quad(x.add(r * 32 + 16 + line * 4)));
                        }
                    }
                }
            }
            sums
        }
    }
    #[inline(always)]
    unsafe fn dot_i8<const R: usize, const P: usize, const LINES: usize>(
        self,
        codes: [*const u8; P],
        x: *const i8,
        _: *const i32,
    ) -> [[Self::I; P]; R] {
        // SAFETY: see above.
        unsafe {
            let mut sums = [[[vdupq_n_s32(0); 2]; P]; R];
            for line in 0..LINES {
                for (p, codes) in codes.into_iter().enumerate() {
                    for half in 0..2 {
                        // A code less 128 is the code with its highest bit turned, as a signed byte.
                        let code = veorq_u8(vld1q_u8(codes.add(line * LINE + half * 16)), vdupq_n_u8(128));
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let sum = &mut sums[p][half];
                            *sum = self.add_quads(*sum, vreinterpretq_s8_u8(code), quad(x.add(r * 32 + line * 4)));
                        }
                    }
                }
            }
            sums
        }
    }
    #[inline(always)]
    unsafe fn dot_weights<const R: usize, const P: usize, const LINES: usize>(
        self,
        codes: [*const i8; P],
        x: *const i8,
    ) -> [[Self::I; P]; R] {
        // SAFETY: see above.
        unsafe {
            let mut sums = [[[vdupq_n_s32(0); 2]; P]; R];
            for line in 0..LINES {
                for (p, codes) in codes.into_iter().enumerate() {
                    for half in 0..2 {
                        let code = vld1q_s8(codes.add(line * LINE + half * 16));
                        for (r, sums) in sums.iter_mut().enumerate() {
                            let sum = &mut sums[p][half];
                            *sum = self.add_quads(*sum, code, quad(x.add(r * 32 + line * 4)));
                        }
                    }
                }
            }
            sums
        }
    }
    #[inline(always)]
    fn greatest(self, a: Self::V) -> f32 {
        // SAFETY: see above.
        unsafe { vmaxvq_f32(vmaxq_f32(a[0], a[1])) }
    }
    #[inline(always)]
    fn to_f32(self, a: Self::I) -> Self::V {
        // SAFETY: see above.
        unsafe { [vcvtq_f32_s32(a[0]), vcvtq_f32_s32(a[1])] }
    }
}
