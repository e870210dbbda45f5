"""Two training steps of a decode model in PyTorch, by autograd: what the hand-written backward and optimiser must give.

The fixture `train/` holds losses, lengths of gradients, and the decode model's weights after both steps.
The loss is OverFill's: the full model reads the prompt, the decode model goes on from its keys and values, and learns the
response's tokens but the first, by cross-entropy and by the divergence from the full model's most likely tokens, all
others being one event.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from two_models import Llama

FIXTURES = Path(__file__).parent.parent / "fixtures"
EXAMPLES = [
    {"prompt": [5, 9, 77, 3, 12, 40], "response": [8, 8, 21, 100, 2]},
    {"prompt": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], "response": [90, 33, 2]},
    {"prompt": [64, 127, 0], "response": [17, 18, 19, 20, 21, 22, 23, 2]},
]
OPTIONS = {"ce": 0.5, "distill": 1.0, "top": 8, "lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1, "clip": 0.5}


def model(name):
    folder = FIXTURES / "models" / name
    return Llama(load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()))


def empty(config):
    none = torch.zeros(0, config["num_key_value_heads"], config["head_dim"])
    return [(none, none) for _ in range(config["num_hidden_layers"])]


def losses(full, decode, example):
    """Sums of cross-entropy and divergence over the response's tokens but the first, and how many they are."""
    prompt, response = example["prompt"], example["response"]
    with torch.no_grad():
        cache = empty(full.config)
        full.forward(prompt, cache)
        context = list(cache)
        said = full.forward(response[:-1], cache).log_softmax(-1)
        known = said.topk(OPTIONS["top"], -1)
    log_q = decode.forward(response[:-1], context).log_softmax(-1)
    ce = -log_q[torch.arange(len(response) - 1), torch.tensor(response[1:])].sum()
    p, q = known.values.exp(), log_q.gather(-1, known.indices)
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.exp().sum(-1)
    kl = (p * (known.values - q)).sum() + (rest_p * (rest_p / rest_q).log()).sum()
    return ce, kl, len(response) - 1


def main():
    full, decode = model("full"), model("narrow")
    for weight in decode.weights.values():
        weight.requires_grad_()
    vectors = [w for w in decode.weights.values() if w.dim() == 1]
    matrices = [w for w in decode.weights.values() if w.dim() > 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    betas = (OPTIONS["beta1"], OPTIONS["beta2"])
    adam = torch.optim.AdamW(groups, lr=OPTIONS["lr"], betas=betas, eps=OPTIONS["eps"], weight_decay=OPTIONS["weight_decay"])
    steps = []
    for _ in range(2):
        adam.zero_grad()
        parts = [losses(full, decode, example) for example in EXAMPLES]
        ce, kl, tokens = (sum(part[i] for part in parts) for i in range(3))
        ((OPTIONS["ce"] * ce + OPTIONS["distill"] * kl) / tokens).backward()
        length = torch.nn.utils.clip_grad_norm_(list(decode.weights.values()), OPTIONS["clip"])
        adam.step()
        steps.append({"ce": ce.item() / tokens, "kl": kl.item() / tokens, "gradient": length.item(), "tokens": tokens})
    folder = FIXTURES / "train"
    folder.mkdir(exist_ok=True)
    save_file({name: weight.detach() for name, weight in decode.weights.items()}, folder / "after.safetensors")
    (folder / "steps.json").write_text(json.dumps({"options": OPTIONS, "examples": EXAMPLES, "steps": steps}, indent=1) + "\n")


if __name__ == "__main__":
    main()
