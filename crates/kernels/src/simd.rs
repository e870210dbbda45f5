//! Lanes of f32 and of integers, on the CPU features that are there at run time.

use std::sync::atomic::{AtomicU8, Ordering};

/// A vector unit. A value of an implementing type is proof that its CPU features are there.
///
/// Every operation rounds as IEEE 754 says, [`Simd::fma`] once, and integer sums are exact; kernels give each lane a
/// chain of its own. So all implementations give the same bits.
pub(crate) trait Simd: Copy {
    /// Lanes of a vector: 8, or 16 where there are registers enough for tiles of more rows.
    const LANES: usize;
    /// `LANES` lanes of f32.
    type V: Copy;
    /// `LANES` lanes of i32.
    type I: Copy;

    /// Asks for the cache line at `p`, which need not be there, to be brought to the second-level cache: a core has many lines on their
    /// way there, and few to its first.
    fn prefetch<T>(self, p: *const T);
    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `LANES` values can be read at `p`.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// The lower and the upper halves of pairs of bfloat16.
    ///
    /// # Safety
    /// `LANES` pairs can be read at `p`.
    unsafe fn load_bf16_pairs(self, p: *const u32) -> [Self::V; 2];
    /// # Safety
    /// `LANES` half-precision values can be read at `p`.
    unsafe fn load_f16(self, p: *const u16) -> Self::V;
    /// # Safety
    /// `LANES` values can be written at `p`.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Lanes from -127 to 127, rounded to the nearest integer, ties to even.
    ///
    /// # Safety
    /// `LANES` values can be written at `p`.
    unsafe fn store_i8(self, p: *mut i8, v: Self::V);
    /// The sum of 16 integers.
    ///
    /// # Safety
    /// 16 values can be read at `p`.
    unsafe fn sum_i8(self, p: *const i8) -> i32;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// The greater of each lane; `b` where one is not a number.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The lesser of each lane; `b` where one is not a number.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// Two to the power of integral lanes from -126 to 127.
    fn exp2_integral(self, a: Self::V) -> Self::V;

    /// For each of `R` rows and `P` vectors of outputs: the products of 32 four-bit codes (0 to 15) with the row's 32 values, and
    /// the row's `start` where there is one.
    ///
    /// `codes` are four lines, 64 bytes apart. Line `l` holds, for each output in turn, its codes of the inputs
    /// `4l..4l + 4` in the low halves of four bytes and those of `16 + 4l..16 + 4l + 4` in the high halves.
    /// Rows are 32 values apart in `x`.
    ///
    /// # Safety
    /// `4 * LANES` bytes can be read at each line, `32 * R` at `x`, `R` numbers at `start`; values are from -127 to 127.
    unsafe fn dot_u4<const R: usize, const P: usize>(
        self,
        codes: [*const u8; P],
        x: *const i8,
        start: Option<*const i32>,
    ) -> [[Self::I; P]; R];
    /// For each of `R` rows and `P` vectors of outputs: the products of `4 * LINES` codes, each less 128, with as many values of the
    /// row, whose sum times -128 is in `by_128`.
    ///
    /// Lines are 64 bytes apart. Line `l` holds, for each output in turn, its codes of the inputs `4l..4l + 4`.
    /// Rows are 32 values apart in `x`.
    ///
    /// # Safety
    /// `4 * LANES` bytes can be read at each line, `4 * LINES` at each row of `x`, `R` numbers at `by_128`; values are from -127 to 127.
    unsafe fn dot_i8<const R: usize, const P: usize, const LINES: usize>(
        self,
        codes: [*const u8; P],
        x: *const i8,
        by_128: *const i32,
    ) -> [[Self::I; P]; R];
    /// For each of `R` rows and `P` vectors of outputs: the products of `4 * LINES` signed codes with as many values of the row.
    ///
    /// Lines and rows lie as for [`Simd::dot_i8`].
    ///
    /// # Safety
    /// As there, but that values are from 0 to 127.
    unsafe fn dot_weights<const R: usize, const P: usize, const LINES: usize>(
        self,
        codes: [*const i8; P],
        x: *const i8,
    ) -> [[Self::I; P]; R];
    /// As f32 (exact below 2^24).
    fn to_f32(self, a: Self::I) -> Self::V;
    /// The greatest lane; any number where a lane is none.
    fn greatest(self, a: Self::V) -> f32;
}

