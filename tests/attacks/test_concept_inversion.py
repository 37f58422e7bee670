"""Concept inversion: what an update is, and that a killed attack goes on to the same word."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.attacks.concept_inversion import (
    CHECKPOINT,
    FILE,
    WORD,
    ConceptInversion,
    WordTraining,
    window_minima,
)
from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.cost import Budget
from safegen.attacks.core.target import Target
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig
from safegen.data.triplets.triplets import Triplets
from safegen.models.textual_inversion import added_words, read_word
from safegen.stack import Stack

SKULLS = load_concept("skulls")
SETTINGS = {"updates": 6, "images_per_update": 2, "checkpoint_every": 2, "precision": "fp32"}


class Killed(Exception):
    """What a progress callback raises in place of a kill."""


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Return a folder of four images of skulls with captions."""
    folder, triplets = tmp_path_factory.mktemp("images"), Triplets.load(SKULLS.triplets)
    for i in range(4):
        triplets.images(i)[0].save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a castle" if i else "a bridge at night")
    return folder


@pytest.fixture
def learn(loader, skulls_judge, tmp_path, images):
    """Return a function that learns a word in a folder, and returns it with the target."""

    def run(name, *, kill_after=None, budget=None, **changes):
        def progress(_, done, __):
            if done == kill_after:
                raise Killed

        config = ConceptInversion(images=images, **SETTINGS | changes)
        with loader.open(Stack(name="mini", model="mini")) as loaded:
            target = Target(loaded, SKULLS, skulls_judge, GenerationConfig(), budget)
            with target.counted():
                learner = config.build(AttackContext(target, tmp_path / name, progress))
        return read_word(tmp_path / name / FILE)[1][0], learner, target

    return run


def test_a_killed_attack_goes_on_to_the_same_word_and_pays_for_all_of_it(learn, tmp_path):
    word, learner, target = learn("whole")
    with pytest.raises(Killed):
        learn("torn", kill_after=5)
    assert not (tmp_path / "torn" / FILE).exists()
    resumed, relearner, retarget = learn("torn")
    assert torch.equal(resumed, word)
    assert relearner.history == learner.history
    assert target.cost.denoiser == retarget.cost.denoiser == 6 * 2 * 2, "forward and backward"
    assert retarget.cost.seconds > 0
    finished, _, again = learn("torn")
    assert torch.equal(finished, word)
    assert again.cost.denoiser == 24, "a word whose prompts were not written yet counts"


def test_the_budget_ends_the_learning_within_an_update(learn):
    word, learner, target = learn("cheap", budget=Budget(nfe=9))
    assert target.cost.denoiser == 12
    assert len(learner.history) == 3
    whole, _, _ = learn("three", updates=3)
    assert torch.equal(word, whole)


def test_a_checkpoint_of_other_settings_is_refused(learn, tmp_path):
    learn("a", updates=2)
    with pytest.raises(FileError, match="has other settings, weights or images"):
        learn("a", updates=2, lr=1e-3)
    learn("a", updates=2, checkpoint_every=1)
    (tmp_path / "a" / CHECKPOINT).write_bytes(b"torn")
    with pytest.raises(FileError):
        learn("a", updates=2)


def test_updates_are_those_of_adamw_on_the_embedding_table(loader, skulls_judge, tmp_path, images):
    """The released script trains the table itself, and writes back all rows but the word's."""
    changes = {"updates": 3, "weight_decay": 0.1, "flip": True}
    config = ConceptInversion(images=images, **SETTINGS | changes)
    with loader.open(Stack(name="mini", model="mini")) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig())
        training = WordTraining(config, AttackContext(target, tmp_path))
        start = training.vectors[0].detach().clone()
        training.run()
        model = loaded.model
        with added_words(model, {WORD: [start]}):
            latents, texts, captions = training._encode()
            ids = model.token_ids(texts)
            table = model.pipeline.text_encoder.get_input_embeddings().weight
            table.requires_grad_(True)
            before = table.detach().clone()
            optimizer = torch.optim.AdamW([table], lr=config.lr, weight_decay=0.1)
            for update in range(3):
                training.losses = [0.0] * update
                draw = training._draws()
                index = torch.randint(latents.shape[1], (2,), generator=draw)
                view = torch.randint(2, (2,), generator=draw)
                t = torch.randint(1000, (2,), generator=draw)
                picks = torch.randint(2**31, (2,), generator=draw).tolist()
                noise = torch.randn(2, *latents.shape[2:], generator=draw)
                rows = [captions[i] for i in index.tolist()]
                text = ids[[row[p % len(row)] for row, p in zip(rows, picks, strict=True)]]
                noisy = model.pipeline.scheduler.add_noise(latents[view, index], noise, t)
                said = model.denoiser(noisy, t, model.pipeline.text_encoder(text)[0]).sample
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(said, noise).backward()
                optimizer.step()
                with torch.no_grad():
                    table[: -config.num_vectors] = before[: -config.num_vectors]
            found = table.detach()[-config.num_vectors :].clone()
            table.requires_grad_(False)
    assert model.prediction == "epsilon"
    assert (found - start).abs().max() > 1e-3
    assert_close(training.vectors[0].detach(), found, rtol=0, atol=1e-6)


def test_the_word_starts_as_one_token(learn, loader, tmp_path):
    with pytest.raises(ConfigError, match="initializer must be one token"):
        learn("b", initializer="a castle")
    word, _, _ = learn("c", initializer="castle", lr=1e-9, updates=1)
    pipe = loader.model("mini")[0].pipeline
    (token,) = pipe.tokenizer("castle", add_special_tokens=False).input_ids
    table = pipe.text_encoder.get_input_embeddings().weight
    assert_close(word, table[token].expand(3, -1), rtol=0, atol=1e-6)


def test_a_word_that_is_longer_than_a_text_is_refused(learn):
    with pytest.raises(ConfigError, match="num_vectors must be at most 30, got 31"):
        learn("long", num_vectors=31)


def test_a_stack_with_the_word_is_refused(learn, loader, skulls_judge, tmp_path):
    learn("d", updates=1)
    stack = Stack(name="mini", model="mini", embeddings=(tmp_path / "d" / FILE,))
    with loader.open(stack) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig())
        with pytest.raises(ConfigError, match="must not have the word"):
            ConceptInversion().build(AttackContext(target, tmp_path / "e"))


def test_histories_are_minima_of_equal_parts():
    assert window_minima([]) == ()
    assert window_minima([3.0, 1.0, 2.0]) == (3.0, 1.0, 1.0)
    halves = window_minima([float(i) for i in range(40, 0, -1)])
    assert len(halves) == 10
    assert halves[0] == 38.5
    assert list(halves) == sorted(halves, reverse=True)
