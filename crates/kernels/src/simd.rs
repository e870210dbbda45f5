//! Eight lanes of f32, on the CPU features that are there at run time.

/// Eight f32 lanes. A value of an implementing type is proof that its CPU features are there.
///
/// Every operation rounds as IEEE 754 says, [`Simd::fma`] once; so all implementations give the same bits.
pub(crate) trait Simd: Copy {
    /// Eight lanes.
    type V: Copy;

    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// Eight values can be read at `p`.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// Eight bfloat16 values can be read at `p`.
    unsafe fn load_bf16(self, p: *const u16) -> Self::V;
    /// # Safety
    /// Eight half-precision values can be read at `p`.
    unsafe fn load_f16(self, p: *const u16) -> Self::V;
    /// # Safety
    /// Eight values can be written at `p`.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// The greater of each lane; `b` where `a` is not a number.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// Two to the power of integral lanes from -126 to 127.
    fn exp2_integral(self, a: Self::V) -> Self::V;
    /// The sums of four vectors' lanes, each `((0+1)+(2+3)) + ((4+5)+(6+7))`.
    fn sums(self, v: [Self::V; 4]) -> [f32; 4];

    /// Eight i32 lanes.
    type I: Copy;

    /// For each of `R` rows: the products of 32 four-bit codes (0 to 15) of eight outputs with 32 values, summed for each output.
    ///
    /// `codes` are four lines of 32 bytes. Line `l` holds, for each output in turn, its codes of the inputs `4l..4l + 4` in
    /// the low halves of four bytes and those of `16 + 4l..16 + 4l + 4` in the high halves.
    ///
    /// # Safety
    /// 128 bytes can be read at `codes`, 32 at each of `x`.
    unsafe fn dot_u4<const R: usize>(self, codes: *const u8, x: [*const i8; R]) -> [Self::I; R];
    /// For each of `R` rows: the products of `4 * lines` signed codes (-127 to 127, or -128 beside values that are not) of eight
    /// outputs with as many values, summed for each output.
    ///
    /// Line `l` of 32 bytes holds, for each output in turn, its codes of the inputs `4l..4l + 4`.
    ///
    /// # Safety
    /// `32 * lines` bytes can be read at `codes`, `4 * lines` at each of `x`.
    unsafe fn dot_i8<const R: usize>(self, codes: *const i8, lines: usize, x: [*const i8; R]) -> [Self::I; R];
    /// `a - b` in each lane, as f32 (exact below 2^24).
    fn difference(self, a: Self::I, b: i32) -> Self::V;

    /// The sum of one vector's lanes, in the order of [`Simd::sums`].
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        self.sums([v; 4])[0]
    }
}

/// Runs a generic kernel on the best lanes that this CPU has.
macro_rules! dispatch {
    ($kernel:ident($($arg:expr),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(simd) = $crate::simd::Avx2::detect() {
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
        #[cfg(not(target_arch = "x86_64"))]
        $kernel($crate::simd::Scalar, $($arg),*)
    }};
}
pub(crate) use dispatch;

/// Eight lanes in an array: the reference, and what runs where nothing faster does.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn lanes(f: impl FnMut(usize) -> f32) -> [f32; 8] {
    std::array::from_fn(f)
}