/// Bytes from one line of codes to the next: four for each of a panel's 16 outputs.
pub(crate) const LINE: usize = 64;

/// Runs a generic kernel on the best vectors that this CPU has and that are [`allowed`].
macro_rules! dispatch {
    ($kernel:ident($($arg:expr),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(simd) = $crate::avx512::Avx512::detect()
                && $crate::simd::allowed("avx512")
            {
                simd.run(#[inline(always)] || $kernel(simd, $($arg),*))
            } else if let Some(simd) = $crate::avx2::Avx2::detect()
                && $crate::simd::allowed("avx2")
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn with_avx2<R>(run: impl FnOnce() -> R) -> R {
                    run()
                }
                // SAFETY: `detect` saw the features that `with_avx2` is compiled for.
                unsafe { with_avx2(#[inline(always)] || $kernel(simd, $($arg),*)) }
            } else {
                $kernel($crate::simd::Scalar, $($arg),*)
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            if let Some(simd) = $crate::neon::Neon::<true>::detect()
                && $crate::simd::allowed("dotprod")
            {
                $kernel(simd, $($arg),*)
            } else if $crate::simd::allowed("neon") {
                $kernel($crate::neon::Neon::<false>::new(), $($arg),*)
            } else {
                $kernel($crate::simd::Scalar, $($arg),*)
            }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            $kernel($crate::simd::Scalar, $($arg),*)
        }
    }};
}
pub(crate) use dispatch;

/// Vector units of CPUs, the plainest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Vectors {
    /// None: eight numbers one after the other.
    Scalar,
    /// AVX2 with FMA, or NEON.
    Eight,
    /// AVX-512 with VNNI as well.
    Sixteen,
    /// And what multiplies bfloat16: AVX-512 BF16, AMX.
    All,
}

static WIDEST: AtomicU8 = AtomicU8::new(Vectors::All as u8);

/// Keeps all kernels of this process to these vectors and plainer ones, to measure what a CPU that has no others would take. To be
/// said before anything is computed: rows that are rounded for one unit are not for another.
pub fn use_at_most(widest: Vectors) {
    WIDEST.store(widest as u8, Ordering::Relaxed);
}

/// Whether kernels may run on these vectors: on all up to the widest, but for tests that choose one of them.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn allowed(unit: &str) -> bool {
    let needed = match unit {
        "avx2" | "neon" | "dotprod" => Vectors::Eight,
        "avx512" => Vectors::Sixteen,
        _ => Vectors::All,
    };
    WIDEST.load(Ordering::Relaxed) >= needed as u8
}
#[cfg(test)]
pub(crate) use crate::lanes::allowed;

/// Whether a unit that is there is used: where it is fast, but for tests that choose it.
#[cfg(all(target_arch = "x86_64", not(test)))]
#[inline(always)]
pub(crate) fn preferred(unit: &str, fast: bool) -> bool {
    fast && allowed(unit)
}
#[cfg(all(target_arch = "x86_64", test))]
pub(crate) use crate::lanes::preferred;

/// Eight lanes in an array: the reference, and what runs where nothing faster does.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn lanes(f: impl FnMut(usize) -> f32) -> [f32; 8] {
    std::array::from_fn(f)
}

impl Simd for Scalar {
    const LANES: usize = 8;
    type V = [f32; 8];
    type I = [i32; 8];

