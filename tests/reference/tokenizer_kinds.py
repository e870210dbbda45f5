"""Small tokenizers of the kinds that models have, each as a folder's files and as a GGUF file, and what the reference library
makes of ten thousand odd texts. Needs tokenizers, sentencepiece, gguf and numpy, no PyTorch:

    python3 tests/reference/tokenizer_kinds.py                      # writes tests/fixtures/tokenizers
    python3 tests/reference/tokenizer_kinds.py --show llama-2 4711  # a text, its tokens, and what they are decoded to
    python3 tests/reference/tokenizer_kinds.py --texts kind.json    # the texts as a list, for others to tokenise
    python3 tests/reference/tokenizer_kinds.py --compare llama-2 ids.json  # lists of ids of others, without the first token

Their vocabularies are trained here; all else (expressions, normalizers, decoders, special tokens and what stands before a text) is
what the published tokenizers of each kind have.
"""

import argparse
import hashlib
import io
import json
import random
import sys
import unicodedata
from pathlib import Path

import gguf
import numpy
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

OUT = Path(__file__).parent.parent / "fixtures" / "tokenizers"
TEXTS = 10_000
VOCABULARY = 600

WORDS = """the of and to in is that it was for on are with as his they be at one have this from or had by hot but some what there we
can out other were all your when up use word how said an each she which do their time if will way about many then them would write
like so these her long make thing see him two has look more day could go come did my sound no most number who over know water than
call first people may down side been now find any new work part take get place made live where after back little only round man year
came show every good me give our under name very through just form much great think say help low line before turn cause same mean
differ move right boy old too does tell sentence set three want air well also play small end put home read hand port large spell add"""
PROSE = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps; isn't that what foxes do? They'd say so. We'll see, I'm sure.",
    "In 2024 there were 1,234,567 of them: 12 of 100, or 3.14 in 42. On 2024-11-29 at 23:59 it was 99999999 and 1000 more.",
    "def read(path):\n    with open(path) as file:\n        return [line.strip() for line in file if line != '']\n\n\n",
    "fn main() {\n\tlet mut all = Vec::new();\n\tfor i in 0..10 { all.push(i * 2); }\n\tprintln!(\"{:?}\", all);\n}\n",
    "if (a[i] == b[j] && c != null) { return x->y + z--; } // done\n/* and more */\n<div class=\"a\">text</div>\n",
    "Tiếng Việt có sáu thanh điệu. Hà Nội là thủ đô của nước Việt Nam, phở bò là món ăn được nhiều người yêu thích.",
    "漢字とひらがなとカタカナを使います。日本語の文章です。中文没有空格，标点符号也不同。你好，世界！",
    "한국어는 띄어쓰기가 있습니다. 안녕하세요, 세계!",
    "Привет, мир! Это предложение на русском языке, и в нём есть числа: 1, 2, 3.",
    "مرحبا بالعالم. هذه جملة باللغة العربية. שלום עולם, זה משפט בעברית.",
    "नमस्ते दुनिया। यह हिन्दी का एक वाक्य है। สวัสดีชาวโลก นี่คือประโยคภาษาไทย",
    "Ångström, naïve café, Straße, señor, çok güzel, žluťoučký kůň, Łódź, œuvre — “quoted” … ‘so’",
    "🦀 😀 👍 🎉 ☕ ❤️ 🚀 emoji 😀😀 and 👩‍👩‍👧 🇫🇷",
]


def corpus():
    """What vocabularies are trained on: sentences of drawn words between the prose."""
    draw = random.Random(1)
    words = WORDS.split()
    lines = []
    for _ in range(300):
        sentence = " ".join(draw.choices(words, weights=[1 / (i + 5) for i in range(len(words))], k=draw.randint(4, 12)))
        lines.append(sentence[0].upper() + sentence[1:] + draw.choice([".", "?", "!", "...", ", she said."]))
    return lines + PROSE * 6


