"""One-file checkpoints of SD 3 and FLUX: publishers' layouts, diffusers' converters, and errors."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from real import build_denoiser, published
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tests.tiny
from safegen.core.errors import ConfigError, FileError
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.checkpoint.key_map import PREFIX, pack, unpack
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.checkpoint.single_file_writer import architecture_of, save_single_file
from safegen.models.loading import load
from safegen.patches.patch import Patch
from safegen.workflows.export import export

SLOW = pytest.mark.slow
FAMILIES = (
    pytest.param("sd3", marks=SLOW),
    "sd35",
    "flux",
    pytest.param("flux-schnell", marks=SLOW),
)
CONVERTERS = {
    "sd35-medium": convert_sd3_transformer_checkpoint_to_diffusers,
    "flux-dev": convert_flux_transformer_checkpoint_to_diffusers,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that saves a tiny model as a file and as a folder, once per family."""
    root, models = tmp_path_factory.mktemp("flow"), {}

    def save(family):
        file, folder = root / f"{family}.safetensors", root / family
        if family not in models:
            models[family] = tests.tiny.build_model(family)
            save_folder(models[family], folder)
            save_single_file(models[family], file, dtype="fp32")
        return models[family], file, folder

    return save


def state_of(model, component):
    state = getattr(model.pipeline, component).state_dict()
    return {name.removeprefix("text_model."): value for name, value in state.items()}


def check_equal(model, other, *components):
    for component in components or model.components:
        torch.testing.assert_close(
            state_of(model, component), state_of(other, component), rtol=0, atol=0
        )


def dtypes_of(model):
    return {c: {n: v.dtype for n, v in state_of(model, c).items()} for c in model.components}


