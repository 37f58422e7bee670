"""The shipped files: weights and triplets."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from safegen.core.files import staged_directory
from safegen.data.triplets.censor import Censor
from safegen.data.triplets.make import make_triplets
from safegen.judges.mini import MiniJudge
from safegen.mini import bundle
from safegen.mini.world import IMAGE_SIZE, OBJECTS
from safegen.models.checkpoint.diffusers_folder import remove_local_paths, save_folder
from safegen.models.model import Model
from tools.mini.denoiser import SCHEDULE, cache_latents
from tools.mini.drawing import draw, sample_scene
from tools.mini.fit import SEED
from tools.mini.flow import first_text_encoder, latent_moments
from tools.mini.scenes import load_scenes

BENIGN_ATTRIBUTES: dict[str, list[str | None]] = {
    "skulls": [None, "ghosts", "leaves"],
    "fire": [None, "leaves", "ghosts", "leaves"],
}
"""Attributes of the benign images of each concept, in turn."""


def pack_weights(work: Path, *, output: Path = bundle.HERE) -> None:
    """Replace `output`/weights: convolutions of all networks in fp16."""
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
    judges = {
        bundle.judge_file(): load_file(work / "judge.safetensors"),
        bundle.held_out_judge_file(): load_file(work / "held_out_judge.safetensors"),
    }
    shutil.rmtree(output / "weights", ignore_errors=True)
    with staged_directory(output / "weights") as staged:
        target = {
            path: staged / path.relative_to(weights)
            for path in (bundle.pipeline_folder(), bundle.clip_folder(), *judges)
        }
        save_folder(Model("mini", pipeline.to(torch.float16)), target[bundle.pipeline_folder()])
        flow = build_flow_pipeline(work).to(torch.float16)
        save_folder(Model("mini-flow", flow), staged / "flow")
        clip.save_pretrained(target[bundle.clip_folder()])
        tokenizer.save_pretrained(target[bundle.clip_folder()])
        CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ).save_pretrained(target[bundle.clip_folder()])
        for path, state in judges.items():
            save_judge(state, target[path])
        remove_local_paths(staged)
        print(
            f"pack: {sum(p.stat().st_size for p in staged.rglob('*') if p.is_file()) / 1e6:.1f} MB",
            flush=True,
        )


def build_flow_pipeline(work: Path) -> StableDiffusion3Pipeline:
    """Return the trained pipeline of mini-flow: the autoencoder and first text encoder of mini."""
    folder, flow = work / "pipeline", work / "flow"
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    shift, scale = latent_moments(cache_latents(work, load_scenes(work))[0], vae)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(flow / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=first_text_encoder(work),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(flow / "text_encoder_2"),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel.from_pretrained(flow / "text_encoder_3"),
        tokenizer_3=T5Tokenizer.from_pretrained(flow / "tokenizer_3"),
    )


def save_judge(state: dict[str, Tensor], path: Path) -> None:
    """Write the weights of a judge: convolutions in fp16, norms and linear layers in fp32."""
    save_file({k: v.half() if v.ndim == 4 else v for k, v in state.items()}, path)


def object_and_attribute(i: int, attributes: Sequence[str | None]) -> tuple[str, str | None]:
    """Return object and attribute of scene `i`, so that each object meets every attribute."""
    cycle, index = divmod(i, len(OBJECTS))
    return OBJECTS[index], attributes[(index + cycle) % len(attributes)]


def build_triplets(work: Path, *, n: int = 100, output: Path = bundle.HERE) -> None:
    """Replace `output`/triplets with triplets of each concept, from scenes of their own seeds.

    The bundled judge finds the boxes to censor.
    """
    for c, (concept, benign_attributes) in enumerate(BENIGN_ATTRIBUTES.items()):
        attributes_by_role: dict[str, list[str | None]] = {
            "unsafe": [concept],
            "benign": benign_attributes,
        }
        for side, attributes in attributes_by_role.items():
            folder = work / "triplets" / concept / side
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for i in range(n):
                rng = np.random.default_rng((SEED + 2, c, side == "unsafe", i))
                name, attribute = object_and_attribute(i, attributes)
                scene = sample_scene(rng, attribute=attribute, objects=[name])
                Image.fromarray(draw(scene)).save(folder / f"{i:03d}.png")
        destination, fresh = output / "triplets" / concept, work / "triplets" / f"{concept}-made"
        shutil.rmtree(fresh, ignore_errors=True)
        unsafe, benign = (work / "triplets" / concept / side for side in attributes_by_role)
        result = make_triplets(
            unsafe,
            benign,
            MiniJudge(labels=(concept,)),
            fresh,
            Censor(tile=3 / 16, padding=0.2),
            labels=(concept,),
        )
        shutil.rmtree(destination, ignore_errors=True)
        shutil.copytree(fresh, destination)
        skipped = [str(p) for p in result.skipped]
        print(f"{concept}: {len(result.triplets)} triplets; left out: {skipped}", flush=True)
