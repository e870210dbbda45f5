"""The two-model path from its definition (OverFill, arXiv 2508.08446), in plain PyTorch, one sequence, float32.

The full model reads the prompt. Its keys (after the rotary embedding) and values, layer by layer, go through the KV transform
and become the decode model's cache. The first token is the most likely one of the full model's logits; the decode model
writes the rest, attending to that cache and to its own keys and values from the prompt's length on.
"""

import torch
from torch.nn.functional import linear, silu


class Llama:
    """A Llama from its weights (Hugging Face's names) and its config.json (default rotary embedding)."""

    def __init__(self, weights, config):
        self.weights = {name: tensor.float() for name, tensor in weights.items()}
        self.config = config
        self.layers = config["num_hidden_layers"]
        head_dim = config["head_dim"]
        self.frequencies = config["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)

    def forward(self, tokens, cache):
        """Reads `tokens` after what `cache` holds, and appends to it.

        `cache` is a list with keys and values of each layer, both [positions, kv_heads, head_dim]. Gives logits [tokens, vocab].
        """
        heads, kv_heads, head_dim = (self.config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        start = cache[0][0].shape[0]
        positions = torch.arange(start, start + len(tokens))
        x = self.weights["model.embed_tokens.weight"][torch.tensor(tokens)]
        for i in range(self.layers):

            def project(name, y, i=i):
                return linear(y, self.weights[f"model.layers.{i}.{name}.weight"])

            y = self.norm(f"model.layers.{i}.input_layernorm", x)
            q = self.rotate(project("self_attn.q_proj", y).view(len(tokens), heads, head_dim), positions)
            k = self.rotate(project("self_attn.k_proj", y).view(len(tokens), kv_heads, head_dim), positions)
            v = project("self_attn.v_proj", y).view(len(tokens), kv_heads, head_dim)
            k, v = cache[i] = torch.cat([cache[i][0], k]), torch.cat([cache[i][1], v])
            attended = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                scores = q[:, head] @ k[:, shared].T / head_dim**0.5
                unseen = torch.arange(k.shape[0])[None, :] > positions[:, None]
                attended.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v[:, shared])
            x = x + project("self_attn.o_proj", torch.cat(attended, -1))
            y = self.norm(f"model.layers.{i}.post_attention_layernorm", x)
            x = x + project("mlp.down_proj", silu(project("mlp.gate_proj", y)) * project("mlp.up_proj", y))
        return linear(self.norm("model.norm", x), self.weights["lm_head.weight"])

    def norm(self, name, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def rotate(self, x, positions):
        """Turns each pair (x[j], x[j + head_dim / 2]) of each head by position * frequency j."""
        angles = positions[:, None, None] * self.frequencies
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def empty_cache(self):
        shape = (0, self.config["num_key_value_heads"], self.config["head_dim"])
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(self.layers)]


def kept_layers(kind, full, kept):
    """Layers of the full model that feed the decode model's `kept` ones."""
    return {
        "identity": lambda: list(range(full)),
        "prune:firstlast": lambda: [0, *range(full - kept + 1, full)],
        "prune:first": lambda: list(range(kept)),
        "prune:last": lambda: list(range(full - kept, full)),
        "projection": lambda: torch.linspace(0, full - 1, kept).round().int().tolist(),
    }[kind]()


def transform(kind, cache, decode, projection):
    """The full model's cache as the decode model's."""
    layers = kept_layers(kind, len(cache), decode.layers)
    if kind != "projection":
        return [cache[layer] for layer in layers]

    def project(rows, i):
        weight, bias = (projection[f"embedding_proj.{i}.{kind}"] for kind in ("weight", "bias"))
        return linear(rows.flatten(1), weight, bias).view(len(rows), decode.config["num_key_value_heads"], decode.config["head_dim"])

    return [(project(cache[layer][0], i), project(cache[layer][1], i)) for i, layer in enumerate(layers)]


def generate(full, decode, kind, projection, prompt, count):
    """`count` greedy tokens after `prompt`, and the logits that each came from, [count, vocab]."""
    cache = full.empty_cache()
    logits = [full.forward(prompt, cache)[-1]]
    tokens = [int(logits[0].argmax())]
    cache = transform(kind, cache, decode, projection)
    while len(tokens) < count:
        logits.append(decode.forward(tokens[-1:], cache)[-1])
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)
