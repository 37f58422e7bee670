"""MMA-Diffusion: its gradient, its step beside the released one, and the texts that it finds."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.target import Target
from safegen.attacks.core.text import naming_tokens
from safegen.attacks.mma import MMA, GreedySearch
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.models.text_encoder import TextEncoderView
from safegen.stack import Stack

SKULLS = load_concept("skulls")


@pytest.fixture
def make_search(loader, skulls_judge, tmp_path):
    """Return a function that builds the search of some settings on the miniature model."""
    with loader.open(Stack(name="mini", model="mini")) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig())
        yield lambda **settings: GreedySearch(MMA(**settings), AttackContext(target, tmp_path))


def encode_one_hot(search, weights):
    """Return the pooled embedding of one-hot tokens (k, vocabulary), padded to full length."""
    space, k = search.space, len(weights)
    table = space.encoders[0].get_input_embeddings().weight.detach()
    name = next(n for n, p in space.encoders[0].named_parameters() if p.shape == table.shape)
    ids = space.rows(torch.zeros(1, k, dtype=torch.long))
    ids[0, 1 : 1 + k] = torch.arange(len(table), len(table) + k)
    soft = {name: torch.cat([table, weights @ table])}
    hidden = torch.func.functional_call(space.encoders[0], soft, (ids,)).last_hidden_state
    return hidden[:, k + 1]


def test_the_gradient_is_that_of_the_padded_encoder(make_search):
    search = make_search(num_tokens=3)
    goal = search.space.views[0].pooled_texts(["a castle covered in skulls"])
    tokens = torch.tensor([5, 40, 300])
    weights = F.one_hot(search.allowed[tokens], len(search.space.tokenizer)).float()
    weights.requires_grad_()
    loss = 1 - F.cosine_similarity(encode_one_hot(search, weights), goal)
    (expected,) = torch.autograd.grad(loss.sum(), weights)
    assert_close(search.gradient(tokens, [goal]), expected[:, search.allowed], rtol=1e-4, atol=1e-6)
    assert_close(search.losses(tokens[None], [goal]), loss.detach(), rtol=0, atol=1e-5)


def test_one_step_is_that_of_the_released_code(make_search):
    """The released step restated, with each token's own gradient: ids, texts and the best one."""
    k, n, top_k = 4, 16, 24
    search = make_search(num_tokens=k, candidates=n, top_k=top_k)
    tokenizer, encoder = search.space.tokenizer, search.space.encoders[0]
    goal = search.space.views[0].pooled_texts(["a castle covered in skulls"])
    tokens = search.letters[torch.tensor([1, 5, 9, 20])]
    gradient = search.gradient(tokens, [goal])

    whole = torch.full((k, len(tokenizer)), float("inf"))
    whole[:, search.allowed] = gradient  # banned tokens stay at infinity
    top = (-whole).topk(top_k, dim=1).indices
    where = torch.arange(0, k, k / n).long()
    draw = torch.Generator().manual_seed(3)
    value = top[where].gather(1, torch.randint(0, top_k, (n, 1), generator=draw))
    ids = search.allowed[tokens].repeat(n, 1).scatter(1, where[:, None], value)
    texts = [
        "".join(tokenizer.convert_ids_to_tokens(row)).replace("</w>", " ").strip()
        for row in ids.tolist()
    ]
    same = [
        (text, row.tolist())
        for text, row in zip(texts, ids, strict=True)
        if tokenizer(text, add_special_tokens=False).input_ids == row.tolist()
    ]
    batch = tokenizer(
        [text for text, _ in same], padding="max_length", max_length=32, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        pooled = encoder(batch).last_hidden_state[:, k + 1]
    losses = 1 - F.cosine_similarity(pooled, goal, eps=1e-6)

    found = search.candidates(tokens, gradient, torch.Generator().manual_seed(3))
    assert search.allowed[found].tolist() == [row for _, row in same]
    assert 0 < len(same) <= n
    actual = search.losses(found, [goal])
    assert_close(actual, losses, rtol=0, atol=1e-5)
    assert int(actual.argmin()) == int(losses.argmin())


def test_texts_come_nearer_are_read_back_and_name_nothing(loader, attack_mini, benign_samples):
    attack = MMA(num_tokens=5, iterations=6, candidates=24, top_k=32)
    (record,) = attack_mini(attack, benign_samples[:1])
    assert record.history[-1] < record.history[0]
    assert list(record.history) == sorted(record.history, reverse=True)
    assert record.loss == record.history[-1]
    assert record.stable
    view = TextEncoderView(loader.model("mini")[0].pipeline)
    assert not set(record.tokens) & set(naming_tokens(SKULLS, view))


def test_the_search_ends_without_progress(attack_mini, benign_samples):
    attack = MMA(num_tokens=2, iterations=50, candidates=1, top_k=1, patience=3)
    (record,) = attack_mini(attack, benign_samples[:1])
    assert len(record.history) < 50
    assert len(set(record.history[-4:])) == 1


def test_more_tokens_than_the_encoder_reads_are_refused(make_search):
    with pytest.raises(ConfigError, match="num_tokens must be at most 30"):
        make_search(num_tokens=31)
