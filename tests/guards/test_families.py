"""Guards on every family of models, cell by cell, and against loops written by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import safegen
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig, Sample
from safegen.core.registry import GUARDS
from safegen.guards import make_guard
from safegen.guards.core.adapter import PipelineAdapter
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.core.rows import replace_inputs
from safegen.guards.safree.projection import concept_projectors, project_prompt
from safegen.guards.sld import safety_guidance
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import read_text, replace_text, unpack_latents
from safegen.models.model import Model
from safegen.stack import Stack
from safegen.stack_loader import LoadedStack
from tests.guards.families import GUARDS_ON_FAMILIES, IMAGE_CLASSES, NO_TRUE_CFG
from tests.tiny import FAMILIES, PROMPTS, build_pipeline

PROMPT, TEXT = PROMPTS[0], "a red cube"
INSIDE = {"dual-latent", "negative-prompt", "safree", "sld"}
FAST = {("sd35", "safree"), *(("flux", guard) for guard in GUARDS_ON_FAMILIES["flux"])}
"""Cells of every test run beside those with a reason; others run nightly."""
CELLS = [
    pytest.param(row, guard, marks=() if reason or (row, guard) in FAST else pytest.mark.slow)
    for row, cells in GUARDS_ON_FAMILIES.items()
    for guard, reason in cells.items()
]
SAFREE = {"name": "safree", "phrases": [TEXT, "red"]}


def nightly(*values):
    """Return values of parameters that are tested nightly."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


class Pipes(dict):
    """Tiny pipelines by the rows of the table, each built at its first use."""

    def __missing__(self, row):
        family = row.split()[0].rstrip(",")
        if row in FAMILIES:
            self[row] = build_pipeline(row)
        elif row in IMAGE_CLASSES:
            import diffusers

            self[row] = getattr(diffusers, IMAGE_CLASSES[row])(**self[family].components)
            self[row].set_progress_bar_config(disable=True)
        else:
            self[row] = self[family]
        return self[row]


@pytest.fixture(scope="module")
def pipes():
    """Return the pipelines of the table."""
    return Pipes()


def options_of(row, n=1, **options):
    """Return the options of a row's call."""
    if row.startswith("flux") and row not in NO_TRUE_CFG.values():
        options = {"true_cfg_scale": 4.0, "negative_prompt": [""] * n} | options
    if row in IMAGE_CLASSES:
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        options |= {"image": [Image.fromarray(noise)] * n, "height": 32, "width": 32}
        options |= {"strength": 1.0}
    if "inpainting" in row:
        options["mask_image"] = [Image.new("L", (32, 32), 255)] * n
    return {"num_inference_steps": 1} | options


def test_the_table_has_every_guard_and_family():
    assert set(GUARDS_ON_FAMILIES) >= set(FAMILIES)
    assert all(set(cells) == set(GUARDS) for cells in GUARDS_ON_FAMILIES.values())


@pytest.mark.parametrize(("row", "name"), CELLS)
def test_a_guard_acts_on_a_family_or_gives_its_reason(pipes, generate, passing_settings, row, name):
    more = {"limit": 1 - 1e-7} if name == "pno" else {}  # random images may be anything
    guard, pipe = make_guard(name, **passing_settings[name] | more), pipes[row]
    options, reason = options_of(row), GUARDS_ON_FAMILIES[row][name]
    if reason:
        with pytest.raises(ConfigError) as caught:
            generate(pipe, [guard], [PROMPT], **options)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    (output,) = generate(pipe, [guard], [PROMPT], **options)
    assert output.image is not None, output.trace
    assert output.trace.guards[0].calls >= 1
    if name in INSIDE:
        assert output.trace.action == "edit"
        (base,) = generate(pipe, None, [PROMPT], **options)
        assert np.abs(output.image - base).max() > 1e-4


@pytest.mark.parametrize("row", ["flux", *nightly("sd35", *IMAGE_CLASSES)])
def test_guards_without_effect_leave_an_image_bit_for_bit(pipes, generate, row):
    options = options_of(row, 2, num_inference_steps=2)
    guards = [
        {"name": "sld", "text": TEXT, "scale": 0.0},
        {"name": "negative-prompt", "text": ""},
        {**SAFREE, "strength": 0.0},
        {"name": "dual-latent", "phrases": [TEXT], "strength": 0.0},
    ]
    guards = guards[:3] if "inpainting" in row else guards
    outputs = generate(pipes[row], guards, PROMPTS[:2], **options)
    assert {o.trace.action for o in outputs} == {"none"}
    base = generate(pipes[row], None, PROMPTS[:2], **options)
    assert np.array_equal(np.stack([o.image for o in outputs]), base)


