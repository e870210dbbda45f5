"""Makes tests/fixtures: see README.md."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast
from transformers.utils import logging

import two_models
from chat_templates import CHATS, TEMPLATES

OUT = Path(__file__).parent.parent / "fixtures"
VOCABULARY = 128

WIDE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# Widths that are multiples of 8 only, and a head size that is not hidden / heads.
TIED = WIDE | {
    "hidden_size": 48,
    "intermediate_size": 104,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
}
QWEN2 = WIDE | {
    "model_type": "qwen2",
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
# Name: (weights, config.json, in both spellings of the rotary embedding).
LOGITS = {
    "plain": ("wide", WIDE | {"rope_theta": 10000.0, "rope_scaling": None}),
    "llama3": ("wide", WIDE | {"rope_theta": 5000.0, "rope_scaling": LLAMA3}),
    "llama3-parameters": ("wide", WIDE | {"rope_parameters": LLAMA3 | {"rope_theta": 20000.0, "factor": 8.0}}),
    "linear": ("wide", WIDE | {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}),
    "tied": ("tied", TIED),
    "qwen2": ("qwen2", QWEN2),
}

FULL = WIDE | {
    "hidden_size": 48,
    "intermediate_size": 104,
    "num_hidden_layers": 5,
    "head_dim": 8,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}
NARROW = FULL | {"hidden_size": 40, "intermediate_size": 56}
# Fewer KV heads, of another size: a row of the cache has 12 values instead of 16.
PROJECTED = NARROW | {"num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 12}
# Kind of transform: (weights of the decode model, its config.json). A pruned model has the first layers of "narrow".
TWO_MODELS = {
    "identity": ("narrow", NARROW),
    "prune:firstlast": ("narrow", NARROW | {"num_hidden_layers": 3}),
    "prune:first": ("narrow", NARROW | {"num_hidden_layers": 3}),
    "prune:last": ("narrow", NARROW | {"num_hidden_layers": 3}),
    "projection": ("projected", PROJECTED),
}
GREEDY = 28


def main():
    torch.manual_seed(2508)
    torch.use_deterministic_algorithms(True)
    logging.set_verbosity_error()  # A pruned model leaves the file's last layers unread.
    logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    make_models()
    make_logits()
    make_two_models()
    make_chats()
    print(f"{sum(f.stat().st_size for f in OUT.rglob('*') if f.is_file()) / 1e6:.2f} MB in {OUT}")


def make_models():
    """Random weights with large deviations, so that logits vary and errors show. All but one are stored as bfloat16."""
    save_model("wide", LOGITS["plain"][1], torch.float32)
    save_model("tied", TIED)
    save_model("qwen2", QWEN2, shards=2)
    save_model("full", FULL)
    save_model("narrow", NARROW)
    save_model("projected", PROJECTED)
    full, decode = (c["num_key_value_heads"] * c["head_dim"] for c in (FULL, PROJECTED))
    projection = {}
    for i in range(PROJECTED["num_hidden_layers"]):
        projection[f"embedding_proj.{i}.weight"] = torch.randn(decode, full) * 0.3
        projection[f"embedding_proj.{i}.bias"] = torch.randn(decode) * 0.2
    save_file(projection, OUT / "models" / "projection.safetensors")


def random_weights(config):
    hidden, mlp, heads, kv_heads = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    head_dim = config.get("head_dim", hidden // heads)
    biases = config["model_type"] == "qwen2"
    weights = {}

    def matrix(name, outputs, inputs, bias=False):
        weights[f"{name}.weight"] = torch.randn(outputs, inputs) * 1.6 / inputs**0.5
        if bias:
            weights[f"{name}.bias"] = torch.randn(outputs) * 0.5

    def norm(name):
        weights[f"{name}.weight"] = 0.5 + torch.rand(hidden)

    matrix("model.embed_tokens", VOCABULARY, hidden)
    for layer in (f"model.layers.{i}" for i in range(config["num_hidden_layers"])):
        norm(f"{layer}.input_layernorm")
        matrix(f"{layer}.self_attn.q_proj", heads * head_dim, hidden, biases)
        matrix(f"{layer}.self_attn.k_proj", kv_heads * head_dim, hidden, biases)
        matrix(f"{layer}.self_attn.v_proj", kv_heads * head_dim, hidden, biases)
        matrix(f"{layer}.self_attn.o_proj", hidden, heads * head_dim)
        norm(f"{layer}.post_attention_layernorm")
        matrix(f"{layer}.mlp.gate_proj", mlp, hidden)
        matrix(f"{layer}.mlp.up_proj", mlp, hidden)
        matrix(f"{layer}.mlp.down_proj", hidden, mlp)
    norm("model.norm")
    if not config["tie_word_embeddings"]:
        matrix("lm_head", VOCABULARY, hidden)
    return weights


def save_model(name, config, dtype=torch.bfloat16, shards=1):
    folder = OUT / "models" / name
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(config).items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {name: names[i * shards // len(weights)] for i, name in enumerate(weights)}
    for file in names:
        save_file({n: t for n, t in weights.items() if places[n] == file}, folder / file, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_weights(name):
    weights = {}
    for file in sorted((OUT / "models" / name).glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def load_transformers(name, config):
    """The model as transformers loads it from a folder with this config.json, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(OUT / "models" / name, folder, dirs_exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return AutoModelForCausalLM.from_pretrained(
            folder, config=AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager"
        ).eval()


def prompts(*lengths):
    return [torch.randint(VOCABULARY, (length,)).tolist() for length in lengths]


@torch.no_grad()
def make_logits():
    folder = OUT / "logits"
    folder.mkdir()
    for name, (weights, config) in LOGITS.items():
        model = load_transformers(weights, config)
        tensors = {}
        for i, prompt in enumerate(prompts(1, 7, 40)):
            tensors[f"prompt.{i}"] = torch.tensor(prompt)
            tensors[f"logits.{i}"] = model(torch.tensor([prompt])).logits[0]
        save_file(tensors, folder / f"{name}.safetensors")
        write_json(folder / f"{name}.json", {"model": weights, "config": config})
        print(f"{name}: logits deviate by {tensors['logits.2'].std():.2f}")


@torch.no_grad()
def make_two_models():
    folder = OUT / "two_models"
    folder.mkdir()
    full = two_models.Llama(load_weights("full"), FULL)
    full_check = load_transformers("full", FULL)
    projection = load_file(OUT / "models" / "projection.safetensors")
    for kind, (weights, config) in TWO_MODELS.items():
        decode = two_models.Llama(load_weights(weights), config)
        decode_check = load_transformers(weights, config)
        tensors = {}
        for i, length in enumerate((1, 5, 37)):
            tokens, logits = [], torch.zeros(1, 2)
            while not worth_testing(tokens, logits):
                [prompt] = prompts(length)
                tokens, logits = two_models.generate(full, decode, kind, projection, prompt, GREEDY)
            check_with_transformers(full_check, decode_check, decode, kind, projection, prompt, tokens, logits)
            tensors |= {f"prompt.{i}": torch.tensor(prompt), f"tokens.{i}": torch.tensor(tokens), f"logits.{i}": logits}
        name = kind.replace(":", "-")
        layers = two_models.kept_layers(kind, full.layers, decode.layers)
        said = {"kv": kind, "layers": layers, "full": {"model": "full", "config": FULL}, "decode": {"model": weights, "config": config}}
        save_file(tensors, folder / f"{name}.safetensors")
        write_json(folder / f"{name}.json", said)


def worth_testing(tokens, logits):
    """Each token is clearly ahead of the next likely, and the answer does not go round in circles."""
    first, second = logits.topk(2).values.T
    return (first - second).min() > 0.02 and len(set(tokens)) > GREEDY / 2


def check_with_transformers(full, decode, plain, kind, projection, prompt, tokens, logits):
    """The reference itself is checked: transformers' models, the transformed cache put into theirs, say the same."""
    cache = DynamicCache()
    seen = [full(torch.tensor([prompt]), cache=cache).logits[0, -1]]
    rows = [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]
    cache = DynamicCache()
    for i, kv in enumerate(two_models.transform(kind, rows, plain, projection)):
        cache.update(*(x.transpose(0, 1)[None] for x in kv), i)
    for token in tokens[:-1]:
        seen.append(decode(torch.tensor([[token]]), cache=cache).logits[0, -1])
    difference = (torch.stack(seen) - logits).abs().max()
    assert difference < 1e-4, f"{kind}: the reference and transformers differ by {difference}"


def make_chats():
    """What transformers makes of a chat, or why the template refuses it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<s>": 0, "</s>": 1})), bos_token="<s>", eos_token="</s>")
    cases = []
    for name, template in TEMPLATES.items():
        for about, chat in CHATS.items():
            messages = [{"role": role, "content": content} for role, content in chat]
            try:
                text = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
                expected = {"text": text}
            except TemplateError as error:
                expected = {"refusal": str(error)}
            cases.append({"template": name, "chat": about, **expected})
    chats = {about: [{"role": role, "content": content} for role, content in chat] for about, chat in CHATS.items()}
    said = {"bos_token": "<s>", "eos_token": "</s>", "templates": TEMPLATES, "chats": chats, "expected": cases}
    write_json(OUT / "chat_templates.json", said)


if __name__ == "__main__":
    main()
