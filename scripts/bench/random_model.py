#!/usr/bin/env python3
"""A model of random weights in bfloat16: what it says means nothing, what it costs is what such a model costs.

    scripts/bench/random_model.py SHAPE FOLDER [--tokenizer-of PAIR]

SHAPE is `1b` or `3b` (Llama 3.2's), `8b` (Llama 3.1's), or `decode`: the layers and KV heads of `3b` with a narrower stream and MLP, as
pruning makes it, and a third of its weights. FOLDER is as Hugging Face's transformers load it; what is there is left. Needs numpy.
"""

import argparse
import json
import pathlib
import shutil

import numpy

SHARED = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128, "tie_word_embeddings": False},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "decode": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}
TOKENIZER = pathlib.Path.home() / ".cache/overfill/pairs/smollm2-135m"
DRAWN = 1 << 24
"""Weights are drawn once and repeated from another place for each matrix."""
SHARD = 4 << 30
"""Bytes of one file at most."""


def shapes(config):
    hidden, middle, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)
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


def make(shape, folder, tokenizer):
    """One of `SHAPES`, with the tokenizer in the folder of a pair."""
    config = {**SHARED, **SHAPES[shape]}
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    drawn = numpy.tile(bfloat16(numpy.random.default_rng(7).normal(0, 0.02, DRAWN)), 2)
    ones = bfloat16(numpy.ones(config["hidden_size"]))
    shards, size = [[]], 0
    for name, of in shapes(config):
        own = 2 * int(numpy.prod(of))
        if size + own > SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, of, own))
        size += own
    places = {}
    for number, tensors in enumerate(shards):
        file = folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        at, head = 0, {}
        for name, of, own in tensors:
            head[name] = {"dtype": "BF16", "shape": list(of), "data_offsets": [at, at + own]}
            at += own
            places[name] = file.name
        told = json.dumps(head).encode()
        told += b" " * (-len(told) % 8)
        with open(file, "wb") as to:
            to.write(len(told).to_bytes(8, "little") + told)
            for name, of, own in tensors:
                left, begin = own // 2, hash_of(name) % DRAWN
                while len(of) > 1 and left > 0:
                    part = drawn[begin : begin + min(left, DRAWN)]
                    to.write(part.tobytes())
                    left -= len(part)
                if len(of) == 1:
                    to.write(ones[:left].tobytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def hash_of(name):
    """The same in every process, unlike Python's."""
    return int.from_bytes(name.encode()[-8:], "little") * 2654435761


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tokenizer-of", type=pathlib.Path, default=TOKENIZER, help="a pair, whose tokenizer the model gets")
    options = parser.parse_args()
    make(options.shape, options.folder, options.tokenizer_of)
