"""The losses of `overfill train`: cross-entropy, and a divergence from the full model's distribution.

Of that its most likely tokens are known; all others are one event of the rest's probability.
"""

import math

import torch

# Least logarithm of a probability that a mirror image is measured against, and least rest that counts: below is rounding.
LEAST_LOG = -13.8
NO_REST = 1e-6


def divergence(name, p, log_p, q, log_q):
    """Sum over events, the last dimension."""
    name, _, share = name.partition(":")
    share = float(share) if share else None

    def part(x, log_x, m):
        return torch.where(x > 0, x * (log_x - m.clamp_min(1e-38).log()), 0.0)

    if name == "kl":
        each = torch.where(p > 0, p * (log_p - log_q), 0.0)
    elif name == "reverse-kl":
        each = torch.where(q > 0, q * (log_q - log_p.clamp_min(LEAST_LOG)), 0.0)
    elif name == "jsd":
        m = share * p + (1 - share) * q
        each = share * part(p, log_p, m) + (1 - share) * part(q, log_q, m)
    elif name == "skewed-kl":
        each = part(p, log_p, share * p + (1 - share) * q)
    elif name == "skewed-reverse-kl":
        each = part(q, log_q, (1 - share) * p + share * q)
    else:
        raise SystemExit(f"'{name}' is no divergence: use kl, reverse-kl, jsd:B, skewed-kl:A or skewed-reverse-kl:A")
    return each.sum(-1)


def events(logits, ids, log_probs):
    """Probabilities of the known tokens and of the rest, `[rows, top + 1]`: `p`, `log p`, `q`, `log q`."""
    log_total = logits.logsumexp(-1, keepdim=True)
    known_q = logits.gather(-1, ids) - log_total
    # Only the rest is summed over, so that its sum is exact however small it is.
    rest = logits.scatter(-1, ids, -math.inf)
    log_rest_q = rest.logsumexp(-1, keepdim=True) - log_total
    rest_p = 1 - log_probs.exp().sum(-1, keepdim=True)
    rest_p = torch.where(rest_p < NO_REST, 0.0, rest_p)
    log_p = torch.cat([log_probs, rest_p.log()], -1)
    # Where nothing is left of a probability its logarithm has no slope.
    log_q = torch.cat([known_q, log_rest_q], -1).clamp_min(-80.0)
    return torch.cat([log_probs.exp(), rest_p], -1), log_p, log_q.exp(), log_q


def row_losses(logits, tokens, known, name):
    """Of each row: cross-entropy with its token, KL divergence, and the divergence that is minimised."""
    logits = logits.float()
    ce = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    if known is None:
        return ce, torch.zeros_like(ce), torch.zeros_like(ce)
    of = events(logits, *known)
    minimised = divergence(name, *of)
    with torch.no_grad():
        kl = divergence("kl", *of)
    return ce, kl, minimised


def state_distances(states, mapping, full_states):
    """Mean square distance of the mapped states from the full model's, whose mean square is made 1."""
    full_states = full_states.float()
    full_states = full_states / full_states.pow(2).mean(-1, keepdim=True).sqrt()
    return (mapping(states).float() - full_states).pow(2).mean(-1)


def rate(step, steps, peak, warmup, last):
    """Learning rate of a step, counted from 0: a linear rise, then half a cosine."""
    rise = min(math.ceil(torch.tensor(warmup, dtype=torch.float32).item() * steps - 1e-6), steps)
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(steps - rise, 1)
    return peak * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done)))
