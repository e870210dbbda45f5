"""Training speed beside PyTorch's: the same model, the same batch, both in one run, taking turns.

    python tests/reference/train_speed.py target/release/overfill [--rounds 3] [--alone]

PyTorch trains transformers' Llama (scaled-dot-product attention, float32, fused AdamW) in the two ways that one would write:
all sequences in one batch, padded to the longest, or one sequence after the other, without padding. The faster one counts.
Numbers are random; a step is forward, loss (cross-entropy and divergence from 32 known tokens), backward, clipping, AdamW.
"""

import argparse
import json
import subprocess
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

RESPONSES = [60, 66, 72, 78, 84, 90]
PROMPTS = [150, 200, 250, 300, 350, 400]
VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, TOP = 49152, 30, 9, 3, 64, 32


def build(hidden, intermediate):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return model.train()


def loss(logits, gold, known, log_p):
    """Sum over rows [n, vocab]: half cross-entropy, and divergence with all unknown tokens as one event."""
    log_q = logits.log_softmax(-1)
    q = log_q.gather(-1, known.expand(len(logits), -1))
    p = log_p.exp()
    rest_p, rest_q = 1 - p.sum(), 1 - q.exp().sum(-1)
    kl = (p * (log_p - q)).sum() + (rest_p * (rest_p / rest_q).log()).sum()
    return 0.5 * torch.nn.functional.nll_loss(log_q, gold, reduction="sum") + kl


class Trainer:
    def __init__(self, model, alone, padded):
        self.model, self.alone, self.padded = model, alone, padded
        self.adam = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        self.known = torch.arange(TOP) * 97
        self.log_p = torch.full((TOP,), -torch.tensor(TOP * 1.1).log().item())
        groups = [range(len(RESPONSES))] if padded else [[i] for i in range(len(RESPONSES))]
        self.groups = [self.group(list(group)) for group in groups]

    def group(self, which):
        """Tokens, positions, mask, keys and values of some sequences: prompts padded at the left, responses at the right."""
        prompt, response = max(PROMPTS[i] for i in which), max(RESPONSES[i] for i in which)
        tokens = torch.randint(VOCAB, (len(which), (prompt if self.alone else 0) + response))
        mask = torch.zeros(len(which), prompt + response, dtype=torch.long)
        for row, i in enumerate(which):
            mask[row, prompt - PROMPTS[i] : prompt + RESPONSES[i]] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, prompt + response - tokens.shape[1] :]
        shape = (len(which), KV_HEADS, prompt, HEAD_DIM)
        cache = None if self.alone else [(torch.rand(shape), torch.rand(shape)) for _ in range(LAYERS)]
        learned = mask[:, prompt:].bool()
        gold = torch.randint(VOCAB, (int(learned.sum()),))
        return tokens, positions, mask, cache, learned, gold, response

    def step(self):
        self.adam.zero_grad()
        for tokens, positions, mask, cache, learned, gold, response in self.groups:
            context = None
            if cache is not None:
                context = DynamicCache()
                for layer, (k, v) in enumerate(cache):
                    context.update(k, v, layer)
            full = bool(mask.all())
            hidden = self.model.model(
                input_ids=tokens, position_ids=positions, attention_mask=None if full else mask, past_key_values=context, use_cache=context is not None
            ).last_hidden_state  # fmt: skip
            logits = self.model.lm_head(hidden[:, -response:][learned])
            (loss(logits, gold, self.known, self.log_p) / sum(RESPONSES)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()

    def seconds(self, steps):
        self.step()
        times = []
        for _ in range(steps):
            begun = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - begun)
        return sorted(times)[len(times) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overfill")
    parser.add_argument("--hidden", type=int, default=432)
    parser.add_argument("--intermediate", type=int, default=1152)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="the pruned-only baseline: prompts are read and back-propagated through")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build(args.hidden, args.intermediate)
    trainers = {"padded": Trainer(model, args.alone, True), "one by one": Trainer(model, args.alone, False)}
    command = [args.overfill, "bench", "train", "--json", "--hidden", str(args.hidden), "--intermediate", str(args.intermediate)]
    command += ["--threads", str(args.threads), "--steps", str(args.steps)] + (["--alone"] if args.alone else [])
    tokens = sum(RESPONSES)
    for _ in range(args.rounds):
        ours = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["tokens_per_second"]
        theirs = {name: tokens / trainer.seconds(args.steps) for name, trainer in trainers.items()}
        best = max(theirs.values())
        told = ", ".join(f"{name} {rate:.0f}" for name, rate in theirs.items())
        print(f"response tokens/s: overfill {ours:.0f}; PyTorch {told}; ratio {ours / best:.2f}", flush=True)


if __name__ == "__main__":
    main()