impl Simd for Scalar {
    type V = [f32; 8];

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
    unsafe fn load_bf16(self, p: *const u16) -> [f32; 8] {
        // SAFETY: as above.
        let raw = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        lanes(|i| half::bf16::from_bits(raw[i]).to_f32())
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
    fn max(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn round(self, a: [f32; 8]) -> [f32; 8] {
        lanes(|i| a[i].round_ties_even())
    }
    #[inline(always)]
    fn exp2_integral(self, a: [f32; 8]) -> [f32; 8] {
        lanes(|i| f32::from_bits(((a[i] as i32 + 127) << 23) as u32))
    }
    type I = [i32; 8];

    #[inline(always)]
    unsafe fn dot_u4<const R: usize>(self, codes: *const u8, x: [*const i8; R]) -> [[i32; 8]; R] {
        // SAFETY: the caller says that these can be read.
        let (codes, x) = unsafe { (std::slice::from_raw_parts(codes, 128), x.map(|x| std::slice::from_raw_parts(x, 32))) };
        x.map(|x| {
            std::array::from_fn(|output| {
                let mut sum = 0;
                for line in 0..4 {
                    for i in 0..4 {
                        let code = codes[line * 32 + output * 4 + i];
                        sum += i32::from(code & 15) * i32::from(x[line * 4 + i]) + i32::from(code >> 4) * i32::from(x[16 + line * 4 + i]);
                    }
                }
                sum
            })
        })
    }
    #[inline(always)]
    unsafe fn dot_i8<const R: usize>(self, codes: *const i8, lines: usize, x: [*const i8; R]) -> [[i32; 8]; R] {
        // SAFETY: the caller says that these can be read.
        let (codes, x) = unsafe { (std::slice::from_raw_parts(codes, 32 * lines), x.map(|x| std::slice::from_raw_parts(x, 4 * lines))) };
        x.map(|x| {
            std::array::from_fn(|output| (0..4 * lines).map(|i| i32::from(codes[i / 4 * 32 + output * 4 + i % 4]) * i32::from(x[i])).sum())
        })
    }
    #[inline(always)]
    fn difference(self, a: [i32; 8], b: i32) -> [f32; 8] {
        a.map(|a| (a - b) as f32)
    }
    #[inline(always)]
    fn sums(self, v: [[f32; 8]; 4]) -> [f32; 4] {
        v.map(|x| ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::Simd;

    /// AVX2, FMA and F16C. Made by [`Avx2::detect`] alone: a value is proof that the CPU has them.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(());

    impl Avx2 {
        /// The proof, where this CPU can give it.
        #[inline]
        pub(crate) fn detect() -> Option<Self> {
            (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")).then_some(Self(()))
        }
    }

    // SAFETY of every block below: `self` proves AVX2, FMA and F16C; what a pointer must bear, the trait's contract says,
    // and all loads and stores are the unaligned ones.
    impl Simd for Avx2 {
        type V = __m256;

        #[inline(always)]
        fn splat(self, x: f32) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(self, p: *const f32) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, p: *const u16) -> __m256 {
            // SAFETY: see above; a bfloat16 is the upper half of an f32.
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
        }
        #[inline(always)]
        unsafe fn load_f16(self, p: *const u16) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32, v: __m256) {
            // SAFETY: see above.
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn add(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        fn max(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        fn round(self, a: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
        }
        #[inline(always)]
        fn exp2_integral(self, a: __m256) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127)))) }
        }
        type I = __m256i;

        #[inline(always)]
        unsafe fn dot_u4<const R: usize>(self, codes: *const u8, x: [*const i8; R]) -> [__m256i; R] {
            // SAFETY: see above. A pair of products is at most 2 x 15 x 128, eight of them fit 16 bits.
            unsafe {
                let low = _mm256_set1_epi8(15);
                let mut sums = [_mm256_setzero_si256(); R];
                for line in 0..4 {
                    let both = _mm256_loadu_si256(codes.add(line * 32).cast());
                    let (first, second) = (_mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi16::<4>(both), low));
                    for (sum, x) in sums.iter_mut().zip(x) {
                        let quad = |i: usize| _mm256_set1_epi32(x.add(i).cast::<i32>().read_unaligned());
                        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(first, quad(line * 4)));
                        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(second, quad(16 + line * 4)));
                    }
                }
                sums.map(|sum| _mm256_madd_epi16(sum, _mm256_set1_epi16(1)))
            }
        }
        #[inline(always)]
        unsafe fn dot_i8<const R: usize>(self, codes: *const i8, lines: usize, x: [*const i8; R]) -> [__m256i; R] {
            // SAFETY: see above. The magnitude of the code times the value with the code's sign: a pair of products is at
            // most 2 x 128 x 127, which fits 16 bits, and pairs are widened before they are summed.
            unsafe {
                let ones = _mm256_set1_epi16(1);
                let mut sums = [_mm256_setzero_si256(); R];
                for line in 0..lines {
                    let code = _mm256_loadu_si256(codes.add(line * 32).cast());
                    let magnitude = _mm256_abs_epi8(code);
                    for (sum, x) in sums.iter_mut().zip(x) {
                        let quad = _mm256_set1_epi32(x.add(line * 4).cast::<i32>().read_unaligned());
                        let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(quad, code));
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                    }
                }
                sums
            }
        }
        #[inline(always)]
        fn difference(self, a: __m256i, b: i32) -> __m256 {
            // SAFETY: see above.
            unsafe { _mm256_cvtepi32_ps(_mm256_sub_epi32(a, _mm256_set1_epi32(b))) }
        }
        #[inline(always)]
        fn sums(self, v: [__m256; 4]) -> [f32; 4] {
            // SAFETY: see above. Two horizontal adds leave each half's four sums, the last add joins the halves.
            unsafe {
                let halves = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
                let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
                let mut out = [0.0; 4];
                _mm_storeu_ps(out.as_mut_ptr(), sums);
                out
            }
        }
    }
}
