"""CROPS: where probes lie, how their share decides, and that they do not change the image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from safegen.core.errors import ConfigError
from safegen.guards import GuardConfig, GuardResult, make_guard
from safegen.guards.core.adapter import PipelineAdapter
from safegen.guards.core.base import Guard, GuardHook
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.crops import CropsConfig, neighbors
from safegen.guards.pno import ClipScore
from safegen.judges import Detection, Detections

PROMPTS = ["a red cube on a white table", "a blue ball in the grass"]
CROPS = {"name": "crops", "judge": "mini", "probes": 4, "steps": 1}


ANSWERS = {
    "unsafe": Detections((Detection("bad", 0.9),)),
    "safe": Detections(()),
    "unjudged": Detections((), unjudged="torn"),
}


def judge_of(monkeypatch, outcomes):
    """Give the guard a judge with `outcomes` in turn for the first image, that stores images."""

    class FixedJudge:
        id, labels, label_space, threshold = "fixed", ("bad",), ("bad",), 0.5

        def __init__(self):
            self.seen, self.outcomes = [], iter(outcomes)

        def detect(self, images):
            self.seen.append([np.asarray(i, dtype=int) for i in images])
            return [ANSWERS[next(self.outcomes)], *[ANSWERS["safe"]] * (len(images) - 1)]

    judge = FixedJudge()
    monkeypatch.setattr(CropsConfig, "load_judge", lambda self: judge)
    return judge


@pytest.mark.parametrize("shape", ["spherical", "circular"])
def test_neighbors_have_the_angle_and_norm(shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 8, generator=g)
    outputs = neighbors(x, g, angle=0.4, n=6, shape=shape).flatten(1).double()
    start = x.flatten().double()
    assert torch.allclose(outputs.norm(dim=1), start.norm().expand(6), rtol=1e-5)
    assert torch.allclose(
        outputs @ start / start.norm() ** 2, torch.full((6,), math.cos(0.4)).double(), rtol=1e-4
    )
    off = outputs - math.cos(0.4) * start
    between = (off @ off.T) / (off.norm(dim=1)[:, None] * off.norm(dim=1))
    if shape == "circular":  # neighboring probes have equal distances
        assert all(
            float(between[j, (j + 1) % 6]) == pytest.approx(math.cos(math.pi / 3), abs=1e-4)
            for j in range(6)
        )
    else:
        assert float((between - torch.eye(6)).abs().max()) < 0.5


@pytest.mark.parametrize(
    ("outcomes", "stopped"),
    [
        (["safe"] * 4, False),
        (["unsafe", "safe", "safe", "safe"], False),
        (["unsafe", "safe", "unsafe", "safe"], True),
        (["unjudged"] * 2 + ["safe"] * 2, True),
    ],
)
def test_blocks_by_the_share_of_unsafe_and_unjudged_probes(
    tiny_model, generate, monkeypatch, outcomes, stopped
):
    judge_of(monkeypatch, outcomes)
    one, other = generate(tiny_model.pipeline, [CROPS], PROMPTS)
    share = sum(o != "safe" for o in outcomes) / 4
    assert one.trace.guards[0].scores == {"share": share}
    assert (one.image is None, one.trace.action) == (stopped, "block" if stopped else "none")
    assert other.image is not None


def test_a_judge_with_a_missing_result_withholds(tiny_model, generate, monkeypatch):
    judge = judge_of(monkeypatch, ["safe"] * 4)
    monkeypatch.setattr(type(judge), "detect", lambda self, images: [ANSWERS["safe"]])
    outputs = generate(tiny_model.pipeline, [CROPS], PROMPTS)
    assert [o.image for o in outputs] == [None, None]
    assert outputs[0].trace.reason == "error: crops: 1 results of the judge for 2 images"


@pytest.mark.parametrize("moves", ["start", "embedding"])
def test_probes_do_not_change_the_image(tiny_model, generate, monkeypatch, moves):
    judge = judge_of(monkeypatch, ["safe"] * 4)
    outputs = generate(tiny_model.pipeline, [CROPS | {"moves": moves}], PROMPTS)
    assert np.array_equal(
        np.stack([o.image for o in outputs]), generate(tiny_model.pipeline, None, PROMPTS)
    )
    assert len(judge.seen) == 4
    assert all(len(images) == 2 for images in judge.seen)


NEAR = CROPS | {"probes": 1, "steps": None, "angle": 1e-4}


@pytest.mark.parametrize("moves", ["start", "embedding"])
def test_a_probe_at_a_tiny_angle_equals_the_image(tiny_model, generate, monkeypatch, moves):
    judge = judge_of(monkeypatch, ["safe"])
    (output,) = generate(
        tiny_model.pipeline, [NEAR | {"moves": moves}], PROMPTS[:1], output_type="pil"
    )
    assert np.abs(judge.seen[0][0] - np.asarray(output.image, dtype=int)).max() <= 2


def test_probes_use_the_other_guards_of_the_stack(tiny_model, generate, monkeypatch):
    plain, guarded = (judge_of(monkeypatch, ["safe"]) for _ in range(2))
    for judge, more in (
        (plain, []),
        (guarded, [{"name": "sld", "preset": "max", "text": "a green cone"}]),
    ):
        monkeypatch.setattr(CropsConfig, "load_judge", lambda self, judge=judge: judge)
        judge.seen = []
        generate(tiny_model.pipeline, [CROPS | {"probes": 1}, *more], PROMPTS[:1])
    assert not np.array_equal(plain.seen[0][0], guarded.seen[0][0])


def test_refuses_calls_without_initial_latents_per_image(tiny_model, tiny_wan, generate):
    guard = make_guard(**CROPS)
    with pytest.raises(ConfigError, match="generator must be a list"):
        GuardedPipeline(tiny_model.pipeline, [guard]).generate(PROMPTS, num_inference_steps=2)
    with pytest.raises(
        ConfigError,
        match="'crops' cannot run on a WanPipeline: it needs a StableDiffusionPipeline or",
    ):
        GuardedPipeline(tiny_wan, [guard])
    with pytest.raises(ConfigError, match="num_images_per_prompt must be 1 with crops, got 2"):
        generate(tiny_model.pipeline, [guard], PROMPTS, num_images_per_prompt=2)
    assert make_guard("crops", "one-step", concept="skulls").steps == 1


class RecorderConfig(GuardConfig):
    """Settings of a guard that stores the embeddings left by the guards before it."""

    name: str = "seen"
    hook_points = frozenset({"prompt_embeds"})

    def build(self, adapter):
        return RecorderGuard(self)


class RecorderGuard(Guard):
    def __init__(self, guard):
        super().__init__(guard)
        self.texts = []

    def start(self, call):
        hook = GuardHook()
        hook.edit_prompt_embeds = lambda text: self.texts.append(text) or text
        return hook


@pytest.mark.parametrize("family", ["sd", "xl"])
@pytest.mark.parametrize("shape", ["spherical", "circular"])
def test_embedding_probes_rotate_the_prompts_tokens_only(
    tiny_model, tiny_xl, generate, monkeypatch, family, shape
):
    pipe = {"sd": tiny_model.pipeline, "xl": tiny_xl}[family]
    judge = judge_of(monkeypatch, ["safe"] * 3)
    guard = CROPS | {"moves": "embedding", "shape": shape, "probes": 3, "angle": 0.4}
    engine = GuardedPipeline(pipe, [make_guard(**guard), RecorderConfig()])
    generate(pipe, engine=engine, prompts=PROMPTS)
    texts = engine.guards[1].texts
    assert len(texts) == 3 + 4  # one step per probe, then those of the image
    plain = PipelineAdapter(pipe).encode(PROMPTS)
    assert all(torch.equal(text.hidden, plain.hidden) for text in texts[3:])
    for text in texts[:3]:
        for i, prompt in enumerate(PROMPTS):
            old, new, ends = (
                plain.hidden[i].double(),
                text.hidden[i].double(),
                PipelineAdapter(pipe).count_tokens(prompt)[0] - 1,
            )
            turned = [j for j in range(len(old)) if not torch.equal(old[j], new[j])]
            assert turned == list(range(1, ends))
            assert torch.allclose(new.norm(dim=1), old.norm(dim=1), rtol=1e-5)
            assert torch.allclose(
                torch.cosine_similarity(old, new)[turned],
                torch.full((len(turned),), math.cos(0.4), dtype=torch.double),
                atol=1e-5,
            )
        assert plain.pooled is None or torch.equal(text.pooled, plain.pooled)
    assert not torch.equal(texts[0].hidden, texts[1].hidden)
    assert not np.array_equal(judge.seen[0][0], judge.seen[1][0])


def test_embedding_probes_reach_the_reference_stream(tiny_model, generate, monkeypatch):
    judge_of(monkeypatch, ["safe"])
    dual = make_guard("dual-latent", phrases=["a red cube", "red"], start=0.0)
    engine = GuardedPipeline(
        tiny_model.pipeline,
        [make_guard(**NEAR | {"moves": "embedding", "angle": 0.4}), RecorderConfig(), dual],
    )
    generate(tiny_model.pipeline, engine=engine, prompts=PROMPTS)
    probe = engine.guards[1].texts[0].hidden
    assert len(probe) == 4  # two prompts, each with a reference stream
    assert torch.equal(probe[:2], probe[2:])


class MoverConfig(GuardConfig):
    """Settings of a guard that replaces the initial latents, as pno does."""

    name: str = "mover"
    hook_points = frozenset({"probe"})

    def build(self, adapter):
        return MoverGuard(self)


class MoverGuard(Guard):
    def probe(self, generate, prompts, options):
        rng = torch.Generator().manual_seed(7)
        return [
            GuardResult("edit", "moved", latents=torch.randn((4, 8, 8), generator=rng))
            for _ in prompts
        ]


def test_probes_start_from_latents_of_an_earlier_guard(tiny_model, generate, monkeypatch):
    judge = judge_of(monkeypatch, ["safe"])
    outputs = generate(
        tiny_model.pipeline, [MoverConfig(), make_guard(**NEAR)], PROMPTS, output_type="pil"
    )
    plain = generate(tiny_model.pipeline, None, PROMPTS, output_type="pil")
    for i in range(2):
        assert np.abs(judge.seen[0][i] - np.asarray(outputs[i].image, dtype=int)).max() <= 2
        assert np.abs(judge.seen[0][i] - np.asarray(plain[i], dtype=int)).max() > 8


def test_probes_start_from_latents_of_pno(tiny_model, generate, monkeypatch):
    judge = judge_of(monkeypatch, ["safe", "safe"])
    monkeypatch.setattr(ClipScore, "__call__", lambda self, images: images[:, 0].mean(dim=(1, 2)))
    pno = {
        "name": "pno",
        "weights": "mini",
        "unsafe": ["a skull"],
        "safe": ["a castle"],
        "judge": "mini",
        "permutations": 4,
    }
    (own,) = generate(tiny_model.pipeline, [pno | {"limit": 0.99}], PROMPTS[:1], output_type="pil")
    judge.seen = []
    judge.outcomes = iter(["safe", "safe"])
    limit = own.trace.guards[0].scores["first"] - 0.005
    (output,) = generate(
        tiny_model.pipeline,
        [pno | {"limit": limit}, make_guard(**NEAR)],
        PROMPTS[:1],
        output_type="pil",
    )
    assert output.trace.guards[0].reason == "moved"
    assert np.abs(judge.seen[0][0] - np.asarray(output.image, dtype=int)).max() <= 2
    assert np.abs(judge.seen[0][0] - np.asarray(own.image, dtype=int)).max() > 2


def test_probes_keep_their_options_if_another_prompt_is_blocked(tiny_model, generate, monkeypatch):
    judge = judge_of(monkeypatch, ["safe"])
    guards = [{"name": "prompt-filter", "words": ["red cube"]}, make_guard(**NEAR)]
    gone, output = generate(
        tiny_model.pipeline,
        guards,
        PROMPTS,
        output_type="pil",
        negative_prompt=["a green cone", "a red cube in the grass"],
    )
    assert gone.image is None
    assert np.abs(judge.seen[0][0] - np.asarray(output.image, dtype=int)).max() <= 2


def test_probes_start_from_the_latents_of_the_call(tiny_model, generate, monkeypatch):
    judge = judge_of(monkeypatch, ["safe"])
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    outputs = generate(
        tiny_model.pipeline, [make_guard(**NEAR)], PROMPTS, output_type="pil", latents=latents
    )
    plain = generate(tiny_model.pipeline, None, PROMPTS, output_type="pil", latents=latents)
    assert [o.image.tobytes() for o in outputs] == [p.tobytes() for p in plain]
    assert np.abs(judge.seen[0][0] - np.asarray(plain[0], dtype=int)).max() <= 2
    with pytest.raises(ConfigError, match="latents must have one row per image, 2, got 1"):
        generate(tiny_model.pipeline, [make_guard(**NEAR)], PROMPTS, latents=latents[:1])


def test_probes_do_not_run_the_deprecated_callback(tiny_model, generate, monkeypatch):
    judge_of(monkeypatch, ["safe"] * 4)
    seen = []
    with pytest.warns(FutureWarning, match="callback"):
        generate(
            tiny_model.pipeline,
            [CROPS],
            PROMPTS,
            callback=lambda i, t, latents: seen.append(i),
            callback_steps=1,
        )
    assert seen == [0, 1, 2, 3]


def test_probes_shorter_than_the_warmup_of_sld_run_and_a_shorter_call_is_refused(
    tiny_model, generate
):
    guards = [
        make_guard("crops", "one-step", judge="mini", threshold=1.0, probes=1),
        make_guard("sld", "released", text="a red cube"),
    ]
    options = {"prompts": PROMPTS, "output_type": "pil"}
    crops, sld = generate(tiny_model.pipeline, guards, num_inference_steps=11, **options)[
        0
    ].trace.guards
    assert (crops.calls, sld.scores["steps"]) == (1, 1)
    with pytest.raises(ConfigError, match="must be less than the run's 10 steps"):
        generate(tiny_model.pipeline, guards, num_inference_steps=10, **options)
