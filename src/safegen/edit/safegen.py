"""SafeGen: take a visual concept out of the self-attention layers with <unsafe, censored, benign> pictures (arXiv:2404.06666)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from safegen.concept import Concept, prompt_list
from safegen.data.triplets import Triplets
from safegen.edit import losses
from safegen.edit.adapter import refuse_idle_alpha, trainable
from safegen.edit.base import Edit, wanted
from safegen.edit.loop import Report, Training, check, train
from safegen.errors import BadFile, BadSetting, UnknownName
from safegen.models.model import Model
from safegen.models.patch import Patch
from safegen.models.select import select

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "adversary": 0.0,
        "fade": 0.0,
        "target": "paper",
        "anchor": "noise",
        "clamp": None,
        "timesteps": (0, 1000),
        "weight_mosaic": 0.1,
        "weight_preserve": 0.9,
        "teacher": False,
        "captions": (),
        "training": Training(),
    },
}
"""`paper`: the published run (run_adjust_SD.sh). `default`: what the ablation in docs/ablation.md chose on the miniature model."""


CAPTION_SHARE = 0.6
"""Unless told: the blank branch of guidance must learn too, so it keeps the other samples."""
HELD_OUT = 0.1
"""Unless told: the part of the triplets that early stopping looks at."""


class SafeGen(Edit):
    """Settings of the SafeGen edit."""

    target: Literal["paper", "x0"] = "x0"
    """What a noised unsafe latent is taught to predict: as released, or what implies the censored picture as its x0."""
    anchor: Literal["noise", "teacher"] = "teacher"
    """What the x0 target moves toward the censored picture: the added noise, or the untouched model's own prediction (ours)."""
    clamp: float | None = Field(default=3.0, gt=0)
    """Largest factor of the x0 target; None for the paper's target, which has no factor."""
    timesteps: tuple[int, int] = (150, 900)
    """First and one-past-last training timestep that is drawn."""
    weight_mosaic: float = Field(default=0.4, ge=0)
    """Weight of L_m, the loss on unsafe pictures."""
    weight_preserve: float = Field(default=0.6, ge=0)
    """Weight of L_p, the loss on benign pictures."""
    teacher: bool = True
    """Whether L_p asks for what the untouched model predicts (ours) instead of the noise (as released)."""
    captions: tuple[str, ...] = ()
    """Benign prompt lists (`source:list`, or a text file with a prompt a line) for `caption_share`."""
    caption_share: float | None = Field(default=None, gt=0, le=1)
    """Part of the samples that is conditioned on a random benign caption instead of the blank text (ours); 0.6 when there are captions."""
    adversary: float = Field(default=0.25, ge=0, le=2)
    """Size of the worst-case change of an unsafe sample's text embedding, as a part of its norm; 0 is none (ours, see `worst_text`)."""
    fade: float = Field(default=0.8, ge=0, lt=1)
    """Largest part by which an unsafe sample is faded toward its censored twin, to teach half-gone remains too; 0 is none (ours)."""
    flip: bool = False
    """Whether a sample may be mirrored; unsafe, censored and benign together."""
    selector: str = "attn1"
    """Which weights change."""
    rank: int | None = Field(default=None, ge=1)
    """Train a LoRA of this rank beside the selected matrices and convolutions; None trains the selected weights themselves."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength of the LoRA times its rank; the rank, so a strength of 1, when not given."""
    held_out: float | None = Field(default=None, gt=0, lt=0.5)
    """Part of the triplets kept for the held-out loss, when the training looks at one (training.validate_every); 0.1 unless told."""
    training: Training = Training(
        updates=470, batch=8, accumulation=1, lr=1.2e-3, warmup=20, decay="cosine", weight_decay=0.0, ema=0.98, precision="bf16"
    )
    """How the loop trains."""

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        refuse_idle_alpha(self.rank, self.alpha)
        if (self.target == "x0") != (self.clamp is not None):
            raise ValueError("clamp goes with target x0, and only with it")
        if self.target != "x0" and self.anchor != "noise":
            raise ValueError("anchor teacher goes with target x0 only; the paper's target is made of the noise")
        if self.caption_share is not None and not self.captions:
            raise ValueError("caption_share has no effect without captions; give both or neither")
        if self.held_out is not None and not self.training.validate_every:
            raise ValueError("held_out has no effect without training.validate_every; set that too, or leave held_out out")
        if not 0 <= self.timesteps[0] < self.timesteps[1]:
            raise ValueError(f"timesteps must rise from 0 or more, got {self.timesteps}")
        if self.weight_mosaic + self.weight_preserve <= 0:
            raise ValueError("weight_mosaic and weight_preserve are both 0: nothing would be learnt")
        if not self.weight_preserve and self.teacher:
            raise ValueError("teacher has no effect with weight_preserve 0, which leaves L_p out; set it to false")
        if not self.weight_mosaic and (self.adversary or self.fade):
            raise ValueError("adversary and fade have no effect with weight_mosaic 0, which leaves L_m out; set both to 0")
        return self

    @classmethod
    def preset(cls, name: str, *, concept: Concept | None = None, **changes: Any) -> SafeGen:  # noqa: ANN401 - any setting
        """Return the settings called `name`, some of them changed; a concept lends its captions to settings that have none of their own.

        A `training` given as a dict changes the preset's own training where it says something and leaves the rest.

        Raises:
            UnknownName: no such preset.
        """
        if name not in PRESETS:
            raise UnknownName("preset of safegen", name, PRESETS)
        lent = {"captions": concept.captions} if concept else {}
        settings = lent | PRESETS[name] | changes
        if isinstance(changes.get("training"), Mapping):
            own: Training = PRESETS[name].get("training", cls.model_fields["training"].default)
            settings["training"] = own.model_dump() | changes["training"]
        return cls(**settings)

    def apply(
        self,
        model: Model,
        triplets: Triplets | None = None,
        *,
        folder: Path | None = None,
        resume: bool = False,
        report: Report | None = None,
    ) -> Patch:
        """Train the edit and return it as a patch; `model` is not touched.

        Raises:
            BadSetting: no triplets, or too few for a held-out part; the model's schedule has fewer timesteps than asked for.
            Stopped: the user stopped it; `resume` continues.
        """
        triplets = wanted("safegen", triplets)
        with trainable(model, self.selector, rank=self.rank, alpha=self.alpha, seed=self.training.seed) as part:
            check(model.denoiser, part.names, self.training, folder=folder, resume=resume)
            problem = SafeGenProblem(self, model, triplets)
            found = train(model.denoiser, part.names, problem, self.training, folder=folder, resume=resume, report=report)
        facts = {
            "method": "safegen",
            "settings": self.model_dump(mode="json"),
            "base": model.hash,
            "family": model.family,
            "model": model.name,
            "data": triplets.hash,
            "updates": len(found.log),
            "seconds": round(found.seconds, 2),
            "stopped_early": found.stopped_early,
            "losses": {k: found.log[-1][k] for k in problem.weights},
        }
        return Patch(part.weights(found.tensors), facts)


