"""Attacks on every family of models, cell by cell, and what their parts read there."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch
from torch.testing import assert_close

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.dataset import FineTuneDataset
from safegen.attacks.core.finetune import DenoisingObjective
from safegen.attacks.core.inversion import draw, invert, sampling_steps
from safegen.attacks.core.target import Target
from safegen.attacks.core.unedited import UneditedModel
from safegen.attacks.p4d import P4D, HardPromptSearch, _HardPrompt
from safegen.attacks.search.text_space import TextSpace
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig, Sample
from safegen.core.registry import ATTACKS, resolve
from safegen.data.triplets.triplets import Triplets
from safegen.models.families.denoisers import pack_latents, packs_latents, predict
from safegen.models.generation import batches
from safegen.models.patched_weights import pipeline_weights
from safegen.models.textual_inversion import added_words, read_word, write_word
from safegen.patches.patch import Patch
from safegen.stack import Stack
from safegen.stack_loader import StackLoader
from tests.attacks.families import ATTACKS_ON_FAMILIES
from tests.tiny import FAMILIES, PROMPTS, build_model

SKULLS = load_concept("skulls")
TEXTS = [PROMPTS[0], "a cube"]
FAST = ("sdxl", "sd35", "flux")
"""Families that the fast suite runs; between them they have every form of text, schedule
and network. Nightly runs the others."""
BLACK_BOX = ("img2img", "inpaint", "seeds", "sneaky_prompt", "tree_search")
"""Attacks that see images alone, which the fast suite runs on one family."""
SMALLEST = {
    "concept_inversion": {"updates": 1},
    "latent_inversion": {"texts": ("blank",), "iterations": 1, "updates": 0, "control": False},
    "mma": {"iterations": 1},
    "p4d": {"iterations": 1},
    "relearn": {"updates": (1,)},
    "ring_a_bell": {"generations": 1},
    "seeds": {"tries": 1},
    "sneaky_prompt": {"queries": 1},
    "tree_search": {"breadth": 1, "depth": 1},
    "unlearn_diff": {"num_timesteps": 1, "iterations": 1},
}
"""Settings that are smaller still than `TINY`."""
LEARNERS = ("concept_inversion", "relearn")
WITHOUT_CONTROL = ("img2img", "inpaint", "latent_inversion")


@pytest.fixture(scope="module")
def models():
    """Return a function that returns the tiny model of a family, the same one at every call."""
    built = {}

    def model(family):
        if family not in built:
            built[family] = build_model(family)
        return built[family]

    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder with an image of skulls and its mask."""
    folder = tmp_path_factory.mktemp("images")
    (image, twin, _) = Triplets.load(SKULLS.triplets).images(0)
    image.save(folder / "0.png")
    twin.convert("L").point(lambda _: 255).save(folder / "0-mask.png")
    return folder


@pytest.fixture(scope="module")
def captioned(images, tmp_path_factory):
    """Return a folder with an image of skulls and its caption."""
    folder = tmp_path_factory.mktemp("captioned")
    shutil.copy(images / "0.png", folder)
    (folder / "0.txt").write_text(TEXTS[0])
    return folder


@pytest.fixture
def attack_family(models, skulls_judge, tmp_path):
    """Return a function that attacks the tiny model of a family with some samples."""

    def run(attack, family, samples):
        loader = StackLoader(model=models(family))
        with loader.open(Stack(name=family, model=family)) as loaded:
            target = Target(loaded, SKULLS, skulls_judge, GenerationConfig(num_inference_steps=2))
            with target.counted():
                records = attack.build(AttackContext(target, tmp_path / "files")).attack(samples)
                starts = [r.start for r in records if r.start]
                target.query([samples[0].model_copy(update={"start": start}) for start in starts])
        return records, target.cost

    return run


def smallest(name, images, captioned):
    kind = resolve(ATTACKS, name, "attack")
    changes = {"control": False} if name in WITHOUT_CONTROL else {}
    if "images" in kind.model_fields:
        changes["images"] = captioned if name in LEARNERS else images
    return kind(**{**kind.TINY, **SMALLEST.get(name, {}), **changes})


def cell(family, attack, reason):
    is_fast = family == FAST[-1] if attack in BLACK_BOX else family in FAST
    return pytest.param(family, attack, reason, marks=() if reason or is_fast else pytest.mark.slow)


CELLS = [cell(f, name, row[name]) for f, row in ATTACKS_ON_FAMILIES.items() for name in row]


def test_the_table_has_every_attack_and_family():
    assert list(ATTACKS_ON_FAMILIES) == list(FAMILIES)
    assert all(set(row) == set(ATTACKS) for row in ATTACKS_ON_FAMILIES.values())


