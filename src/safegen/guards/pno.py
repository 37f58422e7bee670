"""PNO: where a picture would be unsafe, its start is moved down the gradient of a score until it is not (after arXiv:2412.03876).

Of what the released code moves, embedding and all noises, only the start is moved here: without
noise between the steps the other noises are inert, and the prompt's embedding stays what was asked
for. Another model than the one that was optimised says whether the picture is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPModel

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.core.hashing import hash_tensors
from safegen.guards.core.adapter import ONE_FRAME, HookPoint, PipelineAdapter, copied
from safegen.guards.core.base import Guard, GuardConfig, GuardResult, Probe
from safegen.guards.judge_filter import Answer, JudgeBackedConfig, JudgeGuard, resolve_paths
from safegen.judges import Judge
from safegen.judges.clip import chances, encode_texts
from safegen.judges.vision import Pixels, find_folder, fingerprint, load_part

GROUP = 4
"""k: entries of the start that are held against each other by the regulariser."""


class PnoConfig(JudgeBackedConfig):
    """Settings of prompt-noise optimisation.

    The judge must not be made of the same weights as the score.
    """

    name: Literal["pno"] = "pno"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"start", "image"})
    exclusive: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ONE_FRAME

    weights: Path | str
    """The CLIP whose score is lowered: `mini`, a folder with tokenizer and preprocessor_config.json, or `hub:owner/name`."""
    unsafe: tuple[str, ...] = Field(min_length=1)
    """Texts that fit pictures with the concept."""
    safe: tuple[str, ...] = Field(min_length=1)
    """Texts that fit pictures without it."""
    limit: float = Field(default=0.5, gt=0, lt=1)
    """Probability of the unsafe texts that a picture must stay under."""
    restarts: int = Field(default=4, ge=0)
    """Other starts that are tried, at once, before any is moved."""
    iterations: int = Field(default=5, ge=0)
    """Steps of the optimiser; each is a picture drawn with its gradient."""
    lr: float = Field(default=0.07, gt=0)
    """Of AdamW."""
    weight: float = Field(default=1.0, gt=0)
    """gamma: weight of the score against the regulariser."""
    permutations: int = Field(default=100, ge=1)
    """Orders of the start's entries in which the regulariser looks at it, besides their own."""
    action: Answer = "black"
    """What becomes of a picture that the judge calls unsafe."""

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's words and counterpart as texts, its judge, labels and threshold."""
        return super().defaults_from(concept) | {
            "unsafe": concept.words,
            "safe": concept.counterpart,
        }

    def resolve_paths(self, folder: Path) -> GuardConfig:
        """Return the guard with its weights and its judge's files looked for in `folder`, unless they are bundled or of the hub."""
        files = resolve_paths({"weights": self.weights}, folder)
        return super().resolve_paths(folder).model_copy(update=files)

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings with the judge's id and the score's weights by their hash."""
        score = Score(self.weights, self.unsafe, self.safe)
        return super().fingerprint() | {"score_id": score.id, "score_sees": score.sees}

    def build(self, border: PipelineAdapter) -> Guard:
        """Return the guard at work.

        Raises:
            ConfigError: the judge is the model whose score is lowered.
        """
        score, judge = (
            Score(self.weights, self.unsafe, self.safe, device=str(border.pipe._execution_device)),
            self.open(),
        )
        if any(digest[:16] in judge.id for digest in (score.id, score.eyes)):
            raise ConfigError(
                f"the guard 'pno' would lower the score of the model that judges it ({judge.id}), which shows nothing; "
                "name a judge with other weights"
            )
        return PnoGuard(self, border, score, judge)


class PnoGuard(JudgeGuard):
    guard: PnoConfig

    def __init__(
        self, guard: PnoConfig, border: PipelineAdapter, score: Score, judge: Judge
    ) -> None:
        super().__init__(guard, judge, guard.action)
        self.border, self.score = border, score

    def probe(
        self, draw: Probe, prompts: Sequence[str], options: Mapping[str, Any]
    ) -> list[GuardResult]:
        own, after = self.border.starts(options, "the guard 'pno'")
        out: list[GuardResult] = []
        for i, prompt in enumerate(prompts):
            away = options.get("negative_prompt")
            away = away[i] if isinstance(away, list) else away

            def chance(
                x: Tensor,
                *,
                grad: bool,
                prompt: str = prompt,
                away: str | None = away,
                own: torch.Generator = after[i],
            ) -> Tensor:
                changed: dict[str, Any] = {"latents": x, "output_type": "latent"}
                changed |= {
                    "generator": [copied(own) for _ in x],
                    "negative_prompt": None if away is None else [away] * len(x),
                }
                latents = torch.stack([*draw([prompt] * len(x), changed, grad=grad)])
                return self.score(decoded(self.border.pipe, latents))

            out.append(self._found(chance, own[i], after[i]))
        return out

    def _found(
        self, chance: Callable[..., Tensor], own: Tensor, generator: torch.Generator
    ) -> GuardResult:
        guard = self.guard
        device = self.border.pipe._execution_device
        with torch.no_grad():
            first = chance(own[None].to(device), grad=False)[0]
        scores, limits = (
            {"first": float(first), "last": float(first), "iterations": 0.0},
            {"chance": guard.limit},
        )
        if first < guard.limit:
            return GuardResult("none", "", scores, limits)
        rng = torch.Generator(generator.device).manual_seed(generator.initial_seed() ^ 0x5AFE)
        more = torch.randn((guard.restarts, *own.shape), generator=rng, device=rng.device).to(own)
        with torch.no_grad():
            found = (
                [first[None], chance(more.to(device), grad=False)]
                if guard.restarts
                else [first[None]]
            )
        every, starts = torch.cat(found), torch.cat([own[None], more]).to(device)
        best, x = int(every.argmin()), starts[int(every.argmin())]
        value = float(every[best])
        if value >= guard.limit:
            x, value, scores["iterations"] = self._moved(chance, x, value, rng)
        scores["last"] = value
        if not value < guard.limit:  # NaN too
            return GuardResult("block", "never-safe", scores, limits)
        return GuardResult("edit", "moved", scores, limits, start=x.detach())

    def _moved(
        self, chance: Callable[..., Tensor], start: Tensor, value: float, rng: torch.Generator
    ) -> tuple[Tensor, float, float]:
        """Return the best start that was found, its chance, and in how many steps."""
        guard, best, least = self.guard, start, value
        with torch.enable_grad():
            x = start.clone()[None].float().requires_grad_()
            optimiser = torch.optim.AdamW([x], lr=guard.lr)
            orders = torch.stack(
                [
                    torch.randperm(x.numel(), generator=rng, device=rng.device)
                    for _ in range(guard.permutations)
                ]
            ).to(x.device)
            for step in range(1, guard.iterations + 1):
                p = chance(x.to(start), grad=True)[0]
                if step > 1 and float(p.detach()) < least:
                    best, least = x[0].detach().clone(), float(p.detach())
                if least < guard.limit:
                    return best, least, float(step - 1)
                loss = guard.weight * 5 * p + regulariser(x.flatten(), orders)
                (x.grad,) = torch.autograd.grad(
                    loss, x
                )  # of nothing else: weights may want gradients, and keep none of these
                optimiser.step()
        with torch.no_grad():
            last = float(chance(x.detach().to(start), grad=False)[0]) if guard.iterations else least
        return (
            (x[0].detach(), last, float(guard.iterations))
            if last < least
            else (best, least, float(guard.iterations))
        )


class Score:
    """The probability of the unsafe texts for pictures as tensors, with a gradient: CLIP, asked as Q16 and zero-shot judges ask it."""

    def __init__(
        self,
        weights: Path | str,
        unsafe: Sequence[str],
        safe: Sequence[str],
        *,
        device: str = "cpu",
    ) -> None:
        """Load the towers and encode the texts.

        Raises:
            UserError: the folder cannot be used.
        """
        folder = find_folder(
            "clip", weights, option="weights", example="hub:openai/clip-vit-large-patch14"
        )
        self.clip = load_part(CLIPModel, folder, device=device)
        state = self.clip.state_dict()
        self.id, self.unsafe = hash_tensors(state), len(unsafe)
        self.eyes = hash_tensors(
            {
                k: v
                for k, v in state.items()
                if k.startswith(("vision_model.", "visual_projection."))
            }
        )
        """Hash of what sees: judges that have no use for the text tower go by it."""
        self.side = int(self.clip.config.vision_config.image_size)
        facts = Pixels(folder, self.side).facts
        self.sees = fingerprint([self.side, facts["image_mean"], facts["image_std"]])
        """Hash of what decides a score besides the weights."""
        self.mean, self.std = (
            torch.tensor(facts[key], device=device).view(3, 1, 1)
            for key in ("image_mean", "image_std")
        )
        self.texts = encode_texts(self.clip, folder, [*unsafe, *safe])

    def __call__(self, images: Tensor) -> Tensor:
        """Return a probability a picture, (b,), from pictures (b, 3, h, w) in [0, 1]."""
        small = F.interpolate(
            images.float(),
            size=(self.side, self.side),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        )
        seen = self.clip.visual_projection(
            self.clip.vision_model(pixel_values=(small - self.mean) / self.std).pooler_output
        )
        return chances(seen, self.texts, scale=float(self.clip.logit_scale.exp()))[
            :, : self.unsafe
        ].sum(dim=1)


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Return the pictures of latents, (b, 3, h, w) in [0, 1], with a gradient."""
    vae = pipe.vae
    mean, std = (getattr(vae.config, f"latents_{key}", None) for key in ("mean", "std"))
    if mean is not None and std is not None:  # of each channel, as some of SDXL's have them
        mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, std))
        latents = latents * std + mean * vae.config.scaling_factor
    out: Tensor = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return (out.float() / 2 + 0.5).clamp(0, 1)


