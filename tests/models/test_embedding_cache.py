"""The cache of text embeddings: what it keeps, and that it changes no bit."""

from __future__ import annotations

import pytest
import torch

from safegen.models.embedding_cache import EmbeddingCache

TEXTS = ["a red cube", "a blue ball in the grass", "a green cone", "", "a tree"]


@pytest.fixture
def calls(tiny_model):
    """Return a list that gets the number of texts of each pass of the text encoder."""
    seen = []
    hook = tiny_model.pipeline.text_encoder.register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0]))
    )
    yield seen
    hook.remove()


def test_kept_embeddings_are_those_of_the_same_batches_without_a_cache(tiny_model, calls):
    cache = EmbeddingCache(tiny_model, batch=2)
    first, again = list(cache.encode(TEXTS)), list(cache.encode(TEXTS))
    assert calls == [2, 2, 1]
    assert [batch.texts for batch in first] == [tuple(TEXTS[i : i + 2]) for i in (0, 2, 4)]
    for batch, same in zip(first, again, strict=True):
        fresh = tiny_model.encode_text(list(batch.texts)).hidden
        assert torch.equal(batch.embeddings.hidden, fresh)
        assert torch.equal(same.embeddings.hidden, fresh)


def test_a_text_in_another_batch_is_encoded_again(tiny_model, calls):
    cache = EmbeddingCache(tiny_model, batch=2)
    for texts in (TEXTS[:2], TEXTS[1::-1], TEXTS[:1]):
        list(cache.encode(texts))
    assert calls == [2, 2, 1]


def test_memory_is_bounded_and_the_batch_used_longest_ago_goes_first(tiny_model, calls):
    one = next(EmbeddingCache(tiny_model).encode(TEXTS[:1])).embeddings.hidden.nbytes
    cache = EmbeddingCache(tiny_model, batch=1, max_bytes=2 * one)
    for text in (TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2]):
        list(cache.encode([text]))
        assert cache.nbytes <= 2 * one
    calls.clear()
    list(cache.encode(TEXTS[:1]))
    assert calls == []
    list(cache.encode(TEXTS[1:2]))
    assert calls == [1]
    list(EmbeddingCache(tiny_model, max_bytes=one - 1).encode(TEXTS[:1]))  # too large to keep


def test_embeddings_are_not_kept_unless_wanted(tiny_model):
    cache = EmbeddingCache(tiny_model)
    assert len(list(cache.encode(TEXTS, keep=False))) == 1
    assert cache.nbytes == 0
