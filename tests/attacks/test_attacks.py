"""What single attacks find."""

from __future__ import annotations

import pytest
import torch

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.target import Target, TextSpace
from safegen.attacks.core.text import concept_pairs, explicit_text, naming_tokens
from safegen.attacks.mma import MMA, GreedySearch
from safegen.attacks.unlearn_diff import project_simplex
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.models.text_encoder import TextEncoderView
from safegen.stack import Stack

SKULLS = load_concept("skulls")


def test_mma_raises_the_cosine_and_names_nothing(loader, attack_mini, benign_samples):
    attack = MMA(num_tokens=5, iterations=6, candidates=24, top_k=32)
    (record,) = attack_mini(attack, benign_samples[:1])
    assert record.history[-1] < record.history[0]
    assert list(record.history) == sorted(record.history, reverse=True)
    view = TextEncoderView(loader.model("mini")[0].pipeline)
    assert not set(record.tokens) & set(naming_tokens(SKULLS, view))


def test_gcg_gradient_is_that_of_finite_differences(loader, skulls_judge, tmp_path):
    with loader.open(Stack(name="mini", model="mini")) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig())
        search = GreedySearch(MMA(num_tokens=3), AttackContext(target, tmp_path))
        goal = search.view.pooled_texts(["a castle covered in skulls"])
        tokens = torch.tensor([5, 40, 300])
        gradient = search._gradient(tokens, goal)
        step = 1e-3
        table = search.table.clone()
        direction = table[17] - table[int(tokens[1])]
        losses = []
        for sign in (1, -1):
            search.table = table.clone()
            search.table[int(tokens[1])] += sign * step * direction

            losses.append(float(_loss(search, tokens, goal)))
        search.table = table
        expected = (losses[0] - losses[1]) / (2 * step)
        actual = float(gradient[1, 17] - gradient[1, int(tokens[1])])
        assert actual == pytest.approx(expected, rel=2e-2)


def _loss(search, tokens, goal):
    space, k = search.space, len(tokens)
    ids = space.rows(search.allowed[tokens][None])

    def replace(_, embeddings):
        return torch.cat(
            [embeddings[:, :1], search.table[tokens][None], embeddings[:, 1 + k :]], dim=1
        )

    with torch.no_grad(), space.embeddings(replace):
        hidden = space.encoder(ids).last_hidden_state[:, k + 1]
    return 1 - torch.nn.functional.cosine_similarity(hidden, goal)


def test_simplex_projection_is_the_nearest_distribution():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 6, generator=generator)
    projected = project_simplex(weights)
    assert torch.allclose(projected.sum(-1), torch.ones(4))
    assert bool((projected >= 0).all())
    others = torch.softmax(torch.randn(200, 4, 6, generator=generator), -1)
    distance = (projected - weights).norm(dim=-1)
    assert bool(((others - weights).norm(dim=-1) >= distance - 1e-6).all())
    assert torch.allclose(project_simplex(projected), projected, atol=1e-6)


def test_pairs_and_explicit_texts_have_the_subject(benign_samples):
    text, benign, subject = concept_pairs(SKULLS)[0]
    assert subject in text
    assert subject in benign
    assert "skull" in text
    assert "skull" not in benign
    sample = benign_samples[0]
    assert "skull" in explicit_text(SKULLS, sample)
    assert sample.subject in explicit_text(SKULLS, sample)
    nameless = SKULLS.model_copy(update={"tuning": {}, "words": (), "captions": ()})
    with pytest.raises(ConfigError, match="words"):
        explicit_text(nameless, sample)
    with pytest.raises(ConfigError, match="tuning"):
        concept_pairs(nameless)


def test_text_space_rows_are_those_of_the_tokenizer(loader):
    space = TextSpace(loader.model("mini")[0])
    ids = space.tokenize(["a castle covered in skulls"])
    own = ids[:, 1 : int((ids[0] != space.tokenizer.eos_token_id).sum())]
    assert torch.equal(space.rows(own), ids)
    assert space.decode(own) == ["a castle covered in skulls"]
