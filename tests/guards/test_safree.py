"""SAFREE: projectors by algebra, triggers, the filter, calibration, and re-attention by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from safegen.core.errors import ConfigError, UnusedSettingWarning
from safegen.guards import GuardConfig, make_guard
from safegen.guards.core.adapter import PipelineAdapter
from safegen.guards.core.base import Guard, GuardHook
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.core.result import InvalidResultError
from safegen.guards.safree.projection import (
    ProjectionConfig,
    apply_projection,
    combined_projector,
    concept_projectors,
    project_prompt,
    projection_distance,
    span,
    triggers,
)
from safegen.guards.safree.reattention import Reattention, reattend
from safegen.guards.safree.safree import calibrate, filter_steps
from safegen.models.text_encoder import TextEncoderView, text_encoders

CUBE = {"name": "safree", "phrases": ["a red cube", "red"]}
PROMPT = "a red cube on a white table"


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_vectors_without_a_span_are_refused(bad):
    vectors = torch.zeros(2, 4)
    vectors[1, 2] = bad
    with pytest.raises(InvalidResultError, match="text embeddings must be finite, and not all"):
        span(vectors)


def test_span_equals_the_formula_of_the_paper(rng):
    c = torch.randn(5, 16, generator=rng)
    wide = c.T.double()
    assert torch.allclose(
        span(c).double(), wide @ torch.linalg.pinv(wide.T @ wide) @ wide.T, atol=1e-5
    )
    assert torch.allclose(span(c) @ c[2], c[2], atol=1e-5)
    assert torch.allclose(
        span(torch.cat([c, 2 * c])), span(c), atol=1e-5
    )  # repeated phrases change nothing


def test_only_the_released_order_removes_the_whole_concept(rng):
    concept, prompt = (span(torch.randn(n, 16, generator=rng)) for n in (3, 8))
    x = torch.randn(4, 16, generator=rng)
    left = [
        (x @ combined_projector(concept, prompt, order=order).T @ concept).norm()
        for order in ("code", "paper")
    ]
    assert left[0] < 1e-5 < 0.1 < left[1]
    kept = x @ combined_projector(concept, prompt, order="paper").T
    assert torch.allclose(
        kept @ prompt, kept, atol=1e-5
    )  # the paper's order stays in the prompt's span


def test_triggers_equal_the_definition_token_by_token(rng):
    concept = span(torch.eye(6)[:2])
    near = torch.tensor([5.0, 5, 1, 0, 0, 0]) + 0.01 * torch.randn(5, 6, generator=rng)
    near[3] = torch.tensor([1.0, 0, 3, 3, 0, 0])
    assert triggers(near, concept, alpha=0.01) == [False, False, False, True, False]
    assert triggers(near[:1], concept, alpha=0.01) == [True]
    d = (near - near @ concept).norm(dim=1)
    for alpha in (0.0, 0.3):  # the definition, token by token
        means = [torch.cat([d[:j], d[j + 1 :]]).mean() for j in range(5)]
        assert triggers(near, concept, alpha=alpha) == [
            bool(d[j] >= (1 + alpha) * means[j]) for j in range(5)
        ]


def test_filter_steps_equal_the_published_curve():
    assert [filter_steps(b, middle=5.333, slope=2.5) for b in (0.45, 0.5, 0.55, 0.6)] == [
        0,
        2,
        7,
        10,
    ]
    assert [filter_steps(b, middle=5.333, slope=2.5) for b in (-1e3, 0.0, 1.0, 1e3)] == [
        0,
        0,
        10,
        10,
    ]


def test_only_triggers_change_and_lose_the_concept(tiny_model):
    guard, adapter = make_guard(**CUBE), PipelineAdapter(tiny_model.pipeline)
    (concept,) = concept_projectors(text_encoders(tiny_model.pipeline), guard.phrases)
    projection = project_prompt(
        text_encoders(tiny_model.pipeline), PROMPT, [concept], guard.projection_config
    )
    assert projection.triggers
    from safegen.guards.core.base import Call
    from safegen.models.families.conditioning import Conditioning

    hook = guard.build(adapter).start(Call(adapter, (PROMPT,), [""], {}, num_steps=4))
    before = adapter.encode([PROMPT])
    after = hook.edit_prompt_embeds(Conditioning(before.hidden)).hidden
    moved = [
        i
        for i in range(before.hidden.shape[1])
        if not torch.equal(before.hidden[0, i], after[0, i])
    ]
    assert moved == [j + 1 for j in projection.triggers]  # start, end and padding stay
    assert (after[0, moved] @ concept).norm() < 1e-3 * (before.hidden[0, moved] @ concept).norm()


def test_changes_the_image_and_reports_how(tiny_model, generate):
    base = generate(tiny_model.pipeline, None, [PROMPT])
    (output,) = generate(tiny_model.pipeline, [CUBE], [PROMPT])
    assert np.abs(output.image - base[0]).max() > 1e-3
    record = output.trace.guards[0]
    assert (record.action, record.scores["steps"]) == ("edit", 4.0)
    assert record.scores["triggers"] >= 1
    (none,) = generate(tiny_model.pipeline, [CUBE | {"strength": 0.0}], [PROMPT])
    assert np.array_equal(none.image, base[0])


@pytest.mark.parametrize(("middle", "steps"), [(-100.0, 1 + round(10 * 20 / 50)), (100.0, 1)])
def test_the_filter_always_passes_the_first_step(tiny_model, generate, middle, steps):
    guard = CUBE | {"middle": middle, "slope": 2.5}
    (output,) = generate(tiny_model.pipeline, [guard], [PROMPT], num_inference_steps=20)
    assert output.trace.guards[0].scores["steps"] == steps


def test_each_row_is_projected_by_its_own_prompt(tiny_model, generate):
    prompts = [PROMPT, "a blue ball in the grass"]
    both_rows = generate(tiny_model.pipeline, [CUBE], prompts)
    for i, prompt in enumerate(prompts):
        (alone,) = generate(tiny_model.pipeline, [CUBE], [prompt], seed=i)
        assert np.abs(alone.image - both_rows[i].image).max() < 2e-4


def test_an_empty_prompt_has_no_trigger(tiny_model, generate):
    (output,) = generate(tiny_model.pipeline, [CUBE], [""])
    assert output.trace.action == "none"
    assert np.array_equal(output.image, generate(tiny_model.pipeline, None, [""])[0])


def test_calibrate_returns_the_midpoint_or_refuses(tiny_model):
    guard, adapter = make_guard(**CUBE), PipelineAdapter(tiny_model.pipeline)
    reader, concept = (
        TextEncoderView(tiny_model.pipeline),
        concept_projectors(text_encoders(tiny_model.pipeline), guard.phrases),
    )

    def distance(prompt):
        ids, n = reader.tokenize(prompt)
        (part,) = project_prompt([reader], prompt, concept, guard.projection_config).encoders
        return 10 * projection_distance(reader.hidden(ids)[0, : n + 2], part.projector)

    low, high = sorted(["a red cube", "a blue ball in the grass"], key=distance)
    assert calibrate(adapter, guard, unsafe=[high], benign=[low]) == pytest.approx(
        (distance(low) + distance(high)) / 2, rel=1e-5
    )
    with pytest.raises(ConfigError, match="unsafe prompts must move farther than benign ones"):
        calibrate(adapter, guard, unsafe=[low], benign=[high])
    with pytest.raises(ConfigError, match="got 0 unsafe and 1 benign"):
        calibrate(adapter, guard, unsafe=[], benign=[low])


def test_calibrate_refuses_an_encoder_of_nan_in_one_line(make_model):
    pipe = make_model().pipeline
    next(pipe.text_encoder.parameters()).data.fill_(math.nan)
    with pytest.raises(ConfigError, match="text embeddings must be finite") as caught:
        calibrate(PipelineAdapter(pipe), make_guard(**CUBE), unsafe=["a cube"], benign=["a ball"])
    assert "\n" not in str(caught.value)


def test_warns_of_slope_without_filter_and_refuses_wan(tiny_wan):
    with pytest.warns(UnusedSettingWarning, match="slope has no effect without middle"):
        make_guard(**CUBE, slope=5.0)
    says = "it needs a StableDiffusionPipeline or StableDiffusionImg2ImgPipeline or "
    with pytest.raises(ConfigError, match=says):
        GuardedPipeline(tiny_wan, [make_guard(**CUBE)])


def test_each_encoder_of_sdxl_projects_by_its_own_span(tiny_xl):
    guard, adapter = make_guard(**CUBE), PipelineAdapter(tiny_xl)
    encoders = text_encoders(tiny_xl)
    concept = concept_projectors(encoders, guard.phrases)
    projection = project_prompt(
        encoders, PROMPT, concept, ProjectionConfig(0.0, "code", distance=True)
    )
    assert [(part.columns, bool(part.triggers)) for part in projection.encoders] == [
        (slice(0, 32), True),
        (slice(32, 56), True),
    ]
    before = adapter.encode([PROMPT]).hidden[0]
    after = apply_projection(before, projection, 1.0)
    for part, own in zip(projection.encoders, concept, strict=True):
        old, new, at = (
            before[:, part.columns],
            after[:, part.columns],
            [j + 1 for j in part.triggers],
        )
        assert [i for i in range(len(before)) if not torch.equal(old[i], new[i])] == at
        assert torch.allclose(new[at], old[at] @ part.projector.T, atol=1e-6)
        assert (new[at] @ own).norm() < 1e-3 * (old[at] @ own).norm()
    # beta, over both encoders' columns: y = (I - P_C) P_I x for every token of the prompt
    ids, n = encoders[0].tokenize(PROMPT)
    assert torch.allclose(
        torch.cat([e.hidden(ids) for e in encoders], dim=2)[0], before, atol=1e-5
    )  # equal to the denoiser's input
    whole = torch.cat(
        [before[: n + 2, part.columns] @ part.projector.T for part in projection.encoders], dim=1
    )
    assert projection.distance == pytest.approx(
        1 - float(torch.cosine_similarity(before[: n + 2], whole, dim=1).mean()), abs=1e-5
    )


def test_pooled_equals_each_encoders_pooled_output(tiny_xl):
    one, two = text_encoders(tiny_xl)
    ids, n = one.tokenize(PROMPT)
    assert torch.equal(one.pooled(ids, [n]), tiny_xl.text_encoder(ids).pooler_output)
    assert torch.equal(two.pooled(ids, [n]), tiny_xl.text_encoder_2(ids).text_embeds)


def test_changes_sdxl_but_not_its_pooled_embeddings(tiny_xl, generate):
    seen = []

    class Last(GuardConfig):
        """Settings of a guard that stores the embeddings left by the guards before it."""

        name: str = "last"
        hook_points = frozenset({"prompt_embeds"})

        def build(self, adapter):
            own = Guard(self)
            own.start = lambda call: LastTurn()
            return own

    class LastTurn(GuardHook):
        def edit_prompt_embeds(self, text):
            seen.append(text)
            return text

    base = generate(tiny_xl, None, [PROMPT])
    (output,) = generate(tiny_xl, [CUBE, Last()], [PROMPT])
    assert np.abs(output.image - base[0]).max() > 1e-3
    assert output.trace.guards[0].scores["steps"] == 4
    plain = PipelineAdapter(tiny_xl).encode([PROMPT])
    assert len(seen) == 4
    assert all(torch.equal(text.pooled, plain.pooled) for text in seen)
    assert not any(torch.equal(text.hidden, plain.hidden) for text in seen)
    (none,) = generate(tiny_xl, [CUBE | {"strength": 0.0}], [PROMPT])
    assert np.array_equal(none.image, base[0])


def by_hand(x, y, scale):
    """Return the re-attention of one map, frequency by frequency."""
    h, w = x.shape
    rows, columns = np.arange(h)[:, None], np.arange(w)[None]
    out = np.zeros((h, w), dtype=complex)
    for u in range(h):
        for v in range(w):
            wave = np.exp(-2j * np.pi * (u * rows / h + v * columns / w))
            f, o = (x * wave).sum(), (y * wave).sum()
            low = u in (0, h - 1) and v in (0, w - 1)  # constant and -1
            out += (
                (scale if low and abs(f) > abs(o) else 1.0)
                * f
                * np.exp(2j * np.pi * (u * rows / h + v * columns / w))
                / (h * w)
            )
    return out.real


@pytest.mark.parametrize("shape", [(4, 4), (6, 4), (5, 8)])
def test_reattend_equals_the_formula_frequency_by_frequency(rng, shape):
    x, y = torch.randn(2, 2, 3, *shape, generator=rng)
    outputs = reattend(x, y, scale=0.2)
    for b in range(2):
        for c in range(3):
            assert np.allclose(
                outputs[b, c].numpy(),
                by_hand(x[b, c].double().numpy(), y[b, c].double().numpy(), 0.2),
                atol=1e-5,
            )
    assert torch.allclose(reattend(x, y, scale=1.0), x, atol=1e-6)
    assert torch.allclose(
        reattend(x, 1e3 * torch.ones_like(x) + 1e3 * y, scale=0.0), x, atol=1e-5
    )  # no frequency exceeds the original
    assert torch.allclose(
        reattend(torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), scale=0.2),
        torch.full((1, 1, 4, 4), 0.2),
        atol=1e-6,
    )


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_reattention_adds_a_row_and_changes_projected_prompts_only(
    tiny_model, tiny_xl, generate, family, monkeypatch
):
    pipe = {"sd": tiny_model.pipeline, "xl": tiny_xl}[family]
    prompts = [PROMPT, "a blue ball in the grass"]
    half = generate(pipe, [CUBE], prompts)
    whole = generate(pipe, [CUBE | {"reattend": True}], prompts)
    acted = [o.trace.guards[0].scores["steps"] > 0 for o in half]
    assert acted[0]
    for a, b, acts in zip(half, whole, acted, strict=True):
        assert (np.abs(a.image - b.image).max() > 1e-3) == acts
    assert whole[0].trace.guards[0].rows == 4
    assert half[0].trace.guards[0].rows == 0
    monkeypatch.setattr("safegen.guards.safree.reattention.SCALES", (1.0, 1.0))
    same = generate(pipe, [CUBE | {"reattend": True}], prompts)
    assert all(np.abs(a.image - b.image).max() < 2e-4 for a, b in zip(half, same, strict=True))


def test_reattention_scales_the_skips_of_the_two_greatest_widths(tiny_model, generate, monkeypatch):
    seen = []
    real = reattend
    monkeypatch.setattr(
        "safegen.guards.safree.reattention.reattend",
        lambda x, y, *, scale: seen.append((scale, tuple(x.shape))) or real(x, y, scale=scale),
    )
    generate(tiny_model.pipeline, [CUBE | {"reattend": True}], [PROMPT], num_inference_steps=1)
    # widths 32 and 16: the first block's two layers and the second's first join features of 32, the
    # last one of 16
    assert seen == [
        (0.9, (1, 32, 4, 4)),
        (0.9, (1, 16, 4, 4)),
        (0.9, (1, 16, 8, 8)),
        (0.2, (1, 16, 8, 8)),
    ]


def test_reattention_is_refused_without_shared_rows_and_withholds_if_removed(tiny_model, generate):
    pipe, guard = tiny_model.pipeline, CUBE | {"reattend": True}
    with pytest.raises(ConfigError, match="max_rows must be >= 3 per image"):
        generate(pipe, [guard], [PROMPT], max_rows=2)
    with pytest.raises(ConfigError, match="guidance_scale must be > 1 with safree"):
        generate(pipe, [guard], [PROMPT], guidance_scale=1.0)
    assert generate(pipe, [CUBE], [PROMPT], guidance_scale=1.0)[0].trace.action == "edit"

    def remove(pipeline, i, t, kwargs):
        if i == 1:
            pipeline.unet.up_blocks[0]._forward_pre_hooks.clear()
        return kwargs

    (gone,) = generate(pipe, [guard], [PROMPT], callback_on_step_end=remove)
    assert (gone.image, gone.trace.reason) == (
        None,
        "error: safree: 1 of 2 up-blocks went through re-attention",
    )
    assert generate(pipe, [guard], [PROMPT])[0].image is not None
    assert not any(block._forward_pre_hooks for block in pipe.unet.up_blocks)


def test_reattention_withholds_where_a_callback_turns_guidance_off(tiny_model, generate):
    from diffusers.callbacks import SDCFGCutoffCallback

    off = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    guard = CUBE | {"reattend": True}
    (output,) = generate(tiny_model.pipeline, [guard], [PROMPT], callback_on_step_end=off)
    reason = "calls: guidance was off or rescaled in 2 of 4 steps, and a guard needs it"
    assert (output.image, output.trace.reason) == (None, reason)
    (plain,) = generate(tiny_model.pipeline, [CUBE], [PROMPT], callback_on_step_end=off)
    assert plain.trace.action == "edit"  # the projection alone needs no guidance


@pytest.mark.parametrize("bad", [0, 1])
def test_re_attention_beside_a_text_of_nan_withholds_that_image(
    tiny_model, generate, monkeypatch, bad
):
    own = Reattention.extra_conditions

    def spoiled(self):
        conditions = dict(own(self))
        for name, embeds in conditions.items():
            hidden = embeds.hidden.clone()
            hidden[bad] = float("nan")
            conditions[name] = embeds.replace_hidden(hidden)
        return conditions

    monkeypatch.setattr(Reattention, "extra_conditions", spoiled)
    guard = {"name": "safree", "phrases": ["a red cube", "red"], "reattend": True}
    outputs = generate(tiny_model.pipeline, [guard], ["a red cube", "a red cube on a table"])
    assert [o.image is None for o in outputs] == [i == bad for i in range(2)]
    assert outputs[bad].trace.reason == "safree: not-finite: features of the original prompt"
