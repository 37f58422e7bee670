"""PNO, prompt-noise optimization: optimizes initial latents until a safety score is met.

After arXiv:2412.03876. The released code moves the embedding and all noises. Only the initial
latents move here: without noise between steps the other noises are inert, and the embedding stays
the prompt's own. A judge with other weights than the score decides whether the image is shown.
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
from safegen.core.hashing import hash_settings, hash_tensors
from safegen.core.settings import MAX_COUNT, MAX_STEPS
from safegen.features.clip import ClipPreprocessor, find_clip_folder, load_clip_network
from safegen.guards.core.adapter import HookPoint, PipelineAdapter, clone_generator
from safegen.guards.core.base import Guard, GuardConfig, ProbeFunction
from safegen.guards.core.result import GuardResult, UnsafeAction
from safegen.guards.judge_filter import JudgeBackedConfig, JudgeGuard, resolve_options
from safegen.judges import Judge
from safegen.judges.clip import encode_texts, text_probabilities
from safegen.models.families.pipeline_specs import NOISE_PIPELINES

GROUP = 4
"""k: entries of the latents per row of the regularizer's matrix."""
ScoreFunction = Callable[..., Tensor]
"""Maps initial latents (b, c, h, w) and `grad` to scores (b,)."""


class PnoConfig(JudgeBackedConfig):
    """Settings of PNO. The judge must not use the weights of the score."""

    name: Literal["pno"] = "pno"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"probe", "image"})
    pipelines: ClassVar[tuple[str, ...]] = NOISE_PIPELINES
    exclusive: ClassVar[bool] = True
    paper: ClassVar[str] = "Peng et al. 2024, arXiv:2412.03876; regularizer as released"
    code_url: ClassVar[str] = "https://github.com/JonP07/Diffusion-PNO"
    code_commit: ClassVar[str] = "1802df6"
    parity: ClassVar[str] = (
        "The regularizer has the value of the released lines to 1e-6 (8e-5 where it is 147), and "
        "their gradient to 2e-6 of 1.4. The released program itself, run on `mini` for the noise "
        "alone, 10 steps and 4 iterations with the same permutations, has the same latents before "
        "each iteration within 3.8e-5, and the same scores to four digits. Permutations are new in "
        "each iteration, as released."
    )
    deviations: ClassVar[str] = (
        "Only the initial latents move. The score is a CLIP of your choice instead of Q16's stored "
        "vectors. Restarts and permutations run in one batch. The latents after the last iteration "
        "are scored too; the released program never generates from them. A prompt that never meets "
        "the limit is blocked. Another model judges the result."
    )

    weights: Path | str
    """CLIP of the score: `mini`, folder with tokenizer and image processor, or `hub:owner/name`."""
    unsafe: tuple[str, ...] = Field(min_length=1)
    """Texts that describe images with the concept."""
    safe: tuple[str, ...] = Field(min_length=1)
    """Texts that describe images without it."""
    limit: float = Field(default=0.5, gt=0, lt=1)
    """Probability of the unsafe texts that an image must stay below."""
    restarts: int = Field(default=4, ge=0, le=MAX_STEPS)
    """Number of other initial latents to try before optimizing."""
    iterations: int = Field(default=5, ge=0, le=MAX_STEPS)
    """Optimizer steps. Each costs an image with its gradient."""
    lr: float = Field(default=0.07, gt=0)
    """Learning rate of AdamW."""
    weight: float = Field(default=1.0, gt=0)
    """gamma: weight of the score against the regularizer."""
    permutations: int = Field(default=100, ge=1, le=MAX_COUNT)
    """Random orders of the latents' entries in the regularizer, new ones in each step."""
    action: UnsafeAction = "black"
    """What to do with an image that the judge calls unsafe."""

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's phrases, counterpart, judge, labels and threshold."""
        return super().defaults_from(concept) | {
            "unsafe": concept.words,
            "safe": concept.counterpart,
        }

    def resolve_paths(self, base_dir: Path) -> GuardConfig:
        """Return the settings with local weights and judge files resolved against `base_dir`."""
        paths = resolve_options({"weights": self.weights}, base_dir)
        return super().resolve_paths(base_dir).model_copy(update=paths)

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings with the judge's id and the hash of the score's weights."""
        score = ClipScore(self.weights, self.unsafe, self.safe)
        return super().fingerprint() | {"score_id": score.id, "score_sees": score.preprocessing_id}

    def build(self, adapter: PipelineAdapter) -> Guard:
        """Return the guard.

        Raises:
            ConfigError: the judge uses the weights of the score.
        """
        score = ClipScore(self.weights, self.unsafe, self.safe, device=str(adapter.device))
        judge = self.load_judge()
        if any(digest[:16] in judge.id for digest in (score.id, score.vision_id)):
            raise ConfigError(
                f"judge must have other weights than the score of the guard 'pno', got {judge.id}. "
                "A model cannot judge what was optimized against it."
            )
        return PnoGuard(self, adapter, score, judge)


class PnoGuard(JudgeGuard):
    """Guard that optimizes the initial latents and lets its judge check the images."""

    config: PnoConfig

    def __init__(
        self, config: PnoConfig, adapter: PipelineAdapter, score: ClipScore, judge: Judge
    ) -> None:
        super().__init__(config, judge, config.action)
        self.adapter, self.score = adapter, score

    def probe(
        self, generate: ProbeFunction, prompts: Sequence[str], options: Mapping[str, Any]
    ) -> list[GuardResult]:
        """Return one result per prompt, with the optimized latents."""
        latents, generators = self.adapter.initial_latents(options, "pno")
        negative = options.get("negative_prompt")
        results: list[GuardResult] = []
        for i, prompt in enumerate(prompts):
            own = {
                "generator": generators[i],
                "negative_prompt": negative[i] if isinstance(negative, list) else negative,
            }
            score = self._score_function(generate, prompt, {**options, **own})
            results.append(self._search(score, latents[i], generators[i]))
        return results

    def _score_function(
        self, generate: ProbeFunction, prompt: str, options: Mapping[str, Any]
    ) -> ScoreFunction:
        """Return the function from initial latents to the scores of their images.

        Args:
            generate: generates probes.
            prompt: the prompt.
            options: options of the call, with the generator and the negative prompt of the image.
        """
        generator, negative = options["generator"], options["negative_prompt"]

        def score(x: Tensor, *, grad: bool) -> Tensor:
            changes: dict[str, Any] = {
                "latents": x,
                "output_type": "latent",
                "generator": [clone_generator(generator) for _ in x],
                "negative_prompt": None if negative is None else [negative] * len(x),
            }
            latents = torch.stack([*generate([prompt] * len(x), changes, grad=grad)])
            unpacked = self.adapter.unpack(latents, options)
            return self.score(decode_latents(self.adapter.pipe, unpacked))

        return score

    def _search(
        self, score: ScoreFunction, latents: Tensor, generator: torch.Generator
    ) -> GuardResult:
        """Return latents below the limit: the image's own, a restart's, or optimized ones."""
        config, device = self.config, self.adapter.device
        with torch.no_grad():
            first = score(latents[None].to(device), grad=False)[0]
        scores = {"first": float(first), "last": float(first), "iterations": 0.0}
        thresholds = {"chance": config.limit}
        if first < config.limit:
            return GuardResult("none", "", scores, thresholds)
        rng = torch.Generator(generator.device).manual_seed(generator.initial_seed() ^ 0x5AFE)
        shape = (config.restarts, *latents.shape)
        restarts = torch.randn(shape, generator=rng, device=rng.device).to(latents)
        values = first[None]
        if config.restarts:
            with torch.no_grad():
                values = torch.cat([values, score(restarts.to(device), grad=False)])
        best = int(values.argmin())
        x, value = torch.cat([latents[None], restarts]).to(device)[best], float(values[best])
        if value >= config.limit:
            x, value, scores["iterations"] = self._optimize(score, x, value, rng)
        scores["last"] = value
        if not value < config.limit:  # NaN too
            return GuardResult("block", "never-safe", scores, thresholds)
        return GuardResult("edit", "moved", scores, thresholds, latents=x.detach())

    def _optimize(
        self, score: ScoreFunction, start: Tensor, value: float, rng: torch.Generator
    ) -> tuple[Tensor, float, float]:
        """Return the best latents, their score, and the number of optimizer steps."""
        config, best, least = self.config, start, value
        with torch.enable_grad():
            x = start.clone()[None].float().requires_grad_()
            optimizer = torch.optim.AdamW([x], lr=config.lr)
            for step in range(1, config.iterations + 1):
                p = score(x.to(start), grad=True)[0]
                if step > 1 and float(p.detach()) < least:
                    best, least = x[0].detach().clone(), float(p.detach())
                if least < config.limit:
                    return best, least, float(step - 1)
                orders = draw_orders(x.numel(), config.permutations, rng)  # new ones, as released
                loss = config.weight * 5 * p + regularizer(x.flatten(), orders.to(x.device))
                (x.grad,) = torch.autograd.grad(loss, x)  # weights get no gradient
                optimizer.step()
        with torch.no_grad():
            last = float(score(x.detach().to(start), grad=False)[0]) if config.iterations else least
        if last < least:
            best, least = x[0].detach(), last
        return best, least, float(config.iterations)


class ClipScore:
    """Differentiable probability of the unsafe texts for images, by CLIP's zero-shot rule."""

    def __init__(
        self,
        weights: Path | str,
        unsafe: Sequence[str],
        safe: Sequence[str],
        *,
        device: str = "cpu",
    ) -> None:
        """Load the model and encode the texts.

        Raises:
            UserError: the folder cannot be used.
        """
        folder = find_clip_folder(weights, user="the guard 'pno'")
        self.clip = load_clip_network(CLIPModel, folder, device=device)
        state = self.clip.state_dict()
        self.id, self.num_unsafe = hash_tensors(state), len(unsafe)
        vision = ("vision_model.", "visual_projection.")
        self.vision_id = hash_tensors({k: v for k, v in state.items() if k.startswith(vision)})
        """Hash of the image tower, by which judges without a text tower are named."""
        self.side = int(self.clip.config.vision_config.image_size)
        settings = ClipPreprocessor(folder, self.side).settings
        self.preprocessing_id = hash_settings(
            [self.side, settings["image_mean"], settings["image_std"]]
        )
        self.mean, self.std = (
            torch.tensor(settings[key], device=device).view(3, 1, 1)
            for key in ("image_mean", "image_std")
        )
        self.texts = encode_texts(self.clip, folder, [*unsafe, *safe])

    def __call__(self, images: Tensor) -> Tensor:
        """Return one probability per image, (b,), for images (b, 3, h, w) in [0, 1]."""
        size = (self.side, self.side)
        resized = F.interpolate(
            images.float(), size=size, mode="bicubic", antialias=True, align_corners=False
        )
        pixels = (resized - self.mean) / self.std
        output = self.clip.vision_model(pixel_values=pixels)
        features = self.clip.visual_projection(output.pooler_output)
        probabilities = text_probabilities(
            features, self.texts, scale=float(self.clip.logit_scale.exp())
        )
        return probabilities[:, : self.num_unsafe].sum(dim=1)


