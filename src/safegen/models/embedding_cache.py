"""Embeddings of texts, encoded in batches and kept within a limit of memory."""

from __future__ import annotations

from collections import OrderedDict
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
CACHE_BYTES = 2**28
"""Most bytes of embeddings that are kept."""


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


class EmbeddingCache:
    """Embeddings of texts by the batch that they were encoded in.

    A batch is found again only as a whole, so that kept embeddings equal computed ones bit for bit:
    rounding may depend on the other texts of a batch. Make a new cache after a text encoder or a
    tokenizer changed.

    Example:
        >>> cache = EmbeddingCache(safegen.load("mini"))
        >>> [len(batch.texts) for batch in cache.encode(["a castle"] * 70)]
        [64, 6]
    """

    def __init__(
        self, model: Model, *, batch: int = TEXTS_AT_ONCE, max_bytes: int = CACHE_BYTES
    ) -> None:
        """Take a model.

        Args:
            model: the model.
            batch: texts that are encoded at once.
            max_bytes: most bytes that are kept; the batches used longest ago are dropped.
        """
        self.model, self.batch, self.max_bytes = model, batch, max_bytes
        self._batches: OrderedDict[tuple[str, ...], TextEmbeddings] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings that are kept."""
        return sum(_nbytes(batch.embeddings) for batch in self._batches.values())

    def encode(self, texts: Sequence[str], *, keep: bool = True) -> Iterator[TextEmbeddings]:
        """Yield the embeddings of texts in batches, in order.

        An empty text has the embedding of its marks, also where guidance uses zeros.

        Args:
            texts: the texts.
            keep: whether to keep those that are computed.
        """
        for start in range(0, len(texts), self.batch):
            part = tuple(texts[start : start + self.batch])
            found = self._batches.pop(part, None) or self._encode(part)
            if keep:
                self._batches[part] = found
                while self.nbytes > self.max_bytes:
                    self._batches.popitem(last=False)
            yield found

    def _encode(self, texts: tuple[str, ...]) -> TextEmbeddings:
        embeddings = encode_texts(self.model.pipeline, list(texts))
        return TextEmbeddings(texts, embeddings, self.model.token_spans(texts))


def _nbytes(embeddings: Conditioning) -> int:
    pooled = 0 if embeddings.pooled is None else embeddings.pooled.nbytes
    return embeddings.hidden.nbytes + pooled
