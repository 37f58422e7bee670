"""CLIP features from a folder: transformers' own processor and towers are the oracle."""

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
from safegen.features.clip import Clip, crop
from safegen.mini import bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a whole CLIP folder: the miniature's towers and tokenizer."""
    out = tmp_path_factory.mktemp("clip") / "clip"
    shutil.copytree(bundle.clip_folder(), out)
    shutil.copytree(bundle.pipeline_folder() / "tokenizer", out, dirs_exist_ok=True)
    return out


@pytest.fixture(scope="module")
def clip(folder):
    return Clip(weights=str(folder))


def _pictures(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


SIZES = [(64, 64), (200, 91), (91, 200), (65, 64), (512, 512), (30, 47), (33, 20)]


def test_its_view_of_a_picture_is_transformers_own():
    for image in _pictures(*SIZES):
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": 64},
            crop_size={"height": 64, "width": 64},
            do_normalize=False,
            do_rescale=False,
        )
        oracle = processor(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert np.array_equal(crop(image, 64), oracle)


def test_its_features_are_transformers_own(clip, folder):
    images = _pictures(*SIZES)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    net = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    with torch.no_grad():
        oracle = net.get_image_features(
            **processor(images=images, return_tensors="pt")
        ).pooler_output.numpy()
    assert clip.features(images) == pytest.approx(oracle, abs=1e-4)


def test_its_text_embeddings_do_not_depend_on_the_padding(clip, folder):
    from safegen.features.clip import open_tokenizer

    texts = ["a castle", "a ship covered in skulls on a red background"]
    tokenizer = open_tokenizer(folder)
    net = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    with torch.no_grad():
        oracle = [
            net.get_text_features(**tokenizer(t, return_tensors="pt")).pooler_output[0].numpy()
            for t in texts
        ]
    assert clip.texts(texts) == pytest.approx(np.stack(oracle), abs=1e-4)
    assert np.isfinite(clip.texts(["castle " * 500])).all()


def test_the_normalisation_of_the_folder_is_taken(clip, folder, tmp_path):
    other = tmp_path / "clip"
    shutil.copytree(folder, other)
    facts = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.5, 0.5]}
    (other / "preprocessor_config.json").write_text(json.dumps(facts))
    images = _pictures((64, 64))
    assert Clip(weights=str(other)).features(images) != pytest.approx(
        clip.features(images), abs=1e-3
    )
    (other / "preprocessor_config.json").write_text('{"image_std": [0, 1]}')
    with pytest.raises(FileError, match="three deviations"):
        Clip(weights=str(other))
    (other / "preprocessor_config.json").write_text("[")
    with pytest.raises(FileError, match="cannot be read"):
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


def test_a_folder_that_is_no_whole_clip_model_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="needs weights"):
        Clip()
    with pytest.raises(FileError, match="is not a CLIP model"):
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
    with pytest.raises(FileError, match="does not hold a whole CLIP model"):
        Clip(weights=str(other))
    (other / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(FileError, match="cannot be read"):
        Clip(weights=str(other))
