//! CUDA's libraries, loaded when a GPU is asked for, so that one binary runs with and without them.
//!
//! candle has its functions linked, and a binary that is linked so does not start where one library is missing. Here are functions of
//! the same names: the first call of each finds it in its library, and all calls jump there. The linker finds these first, and the
//! binary asks for no library. What is not there fails with an error of CUDA's; [`load`] tells which library that is before anybody
//! calls.
//!
//! Where candle comes to call one more function, the linker names it: it belongs in `symbols.rs`.

#[cfg(target_arch = "x86_64")]
mod forward;
mod library;
#[cfg(target_arch = "x86_64")]
mod symbols;

pub use library::Missing;

/// Loads all libraries.
///
/// # Errors
/// [`Missing`], which names the first that cannot be loaded.
pub fn load() -> Result<(), Missing> {
    library::ALL.iter().try_for_each(|library| library.open().map(|_| ()))
}
