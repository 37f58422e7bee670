"""Models of the hub, from its cache. No test uses the network."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
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
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        FileError,
        match=r"cannot be fetched: Max retries exceeded\. Fetch it where there is a network",
    ) as caught:
        load("hub:me/tiny")
    assert "\n" not in str(caught.value)


SMALL = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer_3/spiece.model",
    "unet/config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder_2/config.json",
]
UNUSED = [
    "README.md",
    "sd3.5_medium.safetensors",
    "v1-5-pruned.ckpt",
    "safety_checker/model.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "vae/diffusion_pytorch_model.fp8.safetensors",
    "text_encoder/openvino_model.bin",
]


def shards(stem, index, total=2):
    return [f"{stem}-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)] + [index]


T5 = shards("text_encoder_3/model", "text_encoder_3/model.safetensors.index.json")
T5_FP16 = shards("text_encoder_3/model.fp16", "text_encoder_3/model.safetensors.index.fp16.json")
FLUX = shards(
    "transformer/diffusion_pytorch_model",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    3,
)
LAYOUTS = {
    "one precision": (["unet/diffusion_pytorch_model.safetensors"], []),
    "two precisions": (
        ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"],
        ["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"],
    ),
    "fp16 alone, per component": (
        ["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.safetensors"],
        ["text_encoder/model.fp16.safetensors"],
    ),
    "fp16 before bf16": (
        ["vae/diffusion_pytorch_model.fp16.safetensors"],
        ["vae/diffusion_pytorch_model.bf16.safetensors"],
    ),
    "shards": (FLUX, []),
    "shards in two precisions": (T5, T5_FP16),
    "shards of fp16 alone": (T5_FP16, []),
    "one file rather than shards": (["transformer/diffusion_pytorch_model.safetensors"], FLUX),
    "shards without their list": ([], FLUX[:-1]),
    "fp16 rather than a pickle": (
        ["unet/diffusion_pytorch_model.fp16.safetensors"],
        ["unet/diffusion_pytorch_model.bin"],
    ),
}


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_each_component_is_fetched_once(kind, allow_pickle):
    from huggingface_hub.utils import filter_repo_objects

    wanted, doubles = LAYOUTS[kind]
    names = [*SMALL, *UNUSED, *wanted, *doubles]
    patterns = hub_patterns(names, allow_pickle=allow_pickle)
    taken = list(filter_repo_objects(names, allow_patterns=patterns))
    assert sorted(taken) == sorted([*SMALL, *wanted])


def test_pickles_are_fetched_only_if_allowed_and_alone():
    names = ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"]
    assert not {*names} & {*hub_patterns(names, allow_pickle=False)}
    assert {*names} <= {*hub_patterns(names, allow_pickle=True)}


@pytest.fixture
def split_folder(tmp_path):
    """Return a folder of SD 3.5 with fp16 weights alone and T5 in shards, and its pipeline."""
    import tests.tiny

    pipe = tests.tiny.build_pipeline("sd35").to(torch.float16)
    pipe.save_pretrained(tmp_path / "split", variant="fp16")
    for component, size in (("text_encoder_3", 20_000), ("transformer", 50_000)):
        folder = tmp_path / "split" / component
        for path in folder.glob("*.safetensors"):
            path.unlink()
        getattr(pipe, component).save_pretrained(folder, variant="fp16", max_shard_size=size)
        assert len(list(folder.glob("*.fp16-*-of-*.safetensors"))) > 1
    return tmp_path / "split", pipe


def check_equal(model, pipe):
    for component in model.components:
        state = getattr(model.pipeline, component).state_dict()
        for name, value in getattr(pipe, component).state_dict().items():
            assert torch.equal(state[name], value.float()), name


def test_a_folder_with_fp16_shards_alone_loads(split_folder):
    folder, pipe = split_folder
    check_equal(load(folder), pipe)
    (index,) = (folder / "text_encoder_3").glob("*.index.fp16.json")
    entries = json.loads(index.read_text())
    name = min(entries["weight_map"])
    entries["weight_map"][name] = "../../outside.safetensors"
    index.write_text(json.dumps(entries))
    with pytest.raises(FileError, match="weight_map must name files of its own folder"):
        load(folder)


def test_the_files_of_a_repository_are_chosen_before_they_are_fetched(
    monkeypatch, tmp_path, split_folder
):
    """Let a folder stand in for the hub: its client lists and copies files."""
    from huggingface_hub.utils import filter_repo_objects

    remote, pipe = split_folder
    pipe.vae.save_pretrained(remote / "vae")  # the other precision, which is preferred
    paths = [path for path in remote.rglob("*") if path.is_file()]
    names = sorted(path.relative_to(remote).as_posix() for path in paths)

    def copy(repo_id, *, allow_patterns):
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / name, tmp_path / "got" / name)
        return str(tmp_path / "got")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repo_id: names)
    monkeypatch.setattr("huggingface_hub.snapshot_download", copy)
    check_equal(load("hub:me/split"), pipe)
    fetched = {p.relative_to(tmp_path / "got").as_posix() for p in (tmp_path / "got").rglob("*.*")}
    assert {*names} - fetched == {"vae/diffusion_pytorch_model.fp16.safetensors"}


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
