#!/usr/bin/env python3
"""Makes ../fixtures: tiny random checkpoints and what a PyTorch reference computes with them.

    python3 -m venv venv && venv/bin/pip install -r requirements.txt && venv/bin/python make_fixtures.py

logits/*: Hugging Face checkpoints with the logits of transformers' own models (f32, eager attention).
pairs/*:  the two-model path, written here from the paper's definition: the full model reads the prompt; its keys (after the
          rotary embedding) and values go through the KV transform; the first token is the argmax of the full model's logits;
          the decode model goes on greedily, attending to the transformed cache and appending its own keys and values.

Neither Python nor PyTorch is needed to run the tests.
"""
import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

OUT = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
PROMPTS = [1, 7, 40]


def randomise(model, seed):
    """Weights so large that logits vary, norms and biases that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.data = 1 + 0.2 * noise
        elif tensor.ndim == 1:
            tensor.data = 0.3 * noise
        else:
            tensor.data = noise / tensor.shape[1] ** 0.5
    return model.float().eval()


def tokens(count, seed, vocabulary):
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def save(model, folder, rope):
    folder.mkdir(parents=True)
    c = model.config
    tied = c.tie_word_embeddings
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors")
    names = ("model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
             "rms_norm_eps max_position_embeddings tie_word_embeddings hidden_act")
    config = {name: getattr(c, name) for name in names.split()} | {"eos_token_id": 2} | rope
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
BASE = dict(vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, attn_implementation="eager")
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Name, class, shape, rope as transformers 5 has it, and as config.json says it.
LOGITS = [
    ("llama_plain", LlamaConfig, dict(tie_word_embeddings=False), PLAIN_ROPE, {"rope_theta": 10000.0, "rope_scaling": None}),
    ("llama3_scaling", LlamaConfig, dict(tie_word_embeddings=True), {"rope_theta": 500000.0, **LLAMA3},
     {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    ("llama_rope_parameters", LlamaConfig,
     dict(tie_word_embeddings=True, hidden_size=36, head_dim=24, num_attention_heads=3, num_key_value_heads=1),
     {"rope_theta": 500000.0, **LLAMA3}, {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}, "head_dim": 24}),
    ("llama_linear_wide_heads", LlamaConfig, dict(tie_word_embeddings=False, head_dim=16),
     {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
     {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 16}),
    ("qwen2_biases", Qwen2Config, dict(tie_word_embeddings=True), {"rope_type": "default", "rope_theta": 1000000.0},
     {"rope_theta": 1000000.0}),
]


def make_logits():
    for i, (name, kind, shape, rope, said) in enumerate(LOGITS):
        config = kind(**{**BASE, **shape}, rope_parameters=rope)
        model = randomise({LlamaConfig: LlamaForCausalLM, Qwen2Config: Qwen2ForCausalLM}[kind](config), i)
        folder = OUT / "logits" / name
        save(model, folder, said)
        expected = {}
        for n in PROMPTS:
            prompt = tokens(n, 100 * i + n, config.vocab_size)
            expected[f"prompt.{n}"] = prompt
            expected[f"logits.{n}"] = model(prompt[None]).logits[0].contiguous()
        save_file(expected, folder / "expected.safetensors")


class Plain:
    """A Llama in plain PyTorch whose keys and values are an argument."""

    def __init__(self, model):
        self.w, self.c = model.state_dict(), model.config
        self.heads, self.kv_heads, self.layers = self.c.num_attention_heads, self.c.num_key_value_heads, self.c.num_hidden_layers
        self.dim = self.c.hidden_size // self.heads

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.c.rms_norm_eps) * self.w[name + ".weight"]

    def rotate(self, x, positions):
        half = self.dim // 2
        frequencies = 10000.0 ** (-torch.arange(half).float() * 2 / self.dim)
        angles = positions.float()[:, None] * frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, ids, cache):
        """cache: (keys, values) of [tokens, kv_heads, head_dim] for each layer; it grows. Gives logits of all positions."""
        start, count = cache[0][0].shape[0], len(ids)
        positions = torch.arange(start, start + count)
        x = self.w["model.embed_tokens.weight"][ids]
        for i in range(self.layers):
            p = f"model.layers.{i}."

            def linear(name, y):
                return y @ self.w[p + name + ".weight"].T

            h = self.norm(x, p + "input_layernorm")
            q = self.rotate(linear("self_attn.q_proj", h).view(count, self.heads, self.dim), positions)
            k = self.rotate(linear("self_attn.k_proj", h).view(count, self.kv_heads, self.dim), positions)
            v = linear("self_attn.v_proj", h).view(count, self.kv_heads, self.dim)
            k, v = cache[i] = torch.cat([cache[i][0], k]), torch.cat([cache[i][1], v])
            group = self.heads // self.kv_heads
            scores = torch.einsum("thd,phd->htp", q, k.repeat_interleave(group, 1)) / self.dim**0.5
            seen = torch.arange(k.shape[0])[None] <= positions[:, None]
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            y = torch.einsum("htp,phd->thd", weights, v.repeat_interleave(group, 1)).reshape(count, -1)
            x = x + linear("self_attn.o_proj", y)
            h = self.norm(x, p + "post_attention_layernorm")
            x = x + linear("mlp.down_proj", torch.nn.functional.silu(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h))
        return self.norm(x, "model.norm") @ self.w["lm_head.weight"].T

    def empty(self):
        return [(torch.zeros(0, self.kv_heads, self.dim), torch.zeros(0, self.kv_heads, self.dim)) for _ in range(self.layers)]


def kept(kind, layers, keep):
    if kind == "identity":
        return list(range(layers))
    return {"firstlast": [0, *range(layers - keep + 1, layers)], "first": list(range(keep)), "last": list(range(layers - keep, layers))}[kind]


def projected(a, b, folder):
    """The reference's projection: which layers it reads, and a function for the rows of each."""
    layers = [round(x) for x in torch.linspace(0, a.layers - 1, b.layers, dtype=torch.float64).tolist()]
    generator = torch.Generator().manual_seed(7)
    inputs, outputs = a.kv_heads * a.dim, b.kv_heads * b.dim
    maps = {}
    for j in range(b.layers):
        maps[f"embedding_proj.{j}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        maps[f"embedding_proj.{j}.bias"] = 0.3 * torch.randn(outputs, generator=generator)
    save_file(maps, folder / "projection.safetensors")

    def rows(j, x):
        return (x.flatten(1) @ maps[f"embedding_proj.{j}.weight"].T + maps[f"embedding_proj.{j}.bias"]).view(-1, b.kv_heads, b.dim)

    return layers, rows


def make_pairs():
    shape = dict(BASE, num_hidden_layers=5, tie_word_embeddings=False, rope_parameters=PLAIN_ROPE)
    other = dict(shape, intermediate_size=40)
    # Another width everywhere: hidden, heads, MLP. With heads of the same size the cache still fits as it is.
    narrow = dict(other, hidden_size=16, num_attention_heads=2)
    cases = {
        "identity": (narrow, "identity"),
        "prune_firstlast": (dict(narrow, num_hidden_layers=3), "firstlast"),
        "prune_first": (dict(other, num_hidden_layers=3), "first"),
        "prune_last": (dict(other, num_hidden_layers=3), "last"),
        "projection": (dict(narrow, num_hidden_layers=4, num_key_value_heads=1), "projection"),
    }
    full = randomise(LlamaForCausalLM(LlamaConfig(**shape)), 50)
    save(full, OUT / "pairs/full", {"rope_theta": 10000.0})
    for i, (name, (config, kind)) in enumerate(cases.items()):
        folder = OUT / "pairs" / name
        decode = randomise(LlamaForCausalLM(LlamaConfig(**config)), 60 + i)
        save(decode, folder, {"rope_theta": 10000.0})
        a, b = Plain(full), Plain(decode)
        if kind == "projection":
            layers, rows = projected(a, b, folder)
        else:
            layers, rows = kept(kind, a.layers, b.layers), lambda _, x: x
        expected = {}
        for n in [1, 5, 37]:
            prompt = tokens(n, 1000 + 10 * i + n, full.config.vocab_size)
            cache = a.empty()
            logits = a.forward(prompt, cache)[-1]
            assert (logits - full(prompt[None]).logits[0, -1]).abs().max() < 1e-4, "the plain Llama is transformers' Llama"
            cache = [(rows(j, cache[l][0]), rows(j, cache[l][1])) for j, l in enumerate(layers)]
            written, steps = [logits.argmax()], [logits]
            for _ in range(23):
                steps.append(b.forward(written[-1][None], cache)[-1])
                written.append(steps[-1].argmax())
            expected[f"prompt.{n}"], expected[f"written.{n}"] = prompt, torch.stack(written)
            expected[f"logits.{n}"] = torch.stack(steps)
        save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    make_logits()
    make_pairs()
