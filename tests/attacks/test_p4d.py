"""P4D: its updates beside the released ones, its two forms, and the unedited denoiser."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.target import Target
from safegen.attacks.core.unedited import UneditedModel
from safegen.attacks.p4d import P4D, HardPromptSearch, _HardPrompt, insert_tokens
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.edits.uce import UCE
from safegen.models.loading import load
from safegen.patches.active_lora import active_loras
from safegen.patches.lora import extract_lora, save_lora
from safegen.patches.lora_reader import read_lora
from safegen.patches.patch import Patch
from safegen.stack import Stack

SKULLS = load_concept("skulls")


@pytest.fixture(scope="module")
def edited(loader, tmp_path_factory):
    path = tmp_path_factory.mktemp("edit") / "uce.safetensors"
    UCE(erase=("skulls",)).apply(loader.model("mini")[0]).save(path)
    return Stack(name="uce", model="mini", patches=(path,))


def test_inserted_places_are_those_of_the_released_code():
    for n in (1, 2, 3, 7, 9):
        tokens = torch.arange(1, n + 1)
        row, free = insert_tokens(tokens, 3, 99)
        assert len(free) == n // 3 + 1
        assert [int(i) for i in row if i] == tokens.tolist()
        assert [i for i, token in enumerate(row.tolist()) if not token] == free
    row, free = insert_tokens(torch.arange(1, 9), 1, 6)
    assert row.tolist() == [0, 1, 0, 2, 0, 3]
    assert free == [0, 2, 4]


@pytest.mark.parametrize("every", [None, 2])
def test_updates_are_those_of_the_released_code(
    every, loader, edited, skulls_judge, benign_samples, tmp_path
):
    """The released loop restated for one prompt, with a second model as the unedited one."""
    sample, base = benign_samples[0], load("mini")
    config = P4D(num_tokens=3, insert_every=every, whole_words=False)
    with loader.open(edited) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig())
        search = HardPromptSearch(config, AttackContext(target, tmp_path))
        x0 = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        goal = base.encode_text(["a castle covered in skulls"])
        prompt, draw = _HardPrompt(config, search, sample, x0[0], goal), config.generator(sample)
        model, space = loaded.model, search.space
        table = space.encoders[0].get_input_embeddings().weight.detach()
        name = next(n for n, p in space.encoders[0].named_parameters() if p.shape == table.shape)
        words, vocabulary = space.own_tokens(sample.prompt).tolist(), search.vocabulary
        total = 3 if every is None else len(words) + len(words) // every + 1
        free = [i for i in range(total) if every is None or i % (every + 1) == 0]
        start = torch.randint(len(vocabulary), (len(free),), generator=draw)
        own = table[vocabulary]
        soft = own[start].clone().requires_grad_()
        optimizer = torch.optim.AdamW([soft], lr=0.1, weight_decay=0.1)
        abar = model.pipeline.scheduler.alphas_cumprod
        for _ in range(2):
            hits = (F.normalize(soft.detach()) @ F.normalize(own).T).argmax(-1)
            hard = own[hits].clone().requires_grad_()
            rest = iter(words)
            row = [len(table) + free.index(i) if i in free else next(rest) for i in range(total)]
            ids = space.rows(torch.tensor([row]))
            weights = {name: torch.cat([table, hard])}
            text = torch.func.functional_call(space.encoders[0], weights, (ids,))[0]
            noise = torch.randn(x0[0].shape, generator=draw)[None]
            t = torch.randint(1000, (), generator=draw)
            noisy = x0 * abar[t] ** 0.5 + noise * (1 - abar[t]) ** 0.5
            with torch.no_grad():
                wanted = base.denoiser(noisy, t, goal.hidden).sample
            loss = F.mse_loss(model.denoiser(noisy, t, text).sample, wanted)
            (soft.grad,) = torch.autograd.grad(loss, hard)
            optimizer.step()
            assert_close(search.update([prompt])[0], loss.detach(), rtol=1e-4, atol=1e-6)
            assert_close(prompt.embeddings[0].detach(), soft.detach(), rtol=0, atol=1e-5)


def test_p4d_k_keeps_the_prompts_tokens_in_order(loader, attack_mini, benign_samples):
    attack = P4D(insert_every=2, iterations=2, test_every=1)
    space = loader.model("mini")[0].pipeline.tokenizer
    for record, sample in zip(attack_mini(attack, benign_samples), benign_samples, strict=True):
        words = space(sample.prompt, add_special_tokens=False).input_ids
        assert [x for i, x in enumerate(record.tokens) if i % 3] == words
        assert record.stable
        assert list(record.history) == sorted(record.history, reverse=True)
        assert len(record.history) <= 2


def test_the_unedited_denoiser_has_neither_patches_nor_loras(loader, tmp_path):
    model, _ = loader.model("mini")
    x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([9])
    text = model.encode_text(["a castle covered in skulls"])

    def predict():
        with torch.no_grad():
            return model.denoiser(x, t, text.hidden).sample

    before, uce = predict(), UCE(erase=("skulls",)).apply(model)
    lora = tmp_path / "lora.safetensors"
    save_lora(extract_lora(uce, model, 2), model, lora, dtype=torch.float32, base=model.hash)
    twice = Patch({name: value * 1.01 for name, value in uce.tensors.items()})
    with uce.apply(model), twice.apply(model), active_loras(model, [(read_lora(lora, model), 1.0)]):
        edited, unedited = predict(), UneditedModel(model)
        assert not torch.equal(edited, before)
        assert torch.equal(unedited.predict(x, t, text), before)
        with unedited.restored():
            assert torch.equal(predict(), before)
        with pytest.raises(RuntimeError), unedited.restored():
            raise RuntimeError
        assert torch.equal(predict(), edited)
    assert torch.equal(predict(), before)


def test_texts_that_the_encoder_cannot_read_are_refused(attack_mini, benign_samples):
    with pytest.raises(ConfigError, match="num_tokens must be at most 30"):
        attack_mini(P4D(num_tokens=31), benign_samples[:1])