def refusal(path, **options):
    with pytest.raises(FileError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert path.name in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformer_file_gives_back_the_model(saved, family):
    model, file, folder = saved(family)
    with safe_open(file, framework="pt") as opener:
        header, names = opener.metadata(), set(opener.keys())
    assert not any(name.startswith("model.") for name in names)
    expected = {"flux": "flux-1-dev", "flux-schnell": "flux-1-schnell"}
    assert header["modelspec.architecture"] == expected.get(family, "stable-diffusion-3")
    again = load(file, config=folder)
    check_equal(model, again)
    assert (again.hash, again.prediction) == (model.hash, "flow_prediction")
    texts = ["a red cube", ""]
    ours, theirs = again.encode_text(texts), model.encode_text(texts)
    assert torch.equal(ours.hidden, theirs.hidden)
    assert torch.equal(ours.pooled, theirs.pooled)


def test_the_weights_of_the_folder_are_not_needed_where_the_file_has_them(saved, tmp_path):
    import shutil

    model, file, folder = saved("sd35")
    shutil.copytree(folder, tmp_path / "rest", ignore=shutil.ignore_patterns("diffusion_*.safe*"))
    with safe_open(file, framework="pt") as opener:
        header = opener.metadata()
    tensors = {f"model.diffusion_model.{n}": v for n, v in load_file(file).items()}
    tensors |= computed(pack("sd3", "vae", model.pipeline.vae.state_dict()))
    path = tmp_path / "sai.safetensors"
    save_file({n: v.contiguous() for n, v in tensors.items()}, path, metadata=header)
    check_equal(model, load(path, config=tmp_path / "rest"))
    assert "no .safetensors file in" in refusal_of_rest(saved, tmp_path)


def computed(tensors):
    return {name: value.load() for name, value in tensors.items()}


def refusal_of_rest(saved, tmp_path):
    """Return the message for a file without autoencoder and a folder without its weights."""
    with pytest.raises(FileError) as caught:
        load(saved("sd35")[1], config=tmp_path / "rest")
    return str(caught.value)


@pytest.mark.parametrize("family", [pytest.param("sd3", marks=SLOW), "sd35", "flux"])
def test_an_all_in_one_file_replaces_every_component(saved, tmp_path, family):
    """Use a folder with other weights; CLIP-L's projection is not read, as by ComfyUI."""
    _, _, folder = saved(family)
    other = tests.tiny.build_model(family, seed=1)
    architecture = architecture_of(other.pipeline)
    tensors = {}
    for component in PREFIX[architecture]:
        if component in other.components:
            state = getattr(other.pipeline, component).state_dict()
            tensors |= computed(pack(architecture, component, state))
    tensors |= {
        "text_encoders.clip_l.transformer.text_projection.weight": torch.ones(32, 32),
        "text_encoders.clip_l.logit_scale": torch.ones(()),
        "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": torch.arange(4),
    }
    if family == "sd35":
        table = tensors["text_encoders.t5xxl.transformer.shared.weight"]
        tensors["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"] = table.clone()
    if family == "flux":  # as ComfyUI writes it
        tensors = {n.replace("first_stage_model.", "vae."): v for n, v in tensors.items()}
    path = tmp_path / "all.safetensors"
    save_file({n: v.contiguous() for n, v in tensors.items()}, path)
    loaded = load(path, config=folder)
    check_equal(other, loaded, *(c for c in other.components if c != "text_encoder"))
    ours, theirs = state_of(loaded, "text_encoder"), state_of(other, "text_encoder")
    if family != "flux":
        assert torch.equal(ours.pop("text_projection.weight"), torch.eye(32))
        del theirs["text_projection.weight"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    half = load(path, config=folder, dtype="fp16")
    assert half.pipeline.vae.dtype == half.denoiser.dtype == torch.float16
    by_folder = load(folder, dtype="fp16")
    assert dtypes_of(half) == dtypes_of(by_folder)  # T5 has a part that stays fp32


@pytest.mark.parametrize("family", [pytest.param("sd3", marks=SLOW), "sd35"])
def test_diffusers_reads_the_file(saved, family):
    model, file, folder = saved(family)
    theirs = SD3Transformer2DModel.from_single_file(
        str(file), config=str(folder), subfolder="transformer", local_files_only=True
    )
    torch.testing.assert_close(theirs.state_dict(), model.denoiser.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(CONVERTERS))
def test_diffusers_converts_a_full_size_file_back_and_uses_every_key(name):
    """Number each row of each weight, and leave out the columns."""
    model = build_denoiser(name)
    rows = {}
    for i, (key, value) in enumerate(model.state_dict().items()):
        count = value.shape[0]
        rows[key] = torch.arange(count, dtype=torch.float64)[:, None] / count + i
    architecture = "flux" if name.startswith("flux") else "sd3"
    packed = computed(pack(architecture, "transformer", rows))
    shapes = {key: value.shape for key, value in rows.items()}
    again = computed(unpack(architecture, "transformer", packed, shapes))
    assert all(torch.equal(again[key], value) for key, value in rows.items())
    back = CONVERTERS[name](packed)
    assert packed == {}  # the converter takes out what it knows
    assert back.keys() == rows.keys()
    assert all(torch.equal(back[key], value) for key, value in rows.items())


@pytest.mark.slow
def test_a_full_size_flux_file_has_the_780_published_tensors():
    packed = pack("flux", "transformer", build_denoiser("flux-dev").state_dict())
    shapes = {name: tuple(value.shape) for name, value in packed.items()}
    prefix = PREFIX["flux"]["transformer"]
    assert len(shapes) == 780
    assert {name.removeprefix(prefix): shape for name, shape in shapes.items()} == published(
        "flux", prefix
    )


# ------------------------------------------------------------ errors


def test_a_file_without_a_folder_is_refused(saved):
    assert "must come with a diffusers folder of FLUX" in refusal(saved("flux")[1])


def test_a_folder_of_another_family_is_refused(saved):
    message = refusal(saved("flux")[1], config=saved("sd3")[2])
    assert "config must be a folder of FLUX" in message


def test_a_folder_of_a_sibling_is_refused(saved):
    message = refusal(saved("flux")[1], config=saved("flux-schnell")[2])
    assert "guidance_in.in_layer.bias" in message
    assert "lacks" in refusal(saved("flux-schnell")[1], config=saved("flux")[2])
    assert "shape of" in refusal(saved("sd35")[1], config=saved("sd3")[2])


DAMAGES = {
    "a missing tensor": (lambda t: t.pop("x_embedder.proj.bias"), "lacks model.diffusion_model.x_"),
    "an unknown tensor": (lambda t: t.update(more=torch.ones(1)), "first model.diffusion_model.mo"),
    "another precision": (
        lambda t: t.update(pos_embed=t["pos_embed"].to(torch.float8_e4m3fn)),
        "must be fp64, fp32, fp16 or bf16",
    ),
    "fewer rows": (
        lambda t: t.update({QKV: t[QKV][:-1].contiguous()}),
        r"shape of model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    ),
    "no rows": (
        lambda t: t.update({"final_layer.adaLN_modulation.1.bias": torch.ones(())}),
        r"shape of model.diffusion_model.final_layer.adaLN_modulation.1.bias",
    ),
    "NaN": (
        lambda t: t.update({QKV: torch.full_like(t[QKV], float("nan"))}),
        "NaN or infinite weights in transformer",
    ),
    "T5": (
        lambda t: t.update({"text_encoders.t5xxl.transformer.shared.weight": torch.ones(2, 2)}),
        "first model.diffusion_model.text_encoders",
    ),
}
QKV = "joint_blocks.0.x_block.attn.qkv.weight"


@pytest.mark.parametrize("kind", sorted(DAMAGES))
def test_a_damaged_file_is_refused(saved, tmp_path, kind):
    _, file, folder = saved("sd3")
    change, words = DAMAGES[kind]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    assert words in refusal(tmp_path / "x.safetensors", config=folder)


def test_a_folder_that_declares_more_than_the_file_holds_is_refused(saved, tmp_path):
    import json
    import shutil

    _, file, folder = saved("sd3")
    shutil.copytree(folder, tmp_path / "sd3")
    config = tmp_path / "sd3/transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pos_embed_max_size": 4000}))
    message = refusal(file, config=tmp_path / "sd3")
    assert "must hold the weights that its config.json declares" in message


