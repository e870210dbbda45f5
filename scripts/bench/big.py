#!/usr/bin/env python3
"""A pair of real size on a small machine: a full model of Llama 3.2 3B's shape, and a decode model of a third of its weights.

    scripts/bench/big.py WORK [--bin FOLDER] [--tokenizer-of PAIR] [--prompts 3] [--decode hf|gguf]

Makes both models in WORK (`random_model`; 11 GB; what is there is taken); with `--decode gguf` the decode model is exported to Q4_0. Then
a router and two nodes are started, a process each, and it tells how long each node took to load its model, from the disk and from the
system's page cache, against reading the same bytes; what memory each holds; and for prompts of 2,000 tokens the time to the first token,
the rate after it, the bytes handed over for a token, and how much of that was hidden.
Needs numpy, and root where the page cache is to be emptied (else only the warm figures are told).
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile
import time
import urllib.request

import random_model

BASE = 17900


def run(*command):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def make(options):
    """The pair's folder."""
    full, decode = options.work / "full", options.work / "decode"
    random_model.make("3b", full, options.tokenizer_of)
    random_model.make("decode", decode, options.tokenizer_of)
    if options.decode == "gguf":
        file = options.work / "decode.gguf"
        if not file.exists():
            run(options.bin / "overfill", "export", "--model", decode, "--format", "gguf", "--quantise", "q4_0", "--out", file)
        decode = file
    pair = options.work / f"pair-{options.decode}"
    if not (pair / "pair.json").exists():
        run(options.bin / "overfill", "pair", "--full", full, "--decode", decode, "--full-weights", "native", "--kv", "identity", "--name", "big", "--out", pair)
    return pair


def files(model):
    return sorted(path.resolve() for path in ([model] if model.is_file() else model.iterdir()) if path.suffix in (".safetensors", ".gguf"))


def empty_cache():
    """The system's page cache; whether it could be."""
    try:
        os.sync()
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    except OSError:
        return False


def reading(model):
    """Seconds for its bytes."""
    begun, buffer = time.monotonic(), bytearray(8 << 20)
    for file in files(model):
        with open(file, "rb", buffering=0) as of:
            while of.readinto(buffer):
                pass
    return time.monotonic() - begun


def node(options, role, pair, folder):
    """A node's process, and the seconds until it was ready."""
    at = {"prefill": 1, "decode": 2}[role]
    decode = f"127.0.0.1:{BASE + 2}"
    command = [options.bin / f"{role}-node", "--pair", pair, "--listen", f"127.0.0.1:{BASE + at}", "--admin", f"127.0.0.1:{BASE + 10 + at}"]
    command += ["--decode-nodes", decode, "--kv-memory", "1G"]
    begun = time.monotonic()
    with open(folder / f"{role}.log", "w") as log:
        process = subprocess.Popen([str(word) for word in command], stderr=log, env={**os.environ, "OVERFILL_LOG": "warn"})
    await_ready(BASE + 10 + at, process, folder / f"{role}.log")
    return process, time.monotonic() - begun


def await_ready(port, process, log):
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2).read()
            return
        except OSError:
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.02)


def memory(process):
    """MB: its own, and pages of files that it maps."""
    rows = dict(line.split(":", 1) for line in open(f"/proc/{process.pid}/smaps_rollup").read().splitlines()[1:])
    kilobytes = {key: int(value.split()[0]) for key, value in rows.items()}
    return kilobytes["Anonymous"] / 1e3, (kilobytes["Rss"] - kilobytes["Anonymous"]) / 1e3


def end(process):
    process.terminate()
    process.wait(60)


def loading(options, pair, folder):
    """What each node needed to be ready."""
    print("| node | bytes, MB | read cold, s | ready cold, s | ratio | read warm, s | ready warm, s | ratio | own memory, MB | mapped, MB |\n|---|---|---|---|---|---|---|---|---|---|")
    for role, model in (("prefill", "full"), ("decode", "decode")):
        model = next(path for path in (pair / model, pair / f"{model}.gguf") if path.exists())
        row = [role, f"{sum(file.stat().st_size for file in files(model)) / 1e6:,.0f}"]
        for cold in (True, False):
            if cold and not empty_cache():
                row += ["", "", ""]
                continue
            read = reading(model)
            if cold:
                empty_cache()
            process, ready = node(options, role, pair, folder)
            held = memory(process)
            end(process)
            row += [f"{read:.1f}", f"{ready:.1f}", f"{ready / read:.2f}"]
        print("| " + " | ".join([*row, *(f"{part:,.0f}" for part in held)]) + " |", flush=True)


def serving(options, pair, folder):
    """Prompts of 2,000 tokens, one after the other."""
    processes = [node(options, role, pair, folder)[0] for role in ("prefill", "decode")]
    at = [f"127.0.0.1:{BASE + n}" for n in (1, 2)]
    command = [options.bin / "router", "--pair", pair, "--http", f"127.0.0.1:{BASE}", "--grpc", f"127.0.0.1:{BASE + 3}", "--prefill-nodes", at[0], "--decode-nodes", at[1]]
    with open(folder / "router.log", "w") as log:
        processes.append(subprocess.Popen([str(word) for word in command], stderr=log, env={**os.environ, "OVERFILL_LOG": "warn"}))
    await_ready(BASE, processes[-1], folder / "router.log")
    load = [options.bin / "overfill", "bench", "serve", "--base-url", f"http://127.0.0.1:{BASE}", "--dataset-name", "random", "--random-input-len", 2000]
    load += ["--random-output-len", 64, "--num-prompts", options.prompts, "--max-concurrency", 1, "--vocab-size", 49000, "--request-timeout", 900]
    run(*load, "--save-result", "--result-dir", folder, "--result-filename", "load.json")
    told = json.loads((folder / "load.json").read_text())
    with urllib.request.urlopen(f"http://127.0.0.1:{BASE}/cluster") as answer:
        handoffs = json.load(answer)["handoffs"]
    print(f"\nprompts of 2,000 tokens, one at a time, {told['completed']} of {options.prompts} answered:")
    print(f"  time to the first token {told['mean_ttft_ms'] / 1e3:.1f} s ({2000e3 / told['mean_ttft_ms']:.1f} tokens/s read), then {1e3 / told['mean_tpot_ms']:.1f} tokens/s")
    for handoff in handoffs:
        sent = handoff["prompt_tokens"] - handoff["held_tokens"]
        print(f"  handed over: {handoff['bytes'] / sent:,.0f} bytes a token; {handoff['tail'] * 1e3:.1f} ms of {handoff['transfer']:.1f} s after the last layer")
    for role, process in zip(("prefill", "decode", "router"), processes):
        print(f"  {role}: {memory(process)[0]:,.0f} MB of its own, {memory(process)[1]:,.0f} MB mapped")
    for process in reversed(processes):
        end(process)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path("target/release"))
    parser.add_argument("--tokenizer-of", type=pathlib.Path, default=random_model.TOKENIZER)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--decode", choices=["hf", "gguf"], default="hf")
    options = parser.parse_args()
    pair = make(options)
    with tempfile.TemporaryDirectory() as folder:
        loading(options, pair, pathlib.Path(folder))
        serving(options, pair, pathlib.Path(folder))


if __name__ == "__main__":
    main()
