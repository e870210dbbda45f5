#!/usr/bin/env python3
"""What a machine with a GPU can tell of the CUDA path, in under eight minutes and without a network.

    scripts/gpu/check.py OUT [--bin target/release] [--device cuda:0] [--other cuda:1] [--shapes 135m,1b,3b,8b] [--pair DEFAULT]

The binaries are those of a build with `--features cuda`; DEFAULT is the default pair's folder (`overfill fetch`). OUT should have room for 25 GB where all shapes are asked for: their weights are
random and made there, with numpy (what is there is taken). It tells, as a table and in OUT/check.json:

- whether a cluster of two processes on that device reads and writes as one on the CPU does: log-probabilities of prompts' tokens, and
  greedy answers, of the default pair as it is, with KV caches in f16, and with all numbers in f32;
- how fast prefill and decode are in bfloat16, at each shape;
- how many bytes a second the handoffs between the two processes carry, and what of them is hidden: by TCP, and with --other, a second
  GPU, by NCCL as well (it takes no two processes on one GPU);
- with --other also how fast prefill is with a model split over both, beside one;
- the most memory of the GPU that was taken.

Exits with 1 where a log-probability differs by more than --most from the CPU's, where both hold the same numbers. With `--device cpu` it checks itself.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "bench"))
import random_model

BASE = 18300
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a small village by the sea, where",
    "def largest(numbers):\n    ",
    "Water boils at a temperature of " * 40,
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parents[2] / "target/release")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--other", help="another GPU, for what takes two: NCCL, and a split model")
    parser.add_argument("--shapes", type=lambda text: text.split(",") if text else [], default=["135m", "1b", "3b", "8b"])
    parser.add_argument("--pair", type=pathlib.Path, default=pathlib.Path.home() / ".cache/overfill/pairs/smollm2-135m", help="the default pair, fetched before")
    parser.add_argument("--most", type=float, default=0.05, help="difference of a log-probability that is allowed")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    memory = Memory()
    told = {"device": options.device, "gpu": gpu(), "same": [], "speed": [], "handoffs": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, pair, most in pairs(options, pathlib.Path(folder)):
            wanted, _, _ = answers(options, pair, ("cpu", "cpu"), pathlib.Path(folder))
            ways = ["tcp"] if options.other is None else ["tcp", "nccl"]
            for way in ways:
                devices = (options.device, options.device if way == "tcp" else options.other)
                found, handoffs, by_nccl = answers(options, pair, devices, pathlib.Path(folder), way)
                same = compared(wanted, found)
                told["same"].append({"pair": name, "way": way, "differs": same["largest_difference"] > most, **same})
                told["handoffs"].append({"pair": name, "way": way, "by_nccl": by_nccl, **carried(handoffs)})
    for shape in options.shapes:
        told["speed"] += speeds(options, shape, options.device)
        # Its heads do not come out even, the smallest one's.
        if options.other and shape != "135m":
            told["speed"] += speeds(options, shape, f"{options.device},{options.other}")
    told["peak_memory_mb"] = memory.most()
    (options.out / "check.json").write_text(json.dumps(told, indent=1))
    show(told)
    if any(same["differs"] for same in told["same"]):
        sys.exit(f"log-probabilities differ by more than {options.most}")
    if any(rate["way"] == "nccl" and not rate["by_nccl"] for rate in told["handoffs"]):
        sys.exit("no handoff went by NCCL: the nodes' logs and overfill_handoff_ways_total tell why")


def gpu():
    """Name, driver and memory, where NVIDIA's tool is."""
    try:
        fields = "name,driver_version,memory.total"
        return subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], check=True, capture_output=True, text=True).stdout.strip()
    except OSError:
        return None


class Memory:
    """Looks at the memory in use on the GPUs, MB, until it is asked for the most."""

    def __init__(self):
        self.seen, self.over = [], threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self):
        while not self.over.wait(0.2):
            try:
                used = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True).stdout
            except OSError:
                return
            self.seen += [int(word) for word in used.split() if word.isdigit()]

    def most(self):
        self.over.set()
        self.thread.join()
        return max(self.seen, default=None)


def run(*command):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def pairs(options, folder):
    """The models of the default pair with all numbers in f32, with caches in f16, and as they are: int8 caches are f16 on a GPU."""
    models = ("--full", options.pair / "full.gguf", "--decode", options.pair / "decode.gguf", "--kv", "identity")
    formats = {
        "floats": ("--full-weights", "f32", "--decode-weights", "f32", "--kv-cache", "f32", "--kv-wire", "f32"),
        "halves": ("--kv-cache", "f16", "--kv-wire", "f16"),
    }
    for name, told in formats.items():
        run(options.bin / "overfill", "pair", *models, *told, "--name", name, "--out", folder / name)
    yield "default, all in f32", folder / "floats", options.most
    yield "default, KV caches in f16", folder / "halves", options.most
    # What int8 takes away on the CPU alone says nothing of the GPU.
    yield "default", options.pair, float("inf")


