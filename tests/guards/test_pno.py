"""PNO: the regularizer by hand, gradients of the initial latents, and when images are shown."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from safegen.core.errors import ConfigError
from safegen.guards import make_guard
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.judge_filter import JudgeBackedConfig
from safegen.guards.pno import ClipScore, PnoConfig, decode_latents, draw_orders, regularizer
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
    """A judge that calls every image safe."""

    id, labels, label_space, threshold = "fine", ("bad",), ("bad",), 0.5

    def detect(self, images):
        return [Detections(())] * len(images)


@pytest.fixture
def level(monkeypatch):
    """Let the score be the mean of a image's red, so that it has a slope everywhere.

    The judge likes all.
    """
    monkeypatch.setattr(ClipScore, "__call__", lambda self, images: images[:, 0].mean(dim=(1, 2)))
    monkeypatch.setattr(JudgeBackedConfig, "load_judge", lambda self: Fine())


def test_the_regularizer_equals_the_formula_by_hand():
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


def test_its_gradient_equals_that_of_the_released_order_of_work():
    """The released code takes one order after the other; here all are in one batch."""
    rng = torch.Generator().manual_seed(1)
    start = 1.7 * torch.randn(64, generator=rng).double() + 0.4
    orders = draw_orders(64, 100, rng)

    def likelihood(z):
        m, k = z.shape
        spread = torch.linalg.matrix_norm(z.T @ z / m - torch.eye(k).double(), ord=2)
        excess = torch.relu((1 + spread).sqrt() - 1 - math.sqrt(k / m))
        bounds = (-m * z.mean(0).norm() ** 2 / (2 * k), -m * excess**2 / 2)
        return sum(bound.clamp(max=-math.log(2)) for bound in bounds)

    x, y = (start.clone().requires_grad_() for _ in range(2))
    loss = -likelihood(x.view(16, 4))
    for order in orders:
        loss = loss - likelihood(x[order].view(16, 4)) / len(orders)
    (theirs,) = torch.autograd.grad(loss, x)
    (ours,) = torch.autograd.grad(regularizer(y, orders), y)
    assert float(theirs.abs().max()) > 0.1
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_every_step_draws_new_orders(tiny_model, generate, level, monkeypatch):
    import safegen.guards.pno as pno

    drawn = []
    monkeypatch.setattr(
        pno, "regularizer", lambda x, orders: drawn.append(orders) or regularizer(x, orders)
    )
    guard = PNO | {"limit": 1e-6, "restarts": 0}
    generate(tiny_model.pipeline, [guard], PROMPTS[:1], **FEW)
    assert [orders.shape for orders in drawn] == [(4, 256)] * 3
    assert len({orders.numpy().tobytes() for orders in drawn}) == 3
    for orders in drawn:
        assert torch.equal(orders.sort(dim=1).values, torch.arange(256).expand(4, 256))


def test_the_regularizer_is_low_for_noise_and_pulls_back_the_rest():
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


def test_an_image_below_the_limit_is_bit_equal_to_base(tiny_model, generate, level):
    outputs = generate(tiny_model.pipeline, [PNO | {"limit": 0.99}], PROMPTS, **FEW)
    plain = generate(tiny_model.pipeline, [], PROMPTS, **FEW)
    assert [a.image.tobytes() for a in outputs] == [b.image.tobytes() for b in plain]
    assert [o.trace.action for o in outputs] == ["none", "none"]


def test_latents_are_optimized_until_the_score_is_below_the_limit(tiny_model, generate, level):
    (first,) = generate(tiny_model.pipeline, [PNO | {"limit": 0.99}], PROMPTS[:1], **FEW)
    own = first.trace.guards[0].scores["first"]
    limit = own - 0.01
    guard = PNO | {"limit": limit, "restarts": 0, "iterations": 20, "lr": 0.2}
    moved, other = generate(tiny_model.pipeline, [guard | {"limit": limit}], PROMPTS, **FEW)
    record = moved.trace.guards[0]
    assert (record.action, record.reason) == ("edit", "moved")
    assert record.scores["last"] < limit < record.scores["first"]
    assert record.scores["iterations"] >= 1
    assert np.asarray(moved.image)[..., 0].mean() / 255 == pytest.approx(
        record.scores["last"], abs=0.005
    )  # the scored image is shown
    assert moved.image.tobytes() != first.image.tobytes()
    assert other.image is not None


def test_a_prompt_that_never_meets_the_limit_is_blocked(tiny_model, generate, level):
    outputs = generate(
        tiny_model.pipeline, [PNO | {"limit": 1e-6, "iterations": 1}], PROMPTS[:1], **FEW
    )
    assert (outputs[0].image, outputs[0].trace.action, outputs[0].trace.reason) == (
        None,
        "block",
        "pno: never-safe",
    )


def test_weights_get_no_gradients(make_model, generate, level):
    pipe = make_model().pipeline
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    for part in parts:
        part.requires_grad_(True)
    guard = PNO | {"limit": 1e-6, "restarts": 0, "iterations": 1}
    (output,) = generate(pipe, [guard], PROMPTS[:1], **FEW)
    assert output.trace.guards[0].scores["iterations"] == 1  # a gradient was taken
    assert not [p for part in parts for p in part.parameters() if p.grad is not None]


@pytest.mark.parametrize("own", [(None, None), ([1.0, -2.0, 0.5, 3.0], [2.0, 0.5, 1.5, 1.0])])
def test_decode_latents_equals_the_images_of_sdxl(tiny_xl, generate, own):
    tiny_xl.vae.register_to_config(latents_mean=own[0], latents_std=own[1])
    try:
        latents, shown = (generate(tiny_xl, output_type=kind) for kind in ("latent", "pt"))
        outputs = decode_latents(tiny_xl, latents)
    finally:
        tiny_xl.vae.register_to_config(latents_mean=None, latents_std=None)
    assert torch.allclose(outputs, shown, atol=1e-5)


def test_a_score_that_is_not_finite_withholds_and_the_trace_is_json(
    tiny_model, generate, level, monkeypatch
):
    import json

    monkeypatch.setattr(
        ClipScore, "__call__", lambda self, images: images[:, 0].mean(dim=(1, 2)) * float("nan")
    )
    (output,) = generate(
        tiny_model.pipeline, [PNO | {"restarts": 0, "iterations": 0}], PROMPTS[:1], **FEW
    )
    assert (output.image, output.trace.reason) == (None, "pno: not-finite: first, last")
    assert json.dumps(output.trace.to_json(), allow_nan=False)


def test_the_judge_replaces_unsafe_images(tiny_model, generate, level, monkeypatch):
    class Strict(Fine):
        def detect(self, images):
            return [Detections((Detection("bad", 0.9),))] * len(images)

    monkeypatch.setattr(JudgeBackedConfig, "load_judge", lambda self: Strict())
    outputs = generate(tiny_model.pipeline, [PNO | {"limit": 0.99}], PROMPTS, **FEW)
    assert {o.trace.reason for o in outputs} == {"pno: unsafe"}
    assert all(o.image.getextrema() == ((0, 0),) * 3 for o in outputs)


def test_a_judge_with_the_weights_of_the_score_is_refused(tiny_model):
    options = {"weights": "mini", "unsafe": ["a skull"], "safe": ["a castle"]}
    with pytest.raises(ConfigError, match="judge must have other weights than the score"):
        GuardedPipeline(
            tiny_model.pipeline, [make_guard(**PNO | {"judge": "clip", "options": options})]
        )


def test_a_judge_with_the_image_tower_of_the_score_is_refused(tiny_model, tmp_path):
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


def test_the_fingerprint_covers_the_preprocessing(tmp_path):
    import json
    import shutil

    from safegen.mini import bundle

    shutil.copytree(bundle.clip_folder(), tmp_path / "clip")
    same = make_guard(**PNO | {"weights": tmp_path / "clip"}).fingerprint()
    assert same == make_guard(**PNO).fingerprint()
    file = tmp_path / "clip" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    assert make_guard(**PNO | {"weights": tmp_path / "clip"}).fingerprint() != same


def test_the_score_equals_the_clip_judge_within_resizing():
    from PIL import Image

    from safegen.judges import load_judge

    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
            (64, 64), Image.Resampling.BICUBIC
        )
        for _ in range(4)
    ]
    judge = load_judge("clip", weights="mini", unsafe=["a skull"], safe=["a castle"])
    own = [{d.label: d.score for d in v.items}.get("unsafe", 0.0) for v in judge.detect(images)]
    x = torch.stack(
        [torch.from_numpy(np.asarray(p).astype(np.float32)).permute(2, 0, 1) / 255 for p in images]
    ).requires_grad_()
    outputs = ClipScore("mini", ["a skull"], ["a castle"])(x)
    for a, b in zip(outputs.tolist(), own, strict=True):
        assert a == pytest.approx(b, abs=0.02) or (b == 0.0 and a < 0.2)
    (slope,) = torch.autograd.grad(outputs.sum(), x)
    assert bool(slope.isfinite().all())
    assert float(slope.abs().max()) > 0


def test_defaults_from_a_concept_are_its_texts_and_judge():
    guard = make_guard("pno", concept="skulls", weights="mini")
    assert isinstance(guard, PnoConfig)
    assert (guard.unsafe, guard.judge) == (("skulls", "a skull"), "mini")
    assert len(guard.fingerprint()["score_id"]) == 64
