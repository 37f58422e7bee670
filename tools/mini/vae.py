"""Training of the autoencoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tools.mini.drawing import draw
from tools.mini.fit import SEED, autocast, fit
from tools.mini.networks import build_vae
from tools.mini.scenes import load_scenes, make_scenes, to_unit


def train_vae(work: Path, *, steps: int = 4600, test_scenes: int = 512) -> None:
    """Train the autoencoder by L1 + squared error + edges + a small KL, on crops first.

    Its PSNR on `test_scenes` held-out scenes goes to vae.json.
    """
    torch.manual_seed(SEED)
    vae = build_vae().to(memory_format=torch.channels_last)
    images = load_scenes(work)["images"]

    def loss(step: int, g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        whole = step >= steps * 0.6
        pick = torch.randint(len(images), (10 if whole else 24,), generator=g)
        x = to_unit(images[pick])
        if not whole:
            i, j = torch.randint(0, 33, (2,), generator=g).tolist()
            x = x[:, :, i : i + 32, j : j + 32]
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast():
            q = vae.encode(x).latent_dist
            z = q.mean + q.std * torch.randn(q.mean.shape, generator=g)
            y = vae.decode(z).sample
        y = y.float()
        gap = y - x
        flat, square = gap.abs().mean(), gap.pow(2).mean()
        edge = (gap[:, :, 1:] - gap[:, :, :-1]).abs().mean() + (
            gap[..., 1:] - gap[..., :-1]
        ).abs().mean()
        kl = 0.5 * (q.mean.float().pow(2) + q.var.float() - 1 - q.logvar.float()).mean()
        value = flat + 3 * square + 0.3 * edge + 1e-4 * kl
        return value, {
            "l1": flat.item(),
            "mse": square.item(),
            "edge": edge.item(),
            "kl": kl.item(),
        }

    fit("vae", work, vae, steps, loss, lr=1.5e-3, ema=0.998)
    test = to_unit(
        torch.from_numpy(np.stack([draw(s) for s in make_scenes(test_scenes, SEED + 1)])).permute(
            0, 3, 1, 2
        )
    )
    with torch.no_grad():
        z = torch.cat([vae.encode(b).latent_dist.mode() for b in test.split(64)])
        y = torch.cat([vae.decode(b).sample for b in z.split(64)]).clamp(-1, 1)
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    psnr = (-10 * ((y - test) / 2).pow(2).mean((1, 2, 3)).log10()).mean().item()
    print(
        f"vae: held-out PSNR {psnr:.2f} dB, scaling factor {vae.config.scaling_factor}", flush=True
    )
    vae.save_pretrained(work / "pipeline" / "vae")
    (work / "vae.json").write_text(json.dumps({"psnr_db": psnr, "n": len(test)}))
