"""Tiny random pipelines of every family, for contract tests: real diffusers classes, no training.

Images are 32 pixels, latents 8. Equal arguments give equal weights. Imports are inside, so that
collecting is quick.
"""

from __future__ import annotations

from typing import Any

FAMILIES = ("sd1", "sd2-v", "sdxl", "sdxl-v", "sd3", "sd35", "flux", "flux-schnell")
"""SD 1.x; SD 2.x with v-prediction; SDXL with noise and v-prediction; SD 3 without T5; SD 3.5
medium with T5 and self-attention of the image; FLUX with and without embedded guidance."""
PROMPTS = ("a red cube on a white table", "a blue ball in the grass", "a green cone under a tree")
DDIM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def build_pipeline(family: str, seed: int = 0, **schedule: Any) -> Any:
    """Return a tiny pipeline of a family, in evaluation mode and without gradients.

    Args:
        family: one of `FAMILIES`.
        seed: seed of the weights.
        schedule: settings of its scheduler that differ.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = _BUILDERS[family.partition("-")[0]](family, schedule)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe


def build_model(family: str, seed: int = 0, **schedule: Any) -> Any:
    """Return the tiny model of a family; see `build_pipeline`."""
    from safegen.models.model import Model

    return Model(family, build_pipeline(family, seed, **schedule))


def _tokenizer() -> Any:
    from tools.mini.networks import build_tokenizer

    return build_tokenizer(PROMPTS)


def _text_config(width: int, layers: int, act: str) -> Any:
    from transformers import CLIPTextConfig

    tokenizer = _tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=act,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(channels: int = 4, **changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        **changes,
    )


def _t5(width: int) -> tuple[Any, Any]:
    """Return a T5 encoder and its tokenizer."""
    from transformers import T5Config, T5EncoderModel

    from tools.mini.networks import build_t5_tokenizer

    tokenizer = build_t5_tokenizer(PROMPTS)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config), tokenizer


def _build_sd(family: str, schedule: dict[str, Any]) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    is_v = family.endswith("-v")
    return StableDiffusionPipeline(
        vae=_vae(),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=32,
            attention_head_dim=[2, 4] if is_v else 2,
            use_linear_projection=is_v,
        ),
        text_encoder=CLIPTextModel(_text_config(32, 2, "gelu" if is_v else "quick_gelu")),
        tokenizer=_tokenizer(),
        scheduler=DDIMScheduler(**_prediction(is_v) | schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _build_sdxl(family: str, schedule: dict[str, Any]) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return StableDiffusionXLPipeline(
        vae=_vae(),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=56,
            attention_head_dim=[2, 4],
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        ),
        text_encoder=CLIPTextModel(_text_config(32, 3, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(24, 3, "gelu")),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        scheduler=DDIMScheduler(**_prediction(family.endswith("-v")) | schedule),
        add_watermarker=False,
    )


def _build_sd3(family: str, schedule: dict[str, Any]) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    t5, t5_tokenizer = _t5(64) if family == "sd35" else (None, None)
    return StableDiffusion3Pipeline(
        vae=_vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=32 + 24,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1) if family == "sd35" else (),
            qk_norm="rms_norm" if family == "sd35" else None,
        ),
        text_encoder=CLIPTextModelWithProjection(_text_config(32, 3, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(24, 3, "gelu")),
        text_encoder_3=t5,
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        tokenizer_3=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | schedule),
    )


def _build_flux(family: str, schedule: dict[str, Any]) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    is_schnell = family == "flux-schnell"
    dynamic = {} if is_schnell else {"use_dynamic_shifting": True, "shift": 3.0}
    t5, t5_tokenizer = _t5(48)
    pipe = FluxPipeline(
        vae=_vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.12),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=not is_schnell,
            axes_dims_rope=(4, 6, 6),
        ),
        text_encoder=CLIPTextModel(_text_config(32, 3, "quick_gelu")),
        text_encoder_2=t5,
        tokenizer=_tokenizer(),
        tokenizer_2=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(**dynamic | schedule),
    )
    pipe.default_sample_size = 8  # diffusers has 128 for every FLUX
    return pipe


def _prediction(is_v: bool) -> dict[str, Any]:
    return DDIM | ({"prediction_type": "v_prediction"} if is_v else {})


_BUILDERS = {
    "sd1": _build_sd,
    "sd2": _build_sd,
    "sdxl": _build_sdxl,
    "sd3": _build_sd3,
    "sd35": _build_sd3,
    "flux": _build_flux,
}
