//! Which version of CUDA the libraries are of, and something for the linker to find where it is told to link them.

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

/// What cudarc's and candle's build scripts ask the linker for.
const LIBRARIES: [&str; 6] = ["cuda", "cudart", "cublas", "cublasLt", "curand", "nvrtc"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=PATH");
    println!("cargo:rustc-env=CUDA_MAJOR={}", major().unwrap_or_else(|| "12".into()));
    // Elsewhere the functions are linked as candle wants it.
    if env::var_os("CARGO_CFG_TARGET_ARCH").is_none_or(|architecture| architecture != "x86_64") {
        return Ok(());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    for library in LIBRARIES {
        fs::write(out.join(format!("lib{library}.a")), "!<arch>\n")?;
    }
    println!("cargo:rustc-link-search=native={}", out.display());
    Ok(())
}

/// Of CUDA's compiler, which candle's kernels are compiled with; `None` where there is none.
fn major() -> Option<String> {
    let told = Command::new("nvcc").arg("--version").output().ok()?;
    let told = String::from_utf8(told.stdout).ok()?;
    let release = told.split_once("release ")?.1;
    Some(release.split_once('.')?.0.to_owned())
}
