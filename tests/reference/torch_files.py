"""Makes tests/fixtures/torch: files that PyTorch wrote, and what they hold: see README.md.

    torch_files.py                       makes the fixtures
    torch_files.py --shapes FOLDER [N]   writes a checkpoint of the shapes of Llama 3.1 8B and 3.2 3B with N layers (1), to be measured
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

import two_models
from make_fixtures import GREEDY, check_with_transformers, worth_testing, write_json

OUT = Path(__file__).parent.parent / "fixtures" / "torch"
VOCABULARY = 48

TEACHER = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
STUDENT = TEACHER | {"hidden_size": 16, "intermediate_size": 20}
# Name: (teacher, student, numbers, shards, {name: (transform as we call it, the keywords of the class that was saved)}).
CHECKPOINTS = {
    "identity": (
        TEACHER | {"tie_word_embeddings": True},
        STUDENT,
        torch.bfloat16,
        1,
        {"identity": ("identity", {"embedding_transform_strategy": "kv_identity"})},
    ),
    "prune": (
        TEACHER,
        STUDENT | {"num_hidden_layers": 2},
        torch.float16,
        1,
        {
            f"prune-{strategy}": (
                f"prune:{strategy}",
                {"embedding_transform_strategy": "kv_prune", "depth_prune_ratio": 0.3, "depth_prune_strategy": strategy},
            )
            for strategy in ("firstlast", "first", "last")
        },
    ),
    "projection": (
        TEACHER,
        STUDENT | {"num_hidden_layers": 2, "head_dim": 6},
        torch.bfloat16,
        2,
        {"projection": ("projection", {"embedding_transform_strategy": "kv_proj_layer"})},
    ),
}
# What the class says of itself besides where it saves its keywords.
DEFAULTS = {"freeze_strategy": "teacher", "refresh_interval": -1, "depth_prune_ratio": 0.0, "depth_prune_strategy": "firstlast"}


class TwoStage(nn.Module):
    """Named as the authors' class names its parts."""

    def __init__(self, teacher, student, projections):
        super().__init__()
        self.teacher = teacher
        self.student = student
        rows = [config.num_key_value_heads * config.head_dim for config in (teacher.config, student.config)]
        layers = student.config.num_hidden_layers
        self.embedding_proj = nn.ModuleList(nn.Linear(*rows) for _ in range(layers)) if projections else None


def main():
    torch.manual_seed(811)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    make_tensors()
    make_plain()
    for name, said in CHECKPOINTS.items():
        make_checkpoint(name, *said)
    make_fp8()
    print(f"{sum(f.stat().st_size for f in OUT.rglob('*') if f.is_file()) / 1e3:.0f} kB in {OUT}")


def make_tensors():
    """Tensors that lie in their storages in every way that weights do, and the same one number after the other."""
    base = torch.randn(6, 10).bfloat16()
    other = torch.randn(5, 4, 3)
    tensors = {
        "whole": base,
        "transposed": base.T,
        "rows": base[2:5],
        "columns": base[:, 3:7],
        "every.second": base[::2, 1::3],
        "the.same": base,
        "parameter": nn.Parameter(torch.randn(7).half()),
        "permuted": other.permute(2, 0, 1),
        "one": torch.tensor(1.5),
        "none": torch.zeros(0, 4),
    }
    torch.save(tensors, OUT / "tensors.bin")
    torch.save(tensors, OUT / "tensors-protocol-4.bin", pickle_protocol=4)
    torch.save(tensors, OUT / "tensors-old.bin", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.arange(3)}, OUT / "tensors-whole-numbers.bin")
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, OUT / "tensors.safetensors")