def test_text_encoders_that_the_folder_lacks_are_refused(saved, tmp_path):
    _, file, folder = saved("sd3")
    tensors = {f"model.diffusion_model.{name}": value for name, value in load_file(file).items()}
    tensors["text_encoders.t5xxl.transformer.shared.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    message = refusal(tmp_path / "x.safetensors", config=folder)
    assert "has the text_encoder_3 of SD 3" in message


def test_a_patch_of_a_text_encoder_is_not_lost_in_a_file(saved, tmp_path):
    model = saved("flux")[0]
    name = "text_encoder.text_model.final_layer_norm.weight"
    patch = Patch({name: torch.full((32,), 0.5)}, PatchMetadata())
    with pytest.raises(ConfigError, match=r"a patch changes text_encoder, .* --format diffusers"):
        export(model, tmp_path / "x.safetensors", patches=[patch], card=False)
    export(model, tmp_path / "x", format="diffusers", patches=[patch], card=False)
    encoder = load(tmp_path / "x").pipeline.text_encoder.state_dict()
    assert float(encoder["final_layer_norm.weight"].min()) != 1.0


def test_a_patch_of_the_transformer_is_in_the_file_with_its_metadata(saved, tmp_path):
    model, _, folder = saved("sd35")
    name = "transformer_blocks.0.attn.to_q.weight"
    patch = Patch({name: torch.ones_like(model.denoiser.get_parameter(name))}, PatchMetadata())
    export(model, tmp_path / "x.safetensors", patches=[patch], dtype="fp32")
    assert "transformer alone" in (tmp_path / "x.safetensors.md").read_text()
    again = load(tmp_path / "x.safetensors", config=folder)
    assert again.hash != model.hash
    assert [record.hash for record in again.verified_metadata.patches] == [patch.hash]


def test_the_command_says_where_the_file_belongs_and_reads_it_with_a_folder(saved, tmp_path):
    from typer.testing import CliRunner

    from safegen.cli.main import app

    _, file, folder = saved("flux")
    out = tmp_path / "x.safetensors"
    arguments = ["export", str(file), "--config", str(folder), "--out", str(out), "--dtype", "fp32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "models/diffusion_models" in result.output
    assert load_file(out).keys() == load_file(file).keys()
