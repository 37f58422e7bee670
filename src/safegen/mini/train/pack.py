"""What is shipped: the weights, and ready triplets."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel, CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from safegen.core.files import swap_directory
from safegen.mini import bundle, world
from safegen.mini.train.denoiser import SCHEDULE
from safegen.mini.train.fit import SEED
from safegen.mini.train.scenes import OBJECTS

BENIGN_MARKS: dict[str, list[str | None]] = {
    "skulls": [None, "ghosts", "leaves"],
    "fire": [None, "leaves", "ghosts", "leaves"],
}
"""Concept: attributes of its benign pictures, in turn."""


def stage_pack(work: Path, *, home: Path = bundle.HERE) -> None:
    """Write the shipped files: the pipeline and the towers in fp16, the judge with its statistics in fp32.

    They go to `home`/weights, which is replaced once all is written.
    """
    # this is a tool: the only file in mini/ that looks up
    from safegen.models.checkpoint.diffusers_folder import remove_local_paths, save_folder
    from safegen.models.model import Model

    folder, weights = work / "pipeline", bundle.HERE / "weights"
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    clip, tokenizer = (
        CLIPModel.from_pretrained(work / "clip").half(),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    )
    judge = load_file(work / "judge.safetensors")
    with swap_directory(home / "weights") as out:
        at = {
            path: out / path.relative_to(weights)
            for path in (bundle.pipeline_folder(), bundle.clip_folder(), bundle.judge_file())
        }
        save_folder(Model("mini", pipeline.to(torch.float16)), at[bundle.pipeline_folder()])
        clip.save_pretrained(at[bundle.clip_folder()])
        tokenizer.save_pretrained(at[bundle.clip_folder()])
        CLIPImageProcessorPil(
            size={"shortest_edge": world.SIDE},
            crop_size={"height": world.SIDE, "width": world.SIDE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ).save_pretrained(at[bundle.clip_folder()])
        save_file(
            {k: v.half() if v.ndim == 4 else v for k, v in judge.items()}, at[bundle.judge_file()]
        )
        remove_local_paths(out)
        print(
            f"pack: {sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 1e6:.1f} MB",
            flush=True,
        )


def turn(i: int, marks: Sequence[str | None]) -> tuple[str, str | None]:
    """Return object and mark of the `i`-th scene: objects in turn, each with the next mark every time round."""
    round_, at = divmod(i, len(OBJECTS))
    return OBJECTS[at], marks[(at + round_) % len(marks)]


def stage_triplets(work: Path, *, n: int = 100, home: Path = bundle.HERE) -> None:
    """Make the ready triplets of each unsafe concept from scenes that no other stage draws.

    The bundled judge finds what to cover. They go to `home`/triplets, where those of a concept are
    replaced once they are whole.
    """
    from safegen.data.triplets.censor import Censor
    from safegen.data.triplets.make import make
    from safegen.judges.mini import MiniJudge

    for c, (concept, calm) in enumerate(BENIGN_MARKS.items()):
        sides: dict[str, list[str | None]] = {"unsafe": [concept], "benign": calm}
        for side, marks in sides.items():
            folder = work / "triplets" / concept / side
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for i in range(n):
                rng = np.random.default_rng((SEED + 2, c, side == "unsafe", i))
                name, mark = turn(i, marks)
                scene = world.sample(rng, attribute=mark, objects=[name])
                Image.fromarray(world.draw(scene)).save(folder / f"{i:03d}.png")
        out, fresh = home / "triplets" / concept, work / "triplets" / f"{concept}-made"
        shutil.rmtree(fresh, ignore_errors=True)
        unsafe, benign = (work / "triplets" / concept / side for side in sides)
        found = make(
            unsafe,
            benign,
            MiniJudge(labels=(concept,)),
            fresh,
            Censor(tile=3 / 16, padding=0.2),
            labels=(concept,),
        )
        with swap_directory(out) as whole:
            shutil.copytree(fresh, whole, dirs_exist_ok=True)
        print(
            f"{concept}: {len(found.triplets)} triplets; left out: {[str(p) for p in found.left_out]}",
            flush=True,
        )