class Cluster:
    """A router and two nodes, a process each, the prefill node on the first device, the decode node on the second."""

    def __init__(self, options, pair, devices, folder, way):
        self.folder, self.processes = folder, []
        decode = f"127.0.0.1:{BASE + 2}"
        nccl = ("--nccl", "on") if way == "nccl" else ()
        for at, role, device in ((1, "prefill", devices[0]), (2, "decode", devices[1])):
            listen = ("--listen", f"127.0.0.1:{BASE + at}", "--admin", f"127.0.0.1:{BASE + 10 + at}", "--decode-nodes", decode)
            self.start(options.bin / f"{role}-node", "--pair", pair, *listen, "--device", device, "--kv-memory", "1G", *nccl)
        for at in (1, 2):
            self.await_ready(BASE + 10 + at)
        nodes = ("--prefill-nodes", f"127.0.0.1:{BASE + 1}", "--decode-nodes", decode)
        self.start(options.bin / "router", "--pair", pair, "--http", f"127.0.0.1:{BASE}", "--grpc", f"127.0.0.1:{BASE + 3}", *nodes)
        self.await_ready(BASE)

    def start(self, *command):
        log = open(self.folder / "log", "a")
        self.processes.append(subprocess.Popen([str(word) for word in command], stderr=log, env={**os.environ, "OVERFILL_LOG": "warn"}))

    def await_ready(self, port):
        end = time.monotonic() + 120
        while True:
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2).read()
            except OSError:
                if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                    self.end()
                    sys.exit((self.folder / "log").read_text())
                time.sleep(0.05)

    def asked(self, path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{BASE}{path}", json.dumps(body).encode() if body else None, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def by_nccl(self):
        """Handoffs that the prefill node has pushed so."""
        with urllib.request.urlopen(f"http://127.0.0.1:{BASE + 11}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("overfill_handoff_ways_total") and 'way="nccl"' in line)

    def end(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(60)


def answers(options, pair, devices, folder, way="tcp"):
    """Of each prompt the log-probabilities of its tokens and the answer's tokens; the handoffs that there were, and how many of them
    went by NCCL."""
    cluster = Cluster(options, pair, devices, folder, way)
    try:
        model = cluster.asked("/v1/models")["data"][0]["id"]
        if way == "nccl":
            # The first handoffs go by TCP while a communicator is made.
            end = time.monotonic() + 30
            while not cluster.by_nccl() and time.monotonic() < end:
                cluster.asked("/v1/completions", {"model": model, "prompt": PROMPTS[0], "max_tokens": 2, "temperature": 0})
        before, told = cluster.by_nccl(), []
        for prompt in PROMPTS:
            asked = {"model": model, "prompt": prompt, "max_tokens": 48, "temperature": 0, "logprobs": 0, "echo": True}
            choice = cluster.asked("/v1/completions", asked)["choices"][0]["logprobs"]
            told.append((choice["token_logprobs"], choice["tokens"]))
        return told, cluster.asked("/cluster")["handoffs"][: len(PROMPTS)], cluster.by_nccl() - before
    finally:
        cluster.end()


def compared(wanted, found):
    """What a device answers, against the CPU."""
    largest, equal, tokens = 0.0, 0, 0
    for (want, words), (got, others) in zip(wanted, found):
        # Until a token differs both have seen the same; the first has no log-probability.
        same = next((at for at, (a, b) in enumerate(zip(words, others)) if a != b), min(len(words), len(others)))
        differences = [abs(a - b) for a, b in zip(want[1:same], got[1:same]) if a is not None and b is not None]
        largest = max([largest, *differences])
        equal, tokens = equal + same, tokens + len(words)
    return {"largest_difference": largest, "equal_tokens": equal, "tokens": tokens}


def carried(handoffs):
    seconds, size = sum(handoff["transfer"] for handoff in handoffs), sum(handoff["bytes"] for handoff in handoffs)
    return {"mb": size / 1e6, "mb_per_second": size / 1e6 / seconds, "tail_ms": statistics.median(handoff["tail"] for handoff in handoffs) * 1e3}


def speeds(options, shape, devices):
    """Prefill and decode at one shape, on a GPU or split over two."""
    model = options.pair / "full.gguf" if shape == "135m" else made(options, shape)
    bench = (options.bin / "overfill", "bench", "engine", "--model", model, "--weights", "bf16", "--device", devices, "--threads", os.cpu_count(), "--json")
    told = run(*bench, "--prompt-tokens", 2048, "--batch", "1,16,64", "--context", 1024, "--new-tokens", 32, "--runs", 3)
    for row in map(json.loads, told.splitlines()):
        rate = row["tokens_per_second"]
        yield {"shape": shape, "devices": devices, "phase": row["phase"], "batch": row["batch"], **{key: rate[key] for key in ("median", "min", "max")}}


def made(options, shape):
    """A model of random weights."""
    random_model.make(shape, options.out / shape, options.pair)
    return options.out / shape


def show(told):
    print(f"{told['device']}: {told['gpu'] or 'no GPU'}; at most {told['peak_memory_mb']} MB of it taken\n")
    print("| pair | rows go by | largest difference of a log-probability | greedy tokens as the CPU's | handed over, MB | MB/s | after the last layer, ms |\n|---|---|---|---|---|---|---|")
    for same, rate in zip(told["same"], told["handoffs"]):
        equal = f"{same['equal_tokens']} of {same['tokens']}"
        print(f"| {same['pair']} | {same['way']} | {same['largest_difference']:.5f} | {equal} | {rate['mb']:.1f} | {rate['mb_per_second']:.0f} | {rate['tail_ms']:.1f} |")
    print("\n| shape | on | phase | batch | tokens/s |\n|---|---|---|---|---|")
    for row in told["speed"]:
        print(f"| {row['shape']} | {row['devices']} | {row['phase']} | {row['batch']} | {row['median']:,.0f} ({row['min']:,.0f} to {row['max']:,.0f}) |")


if __name__ == "__main__":
    main()
