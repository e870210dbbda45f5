"""Training decode models that are too large for a CPU: `overfill train`'s losses, data and order in PyTorch, on many GPUs.

    PYTHONPATH=scripts torchrun --nproc-per-node 8 -m train_torch --full big/ --init small/ --data train.jsonl --out run/

docs/training.md tells how it is used; `check.py` compares it with `overfill train`, step by step.
"""