def pieces(special):
    """What texts are put together of."""
    draw = random.Random(2)
    all_pieces = [
        *[" ", "  ", "   ", "    ", "       ", " " * 17, " " * 40, "\t", "\t\t", " \t ", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", " \n", "\n ", "\n    ", "\r"],
        *["\u00a0", "\u2003", "\u2009", "\u200a", "\u200b", "\u200c", "\u200d", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\u1680", "\u180e", "\u0085", "\u000b", "\u000c", "\ufeff"],
        *["\u0000", "\u0001", "\u0007", "\u001b[0m", "\u007f", "\u0080", "\u009f", "\u00ad", "\ufffd", "\ufffe", "\ue000", "\U000f0000", "\U0010ffff"],
        *["a", "I", "the", " the", "The", " THE", "hello", " Hello", "world", " wOrLd", "isn't", "I'm", "they'd", "WE'LL", "'s", "'S", "'re", "'VE", "'t", " 'm", "'ll'll", "''", "’s", "'ſ", "'ﬅ", "'ıs", "ſ", "K", "Å"],
        *["snake_case_name", "camelCaseName", "HTTPServer", "kebab-case", "x1y22z333", "__init__", "v2.0.1", "C++", "e.g.", "...", "?!", "!!!", "---", "===", "((", "))", "[]", "{}", "\"", "'", "`", "```", "\\", "\\n", "/", "//", "#", "@", "$", "%", "^", "&", "*", "~", "|", "<", ">", "<>", "</", "=>", "->", "::", ";", ":", ",", ".", " ,", " .", "_", "-", "+", "="],
        *["0", "1", "7", "12", "123", "1234", "12345", "1234567", " 42", "3.14", "1,000,000", "-1", "1e-5", "0x1F", "2024-11-29", "23:59", "٣٤٥", "५६७", "１２３", "½", "²³", "①②", "Ⅳ", "〇", "𝟘𝟙", "൧൨൩", "᠐"],
        *["def f(x):\n    return x\n", "for (int i = 0; i < n; i++) {", "}\n\n", "\t\treturn None\n", "print(\"hi\")", "// note\n", "<div class=\"a\">", "</div>", "a[i] += 1;", "SELECT * FROM t;", "https://example.org/a?b=c&d=%20#e", "user@example.org", "$x^2$", "<b>", "<i>", "</table>", "<h1>"],
        *["Tiếng Việt", " được", "người", "phở bò", " Hà Nội", "đ", "ệ", "ữ", "nghiêng", "Nguyễn"],
        *[unicodedata.normalize("NFD", text) for text in ["Tiếng Việt", " được", "người", "ệ", "Ångström", "é", " ñ", "한국어", "ű"]],
        *["e\u0301\u0323", "a\u0323\u0302", "\u0301", "\u0308\u0308", " \u0301", "x\u0338", "q\u0307\u0323", "\u0344", "\u1e9b\u0323", "ﬁ", "ǆ", "\u212b", "\u2126", "\u0958", "\u0f73", "\u1100\u1161\u11a8", "\u11a8", "Z͑ͫ̓a̴l̵g̶o̷"],
        *["漢字", "ひらがな", "カタカナ", "ﾊﾝｶｸ", "中文", "，", "。", "「」", "你好，世界！", "𠮷野家", "豈", "㍿", "々", "한국어", " 안녕", "ㄱㄴ", "ᄀᄁ"],
        *["Привет", " мир", "ёлка", "Ελλάδα", "ς", "مرحبا", "لَا", "ـ", "שלום", "שָׁ", "नमस्ते", "क्ष", "हिन्दी", "สวัสดี", "กำ", "မြန်မာ", "ქართული", "Հայ", "አማርኛ", "ᏣᎳᎩ", "ᓄᓇᕗᑦ", "İ", "ı", "ß", "ẞ", "Œ", "ø", "Ł", "ž", "ñ", "ü", "çok"],
        *["🦀", " 😀", "😀😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "🇻🇳🇯🇵", "☕", "☕️", "❤️", "✈︎", "1️⃣", "#️⃣", "🫠", "🪿", "\ufe0f", "🏽", "♂", "→", "∑", "√2", "€", "£5", "°C", "©", "™", "…", "—", "–", "“", "”", "«»", "•", "█", "╬", "⠿", "𝒳", "𝔘𝔫𝔦", "Ｆｕｌｌ", "ａ"],
        *["▁", "▁the", "▁▁", "Ġ", "Ġthe", "Ċ", "##ing", "</w>", "<0x0A>", "<0xE9>", "<unk>", "[UNK]", "[PAD]", "[PAD3]"],
        *["<|im_", "start|>", "<s", "s>", "[INST", "/INST]", "<|eot_id", "<start_of", "_turn>", "<|", "|>", "<bo", "s> "],
    ]
    all_pieces += special
    kinds = {"L": 90, "M": 30, "N": 25, "P": 25, "S": 25}
    for kind, count in kinds.items():
        of_kind = [chr(c) for c in range(0xA0, 0x20000) if unicodedata.category(chr(c))[0] == kind]
        all_pieces += draw.sample(of_kind, count)
    all_pieces += [draw.choice(["", " "]) + draw.choice(WORDS.split()) + draw.choice(["", "", "ed", "ing", "s"]) for _ in range(60)]
    all_pieces += ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzABCDE ", k=draw.randint(3, 9))) for _ in range(30)]
    return list(dict.fromkeys(all_pieces))


def splitmix(state):
    """Numbers of 64 bits, as the test draws them too."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & (2**64 - 1)
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        yield z ^ (z >> 31)


def text(parts, index):
    """The first texts are the pieces, the others of one to eight of them."""
    if index < len(parts):
        return parts[index]
    draw = splitmix(index)
    return "".join(parts[next(draw) % len(parts)] for _ in range(1 + next(draw) % 8))


GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = GPT4.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(expression):
    return [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


# Words that are tokens, though no merges lead to them.
WHOLE = ["Ġwhole", "tokenizer", "ĠÄ", "1234"]
BYTE_LEVEL = {
    "llama-3": {
        "pre": "llama-bpe",
        "steps": split(GPT4),
        "ignore_merges": True,
        "first": "<|begin_of_text|>",
        "special": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"],
        "config": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True},
    },
    "qwen2.5": {
        "pre": "qwen2",
        "steps": split(QWEN2),
        "normalizer": normalizers.NFC(),
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "more": ["<tool_call>", "</tool_call>", "<|fim_prefix|>"],
        "config": {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>"},
    },
    "smollm2": {
        "pre": "smollm",
        "steps": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"],
        "config": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    },
    "mistral-tekken": {
        "pre": "tekken",
        "steps": split(TEKKEN),
        "ignore_merges": True,
        "first": "<s>",
        "special": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]"],
        "config": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
    },
}
SPACES = ["▁" * n for n in range(2, 17)]
NEWLINES = ["\n" * n for n in range(1, 8)]
TAGS = ["<table>", "</table>", "<h1>", "<b>", "<i>"]
SENTENCE_PIECE = {
    "llama-2": {"prefix": "always", "control": [], "config": {"legacy": False}},
    # Its third version: a text's beginning alone gets a space, not what follows a special token.
    "mistral": {
        "prefix": "first",
        "control": ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
        "config": {"legacy": False},
    },
    "gemma": {
        "prefix": None,
        "control": ["<start_of_turn>", "<end_of_turn>"],
        "defined": NEWLINES + SPACES + TAGS,
        "config": {"tokenizer_class": "GemmaTokenizer"},
    },
}
KINDS = [*SENTENCE_PIECE, *BYTE_LEVEL]
FIRST = {"llama-2": "<s>", "mistral": "<s>", "gemma": "<bos>"}


def begins_with(token, tokenizer, *before):
    template = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))])
    return processors.Sequence([*before, template]) if before else template


def byte_level(kind):
    """Its tokenizer, and the file's values."""
    steps = pre_tokenizers.Sequence(kind["steps"])
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = steps
    if normalizer := kind.get("normalizer"):
        trained.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=VOCABULARY - 20, initial_alphabet=alphabet, limit_alphabet=256, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    if kind.get("ignore_merges"):
        for word in WHOLE:
            vocab.setdefault(word, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=kind.get("ignore_merges", False)))
    tokenizer.pre_tokenizer = steps
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in kind["special"]])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in kind.get("more", [])])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if first := kind.get("first"):
        tokenizer.post_processor = begins_with(first, tokenizer, processors.ByteLevel(trim_offsets=False))
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    types = [3 if token in kind["special"] else 4 if token in kind.get("more", []) else 1 for token in tokens]
    values = {"model": "gpt2", "pre": kind["pre"], "tokens": tokens, "types": types, "merges": [" ".join(merge) for merge in merges]}
    ends = {key: tokenizer.token_to_id(kind["config"][f"{key}_token"]) for key in ["bos", "eos"] if kind["config"][f"{key}_token"]}
    return tokenizer, {**values, **ends, "add_bos": bool(first)}


