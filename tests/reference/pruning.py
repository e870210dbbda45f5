"""Makes tests/fixtures/pruning: see README.md. Needs the command `overfill`: `pruning.py path/to/overfill`."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM
from transformers.utils import logging

FIXTURES = Path(__file__).parent.parent / "fixtures"
OUT = FIXTURES / "pruning"
LENGTH, RUNS = 24, 40
# Name: (full model, flags of `overfill prune`).
CASES = {
    "minitron": ("wide", ["--method", "minitron", "--hidden", "40", "--intermediate", "56"]),
    "minitron-qwen2": ("qwen2", ["--method", "minitron", "--hidden", "48", "--intermediate", "72", "--kv-heads", "2"]),
    "depth": ("full", ["--method", "depth", "--keep", "firstlast", "--layers", "3"]),
    "pca": ("tied", ["--method", "pca", "--hidden", "32", "--intermediate", "72", "--fit", "overfill", "--format", "bf16"]),
    "pca-alone": ("full", ["--method", "pca", "--hidden", "40", "--intermediate", "80", "--kv-heads", "1", "--fit", "decode"]),
}


def main():
    torch.manual_seed(2508)
    logging.disable_progress_bar()
    OUT.mkdir(exist_ok=True)
    runs = torch.randint(0, 128, (RUNS, LENGTH))
    text = "\n".join(" ".join(str(t) for t in run) for run in runs.tolist())
    (OUT / "calibration.txt").write_text(text + "\n")
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(128)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(OUT / "tokenizer.json"))
    prompt = torch.randint(0, 128, (1, 20))
    said = {"prompt": prompt[0].tolist(), "length": LENGTH, "cases": {}}
    logits = {}
    for name, (model, flags) in CASES.items():
        said["cases"][name] = {"full": model, "flags": flags}
        with tempfile.TemporaryDirectory() as folder:
            full = Path(folder) / "full"
            full.mkdir()
            for file in (FIXTURES / "models" / model).iterdir():
                (full / file.name).write_bytes(file.read_bytes())
            tokenizer.save(str(full / "tokenizer.json"))
            if "minitron" in flags:
                said["cases"][name]["kept"] = kept(full, runs, flags)
            made = Path(folder) / "made"
            calibration = ["--calibration", str(OUT / "calibration.txt"), "--length", str(LENGTH), "--held-out", "0"]
            subprocess.run([sys.argv[1], "prune", "--full", full, "--out", made, *flags, *calibration], check=True)
            decode, info = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32, output_loading_info=True)
            assert not any(info.values()), info
            with torch.no_grad():
                logits[name] = decode(prompt).logits[0].contiguous()
    (OUT / "cases.json").write_text(json.dumps(said, indent=1) + "\n")
    save_file(logits, OUT / "logits.safetensors")


def kept(folder, runs, flags):
    """What the reference's importance keeps, from its definition: no code of ours takes part."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = {}

    def see(name, of):
        def hook(module, inputs, output):
            seen[name] = (inputs[0] if of == "input" else output).detach().mean(dim=1)

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(see((i, "first"), "output"))
        layer.post_attention_layernorm.register_forward_hook(see((i, "second"), "output"))
        layer.mlp.down_proj.register_forward_hook(see((i, "down"), "input"))
    with torch.no_grad():
        model(runs)
    layers = range(len(model.model.layers))
    channels = sum(seen[i, norm].abs() for i in layers for norm in ("first", "second")).norm(dim=0)
    width = lambda flag: int(flags[flags.index(flag) + 1])
    first = lambda importance, n: importance.argsort(descending=True)[:n].sort().values.tolist()
    return {
        "channels": first(channels, width("--hidden")),
        "neurons": [first(seen[i, "down"].norm(dim=0), width("--intermediate")) for i in layers],
    }


main()
