"""Models of the hub, from its cache. No test uses the network."""

from __future__ import annotations

import json
import shutil

import pytest
from huggingface_hub import constants

from safegen.core.errors import FileError
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.loading import hub_patterns, load


def cache(home, repo, folder):
    """Store a folder in the hub's cache, as its client does."""
    place = home / ("models--" + repo.replace("/", "--"))
    shutil.copytree(folder, place / "snapshots" / "c0ffee")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("c0ffee")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """Set HF_HUB_OFFLINE and an empty cache; return the cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_cached_model_loads_offline(home, tiny_model, tiny_folder):
    cache(home, "me/tiny", tiny_folder)
    found = load("hub:me/tiny")
    assert (found.hash, found.folder) == (
        tiny_model.hash,
        home / "models--me--tiny" / "snapshots" / "c0ffee",
    )
    shutil.rmtree(found.folder / "vae")
    with pytest.raises(
        FileError, match=r"hub:me/tiny' cannot be read: .*vae/config\.json' does not exist"
    ):
        load("hub:me/tiny")


def test_components_that_are_not_fetched_may_be_missing(home, tiny_model, tiny_folder, tmp_path):
    """Published SD 1.x models list a safety checker, which is not fetched."""
    shutil.copytree(tiny_folder, tmp_path / "named")
    index = tmp_path / "named" / "model_index.json"
    unfetched = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    unfetched |= {
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"]
    }  # a name that transformers no longer has
    index.write_text(json.dumps(json.loads(index.read_text()) | unfetched))
    cache(home, "me/named", tmp_path / "named")
    found = load("hub:me/named")
    assert found.hash == tiny_model.hash
    save_folder(found, tmp_path / "out")
    assert load(str(tmp_path / "out")).hash == tiny_model.hash


def test_an_sdxl_loads_from_the_hub(home, make_tiny, tmp_path):
    save_folder(make_tiny("sdxl"), tmp_path / "sdxl")
    cache(home, "me/xl", tmp_path / "sdxl")
    assert "text_encoder_2" in load("hub:me/xl").components


def test_a_missing_hub_model_is_one_line(home):
    with pytest.raises(FileError) as caught:
        load("hub:runwayml/stable-diffusion-v1-5")
    assert str(caught.value).startswith(
        f"hub:runwayml/stable-diffusion-v1-5 is not in the cache {home} and cannot be fetched: "
        "HF_HUB_OFFLINE is set. "
    )


def test_a_network_error_is_one_line(monkeypatch, tmp_path):
    """The first line of the client's message is passed on."""

    def refuse(*args, **kwargs):
        raise ConnectionError("Max retries exceeded\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        FileError,
        match=r"cannot be fetched: Max retries exceeded\. Fetch it where there is a network",
    ) as caught:
        load("hub:me/tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_pickles_are_fetched_only_if_allowed(allow_pickle):
    from huggingface_hub.utils import filter_repo_objects

    wanted = {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer_2/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "text_encoder_2/config.json",
    }
    pickles = {
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
    }
    unused = {
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/openvino_model.bin",
        "README.md",
    }
    taken = set(
        filter_repo_objects(wanted | pickles | unused, allow_patterns=hub_patterns(allow_pickle))
    )
    assert taken == (wanted | pickles if allow_pickle else wanted)


@pytest.mark.parametrize("name", ["hub:", "hub:tiny", "hub:me/tiny/unet", "hub:a b/c", "hub:/tiny"])
def test_invalid_hub_names_are_refused(name):
    with pytest.raises(
        FileError, match=r"a model of the hub must be named hub:owner/name, got 'hub:"
    ):
        load(name)


def test_a_hub_name_without_prefix_is_not_fetched():
    with pytest.raises(
        FileError,
        match=r"folder 'runwayml/stable-diffusion-v1-5' does not exist\. .* hub:runwayml/stable",
    ):
        load("runwayml/stable-diffusion-v1-5")
