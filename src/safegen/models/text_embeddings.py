"""Embeddings of texts in batches, and the rows of each text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from safegen.models.families.conditioning import Conditioning
from safegen.models.families.pipeline_specs import encode_texts
from safegen.models.model import Model

TextInput = Literal["hidden", "pooled"]
"""Part of a `Conditioning` that a projection reads."""
TEXTS_AT_ONCE = 64
"""Texts that are encoded in one call."""


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Embeddings of a batch of texts, and where the tokens of each text lie."""

    texts: tuple[str, ...]
    embeddings: Conditioning
    spans: list[list[tuple[int, int, int]]]
    """Start, last own token and stop of each span of each text; see `Model.token_spans`."""

    def rows(self, part: TextInput, tokens: str) -> list[list[Tensor]]:
        """Return the rows of each text by span, (k, width) each, float64, on the CPU.

        Args:
            part: `hidden` has a span for each encoder with tokens of its own; `pooled` is one row.
            tokens: positions in a span. `last` is the last token of the text (of an empty text,
                the first), `tail` everything from there on, `all` every position.
        """
        if part == "pooled":
            assert self.embeddings.pooled is not None
            return [[row[None]] for row in self.embeddings.pooled.cpu().double()]
        chosen = []
        for rows, spans in zip(self.embeddings.hidden.cpu().double(), self.spans, strict=True):
            bounds = {
                "last": [(last, last + 1) for _, last, _ in spans],
                "tail": [(last, stop) for _, last, stop in spans],
                "all": [(start, stop) for start, _, stop in spans],
            }
            chosen.append([rows[start:stop] for start, stop in bounds[tokens]])
        return chosen


def encode_batches(model: Model, texts: Sequence[str]) -> Iterator[TextEmbeddings]:
    """Yield the embeddings of texts in batches of at most `TEXTS_AT_ONCE`, in order.

    An empty text has the embedding of its marks, also where guidance uses zeros.
    """
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        batch = tuple(texts[start : start + TEXTS_AT_ONCE])
        embeddings = encode_texts(model.pipeline, batch)
        yield TextEmbeddings(batch, embeddings, model.token_spans(batch))
