"""UnlearnDiffAtk: its updates beside the released ones, and its prefixes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.target import Target
from safegen.attacks.unlearn_diff import PrefixSearch, UnlearnDiff, _Prefix, project_simplex
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.data.triplets.triplets import Triplets
from safegen.stack import Stack

SKULLS = load_concept("skulls")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder with one image of skulls."""
    folder = tmp_path_factory.mktemp("images")
    Triplets.load(SKULLS.triplets).images(0)[0].save(folder / "0.png")
    return folder


def bisect(row, tolerance=1e-5):
    """Return the projection of a row onto the simplex by bisection, as the released code does."""
    low, high = float(row.min()) - 1, float(row.max())
    while high - low > tolerance:
        middle = (low + high) / 2
        if float((row - middle).clamp(0, 1).sum()) > 1:
            low = middle
        else:
            high = middle
    return (row - (low + high) / 2).clamp(0, 1)


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
    for scale in (0.01, 1.0):
        wide = 1 / 800 + scale * torch.randn(3, 800, generator=generator)
        expected = torch.stack([bisect(row) for row in wide])
        assert_close(project_simplex(wide), expected, rtol=0, atol=2e-5)


def test_updates_are_those_of_the_released_code(
    loader, skulls_judge, benign_samples, images, tmp_path
):
    """The released loop restated for one prompt: draw, loss, clipped gradient, Adam, bisection."""
    sample, t, k = benign_samples[0], 300, 3
    config = UnlearnDiff(num_tokens=k, images=images, whole_words=False)
    with loader.open(Stack(name="mini", model="mini")) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig())
        search = PrefixSearch(config, AttackContext(target, tmp_path))
        prefix, draw = _Prefix(config, search, sample), config.generator(sample)
        model, space = loaded.model, search.space
        table = space.encoders[0].get_input_embeddings().weight.detach()
        name = next(n for n, p in space.encoders[0].named_parameters() if p.shape == table.shape)
        ids = space.tokenize([sample.prompt])[0]
        ids = torch.cat([ids[:1], torch.arange(len(table), len(table) + k), ids[1:-k]])[None]
        v, x0 = len(search.vocabulary), search.images.latents_for(sample)[None]
        weights = torch.full((1, k, v), 1 / v).requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=0.01, weight_decay=0.1)
        abar = model.pipeline.scheduler.alphas_cumprod[t]
        for _ in range(2):
            drawn = torch.multinomial(weights[0].detach(), 1, generator=draw).view(-1)
            one_hot = F.one_hot(drawn, v).float()[None].requires_grad_()
            soft = {name: torch.cat([table, (one_hot @ table[search.vocabulary])[0]])}
            text = torch.func.functional_call(space.encoders[0], soft, (ids,))[0]
            noise = torch.randn(x0[0].shape, generator=draw)[None]
            noisy = x0 * abar**0.5 + noise * (1 - abar) ** 0.5
            loss = F.mse_loss(model.denoiser(noisy, t, text).sample, noise)
            (gradient,) = torch.autograd.grad(loss, one_hot)
            weights.grad = F.hardtanh(gradient)
            optimizer.step()
            weights.data = torch.stack([bisect(row) for row in weights.data[0]])[None]
            actual = search.update([prefix], t)
            assert_close(actual[0], loss.detach(), rtol=1e-4, atol=1e-6)
            assert_close(prefix.weights.detach(), weights.detach()[0], rtol=0, atol=1e-4)
        assert prefix.tokens().tolist() == search.vocabulary[weights[0].argmax(-1)].tolist()


def test_prefixes_stand_before_the_prompt_and_the_best_one_is_kept(
    attack_mini, benign_samples, images
):
    attack = UnlearnDiff(num_tokens=3, num_timesteps=2, iterations=2, images=images)
    for record, sample in zip(attack_mini(attack, benign_samples), benign_samples, strict=True):
        assert record.prompt.endswith(sample.prompt)
        assert 1 <= len(record.history) <= 3, "one image before the search, one a timestep"
        assert record.success or len(record.history) == 3, "only success ends it"
        assert list(record.history) == sorted(record.history, reverse=True)
        assert record.loss == record.history[-1]
        if record.tokens:
            assert record.stable


def test_a_prompt_that_shows_the_concept_is_left_as_it_is(
    loader, skulls_judge, benign_samples, images, tmp_path
):
    sample = benign_samples[0].model_copy(update={"prompt": "a castle covered in skulls"})
    with loader.open(Stack(name="mini", model="mini")) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig(num_inference_steps=12))
        attack = UnlearnDiff(images=images)
        with target.counted():
            (record,) = attack.build(AttackContext(target, tmp_path)).attack([sample])
        assert target.cost.queries == 1
    assert record.success
    assert record.prompt == sample.prompt
    assert not record.tokens


def test_a_prefix_longer_than_the_encoder_reads_is_refused(attack_mini, benign_samples, images):
    with pytest.raises(ConfigError, match="num_tokens must be at most 30"):
        attack_mini(UnlearnDiff(num_tokens=31, images=images), benign_samples[:1])
