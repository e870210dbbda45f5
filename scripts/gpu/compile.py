#!/usr/bin/env python3
"""Compile the CUDA source of the model for real GPUs, on a machine without one.

    scripts/gpu/compile.py [sm_80 sm_90 …]

Needs NVIDIA's compiler at run time (`pip install nvidia-cuda-nvrtc`, 100 MB; nothing else of CUDA). Prints for each GPU and program
which kernels came out and how large they are, and exits with 1 where one does not compile.
"""

import ctypes
import importlib.util
import pathlib
import sys

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "crates/model/src/gpu/kernels"
# Files of a program, after dialect.cu; what it is compiled with; and the kernels that are in it.
PROGRAMS = [
    (files, defines, kernels)
    for files, formats, kernels in [
        (("stored.cu", "attention.cu"), ("-DCACHE_F16", "-DCACHE_F32"), ("append", "attention", "join_segments")),
        (("stored.cu", "wire.cu"), ("-DCACHE_F16", "-DCACHE_F32"), ("pack", "unpack")),
        (("choose.cu",), ("",), ("choose",)),
    ]
    for defines in ([define] if define else [] for define in formats)
]


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
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None):
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
    dialect = (KERNELS / "dialect.cu").read_bytes()
    for gpu in sys.argv[1:] or ("sm_80", "sm_90"):
        for files, defines, kernels in PROGRAMS:
            source = dialect + b"".join((KERNELS / file).read_bytes() for file in files)
            binary = compiled(nvrtc, source, [f"--gpu-architecture={gpu}", *defines, "--fmad=true"])
            missing = [kernel for kernel in kernels if f".text.{kernel}".encode() not in binary]
            if missing:
                sys.exit(f"{gpu} {files[-1]} {' '.join(defines)}: no kernel {', '.join(missing)}")
            print(f"{gpu} {files[-1]} {' '.join(defines)}: {', '.join(kernels)}, {len(binary):,} bytes")


main()
