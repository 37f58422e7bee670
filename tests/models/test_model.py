"""Loading and saving of models, and errors of unusable folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.generation import GenerationConfig, Sample
from safegen.core.hashing import hash_tensors
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.generation import generate, generator
from safegen.models.loading import load

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """Return a copy of the tiny model's folder that may be changed."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def pixels(image):
    return np.asarray(image).astype(int)


# ------------------------------------------------------------ round trip


def test_a_saved_model_draws_the_same_picture_in_plain_diffusers(tiny_model, tiny_folder):
    ours = generate(
        tiny_model, [Sample(prompt="a red cube", seed=3)], GenerationConfig(num_inference_steps=3)
    )[0]
    plain = StableDiffusionPipeline.from_pretrained(
        tiny_folder, safety_checker=None, requires_safety_checker=False
    )
    plain.set_progress_bar_config(disable=True)
    theirs = plain(
        prompt=["a red cube"],
        generator=[generator(3, 0)],
        num_inference_steps=3,
        guidance_scale=5.0,
    ).images[0]
    assert ours.size == (32, 32)
    assert np.array_equal(pixels(ours), pixels(theirs))


def test_a_saved_model_loads_as_it_was(tiny_model, tiny_folder):
    found = load(str(tiny_folder))
    assert found.hash == tiny_model.hash
    assert hash_tensors(found.vae.state_dict()) == hash_tensors(tiny_model.vae.state_dict())
    assert hash_tensors(found.pipeline.text_encoder.state_dict()) == hash_tensors(
        tiny_model.pipeline.text_encoder.state_dict()
    )
    ours, theirs = found.pipeline.scheduler.config, tiny_model.pipeline.scheduler.config
    assert {k: v for k, v in ours.items() if k[0] != "_"} == {
        k: v for k, v in theirs.items() if k[0] != "_"
    }
    texts = ["", "a red cube", "Ünknown wörds, 42!"]
    ours, theirs = (model.encode_text(texts).hidden for model in (found, tiny_model))
    assert torch.equal(ours, theirs)


def test_a_saved_model_saves_and_loads_again(tiny_folder, tmp_path):
    once = load(str(tiny_folder))
    save_folder(once, tmp_path / "again")
    again = load(str(tmp_path / "again"))
    assert again.hash == once.hash
    ours, theirs = (model.encode_text(["a red cube"]).hidden for model in (again, once))
    assert torch.equal(ours, theirs)


