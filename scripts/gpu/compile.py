#!/usr/bin/env python3
"""Compile the CUDA source of the model for real GPUs, on a machine without one.

    scripts/gpu/compile.py [sm_80 sm_90 …]

Needs NVIDIA's compiler at run time (`pip install nvidia-cuda-nvrtc`, 100 MB; nothing else of CUDA). Prints for each GPU and format of
the cache which kernels came out and how large they are, and exits with 1 where one does not compile.
"""

import ctypes
import importlib.util
import pathlib
import sys

SOURCE = pathlib.Path(__file__).resolve().parents[2] / "crates/model/src/gpu/kernels/attention.cu"
KERNELS = ("append", "attention", "join_segments")


def library():
    """NVRTC, of the package, or of the machine."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for file in sorted(pathlib.Path(folder).glob("**/libnvrtc.so.*")):
            return ctypes.CDLL(str(file))
    try:
        return ctypes.CDLL("libnvrtc.so")
    except OSError:
        sys.exit("there is no NVRTC here: pip install nvidia-cuda-nvrtc")


def compiled(nvrtc, source, options):
    """The program for one GPU; what the compiler says where there is none."""
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"attention.cu", 0, None, None):
        sys.exit("NVRTC takes no program")
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
    what = "ProgramLog" if failed else "CUBIN"
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        sys.exit(f"{' '.join(options)}:\n{text.value.decode()}")
    return text.raw


def main():
    if any(argument.startswith("-") for argument in sys.argv[1:]):
        sys.exit(__doc__)
    nvrtc = library()
    for gpu in sys.argv[1:] or ("sm_80", "sm_90"):
        for cache in ("CACHE_F16", "CACHE_F32"):
            binary = compiled(nvrtc, SOURCE.read_bytes(), [f"--gpu-architecture={gpu}", f"-D{cache}", "--fmad=true"])
            missing = [kernel for kernel in KERNELS if f".text.{kernel}".encode() not in binary]
            if missing:
                sys.exit(f"{gpu} {cache}: no kernel {', '.join(missing)}")
            print(f"{gpu} {cache}: {', '.join(KERNELS)}, {len(binary):,} bytes")


main()
