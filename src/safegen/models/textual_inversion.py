"""Learned words of textual inversion, active while a context manager is open."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from safegen.core.errors import ConfigError, FileError
from safegen.core.hashing import hash_tensors
from safegen.core.tensor_files import read_tensors
from safegen.models.model import Model

WORD = r"<[a-z0-9][a-z0-9-]{0,30}>"
"""Pattern of a learned word, as in `<concept>`."""


def read_word(path: Path) -> tuple[str, Tensor]:
    """Return the word and the vectors (n, width) in a textual-inversion file.

    Raises:
        FileError: the file cannot be read, or is not one word with finite vectors.
    """
    tensors, _ = read_tensors(path)
    if len(tensors) != 1:
        raise FileError(f"{path} must hold one learned word, got {len(tensors)} tensors")
    word, vectors = next(iter(tensors.items()))
    if not re.fullmatch(WORD, word):
        raise FileError(f"{path} must name its word like <concept>, got {word[:40]!r}")
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2 or not vectors.is_floating_point() or not vectors.isfinite().all():
        shape = tuple(vectors.shape)
        raise FileError(f"{path} must hold finite vectors (n, width), got shape {shape}")
    return word, vectors.float()


def hash_word(path: Path) -> str:
    """Return the SHA-256 over the word and the vectors of a textual-inversion file."""
    return hash_tensors(dict([read_word(path)]), dtype=torch.float32)


@contextmanager
def learned_words(model: Model, files: Sequence[Path]) -> Iterator[None]:
    """Give a model the words of textual-inversion files, and take them away afterwards.

    Raises:
        FileError: a file cannot be read, or has vectors of another width.
        ConfigError: the model has two text encoders, or two files have one word.
    """
    if not files:
        yield
        return
    words: dict[str, Tensor] = {}
    for path in files:
        word, vectors = read_word(path)
        if word in words:
            raise ConfigError(f"words must differ, got {word} in two files")
        words[word] = vectors
    with added_words(model, words):
        yield


@contextmanager
def added_words(model: Model, words: dict[str, Tensor]) -> Iterator[None]:
    """Give a model some words, and take them away afterwards; nothing else of it changes.

    Args:
        model: the model.
        words: vectors (n, width) by word.

    Raises:
        FileError: vectors have another width than the text encoder.
        ConfigError: the model has two text encoders.
    """
    if "text_encoder_2" in model.components:
        raise ConfigError(f"learned words need one text encoder, got the SDXL {model.name!r}")
    pipe, encoder = model.pipeline, model.pipeline.text_encoder
    tokenizer, table, size = (
        pipe.tokenizer,
        encoder.get_input_embeddings(),
        encoder.config.vocab_size,
    )
    width = table.weight.shape[1]
    for word, vectors in words.items():
        if vectors.shape[1] != width:
            raise FileError(
                f"vectors of {word} must have {width} values for {model.name!r}, "
                f"got {vectors.shape[1]}"
            )
    try:
        pipe.tokenizer = copy.deepcopy(tokenizer)
        encoder.set_input_embeddings(copy.deepcopy(table))
        for word, vectors in words.items():
            pipe.load_textual_inversion({word: vectors.to(table.weight)})
        yield
    finally:
        pipe.tokenizer = tokenizer
        encoder.set_input_embeddings(table)
        encoder.config.vocab_size = size