def test_a_saved_folder_can_be_read_by_older_releases_too(tiny_model, tiny_folder):
    keys = load_file(tiny_folder / TEXT)
    assert all(key.startswith("text_model.") for key in keys)
    assert len(keys) == len(tiny_model.pipeline.text_encoder.state_dict())
    vocabulary = json.loads((tiny_folder / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    assert vocabulary == tiny_model.pipeline.tokenizer.get_vocab()
    merges = (tiny_folder / "tokenizer/merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[0] == "#version: 0.2"
    assert len(merges) > 1
    assert all(len(line.split(" ")) == 2 for line in merges[1:])
    assert "CLIPImageProcessorPil" not in (tiny_folder / "model_index.json").read_text()


def test_a_saved_folder_holds_no_pickles_and_no_leftovers(tiny_folder):
    assert [p.name for p in tiny_folder.parent.iterdir()] == [tiny_folder.name]
    assert {p.suffix for p in tiny_folder.rglob("*") if p.is_file()} <= {
        ".json",
        ".txt",
        ".safetensors",
    }


def test_an_existing_output_is_not_overwritten(tiny_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(FileError, match="already exists"):
        save_folder(tiny_model, tmp_path / "out")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/mine",
    ]


def test_a_path_object_is_a_folder_even_with_a_registered_name(
    tiny_model, tiny_folder, tmp_path, monkeypatch
):
    shutil.copytree(tiny_folder, tmp_path / "mini")
    monkeypatch.chdir(tmp_path)
    assert (
        load(Path("mini")).hash
        == load(tmp_path / "mini").hash
        == load("./mini").hash
        == tiny_model.hash
        != load("mini").hash
    )


def test_unreadable_metadata_is_one_line(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "m")
    (tmp_path / "m" / "safegen.json").mkdir()
    with pytest.raises(FileError, match=r"safegen\.json' must be a regular file, got a folder"):
        load(tmp_path / "m")


def test_a_loaded_model_is_not_in_training(tiny_folder):
    pipeline = load(str(tiny_folder)).pipeline
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize(
    ("dtype", "want"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_model_loads_in_the_requested_dtype(tiny_folder, dtype, want):
    model = load(str(tiny_folder), dtype=dtype)
    assert {model.denoiser.dtype, model.vae.dtype, model.pipeline.text_encoder.dtype} == {want}


# ------------------------------------------------------------ the border


def test_text_is_encoded_as_the_pipeline_does(tiny_model):
    texts = ["", "a red cube on a white table", "a " * 100]
    want, _ = tiny_model.pipeline.encode_prompt(texts, "cpu", 1, False)
    assert torch.equal(tiny_model.encode_text(texts).hidden, want)


def test_latents_are_the_scaled_posterior_mean_and_do_not_depend_on_the_batch(tiny_model):
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        want = tiny_model.vae.encode(images).latent_dist.mean * tiny_model.vae.config.scaling_factor
    assert_close(tiny_model.encode_images(images), want)
    assert_close(tiny_model.encode_images(images, batch=2), want)
    assert torch.equal(tiny_model.encode_images(images), tiny_model.encode_images(images))


def test_images_are_decoded_as_the_pipeline_does(tiny_model):
    latents = 3 * torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = tiny_model.vae.decode(latents / tiny_model.vae.config.scaling_factor).sample
    want = tiny_model.pipeline.image_processor.postprocess(decoded, output_type="pil")
    assert [i.tobytes() for i in tiny_model.decode_images(latents)] == [i.tobytes() for i in want]


def test_pixels_are_those_of_images_and_have_a_gradient(tiny_model):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = tiny_model.decode_pixels(latents.requires_grad_())
    images = tiny_model.decode_images(latents.detach())
    stacked = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])
    assert_close((pixels.detach() + 1) * 127.5, stacked.float(), atol=0.51, rtol=0)
    pixels.sum().backward()
    assert bool(latents.grad.flatten(1).any(1).all())


def test_size_schedule_and_prediction(make_model, tiny_model):
    assert tiny_model.size == 32
    assert len(tiny_model.noise_schedule) == 1000
    assert tiny_model.prediction == "epsilon"
    assert make_model(prediction_type="v_prediction").prediction == "v_prediction"


def test_the_hash_depends_on_the_denoisers_weights(make_model):
    assert make_model(1).hash == make_model(1).hash
    assert make_model(1).hash != make_model(2).hash


def test_hash_tensors_depends_on_names_shapes_types_and_bits():
    w = torch.arange(6.0)
    kinds = [
        {"w": w},
        {"v": w},
        {"w": w.view(2, 3)},
        {"w": w.half()},
        {"w": w + 1},
        {"w": w, "b": w},
        {"w": torch.tensor(1.0)},
        {"w": w[:0]},
    ]
    assert len({hash_tensors(kind) for kind in kinds}) == len(kinds)
    assert hash_tensors({"a": w, "b": w + 1}) == hash_tensors({"b": w + 1, "a": w})
    assert hash_tensors({"w": torch.arange(12.0)[::2]}) == hash_tensors(
        {"w": torch.arange(12.0)[::2].contiguous()}
    )


# ------------------------------------------------------------ refusals


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _nan(path):
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def _without(path, key):
    tensors = load_file(path)
    del tensors[next(name for name in tensors if key in name)]
    save_file(tensors, path, metadata={"format": "pt"})


def _pickle(folder, safe):
    path = folder / safe
    name = "pytorch_model.bin" if "text_encoder" in safe else "diffusion_pytorch_model.bin"
    torch.save(load_file(path), path.with_name(name))
    path.unlink()


def _index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "must be a diffusers folder"),
    "an index that is no JSON": (
        lambda f: (f / "model_index.json").write_text("{"),
        "model_index.json' is not JSON",
    ),
    "an index that is a list": (
        lambda f: (f / "model_index.json").write_text("[]"),
        "model_index.json' must be a JSON object",
    ),
    "an index of bytes": (
        lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe"),
        "model_index.json' is not UTF-8",
    ),
    "another family": (
        lambda f: _index(f, _class_name="WanPipeline"),
        "_class_name must be .* got 'WanPipeline'",
    ),
    "no denoiser": (lambda f: shutil.rmtree(f / "unet"), "unet/config.json' does not exist"),
    "no denoiser weights": (lambda f: (f / UNET).unlink(), "there is no .safetensors"),
    "no autoencoder": (lambda f: shutil.rmtree(f / "vae"), "vae/config.json' does not exist"),
    "no text encoder weights": (lambda f: (f / TEXT).unlink(), "cannot be read"),
    "no scheduler": (
        lambda f: shutil.rmtree(f / "scheduler"),
        "scheduler_config.json' does not exist",
    ),
    "a truncated denoiser": (
        lambda f: _cut(f / UNET),
        "cannot be read|not a readable safetensors file",
    ),
    "a truncated autoencoder": (
        lambda f: _cut(f / VAE),
        "cannot be read|not a readable safetensors file",
    ),
    "a truncated text encoder": (
        lambda f: _cut(f / TEXT),
        "cannot be read|not a readable safetensors file",
    ),
    "an empty denoiser": (lambda f: (f / UNET).write_bytes(b""), "not a readable safetensors file"),
    "NaN in the denoiser": (lambda f: _nan(f / UNET), "NaN or infinite weights in unet"),
    "NaN in the autoencoder": (lambda f: _nan(f / VAE), "NaN or infinite weights in vae"),
    "NaN in the text encoder": (
        lambda f: _nan(f / TEXT),
        "NaN or infinite weights in text_encoder",
    ),
    "a tensor less in the denoiser": (
        lambda f: _without(f / UNET, "attn1.to_q"),
        "lacks 1 weights in unet, first .*attn1.to_q",
    ),
    "a tensor less in the autoencoder": (
        lambda f: _without(f / VAE, "conv_out.bias"),
        "lacks 1 weights in vae, first .*conv_out.bias",
    ),
    "a tensor less in the text encoder": (
        lambda f: _without(f / TEXT, "mlp.fc1.weight"),
        "lacks 1 weights in text_encoder, first .*fc1.weight",
    ),
    "a pickled denoiser": (lambda f: _pickle(f, UNET), "--allow-pickle"),
    "a pickled autoencoder": (lambda f: _pickle(f, VAE), "--allow-pickle"),
    "a pickled text encoder": (lambda f: _pickle(f, TEXT), "--allow-pickle"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_an_unusable_folder_is_refused_in_one_line(folder, damage):
    spoil, words = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(FileError, match=words) as caught:
        load(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_library_is_silent(folder, capfd):
    load(str(folder))
    (folder / VAE).unlink()
    with pytest.raises(FileError):
        load(str(folder))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("pickled", [(UNET,), (TEXT,), (UNET, VAE, TEXT)])
def test_pickles_are_opened_if_allowed(folder, tiny_model, pickled):
    for safe in pickled:
        _pickle(folder, safe)
    model = load(str(folder), allow_pickle=True)
    assert model.hash == tiny_model.hash
    ours, theirs = (m.encode_text(["a red cube"]).hidden for m in (model, tiny_model))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "words"), [("model.ckpt", "pickle"), ("model.safetensors", "it has 7 bytes")]
)
def test_an_invalid_single_file_is_refused(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(FileError, match=words):
        load(str(tmp_path / name))


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'mini'.*Known: mini"):
        load("minni")
    with pytest.raises(UnknownNameError, match=r"Known: bf16, .*fp16, fp32"):
        load("mini", dtype="fp8")
    for name in ("my.safetensors", "models/my.ckpt"):
        with pytest.raises(FileError, match=f"the checkpoint '{name}' does not exist"):
            load(name)
    with pytest.raises(UnknownNameError, match="nor a folder of that name"):
        load("a castle " * 600)


@pytest.mark.parametrize("device", ["meta", "meta:0"])
def test_a_device_without_values_is_refused(device):
    with pytest.raises(ConfigError, match=rf"device must be one that holds values, got '{device}'"):
        load("mini", device=device)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xpu:7"])
def test_an_unavailable_device_is_one_line(device):
    with pytest.raises(
        ConfigError, match=rf"device must be one that torch can use here .*, got '{device}'"
    ) as caught:
        load("mini", device=device)
    assert "\n" not in str(caught.value)


def test_the_safety_checker_is_copied(tiny_folder, tmp_path):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers.models.clip.configuration_clip import CLIPConfig

    given, out = tmp_path / "given", tmp_path / "out"
    shutil.copytree(tiny_folder, given)
    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    vision = small | {"image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=small, vision_config=vision, projection_dim=8)
    )
    checker.save_pretrained(given / "safety_checker")
    index = json.loads((given / "model_index.json").read_text())
    index["safety_checker"] = entry = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (given / "model_index.json").write_text(json.dumps(index))

    save_folder(load(str(given)), out)
    again = json.loads((out / "model_index.json").read_text())
    assert (again["safety_checker"], again["requires_safety_checker"]) == (entry, True)
    restored = StableDiffusionSafetyChecker.from_pretrained(out / "safety_checker").state_dict()
    assert all(torch.equal(restored[k], v) for k, v in checker.state_dict().items())


SILENT = """
import safegen
safegen.load("mini")
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging
assert diffusers_logging.get_verbosity() == transformers_logging.get_verbosity() == 30
assert transformers_logging.is_progress_bar_enabled()
"""


def test_importing_and_loading_print_nothing_and_change_no_logging_level():
    environment = {
        k: v for k, v in os.environ.items() if "VERBOSITY" not in k and "HF_HUB" not in k
    }
    done = subprocess.run(
        [sys.executable, "-c", SILENT],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
