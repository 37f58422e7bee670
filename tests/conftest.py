"""Real diffusers classes at tiny size, and six triplets.

Heavy imports live inside the fixtures, so that collecting is quick.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("fixed")  # the same examples in every run, on every machine

if find_spec("beartype"):  # checks the shape annotations of pure functions
    from jaxtyping import install_import_hook

    install_import_hook("safegen.edits.functional.losses", "beartype.beartype")

PROMPTS = ("a red cube on a white table", "a blue ball in the grass", "a green cone under a tree")
SIDE = 32
"""Pixels of the tiny model's images and of the triplets."""


def pytest_collection_modifyitems(config, items):
    """Mark the long tests of slow.txt, whole ones and single cases, as `slow`."""
    lines = (Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines()
    listed = {line for line in lines if line and not line.startswith("#")}
    for item in items:
        name = item.nodeid.encode("ascii", "backslashreplace").decode()
        if not listed.isdisjoint({name, name.partition("[")[0]}):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def own_threads():
    """Restore torch's thread count after each test.

    The rounding of sums depends on the count, and tests compare images bit for bit.
    """
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_model():
    """Return a builder of tiny random Stable Diffusions: equal arguments give equal weights.

    For tests that change a model.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from safegen.models.model import Model
    from tools.mini.networks import build_tokenizer

    def build(seed: int = 0, *, name: str = "tiny", channels: int = 16, **schedule):
        tokenizer = build_tokenizer(PROMPTS)
        ends = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            **ends,
        )
        ddim = {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "steps_offset": 1,
            "clip_sample": False,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pipeline = StableDiffusionPipeline(
                vae=AutoencoderKL(
                    block_out_channels=(8, 8, 8),
                    down_block_types=("DownEncoderBlock2D",) * 3,
                    up_block_types=("UpDecoderBlock2D",) * 3,
                    layers_per_block=1,
                    latent_channels=4,
                    norm_num_groups=4,
                    sample_size=SIDE,
                ),
                unet=UNet2DConditionModel(
                    sample_size=SIDE // 4,
                    in_channels=4,
                    out_channels=4,
                    block_out_channels=(channels, 2 * channels),
                    layers_per_block=1,
                    down_block_types=("CrossAttnDownBlock2D",) * 2,
                    up_block_types=("CrossAttnUpBlock2D",) * 2,
                    cross_attention_dim=32,
                    attention_head_dim=2,
                    norm_num_groups=8,
                ),
                text_encoder=CLIPTextModel(text),
                tokenizer=tokenizer,
                scheduler=DDIMScheduler(**(ddim | {"set_alpha_to_one": False} | schedule)),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.eval().requires_grad_(False)
        return Model(name, pipeline)

    return build


@pytest.fixture(scope="session")
def tiny_model(make_model):
    """Yield the tiny model that all tests share, and check at the end that none changed it."""
    from safegen.core.hashing import hash_tensors

    def state():
        return [
            hash_tensors(part.state_dict())
            for part in (model.denoiser, model.vae, model.pipeline.text_encoder)
        ]

    model = make_model()
    before = state()
    yield model
    assert state() == before


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tmp_path_factory):
    """Return the tiny model as a diffusers folder, to be read only."""
    from safegen.models.checkpoint.diffusers_folder import save_folder

    out = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(tiny_model, out)
    return out


@pytest.fixture(scope="session")
def cubes():
    """Return a concept of the tiny model, with everything that an edit takes from a concept."""
    from safegen.core.concept import Concept

    return Concept(
        name="cubes",
        words=("red cube", "a cube"),
        counterpart=("tree",),
        judge="mini",
        labels=("skulls",),
        captions=("mini:ghosts",),
        tuning={
            "concept": ("mini:skulls-train",),
            "counterpart": ("mini:skulls-train-counterpart",),
        },
    )


@pytest.fixture(scope="session")
def triplets(tmp_path_factory):
    """Return six triplets: noise with a red mark, the mark under a mosaic, and other noise."""
    import numpy as np
    from PIL import Image

    from safegen.data.triplets.triplets import MANIFEST, ROLES, Digests, Triplet, Triplets

    folder, rng = tmp_path_factory.mktemp("triplets"), np.random.default_rng(0)

    def scene() -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
            (SIDE, SIDE), Image.Resampling.BICUBIC
        )

    lines = []
    for i in range(6):
        unsafe, benign = scene(), scene()
        left, top = (int(v) for v in rng.integers(2, SIDE - 14, 2))
        box = (left, top, left + 12, top + 12)
        unsafe.paste((230, 20, 20), box)
        unsafe.paste((0, 0, 0), (left + 3, top + 3, left + 6, top + 9))
        censored = unsafe.copy()
        censored.paste(
            unsafe.crop(box)
            .resize((2, 2), Image.Resampling.BOX)
            .resize((12, 12), Image.Resampling.NEAREST),
            box,
        )
        paths, digests = {}, {}
        for role, picture in zip(ROLES, (unsafe, censored, benign), strict=True):
            path = folder / role / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
            paths[role], digests[role] = (
                f"{role}/{i}.png",
                hashlib.sha256(path.read_bytes()).hexdigest(),
            )
        lines.append(Triplet(id=str(i), **paths, sha256=Digests(**digests)).model_dump_json())
    (folder / MANIFEST).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Triplets.load(folder)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """Return a browser that all tests share."""
    from browser import Browser, find_chromium

    executable = find_chromium()
    if not executable:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    with Browser(executable, tmp_path_factory.mktemp("profile")) as browser:
        yield browser
