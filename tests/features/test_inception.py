"""Inception of the FID: names, shapes, resizes, and checks of its weights.

The published weights are not available here. With random weights the trunk equals torch-fidelity's
bit for bit, if that is installed.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from safegen.core.errors import ConfigError, FileError
from safegen.features.inception import (
    Inception,
    Trunk,
    inception_clean,
    inception_torch,
    resize_clean,
    resize_tf1,
    resize_torch,
)


def _images(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def test_names_and_shapes_are_those_of_the_port():
    state = Trunk().state_dict()
    lines = sorted(f"{k} {tuple(v.shape)}" for k, v in state.items())
    assert len(lines) == 94 * 6  # 94 convolutions: weight, and five of the batch norm
    assert sum(v.numel() for k, v in state.items() if k.endswith(("weight", "bias"))) == 21_785_568
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PORT


PORT = "5c5cb906421dd92101f74d73352774dd0c7312df1c7e1eab4f2698dfca34cd92"
"""SHA-256 of the sorted names and shapes of torch-fidelity 0.4.0's network without `fc`."""


def test_average_pools_exclude_padding_and_the_last_block_pools_by_maximum():
    trunk, ones = Trunk().eval(), torch.ones(1, 192, 5, 5)
    seen = []
    for block in (trunk.Mixed_5b, trunk.Mixed_7b, trunk.Mixed_7c):
        block.branch_pool.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(1, 1280, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trunk.Mixed_5b(ones), trunk.Mixed_7b(x), trunk.Mixed_7c(torch.cat([x, x[:, :768]], 1))
    torch.testing.assert_close(seen[0], ones)
    assert seen[1][0, 0, 0, 0] == pytest.approx(
        float(x[0, 0, :2, :2].mean())
    )  # four neighbors, not nine
    assert torch.equal(seen[2][:, :1280], F.max_pool2d(x, 3, 1, 1))


@pytest.mark.parametrize("size", [(7, 5), (299, 299), (640, 333)])
def test_the_tf1_resize_reads_at_i_times_scale(size):
    pixels = np.asarray(_images(size)[0])
    h, w = pixels.shape[:2]
    found = resize_tf1(pixels)
    assert found.shape == (3, 299, 299)
    for i, j in ((0, 0), (1, 298), (150, 77), (298, 298)):
        y, x = i * h / 299, j * w / 299
        top, left = int(y), int(x)
        bottom, right, dy, dx = min(top + 1, h - 1), min(left + 1, w - 1), y - top, x - left
        corners = (
            (top, left, (1 - dy) * (1 - dx)),
            (top, right, (1 - dy) * dx),
            (bottom, left, dy * (1 - dx)),
            (bottom, right, dy * dx),
        )
        assert found[:, i, j].numpy() == pytest.approx(
            sum(pixels[r, c] * part for r, c, part in corners), abs=0.02
        )


def test_no_resize_changes_an_image_of_299_pixels():
    pixels = np.asarray(_images((299, 299))[0])
    for resize in (resize_tf1, resize_torch, resize_clean):
        assert np.abs(resize(pixels).numpy().transpose(1, 2, 0) - pixels).max() < 1e-3


def test_only_the_clean_resize_smooths_before_it_shrinks():
    stripes = np.zeros((598, 598, 3), np.uint8)
    stripes[:, ::2] = 255
    assert resize_clean(stripes)[:, 50:250, 50:250].std() < 1
    assert (resize_tf1(stripes) == 255).all()  # every other column: all of it white


@pytest.fixture(scope="module")
def tensors():
    """Return random weights with nonzero activations under the names of the port, with `fc`."""
    g = torch.Generator().manual_seed(0)
    out = {}
    for key, value in Trunk().state_dict().items():
        noise = torch.rand(value.shape, generator=g) if value.is_floating_point() else None
        if key.endswith("conv.weight"):
            out[key] = torch.randn(value.shape, generator=g) * (1.4 / value[0].numel() ** 0.5)
        else:
            out[key] = (
                value
                if noise is None
                else noise * 0.2 - 0.1
                if key.endswith(("bias", "mean"))
                else noise + 0.5
            )
    return out | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def files(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    save_file(tensors, folder / "w.safetensors")
    torch.save(tensors, folder / "w.pth")
    return folder


def test_both_kinds_of_file_give_the_same_features_and_their_own_hash(files):
    images = _images((64, 64), (80, 50))
    one, two = (Inception(weights=str(files / name)) for name in ("w.safetensors", "w.pth"))
    found = one.features(images)
    assert found.shape == (2, 2048)
    assert np.array_equal(found, two.features(images))
    assert (
        one.id
        == f"inception:{hashlib.sha256((files / 'w.safetensors').read_bytes()).hexdigest()}:tf1"
    )
    assert one.id != two.id


def test_the_resize_changes_the_numbers_and_the_id(files):
    images = _images((64, 64))
    made = [
        build(weights=str(files / "w.safetensors"))
        for build in (Inception, inception_torch, inception_clean)
    ]
    assert [m.id.rpartition(":")[2] for m in made] == ["tf1", "torch", "clean"]
    rows = [m.features(images) for m in made]
    assert all(
        not np.allclose(a, b, rtol=1e-3)
        for a, b in ((rows[0], rows[1]), (rows[1], rows[2]), (rows[0], rows[2]))
    )


def test_torchvisions_weights_are_refused(tensors, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(tensors | {"fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(FileError, match="got 1000 classes"):
        Inception(weights=str(path))
    save_file({k: v for k, v in tensors.items() if not k.startswith("fc.")}, path)
    with pytest.raises(FileError, match=r"got no fc\.weight"):
        Inception(weights=str(path))
    save_file({k: v for k, v in tensors.items() if not k.startswith("Mixed_7c")}, path)
    with pytest.raises(FileError, match="does not have the weights of the FID's Inception"):
        Inception(weights=str(path))
    with pytest.raises(ConfigError, match="needs weights"):
        Inception()


def test_the_trunk_equals_torch_fidelitys_bit_for_bit(files):
    package = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError
    )  # needs torchvision; not in our extras
    oracle = package.FeatureExtractorInceptionV3(
        "fid", ["2048"], feature_extractor_weights_path=str(files / "w.pth")
    )
    images = _images((64, 64), (333, 200))
    found = Inception(weights=str(files / "w.pth")).features(images)
    for row, image in zip(found, images, strict=True):
        assert np.array_equal(
            row,
            oracle(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0][0].double().numpy(),
        )
