"""Prompt-noise optimisation: the regularizer by hand, gradients that reach the start, and what is shown when."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from safegen.core.errors import ConfigError
from safegen.guards import make_guard
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.judge_filter import JudgeBackedConfig
from safegen.guards.pno import ClipScore, PnoConfig, decode_latents, regularizer
from safegen.judges import Detection, Detections

PNO = {
    "name": "pno",
    "weights": "mini",
    "unsafe": ["a skull"],
    "safe": ["a castle"],
    "judge": "mini",
    "restarts": 2,
    "iterations": 3,
    "permutations": 4,
}
PROMPTS = ["a red cube on a white table", "a blue ball in the grass"]
FEW = {"num_inference_steps": 2, "output_type": "pil"}


class Fine:
    """A judge with weights of its own that likes every picture."""

    id, labels, label_space, threshold = "fine", ("bad",), ("bad",), 0.5

    def detect(self, images):
        return [Detections(())] * len(images)


@pytest.fixture
def level(monkeypatch):
    """Let the score be the mean of a picture's red, so that it has a slope everywhere.

    The judge likes all.
    """
    monkeypatch.setattr(ClipScore, "__call__", lambda self, images: images[:, 0].mean(dim=(1, 2)))
    monkeypatch.setattr(JudgeBackedConfig, "load_judge", lambda self: Fine())


def test_the_regulariser_order_by_order():
    rng = torch.Generator().manual_seed(0)
    x, orders = (
        1.7 * torch.randn(64, generator=rng).double() + 0.4,
        torch.stack([torch.randperm(64, generator=rng) for _ in range(3)]),
    )

    def by_hand(values):
        z = values.reshape(16, 4).numpy()
        one = min(-16 * np.linalg.norm(z.mean(axis=0)) ** 2 / 8, -math.log(2))
        gap = np.linalg.norm(z.T @ z / 16 - np.eye(4), ord=2)
        two = min(-8 * max(math.sqrt(1 + gap) - 1 - math.sqrt(4 / 16), 0) ** 2, -math.log(2))
        return -(one + two)

    want = by_hand(x) + np.mean([by_hand(x[o]) for o in orders])
    assert float(regularizer(x, orders)) == pytest.approx(want, rel=1e-9)


def test_noise_is_left_alone_and_what_is_none_is_pulled_back():
    rng = torch.Generator().manual_seed(0)
    x, orders = (
        torch.randn(1024, generator=rng),
        torch.stack([torch.randperm(1024, generator=rng) for _ in range(8)]),
    )
    floor = 4 * math.log(2)
    assert floor - 1e-6 <= float(regularizer(x, orders)) < 1.3 * floor
    for off in (x + 0.5, 2 * x, torch.ones(1024)):
        odd = off.clone().requires_grad_()
        loss = regularizer(odd, orders)
        (slope,) = torch.autograd.grad(loss, odd)
        assert float(loss.detach()) > 1.5 * floor
        assert float(regularizer(odd.detach() - 0.5 * slope / slope.abs().max(), orders)) < float(
            loss.detach()
        )


def test_a_picture_under_the_limit_is_the_base_bit_for_bit(tiny_model, generate, level):
    found = generate(tiny_model.pipeline, [PNO | {"limit": 0.99}], PROMPTS, **FEW)
    plain = generate(tiny_model.pipeline, [], PROMPTS, **FEW)
    assert [a.image.tobytes() for a in found] == [b.image.tobytes() for b in plain]
    assert [d.trace.action for d in found] == ["none", "none"]


def test_the_start_is_moved_until_the_score_is_under_the_limit(tiny_model, generate, level):
    (first,) = generate(tiny_model.pipeline, [PNO | {"limit": 0.99}], PROMPTS[:1], **FEW)
    own = first.trace.guards[0].scores["first"]
    limit = own - 0.01
    guard = PNO | {"limit": limit, "restarts": 0, "iterations": 20, "lr": 0.2}
    moved, other = generate(tiny_model.pipeline, [guard | {"limit": limit}], PROMPTS, **FEW)
    note = moved.trace.guards[0]
    assert (note.action, note.reason) == ("edit", "moved")
    assert note.scores["last"] < limit < note.scores["first"]
    assert note.scores["iterations"] >= 1
    assert np.asarray(moved.image)[..., 0].mean() / 255 == pytest.approx(
        note.scores["last"], abs=0.005
    )  # what is shown was scored
    assert moved.image.tobytes() != first.image.tobytes()
    assert other.image is not None


def test_what_never_comes_under_the_limit_is_not_drawn(tiny_model, generate, level):
    found = generate(
        tiny_model.pipeline, [PNO | {"limit": 1e-6, "iterations": 1}], PROMPTS[:1], **FEW
    )
    assert (found[0].image, found[0].trace.action, found[0].trace.reason) == (
        None,
        "block",
        "pno: never-safe",
    )


def test_weights_that_want_gradients_are_given_none(make_model, generate, level):
    pipe = make_model().pipeline
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    for part in parts:
        part.requires_grad_(True)
    guard = PNO | {"limit": 1e-6, "restarts": 0, "iterations": 1}
    (found,) = generate(pipe, [guard], PROMPTS[:1], **FEW)
    assert found.trace.guards[0].scores["iterations"] == 1  # a gradient was taken
    assert not [p for part in parts for p in part.parameters() if p.grad is not None]


@pytest.mark.parametrize("own", [(None, None), ([1.0, -2.0, 0.5, 3.0], [2.0, 0.5, 1.5, 1.0])])
def test_what_is_scored_is_what_sdxl_shows_whatever_its_latents_mean(tiny_xl, generate, own):
    tiny_xl.vae.register_to_config(latents_mean=own[0], latents_std=own[1])
    try:
        latents, shown = (generate(tiny_xl, output_type=kind) for kind in ("latent", "pt"))
        found = decode_latents(tiny_xl, latents)
    finally:
        tiny_xl.vae.register_to_config(latents_mean=None, latents_std=None)
    assert torch.allclose(found, shown, atol=1e-5)


def test_a_score_that_is_no_number_withholds_and_the_trail_is_plain_json(
    tiny_model, generate, level, monkeypatch
):
    import json

    monkeypatch.setattr(
        ClipScore, "__call__", lambda self, images: images[:, 0].mean(dim=(1, 2)) * float("nan")
    )
    (found,) = generate(
        tiny_model.pipeline, [PNO | {"restarts": 0, "iterations": 0}], PROMPTS[:1], **FEW
    )
    assert (found.image, found.trace.reason) == (None, "pno: not-finite: first, last")
    assert json.dumps(found.trace.to_json(), allow_nan=False)


def test_the_judge_has_the_last_word(tiny_model, generate, level, monkeypatch):
    class Strict(Fine):
        def detect(self, images):
            return [Detections((Detection("bad", 0.9),))] * len(images)

    monkeypatch.setattr(JudgeBackedConfig, "load_judge", lambda self: Strict())
    found = generate(tiny_model.pipeline, [PNO | {"limit": 0.99}], PROMPTS, **FEW)
    assert {d.trace.reason for d in found} == {"pno: unsafe"}
    assert all(d.image.getextrema() == ((0, 0),) * 3 for d in found)


def test_the_model_that_is_optimised_must_not_judge(tiny_model):
    options = {"weights": "mini", "unsafe": ["a skull"], "safe": ["a castle"]}
    with pytest.raises(ConfigError, match="judge must have other weights than the score"):
        GuardedPipeline(
            tiny_model.pipeline, [make_guard(**PNO | {"judge": "clip", "options": options})]
        )


def test_a_judge_that_sees_through_the_same_tower_must_not_judge_either(tiny_model, tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"prompts": torch.randn(2, 64, generator=torch.Generator().manual_seed(0))},
        tmp_path / "two.safetensors",
    )
    options = {"weights": "mini", "prompts": str(tmp_path / "two.safetensors")}
    with pytest.raises(ConfigError, match=r"got q16:"):
        GuardedPipeline(
            tiny_model.pipeline, [make_guard(**PNO | {"judge": "q16", "options": options})]
        )


def test_how_the_score_scales_pictures_decides_the_hash(tmp_path):
    import json
    import shutil

    from safegen.mini import bundle

    shutil.copytree(bundle.clip_folder(), tmp_path / "clip")
    same = make_guard(**PNO | {"weights": tmp_path / "clip"}).fingerprint()
    assert same == make_guard(**PNO).fingerprint()
    file = tmp_path / "clip" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    assert make_guard(**PNO | {"weights": tmp_path / "clip"}).fingerprint() != same


def test_the_score_is_the_judges_own_within_its_resizing():
    from PIL import Image

    from safegen.judges import load_judge

    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        for _ in range(4)
    ]
    judge = load_judge("clip", weights="mini", unsafe=["a skull"], safe=["a castle"])
    own = [{d.label: d.score for d in v.items}.get("unsafe", 0.0) for v in judge.detect(pictures)]
    x = torch.stack(
        [
            torch.from_numpy(np.asarray(p).astype(np.float32)).permute(2, 0, 1) / 255
            for p in pictures
        ]
    ).requires_grad_()
    found = ClipScore("mini", ["a skull"], ["a castle"])(x)
    for a, b in zip(found.tolist(), own, strict=True):
        assert a == pytest.approx(b, abs=0.02) or (b == 0.0 and a < 0.2)
    (slope,) = torch.autograd.grad(found.sum(), x)
    assert bool(slope.isfinite().all())
    assert float(slope.abs().max()) > 0


def test_a_concept_lends_its_texts_and_its_judge():
    guard = make_guard("pno", concept="skulls", weights="mini")
    assert isinstance(guard, PnoConfig)
    assert (guard.unsafe, guard.judge) == (("skulls", "a skull"), "mini")
    assert len(guard.fingerprint()["score_id"]) == 64