def sentence_piece(kind):
    """Its tokenizer, the file's values, and the library's own model."""
    gemma = kind["prefix"] is None
    names = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>", "pad_piece": "<pad>"} if gemma else {"pad_id": -1}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in corpus() for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY + (40 if gemma else 0),
        character_coverage=0.99,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=not gemma,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=kind["control"],
        user_defined_symbols=kind.get("defined", []),
        num_threads=1,
        minloglevel=2,
        **names,
    )
    own = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = own.get_piece_size()
    tokens, scores = [own.id_to_piece(i) for i in range(size)], [own.get_score(i) for i in range(size)]
    types = [
        2 if own.is_unknown(i) else 6 if own.is_byte(i) else 3 if own.is_control(i) else 4 if tokens[i] in kind.get("defined", []) else 1
        for i in range(size)
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    # All ways to make a piece of two, as transformers orders them: by score, then the longer first part.
    merges = []
    for piece, score in zip(tokens, scores):
        ways = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        merges += [(score, *way) for way in sorted(ways, key=lambda way: (vocab[way[0]], vocab[way[1]]))]
    merges.sort(key=lambda m: (m[0], len(m[1]), len(m[2])), reverse=True)
    tokenizer = Tokenizer(models.BPE(vocab, [merge[1:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind["prefix"] == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(back if gemma else [*back, decoders.Strip(" ", 1, 0)])
    for token, type_ in zip(tokens, types):
        if type_ in (2, 3, 4):
            tokenizer.add_tokens([AddedToken(token, special=type_ != 4, normalized=False)])
    bos, eos = ("<bos>", "<eos>") if gemma else ("<s>", "</s>")
    tokenizer.post_processor = begins_with(bos, tokenizer)
    # What converts to GGUF writes user-defined pieces with spaces, and gives them the worst of scores.
    defined = [type_ == 4 for type_ in types]
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": [token.replace("▁", " ") if d else token for token, d in zip(tokens, defined)],
        "types": types,
        "scores": [-1000.0 if d else score for score, d in zip(scores, defined)],
        "bos": vocab[bos],
        "eos": vocab[eos],
        "unknown": vocab["<unk>"],
        "add_bos": True,
    }
    if gemma:
        values["add_space_prefix"] = False
    return tokenizer, values, own


def config(name):
    if name in BYTE_LEVEL:
        return BYTE_LEVEL[name]["config"]
    bos, eos = ("<bos>", "<eos>") if name == "gemma" else ("<s>", "</s>")
    known = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": bos, "eos_token": eos}
    return {**known, "unk_token": "<unk>", **SENTENCE_PIECE[name]["config"]}


def write_gguf(values, path):
    """A vocabulary, and the smallest of models."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(2)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(2)
    writer.add_vocab_size(len(values["tokens"]))
    writer.add_tokenizer_model(values["model"])
    writer.add_tokenizer_pre(values["pre"])
    writer.add_token_list(values["tokens"])
    writer.add_token_types(values["types"])
    if "scores" in values:
        writer.add_token_scores(values["scores"])
    if "merges" in values:
        writer.add_token_merges(values["merges"])
    for key, add in [("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unknown", writer.add_unk_token_id)]:
        if key in values:
            add(values[key])
    writer.add_add_bos_token(values["add_bos"])
    if "add_space_prefix" in values:
        writer.add_add_space_prefix(values["add_space_prefix"])
    of_layer = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    shapes = {"token_embd": (len(values["tokens"]), 2), **{f"blk.0.{name}": (2, 2) for name in of_layer}}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numpy.zeros(shape, dtype=numpy.float16))
    for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]:
        writer.add_tensor(f"{name}.weight", numpy.ones(2, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def all_special():
    of_bytes = [token for kind in BYTE_LEVEL.values() for token in kind["special"] + kind.get("more", [])]
    of_pieces = [token for kind in SENTENCE_PIECE.values() for token in kind["control"]]
    return [*of_bytes, *of_pieces, "<s>", "</s>", "<bos>", "<eos>", "<pad>"]


def digest(ids, decoded):
    """Two bytes of what says both."""
    return hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in ids) + decoded.encode()).digest()[:2]


def compare(name, tokenizer, texts, others, about):
    """How often others make other tokens, by whether there are special tokens in the text, with the first differences."""
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    wrong = []
    for i, (text_, theirs) in enumerate(zip(texts, others, strict=True)):
        ours = tokenizer.encode(text_, add_special_tokens=False).ids
        if theirs is not None and ours != theirs:
            wrong.append((i, text_, ours, theirs))
    plain = [w for w in wrong if not any(token in w[1] for token in special)]
    print(f"{name}: {about} makes other tokens of {len(wrong)} texts, of them {len(plain)} without added tokens")
    for i, text_, ours, theirs in (plain + [w for w in wrong if w not in plain])[:4]:
        print(f"  {i} {text_!r}\n    here  {[tokenizer.id_to_token(t) for t in ours]}\n    there {[tokenizer.id_to_token(t) for t in theirs]}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--show", nargs=2, metavar=("KIND", "INDEX"))
    parser.add_argument("--texts", metavar="FILE")
    parser.add_argument("--compare", nargs=2, metavar=("KIND", "FILE"))
    asked = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    parts = pieces(all_special())
    texts = [text(parts, i) for i in range(TEXTS)]
    if asked.show:
        tokenizer = Tokenizer.from_file(str(OUT / asked.show[0] / "tokenizer.json"))
        shown = texts[int(asked.show[1])]
        ids = tokenizer.encode(shown).ids
        return print(f"{shown!r}\n{ids}\n{[tokenizer.id_to_token(i) for i in ids]}\n{tokenizer.decode(ids)!r}")
    if asked.texts:
        return Path(asked.texts).write_text(json.dumps(texts))
    if asked.compare:
        name, file = asked.compare
        tokenizer = Tokenizer.from_file(str(OUT / name / "tokenizer.json"))
        return compare(name, tokenizer, texts, json.loads(Path(file).read_text()), file)
    (OUT / "pieces.json").write_text(json.dumps(parts, ensure_ascii=False) + "\n")
    for name in KINDS:
        own = None
        if name in BYTE_LEVEL:
            tokenizer, values = byte_level(BYTE_LEVEL[name])
        else:
            tokenizer, values, own = sentence_piece(SENTENCE_PIECE[name])
        folder = OUT / name
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps(config(name)) + "\n")
        write_gguf(values, folder / "vocabulary.gguf")
        encodings = [tokenizer.encode(t).ids for t in texts]
        (folder / "expected.bin").write_bytes(b"".join(digest(ids, tokenizer.decode(ids)) for ids in encodings))
        if own:
            # To the library special tokens are text like any other.
            special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
            theirs = [None if any(token in t for token in special) else own.encode(t) for t in texts]
            compare(name, tokenizer, texts, theirs, "sentencepiece")


if __name__ == "__main__":
    sys.exit(main())
