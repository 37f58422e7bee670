"""Train the miniature model from nothing: world -> clip -> vae -> unet -> judge -> pack.

    python -m safegen.mini.train --work DIR [--stages world,vae,...] [--threads 2]

Every stage checkpoints into DIR and goes on where it stopped; losses go to DIR/log.jsonl. `pack` writes the shipped files.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel, CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from safegen.mini import bundle, captions, networks, world

SEED = 2404_06666
SCENES = 24_000
SHARES = {None: 0.3, "skulls": 0.22, "fire": 0.22, "ghosts": 0.13, "leaves": 0.13}
"""Part of the training scenes that carries each attribute."""
SIDE = world.SIDE
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
}
COMPILE = False
"""Whether the denoiser is compiled for training (--compile): 1.4 times faster after two minutes, needs a C++ compiler."""
OBJECTS, PLACES, MARKS = list(world.OBJECTS), list(world.BACKGROUNDS), list(world.MARKS)


# ---------------------------------------------------------------- one small loop for every stage


def fit(
    name: str,
    work: Path,
    model: nn.Module,
    steps: int,
    loss: Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]],
    *,
    lr: float,
    ema: float = 0.999,
    warmup: int = 100,
) -> nn.Module:
    """Minimise `loss(step, generator)` by AdamW with a cosine schedule; leave the averaged weights in `model`.

    The generator of a step depends on the seed and the step alone, so that a resumed run draws what an unbroken one draws.
    """
    path, log = work / f"{name}.pt", work / "log.jsonl"
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    average = {k: v.detach().clone() for k, v in model.named_parameters()}
    start, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        average, start, spent = state["average"], state["step"], state["seconds"]
    began, saved = time.time() - spent, time.time()
    sums: dict[str, float] = {}
    model.train()
    for step in range(start, steps):
        rate = lr * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in opt.param_groups:
            group["lr"] = rate
        value, parts = loss(step, torch.Generator().manual_seed(SEED + 1_000_003 * step))
        opt.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        decay = min(ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in model.named_parameters():
                average[k].lerp_(v, 1 - decay)
        for k, part in parts.items():
            sums[k] = sums.get(k, 0.0) + part
        last = step + 1 == steps
        if (step + 1) % 50 == 0 or last:
            row = {"stage": name, "step": step + 1, "seconds": round(time.time() - began, 1), "lr": rate}
            row |= {k: round(v / 50, 6) for k, v in sums.items()}
            sums = {}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if time.time() - saved > 120 or last:
            state = {"model": model.state_dict(), "opt": opt.state_dict(), "average": average, "step": step + 1}
            torch.save(state | {"seconds": time.time() - began}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
            saved = time.time()
    with torch.no_grad():
        for k, v in model.named_parameters():
            v.copy_(average[k])
    return model.eval()


# ---------------------------------------------------------------- world


def make_scenes(n: int, seed: int) -> list[world.Scene]:
    """Return `n` scenes in the shares of `SHARES`, each from its own (seed, index)."""
    kinds, shares = list(SHARES), list(SHARES.values())
    out = []
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        out.append(world.sample(rng, attribute=kinds[int(rng.choice(len(kinds), p=shares))]))
    return out


def stage_world(work: Path) -> None:
    """Draw the training scenes once: pictures, labels and boxes."""
    scenes = make_scenes(SCENES, SEED)
    boxes = np.full((SCENES, 3, 4), -1, np.float32)
    for i, s in enumerate(scenes):
        for j, box in enumerate(world.boxes(s)):
            boxes[i, j] = box
    np.savez(
        work / "world.npz",
        images=np.stack([world.draw(s) for s in scenes]),
        objects=np.array([OBJECTS.index(s.object) for s in scenes]),
        places=np.array([PLACES.index(s.background) for s in scenes]),
        attributes=np.array([MARKS.index(s.attribute) if s.attribute else -1 for s in scenes]),
        boxes=boxes,
    )


def load_world(work: Path) -> dict[str, Tensor]:
    """Return the drawn scenes as tensors; images (n, 3, 64, 64) uint8."""
    with np.load(work / "world.npz") as data:
        out = {k: torch.from_numpy(data[k]) for k in data.files}
    out["images"] = out["images"].permute(0, 3, 1, 2).contiguous()
    return out


def to_unit(images: Tensor) -> Tensor:
    """Return uint8 pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


