"""Training of mini-flow: an MMDiT with flow matching on the world, captions and latents of mini."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from tools.mini.denoiser import cache_latents
from tools.mini.fit import SEED, autocast, fit
from tools.mini.networks import (
    build_second_text_encoder,
    build_t5,
    build_t5_tokenizer,
    build_transformer,
)
from tools.mini.scenes import CaptionTable, load_scenes

BATCH = 64
DROPPED_CAPTIONS = 0.1
"""Share of the captions that are blank, for classifier-free guidance."""


class FlowNetwork(nn.Module):
    """The parts of mini-flow that are trained together: transformer, second encoder and T5."""

    def __init__(self, tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.text_encoder_2 = build_second_text_encoder(tokenizer)
        self.text_encoder_3 = build_t5(t5_tokenizer)

    def forward(self, noisy: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
        """Return the velocity (b, 4, 16, 16), as diffusers' pipeline of SD 3 composes its inputs.

        Args:
            noisy: latents (b, 4, 16, 16).
            sigma: share of noise in them, (b,).
            text: ids for the second encoder and T5, hidden states and pooled embeddings of the
                first encoder, (b, ...) each.
        """
        second = self.text_encoder_2(text["ids"], output_hidden_states=True)
        clip = torch.cat([text["hidden"], second.hidden_states[-2]], dim=-1)
        t5 = self.text_encoder_3(text["t5_ids"])[0]
        velocity: Tensor = self.transformer(
            hidden_states=noisy,
            timestep=sigma * 1000,
            encoder_hidden_states=torch.cat([clip, t5.to(clip.dtype)], dim=-2),
            pooled_projections=torch.cat([text["pooled"], second.text_embeds], dim=-1),
            return_dict=False,
        )[0]
        return velocity


def train_flow(work: Path, *, steps: int = 3000, compiled: bool = False) -> None:
    """Train mini-flow from random weights and write its parts to `work`/flow.

    x_t = (1 - t) x0 + t noise, and the network predicts noise - x0. The times are logit-normal
    (arXiv:2403.03206). The matrices inside the blocks are updated by Muon, all else by AdamW.
    `compiled` needs a C++ compiler.
    """
    torch.manual_seed(SEED)
    data = load_scenes(work)
    captions = CaptionTable(data)
    mean, std = cache_latents(work, data)
    vae = AutoencoderKL.from_pretrained(work / "pipeline" / "vae")
    shift, scale = latent_moments(mean, vae)
    scaled = vae.config.scaling_factor
    mean, std = (mean / scaled - shift) * scale, std / scaled * scale
    tokenizer = CLIPTokenizer.from_pretrained(work / "pipeline" / "tokenizer")
    t5_tokenizer = build_t5_tokenizer(captions.texts[:-1])
    text = embed_captions(work, captions, tokenizer)
    padded = {"padding": "max_length", "max_length": 32, "truncation": True}
    text["t5_ids"] = torch.tensor(t5_tokenizer(captions.texts, **padded).input_ids)
    network = FlowNetwork(tokenizer, t5_tokenizer)
    forward = torch.compile(network) if compiled else network

    def loss(step: int, g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pick = torch.randint(len(mean), (BATCH,), generator=g)
        rows, _ = captions.sample(pick, g)
        dropped = torch.rand(BATCH, generator=g) < DROPPED_CAPTIONS
        rows = torch.where(dropped, torch.full_like(rows, captions.blank), rows)
        latents = mean[pick] + std[pick] * torch.randn(mean[pick].shape, generator=g)
        noise = torch.randn(latents.shape, generator=g)
        sigma = torch.randn(BATCH, generator=g).sigmoid()
        at = sigma.view(-1, 1, 1, 1)
        noisy = (1 - at) * latents + at * noise
        with autocast(), sdpa_kernel(SDPBackend.MATH):  # its backward pass is faster on CPUs
            predicted = forward(noisy, sigma, {name: value[rows] for name, value in text.items()})
        value = (predicted.float() - (noise - latents)).pow(2).mean()
        return value, {"velocity": value.item()}

    fit("flow", work, network, steps, loss, lr=2e-3, ema=0.999, muon=is_block_matrix)
    folder = work / "flow"
    for name in ("transformer", "text_encoder_2", "text_encoder_3"):
        getattr(network, name).save_pretrained(folder / name)
    t5_tokenizer.save_pretrained(folder / "tokenizer_3")


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix of a block's attention or feed-forward network."""
    return parameter.ndim == 2 and ".transformer_blocks." in f".{name}" and ".norm1" not in name


def latent_moments(mean: Tensor, vae: AutoencoderKL) -> tuple[float, float]:
    """Return the shift and the scale that give the latents of an autoencoder mean 0, variance 1.

    Args:
        mean: posterior means times its scaling factor.
        vae: the autoencoder.
    """
    latents = mean / vae.config.scaling_factor
    return round(float(latents.mean()), 5), round(1 / float(latents.std()), 5)


@torch.no_grad()
def embed_captions(
    work: Path, captions: CaptionTable, tokenizer: CLIPTokenizer
) -> dict[str, Tensor]:
    """Return ids, hidden states and pooled embeddings of every caption by the first encoder."""
    encoder = first_text_encoder(work)
    ids = torch.tensor(tokenizer(captions.texts, padding="max_length", truncation=True).input_ids)
    outputs = [encoder(part, output_hidden_states=True) for part in ids.split(512)]
    return {
        "ids": ids,
        "hidden": torch.cat([output.hidden_states[-2] for output in outputs]),
        "pooled": torch.cat([output.text_embeds for output in outputs]),
    }


def first_text_encoder(work: Path) -> CLIPTextModelWithProjection:
    """Return the text tower of mini's CLIP model with its projection."""
    return CLIPTextModelWithProjection.from_pretrained(work / "clip").float().eval()
