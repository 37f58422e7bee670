"""LPIPS with random weights against a plain restatement and the `lpips` package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from safegen.core.errors import ConfigError, FileError
from safegen.features.lpips import WIDTHS, AlexTrunk, Lpips, layer_distance
from safegen.features.weights import read_weights


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a trunk file like torchvision's and a heads file like the package's."""
    folder, g = tmp_path_factory.mktemp("lpips"), torch.Generator().manual_seed(0)
    trunk = {
        k: torch.randn(v.shape, generator=g) * (1.4 / v[0].numel() ** 0.5 if v.ndim > 1 else 0.1)
        for k, v in AlexTrunk().state_dict().items()
    }
    save_file(trunk | {"classifier.1.weight": torch.zeros(2, 2)}, folder / "trunk.safetensors")
    torch.save(
        {
            f"lin{n}.model.1.weight": torch.rand(1, c, 1, 1, generator=g)
            for n, c in enumerate(WIDTHS)
        },
        folder / "heads.pth",
    )
    return {"trunk": str(folder / "trunk.safetensors"), "heads": str(folder / "heads.pth")}


@pytest.fixture(scope="module")
def metric(files):
    return Lpips(**files)


def _images(n: int, seed: int = 0, size=(40, 33)):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(n)]


def _plain(files, a: Image.Image, b: Image.Image) -> float:
    """Return LPIPS step by step in float64."""
    w, heads = (
        {k: v.double() for k, v in read_weights(Path(files[k]))[0].items()}
        for k in ("trunk", "heads")
    )

    def acts(image):
        x = torch.from_numpy(np.array(image, np.float64)).permute(2, 0, 1) / 127.5 - 1
        x = torch.stack([(x[0] + 0.030) / 0.458, (x[1] + 0.088) / 0.448, (x[2] + 0.188) / 0.450])[
            None
        ]
        out = []
        for index, stride, padding, pool in (
            (0, 4, 2, False),
            (3, 1, 2, True),
            (6, 1, 1, True),
            (8, 1, 1, False),
            (10, 1, 1, False),
        ):
            x = F.max_pool2d(x, 3, 2) if pool else x
            x = F.conv2d(
                x, w[f"features.{index}.weight"], w[f"features.{index}.bias"], stride, padding
            ).relu()
            out.append(x[0])
        return out

    total = 0.0
    for n, (x, y) in enumerate(zip(acts(a), acts(b), strict=True)):
        gap = (x / (x.norm(dim=0) + 1e-10) - y / (y.norm(dim=0) + 1e-10)) ** 2
        total += float((gap * heads[f"lin{n}.model.1.weight"][0]).sum(0).mean())
    return total


def test_distances_equal_the_plain_restatement(metric, files):
    a, b = _images(3), _images(3, seed=1)
    assert metric.distances(a, b) == pytest.approx(
        [_plain(files, x, y) for x, y in zip(a, b, strict=True)], rel=1e-5
    )


def test_distances_are_zero_for_equal_images_and_symmetric(metric):
    a, b = _images(2), _images(2, seed=1)
    assert metric.distances(a, a).tolist() == [0, 0]
    assert metric.distances(a, b) == pytest.approx(metric.distances(b, a))
    assert (metric.distances(a, b) > 0).all()


def test_more_change_gives_a_larger_distance(metric):
    (a,), (b,) = _images(1), _images(1, seed=1)
    steps = [Image.blend(a, b, t) for t in (0.1, 0.4, 1.0)]
    found = metric.distances([a] * 3, steps)
    assert found.tolist() == sorted(found)


def test_a_pair_does_not_depend_on_its_batch_and_sizes_may_mix(metric):
    a, b = (
        _images(3) + _images(2, size=(50, 50)),
        _images(3, seed=1) + _images(2, seed=1, size=(50, 50)),
    )
    alone = [metric.distances([x], [y])[0] for x, y in zip(a, b, strict=True)]
    assert metric.distances(a[::-1], b[::-1], batch=2)[::-1] == pytest.approx(alone, rel=1e-5)
    assert metric.distances([], []).shape == (0,)


def test_a_layer_ignores_the_norm_of_activations_and_is_linear_in_its_head():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 5, 3, 4, generator=g) for _ in range(2))
    one, two = torch.rand(5, generator=g), torch.rand(5, generator=g)
    torch.testing.assert_close(layer_distance(7 * a, b / 3, one), layer_distance(a, b, one))
    torch.testing.assert_close(
        layer_distance(a, b, one + two), layer_distance(a, b, one) + layer_distance(a, b, two)
    )
    torch.testing.assert_close(layer_distance(a, -a, torch.ones(5)), torch.full((2,), 4.0))


def test_the_side_is_part_of_the_id(files, metric):
    small = Lpips(**files, side=64)
    assert small.id == metric.id + ":side64"
    a, b = _images(1), _images(1, seed=1)
    assert small.distances(a, b) != pytest.approx(metric.distances(a, b))


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (_images(2), _images(1), "equally long, got 2 and 1"),
        (_images(1), _images(1, size=(50, 50)), "must have one size"),
        (_images(1, size=(40, 30)), _images(1, size=(40, 30)), "at least 31 pixels"),
    ],
)
def test_invalid_pairs_are_refused(metric, a, b, words):
    with pytest.raises(ConfigError, match=words):
        metric.distances(a, b)


def test_other_weights_are_refused(files, tmp_path):
    with pytest.raises(FileError, match="does not have the weights of AlexNet's convolutions"):
        Lpips(trunk=files["heads"], heads=files["heads"])
    with pytest.raises(
        FileError, match=r"lin0\.model\.1\.weight must be \(1, 64, 1, 1\), got nothing"
    ):
        Lpips(trunk=files["trunk"], heads=files["trunk"])
    with pytest.raises(ConfigError, match="side must be at least 31 for LPIPS, got 16"):
        Lpips(**files, side=16)


@pytest.mark.filterwarnings(
    "ignore:.*pretrained.*:UserWarning", "ignore:Arguments other than a weight enum.*:UserWarning"
)
def test_distances_equal_the_lpips_packages(files, metric):
    package = pytest.importorskip(
        "lpips", exc_type=ImportError
    )  # needs torchvision; not in our extras
    oracle = package.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False).eval()
    oracle.load_state_dict(torch.load(files["heads"], weights_only=True), strict=False)
    trunk = AlexTrunk()
    trunk.load_state_dict(metric._net.state_dict())
    for part in (
        oracle.net.slice1,
        oracle.net.slice2,
        oracle.net.slice3,
        oracle.net.slice4,
        oracle.net.slice5,
    ):
        for index, layer in part.named_children():
            layer.load_state_dict(trunk.features[int(index)].state_dict())
    a, b = _images(3), _images(3, seed=1)
    x, y = (
        torch.from_numpy(np.stack([np.asarray(i, np.float32) for i in s])).permute(0, 3, 1, 2)
        / 127.5
        - 1
        for s in (a, b)
    )
    with torch.no_grad():
        assert metric.distances(a, b) == pytest.approx(oracle(x, y).flatten().numpy(), rel=1e-5)