def llama(config, dtype):
    """Random weights with large deviations, so that logits vary and errors show."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config), attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        weight.data = 0.5 + torch.rand_like(weight) if "norm" in name else torch.randn_like(weight) * 1.6 / weight.shape[-1] ** 0.5
    return model.to(dtype)


def write_state(state, folder, shards=1):
    """As transformers names the files."""
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    files = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    places = {name: files[i * shards // len(state)] for i, name in enumerate(state)}
    for file in files:
        torch.save({name: tensor for name, tensor in state.items() if places[name] == file}, folder / file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places})


@torch.no_grad()
def make_plain():
    """A model alone, in shards, and what transformers makes of a prompt."""
    folder = OUT / "plain"
    folder.mkdir()
    config = STUDENT | {"num_hidden_layers": 2}
    model = llama(config, torch.float32)
    write_state(model.state_dict(), folder, 2)
    write_json(folder / "config.json", config)
    prompt = torch.randint(VOCABULARY, (9,))
    save_file({"prompt": prompt, "logits": model(prompt[None]).logits[0]}, folder / "logits.safetensors")


@torch.no_grad()
def make_checkpoint(name, teacher, student, dtype, shards, transforms):
    folder = OUT / name
    folder.mkdir()
    answers = {}
    while len(answers) < len(transforms):
        both = TwoStage(llama(teacher, dtype), llama(student, dtype), name == "projection").to(dtype)
        for kind, (transform, _) in transforms.items():
            answers[kind] = answer(both, transform, teacher, student)
        answers = {kind: tensors for kind, tensors in answers.items() if tensors}
    state = both.state_dict()
    write_state(state, folder, shards)
    write_json(folder / "teacher.json", teacher)
    write_json(folder / "student.json", student)
    for kind, (transform, keywords) in transforms.items():
        write_json(folder / f"{kind}.json", {"kv": transform, "config": DEFAULTS | keywords})
        save_file(answers[kind], folder / f"{kind}.safetensors")


def answer(both, transform, teacher, student):
    """Greedy answers of the two-model path in float32, checked with transformers' models; none where tokens are not far apart."""
    full, decode = (two_models.Llama(model.state_dict(), config) for model, config in ((both.teacher, teacher), (both.student, student)))
    proj = both.embedding_proj or []
    projection = {f"embedding_proj.{i}.{kind}": getattr(p, kind).float() for i, p in enumerate(proj) for kind in ("weight", "bias")}
    tensors = {}
    for i, length in enumerate((1, 23)):
        for _ in range(50):
            prompt = torch.randint(VOCABULARY, (length,)).tolist()
            tokens, logits = two_models.generate(full, decode, transform, projection, prompt, GREEDY)
            if worth_testing(tokens, logits):
                break
        else:
            return None
        plain = [type(model)(model.config).eval() for model in (both.teacher, both.student)]
        for to, model in zip(plain, (both.teacher, both.student)):
            to.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
        check_with_transformers(*plain, decode, transform, projection, prompt, tokens, logits)
        tensors |= {f"prompt.{i}": torch.tensor(prompt), f"tokens.{i}": torch.tensor(tokens)}
    return tensors


# Name: (quantization_config, what scales are called, the shape of a matrix's scales).
FP8 = {
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", lambda rows, columns: ()),
    "fp8-row": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "weight_scale", lambda rows, columns: (rows, 1)),
    "fp8-blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 16]},
        "weight_scale_inv",
        lambda rows, columns: (-(-rows // 8), -(-columns // 16)),
    ),
    "fp8-compressed": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
                    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
                }
            },
        },
        "weight_scale",
        lambda rows, columns: (rows, 1),
    ),
}


def make_fp8():
    """One layer whose matrices are eight-bit floats, and what PyTorch says that they are times their scales."""
    config = STUDENT | {"num_hidden_layers": 1, "vocab_size": 16, "intermediate_size": 20}
    for name, (said, called, shape) in FP8.items():
        folder = OUT / name
        folder.mkdir()
        stored, meant = {}, {}
        for weight, numbers in llama(config, torch.bfloat16).state_dict().items():
            stored[weight] = numbers
            if "_proj" not in weight:
                continue
            rows, columns = numbers.shape
            scale = (0.001 + torch.rand(shape(rows, columns))).to(torch.bfloat16 if "row" in name else torch.float32)
            spread = scale.float()
            if called == "weight_scale_inv":
                spread = spread.repeat_interleave(8, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
            stored[weight] = (torch.randn(rows, columns) * 100).to(torch.float8_e4m3fn)
            stored[weight.replace("weight", called)] = scale
            if "static" in said.values():
                stored[weight.replace("weight", "input_scale")] = torch.tensor(0.01)
            meant[weight] = stored[weight].float() * spread
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(meant, folder / "meant.safetensors")
        write_json(folder / "config.json", config | {"quantization_config": said})


def write_shapes(folder, layers):
    """Weights of no meaning in the shapes of the authors' largest release: an 8B that a 3B, pruned in width, decodes for."""
    folder.mkdir(parents=True)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    eight = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": rope,
        "tie_word_embeddings": False,
    }
    three = eight | {"hidden_size": 2334, "intermediate_size": 8171}
    state = {}
    for prefix, config in (("teacher", eight), ("student", three)):
        hidden, mlp = config["hidden_size"], config["intermediate_size"]
        q, kv = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
        shapes = {"model.embed_tokens": (128256, hidden), "model.norm": (hidden,), "lm_head": (128256, hidden)}
        for i in range(layers):
            layer = {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (q, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, q),
                "mlp.gate_proj": (mlp, hidden),
                "mlp.up_proj": (mlp, hidden),
                "mlp.down_proj": (hidden, mlp),
            }
            shapes |= {f"model.layers.{i}.{module}": shape for module, shape in layer.items()}
        state |= {f"{prefix}.{name}.weight": torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    torch.save(state, folder / "pytorch_model.bin")
    tokenizer = {"model": {"type": "BPE", "vocab": {}, "merges": []}}
    for part, config in (("teacher", eight), ("student", three)):
        (folder / part).mkdir()
        write_json(folder / part / "config.json", config)
        write_json(folder / part / "tokenizer.json", tokenizer)
    write_json(folder / "config.json", DEFAULTS | {"embedding_transform_strategy": "kv_identity"})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--shapes"]:
        write_shapes(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    else:
        main()