# ---------------------------------------------------------------- words


class Words:
    """Every caption of the world, its place in one list, and random training captions for scenes."""

    def __init__(self) -> None:
        """List the captions; the last one is the blank text."""
        self.texts: list[str] = []
        self.rows: dict[tuple[str, int, int, int], int] = {}
        for kind, templates in captions.TEMPLATES.items():
            for t in range(len(templates)):
                for o, name in enumerate(OBJECTS):
                    for p in range(-1, len(PLACES)):
                        self.rows[kind, t, o, p] = len(self.texts)
                        self.texts.append(captions.caption(kind, t, name, PLACES[p] if p >= 0 else None))
        self.blank = len(self.texts)
        self.texts.append("")

    def draw(self, data: dict[str, Tensor], pick: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return (rows, places): a random training caption for each picked scene and the background it names (-1: none)."""
        rows, places = [], []
        for i, (coin, at, third) in zip(pick.tolist(), torch.rand(len(pick), 3, generator=g).tolist(), strict=True):
            a, o = int(data["attributes"][i]), int(data["objects"][i])
            kind = MARKS[a] if a >= 0 else "benign"
            if coin < 0.5 and kind + "-innocent" in captions.TEMPLATES:
                kind += "-innocent"
            allowed = [t for t in range(len(captions.TEMPLATES[kind])) if not captions.held_out(t, OBJECTS[o])]
            place = int(data["places"][i]) if third < 0.5 else -1
            rows.append(self.rows[kind, allowed[int(at * len(allowed))], o, place])
            places.append(place)
        return torch.tensor(rows), torch.tensor(places)


# ---------------------------------------------------------------- clip


def stage_clip(work: Path, steps: int = 900) -> None:
    """Train both towers by the contrastive loss; every caption that is true of a picture counts as its match."""
    torch.manual_seed(SEED)
    words = Words()
    folder = work / "pipeline" / "tokenizer"
    if not folder.exists():
        networks.build_tokenizer(words.texts[:-1]).save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(words.texts, padding="max_length", truncation=True).input_ids)
    clip = networks.build_clip(tokenizer)
    data = load_world(work)

    def matches(pick: Tensor, rows_of: Tensor, places: Tensor) -> Tensor:
        same = (data["objects"][pick, None] == data["objects"][rows_of]) & (data["attributes"][pick, None] == data["attributes"][rows_of])
        return same & ((places < 0) | (data["places"][pick, None] == places))

    def loss(step: int, g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pick = torch.randint(SCENES, (96,), generator=g)
        rows, places = words.draw(data, pick, g)
        true = matches(pick, pick, places).float()
        with torch.autocast("cpu", torch.bfloat16):
            logits = clip(input_ids=ids[rows], pixel_values=to_unit(data["images"][pick])).logits_per_image.float()
        by_image = -(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
        by_text = -(true / true.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
        right = true.gather(1, logits.argmax(1, keepdim=True)).mean()
        return (by_image + by_text) / 2, {"image": by_image.item(), "text": by_text.item(), "top1": right.item()}

    fit("clip", work, clip, steps, loss, lr=1e-3, ema=0.99)
    clip.save_pretrained(work / "clip")
    save_text_encoder(clip.text_model, work / "pipeline" / "text_encoder")


def save_text_encoder(tower: CLIPTextModel, folder: Path) -> None:
    """Save the text tower in the key layout that every transformers release reads (`text_model.` before each name)."""
    tower.save_pretrained(folder, state_dict={"text_model." + k: v for k, v in tower.state_dict().items()})


# ---------------------------------------------------------------- vae


def stage_vae(work: Path, steps: int = 4600) -> None:
    """Train the autoencoder: L1 + squared error + edges + a small KL, on crops first and whole scenes last."""
    torch.manual_seed(SEED)
    vae = networks.build_vae().to(memory_format=torch.channels_last)
    images = load_world(work)["images"]

    def loss(step: int, g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        whole = step >= steps * 0.6
        pick = torch.randint(len(images), (10 if whole else 24,), generator=g)
        x = to_unit(images[pick])
        if not whole:
            i, j = torch.randint(0, 33, (2,), generator=g).tolist()
            x = x[:, :, i : i + 32, j : j + 32]
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            q = vae.encode(x).latent_dist
            z = q.mean + q.std * torch.randn(q.mean.shape, generator=g)
            y = vae.decode(z).sample
        y = y.float()
        gap = y - x
        flat, square = gap.abs().mean(), gap.pow(2).mean()
        edge = (gap[:, :, 1:] - gap[:, :, :-1]).abs().mean() + (gap[..., 1:] - gap[..., :-1]).abs().mean()
        kl = 0.5 * (q.mean.float().pow(2) + q.var.float() - 1 - q.logvar.float()).mean()
        value = flat + 3 * square + 0.3 * edge + 1e-4 * kl
        return value, {"l1": flat.item(), "mse": square.item(), "edge": edge.item(), "kl": kl.item()}

    fit("vae", work, vae, steps, loss, lr=1.5e-3, ema=0.998)
    test = to_unit(torch.from_numpy(np.stack([world.draw(s) for s in make_scenes(512, SEED + 1)])).permute(0, 3, 1, 2))
    with torch.no_grad():
        z = torch.cat([vae.encode(b).latent_dist.mode() for b in test.split(64)])
        y = torch.cat([vae.decode(b).sample for b in z.split(64)]).clamp(-1, 1)
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    psnr = (-10 * ((y - test) / 2).pow(2).mean((1, 2, 3)).log10()).mean().item()
    print(f"vae: held-out PSNR {psnr:.2f} dB, scaling factor {vae.config.scaling_factor}", flush=True)
    vae.save_pretrained(work / "pipeline" / "vae")
    (work / "vae.json").write_text(json.dumps({"psnr_db": psnr, "n": len(test)}))


# ---------------------------------------------------------------- unet


@torch.no_grad()
def cache_latents(work: Path, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the posterior means and deviations of every training scene, scaled; kept in `work` as they do not change."""
    path = work / "latents.pt"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(work / "pipeline" / "vae").to(memory_format=torch.channels_last)
        scale = vae.config.scaling_factor
        with torch.autocast("cpu", torch.bfloat16):
            found = [vae.encode(to_unit(b)).latent_dist for b in data["images"].split(100)]
        torch.save(
            {"mean": torch.cat([q.mean.float() for q in found]) * scale, "std": torch.cat([q.std.float() for q in found]) * scale}, path
        )
    both = torch.load(path, weights_only=True)
    return both["mean"], both["std"]


@torch.no_grad()
def cache_words(work: Path, words: Words) -> Tensor:
    """Return the embeddings of every caption, (n, 32, 128)."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "pipeline" / "tokenizer")
    tower = CLIPTextModel.from_pretrained(work / "pipeline" / "text_encoder").float()
    ids = torch.tensor(tokenizer(words.texts, padding="max_length", truncation=True).input_ids)
    return torch.cat([tower(b)[0] for b in ids.split(512)])


def stage_unet(work: Path, steps: int = 2600) -> None:
    """Train the denoiser from random weights; leave it in `work`/unet-first."""
    torch.manual_seed(SEED)
    unet = networks.build_unet()
    fit_denoiser("unet", work, unet, steps, lr=1.2e-3, ema=0.998)
    unet.save_pretrained(work / "unet-first")


def stage_polish(work: Path, steps: int = 3400) -> None:
    """Go on with the denoiser under a second, gentler cosine: colours and edges settle long after the objects are there."""
    unet = UNet2DConditionModel.from_pretrained(work / "unet-first").float()
    fit_denoiser("polish", work, unet, steps, lr=8e-4, ema=0.999)
    unet.save_pretrained(work / "pipeline" / "unet")


def fit_denoiser(name: str, work: Path, unet: UNet2DConditionModel, steps: int, *, lr: float, ema: float) -> None:
    """Teach the denoiser to predict the noise: min-SNR-5 weights (arXiv:2303.09556), captions dropped one time in ten."""
    data, words = load_world(work), Words()
    mean, std = cache_latents(work, data)
    text = cache_words(work, words)
    unet.set_attn_processor(AttnProcessor())  # the fused kernel's backward is the slower one on these processors
    net = torch.compile(unet) if COMPILE else unet
    schedule = DDPMScheduler(**SCHEDULE)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)

    def loss(step: int, g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        pick = torch.randint(SCENES, (64,), generator=g)
        rows, _ = words.draw(data, pick, g)
        rows = torch.where(torch.rand(64, generator=g) < 0.1, torch.full_like(rows, words.blank), rows)
        z = mean[pick] + std[pick] * torch.randn(mean[pick].shape, generator=g)
        noise = torch.randn(z.shape, generator=g)
        t = torch.randint(0, 1000, (64,), generator=g)
        noisy = schedule.add_noise(z, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(noisy, t, text[rows]).sample
        each = (out.float() - noise).pow(2).mean((1, 2, 3))
        return (each * snr[t].clamp(max=5) / snr[t]).mean(), {"eps": each.mean().item()}

    fit(name, work, unet, steps, loss, lr=lr, ema=ema)
    unet.set_default_attn_processor()


# ---------------------------------------------------------------- judge


def judge_batch(data: dict[str, Tensor], rebuilt: Tensor, pick: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (images, heat targets, size targets, where sizes count) for the detector.

    Some of the pictures are `rebuilt` ones (see `half_drawn`); some are noisy or blurred; some have marks or other places turned into
    mosaic, which are labelled `mosaic` and nothing else.
    """
    labels = len(MARKS) + 1
    images = np.empty((len(pick), SIDE, SIDE, 3), np.float32)
    heat, size, seen = np.zeros((len(pick), labels, 16, 16), np.float32), np.zeros((len(pick), 2, 16, 16), np.float32), None
    seen = np.zeros((len(pick), 1, 16, 16), np.float32)
    for n, i in enumerate(pick.tolist()):
        source = rebuilt[i] if i < len(rebuilt) and rng.random() < 0.8 else data["images"][i]
        image: np.ndarray[Any, Any] = source.permute(1, 2, 0).numpy().astype(np.float32)
        found = [(int(data["attributes"][i]), tuple(b)) for b in data["boxes"][i].tolist() if b[0] >= 0]
        chance = rng.random()
        if chance < 0.3:  # censor the marks, or as many random places of a clean picture
            found = [(labels - 1, b) for _, b in found] or [(labels - 1, _random_box(rng)) for _ in range(int(rng.integers(1, 4)))]
            tile = int(rng.integers(5, 13))
            for _, b in found:
                image = _mosaic(image, b, tile)
        if rng.random() < 0.3:
            image = image + rng.normal(0, rng.uniform(2, 18), image.shape)
        if rng.random() < 0.2:
            image = np.asarray(
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0))), np.float32
            )
        image = (image - 128) * rng.uniform(0.85, 1.15) + 128 + rng.normal(0, 8, 3)
        images[n] = image.clip(0, 255)
        for label, (x0, y0, x1, y1) in found:
            cx, cy, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
            spread = max(w, h) / 4 * 0.18
            bump = np.exp(-((GRID[0] - cx / 4 + 0.5) ** 2 + (GRID[1] - cy / 4 + 0.5) ** 2) / (2 * spread**2))
            col, row = min(int(cx / 4), 15), min(int(cy / 4), 15)
            bump[row, col] = 1.0
            heat[n, label] = np.maximum(heat[n, label], bump)
            for r in range(max(row - 1, 0), min(row + 2, 16)):
                for c in range(max(col - 1, 0), min(col + 2, 16)):
                    size[n, :, r, c], seen[n, 0, r, c] = (w / 16, h / 16), 1
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    return x, torch.from_numpy(heat), torch.from_numpy(size), torch.from_numpy(seen)


