"""Engines without a server: tokens per second that are read and written, on the same GGUF files.

Each engine is a function that gives rows of `engine, file, phase, batch, threads, rate`, one run of each; the rounds are made here.
"""

import itertools
import json
import pathlib
import subprocess

import models

PROMPT, ANSWER, CONTEXT = 512, 96, 64
BATCHES = (1, 8, 32)
HERE = pathlib.Path(__file__).parent


def out_of(*command):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def lines(text):
    """The lines that are JSON objects."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def commas(numbers):
    return ",".join(str(n) for n in numbers)


def overfill(options, _, file):
    told = out_of(
        *(options.bin / "overfill", "bench", "engine", "--model", file, "--threads", commas(options.threads), "--batch", commas(BATCHES)),
        *("--prompt-tokens", PROMPT, "--new-tokens", ANSWER, "--context", CONTEXT, "--runs", 1, "--json"),
    )
    for row in lines(told):
        yield {"phase": row["phase"], "batch": row["batch"], "threads": row["threads"], "rate": row["tokens_per_second"]["median"]}


def llama_cpp(options, folder, file):
    tools = folder / "build" / "bin"
    told = out_of(tools / "llama-bench", "-m", file, "-t", commas(options.threads), "-p", PROMPT, "-n", 0, "-r", 1, "-o", "json")
    for row in json.loads(told):
        yield {"phase": "prefill", "batch": 1, "threads": row["n_threads"], "rate": row["samples_ts"][0]}
    for threads in options.threads:
        told = out_of(
            *(tools / "llama-batched-bench", "-m", file, "-t", threads, "-npp", CONTEXT, "-ntg", ANSWER, "-npl", commas(BATCHES)),
            *("-c", max(BATCHES) * (CONTEXT + ANSWER), "--output-format", "jsonl"),
        )
        for row in lines(told):
            yield {"phase": "decode", "batch": row["pl"], "threads": threads, "rate": row["speed_tg"]}


def worker(name, folder, *arguments):
    return lines(out_of(folder / "venv" / "bin" / "python", HERE / name, *arguments, PROMPT, ANSWER, CONTEXT))


def ik_llama_cpp(options, folder, file):
    for threads in options.threads:
        yield from ({**row, "batch": 1, "threads": threads} for row in worker("worker_ik_llama_cpp.py", folder, file, threads))


def openvino(options, folder, file):
    for threads in options.threads:
        yield from ({**row, "batch": 1, "threads": threads} for row in worker("worker_openvino.py", folder, file, threads))


ENGINES = {"overfill": overfill, "llama.cpp": llama_cpp, "ik_llama.cpp": ik_llama_cpp, "openvino": openvino}


def measure(options, peers):
    files = {layers: models.gguf(options, layers) for layers in models.FORMATS}
    rows = []
    for number, (layers, file) in itertools.product(range(options.rounds), files.items()):
        for engine, run in ENGINES.items():
            if engine != "overfill" and engine not in peers:
                continue
            print(f"round {number + 1} of {options.rounds}: {engine}, {layers}", flush=True)
            rows += ({"engine": engine, "file": layers, **row} for row in run(options, peers.get(engine), file))
    return rows
