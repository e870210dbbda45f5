//! AMX: eight registers of 16 rows of 64 bytes, tiles, and the unit that multiplies two of them.
//!
//! The instructions are written out, since the compiler's own names for them are not stable. Linux gives a process the tiles when it
//! asks.

use std::arch::asm;
use std::marker::PhantomData;
use std::sync::OnceLock;

use crate::avx512::Avx512;
use crate::bf16::Line;

/// Rows of a tile.
pub const ROWS: usize = 16;

/// Made by [`Amx::detect`] alone: a value is proof that this process may use the unit, and AVX-512 beside it.
#[derive(Clone, Copy)]
pub struct Amx(Avx512);

/// The calling thread's tiles, for products of up to 32 rows with up to 32 outputs.
pub struct Tiles {
    /// Rows that they are shaped for; none yet: 0.
    rows: usize,
    /// Not to be sent: the registers are the thread's.
    thread: PhantomData<*const ()>,
}

/// f32 `[row tile, panel, 16, 16]`: sums of four tiles, as they are stored.
#[repr(C, align(64))]
#[derive(Default)]
pub struct Sums(pub [[[[f32; 16]; ROWS]; 2]; 2]);

impl Amx {
    /// The proof, where this CPU and its system can give it.
    pub fn detect() -> Option<Self> {
        static HERE: OnceLock<bool> = OnceLock::new();
        let avx512 = Avx512::detect()?;
        HERE.get_or_init(|| has_unit() && is_permitted()).then_some(Self(avx512))
    }

    /// The vector unit that is there too.
    pub(crate) fn avx512(self) -> Avx512 {
        self.0
    }

    /// The calling thread's tiles.
    ///
    /// # Safety
    /// The thread has no other such value while this one lives: both would shape the same registers.
    pub unsafe fn tiles(self) -> Tiles {
        Tiles { rows: 0, thread: PhantomData }
    }
}

/// Whether the CPU multiplies bfloat16 in tiles.
fn has_unit() -> bool {
    /// Bits of what CPUID says in leaf 7: AMX-BF16 and AMX-TILE (Intel's manual, volume 2A).
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    let said = std::arch::x86_64::__cpuid_count(7, 0).edx;
    said & TILE != 0 && said & BF16 != 0
}

/// Whether the system keeps the tiles for this process, whose every thread has room for them from then on.
fn is_permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        /// Of `asm/prctl.h`, and the number of the tiles' state.
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XTILEDATA: libc::c_long = 18;
        // SAFETY: the call takes two numbers, and changes nothing but what this process may use.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

impl Tiles {
    /// Gives the tiles their shape: left factors and sums of `rows` rows in all, at most 32, of which a tile takes 16.
    pub fn shape(&mut self, rows: usize) {
        /// Palette 1: bytes in a row from 16 on, two for each tile; rows from 48 on, one for each.
        #[repr(C, align(64))]
        struct Shapes([u8; 64]);
        assert!((1..=2 * ROWS).contains(&rows), "two tiles have at most 32 rows");
        if rows == self.rows {
            return;
        }
        self.rows = rows;
        let (first, second) = (rows.min(ROWS), rows.saturating_sub(ROWS));
        let mut shapes = Shapes([0; 64]);
        shapes.0[0] = 1;
        // Sums of the first 16 rows with two panels, of the others; both left factors; both panels.
        for (tile, rows) in [first, first, second, second, first, second, ROWS, ROWS].into_iter().enumerate() {
            if rows > 0 {
                shapes.0[16 + 2 * tile] = size_of::<Line>() as u8;
                shapes.0[48 + tile] = rows as u8;
            }
        }
        // SAFETY: a value of `Amx` proved the unit; the shapes are ones that there are.
        unsafe { asm!("ldtilecfg [{}]", in(reg) shapes.0.as_ptr(), options(nostack, readonly)) };
    }

