#!/usr/bin/env python3
"""How well `overfill plan` foretells: a prefill and a decode node, each with a core of its own, are measured and then planned with.

    scripts/bench/plan.py [--bin FOLDER] [--pair FOLDER] [--rates 1,2,3] [--requests 150]

`overfill bench engine` measures what reading and a step cost on one thread; for each rate `overfill plan --nodes 1,1` says what is to
be expected, and `overfill bench serve` what came. Prints both and their ratio. The router and the load tester share the cores with the
nodes, which the plan knows nothing of.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile
import time
import urllib.request

BASE = 17700
PROMPT, ANSWER = 256, 64
FIGURES = {"ttft_mean": "mean_ttft_ms", "ttft_p99": "p99_ttft_ms", "tpot_mean": "mean_tpot_ms", "tpot_p99": "p99_tpot_ms"}


def lines(options, *arguments):
    """What `overfill bench engine` measures on one thread, the other core being as busy as it is in the cluster: not at all."""
    command = [options.bin / "overfill", "bench", "engine", "--threads", "1", "--json", "--runs", "3", *arguments]
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def start(options, folder):
    """A router and two nodes, on a core each."""
    prefill, decode = (f"127.0.0.1:{BASE + n}" for n in (1, 2))
    node = ["--pair", options.pair, "--kv-memory", "2G", "--threads", "1"]
    commands = [
        ["decode-node", *node, "--listen", decode, "--decode-nodes", decode, "--cpus", "1"],
        ["prefill-node", *node, "--listen", prefill, "--decode-nodes", decode, "--cpus", "0"],
        ["router", "--pair", options.pair, "--http", f"127.0.0.1:{BASE}", "--grpc", f"127.0.0.1:{BASE + 3}", "--prefill-nodes", prefill, "--decode-nodes", decode],
    ]
    environment = {**os.environ, "OVERFILL_LOG": "warn"}
    logs = open(folder / "log", "w")
    processes = [subprocess.Popen([str(options.bin / c[0]), *map(str, c[1:])], env=environment, stderr=logs) for c in commands]
    until = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{BASE}/ready", timeout=2).read()
            return processes
        except OSError:
            if time.monotonic() > until or any(p.poll() is not None for p in processes):
                raise SystemExit((folder / "log").read_text())
            time.sleep(0.2)


def measured(options, folder, rate, seed):
    """Prompts of another seed are others: none is in a cache."""
    result = folder / f"{rate}.json"
    command = [options.bin / "overfill", "bench", "serve", "--base-url", f"http://127.0.0.1:{BASE}", "--request-rate", rate, "--seed", seed, "--dataset-name", "random"]
    command += ["--num-prompts", options.requests, "--input-len", PROMPT, "--output-len", ANSWER, "--save-result", "--result-dir", folder]
    command += ["--result-filename", result.name]
    subprocess.run([str(c) for c in command], check=True, capture_output=True)
    return json.loads(result.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path("target/release"))
    parser.add_argument("--pair", type=pathlib.Path)
    parser.add_argument("--rates", default="1,2,3,4")
    parser.add_argument("--requests", type=int, default=150)
    options = parser.parse_args()
    options.bin = options.bin.resolve()
    if options.pair is None:
        options.pair = pathlib.Path(subprocess.run([options.bin / "overfill", "fetch"], check=True, capture_output=True, text=True).stdout.strip())
    manifest = json.loads((options.pair / "pair.json").read_text())
    full, decode = (options.pair / manifest[half]["path"] for half in ("full", "decode"))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        read = "".join(
            lines(options, "--model", full, "--weights", manifest["full"]["weights"], "--phases", "prefill", "--prompt-tokens", n) for n in ("256", "2048")
        )
        write = lines(options, "--model", decode, "--weights", manifest["decode"]["weights"], "--phases", "decode", "--batch", "1,4,16", "--context", "64,512")
        (folder / "read.jsonl").write_text(read)
        (folder / "write.jsonl").write_text(write)
        processes = start(options, folder)
        try:
            measured(options, folder, "2", "99")  # warms up
            print(f"{'rate':>5}  {'figure':10} {'planned':>16} {'measured':>9} {'ratio':>6}")
            for number, rate in enumerate(options.rates.split(",")):
                command = [options.bin / "overfill", "plan", "--prefill-costs", folder / "read.jsonl", "--decode-costs", folder / "write.jsonl", "--json"]
                command += ["--request-rate", rate, "--prompt-tokens", PROMPT, "--answer-tokens", ANSWER, "--nodes", "1,1"]
                planned = json.loads(subprocess.run([str(c) for c in command], check=True, capture_output=True).stdout)
                came = measured(options, folder, rate, str(100 + number))
                for figure, of_result in FIGURES.items():
                    expected = planned["expected"][figure]
                    print(f"{rate:>5}  {figure:10} {expected['mean']:8.1f} ± {expected['interval']:5.1f} {came[of_result]:9.1f} {came[of_result] / expected['mean']:6.2f}")
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()


if __name__ == "__main__":
    main()
