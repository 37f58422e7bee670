"""Perplexity of texts under a causal language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from safegen.core.errors import FileError, first_line
from safegen.core.hashing import hash_tensors
from safegen.core.quiet import silence_libraries

MAX_TOKENS = 512
"""Most tokens of a text that are read."""


class CausalPerplexity:
    """Causal language model of a local folder, in the format of transformers."""

    def __init__(self, folder: Path) -> None:
        """Load the model and its tokenizer; no code of the folder is run.

        Raises:
            FileError: there is no such folder, or it cannot be read.
        """
        if not folder.is_dir():
            raise FileError(f"there is no folder {str(folder)!r} with a causal language model")
        try:
            with silence_libraries("transformers"):
                self._tokenizer = AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False
                )
                model = AutoModelForCausalLM.from_pretrained(
                    str(folder),
                    dtype=torch.float32,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                )
        except Exception as error:  # transformers and safetensors raise a dozen types
            raise FileError(
                f"{folder} cannot be read as a causal language model: {first_line(error)}"
            ) from error
        self._model = model.eval().requires_grad_(False)
        positions = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
        self._length = min(positions - 1, MAX_TOKENS)
        self.id = f"{folder.resolve().name}:{hash_tensors(model.state_dict())[:16]}"
        """Name of the folder, and a hash of the weights."""

    def perplexities(self, texts: Sequence[str]) -> list[float | None]:
        """Return exp(mean negative log-likelihood of the tokens) of each text.

        A start mark (`bos`, else `eos`) stands before the text; without one the first token is not
        counted. A text without a counted token, or with a perplexity that is not finite, has None.
        """
        return [self._perplexity(text) for text in texts]

    def _perplexity(self, text: str) -> float | None:
        tokenizer = self._tokenizer
        ids = tokenizer(text, add_special_tokens=False).input_ids[: self._length]
        mark = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        row = torch.tensor([([] if mark is None else [mark]) + list(ids)], dtype=torch.long)
        if row.shape[1] < 2:
            return None
        logits = self._model(row).logits[0, :-1].float()
        value = math.exp(min(float(cross_entropy(logits, row[0, 1:])), 700.0))
        return value if math.isfinite(value) and value < 1e30 else None
