//! This process has none of CUDA's libraries; children of it are given stand-ins by `LD_LIBRARY_PATH`, which is read at the start.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::path::Path;
use std::process::Command;

unsafe extern "C" {
    fn cuInit(flags: u32) -> i32;
    fn cuDeviceGetCount(count: *mut i32) -> i32;
    // As the stand-in has it.
    fn cublasGemmEx(a: i64, p: f64, b: i64, q: f64, c: i64, d: i64, r: f64, e: i64, f: i64, g: i64, s: f64, h: i64) -> f64;
}

const UNKNOWN: i32 = 999;
const MAJOR: &str = env!("CUDA_MAJOR");

/// What a child that finds libraries in `folder` runs.
fn in_child(test: &str, folder: &Path) {
    let child = Command::new(std::env::current_exe().unwrap()).args(["--exact", test, "--ignored"]).env("LD_LIBRARY_PATH", folder).output();
    let child = child.unwrap();
    let told = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && told.contains("1 passed"), "{told}{}", String::from_utf8_lossy(&child.stderr));
}

/// A folder with stand-ins of these files.
fn stand_ins(files: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fakes/libraries.c");
    for file in files {
        let made = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(folder.path().join(file)).arg(&source).status().unwrap();
        assert!(made.success());
    }
    folder
}

#[test]
fn without_libraries_calls_fail_and_the_first_is_named() {
    in_child("child_without_libraries", tempfile::tempdir().unwrap().path());
}

#[test]
#[ignore = "run by the test above"]
fn child_without_libraries() {
    // SAFETY: nobody is called.
    unsafe {
        assert_eq!((cuInit(0), cuDeviceGetCount(std::ptr::null_mut()), cuInit(0)), (UNKNOWN, UNKNOWN, UNKNOWN));
    }
    let told = overfill_cuda::load().unwrap_err().to_string();
    assert!(told.starts_with("libcuda.so.1 cannot be loaded (") && told.contains("NVIDIA's driver"), "{told}");
}

#[test]
fn calls_come_to_their_library_with_all_their_arguments() {
    let blas = format!("libcublas.so.{MAJOR}");
    in_child("child_with_libraries", stand_ins(&["libcuda.so.1", &blas]).path());
}

#[test]
#[ignore = "run by the test above"]
fn child_with_libraries() {
    // SAFETY: the stand-ins take these arguments.
    unsafe {
        for _ in 0..2 {
            let sum = cublasGemmEx(1, 2.0, 3, 4.0, 5, 6, 8.0, 7, 8, 9, 16.0, 10);
            assert_eq!(sum, f64::from(1 + 6 + 15 + 24 + 35 + 48 + 63 + 80) + 1.0 + 1.0 + 1.0 + 1.0);
            assert_eq!(cuInit(41), 42);
        }
        assert_eq!(cuDeviceGetCount(std::ptr::null_mut()), UNKNOWN, "this library has no such function");
    }
    let told = overfill_cuda::load().unwrap_err().to_string();
    assert!(told.contains(&format!("libcudart.so.{MAJOR}")) && told.contains(&format!("version {MAJOR}")), "{told}");
}

#[test]
fn with_all_of_them_there_is_no_error() {
    let files = ["cudart", "cublas", "cublasLt", "nvrtc"].map(|name| format!("lib{name}.so.{MAJOR}"));
    let files: Vec<&str> = files.iter().map(String::as_str).chain(["libcuda.so.1", "libcurand.so.10"]).collect();
    in_child("child_with_all", stand_ins(&files).path());
}

#[test]
#[ignore = "run by the test above"]
fn child_with_all() {
    assert_eq!(overfill_cuda::load(), Ok(()));
}