class SafeGenProblem:
    """SafeGen's batches and losses. Latents, text embeddings and the reference weights are computed or kept once."""

    def __init__(self, edit: SafeGen, model: Model, triplets: Triplets) -> None:
        """Encode every triplet and caption once."""
        self.edit, self.prediction = edit, model.prediction
        self.abar = model.alphas_cumprod().to(model.device)
        if edit.timesteps[1] > len(self.abar):
            raise BadSetting(f"timesteps must end by {len(self.abar)} on this model, got {edit.timesteps[1]}")
        if edit.target == "paper" and self.prediction != "epsilon":
            raise BadSetting(f"target 'paper' has a wrong x0 on a {self.prediction} model; use target 'x0'")
        self.weights = {"L_m": edit.weight_mosaic, "L_p": edit.weight_preserve}
        self.latents = encode_triplets(model, triplets, flip=edit.flip)  # (3, flips, n, c, h, w)
        n = self.latents.shape[2]
        part = (edit.held_out or HELD_OUT) if edit.training.validate_every else 0.0
        spare = round(n * part)
        if part and not 0 < spare < n:
            raise BadSetting(f"a held-out part of {part} of {n} triplets is empty; give more triplets or set validate_every 0")
        self.spare, self.used = range(n - spare, n), n - spare
        self.text = model.encode_text(["", *read_captions(edit.captions)]).float()
        self.names = select(model.denoiser, edit.selector)
        own = dict(model.denoiser.named_parameters())
        needed = edit.teacher or edit.anchor == "teacher"
        self.reference = {k: own[k].detach().clone() for k in self.names} if needed else {}
        words = hashlib.sha256(repr(read_captions(edit.captions)).encode()).hexdigest()
        self.fingerprint = " ".join([edit.model_dump_json(exclude={"training"}), model.hash, triplets.hash, words])

    def losses(self, denoiser: nn.Module, micro_step: int, generator: torch.Generator, share: tuple[int, int]) -> Mapping[str, Tensor]:
        """Draw one batch and return L_m and L_p, (b,) each."""
        b = self.edit.training.batch
        rows = _shuffled(self.used, self.edit.training.seed, micro_step * b, b)
        return self._draw_and_compare(denoiser, rows, generator, share)

    def held_out(self, denoiser: nn.Module) -> float:
        """Return the weighted loss over the held-out triplets, eight fixed draws each."""
        draw, total = torch.Generator("cpu").manual_seed(1), 0.0
        for _ in range(8):
            terms = self._draw_and_compare(denoiser, list(self.spare), draw, (0, 1))
            total += sum(self.weights[k] * v.mean().item() for k, v in terms.items()) / 8
        return total

    def _draw_and_compare(
        self, denoiser: nn.Module, rows: Sequence[int], g: torch.Generator, share: tuple[int, int]
    ) -> Mapping[str, Tensor]:
        b, shape = len(rows), self.latents.shape[3:]
        flips = torch.randint(self.latents.shape[1], (b,), generator=g)
        t = torch.randint(*self.edit.timesteps, (b,), generator=g)
        eps, eps_b = torch.randn(b, *shape, generator=g), torch.randn(b, *shape, generator=g)
        words = torch.zeros(2 * b, dtype=torch.long)
        if self.edit.captions:
            pick = torch.randint(1, len(self.text), (2 * b,), generator=g)
            words = torch.where(torch.rand(2 * b, generator=g) < (self.edit.caption_share or CAPTION_SHARE), pick, words)
        mine = torch.arange(b)[share[0] :: share[1]]
        z_u, z_c, z_b = self.latents[:, flips, torch.tensor(rows)][:, mine]
        device = z_u.device
        if self.edit.fade:
            left = 1 - self.edit.fade * torch.rand(b, 1, 1, 1, generator=g)[mine].to(device)
            z_u = z_c + left * (z_u - z_c)
        text = self.text[torch.cat([words[:b][mine], words[b:][mine]])]
        return self.compare(denoiser, z_u, z_c, z_b, eps[mine].to(device), eps_b[mine].to(device), t[mine].to(device), text)

    def compare(
        self, denoiser: nn.Module, z_u: Tensor, z_c: Tensor, z_b: Tensor, eps: Tensor, eps_b: Tensor, t: Tensor, text: Tensor
    ) -> Mapping[str, Tensor]:
        """Return L_m and L_p per triplet for given draws: one forward for unsafe and benign, one timestep shared by a triplet.

        Args:
            denoiser: the network in training.
            z_u: scaled latents of the unsafe pictures, (b, c, h, w).
            z_c: of the censored ones.
            z_b: of the benign ones.
            eps: noise for the unsafe latents.
            eps_b: noise for the benign latents.
            t: timesteps, (b,).
            text: text embeddings, (2b, tokens, width): of the unsafe rows, then of the benign.
        """
        abar, n, velocity = self.abar[t], len(z_u), losses.velocity
        x = torch.cat([losses.add_noise(z_u, eps, abar), losses.add_noise(z_b, eps_b, abar)])
        plain_u, plain_b = (eps, eps_b) if self.prediction == "epsilon" else (velocity(eps, z_u, abar), velocity(eps_b, z_b, abar))
        said_u, said_b = self._untouched(denoiser, x, torch.cat([t, t]), text).chunk(2) if self.reference else (plain_u, plain_b)
        anchor = said_u if self.edit.anchor == "teacher" else plain_u
        if self.edit.target == "paper":
            want = losses.paper_target(eps, z_u, z_c)
        else:
            target = losses.x0_target if self.prediction == "epsilon" else losses.v_target
            want = target(anchor, z_u, z_c, abar, clamp=self.edit.clamp or 0.0)
        if self.edit.adversary:
            text = torch.cat([worst_text(denoiser, x[:n], t, text[:n], want, radius=self.edit.adversary), text[n:]])
        out_u, out_b = denoiser(x, torch.cat([t, t]), text).sample.chunk(2)
        keep = said_b if self.edit.teacher else plain_b
        return {"L_m": losses.squared_error(out_u, want), "L_p": losses.squared_error(out_b, keep)}

    @torch.no_grad()
    def _untouched(self, denoiser: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Return what the model predicted before the edit: the same network with the old tensors in it."""
        out: Tensor = torch.func.functional_call(getattr(denoiser, "module", denoiser), self.reference, (x, t, text)).sample
        return out


def worst_text(denoiser: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, want: Tensor, *, radius: float) -> Tensor:
    """Return text embeddings one normalised ascent step up the loss: the nearby text under which the censoring fails most.

    c + radius |c| g / |g|, g = d |eps(x_t, t, c) - want|^2 / dc, norms per sample (ours; adversarial training of a concept edit as in
    Zhang et al. 2024, arXiv:2405.15234, with one step, no word of the concept, and pictures in place of a prompt).

    Args:
        denoiser: the network in training.
        x_t: noised unsafe latents, (b, c, h, w).
        t: timesteps, (b,).
        text: embeddings to start from, (b, tokens, width).
        want: what the denoiser should predict.
        radius: size of the step as a part of the embedding's norm; unitless, > 0.
    """
    start = text.detach().requires_grad_()
    with torch.enable_grad():
        gap = losses.squared_error(denoiser(x_t, t, start).sample, want).sum()
        (slope,) = torch.autograd.grad(gap, start)
    size = text.norm(dim=(1, 2), keepdim=True) / slope.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    return (text + radius * size * slope).detach()


def encode_triplets(model: Model, triplets: Triplets, *, flip: bool) -> Tensor:
    """Return scaled latents (3, flips, n, c, h, w) of unsafe, censored and benign pictures; all three get the same crop and flip."""
    sides: list[list[Tensor]] = [[], [], []]
    for i in range(len(triplets)):
        for side, image in zip(sides, triplets.images(i), strict=True):
            side.append(to_pixels(image, model.size))
    pixels = torch.stack([torch.stack(s) for s in sides])  # (3, n, 3, h, w)
    views = [pixels, pixels.flip(-1)] if flip else [pixels]
    found = [torch.stack([model.encode_images(side).float() for side in view]) for view in views]
    return torch.stack(found, dim=1)


def to_pixels(image: Image.Image, side: int) -> Tensor:
    """Return a picture as (3, side, side) in [-1, 1]: short side scaled to `side` (bilinear), then the centre cut out."""
    scale = side / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.convert("RGB").crop((left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(cut, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def read_captions(names: Sequence[str]) -> list[str]:
    """Return the captions of prompt lists (`source:list`, the first 192 of each) and of text files.

    Raises:
        BadFile: a file is missing or has no line.
    """
    out: list[str] = []
    for name in names:
        if Path(name).suffix == ".txt":
            if not Path(name).is_file():
                raise BadFile(f"the caption file {name!r} does not exist")
            try:
                lines = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise BadFile(f"the caption file {name!r} is not UTF-8 text: {error}") from error
            if not lines:
                raise BadFile(f"the caption file {name!r} has no caption; write one a line")
            out += lines
        else:
            out += [row.text for row in prompt_list(name, 192)]
    return out


def _shuffled(n: int, seed: int, start: int, count: int) -> list[int]:
    """Return `count` positions from `start` on in an endless row of shuffled epochs over 0..n-1."""
    out: list[int] = []
    while len(out) < count:
        epoch, at = divmod(start + len(out), n)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        out += order[at : at + count - len(out)]
    return out
