"""Learned words of textual inversion, active while a context manager is open."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from safegen.core.errors import ConfigError, FileError
from safegen.core.hashing import hash_tensors
from safegen.core.tensor_files import read_tensors, write_tensors
from safegen.models.model import Model
from safegen.models.text_encoder import clip_encoders

WORD = r"<[a-z0-9][a-z0-9-]{0,30}>"
"""Pattern of a learned word, as in `<concept>`."""


ENCODERS = ("clip_l", "clip_g")
"""Names of the vectors for two text encoders, as SDXL's textual inversions have them."""


def read_word(path: Path) -> tuple[str, tuple[Tensor, ...]]:
    """Return the word and the vectors (n, width) for each text encoder in a file.

    Vectors for one encoder are named like the word. Those for two are named as in SDXL's files,
    which do not name the word: it is that of the file, <concept> for concept.safetensors.

    Raises:
        FileError: the file cannot be read, or is not one word with finite vectors.
    """
    tensors, _ = read_tensors(path)
    if set(tensors) == set(ENCODERS):
        word, vectors = f"<{path.stem}>", [tensors[name] for name in ENCODERS]
    elif len(tensors) == 1:
        word, vectors = next(iter(tensors)), list(tensors.values())
    else:
        raise FileError(f"{path} must hold one learned word, got {len(tensors)} tensors")
    if not re.fullmatch(WORD, word):
        raise FileError(f"{path} must name its word like <concept>, got {word[:40]!r}")
    vectors = [value[None] if value.ndim == 1 else value for value in vectors]
    for value in vectors:
        is_finite = value.is_floating_point() and bool(value.isfinite().all())
        if value.ndim != 2 or len(value) != len(vectors[0]) or not is_finite:
            shape = tuple(value.shape)
            raise FileError(f"{path} must hold finite vectors (n, width), got shape {shape}")
    return word, tuple(value.float() for value in vectors)


def write_word(path: Path, word: str, vectors: Sequence[Tensor]) -> None:
    """Write a word's vectors (n, width) for each text encoder; see `read_word`."""
    values = [value.detach().float().cpu() for value in vectors]
    names = (word,) if len(values) == 1 else ENCODERS
    write_tensors(path, dict(zip(names, values, strict=True)), {})


def hash_word(path: Path) -> str:
    """Return the SHA-256 over the word and the vectors of a textual-inversion file."""
    word, vectors = read_word(path)
    names = (word, *(f"{word}.{name}" for name in ENCODERS[1:]))
    return hash_tensors(dict(zip(names, vectors, strict=False)), dtype=torch.float32)


@contextmanager
def learned_words(model: Model, files: Sequence[Path]) -> Iterator[None]:
    """Give a model the words of textual-inversion files, and take them away afterwards.

    Raises:
        FileError: a file cannot be read, or has vectors of another width or for other encoders.
        ConfigError: the model takes no words, or two files have one word.
    """
    if not files:
        yield
        return
    words: dict[str, Sequence[Tensor]] = {}
    for path in files:
        word, vectors = read_word(path)
        if word in words:
            raise ConfigError(f"words must differ, got {word} in two files")
        words[word] = vectors
    with added_words(model, words):
        yield


def check_takes_words(model: Model) -> None:
    """Check that a model's pipeline can read learned words.

    Raises:
        ConfigError: it is one of SD 3, for which diffusers has no textual inversion.
    """
    if not hasattr(model.pipeline, "load_textual_inversion"):
        raise ConfigError(
            "learned words need a pipeline of diffusers with textual inversion, got "
            f"{type(model.pipeline).__name__}. Use another model."
        )


@contextmanager
def added_words(model: Model, words: Mapping[str, Sequence[Tensor]]) -> Iterator[None]:
    """Give a model some words, and take them away afterwards; nothing else of it changes.

    T5 reads a word as plain text.

    Args:
        model: the model.
        words: vectors (n, width) for each CLIP text encoder, by word.

    Raises:
        FileError: vectors have another width than a text encoder, or are for other encoders.
        ConfigError: the model takes no words.
    """
    check_takes_words(model)
    pipe, views = model.pipeline, clip_encoders(model.pipeline)
    tables = [view.encoder.get_input_embeddings() for view in views]
    sizes = [view.encoder.config.vocab_size for view in views]
    for word, vectors in words.items():
        _check_width(model, word, vectors, [table.weight.shape[1] for table in tables])
    try:
        for number, view in enumerate(views):
            tokenizer = copy.deepcopy(view.tokenizer)
            setattr(pipe, view.tokenizer_name, tokenizer)
            view.encoder.set_input_embeddings(copy.deepcopy(tables[number]))
            for word, vectors in words.items():
                pipe.load_textual_inversion(
                    {word: vectors[number].to(tables[number].weight)},
                    text_encoder=view.encoder,
                    tokenizer=tokenizer,
                )
        yield
    finally:
        for view, table, size in zip(views, tables, sizes, strict=True):
            setattr(pipe, view.tokenizer_name, view.tokenizer)
            view.encoder.set_input_embeddings(table)
            view.encoder.config.vocab_size = size


def _check_width(model: Model, word: str, vectors: Sequence[Tensor], widths: Sequence[int]) -> None:
    """Check that a word has vectors for the text encoders of a model, of these widths."""
    if len(vectors) != len(widths):
        raise FileError(
            f"{word} must have vectors for {len(widths)} CLIP text encoders of {model.name!r}, got "
            f"{len(vectors)}. Learn it on this model."
        )
    for value, width in zip(vectors, widths, strict=True):
        if value.shape[1] != width:
            raise FileError(
                f"vectors of {word} must have {width} values for {model.name!r}, "
                f"got {value.shape[1]}"
            )
