"""The shapes of the miniature model's parts: diffusers' and transformers' own classes at small size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer


def build_vae() -> AutoencoderKL:
    """Return the untrained autoencoder: (b, 3, 64, 64) in [-1, 1] <-> (b, 4, 16, 16)."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Return the untrained denoiser: (b, 4, 16, 16) latents, self- and cross-attention at 16, 8 and 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 112, 144),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128,
        attention_head_dim=2,  # diffusers' SD 1.x name for the number of heads
        norm_num_groups=16,
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return the untrained pair of towers; the text tower becomes the pipeline's text encoder."""
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    size = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "projection_dim": 64,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        num_hidden_layers=4,
        **size,
        **ends,
    )
    vision = CLIPVisionConfig(image_size=64, patch_size=8, num_hidden_layers=4, **size)
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )


def build_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Learn a small byte-pair vocabulary on `texts`, laid out as CLIP's: bytes, bytes at a word's end, merges, two specials."""
    words = Counter(word for text in texts for word in text.lower().split())
    alphabet = sorted(ByteLevel.alphabet())
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while pairs := _pair_counts(split, words):
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        split = {w: _merge(parts, best) for w, parts in split.items()}
    names = [
        *alphabet,
        *(c + "</w>" for c in alphabet),
        *dict.fromkeys("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=merges, model_max_length=32
    )


def _pair_counts(split: dict[str, list[str]], words: Counter[str]) -> Counter[tuple[str, str]]:
    pairs: Counter[tuple[str, str]] = Counter()
    for word, parts in split.items():
        for pair in pairwise(parts):
            pairs[pair] += words[word]
    return pairs


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


class JudgeNet(nn.Module):
    """A small detector in the manner of CenterNet: (b, 3, 64, 64) in [-1, 1] -> heat maps, box sizes and the object's class.

    Outputs, on a 16x16 grid of 4-pixel cells: `heat` (b, labels, 16, 16) logits, `size` (b, 2, 16,
    16) box width and height in pixels over 16, `object` (b, objects) logits.
    """

    def __init__(self, labels: int, objects: int) -> None:
        """Build the network with random weights."""
        super().__init__()

        def block(a: int, b: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)
            )

        self.fine = nn.Sequential(
            block(3, 24, 2), block(24, 32), block(32, 64, 2), block(64, 64), block(64, 64)
        )
        self.coarse = nn.Sequential(block(64, 96, 2), block(96, 96), block(96, 96))
        self.join = block(64 + 96, 96)
        self.heat = nn.Conv2d(96, labels, 1)
        self.size = nn.Conv2d(96, 2, 1)
        self.top = nn.Sequential(block(96, 128, 2), block(128, 128))
        self.object = nn.Linear(128 * 16, objects)
        nn.init.constant_(self.heat.bias, -4.0)  # type: ignore[arg-type]  # marks are rare: start from a low score

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (heat, size, object)."""
        fine = self.fine(x)
        coarse = self.coarse(fine)
        joined = self.join(torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], dim=1))
        return self.heat(joined), self.size(joined), self.object(self.top(coarse).flatten(1))