def flow_loop(pipe, predict):
    """Return the final latents of two Euler steps along a velocity, written out."""
    latents, _ = PipelineAdapter(pipe).initial_latents(
        {"generator": [torch.Generator().manual_seed(0)]}, "test"
    )
    sigmas = pipe.scheduler.sigmas
    for i in range(len(sigmas) - 1):
        latents = latents + (sigmas[i + 1] - sigmas[i]) * predict(latents, 1000 * sigmas[i])
    return latents


@pytest.mark.parametrize("max_rows", [None, *nightly(1)])
@pytest.mark.parametrize("row", ["sd3", "flux"])
def test_sld_on_velocities_is_the_papers_formula(pipes, generate, row, max_rows):
    pipe, scale = pipes[row], 4.0
    settings = {"scale": 20.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum": 0.7}
    guard = {"name": "sld", "text": TEXT, "warmup": 0.0, **settings}
    options = options_of(row, num_inference_steps=2, output_type="latent")
    options |= {"guidance_scale": scale}
    (output,) = generate(pipe, [guard], [PROMPT], max_rows=max_rows, **options)
    texts = {
        name: read_by_pipeline(pipe, text) for name, text in (("u", ""), ("c", PROMPT), ("f", TEXT))
    }
    state = {"nu": 0.0}

    def predict(x, t):
        v = {name: network_call(pipe, row, x, t, text, scale) for name, text in texts.items()}
        gamma, state["nu"] = safety_guidance(
            v["u"], v["c"], v["f"], state["nu"] + 0 * x, **settings
        )
        return v["u"] + scale * (v["c"] - v["u"] - gamma)

    with torch.no_grad():
        wanted = flow_loop(pipe, predict)[0]
    assert (output.image - wanted).abs().max() < 1e-4
    (plain,) = generate(pipe, None, [PROMPT], **options)
    assert (plain - wanted).abs().max() > 1e-2


def read_by_pipeline(pipe, text):
    """Return token and pooled embeddings by the pipeline's own method."""
    if type(pipe).__name__ == "FluxPipeline":
        return pipe.encode_prompt(text, None)[:2]
    found = pipe.encode_prompt(text, None, None, do_classifier_free_guidance=False)
    return found[0], found[2]


def network_call(pipe, row, x, t, text, scale):
    """Return the transformer's velocity, its inputs written out."""
    inputs = {"hidden_states": x, "encoder_hidden_states": text[0], "pooled_projections": text[1]}
    if row == "sd3":
        return pipe.transformer(timestep=t.expand(1), return_dict=False, **inputs)[0]
    positions = [[0, i, j] for i in range(4) for j in range(4)]
    return pipe.transformer(
        timestep=t.expand(1) / 1000,
        guidance=torch.tensor([scale]),
        img_ids=torch.tensor(positions).float(),
        txt_ids=torch.zeros(text[0].shape[1], 3),
        return_dict=False,
        **inputs,
    )[0]


@pytest.mark.parametrize("row", ["sd35", *nightly("flux", "flux from an image")])
def test_a_negative_prompt_is_the_pipelines_own(pipes, generate, row):
    options = options_of(row, 2, num_inference_steps=2)
    guard = {"name": "negative-prompt", "text": "a green cone"}
    outputs = generate(pipes[row], [guard], PROMPTS[:2], **options)
    own = options | {"negative_prompt": ["a green cone"] * 2}
    base = generate(pipes[row], None, PROMPTS[:2], **own)
    assert np.abs(np.stack([o.image for o in outputs]) - base).max() < 1e-5


@pytest.mark.parametrize("row", ["flux"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"true_cfg_scale": 1.0}, "true_cfg_scale must be > 1 with sld, got 1.0. It acts through"),
        ({"true_cfg_scale": float("nan")}, "true_cfg_scale must be > 1 with sld, got nan"),
        ({"negative_prompt": None}, "negative_prompt must be given with sld on a FluxPipeline"),
    ],
)
def test_guidance_on_flux_needs_true_guidance(pipes, generate, row, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        generate(pipes[row], [{"name": "sld", "text": TEXT}], [PROMPT], **options_of(row) | changes)
    assert "\n" not in str(caught.value)


def test_image_prompts_in_the_attention_of_flux_are_refused(pipes, generate):
    hidden = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.zeros(1, 1, 8)]}}
    with pytest.raises(ConfigError, match="joint_attention_kwargs must have no image prompt"):
        generate(pipes["flux"], [SAFREE], [PROMPT], **options_of("flux"), **hidden)