    /// The products, summed in f32, of the rows that the tiles are shaped for with a panel of 16 outputs, or with two.
    ///
    /// `x` is `[steps, rows]` lines: 16 pairs of each row a step; a panel `[steps, 16]`: each pair's weights of all outputs.
    #[inline(always)]
    pub fn multiply(&self, x: &[Line], one: &[Line], two: Option<&[Line]>, to: &mut Sums) {
        let steps = one.len() / ROWS;
        assert!(
            self.rows > 0 && x.len() == steps * self.rows && two.is_none_or(|two| two.len() == one.len()),
            "steps of {} rows",
            self.rows
        );
        // SAFETY: all lines of the steps are there; where there is no second panel, none is read.
        unsafe {
            match (self.rows > ROWS, two) {
                (false, None) => self.steps::<false, false>(x.as_ptr(), one.as_ptr(), one.as_ptr(), steps, to),
                (false, Some(two)) => self.steps::<false, true>(x.as_ptr(), one.as_ptr(), two.as_ptr(), steps, to),
                (true, None) => self.steps::<true, false>(x.as_ptr(), one.as_ptr(), one.as_ptr(), steps, to),
                (true, Some(two)) => self.steps::<true, true>(x.as_ptr(), one.as_ptr(), two.as_ptr(), steps, to),
            }
        }
    }

    /// `SECOND`: more than 16 rows. `TWO`: two panels.
    ///
    /// # Safety
    /// The tiles are shaped; `steps * rows` lines can be read at `x`, `steps * 16` at each panel.
    #[inline(always)]
    unsafe fn steps<const SECOND: bool, const TWO: bool>(
        &self,
        x: *const Line,
        one: *const Line,
        two: *const Line,
        steps: usize,
        to: &mut Sums,
    ) {
        const LINE: usize = size_of::<Line>();
        // SAFETY: a value of `Amx` proved the unit; what is read is the caller's promise, `to` has room for four tiles. Nothing but this
        // function uses tiles.
        unsafe {
            asm!("tilezero tmm0", out("tmm0") _, options(nostack, nomem));
            if TWO {
                asm!("tilezero tmm1", out("tmm1") _, options(nostack, nomem));
            }
            if SECOND {
                asm!("tilezero tmm2", out("tmm2") _, options(nostack, nomem));
            }
            if SECOND && TWO {
                asm!("tilezero tmm3", out("tmm3") _, options(nostack, nomem));
            }
            for step in 0..steps {
                let x = x.add(step * self.rows);
                asm!("tileloadd tmm4, [{x} + {line}]", "tileloadd tmm6, [{w} + {line}]", "tdpbf16ps tmm0, tmm4, tmm6",
                    x = in(reg) x, w = in(reg) one.add(step * ROWS), line = in(reg) LINE,
                    out("tmm0") _, out("tmm4") _, out("tmm6") _, options(nostack, readonly));
                if TWO {
                    asm!("tileloadd tmm7, [{w} + {line}]", "tdpbf16ps tmm1, tmm4, tmm7",
                        w = in(reg) two.add(step * ROWS), line = in(reg) LINE, out("tmm1") _, out("tmm7") _, options(nostack, readonly));
                }
                if SECOND {
                    asm!("tileloadd tmm5, [{x} + {line}]", "tdpbf16ps tmm2, tmm5, tmm6",
                        x = in(reg) x.add(ROWS), line = in(reg) LINE, out("tmm2") _, out("tmm5") _, options(nostack, readonly));
                }
                if SECOND && TWO {
                    asm!("tdpbf16ps tmm3, tmm5, tmm7", out("tmm3") _, options(nostack, nomem));
                }
            }
            let [[a, b], [c, d]] = &mut to.0;
            macro_rules! store {
                ($tile:literal, $to:expr) => {
                    asm!(concat!("tilestored [{to} + {line}], ", $tile), to = in(reg) $to.as_mut_ptr(), line = in(reg) LINE, options(nostack))
                };
            }
            store!("tmm0", a);
            if TWO {
                store!("tmm1", b);
            }
            if SECOND {
                store!("tmm2", c);
            }
            if SECOND && TWO {
                store!("tmm3", d);
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: a value of `Amx` proved the unit. A thread without tiles is switched to and from faster.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}
