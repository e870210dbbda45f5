#!/usr/bin/env python3
"""A pair of real size on a small machine: a full model of Llama 3.2 3B's shape, and a decode model of a third of its weights.

    scripts/bench/big.py WORK [--bin FOLDER] [--tokenizer-of PAIR] [--prompts 3] [--decode hf|gguf]

Makes both models in WORK (11 GB; what is there is taken), of random weights in bfloat16: what they say means nothing, what they cost is
what such models cost. The decode model has the full model's layers and KV heads and a narrower stream and MLP, as pruning makes it; with
`--decode gguf` it is exported to Q4_0. Then a router and two nodes are started, a process each, and it tells how long each node took to
load its model, from the disk and from the system's page cache, against reading the same bytes; what memory each holds; and for prompts of
2,000 tokens the time to the first token, the rate after it, the bytes handed over for a token, and how much of that was hidden.
Needs numpy, and root where the page cache is to be emptied (else only the warm figures are told).
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
import urllib.request

import numpy

BASE = 17900
FULL = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24}
DECODE = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 24}
SHARED = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 28, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
DRAWN = 1 << 24
"""Weights are drawn once and repeated from another place for each matrix."""
SHARD = 4 << 30
"""Bytes of one file at most."""


def shapes(config):
    config = {**SHARED, **config}
    hidden, middle, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        of = f"model.layers.{layer}."
        for name, shape in {"q_proj": (heads, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, heads)}.items():
            yield f"{of}self_attn.{name}.weight", shape
        for name, shape in {"gate_proj": (middle, hidden), "up_proj": (middle, hidden), "down_proj": (hidden, middle)}.items():
            yield f"{of}mlp.{name}.weight", shape
        yield f"{of}input_layernorm.weight", (hidden,)
        yield f"{of}post_attention_layernorm.weight", (hidden,)


def bfloat16(numbers):
    """Their upper halves, rounded to nearest."""
    bits = numbers.astype(numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)


def make_model(folder, config, tokenizer):
    """A folder as Hugging Face's transformers load it."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    drawn = numpy.tile(bfloat16(numpy.random.default_rng(7).normal(0, 0.02, DRAWN)), 2)
    ones = bfloat16(numpy.ones(max(config["hidden_size"], 1)))
    shards, size = [[]], 0
    for name, shape in shapes(config):
        own = 2 * int(numpy.prod(shape))
        if size + own > SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, shape, own))
        size += own
    places = {}
    for number, tensors in enumerate(shards):
        file = folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        at, head = 0, {}
        for name, shape, own in tensors:
            head[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + own]}
            at += own
            places[name] = file.name
        told = json.dumps(head).encode()
        told += b" " * (-len(told) % 8)
        with open(file, "wb") as to:
            to.write(len(told).to_bytes(8, "little") + told)
            for name, shape, own in tensors:
                left, begin = own // 2, hash_of(name) % DRAWN
                while len(shape) > 1 and left > 0:
                    part = drawn[begin : begin + min(left, DRAWN)]
                    to.write(part.tobytes())
                    left -= len(part)
                if len(shape) == 1:
                    to.write(ones[:left].tobytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    (folder / "config.json").write_text(json.dumps({**SHARED, **config}, indent=1))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def hash_of(name):
    """The same in every process, unlike Python's."""
    return int.from_bytes(name.encode()[-8:], "little") * 2654435761


def run(*command):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def make(options):
    """The pair's folder."""
    full, decode = options.work / "full", options.work / "decode"
    make_model(full, FULL, options.tokenizer_of)
    make_model(decode, DECODE, options.tokenizer_of)
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
    parser.add_argument("--tokenizer-of", type=pathlib.Path, default=pathlib.Path.home() / ".cache/overfill/pairs/smollm2-135m")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--decode", choices=["hf", "gguf"], default="hf")
    options = parser.parse_args()
    pair = make(options)
    with tempfile.TemporaryDirectory() as folder:
        loading(options, pair, pathlib.Path(folder))
        serving(options, pair, pathlib.Path(folder))


if __name__ == "__main__":
    main()
