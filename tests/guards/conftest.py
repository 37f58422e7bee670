"""Tiny pipelines, settings of every guard, and a function that generates."""

from __future__ import annotations

import pytest

PROMPTS = ("a red cube on a white table", "a blue ball in the grass", "a green cone under a tree")
"""Texts that the tiny tokenizer was built from."""


TEXT = "a red cube"


@pytest.fixture(scope="session")
def checker_in():
    """Return a function that writes a safety checker with random weights.

    With `fits`, one of its concepts fits every image.
    """
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    def write(folder, *, fits):
        size = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "projection_dim": 8,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = StableDiffusionSafetyChecker(
                CLIPConfig(
                    vision_config=size | {"image_size": 16, "patch_size": 8},
                    text_config=size,
                    projection_dim=8,
                )
            )
        net.concept_embeds_weights.data[:] = 2.0
        net.special_care_embeds_weights.data[:] = 2.0
        if fits:
            net.concept_embeds_weights.data[3] = -2.0
        net.save_pretrained(folder)
        CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ).save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def passing_settings(tmp_path_factory, checker_in):
    """Return settings of every guard (default: none) that block nothing on the tiny models."""
    import torch

    from safegen.core.registry import GUARDS
    from safegen.guards.latent_guard.head import LatentGuardHead, save_head

    folder = tmp_path_factory.mktemp("guards")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_head(LatentGuardHead(32), folder / "head.safetensors")
    return {name: {} for name in GUARDS} | {
        "sld": {"preset": "max", "text": TEXT},
        "negative-prompt": {
            "text": "a green cone"
        },  # not what sld steers away from, which would have no effect beside it
        "judge-filter": {"judge": "mini", "threshold": 1.0},
        "prompt-filter": {"words": ["skull"]},
        "safree": {"phrases": [TEXT, "red"]},
        "dual-latent": {"phrases": [TEXT, "red"], "start": 0.0},
        "pno": {
            "weights": "mini",
            "unsafe": ["a skull"],
            "safe": ["a castle"],
            "judge": "mini",
            "threshold": 1.0,
            "restarts": 0,
            "iterations": 0,
            "limit": 0.999,
        },
        "crops": {"judge": "mini", "threshold": 1.0, "probes": 2, "steps": 1},
        "safety-checker": {"weights": str(checker_in(folder / "checker", fits=False))},
        "latent-guard": {
            "weights": folder / "head.safetensors",
            "concepts": [TEXT],
            "threshold": 1e9,
        },
    }


@pytest.fixture(scope="session")
def generate():
    """Return a function that generates with guards, or by the pipeline's own call without any."""
    import torch

    from safegen.guards import read_guard
    from safegen.guards.core.pipeline import GuardedPipeline

    def go(
        pipe,
        guards=None,
        prompts=PROMPTS[1:],
        *,
        seed=0,
        max_rows=None,
        num_images_per_prompt=1,
        engine=None,
        **options,
    ):
        options = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np", **options}
        options["generator"] = [
            torch.Generator().manual_seed(seed + i) for i in range(len(prompts))
        ]
        if num_images_per_prompt > 1:
            options["generator"] = torch.Generator().manual_seed(seed)
        if guards is None and engine is None:
            if num_images_per_prompt > 1:
                options["num_images_per_prompt"] = num_images_per_prompt
            out = pipe(prompt=list(prompts), **options)
            return out.images if hasattr(out, "images") else out.frames
        engine = engine or GuardedPipeline(pipe, [read_guard(g) for g in guards], max_rows=max_rows)
        return engine.generate(
            list(prompts), num_images_per_prompt=num_images_per_prompt, **options
        )

    return go


@pytest.fixture(scope="session")
def tiny_xl(make_xl):
    """Return a tiny random SDXL that no test changes."""
    return make_xl()


@pytest.fixture(scope="session")
def make_xl():
    """Return a builder of tiny random SDXLs, for tests that change one."""
    return _build_xl


def _build_xl():
    from tests.tiny import build_pipeline

    return build_pipeline("sdxl")


@pytest.fixture(scope="session")
def tiny_wan():
    """Return a tiny random Wan, with two denoiser calls per step."""
    import torch
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import CLIPTokenizer, T5Config, T5EncoderModel

    from tools.mini.networks import build_tokenizer

    tokenizer: CLIPTokenizer = build_tokenizer(PROMPTS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(
                T5Config(
                    vocab_size=len(tokenizer),
                    d_model=32,
                    d_kv=8,
                    d_ff=37,
                    num_layers=2,
                    num_heads=4,
                    feed_forward_proj="gated-gelu",
                )
            ),
            transformer=WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=16,
                out_channels=16,
                text_dim=32,
                freq_dim=256,
                ffn_dim=32,
                num_layers=2,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=32,
            ),
            vae=AutoencoderKLWan(
                base_dim=3,
                z_dim=16,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return pipe
