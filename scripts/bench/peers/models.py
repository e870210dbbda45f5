"""The model that is measured, as each engine takes it."""

import pathlib
import subprocess

FORMATS = ("q4_0", "q8_0")


def export(options, *arguments):
    subprocess.run([str(word) for word in (options.bin / "overfill", "export", "--model", source(options), *arguments)], check=True)


def source(options):
    """A GGUF file or a folder: the pair's full model, unless another one is named."""
    if options.model:
        return options.model
    return next(path for path in (options.pair / "full.gguf", options.pair / "full") if path.exists())


def gguf(options, layers):
    """A GGUF file whose layers are stored so."""
    file = pathlib.Path(options.work) / f"full-{layers}.gguf"
    if not file.exists():
        export(options, "--format", "gguf", "--quantise", layers, "--out", file)
    return file


def folder(options):
    """A folder as Hugging Face's transformers load it, in bfloat16."""
    made = pathlib.Path(options.work) / "full-bf16"
    if not made.exists():
        export(options, "--format", "hf", "--quantise", "bf16", "--out", made)
    return made
