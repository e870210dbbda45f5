"""Whole servers under the same load, one after the other: `overfill bench serve` is the client of all of them.

Prompts of 256 random tokens, answers of 64. Closed loops of 1 and 16 requests, and requests that arrive at given rates (Poisson), whose
goodput is counted for two pairs of bounds.
"""

import contextlib
import itertools
import json
import os
import pathlib
import subprocess
import time
import urllib.request

import models
from kept import Kept

PORT = 17800
PROMPT, ANSWER = 256, 64
CLOSED = (1, 16)
STARTING = 600
"""Seconds that a server may take to answer: vLLM compiles for minutes."""
BOUNDS = {"TTFT 1 s, TPOT 50 ms": (1.0, 0.050), "TTFT 0.3 s, TPOT 25 ms": (0.3, 0.025)}


def overfill(options, _):
    command = [options.bin / "overfill", "serve", "--pair", options.pair, "--http", f"127.0.0.1:{PORT}", "--grpc", f"127.0.0.1:{PORT + 1}"]
    return command, {"OVERFILL_LOG": "warn"}


def llama_server(layers):
    def command(options, folder):
        context = max(CLOSED) * 2 * (PROMPT + ANSWER)
        flags = ["--host", "127.0.0.1", "--port", PORT, "-np", max(CLOSED), "-c", context, "-t", max(options.threads)]
        return [folder / "build" / "bin" / "llama-server", "-m", models.gguf(options, layers), *flags], {}

    return command


def vllm(options, folder):
    model, cores = models.folder(options), f"0-{max(options.threads) - 1}"
    command = [folder / "venv" / "bin" / "vllm", "serve", model, "--host", "127.0.0.1", "--port", PORT, "--max-model-len", 2048]
    return command, {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cores}


# It closes connections that are kept after a number of answers, without a word.
ONE_BY_ONE = ["--header", "Connection=close"]
SERVERS = {
    "overfill": (None, overfill, []),
    "overfill, full model alone": (None, overfill, ["--extra-body", '{"quality": "full"}']),
    "llama-server, Q8_0": ("llama.cpp", llama_server("q8_0"), ONE_BY_ONE),
    "llama-server, Q4_0": ("llama.cpp", llama_server("q4_0"), ONE_BY_ONE),
    "vLLM, bf16": ("vllm", vllm, []),
}
"""Name: the peer that it is of, its command and environment, what the client is told beside the load."""


@contextlib.contextmanager
def running(options, folder, begin, log):
    """A server, from when it answers to when it has ended."""
    command, environment = begin(options, folder)
    with open(log, "w") as file:
        process = subprocess.Popen([str(word) for word in command], env={**os.environ, **environment}, stdout=file, stderr=file, start_new_session=True)
    try:
        until = time.monotonic() + STARTING
        while not answers():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{command[0]} does not serve:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers():
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2) as told:
            return told.status == 200
    except OSError:
        return False


def load(options, told, seed, *shape):
    """What `overfill bench serve` saw of one load. Prompts of another seed are others: none is in a cache."""
    result = options.work / "load.json"
    result.unlink(missing_ok=True)
    command = [options.bin / "overfill", "bench", "serve", "--base-url", f"http://127.0.0.1:{PORT}", "--seed", seed, "--dataset-name", "random"]
    command += ["--random-input-len", PROMPT, "--random-output-len", ANSWER, "--tokenizer", options.pair, "--ignore-eos"]
    command += ["--save-result", "--save-detailed", "--result-dir", result.parent, "--result-filename", result.name, *shape]
    done = subprocess.run([str(word) for word in [*command, *told]], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(result.read_text())


def figures(told):
    """Of one load; goodput by each pair of bounds, in requests a second."""
    good = dict.fromkeys(BOUNDS, 0)
    for ttft, itls in zip(told["ttfts"], told["itls"]):
        tpot = sum(itls) / len(itls) if itls else float("inf")
        for name, (first, each) in BOUNDS.items():
            good[name] += 0 < ttft <= first and tpot <= each
    kept = {key: told[key] for key in ("completed", "request_throughput", "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms")}
    return {**kept, "goodput": {name: count / told["duration"] for name, count in good.items()}}


def measure(options, peers):
    kept = Kept(options.work / "servers.jsonl")
    for number in range(options.rounds):
        for server, (peer, begin, told) in SERVERS.items():
            if peer is None or peer in peers:
                # A rate takes its time: one round of them.
                rates = options.rates if number == 0 else []
                kept.measure({"round": number, "server": server}, lambda: loads(options, peers.get(peer), begin, told, number, rates))
    return kept.rows


def loads(options, folder, begin, told, number, rates):
    """What a server makes of each load, from one start."""
    seeds = itertools.count(1_000 * (number + 1))
    with running(options, folder, begin, pathlib.Path(options.work) / "server.log"):
        load(options, told, next(seeds), "--num-prompts", 8, "--max-concurrency", 4)
        for most in CLOSED:
            seen = load(options, told, next(seeds), "--num-prompts", 16 + 4 * most, "--max-concurrency", most)
            yield {"at_once": most, **figures(seen)}
        for rate in rates:
            seen = load(options, told, next(seeds), "--num-prompts", max(12, int(rate * options.seconds)), "--request-rate", rate)
            yield {"rate": rate, **figures(seen)}
