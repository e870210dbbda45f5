"""Engines without a server: tokens per second that are read and written, on the same GGUF files.

Each engine is a function that gives rows of `phase, batch, threads, rate`, one run of each; the rounds are made here. Where it can be kept
to AVX2, on a CPU that has more, it is measured so as well.
"""

import itertools
import json
import pathlib
import subprocess

import models
from kept import Kept

PROMPT, ANSWER, CONTEXT = 512, 64, 64
BATCHES = (1, 8, 32)
HERE = pathlib.Path(__file__).parent


def out_of(*command):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def lines(text):
    """The lines that are JSON objects."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def commas(numbers):
    return ",".join(str(n) for n in numbers)


def batches(options, threads):
    """Those that are measured on so many threads: large ones on all."""
    return BATCHES if threads == max(options.threads) else BATCHES[:1]


def overfill(options, _, file, vectors):
    for threads in options.threads:
        told = out_of(
            *(options.bin / "overfill", "bench", "engine", "--model", file, "--threads", threads, "--batch", commas(batches(options, threads))),
            *("--prompt-tokens", PROMPT, "--new-tokens", ANSWER, "--context", CONTEXT, "--runs", 1, "--json", "--vectors", vectors),
        )
        for row in lines(told):
            yield {"phase": row["phase"], "batch": row["batch"], "threads": row["threads"], "rate": row["tokens_per_second"]["median"]}


def llama_cpp(options, folder, file, vectors):
    tools = folder / ("build" if vectors == "all" else f"build-{vectors}") / "bin"
    told = out_of(tools / "llama-bench", "-m", file, "-t", commas(options.threads), "-p", PROMPT, "-n", 0, "-r", 1, "-o", "json")
    for row in json.loads(told):
        yield {"phase": "prefill", "batch": 1, "threads": row["n_threads"], "rate": row["samples_ts"][0]}
    for threads in options.threads:
        told = out_of(
            *(tools / "llama-batched-bench", "-m", file, "-t", threads, "-npp", CONTEXT, "-ntg", ANSWER, "-npl", commas(batches(options, threads))),
            *("-c", max(BATCHES) * (CONTEXT + ANSWER), "--output-format", "jsonl"),
        )
        for row in lines(told):
            yield {"phase": "decode", "batch": row["pl"], "threads": threads, "rate": row["speed_tg"]}


def worker(name, folder, *arguments):
    return lines(out_of(folder / "venv" / "bin" / "python", HERE / name, *arguments, PROMPT, ANSWER, CONTEXT))


def ik_llama_cpp(options, folder, file, _):
    for threads in options.threads:
        yield from ({**row, "batch": 1, "threads": threads} for row in worker("worker_ik_llama_cpp.py", folder, file, threads))


def openvino(options, folder, file, _):
    for threads in options.threads:
        yield from ({**row, "batch": 1, "threads": threads} for row in worker("worker_openvino.py", folder, file, threads))


ENGINES = {
    "overfill": (overfill, ["all", "avx2"]),
    "llama.cpp": (llama_cpp, ["all", "avx2"]),
    "ik_llama.cpp": (ik_llama_cpp, ["all"]),
    "openvino": (openvino, ["all"]),
}
"""Each with the vector units that it is kept to: all is as it is."""


def measure(options, peers):
    files = {layers: models.gguf(options, layers) for layers in models.FORMATS}
    kept = Kept(options.work / "engines.jsonl")
    for number, (layers, file) in itertools.product(range(options.rounds), files.items()):
        for vectors, (engine, (run, units)) in itertools.product(("all", "avx2"), ENGINES.items()):
            if vectors in units and (engine == "overfill" or engine in peers):
                name = {"round": number, "engine": engine, "file": layers, "vectors": vectors}
                kept.measure(name, lambda: run(options, peers.get(engine), file, vectors))
    return kept.rows
