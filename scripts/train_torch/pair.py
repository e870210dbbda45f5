"""The full model, frozen, and the decode model that goes on from its keys and values."""

import functools
import json
import shutil

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache


def load(folder, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    if model.config.model_type not in ("llama", "qwen2"):
        raise SystemExit(f"{folder} is a {model.config.model_type}: nodes serve the Llama family and Qwen2")
    return model


class Net(torch.nn.Module):
    """A model, and the map from its states to the full model's where one is trained. What is computed with it is computed within
    `forward`, for as long as which its parameters are gathered: `net(lambda net: …)`."""

    def __init__(self, model, mapping=None):
        super().__init__()
        self.model, self.mapping = model, mapping

    def forward(self, act):
        return act(self)

    def sharded(self, mesh, compute, again=False):
        """Its parameters shared out over all processes, layer by layer. With `again` no layer keeps its insides for the backward
        pass: they are computed once more."""
        for layer in self.model.model.layers if again else []:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(self, mesh=mesh, mp_policy=policy)


def kept_layers(spec, layers, keep):
    """Full-model layer of each decode-model layer, as `overfill pair --kv` has it."""
    if spec == "identity":
        if layers != keep:
            raise SystemExit(f"the full model has {layers} layers, the decode model {keep}: name --kv prune:firstlast, prune:first or prune:last")
        return list(range(layers))
    if not 0 < keep <= layers:
        raise SystemExit(f"the decode model has {keep} layers, the full model {layers}: it must have fewer")
    kinds = {
        "prune:firstlast": [0, *range(layers - (keep - 1), layers)],
        "prune:first": list(range(keep)),
        "prune:last": list(range(layers - keep, layers)),
    }
    if spec not in kinds:
        raise SystemExit(f"'{spec}' is no KV transform: use identity, prune:firstlast, prune:first or prune:last")
    return kinds[spec]


class Context(DynamicCache):
    """Keys and values that a sequence's own follow but are not added to: a layer may be computed twice."""

    def update(self, key_states, value_states, layer_idx, *_, **__):
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)


def padded(sequences, device):
    """Sequences of tokens as one tensor, `[sequences, longest]`, and the mask of what is no padding, which stands at the end."""
    longest = max(len(sequence) for sequence in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence, device=device)
        mask[row, : len(sequence)] = 1
    return tokens, mask


class Reading:
    """What the full model has to say about a batch: keys and values, and its most likely tokens in the place of each token of the
    answers, `[response tokens of all examples, top]`."""

    def __init__(self, full, examples, top, states, device):
        tokens, mask = padded([example.prompt + example.response[:-1] for example in examples], device)
        self.known, self.states = None, None
        with torch.no_grad():
            said = full.model(input_ids=tokens, attention_mask=mask, use_cache=True)
            self.cache = said.past_key_values
            if top > 0:
                ends = [(len(example.prompt) - 1, len(example.prompt) - 1 + len(example.response)) for example in examples]
                hidden = torch.cat([said.last_hidden_state[row, start:end] for row, (start, end) in enumerate(ends)])
                parts = [full.lm_head(part).float().log_softmax(-1).topk(top, -1) for part in hidden.split(256)]
                self.known = torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
                self.states = hidden if states else None

    def context(self, layers, cuts, rounding):
        """Keys and values of the first `cuts` tokens of each example as the decode model's layers get them, rounded as caches and
        wire round, and their mask. The decode model's own tokens come after the longest; the cache grows by them."""
        longest = max(cuts)
        cache = DynamicCache()
        for to, layer in enumerate(layers):
            rows = []
            for x in (self.cache.layers[layer].keys, self.cache.layers[layer].values):
                row = x[:, :, :longest]
                for dtype in rounding:
                    row = row.to(dtype).to(x.dtype)
                rows.append(row)
            cache.update(*rows, to)
        places = torch.arange(longest, device=rows[0].device)
        return cache, (places < torch.tensor(cuts, device=places.device).unsqueeze(-1)).long()


def learned(example, cut):
    """Which of an answer's tokens are learned where the decode model begins to read at `cut`: those that it reads something before."""
    return range(max(cut + 1 - len(example.prompt), 0), len(example.response))


def decode(model, examples, cuts, context, device):
    """The decode model's last states, normed, at the rows that tokens of the answers are predicted from, as far as it has read
    something before them; these tokens; and which of all response tokens they are."""
    own = [(example.prompt + example.response[:-1])[cut:] for example, cut in zip(examples, cuts, strict=True)]
    tokens, mask = padded(own, device)
    positions = torch.arange(tokens.shape[1], device=device) + torch.tensor(cuts, device=device).unsqueeze(-1)
    cache, before = context if context else (None, mask[:, :0])
    if cache is not None:
        cache.__class__ = Context
    said = model.model(
        input_ids=tokens, attention_mask=torch.cat([before, mask], -1), position_ids=positions, cache=cache, use_cache=cache is not None
    ).last_hidden_state  # fmt: skip
    rows, gold, which, first = [], [], [], 0
    for row, (example, cut) in enumerate(zip(examples, cuts, strict=True)):
        for place in learned(example, cut):
            rows.append(row * tokens.shape[1] + len(example.prompt) - 1 + place - cut)
            gold.append(example.response[place])
            which.append(first + place)
        first += len(example.response)
    rows, gold, which = (torch.tensor(x, dtype=torch.long, device=device) for x in (rows, gold, which))
    return said.flatten(0, 1)[rows], gold, which


def save(model, tokenizer, init, folder, weights, provenance):
    """A checkpoint as Hugging Face has it, in f32, tokenizer files as `init` has them; whole or not at all."""
    making = folder.with_name(f".{folder.name}-making")
    shutil.rmtree(making, ignore_errors=True)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    model.save_pretrained(making, state_dict={name: x.float().contiguous() for name, x in weights.items()})
    tokenizer.save_pretrained(making)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (making / name).unlink(missing_ok=True)
        if (init / name).exists():
            shutil.copy(init / name, making / name)
    (making / "provenance.json").write_text(json.dumps(provenance, indent=2))
    making.rename(folder)
