"""The pair of towers; its text tower becomes the pipeline's text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from safegen.core.files import atomic_directory
from safegen.mini import networks
from safegen.mini.train.fit import SEED, arithmetic, fit
from safegen.mini.train.scenes import Words, load_world, to_unit


def stage_clip(work: Path, *, steps: int = 900) -> None:
    """Train both towers by the contrastive loss.

    Every caption that is true of a picture counts as its match.
    """
    torch.manual_seed(SEED)
    data = load_world(work)
    words = Words(data)
    folder = work / "pipeline" / "tokenizer"
    if not folder.exists():
        with atomic_directory(folder) as tmp:
            networks.build_tokenizer(words.texts[:-1]).save_pretrained(tmp)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(words.texts, padding="max_length", truncation=True).input_ids)
    clip = networks.build_clip(tokenizer)

    def matches(pick: Tensor, concept_embeddings: Tensor, places: Tensor) -> Tensor:
        same = (data["objects"][pick, None] == data["objects"][concept_embeddings]) & (
            data["attributes"][pick, None] == data["attributes"][concept_embeddings]
        )
        return same & ((places < 0) | (data["places"][pick, None] == places))

    def loss(step: int, g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pick = torch.randint(len(data["images"]), (96,), generator=g)
        rows, places = words.draw(pick, g)
        true = matches(pick, pick, places).float()
        with arithmetic():
            logits = clip(
                input_ids=ids[rows], pixel_values=to_unit(data["images"][pick])
            ).logits_per_image.float()
        by_image = -(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
        by_text = -(true / true.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
        right = true.gather(1, logits.argmax(1, keepdim=True)).mean()
        return (by_image + by_text) / 2, {
            "image": by_image.item(),
            "text": by_text.item(),
            "top1": right.item(),
        }

    fit("clip", work, clip, steps, loss, lr=1e-3, ema=0.99)
    clip.save_pretrained(work / "clip")
    save_text_encoder(clip.text_model, work / "pipeline" / "text_encoder")


def save_text_encoder(tower: CLIPTextModel, folder: Path) -> None:
    """Save the text tower in the key layout that every transformers release reads (`text_model.` before each name)."""
    tower.save_pretrained(
        folder, state_dict={"text_model." + k: v for k, v in tower.state_dict().items()}
    )
