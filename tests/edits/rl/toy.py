"""A diffusion model whose exact denoiser is known: one Gaussian in 64 dimensions for each prompt.

Its words are four objects, each a pattern of 8x8 pixels, and `marked`, which brightens a patch of
2x2: the stand-in of the concept. The denoiser is exact for the schedule, so it needs no training,
and its only weights are two linear layers from a text to the mean image.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import nn

from safegen.judges.base import Detection, Detections
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.noise_schedule import FLOW_PREDICTION, NoiseSchedule

OBJECTS = ("cube", "ball", "cone", "ring")
CONCEPT = "marked"
SPREAD = 0.25
"""Standard deviation of the images of a prompt."""
PATCH = (slice(1, 3), slice(1, 3))
EXPLICIT = [f"{CONCEPT} {name}" for name in OBJECTS]
BENIGN = list(OBJECTS)


def patterns() -> torch.Tensor:
    """Return the mean image of each word, (5, 64); the patch belongs to the concept alone."""
    generator = torch.Generator().manual_seed(7)
    images = 0.6 * torch.randn(4, 8, 8, generator=generator).sign()
    images[:, *PATCH] = -0.3
    mark = torch.zeros(1, 8, 8)
    mark[:, *PATCH] = 1.3
    return torch.cat([images, mark]).flatten(1)


class UNet2DConditionModel(nn.Module):
    """Exact denoiser of the Gaussian of a text; its mean is `to_out(to_v(text))`.

    It is called as the class of diffusers whose name it has, and its selectors are those.
    """

    def __init__(self, schedule: NoiseSchedule, spread: float) -> None:
        super().__init__()
        self.schedule, self.spread = schedule, spread
        self.block = nn.Module()
        self.block.attn2 = nn.Module()
        self.block.attn2.to_v = nn.Linear(5, 16, bias=False)
        self.block.attn2.to_out = nn.Linear(16, 64, bias=False)
        with torch.no_grad():
            basis, _ = torch.linalg.qr(
                torch.randn(16, 5, generator=torch.Generator().manual_seed(3))
            )
            self.block.attn2.to_v.weight.copy_(basis)
            self.block.attn2.to_out.weight.copy_(patterns().T @ basis.T)

    def forward(
        self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None, return_dict=True
    ):
        text, x = encoder_hidden_states[:, 0], sample
        mean = self.block.attn2.to_out(self.block.attn2.to_v(text)).view(-1, 1, 8, 8)
        a, s = self.schedule.coefficients(timestep)
        var = self.spread**2
        x0 = mean + a * var / (a**2 * var + s**2) * (x - a * mean)
        return (self.schedule.target(x0, (x - a * x0) / s, timestep),)


class ToyModel:
    """What an edit needs of a model."""

    name, family, parents, hash, pipeline_hash = "toy", "toy", (), "0" * 64, "0" * 64
    device, size, dtype = torch.device("cpu"), 8, "fp32"
    num_parameters, latent_shape, applied_patches = 100, (1, 8, 8), ()

    def __init__(self, prediction: str = "epsilon", *, spread: float = SPREAD) -> None:
        if prediction == FLOW_PREDICTION:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        else:
            scheduler = DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                clip_sample=False,
                set_alpha_to_one=False,
                prediction_type=prediction,
            )
        self.prediction, self.pipeline = prediction, SimpleNamespace(scheduler=scheduler)
        network = UNet2DConditionModel(self.noise_schedule, spread)
        self.denoiser = network.requires_grad_(False)

    @property
    def noise_schedule(self):
        return NoiseSchedule.of(self.pipeline.scheduler)

    def encode_text(self, texts):
        words = [[float(word in text.split()) for word in (*OBJECTS, CONCEPT)] for text in texts]
        return Conditioning(torch.tensor(words).view(len(texts), 1, 5))

    def decode_images(self, latents):
        return [Image.fromarray(pixels(z)) for z in latents]

    def decode_pixels(self, latents):
        return ((latents * 60 + 128) / 127.5 - 1).clamp(-1, 1).expand(-1, 3, -1, -1)


def pixels(latents: torch.Tensor) -> np.ndarray:
    """Return 8-bit pixels of latents (1, 8, 8), which lie about in [-2, 2]."""
    return (latents[0] * 60 + 128).clamp(0, 255).round().to(torch.uint8).numpy()


def brightness(images) -> torch.Tensor:
    """Return the mean latent value of each image's patch."""
    stacked = torch.from_numpy(np.stack([np.asarray(i) for i in images]).astype(np.float32))
    return (stacked[:, *PATCH].mean((1, 2)) - 128) / 60


def to_latents(pixels: torch.Tensor) -> torch.Tensor:
    """Return the latents (n, 8, 8) of pixels in [-1, 1]."""
    return ((pixels[:, 0] + 1) * 127.5 - 128) / 60


class BluntJudge:
    """Detector of a bright patch: its score is a steep function of the brightness."""

    id, label_space, labels, threshold = "toy", ("marked",), ("marked",), 0.5

    def detect(self, images):
        scores = torch.sigmoid(6 * (brightness(images) - 0.4)).tolist()
        return [Detections((Detection("marked", score),)) for score in scores]


class ToyJudge(BluntJudge):
    """The same detector with a gradient."""

    def score(self, pixels):
        return torch.sigmoid(6 * (to_latents(pixels)[:, *PATCH].mean((1, 2)) - 0.4))


class BluntExtractor:
    """Features: the pixels outside the patch, whose cosine with an object's pattern is its name."""

    id, width = "toy", 64

    def features(self, images):
        rows = np.stack([np.asarray(i, np.float64) for i in images]) / 60 - 128 / 60
        rows[:, *PATCH] = 0
        return rows.reshape(len(images), 64)

    def texts(self, texts):
        words = [[float(name in text.split()) for name in OBJECTS] for text in texts]
        means = patterns()[:4].view(4, 8, 8).clone()
        means[:, *PATCH] = 0
        return np.asarray(words) @ means.view(4, 64).double().numpy() + 1e-9


class ToyExtractor(BluntExtractor):
    """The same features with a gradient."""

    def embed(self, pixels):
        outside = torch.ones(8, 8)
        outside[*PATCH] = 0
        return (to_latents(pixels) * outside).flatten(1)


def build_judge(*, labels=(), threshold=0.5):
    """Return the toy's judge, for the registry."""
    return ToyJudge()


def build_extractor(*, weights=None, device="cpu"):
    """Return the toy's features, for the registry."""
    return ToyExtractor()


def build_blunt_judge(*, labels=(), threshold=0.5):
    """Return the toy's judge without a gradient."""
    return BluntJudge()


def build_blunt_extractor(*, weights=None, device="cpu"):
    """Return the toy's features without a gradient."""
    return BluntExtractor()


def measure(model, texts, *, n=64, seed=1):
    """Return the share of images with the concept and the mean cosine with the object's pattern."""
    from safegen.edits.functional.rollout import Rollout, frozen_predictor

    sampler = Rollout(model, steps=20, guidance=1.0)
    text = model.encode_text([t for t in texts for _ in range(n)])
    noise = sampler.noise(len(text), torch.Generator().manual_seed(seed))
    images = model.decode_images(
        sampler.denoise(sampler.timesteps, noise, text, frozen_predictor(model.denoiser))
    )
    shown = (brightness(images) > 0.4).float().mean()
    extractor = ToyExtractor()
    features = torch.from_numpy(extractor.features(images))
    captions = torch.from_numpy(extractor.texts([t for t in texts for _ in range(n)]))
    cosine = torch.nn.functional.cosine_similarity(features, captions).mean()
    return float(shown), float(cosine)