    #[inline(always)]
    fn prefetch<T>(self, _: *const T) {}
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 8] {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> [f32; 8] {
        // SAFETY: the caller says that eight values are there; an array needs no more alignment than its elements.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u32) -> [[f32; 8]; 2] {
        // SAFETY: as above.
        let pairs = unsafe { p.cast::<[u32; 8]>().read_unaligned() };
        [lanes(|i| f32::from_bits(pairs[i] << 16)), lanes(|i| f32::from_bits(pairs[i] & 0xffff_0000))]
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> [f32; 8] {
        // SAFETY: as above.
        let raw = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        lanes(|i| half::f16::from_bits(raw[i]).to_f32())
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: [f32; 8]) {
        // SAFETY: the caller says that there is room for eight values.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: [f32; 8]) {
        // SAFETY: as above.
        unsafe { p.cast::<[i8; 8]>().write_unaligned(v.map(|x| x.round_ties_even() as i8)) }
    }
    #[inline(always)]
    unsafe fn sum_i8(self, p: *const i8) -> i32 {
        // SAFETY: as above.
        unsafe { p.cast::<[i8; 16]>().read_unaligned() }.iter().map(|x| i32::from(*x)).sum()
    }
    #[inline(always)]
    fn fma(self, a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        lanes(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn add(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn round(self, a: [f32; 8]) -> [f32; 8] {
        lanes(|i| a[i].round_ties_even())
    }
    #[inline(always)]
    fn exp2_integral(self, a: [f32; 8]) -> [f32; 8] {
        lanes(|i| f32::from_bits(((a[i] as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn dot_u4<const R: usize, const P: usize>(
        self,
        codes: [*const u8; P],
        x: *const i8,
        start: Option<*const i32>,
    ) -> [[[i32; 8]; P]; R] {
        let product = |codes: *const u8, row: usize, output: usize, i: usize| {
            // SAFETY: the caller says that these can be read.
            let (code, first, second) =
                unsafe { (*codes.add(i / 4 * LINE + output * 4 + i % 4), *x.add(row * 32 + i), *x.add(row * 32 + 16 + i)) };
            i32::from(code & 15) * i32::from(first) + i32::from(code >> 4) * i32::from(second)
        };
        std::array::from_fn(|r| {
            // SAFETY: as above.
            let start = start.map_or(0, |start| unsafe { *start.add(r) });
            codes.map(|codes| std::array::from_fn(|output| start + (0..16).map(|i| product(codes, r, output, i)).sum::<i32>()))
        })
    }
    #[inline(always)]
    unsafe fn dot_i8<const R: usize, const P: usize, const LINES: usize>(
        self,
        codes: [*const u8; P],
        x: *const i8,
        _: *const i32,
    ) -> [[[i32; 8]; P]; R] {
        let product = |codes: *const u8, row: usize, output: usize, i: usize| {
            // SAFETY: the caller says that these can be read.
            unsafe { (i32::from(*codes.add(i / 4 * LINE + output * 4 + i % 4)) - 128) * i32::from(*x.add(row * 32 + i)) }
        };
        std::array::from_fn(|r| {
            codes.map(|codes| std::array::from_fn(|output| (0..4 * LINES).map(|i| product(codes, r, output, i)).sum::<i32>()))
        })
    }
    #[inline(always)]
    unsafe fn dot_weights<const R: usize, const P: usize, const LINES: usize>(
        self,
        codes: [*const i8; P],
        x: *const i8,
    ) -> [[[i32; 8]; P]; R] {
        let product = |codes: *const i8, row: usize, output: usize, i: usize| {
            // SAFETY: the caller says that these can be read.
            unsafe { i32::from(*codes.add(i / 4 * LINE + output * 4 + i % 4)) * i32::from(*x.add(row * 32 + i)) }
        };
        std::array::from_fn(|r| {
            codes.map(|codes| std::array::from_fn(|output| (0..4 * LINES).map(|i| product(codes, r, output, i)).sum::<i32>()))
        })
    }
    #[inline(always)]
    fn to_f32(self, a: [i32; 8]) -> [f32; 8] {
        a.map(|a| a as f32)
    }
    #[inline(always)]
    fn greatest(self, a: [f32; 8]) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