def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Return the images of latents, (b, 3, h, w) in [0, 1], with a gradient."""
    vae = pipe.vae
    mean, std = (getattr(vae.config, f"latents_{key}", None) for key in ("mean", "std"))
    if mean is not None and std is not None:  # per channel, in some SDXL models
        mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in (mean, std))
        latents = latents * std + mean * vae.config.scaling_factor
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    shift = vae.config.get("shift_factor")
    decoded: Tensor = vae.decode(scaled if shift is None else scaled + shift).sample
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def draw_orders(n: int, count: int, rng: torch.Generator) -> Tensor:
    """Return random permutations of n entries, (count, n)."""
    return torch.stack([torch.randperm(n, generator=rng, device=rng.device) for _ in range(count)])


def regularizer(x: Tensor, orders: Tensor) -> Tensor:
    """Return how unlikely latents are as noise, in nats, >= 2 ln 2.

    -(l1 + l2) for x in its own order, plus the mean of it over other orders, where x is cut into m
    rows Z of k = 4, l1 = min(-m |mean Z|^2 / (2k), -ln 2), l2 = min(-(m/2) max(sqrt(1 + |Z^T Z / m
    - I|) - 1 - sqrt(k/m), 0)^2, -ln 2), |.| spectral (concentration of noise; Peng et al. 2024,
    arXiv:2412.03876, as released, all orders at once).

    Args:
        x: entries of the latents, (n,), n a multiple of 4.
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
