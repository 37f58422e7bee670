"""SafeGen: remove a visual concept from the self-attention layers, with image triplets.

Li et al. 2024, arXiv:2404.06666. A triplet is <unsafe, censored, benign>.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import TrainedEdit
from safegen.edits.functional import losses
from safegen.edits.functional.adversary import AdversarySetting, build_adversary, resolve_adversary
from safegen.edits.functional.targets import PaperTarget, Target, X0Target, check_triplet_losses
from safegen.edits.training.config import (
    FULL_SIZE_TRAINING,
    SHORT_WITH_IMAGES,
    Objective,
    Training,
    training_state,
    warn_unused,
)
from safegen.edits.training.micro_steps import merged_micro_steps
from safegen.edits.training.samples import (
    encode_triplets,
    held_out_rows,
    read_captions,
    shuffled_rows,
)
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict
from safegen.models.model import Model

CAPTION_SHARE = 0.6
"""Default of `caption_share`: the other samples train the blank branch of guidance."""
VALIDATION_SPLIT = 0.1
"""Default of `validation_split`."""


class SafeGen(TrainedEdit):
    """Settings of the SafeGen edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mini": {},
        "mini-flow": {"selector": "noxattn", "timesteps": (150, 1000)},
        "full": {"training": FULL_SIZE_TRAINING},
        "paper": {
            "adversary": 0.0,
            "fade": 0.0,
            "target": PaperTarget(),
            "timesteps": (0, 1000),
            "weight_mosaic": 0.1,
            "weight_preserve": 0.9,
            "teacher": False,
            "captions": (),
            "training": FULL_SIZE_TRAINING,
        },
    }
    """`paper`: the published run (run_adjust_SD.sh). `mini`: chosen by our ablation. `mini-flow`:
    for flow matching. `full`: `mini` with the published schedule; not measured at full size."""
    paper: ClassVar[str] = "arXiv:2404.06666"
    code_url: ClassVar[str] = "https://github.com/LetterLiGo/SafeGen_CCS2024"
    code_commit: ClassVar[str] = "20f627b"
    parity: ClassVar[str] = (
        "`paper`: the released script ran for 12 updates (60 micro-steps) on `mini` in fp32, and "
        "its latents, noises and timesteps were replayed here. The change of the weights differs "
        "by 1.7e-5, cosine 1.000000. "
        "An update takes 3.0 times less CPU time than the released step in fp32, 4.7 in bf16."
    )
    deviations: ClassVar[str] = (
        "`paper` is the released run without flags that have no effect or do not parse. "
        "Half precision is bf16, and fp32 where the device has none; the release has fp16. "
        "Latents are posterior means, computed once, not new samples at each step. "
        "Small latents of the five micro-steps pass the network together. "
        "The three images of a triplet get the same crop and flip. "
        "Draws differ: changes have cosine 0.45 with released ones, 0.46 between two released. "
        "`mini`, `full` are ours: the x0 target, the original model as teacher in L_p, captions, "
        "an adversary and fading."
    )
    has_validation: ClassVar[bool] = True

    target: Target = X0Target()
    """Target of L_m: `x0` with the settings `anchor` and `clamp` (ours), or `paper`."""
    timesteps: tuple[int, int] = (150, 900)
    """Range of training timesteps, the last one excluded."""
    weight_mosaic: float = Field(default=0.39, ge=0)
    """Weight of L_m, the loss on unsafe images; 0 removes nothing."""
    weight_preserve: float = Field(default=0.61, ge=0)
    """Weight of L_p, the loss on benign images."""
    teacher: bool = True
    """Whether the target of L_p is the original prediction (ours) or the noise (as released)."""
    captions: tuple[str, ...] = ()
    """Prompt lists (`source:list`) and text files with benign captions, for `caption_share`."""
    caption_share: float | None = Field(default=None, gt=0, le=1)
    """Share of samples conditioned on a random caption, not the blank text (ours). Default: 0.6."""
    adversary: AdversarySetting = 0.25
    """Adversary that moves the text embedding of unsafe samples: the relative size of one step
    (0 is none), a name, or a table with a name and settings."""
    adversary_moves: Literal["unsafe", "both"] | None = None
    """Samples that get the move: unsafe ones, or by the same step benign ones too (ours).

    Default: `both` for additive adversaries, otherwise `unsafe`.
    """
    fade: float = Field(default=0.8, ge=0, lt=1)
    """Maximum share of the censored latent mixed into an unsafe one (ours); 0 is none."""
    flip: bool = False
    """Whether triplets are mirrored at random."""
    selector: str = "attn1"
    """Which weights change."""
    validation_split: float | None = Field(default=None, gt=0, lt=0.5)
    """Share of the triplets held out if `training.validate_every` is set. Default: 0.1."""
    training: Training = SHORT_WITH_IMAGES
    """Settings of the training loop."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_triplet_losses(self)
        return self

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Yield each setting that has no effect with the others, and why."""
        yield from super().unused_settings()
        if self.caption_share is not None and not self.captions:
            yield "caption_share", "without captions"
        if self.validation_split is not None and not self.training.validate_every:
            yield "validation_split", "without training.validate_every"
        if self.adversary_moves and not (self.adversary and self.weight_preserve):
            yield "adversary_moves", "without an adversary and a weight_preserve"
        if not self.weight_preserve and self.changed("teacher"):
            yield "teacher", "with weight_preserve 0"
        if not self.weight_mosaic:
            for name in self.changed("target", "fade"):
                yield name, "with weight_mosaic 0"

    @property
    def erases_concept(self) -> bool:
        """Whether L_m, the loss that removes, has a weight."""
        return self.weight_mosaic > 0

    @property
    def moves_benign(self) -> bool:
        """Whether the adversary moves the text of benign samples too."""
        if not (self.adversary and self.weight_preserve):
            return False
        additive = resolve_adversary(self.adversary).is_additive
        return additive if self.adversary_moves is None else self.adversary_moves == "both"

    def describe(self) -> str:
        """Return one or two sentences for a report."""
        texts = "benign captions and the blank text" if self.captions else "the blank text only"
        return (
            "The edit learns from images: an unsafe one, the same with the concept covered, and a "
            "benign one. An unsafe image must be predicted as its covered twin, a benign one as it "
            f"is. Its texts are {texts}: it never reads a word of the concept."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the captions of a concept."""
        return {"captions": concept.captions}

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return batches and losses; see `TrainedEdit.build_objective`."""
        assert triplets is not None
        return SafeGenObjective(self, model, triplets, names)


class SafeGenObjective:
    """Batches and losses of SafeGen. Latents and text embeddings are computed once."""

    def __init__(
        self, edit: SafeGen, model: Model, triplets: Triplets, names: Sequence[str]
    ) -> None:
        """Encode every triplet and caption.

        Raises:
            ConfigError: there are too few triplets to hold some out, no triplet shows the concept,
                or `timesteps` or `target` do not suit the model.

        Warns:
            UnusedSettingWarning: the adversary has nothing to move.
        """
        self.edit, self.schedule = edit, model.noise_schedule
        if edit.timesteps[1] > len(self.schedule):
            raise ConfigError(
                f"timesteps must end by {len(self.schedule)} on this model, got {edit.timesteps[1]}"
            )
        if isinstance(edit.target, PaperTarget) and model.prediction != "epsilon":
            raise ConfigError(
                f"target paper needs a model that predicts noise, got {model.prediction}. "
                "Use target x0."
            )
        self.attack = build_adversary(edit.adversary, model, names)
        self.weights = {"L_m": edit.weight_mosaic, "L_p": edit.weight_preserve}
        self.latents = encode_triplets(model, triplets, flip=edit.flip)  # (3, flips, n, c, h, w)
        if torch.equal(self.latents[0], self.latents[1]):
            raise ConfigError(
                "triplets must show the concept, but every censored image equals its unsafe one. "
                "Make triplets of images with the concept."
            )
        n = self.latents.shape[2]
        split = edit.validation_split or VALIDATION_SPLIT
        self.validation_rows = held_out_rows(n, split if edit.training.validate_every else 0.0)
        self.num_train = n - len(self.validation_rows)
        self.text = model.encode_text(["", *read_captions(edit.captions)]).float()
        if self.attack and not self.text.hidden.any():
            warn_unused([("adversary", "without captions on a model with a blank text of zeros")])
        uses_teacher = isinstance(edit.target, X0Target) and edit.target.anchor == "teacher"
        # An adversary that searches does so against the original prediction.
        searches = bool(edit.adversary) and not resolve_adversary(edit.adversary).is_additive
        needed = names if edit.teacher or uses_teacher or searches else ()
        parameters = dict(model.denoiser.named_parameters())
        self.reference = {name: parameters[name].detach().clone() for name in needed}

    @property
    def micro_steps_per_pass(self) -> int:
        """Micro-steps in one forward pass; see `MergesMicroSteps`."""
        shares_state = bool(training_state(self))  # an adversary that learns from each micro-step
        samples = 2 * self.edit.training.batch
        return 1 if shares_state else merged_micro_steps(samples, self.latents.shape[-2:])

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return L_m and L_p of one batch, (b,) each."""
        return self.training_steps(denoiser, {micro_step: generator}, share)

    def training_steps(
        self, denoiser: nn.Module, generators: Mapping[int, torch.Generator], share: tuple[int, int]
    ) -> Mapping[str, Tensor]:
        """Return L_m and L_p of some batches in one forward pass; see `MergesMicroSteps`."""
        batch, seed = self.edit.training.batch, self.edit.training.seed
        draws = [
            self._draw(shuffled_rows(self.num_train, seed, step * batch, batch), generator, share)
            for step, generator in generators.items()
        ]
        return self._compare_drawn(denoiser, draws)

    def validation_loss(self, denoiser: nn.Module) -> float:
        """Return the weighted loss on the held-out triplets, with eight fixed draws of each."""
        generator, loss = torch.Generator("cpu").manual_seed(1), 0.0
        for _ in range(8):
            draws = self._draw(self.validation_rows, generator, (0, 1))
            terms = self._compare_drawn(denoiser, [draws])
            loss += sum(self.weights[name] * v.mean().item() for name, v in terms.items()) / 8
        return loss

    def _draw(
        self, rows: Sequence[int], g: torch.Generator, share: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        """Return latents, noise, timesteps and captions of this process's share of some triplets.

        The tensors are those that `compare` takes, with captions, (b,) of each role, as the text.
        """
        b, shape = len(rows), self.latents.shape[3:]
        flips = torch.randint(self.latents.shape[1], (b,), generator=g)
        t = self.schedule.timesteps[torch.randint(*self.edit.timesteps, (b,), generator=g)]
        eps, eps_b = torch.randn(b, *shape, generator=g), torch.randn(b, *shape, generator=g)
        captions = torch.zeros(2 * b, dtype=torch.long)
        if self.edit.captions:
            chosen = torch.randint(1, len(self.text), (2 * b,), generator=g)
            caption_share = self.edit.caption_share or CAPTION_SHARE
            captions = torch.where(torch.rand(2 * b, generator=g) < caption_share, chosen, captions)
        mine = torch.arange(b)[share[0] :: share[1]]
        z_u, z_c, z_b = self.latents[:, flips, torch.tensor(rows)][:, mine]
        device = z_u.device
        if self.edit.fade:
            strength = 1 - self.edit.fade * torch.rand(b, 1, 1, 1, generator=g)[mine].to(device)
            z_u = z_c + strength * (z_u - z_c)
        eps, eps_b, t = eps[mine].to(device), eps_b[mine].to(device), t[mine].to(device)
        return z_u, z_c, z_b, eps, eps_b, t, captions[:b][mine], captions[b:][mine]

    def _compare_drawn(
        self, denoiser: nn.Module, draws: Sequence[tuple[Tensor, ...]]
    ) -> Mapping[str, Tensor]:
        """Return the losses of the samples of some draws."""
        samples = [torch.cat(parts) for parts in zip(*draws, strict=True)]
        z_u, z_c, z_b, eps, eps_b, t, *captions = samples
        return self.compare(denoiser, z_u, z_c, z_b, eps, eps_b, t, self.text[torch.cat(captions)])

    def compare(
        self,
        denoiser: nn.Module,
        z_u: Tensor,
        z_c: Tensor,
        z_b: Tensor,
        eps: Tensor,
        eps_b: Tensor,
        t: Tensor,
        text: Conditioning,
    ) -> Mapping[str, Tensor]:
        """Return L_m and L_p of each triplet for given noise, timesteps and texts.

        Args:
            denoiser: the network in training.
            z_u: scaled latents of the unsafe images, (b, c, h, w).
            z_c: those of the censored images.
            z_b: those of the benign images.
            eps: noise for the unsafe latents.
            eps_b: noise for the benign latents.
            t: timesteps of the triplets, (b,).
            text: text embeddings, 2b rows: of the unsafe samples, then the benign ones.
        """
        n, target, moves_benign = len(z_u), self.edit.target, self.edit.moves_benign
        z, noise, timesteps = torch.cat([z_u, z_b]), torch.cat([eps, eps_b]), torch.cat([t, t])
        x = self.schedule.add_noise(z, noise, timesteps)
        truth = self.schedule.target(z, noise, timesteps)
        frozen = truth  # predictions of the original model, where they are needed
        if self.reference:  # benign samples with a moved text are predicted after the move
            rows = 2 * n if self.edit.teacher and not moves_benign else n
            frozen = self._predict_frozen(denoiser, x[:rows], timesteps[:rows], text[:rows])
        if isinstance(target, PaperTarget):
            censored = losses.paper_target(eps, z_u, z_c)
        else:
            anchor = frozen[:n] if target.anchor == "teacher" else truth[:n]
            factor = self.schedule.x0_factor(t, clamp=target.clamp)
            censored = losses.x0_target(anchor, z_u, z_c, factor)
        if self.attack:
            moved = self.attack(denoiser, x[:n], t, text[:n], want=censored, before=frozen[:n])
            others = text[n:].plus(moved.plus(text[:n], -1)) if moves_benign else text[n:]
            text = Conditioning.concat([moved, others])
        if self.edit.teacher and moves_benign:
            frozen = torch.cat([frozen, self._predict_frozen(denoiser, x[n:], t, text[n:])])
        unsafe, benign = predict(denoiser, x, timesteps, text).chunk(2)
        preserved = frozen[n:] if self.edit.teacher else truth[n:]
        return {
            "L_m": losses.squared_error(unsafe, censored),
            "L_p": losses.squared_error(benign, preserved),
        }

    @torch.no_grad()
    def _predict_frozen(
        self, denoiser: nn.Module, x: Tensor, t: Tensor, text: Conditioning
    ) -> Tensor:
        """Return the prediction of the original model."""
        return predict(denoiser, x, t, text, self.reference)
