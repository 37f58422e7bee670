"""Untrained parts of the miniature model: classes of diffusers and transformers at small size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer


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
    """Return the untrained denoiser: (b, 4, 16, 16) latents, attention at sides 16, 8 and 4."""
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
    """Return the untrained CLIP model; its text tower becomes the pipeline's text encoder."""
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


def build_transformer() -> SD3Transformer2DModel:
    """Return the untrained denoiser of mini-flow: an MMDiT as SD 3.5 medium has it.

    It reads (b, 4, 16, 16) latents, (b, tokens, 192) text embeddings and (b, 128) pooled ones. Its
    first two blocks also have self-attention of the image alone. Modulations and the last
    projection start at zero (arXiv:2212.09748), which diffusers leaves to the training.
    """
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=192,
        caption_projection_dim=192,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    zeros = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        zeros += [block.norm1.linear, block.norm1_context.linear]
    for layer in zeros:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def build_second_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Return the untrained second text encoder of mini-flow: half as wide as the first."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            hidden_size=64,
            intermediate_size=192,
            num_attention_heads=2,
            num_hidden_layers=3,
            projection_dim=64,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Return the untrained T5 encoder of mini-flow."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_kv=32,
            d_ff=384,
            num_layers=2,
            num_heads=6,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def build_t5_tokenizer(texts: Iterable[str]) -> T5Tokenizer:
    """Return a T5 tokenizer: the words of `texts`, then single characters for other words."""
    words = Counter(word for text in texts for word in text.split())
    total = sum(words.values())
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    vocabulary += [(f"\u2581{w}", math.log(n / total)) for w, n in sorted(words.items())]
    vocabulary += [(letter, -12.0) for letter in letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=32)


def build_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Return a CLIP tokenizer with a byte-pair vocabulary learned on `texts`.

    Layout as in CLIP: bytes, bytes at the end of a word, merges, two special tokens. Among equally
    frequent pairs the last in alphabetical order merges first. `tokenizers.trainers.BpeTrainer`
    breaks ties in another way and does not reproduce the shipped vocabulary.
    """
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
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