@pytest.mark.parametrize(("family", "attack", "reason"), CELLS)
@pytest.mark.filterwarnings("ignore:images should have sides")
def test_an_attack_runs_or_is_refused_as_the_table_says(
    family, attack, reason, attack_family, benign_samples, images, captioned
):
    config = smallest(attack, images, captioned)
    if reason:
        with pytest.raises(ConfigError, match=re.escape(reason)):
            attack_family(config, family, benign_samples[:1])
        return
    records, cost = attack_family(config, family, benign_samples[:1])
    assert records
    for record in records:
        assert record.prompt
        assert record.loss is None or math.isfinite(record.loss)
    assert attack in ("compression", "img2img", "inpaint") or cost.text_encoder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_a_text_are_read_as_the_text(family, models):
    """Check ids with the padding of each encoder, and the text for T5."""
    model = models(family)
    space = TextSpace(model)
    for tokenizer in (view.tokenizer for view in space.views[1:]):
        assert tokenizer is not space.tokenizer
    wanted, found = model.encode_text(TEXTS), space.condition(space.tokenize(TEXTS))
    assert_close(found.hidden, wanted.hidden)
    assert found.added.keys() == wanted.added.keys()
    if wanted.pooled is not None:
        assert_close(found.pooled, wanted.pooled)


@pytest.mark.parametrize("family", ["sdxl", "sd35"])
def test_paddings_may_differ(family, models):
    """The second tokenizer of SDXL and SD 3 pads with another token than the first."""
    model = build_model(family)
    model.pipeline.tokenizer_2.pad_token = "a</w>"
    space = TextSpace(model)
    assert_close(space.condition(space.tokenize(TEXTS)).hidden, model.encode_text(TEXTS).hidden)


def test_encoders_with_several_vocabularies_are_refused():
    model = build_model("sdxl")
    model.pipeline.tokenizer_2.add_tokens(["another"])
    with pytest.raises(ConfigError, match="must have one vocabulary"):
        TextSpace(model)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd35", "flux"])
def test_gradients_reach_the_embeddings_of_each_clip_encoder(family, models):
    space = TextSpace(models(family))
    ids = space.tokenize(TEXTS[:1])
    with torch.enable_grad():
        own = [table.requires_grad_() for table in space.tables(ids[0])]
        text = space.condition(ids, replace=lambda number, *_: own[number][None])
        plain = models(family).encode_text(TEXTS[:1])
        assert_close(text.hidden, plain.hidden)
        parts = [text.hidden, *(() if text.pooled is None else (text.pooled,))]
        loss = sum(part.square().sum() for part in parts)
        gradients = torch.autograd.grad(loss, own)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


@pytest.mark.parametrize("family", ["sdxl", "sd35", "flux"])
def test_p4d_has_no_loss_where_its_tokens_are_those_of_the_goal(
    family, models, skulls_judge, benign_samples, tmp_path
):
    """Without an edit, both denoisers predict the same for the same text."""
    model, sample = models(family), benign_samples[0]
    with StackLoader(model=model).open(Stack(name=family, model=family)) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig(num_inference_steps=2))
        search = HardPromptSearch(P4D(num_tokens=2), AttackContext(target, tmp_path))
        goal, shape = model.encode_text(["a cube"]), model.latent_shape
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        prompt = _HardPrompt(search.config, search, sample, z, goal)
        away = search.update([prompt])
        tokens = search.space.own_tokens("a cube")
        places = torch.tensor([search.vocabulary.tolist().index(i) for i in tokens.tolist()])
        prompt.embeddings = [table[places].clone() for table in search.tables]
        assert search.nearest(prompt.embeddings).tolist() == places.tolist()
        assert float(search.update([prompt])) < 1e-9 < float(away)


