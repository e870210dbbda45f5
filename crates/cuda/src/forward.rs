//! How a call gets to its library.
//!
//! Each function is a jump to the address in its slot. At first that is code which saves all registers that arguments may be in, asks
//! [`find`] for the function's address, and jumps there; `find` puts the address into the slot. So it does not matter what arguments a
//! function has. Nothing is looked up before it is called, and what runs before `main` (kernels that register themselves) may call.

use std::arch::global_asm;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::library::Library;
use crate::symbols::symbols;

macro_rules! forward {
    ($($library:ident { $($name:ident)* })*) => {
        /// In the order of the slots.
        static SYMBOLS: &[(Library, &str)] = &[$($((Library::$library, stringify!($name)),)*)*];

        global_asm!(
            ".section .text.overfill_cuda, \"ax\", @progbits",
            $($(concat!(
                ".globl ", stringify!($name), "\n",
                ".type ", stringify!($name), ", @function\n",
                stringify!($name), ":\n",
                "jmp *.Lslot_", stringify!($name), "(%rip)\n",
                ".size ", stringify!($name), ", . - ", stringify!($name), "\n",
                ".Lfirst_", stringify!($name), ":\n",
                "leaq .Lslot_", stringify!($name), "(%rip), %r11\n",
                "jmp .Loverfill_cuda_first\n",
            ),)*)*
            // rsp is a multiple of 16 less 8 here, and of 16 after as many registers as are saved.
            ".Loverfill_cuda_first:",
            "pushq %rbp",
            "movq %rsp, %rbp",
            "pushq %rax",
            "pushq %rdi",
            "pushq %rsi",
            "pushq %rdx",
            "pushq %rcx",
            "pushq %r8",
            "pushq %r9",
            "pushq %r10",
            "subq $128, %rsp",
            "movups %xmm0, (%rsp)",
            "movups %xmm1, 16(%rsp)",
            "movups %xmm2, 32(%rsp)",
            "movups %xmm3, 48(%rsp)",
            "movups %xmm4, 64(%rsp)",
            "movups %xmm5, 80(%rsp)",
            "movups %xmm6, 96(%rsp)",
            "movups %xmm7, 112(%rsp)",
            "movq %r11, %rdi",
            "call {find}",
            "movq %rax, %r11",
            "movups (%rsp), %xmm0",
            "movups 16(%rsp), %xmm1",
            "movups 32(%rsp), %xmm2",
            "movups 48(%rsp), %xmm3",
            "movups 64(%rsp), %xmm4",
            "movups 80(%rsp), %xmm5",
            "movups 96(%rsp), %xmm6",
            "movups 112(%rsp), %xmm7",
            "addq $128, %rsp",
            "popq %r10",
            "popq %r9",
            "popq %r8",
            "popq %rcx",
            "popq %rdx",
            "popq %rsi",
            "popq %rdi",
            "popq %rax",
            "popq %rbp",
            "jmp *%r11",
            ".section .data.rel.overfill_cuda, \"aw\", @progbits",
            ".balign 8",
            ".globl overfill_cuda_slots",
            ".hidden overfill_cuda_slots",
            "overfill_cuda_slots:",
            $($(concat!(".Lslot_", stringify!($name), ": .quad .Lfirst_", stringify!($name)),)*)*
            ".text",
            find = sym find,
            options(att_syntax),
        );
    };
}

symbols!(forward);

unsafe extern "C" {
    /// The first of as many slots as there are symbols.
    static overfill_cuda_slots: AtomicPtr<c_void>;
}

/// The address of the function whose slot this is. Called by the code above alone.
extern "C" fn find(slot: &AtomicPtr<c_void>) -> *const c_void {
    let first = &raw const overfill_cuda_slots;
    let number = (std::ptr::from_ref(slot).addr() - first.addr()) / size_of::<AtomicPtr<c_void>>();
    let (library, name) = SYMBOLS[number];
    // SAFETY: whatever it is, nothing is done with it but to jump there, as the linked function would.
    let found = library.open().ok().and_then(|library| unsafe { library.get::<*mut c_void>(name) }.ok().map(|found| *found));
    let found = found.unwrap_or(missing as *mut c_void);
    slot.store(found, Ordering::Relaxed);
    found
}

/// In the place of a function that is not there: `CUDA_ERROR_UNKNOWN`, whoever asks.
extern "C" fn missing() -> c_int {
    999
}