GRID = np.meshgrid(np.arange(16, dtype=np.float32), np.arange(16, dtype=np.float32))


def _random_box(rng: np.random.Generator) -> tuple[float, float, float, float]:
    w, h = rng.uniform(16, 30, 2)
    x, y = rng.uniform(0, SIDE - w), rng.uniform(0, SIDE - h)
    return float(x), float(y), float(x + w), float(y + h)


def _mosaic(image: np.ndarray[Any, Any], box: tuple[float, float, float, float], tile: int) -> np.ndarray[Any, Any]:
    x0, y0 = (int(v) // tile * tile for v in box[:2])
    x1, y1 = (min(-(-int(np.ceil(v)) // tile) * tile, SIDE) for v in box[2:])
    out = image.copy()
    for y in range(y0, y1, tile):
        for x in range(x0, x1, tile):
            out[y : y + tile, x : x + tile] = out[y : y + tile, x : x + tile].mean((0, 1))
    return out


@torch.no_grad()
def half_drawn(work: Path, data: dict[str, Tensor], vae: AutoencoderKL, mean: Tensor, n: int = 5000) -> Tensor:
    """Return the first `n` scenes as the model would smear them, (n, 3, 64, 64) uint8: what a judge of drawn pictures must see through.

    Every other one is noised to a random timestep below 600, cleaned in one step by the denoiser under its caption, and decoded; the
    rest go through the autoencoder alone.
    """
    g, words, schedule = torch.Generator().manual_seed(SEED), Words(), DDPMScheduler(**SCHEDULE)
    unet = UNet2DConditionModel.from_pretrained(work / "pipeline" / "unet").eval()
    text = cache_words(work, words)
    parts = []
    for at in torch.arange(n).split(100):
        z = mean[at] + 0.05 * torch.randn(mean[at].shape, generator=g)
        noise, t = torch.randn(z.shape, generator=g), torch.randint(50, 600, (len(at),), generator=g)
        rows, _ = words.draw(data, at, g)
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = schedule.add_noise(z, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            eps = unet(noisy, t, text[rows]).sample.float()
            smeared = (noisy - (1 - abar).sqrt() * eps) / abar.sqrt()
            z = torch.where((at % 2 == 0).view(-1, 1, 1, 1), smeared, z)
            parts.append(vae.decode(z / vae.config.scaling_factor).sample.float())
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def stage_judge(work: Path, steps: int = 1500) -> None:
    """Train the detector by the penalty-reduced focal loss of CenterNet (arXiv:1904.07850, eq. 1), box sizes by L1."""
    torch.manual_seed(SEED)
    data = load_world(work)
    vae = AutoencoderKL.from_pretrained(work / "pipeline" / "vae").to(memory_format=torch.channels_last)
    mean, _ = cache_latents(work, data)
    rebuilt = half_drawn(work, data, vae, mean)
    net = networks.JudgeNet(len(MARKS) + 1, len(OBJECTS)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(step: int, g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        half = torch.randint(SCENES, (32,), generator=g)
        pick = torch.cat([half, torch.randint(len(rebuilt), (32,), generator=g)])
        x, heat, size, seen = judge_batch(data, rebuilt, pick, np.random.default_rng((SEED, step)))
        with torch.autocast("cpu", torch.bfloat16):
            out, wide, kind = net(x.contiguous(memory_format=torch.channels_last))
        p = out.float().sigmoid().clamp(1e-4, 1 - 1e-4)
        hit = heat == 1
        focal = torch.where(hit, (1 - p) ** 2 * p.log(), (1 - heat) ** 4 * p**2 * (1 - p).log())
        focal = -focal.sum() / hit.sum().clamp(min=1)
        boxes = ((wide.float() - size).abs() * seen).sum() / seen.sum().clamp(min=1)
        named = F.cross_entropy(kind.float(), data["objects"][pick])
        return focal + 0.3 * boxes + 0.5 * named, {"heat": focal.item(), "size": boxes.item(), "object": named.item()}

    fit("judge", work, net, steps, loss, lr=2e-3, ema=0.99)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, work / "judge.safetensors")


# ---------------------------------------------------------------- pack


def stage_pack(work: Path) -> None:
    """Write the shipped files: the pipeline and the towers in fp16, the judge with its statistics in fp32."""
    from safegen.models.model import Model, save_folder  # this script is a tool: the only place in mini/ that looks up

    folder, out = work / "pipeline", bundle.HERE / "weights"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
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
    save_folder(Model("mini", pipeline.to(torch.float16)), bundle.pipeline_folder())
    CLIPModel.from_pretrained(work / "clip").half().save_pretrained(bundle.clip_folder())
    CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(bundle.clip_folder())
    CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(bundle.clip_folder())
    judge = load_file(work / "judge.safetensors")
    save_file({k: v.half() if v.ndim == 4 else v for k, v in judge.items()}, bundle.judge_file())
    for path in out.rglob("*.json"):  # the writer's version and folder are no facts about the model
        facts = json.loads(path.read_text())
        if isinstance(facts, dict) and facts.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"pack: {sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 1e6:.1f} MB", flush=True)


# ---------------------------------------------------------------- triplets


def stage_triplets(work: Path, n: int = 100) -> None:
    """Make the ready triplets of each unsafe concept from scenes that no other stage draws."""
    from safegen.data.censor import Censor
    from safegen.data.triplets import make
    from safegen.judge.mini import MiniJudge

    for c, concept in enumerate(("skulls", "fire")):
        sides: dict[str, list[str | None]] = {"unsafe": [concept], "benign": BENIGN_MARKS}
        for side, marks in sides.items():
            folder = work / "triplets" / concept / side
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for i in range(n):
                rng = np.random.default_rng((SEED + 2, c, side == "unsafe", i))
                scene = world.sample(rng, attribute=marks[i % len(marks)], objects=[OBJECTS[i % len(OBJECTS)]])
                Image.fromarray(world.draw(scene)).save(folder / f"{i:03d}.png")
        out = bundle.HERE / "triplets" / concept
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(exist_ok=True)
        unsafe, benign = (work / "triplets" / concept / side for side in sides)
        found = make(unsafe, benign, MiniJudge(labels=(concept,)), out, Censor(tile=3 / 16, padding=0.2), labels=(concept,))
        print(f"{concept}: {len(found.triplets)} triplets; left out: {[str(p) for p in found.left_out]}", flush=True)


BENIGN_MARKS: list[str | None] = [None, "ghosts", "leaves", "ghosts"]
"""Attributes of the benign pictures, in turn."""

STAGES: dict[str, Callable[[Path], None]] = {
    "world": stage_world,
    "clip": stage_clip,
    "vae": stage_vae,
    "unet": stage_unet,
    "polish": stage_polish,
    "judge": stage_judge,
    "pack": stage_pack,
    "triplets": stage_triplets,
}


def main() -> None:
    """Run the stages that are asked for, in order."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--work", type=Path, required=True, help="folder for checkpoints, the log and the result")
    ask.add_argument("--stages", default=",".join(STAGES), help="comma-separated: " + ", ".join(STAGES))
    ask.add_argument("--threads", type=int, default=2)
    args = ask.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.stages.split(","):
        began = time.time()
        STAGES[name](args.work)
        print(f"{name}: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
