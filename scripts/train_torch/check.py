"""Compares `train_torch` with `overfill train`, step by step, on tiny models with random weights, on CPUs.

    python scripts/train_torch/check.py target/release/overfill

The loss of each step must be the other's to 1e-4, and so with one process as with two; a run that was killed goes on as if it had
not been. Needs tests/reference/requirements.txt and the default pair's tokenizer (`overfill fetch`).
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPTS = Path(__file__).parent.parent
PLACES = ["Paris", "Oslo", "Lima", "Cairo", "Quito", "Delhi", "Accra", "Seoul", "Rome", "Bonn"]
COMMON = ["--lr", "1e-3", "--batch-tokens", "60", "--accumulate", "2", "--epochs", "2", "--validate-every", "4", "--save-every", "2"]
WAYS = {
    "distill": [],
    "cross-entropy": ["--loss", "ce", "--weight-decay", "0.1"],
    "alone": ["--mode", "decode"],
    "anywhere": ["--random-cutoff", "--divergence", "reverse-kl"],
    "half": ["--prompt-share", "0.5", "--divergence", "jsd:0.3"],
    "states": ["--hidden-weight", "0.5", "--divergence", "skewed-kl:0.1"],
    "on-policy": ["--on-policy", "0.5", "--rollout-tokens", "12", "--rollout-temperature", "0", "--divergence", "skewed-reverse-kl:0.2"],
    "on-policy alone": ["--mode", "decode", "--on-policy", "1", "--rollout-tokens", "9", "--rollout-temperature", "0"],
}


def conversations(path, first, count):
    lines = []
    for i in range(first, first + count):
        place = PLACES[i % len(PLACES)]
        asked = f"Tell me about {place}" + ", its houses and its people" * (i % 4) + "."
        answer = f"{place} is a town of {i} houses." + f" People in {place} like tea." * (i % 3)
        lines.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], "complete": i % 5 > 0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def models(folder, pair):
    """A full and a decode model."""
    torch.manual_seed(0)
    for name, hidden, mlp in [("full", 48, 96), ("decode", 32, 64)]:
        config = LlamaConfig(
            vocab_size=49152, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=512, tie_word_embeddings=name == "decode", eos_token_id=2, bos_token_id=1, initializer_range=0.3,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        for file in ["tokenizer.json", "tokenizer_config.json"]:
            shutil.copy(pair / file, folder / name / file)


def losses(out):
    """Step and validation losses of a run."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {(r["event"], r["step"]): {key: r[key] for key in ("loss", "ce", "kl", "states", "tokens")} for r in records}


def difference(one, other):
    assert one.keys() == other.keys(), (sorted(one), sorted(other))
    assert all(one[at]["tokens"] == other[at]["tokens"] for at in one), "batches are of the same tokens"
    return max(abs(one[at][key] - other[at][key]) for at in one for key in one[at])


def torch_command(folder, out, processes, port):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port), "-m", "train_torch"]
    command += ["--full", folder / "full", "--init", folder / "decode", "--data", folder / "train.jsonl", "--valid", folder / "valid.jsonl"]
    return [*command, "--out", out, "--device", "cpu", "--precision", "f32", "--kv-cache", "f32", "--kv-wire", "f32", *COMMON]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overfill")
    parser.add_argument("--only", help="one of: " + ", ".join(WAYS))
    args = parser.parse_args()
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pair = Path(subprocess.run([args.overfill, "fetch"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        models(folder, pair)
        conversations(folder / "train.jsonl", 0, 23)
        conversations(folder / "valid.jsonl", 40, 5)
        port = 29600
        for name, way in WAYS.items():
            if args.only not in (None, name):
                continue
            ours = folder / f"overfill-{name}"
            command = [args.overfill, "train", "--full", folder / "full", "--init", folder / "decode"]
            command += ["--full-weights", "f32", "--kv", "f32", "--wire", "f32"]
            command += ["--data", folder / "train.jsonl", "--valid", folder / "valid.jsonl", "--out", ours, *COMMON, *way]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            told = []
            for processes in (1, 2):
                port += 1
                theirs = folder / f"torch-{processes}-{name}"
                subprocess.run([*torch_command(folder, theirs, processes, port), *way], check=True, env=environment, stdout=subprocess.DEVNULL)
                far = difference(losses(ours), losses(theirs))
                told.append(f"{processes} process{'es' if processes > 1 else ''} {far:.1e}")
                assert far < 1e-4, f"{name}: {told}"
                weights = json.loads((theirs / "model" / "provenance.json").read_text())
                assert weights["processes"] == processes
            steps = max(step for _, step in losses(ours))
            print(f"{name}: {steps} steps, largest difference of a loss: {', '.join(told)}", flush=True)
        made = folder / "pair"
        command = [args.overfill, "pair", "--full", folder / "full", "--decode", theirs / "model", "--kv", "identity", "--out", made]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print("a pair was made of the last one")
        resumed(folder, environment)
        written_by_a_cluster(args.overfill, folder, environment)


def written_by_a_cluster(overfill, folder, environment):
    """In the first step a cluster with the same weights writes what the model of the moment does."""
    made = folder / "served"
    command = [overfill, "pair", "--full", folder / "full", "--decode", folder / "decode", "--kv", "identity", "--out", made]
    command += ["--full-weights", "f32", "--decode-weights", "f32", "--kv-cache", "f32", "--kv-wire", "f32"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    command = [overfill, "serve", "--pair", made, "--http", "127.0.0.1:29671", "--grpc", "127.0.0.1:29672", "--drain-delay", "0"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        url = "http://127.0.0.1:29671"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/ready", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        own = ["--on-policy", "1", "--rollout-tokens", "12", "--rollout-temperature", "0", "--steps", "1"]
        outs = [folder / "own", folder / "cluster"]
        for out, more, port in zip(outs, [[], ["--rollout-url", url]], [29661, 29662], strict=True):
            subprocess.run([*torch_command(folder, out, 1, port), *own, *more], check=True, env=environment, stdout=subprocess.DEVNULL)
        far = difference(*map(losses, outs))
        assert far < 1e-4, far
        print(f"answers of a running cluster: largest difference of a loss {far:.1e}")
    finally:
        server.terminate()
        server.wait()


def processes_of(out):
    """All that have this folder in their command: torchrun, and what it started."""
    commands = {int(path.parent.name): path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")}
    return [pid for pid, command in commands.items() if str(out).encode() in command]


def resumed(folder, environment):
    """Killed in the middle, it goes on to the same weights."""
    whole, stopped = folder / "whole", folder / "stopped"
    subprocess.run(torch_command(folder, whole, 2, 29650), check=True, env=environment, stdout=subprocess.DEVNULL)
    run = subprocess.Popen(torch_command(folder, stopped, 2, 29651), env=environment, stdout=subprocess.DEVNULL)
    while not (stopped / "state" / "progress.json").exists() or json.loads((stopped / "state" / "progress.json").read_text())["step"] < 2:
        assert run.poll() is None, "it was killed in the middle"
        time.sleep(0.01)
    for pid in processes_of(stopped):
        os.kill(pid, signal.SIGKILL)
    run.wait()
    assert not (stopped / "model").exists(), "it was killed in the middle"
    subprocess.run(torch_command(folder, stopped, 2, 29652), check=True, env=environment, stdout=subprocess.DEVNULL)
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (whole, stopped)]
    assert weights[0] == weights[1], "the same weights, bit for bit"
    print("killed and gone on with: the same weights, bit for bit")


if __name__ == "__main__":
    main()
