"""Tokens that a text attack searches: those of a model's CLIP text encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor

from safegen.core.errors import ConfigError
from safegen.models.families.conditioning import Conditioning
from safegen.models.model import Model
from safegen.models.text_encoder import clip_encoders, replaced_embeddings, replaced_ids

Replace = Callable[[int, Tensor, Tensor], Tensor]
"""Number of a text encoder, ids (n, length) and their embeddings (n, length, width) -> embeddings.

Gradients flow through the embeddings that it returns.
"""


class TextSpace:
    """Tokens of a model's CLIP text encoders, their texts, and what the denoiser reads of them.

    The CLIP encoders of a model have one vocabulary, so that one sequence of tokens is read by all
    of them. T5 has other tokens: it reads the text of the sequence, without a gradient.
    """

    def __init__(self, model: Model) -> None:
        """Read the vocabulary.

        Raises:
            ConfigError: the CLIP encoders have several vocabularies.
        """
        self.model, self.views = model, clip_encoders(model.pipeline)
        self.tokenizer = self.views[0].tokenizer
        vocabulary = self.tokenizer.get_vocab()
        if any(view.tokenizer.get_vocab() != vocabulary for view in self.views[1:]):
            raise ConfigError(
                f"CLIP text encoders must have one vocabulary for text attacks, got several in "
                f"{model.name!r}. Use an attack that searches no tokens."
            )
        self.encoders = [view.encoder for view in self.views]
        self.length: int = min(view.limit for view in self.views)
        self.device = model.device
        special = {i for view in self.views for i in view.tokenizer.all_special_ids}
        self.vocabulary = [i for i in range(len(self.tokenizer)) if i not in special]
        """Ids of all tokens that are no special ones."""

    def tables(self, tokens: Tensor) -> list[Tensor]:
        """Return the embeddings (v, width) of tokens (v,) in each encoder's table, in fp32."""
        tables = [encoder.get_input_embeddings().weight.detach() for encoder in self.encoders]
        return [table[tokens.to(table.device)].float() for table in tables]

    def rows(self, tokens: Tensor) -> Tensor:
        """Return rows (n, length) of ids: start mark, `tokens` (n, k), end mark and padding."""
        tokenizer, n = self.tokenizer, len(tokens)
        rows = torch.full((n, self.length), tokenizer.pad_token_id, dtype=torch.long)
        rows[:, 0] = tokenizer.bos_token_id
        rows[:, 1 : 1 + tokens.shape[1]] = tokens
        rows[:, 1 + tokens.shape[1]] = tokenizer.eos_token_id
        return rows

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the ids (n, length) that the encoder reads for texts; longer ones are cut."""
        ids: Tensor = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids

    def own_tokens(self, text: str) -> Tensor:
        """Return the ids (k,) that the encoder reads for a text, without marks and padding."""
        (ids,) = self.tokenize([text])
        end = int((ids == self.tokenizer.eos_token_id).nonzero()[0])
        return ids[1:end]

    @cached_property
    def whole_words(self) -> list[int]:
        """Ids of the tokens that the tokenizer reads back from their own text.

        Texts of such tokens, with spaces between them, are read back too.
        """
        tokens = torch.tensor(self.vocabulary)[:, None]
        rows = self.tokenize(self.decode(tokens))
        same = (rows == self.rows(tokens)).all(1)
        return [int(i) for i in tokens[same, 0]]

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the texts of tokens (n, k)."""
        texts: list[str] = self.tokenizer.batch_decode(
            tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts

    def condition(
        self, ids: Tensor, texts: Sequence[str] | None = None, replace: Replace | None = None
    ) -> Conditioning:
        """Return what the denoiser is conditioned on for rows of ids (n, length).

        Args:
            ids: what the first tokenizer returns, or `rows`.
            texts: what T5 reads. Default: the texts of the ids.
            replace: changes the token embeddings of each CLIP encoder.
        """
        texts = self.decode(ids) if texts is None else texts
        texts = [text or " " for text in texts]  # an empty one is what SDXL guides away from
        with ExitStack() as hooks:
            for view in self.views:
                own = self._padded(ids, int(view.tokenizer.pad_token_id))
                hooks.enter_context(replaced_ids(view.encoder, own))
            if replace is not None:
                hooks.enter_context(self.embeddings(replace))
            return self.model.encode_text(texts, with_gradient=torch.is_grad_enabled())

    @contextmanager
    def embeddings(self, replace: Replace) -> Iterator[None]:
        """Change the token embeddings that the CLIP encoders read inside the block."""
        with ExitStack() as hooks:
            for number, encoder in enumerate(self.encoders):
                own = partial(replace, number)
                hooks.enter_context(replaced_embeddings(encoder, own))
            yield

    def _padded(self, ids: Tensor, pad: int) -> Tensor:
        """Return rows of ids with another padding."""
        ends = ids == self.tokenizer.eos_token_id
        return torch.where((ends.cumsum(1) - ends.long()) > 0, pad, ids)

    @torch.no_grad()
    def encode(
        self, ids: Tensor, texts: Sequence[str] | None = None, *, batch: int = 256
    ) -> Tensor:
        """Return the token embeddings (n, length, width) of rows of ids, in fp32.

        Args:
            ids: ids (n, length).
            texts: what T5 reads; see `condition`.
            batch: rows that are encoded at once.
        """
        texts = self.decode(ids) if texts is None else texts
        parts = [
            self.condition(ids[i : i + batch], texts[i : i + batch]).hidden.float()
            for i in range(0, len(ids), batch)
        ]
        return torch.cat(parts)

    def check_room(self, num_tokens: int) -> None:
        """Check that a text of so many tokens fits the encoder.

        Raises:
            ConfigError: it does not.
        """
        if num_tokens > self.length - 2:
            raise ConfigError(
                f"num_tokens must be at most {self.length - 2} for this text encoder, "
                f"got {num_tokens}"
            )
