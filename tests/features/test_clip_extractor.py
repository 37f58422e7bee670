"""CLIP features of a folder, with the processor and the towers of transformers as the oracle."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel

from safegen.core.errors import ConfigError, FileError
from safegen.features.clip import Clip, load_clip_tokenizer
from safegen.mini import bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a copy of the miniature CLIP folder."""
    out = tmp_path_factory.mktemp("clip") / "clip"
    shutil.copytree(bundle.clip_folder(), out)
    shutil.copytree(bundle.pipeline_folder() / "tokenizer", out, dirs_exist_ok=True)
    return out


@pytest.fixture(scope="module")
def clip(folder):
    return Clip(weights=str(folder))


def _images(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


SIZES = [(64, 64), (200, 91), (91, 200), (65, 64), (512, 512), (30, 47), (33, 20)]


def test_image_features_equal_those_of_transformers(clip, folder):
    images = _images(*SIZES)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    net = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    with torch.no_grad():
        oracle = net.get_image_features(
            **processor(images=images, return_tensors="pt")
        ).pooler_output.numpy()
    assert clip.features(images) == pytest.approx(oracle, abs=1e-4)
    assert clip.features([]).shape == (0, clip.width)


@pytest.mark.parametrize("size", [(64, 64), (160, 91), (91, 160), (512, 512), (30, 47)])
def test_the_features_of_pixels_are_those_of_images_and_have_a_gradient(clip, size):
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8))
    image = smooth.resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    embeddings = clip.embed(pixels.requires_grad_())
    assert embeddings.detach().numpy() == pytest.approx(clip.features([image]), abs=0.02)
    embeddings.sum().backward()
    assert float(pixels.grad.abs().max()) > 1e-6


def test_pixels_are_resized_by_known_filters_only(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "lanczos")
    path = other / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 1}))
    with pytest.raises(ConfigError, match="resample must be 2"):
        Clip(weights=str(other)).embed(torch.zeros(1, 3, 64, 64))


def test_text_embeddings_do_not_depend_on_padding(clip, folder):
    texts = ["a castle", "a ship covered in skulls on a red background"]
    tokenizer = load_clip_tokenizer(folder)
    net = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    with torch.no_grad():
        oracle = [
            net.get_text_features(**tokenizer(t, return_tensors="pt")).pooler_output[0].numpy()
            for t in texts
        ]
    assert clip.texts(texts) == pytest.approx(np.stack(oracle), abs=1e-4)
    assert np.isfinite(clip.texts(["castle " * 500])).all()


def test_the_preprocessing_of_the_folder_is_used(clip, folder, tmp_path):
    other = tmp_path / "clip"
    shutil.copytree(folder, other)
    path = other / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"image_mean": [0.4, 0.5, 0.6]}))
    images = _images((64, 64))
    assert Clip(weights=str(other)).features(images) != pytest.approx(
        clip.features(images), abs=1e-3
    )
    for text, message in (
        (json.dumps(config | {"image_std": [0, 1, 1]}), "must give finite images"),
        (json.dumps(config | {"image_std": [0, 1]}), "cannot be read"),
        (json.dumps(config | {"crop_size": {"height": 9, "width": 9}}), r"got \(3, 9, 9\)"),
        ("[", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(FileError, match=message):
            Clip(weights=str(other))
    path.unlink()
    with pytest.raises(FileError, match=r"has no preprocessor_config\.json"):
        Clip(weights=str(other))


def test_other_weights_have_another_id(clip, folder, tmp_path):
    other = tmp_path / "clip"
    shutil.copytree(folder, other)
    tensors = load_file(other / "model.safetensors")
    save_file(
        tensors | {"logit_scale": tensors["logit_scale"] + 1},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert Clip(weights=str(other)).id != clip.id
    assert clip.id == Clip(weights=str(folder)).id


def test_an_incomplete_clip_folder_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="needs weights"):
        Clip()
    with pytest.raises(FileError, match="there is no folder"):
        Clip(weights=str(tmp_path / "nowhere"))
    with pytest.raises(FileError, match="must be named hub:owner/name"):
        Clip(weights="hub:no such name")
    other = tmp_path / "clip"
    shutil.copytree(folder, other)
    (other / "tokenizer.json").unlink()
    (other / "vocab.json").unlink()
    with pytest.raises(FileError, match="has no tokenizer"):
        Clip(weights=str(other)).texts(["a castle"])
    tensors = load_file(other / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k.startswith("text")},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(FileError, match="weights of CLIPModel, such as"):
        Clip(weights=str(other))
    (other / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(FileError, match="cannot be read"):
        Clip(weights=str(other))
