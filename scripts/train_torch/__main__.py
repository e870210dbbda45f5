"""The command line: the options of `overfill train`, by the same names."""

import argparse
from pathlib import Path

from .run import Run


def main():
    p = argparse.ArgumentParser(prog="train_torch", description=__import__(__package__).__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--full", type=Path, required=True, help="the full model: a Hugging Face folder")
    p.add_argument("--init", type=Path, required=True, help="the decode model to begin with, as `overfill prune` wrote it")
    p.add_argument("--data", type=Path, required=True, help="conversations to learn from, as JSON lines")
    p.add_argument("--valid", type=Path, help="conversations to measure with")
    p.add_argument("--out", type=Path, required=True, help="the folder of the run")
    p.add_argument("--kv", default="identity", help="from the full model's KV cache to the decode model's: identity, prune:firstlast, prune:first, prune:last")
    p.add_argument("--kv-cache", choices=["f32", "f16"], default="f16", help="how caches will store keys and values")
    p.add_argument("--kv-wire", choices=["f32", "f16", "bf16"], default="f16", help="how they will go between nodes")
    p.add_argument("--mode", choices=["overfill", "decode"], default="overfill", help="who reads the prompt")
    p.add_argument("--loss", choices=["distill", "ce"], default="distill")
    p.add_argument("--ce-weight", type=float, default=0.5, help="weight of the cross-entropy beside the divergence")
    p.add_argument("--divergence", default="kl", help="kl, reverse-kl, jsd:B, skewed-kl:A or skewed-reverse-kl:A")
    p.add_argument("--hidden-weight", type=float, default=0.0, help="weight of the distance from the full model's last hidden states")
    p.add_argument("--top", type=int, default=32, help="how many of the full model's most likely tokens are learned from")
    p.add_argument("--random-cutoff", action="store_true", help="the full model's reading ends anywhere")
    p.add_argument("--prompt-share", type=float, help="share of the prompt that the full model reads")
    p.add_argument("--on-policy", type=float, default=0.0, help="share of the batches whose answers the decode model writes itself")
    p.add_argument("--rollout-tokens", type=int, default=128)
    p.add_argument("--rollout-temperature", type=float, default=1.0)
    p.add_argument("--rollout-url", help="a running cluster that writes them, in the place of the model of the moment")
    p.add_argument("--rollout-key", help="the key that it asks for")
    p.add_argument("--rollout-model", default="", help="the name of the pair there, where it has several")
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--warmup", type=float, default=0.03, help="share of the steps in which the learning rate rises")
    p.add_argument("--last-lr", type=float, default=0.0, help="share of the learning rate that is left at the end")
    p.add_argument("--beta1", type=float, default=0.9)
    p.add_argument("--beta2", type=float, default=0.999)
    p.add_argument("--eps", type=float, default=1e-8)
    p.add_argument("--weight-decay", type=float, default=0.0)
    p.add_argument("--clip", type=float, default=1.0)
    p.add_argument("--epochs", type=int, default=1)
    p.add_argument("--steps", type=int)
    p.add_argument("--batch-tokens", type=int, default=1536, help="response tokens in a batch, over all processes")
    p.add_argument("--accumulate", type=int, default=1, help="batches in a step")
    p.add_argument("--max-tokens", type=int, default=2048, help="longest conversation in tokens")
    p.add_argument("--valid-samples", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--validate-every", type=int, default=200)
    p.add_argument("--save-every", type=int, default=100)
    p.add_argument("--precision", choices=["f32", "bf16"], default="bf16", help="what layers compute with; weights, sums of gradients and the optimiser are f32")
    p.add_argument("--checkpoint-layers", action="store_true", help="keep no layer's insides for the backward pass, compute them again")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    Run(p.parse_args()).go()


if __name__ == "__main__":
    main()
