"""Training of the CLIP model, which provides the pipeline's text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from safegen.core.files import staged_directory
from tools.mini.fit import SEED, autocast, fit
from tools.mini.networks import build_clip, build_tokenizer
from tools.mini.scenes import CaptionTable, load_scenes, to_unit


def train_clip(work: Path, *, steps: int = 900) -> None:
    """Train both towers by the contrastive loss; every true caption of an image is a match."""
    torch.manual_seed(SEED)
    data = load_scenes(work)
    captions = CaptionTable(data)
    folder = work / "pipeline" / "tokenizer"
    if not folder.exists():
        with staged_directory(folder) as tmp:
            build_tokenizer(captions.texts[:-1]).save_pretrained(tmp)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(captions.texts, padding="max_length", truncation=True).input_ids)
    clip = build_clip(tokenizer)

    def matches(images: Tensor, captioned: Tensor, places: Tensor) -> Tensor:
        same_object = data["objects"][images, None] == data["objects"][captioned]
        same_attribute = data["attributes"][images, None] == data["attributes"][captioned]
        same_place = (places < 0) | (data["places"][images, None] == places)
        return same_object & same_attribute & same_place

    def loss(step: int, g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pick = torch.randint(len(data["images"]), (96,), generator=g)
        rows, places = captions.sample(pick, g)
        true = matches(pick, pick, places).float()
        with autocast():
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
    """Save the text tower with the key prefix `text_model.`, which every transformers reads."""
    tower.save_pretrained(
        folder, state_dict={"text_model." + k: v for k, v in tower.state_dict().items()}
    )