def test_the_rows_of_a_text_are_those_of_its_encoders(pipes):
    wanted = {
        "sd1": [1, 2, 3],
        "sdxl": [1, 2, 3],
        "sd3": [1, 2, 3],
        "sd35": [1, 2, 3, 32, 33, 34],
        "flux": [0, 1, 2],
    }
    for row, rows in wanted.items():
        adapter = PipelineAdapter(pipes[row])
        assert adapter.token_rows("a red cube") == rows
        if row == "flux":  # no token that is not read
            assert adapter.token_rows("a red cube", {"max_sequence_length": 3}) == [0, 1]


def test_a_stack_guards_flux_with_true_guidance(pipes):
    model = Model("flux", pipes["flux"])
    stack = Stack(name="s", model="flux", guards=({"name": "sld", "preset": "max", "text": TEXT},))
    loaded = LoadedStack(stack, model, "0" * 64, GuardedPipeline(model.pipeline, stack.guards))
    config = GenerationConfig(num_inference_steps=1, true_cfg_scale=4.0)
    (image,) = loaded.generate([Sample(prompt=PROMPT, seed=1)], config)
    assert image.trace.action == "edit"
    (plain,) = safegen.generate(model, [Sample(prompt=PROMPT, seed=1)], config)
    assert image.image.tobytes() != plain.tobytes()
    with pytest.raises(ConfigError, match=r"^true_cfg_scale must be > 1 with sld, got 1\.0\."):
        loaded.generate([Sample(prompt=PROMPT, seed=1)], GenerationConfig(num_inference_steps=1))


def test_layers_that_sd3_skips_are_refused(pipes, generate):
    with pytest.raises(ConfigError, match="skip_guidance_layers must be None with safree, got"):
        generate(pipes["sd3"], [SAFREE], [PROMPT], skip_guidance_layers=[1])


@pytest.mark.parametrize("row", ["sd3", "flux"])
def test_reattention_is_refused_without_a_unet(pipes, row):
    with pytest.raises(ConfigError, match="reattend of the guard 'safree' must be False on a"):
        GuardedPipeline(pipes[row], [make_guard("safree", phrases=[TEXT], reattend=True)])


