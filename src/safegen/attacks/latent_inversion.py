"""Latent inversion: find initial latents that the attacked model turns into the concept.

The attack needs no text that names the concept. It takes an image of the concept, and runs the
attacked model's sampling backwards under the blank text to the latents that it would start from:
"Memories of Forgotten Concepts" (Rusanovsky et al. 2024, arXiv:2412.00782), TINA
(arXiv:2603.17828) and M-ErasureBench (arXiv:2512.22877).

Deterministic sampling is nearly invertible, so that some latents lead to almost any image. A high
rate therefore says that the concept can be drawn, not that it will be. The controls say how much:
images without the concept, the autoencoder alone, and how likely the found latents are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.images import ConceptImages
from safegen.attacks.core.inversion import Output, invert, likelihood, refine, sampling_steps
from safegen.attacks.core.redraw import control_images
from safegen.attacks.core.target import QueryResult, Target
from safegen.core.errors import DivergedError, SafegenWarning
from safegen.core.hashing import hash_tensors
from safegen.core.settings import MAX_COUNT
from safegen.evaluation.samples import EvalSample
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict
from safegen.models.families.pipeline_specs import guidance_option

BLANK = " "
"""Blank text. An empty prompt in a record would mean that the text was left out."""
SAME = 0.05
"""Largest difference of a text's embeddings in different batches."""
Text = Literal["blank", "typical", "benign"]
"""What is asked for with the found latents: nothing, or the attacked prompt.

`typical` asks for nothing with the latents scaled to the norm of a draw from N(0, I).
"""


class SamplerMismatchWarning(SafegenWarning):
    """A stack draws with another sampler than the one that is inverted."""


class LatentInversion(Attack):
    """Settings of latent inversion.

    The `details` of a record are `psnr` of the drawn image against the inverted one, in dB; the
    same of the autoencoder alone, and whether the judge sees the concept in its image; and how
    the latents compare with draws from N(0, I): `log_density` by dimension, `norm_z` and
    `correlation_z` (of adjacent values) in standard deviations of a draw. Beyond 3, a user who
    draws noise will not meet such latents. `loss` is the error of the drawn latents.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {"iterations": 5, "tolerance": 0.0},
    }
    TINY: ClassVar[Mapping[str, Any]] = {"iterations": 2, "updates": 1, "control": False}
    paper: ClassVar[str] = "arXiv:2412.00782"
    code_url: ClassVar[str] = "https://github.com/matanr/Memories_of_Forgotten_Concepts"
    code_commit: ClassVar[str] = "494cb1a"
    parity: ClassVar[str] = (
        "With one iteration, equal to DDIMInverseScheduler of diffusers within 1e-5. The released "
        "code was read, not run."
    )
    deviations: ClassVar[str] = (
        "Inversion and redraw under the blank text, as in TINA and M-ErasureBench; the released "
        "code of arXiv:2412.00782 inverts under the image's caption. No code of TINA is known. "
        "The number of steps is that of the run, by default 25; the released code has 50. "
        "The fixed point of each step halves its rate where the error grows; the released code "
        "(ReNoise) averages iterates, and its settings pull the predicted noise towards a "
        "Gaussian, which this attack does not do. "
        "The inversion does not go through guards; images are requested through them. "
        "On flow matching, the Euler steps of its ODE are inverted by the same fixed point. "
        "No null-text optimization: its embeddings belong to single steps, and a prompt file "
        "cannot carry them to other stacks."
    )
    access: ClassVar[Access] = "weights"
    tier: ClassVar[Tier] = "adaptive"

    texts: tuple[Text, ...] = Field(default=("blank", "typical", "benign"), min_length=1)
    """Texts asked for with the found latents; each has its own rate. `typical` is the blank text
    with the latents scaled to the norm of a draw from N(0, I), ours."""
    guided: bool = False
    """Whether latents for the benign text are inverted under that text with guidance; by default
    they are those of the blank text."""
    iterations: int = Field(default=5, ge=1, le=MAX_COUNT)
    """Passes for each step of the inversion, at most; 1 is plain DDIM inversion."""
    tolerance: float = Field(default=1e-3, ge=0)
    """Root mean square error of a step, in latents, that is small enough."""
    updates: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Updates of the initial latents by the gradient of the error after all steps."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate of these updates."""
    images: Path | None = None
    """Folder of images of the concept, or triplets. Default: the concept's bundled triplets."""
    control: bool = True
    """Whether images without the concept are inverted too, for the same texts."""
    harmless: Path | None = None
    """Folder of images without the concept. Default: the benign images of the triplets."""

    @property
    def variants(self) -> tuple[str, ...]:
        """A variant for each text."""
        return tuple(f"text={text}" for text in self.texts)

    @property
    def controls(self) -> tuple[str, ...]:
        """A control for each text, if there are controls."""
        return tuple(f"control={text}" for text in self.texts) if self.control else ()

    def build(self, context: AttackContext) -> Inversion:
        """Return the attacker; the images are encoded here.

        Raises:
            ConfigError: there are no images with or without the concept.

        Warns:
            SamplerMismatchWarning: the sampler is neither DDIM nor that of flow matching.
        """
        return Inversion(self, context)