def regulariser(x: Tensor, orders: Tensor) -> Tensor:
    """Return how unlike noise a start is, in nats, >= 2 ln 2; low means that it could have been drawn.

    -(l1 + l2) for x in its own order, plus the mean of it over other orders, where x is cut into m
    rows Z of k = 4, l1 = min(-m |mean Z|^2 / (2k), -ln 2), l2 = min(-(m/2) max(sqrt(1 + |Z^T Z / m
    - I|) - 1 - sqrt(k/m), 0)^2, -ln 2), |.| spectral (concentration of noise; Peng et al. 2024,
    arXiv:2412.03876, as released, all orders at once).

    Args:
        x: the start's entries, (n,), n a multiple of 4.
        orders: permutations of them, (p, n).
    """
    z = torch.cat([x[None], x[orders]]).unflatten(1, (-1, GROUP))  # (1 + p, m, k)
    m = z.shape[1]
    low = torch.full((len(z),), -math.log(2)).to(x)
    l1 = torch.minimum(-m * z.mean(dim=1).square().sum(dim=1) / (2 * GROUP), low)
    spread = torch.linalg.eigvalsh(z.mT @ z / m - torch.eye(GROUP).to(x)).abs().amax(dim=1)
    l2 = torch.minimum(
        -(m / 2) * ((1 + spread).sqrt() - 1 - math.sqrt(GROUP / m)).clamp(min=0).square(), low
    )
    both = -(l1 + l2)
    return both[0] + both[1:].mean()
