"""Batches of encoded texts."""

from __future__ import annotations

import torch

from safegen.models.text_embeddings import encode_batches


def test_texts_are_encoded_in_batches_in_order(tiny_model):
    texts = [f"a red cube {i}" for i in range(70)]
    batches = list(encode_batches(tiny_model, texts))
    assert [len(batch.texts) for batch in batches] == [64, 6]
    assert [text for batch in batches for text in batch.texts] == texts
    for batch in batches:
        assert torch.equal(batch.embeddings.hidden, tiny_model.encode_text(batch.texts).hidden)
        assert len(batch.rows("hidden", "last")) == len(batch.texts)