class Inversion:
    """Inverts images of the concept, and harmless ones, through the attacked model."""

    def __init__(self, config: LatentInversion, context: AttackContext) -> None:
        self.config, self.context, self.target = config, context, context.target
        model, stack = self.target.model, self.target.loaded.stack
        self.model, self.generation = model, self.target.generation
        scheduler = model.pipeline.scheduler
        if not is_invertible(scheduler):
            warnings.warn(
                "latent inversion inverts DDIM without clipping, or Euler steps of flow matching, "
                f"and this model draws with {type(scheduler).__name__}; its images are near the "
                "inverted ones only",
                SamplerMismatchWarning,
                stacklevel=3,
            )
        self.steps = sampling_steps(model, self.generation.num_inference_steps)
        self.negative = stack.negative_prompt or ""
        shown = ConceptImages(model, context.concept, config.images)
        harmless = control_images(
            context, shown, config.images, config.harmless, control=config.control
        )
        self.image_sets = {"text": _ImageSet(shown, self.target)}
        if harmless is not None:
            self.image_sets["control"] = _ImageSet(harmless, self.target)

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the latents found for each sample, by text, and those of the controls."""
        found: dict[str, list[AttackRecord]] = {}
        for number, (part, images) in enumerate(self.image_sets.items()):
            blank: _Found | None = None
            for text in self.config.texts:
                if self.config.guided and text == "benign":
                    latents = self._invert(images, samples, text)
                else:
                    blank = blank or self._invert(images, samples, "blank")
                    latents = blank.typical() if text == "typical" else blank
                name = f"{part}={text}"
                found[name] = self._draw(images, samples, latents, text, name)
            self.context.progress("inverting images", number + 1, len(self.image_sets))
        return [records[number] for number in range(len(samples)) for records in found.values()]

    def _invert(self, images: _ImageSet, samples: Sequence[EvalSample], text: Text) -> _Found:
        """Return the initial latents of images under a text.

        Raises:
            DivergedError: they are not finite.
        """
        config = self.config
        z = torch.stack([images.images.latents_for(sample) for sample in samples])
        output = self._output([_prompt_for(sample, text) for sample in samples])

        def stop() -> bool:
            return bool(self.target.exhausted)

        with torch.no_grad():
            x = invert(
                output,
                self.steps,
                z,
                iterations=config.iterations,
                tolerance=config.tolerance,
                stop=stop,
            )
        best, history = refine(
            output, self.steps, x, z, updates=config.updates, lr=config.lr, stop=stop
        )
        if not bool(best.isfinite().all() and history[-1].isfinite().all()):
            raise DivergedError(
                "latents must be finite, and the inversion's are not. Load the model as fp32."
            )
        return _Found(best, history)

    def _output(self, texts: Sequence[str]) -> Output:
        """Return the function that predicts the denoiser's output as the stack does for texts.

        Where a text is that of the negative prompt, guidance changes nothing and is left out.
        """
        model, generation, denoiser = self.model, self.generation, self.model.denoiser
        is_embedded = guidance_option(model.pipeline) != "guidance_scale"
        scale = generation.true_cfg_scale if is_embedded else generation.guidance_scale
        positive, negative = (
            model.encode_text(part).replace_guidance(generation.guidance_scale).to(denoiser.dtype)
            for part in (texts, [self.negative])
        )
        is_negative = all(text.strip() == self.negative for text in texts) and torch.allclose(
            positive.hidden, negative.hidden, atol=SAME
        )  # SDXL's blank text is not the zeros that it guides away from
        plain = is_negative or not scale > 1

        def output(x: Tensor, t: float, rows: Tensor) -> Tensor:
            x, text = x.to(denoiser.dtype), positive[rows]
            steps = torch.full((len(x),), t, device=x.device)
            if plain:
                return predict(denoiser, x, steps, text).float()
            text = Conditioning.concat([negative.expand(len(x)), text])
            both = predict(denoiser, torch.cat([x, x]), torch.cat([steps, steps]), text).float()
            without, with_text = both.chunk(2)
            return without + scale * (with_text - without)

        return output

    def _draw(
        self, images: _ImageSet, samples: Sequence[EvalSample], found: _Found, text: Text, name: str
    ) -> list[AttackRecord]:
        """Return the records of found latents, drawn by the stack under a text."""
        starts = [
            self.context.start_from_latents(hash_tensors({"latents": latents})[:16], latents)
            for latents in found.latents
        ]
        requests = [
            sample.model_copy(update={"prompt": _prompt_for(sample, text), "start": start})
            for sample, start in zip(samples, starts, strict=True)
        ]
        results = self.target.query(requests)
        return [
            self._record(images, sample, name, found, number, result)
            for number, (sample, result) in enumerate(zip(requests, results, strict=True))
        ]

    def _record(
        self,
        images: _ImageSet,
        sample: EvalSample,
        name: str,
        found: _Found,
        number: int,
        result: QueryResult,
    ) -> AttackRecord:
        """Return the record of one sample."""
        history = [float(errors[number]) for errors in found.history]
        details = likelihood(found.latents[number]) | images.autoencoder(sample)
        if result.output.image is not None:
            details["psnr"] = psnr(result.output.image, images.images.image_for(sample))
        return AttackRecord(
            id=sample.id,
            variant=name,
            prompt=sample.prompt,
            seed=sample.seed,
            start=sample.start,
            success=result.success,
            loss=history[-1] if history else None,
            history=tuple(history),
            details=details,
            stopped=self.target.exhausted,
        )


@dataclass
class _Found:
    """Initial latents of a batch of images."""

    latents: Tensor
    """Initial latents (b, c, h, w)."""
    history: list[Tensor]
    """Mean squared error (b,) of the drawn latents so far, by update."""

    def typical(self) -> _Found:
        """Return the latents scaled to the norm of a draw from N(0, I)."""
        norms = self.latents.flatten(1).norm(dim=1)
        scale = math.sqrt(self.latents[0].numel()) / norms
        return _Found(self.latents * scale[:, None, None, None], [])


class _ImageSet:
    """Images with or without the concept, and what the autoencoder alone makes of them."""

    def __init__(self, images: ConceptImages, target: Target) -> None:
        self.images, self.target, self.model = images, target, target.model

    def autoencoder(self, sample: EvalSample) -> dict[str, float]:
        """Return whether the judge sees the concept in the decoded latents, and their PSNR.

        Of an image that cannot be judged, there is the PSNR alone.
        """
        image = self.model.decode_images(self.images.latents_for(sample)[None])[0]
        details = {"autoencoder_psnr": psnr(image, self.images.image_for(sample))}
        found = self.target.judge.detect([image])[0]
        if found.unjudged is None:
            details["autoencoder_success"] = float(self.target.shows_concept(found))
        return details


def is_invertible(scheduler: Any) -> bool:
    """Return whether a scheduler of diffusers takes the steps that are inverted."""
    name, config = type(scheduler).__name__, scheduler.config
    if name == "FlowMatchEulerDiscreteScheduler":
        return not config.get("stochastic_sampling")
    return name == "DDIMScheduler" and not config.clip_sample


def _prompt_for(sample: EvalSample, text: Text) -> str:
    """Return the prompt for a text."""
    return sample.prompt if text == "benign" else BLANK


def psnr(image: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two images in dB; 99 if they are equal."""
    a, b = (np.asarray(i.convert("RGB"), dtype=np.float64) for i in (image, other))
    error = float(((a - b) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else 99.0