@pytest.mark.parametrize("family", ["sdxl-v", "sd35", "flux"])
def test_the_loss_of_a_fine_tune_is_that_of_the_family(family, captioned):
    """The loss of a network that predicts zero is the mean square of the target."""
    model = build_model(family)
    last = getattr(model.denoiser, "conv_out", None) or model.denoiser.proj_out
    for parameter in last.parameters():
        torch.nn.init.zeros_(parameter)
    problem = DenoisingObjective(model, FineTuneDataset.from_folder(captioned), batch=4)
    loss = problem.training_step(model.denoiser, 0, torch.Generator().manual_seed(3), (0, 1))["L"]
    z, draw = problem.latents, torch.Generator().manual_seed(3)
    for high in (1, 2**31):  # images and captions
        torch.randint(high, (4,), generator=draw)
    t = model.noise_schedule.timesteps[torch.randint(1000, (4,), generator=draw)]
    eps = torch.randn(4, *z.shape[1:], generator=draw)
    if family == "sdxl-v":
        a = model.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        target = a.sqrt() * eps - (1 - a).sqrt() * z
    else:
        target = eps - z
    assert_close(loss, target.square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_inverted_steps_are_those_of_the_pipeline(family, models, monkeypatch):
    """Latents that the inverted steps lead to are those of the pipeline's own call."""
    model, n = models(family), 3
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    config = GenerationConfig(num_inference_steps=n, guidance_scale=1.0)
    text = model.encode_text([TEXTS[0]]).replace_guidance(1.0)

    def output(x, t, rows):
        return predict(model.denoiser, x, torch.full((1,), t), text)

    own = pack_latents(x) if packs_latents(model.pipeline) else x
    ((_, prompts, options),) = batches(model, [Sample(prompt=TEXTS[0], seed=0)], config)
    options |= {"latents": own, "output_type": "latent"}
    with torch.no_grad():
        found = model.pipeline(prompt=prompts, **options).images
        end = draw(output, sampling_steps(model, n), x)
        steps = sampling_steps(model, n)
        back = invert(output, steps, end, iterations=200, tolerance=1e-7)
    ends = pack_latents(end) if packs_latents(model.pipeline) else end
    assert_close(ends, found, rtol=1e-4, atol=1e-4)
    assert_close(draw(output, steps, back), end, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def text_patch(tmp_path_factory):
    """Return the file of a patch that changes the text encoders and the denoiser of SDXL."""
    weights = pipeline_weights(build_model("sdxl").pipeline)
    kinds = ("text_encoder.", "text_encoder_2.", "conv_in.")
    rng = torch.Generator().manual_seed(0)
    changed = {
        name: value + torch.randn(value.shape, generator=rng) / 10
        for name, value in weights.items()
        if name.startswith(kinds) and value.ndim > 1
    }
    path = tmp_path_factory.mktemp("patch") / "text.safetensors"
    Patch(changed).save(path)
    return path


def test_an_unedited_model_has_its_own_text_encoders_and_denoiser(text_patch):
    model, rng = build_model("sdxl"), torch.Generator().manual_seed(0)
    x, t = torch.randn(1, *model.latent_shape, generator=rng), torch.tensor([500])
    before = model.encode_text(TEXTS[:1])
    with torch.no_grad():
        predicted = predict(model.denoiser, x, t, before)
    with Patch.load(text_patch).apply(model):
        edited, unedited = model.encode_text(TEXTS[:1]), UneditedModel(model)
        assert not torch.allclose(edited.hidden, before.hidden)
        assert torch.equal(unedited.predict(x, t, before), predicted)
        with unedited.restored():
            assert torch.equal(model.encode_text(TEXTS[:1]).hidden, before.hidden)
        assert torch.equal(model.encode_text(TEXTS[:1]).hidden, edited.hidden)


@pytest.mark.parametrize("attack", ["mma", "ring_a_bell"])
def test_static_attacks_find_the_same_whatever_the_edit_of_the_text_encoders(
    attack, text_patch, skulls_judge, benign_samples, tmp_path
):
    """The attacker has the published encoders, not those of the defended stack."""
    config, loader = smallest(attack, None, None), StackLoader(model=build_model("sdxl"))
    found = []
    for patches in ((), (text_patch,)):
        with loader.open(Stack(name="sdxl", model="sdxl", patches=patches)) as loaded:
            target = Target(loaded, SKULLS, skulls_judge, GenerationConfig(num_inference_steps=2))
            attacker = config.build(AttackContext(target, tmp_path))
            found.append(attacker.attack(benign_samples[:1]))
    assert found[0] == found[1]


@pytest.mark.parametrize(("family", "passes"), [("sdxl", 8), ("flux", 6)])
def test_passes_of_each_text_encoder_count_and_only_those_with_a_gradient_twice(
    family, passes, attack_family, benign_samples, captioned
):
    """Two texts pass two CLIPs of SDXL there and back, or FLUX's CLIP there and back and its T5."""
    config = smallest("concept_inversion", None, captioned)
    _, cost = attack_family(config, family, benign_samples[:1])
    assert (cost.text_encoder, cost.denoiser) == (passes, 4)


def test_a_word_of_sdxl_has_vectors_for_each_encoder_and_leaves_nothing_behind(tmp_path):
    model, path = build_model("sdxl"), tmp_path / "cube.safetensors"
    rng = torch.Generator().manual_seed(0)
    vectors = [torch.randn(2, width, generator=rng) for width in (32, 24)]
    write_word(path, "<cube>", vectors)
    word, read = read_word(path)
    assert word == "<cube>"
    assert all(torch.equal(a, b) for a, b in zip(read, vectors, strict=True))
    before, plain = model.pipeline_hash, model.encode_text(["a <cube>"])
    with added_words(model, {word: read}):
        learned = model.encode_text(["a <cube>"])
        assert not torch.allclose(learned.hidden[..., :32], plain.hidden[..., :32])
        assert not torch.allclose(learned.hidden[..., 32:], plain.hidden[..., 32:])
    assert model.pipeline_hash == before
    assert torch.equal(model.encode_text(["a <cube>"]).hidden, plain.hidden)
    with pytest.raises(FileError, match="vectors for 1 CLIP text encoders"):
        with added_words(build_model("flux"), {word: read}):
            pass
