"""The score `contains` of `overfill eval`, for lm-evaluation-harness."""

import re
import string


def words(text):
    kept = "".join(c for c in text.lower() if c not in string.punctuation + "‐‑‒–—―‘’‚‛“”„‟…")
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def stands_in(right, answer):
    right, answer = words(right), words(answer)
    return bool(right) and any(answer[i : i + len(right)] == right for i in range(len(answer) - len(right) + 1))


def contains(doc, results):
    return {"contains": float(any(stands_in(right, results[0]) for right in doc["answers"]))}
