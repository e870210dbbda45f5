"""Makes tests/fixtures/families.json: what transformers computes of tiny models of each family that Overfill reads.

A model's numbers are made of its tensors' names, here and in the Rust test, so only configurations and logits are stored.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

OUT = Path(__file__).parent.parent / "fixtures" / "families.json"
TOKENS = 40
# Logits after these tokens are stored.
ROWS = [0, 6, 20, 39]

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.25, 1.5],
    "long_factor": [4.0, 5.0, 6.0],
    "rope_theta": 10000.0,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA = {"head_dim": 12, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}

CASES = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-dynamic": {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama-yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama-yarn-mscale": {
        "model_type": "llama",
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 8, "beta_slow": 2, "truncate": False},
    },
    "llama-yarn-factor": {"model_type": "llama", "rope_parameters": YARN | {"attention_factor": 1.3}},
    "mistral-window": {"model_type": "mistral", "sliding_window": 9, "head_dim": 12},
    "qwen2-windows": {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "rope_theta": 1000000.0},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    "qwen3-windows": {"model_type": "qwen3", "head_dim": 8, "sliding_window": 9, "use_sliding_window": True, "layer_types": ALTERNATING},
    "smollm3": {"model_type": "smollm3", "tie_word_embeddings": True},
    "smollm3-windows": {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 9,
        "rope_theta": 5000.0,
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.5,
        "tie_word_embeddings": True,
    },
    "granite-biases": {"model_type": "granite", "residual_multiplier": 0.7, "attention_bias": True, "mlp_bias": True},
    "gemma": {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"} | {k: v for k, v in GEMMA.items() if k != "hidden_activation"},
    "gemma2": GEMMA
    | {
        "model_type": "gemma2",
        "sliding_window": 9,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma2-scalar": GEMMA | {"model_type": "gemma2", "sliding_window": 64, "query_pre_attn_scalar": 8, "final_logit_softcapping": None},
    "gemma3": GEMMA
    | {
        "model_type": "gemma3_text",
        "sliding_window": 9,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 12,
        "rope_theta": 100000.0,
        "rope_local_base_freq": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3-usual": GEMMA
    | {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 9, "query_pre_attn_scalar": 12, "rope_theta": 1000000.0},
    "gemma3-parameters": GEMMA
    | {
        "model_type": "gemma3_text",
        "sliding_window": 9,
        "layer_types": ALTERNATING,
        "query_pre_attn_scalar": 12,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2000.0},
        },
    },
    "phi3": {"model_type": "phi3", "sliding_window": 9},
    "phi3-longrope": {"model_type": "phi3", "original_max_position_embeddings": 64, "rope_parameters": LONG | {"partial_rotary_factor": 0.75}},
    "olmo2": {"model_type": "olmo2", "rope_theta": 500000.0},
}


def numbers(name, shape):
    """A tensor's numbers: uniform, by a hash of its name and their place."""
    seed = 0
    for byte in name.encode():
        seed = (seed * 31 + byte) % 2**32
    place = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
    mixed = (place + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    uniform = (mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1.0)
    if name.endswith("norm.weight"):
        uniform = uniform * np.float32(0.5) + np.float32(0.75)
    elif len(shape) == 2:
        uniform *= np.float32(0.5)
    return torch.from_numpy(uniform.reshape(shape))


@torch.no_grad()
def logits(config):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager").float().eval()
    tied = config["tie_word_embeddings"]
    for name, parameter in model.named_parameters():
        parameter.copy_(numbers(name, tuple(parameter.shape)))
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = [(7 * i * i + 3 * i + 5) % config["vocab_size"] for i in range(TOKENS)]
    rows = model(torch.tensor([tokens])).logits[0][ROWS]
    assert rows.std() > 0.3, rows.std()
    return tokens, rows


def main():
    logging.set_verbosity_error()
    all_cases = {}
    for name, case in CASES.items():
        config = BASE | case
        tokens, rows = logits(config)
        all_cases[name] = {"config": config, "logits": [[round(x, 6) for x in row] for row in rows.tolist()]}
        print(f"{name}: logits deviate by {rows.std():.2f}")
    # Whatever is longer than a line of configuration stands on one line.
    line = lambda value: json.dumps(value)
    cases = [
        f'  "{name}": {{\n   "config": {line(case["config"])},\n   "logits": [\n'
        + ",\n".join(f"    {line(row)}" for row in case["logits"])
        + "\n   ]\n  }"
        for name, case in all_cases.items()
    ]
    head = f' "tokens": {line(tokens)},\n "rows": {line(ROWS)},\n "cases": {{\n'
    OUT.write_text("{\n" + head + ",\n".join(cases) + "\n }\n}\n")
    print(f"{OUT.stat().st_size / 1e3:.0f} kB in {OUT}")


if __name__ == "__main__":
    main()