@pytest.mark.parametrize(
    ("row", "places"),
    [("sd3", [(0, 1), (0, 1)]), ("sd35", [(0, 1), (0, 1), (32, 0)]), ("flux", [(0, 0)])],
)
def test_safree_projects_each_encoders_own_rows_and_columns(pipes, generate, row, places):
    pipe, seen = pipes[row], []
    handle = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(read_text(kwargs)), with_kwargs=True
    )
    generate(pipe, [SAFREE], [PROMPT], **options_of(row))
    generate(pipe, None, [PROMPT], **options_of(row))
    handle.remove()
    new, old = (text[-1:] if len(text) == 2 else text for text in (seen[0], seen[len(seen) // 2]))
    assert torch.equal(new.pooled, old.pooled)
    guard, adapter = make_guard(**SAFREE), PipelineAdapter(pipe)
    encoders = adapter.text_encoders()
    assert [(view.row, view.first) for view in encoders] == places
    concept = concept_projectors(encoders, guard.phrases)
    projection = project_prompt(encoders, PROMPT, concept, guard.projection_config)
    assert all(part.triggers for part in projection.encoders)
    wanted = old.hidden[0].clone()
    for part in projection.encoders:
        at = [part.start + j for j in part.triggers]
        wanted[at, part.columns] = old.hidden[0][at, part.columns] @ part.projector.T
    assert torch.allclose(new.hidden[0], wanted, atol=1e-5)
    assert not torch.allclose(new.hidden, old.hidden, atol=1e-4)


def test_t5_pools_the_tokens_that_it_reads(pipes):
    (view,) = PipelineAdapter(pipes["flux"]).text_encoders()
    ids, n = view.tokenize("a red cube")
    hidden = view.normed(ids)[0]
    assert torch.allclose(view.pooled(ids, [n])[0], hidden[: n + 1].mean(0), atol=1e-6)
    assert n == 3
    assert torch.equal(view.pooled_texts(["a red cube"]), view.pooled(ids, [n]))


@pytest.mark.parametrize("row", ["sd1", "sdxl", "sd3", "flux"])
def test_initial_latents_are_those_of_the_call(pipes, generate, row):
    options = options_of(row, height=24, width=40)
    generators = {"generator": [torch.Generator().manual_seed(0)]}
    latents, _ = PipelineAdapter(pipes[row]).initial_latents(options | generators, "crops")
    plain = generate(pipes[row], None, [PROMPT], **options)
    assert np.array_equal(generate(pipes[row], None, [PROMPT], latents=latents, **options), plain)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["sd3", "flux"])
def test_pno_moves_the_latents_by_their_gradient(pipes, generate, passing_settings, row):
    settings = passing_settings["pno"] | {"limit": 1e-6, "iterations": 1, "permutations": 2}
    options = options_of(row, height=24)
    (output,) = generate(pipes[row], [make_guard("pno", **settings)], [PROMPT], **options)
    (record,) = output.trace.guards
    assert output.trace.action == "block"
    assert record.scores["iterations"] == 1
    assert record.scores["last"] <= record.scores["first"]


def test_positions_of_flux_are_never_selected():
    ids, n = torch.arange(12.0).view(4, 3), 4  # as many positions as rows
    kwargs = {"img_ids": ids, "txt_ids": ids, "guidance": torch.arange(4.0)}
    kwargs |= {
        "encoder_hidden_states": torch.randn(n, 4, 2),
        "pooled_projections": torch.randn(n, 2),
    }
    text = Conditioning(torch.zeros(2, 4, 2), torch.ones(2, 2))
    _, replaced = replace_inputs((), kwargs, n, [3, 1], text)
    assert torch.equal(replaced["img_ids"], ids)
    assert torch.equal(replaced["txt_ids"], ids)
    assert replaced["guidance"].tolist() == [3.0, 1.0]
    assert torch.equal(replaced["pooled_projections"], text.pooled)


@pytest.mark.parametrize(
    ("kwargs", "pooled"),
    [
        ({"added_cond_kwargs": None}, None),
        ({"added_cond_kwargs": {"text_embeds": torch.ones(2, 3), "time_ids": torch.ones(2, 6)}}, 3),
        ({"pooled_projections": torch.ones(2, 5), "joint_attention_kwargs": None}, 5),
    ],
)
def test_text_is_read_and_replaced_under_each_networks_names(kwargs, pooled):
    kwargs = {"encoder_hidden_states": torch.zeros(2, 7, 4), **kwargs}
    text = read_text(kwargs)
    assert text.pooled is None if pooled is None else text.pooled.shape == (2, pooled)
    before = copy.deepcopy(kwargs)
    more = None if text.pooled is None else text.pooled + 1
    again = read_text(replace_text(kwargs, Conditioning(text.hidden + 1, more)))
    assert torch.equal(again.hidden, text.hidden + 1)
    assert more is None or torch.equal(again.pooled, more)
    unchanged = read_text(before)
    assert torch.equal(unchanged.hidden, text.hidden)
    assert text.pooled is None or torch.equal(unchanged.pooled, text.pooled)


@pytest.mark.parametrize("output_type", ["latent", *nightly("pil", "pt")])
@pytest.mark.parametrize("row", ["sd3", "flux", *nightly(*IMAGE_CLASSES)])
def test_a_withheld_image_is_black_and_of_the_size_asked_for(pipes, row, output_type):
    protected = safegen.protect(pipes[row], guards=[{"name": "prompt-filter", "words": ["red"]}])
    options = options_of(row) | {"height": 24, "width": 40, "output_type": output_type}
    black = protected(PROMPT, **options)
    shown = protected(PROMPTS[1], **options)
    assert black.nsfw_content_detected == [True]
    assert shown.nsfw_content_detected == [False]
    one, other = (np.asarray(output.images[0], dtype=np.float32) for output in (black, shown))
    assert one.shape == other.shape
    assert not one.any()
    if output_type == "latent" and row == "flux":
        assert unpack_latents(shown.images, torch.Size((1, 16, 6, 10))).shape == (1, 16, 6, 10)
