"""What follows from the figures of rollouts: known failures of reinforcement learning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from safegen.core.errors import ConfigError, SafegenWarning
from safegen.core.settings import MAX_COUNT, BaseSettings

VALUES = (
    "kl",
    "keep",
    "rollouts",
    "diversity",
    "alignment",
    "collapsed",
    "over_erased",
    "unrewarded",
    "unmeasured",
    "end",
)
"""Names of the monitor's values, one number each."""
WINDOWS = (
    "diversity",
    "alignment",
    "judge_found",
    "judge_images",
    "held_out_found",
    "held_out_images",
)
"""Names of the figures that are stored for the last rollouts."""
FACTOR = 1.5
"""Factor by which a weight is raised or lowered."""
BOUND = 100.0
"""Largest factor between a weight and its setting."""
LEAST = 1e-3
"""Value that a weight of 0 is raised from."""
UNREWARDED = 5
"""Rollouts from the start after which a reward must have been seen."""
TARGET, HACKING = 1.0, 2.0
"""Values of `end`; 0 until the training ends."""


class TrainingHealthWarning(SafegenWarning):
    """Sign that a training by reward goes wrong."""


class Limits(BaseSettings):
    """Limits of a training by reward, over the last rollouts; what exceeds one is acted on."""

    window: int = Field(default=3, ge=1, le=1000)
    """Rollouts that a mean or a rate is taken over; the first ones are what is compared with."""
    diversity: float = Field(default=0.5, ge=0, lt=1)
    """Share of the first diversity below which the weight of L_kl rises; 0 disables it."""
    alignment: float = Field(default=0.88, ge=0, lt=1)
    """Share of the first mean cosine of benign images and captions below which the weight of L_keep
    rises; 0 disables it.
    """
    judge_gap: float | None = Field(default=0.25, ge=0, le=1)
    """Rate of the held-out judge less that of the judge above which the training ends.

    The rates are those of images of the concept's prompts. None disables it.
    """
    images: int = Field(default=64, ge=1, le=MAX_COUNT)
    """Fewest images for `judge_gap` to end the training, and to warn that none has the concept."""


class Monitor:
    """Adapts the weights of the two distances to the original model, and ends a training.

    | failure | sign | consequence |
    |---|---|---|
    | diversity collapse | images of a prompt are closer than at first (`diversity`) | `kl` rises |
    | over-erasure | benign images fit captions less (`alignment`) | `keep` rises |
    | sparse reward | the first 5 rollouts have no group that varies | the training is refused |
    | nothing to remove | the judge finds no concept in the first rollouts | a warning |
    | sparse judge | the judge finds the concept in all images, with equal scores | a warning |
    | reward hacking | the held-out judge finds the concept more often (`judge_gap`) | it ends |
    | zero variance | `zero_variance` of the log is 1 | L_policy is 0 |
    | not finite | `skipped` of the log | the update changes nothing |
    | not judged | `masked` of the log | the image teaches nothing |
    | not measured | the held-out judge judges no image | a warning; `target` is not reached |

    A weight rises in every rollout while its event lasts, by a factor of 100 at most, and then
    falls back to its setting. An event is warned about when it begins.
    """

    def __init__(
        self,
        kl: float,
        keep: float,
        *,
        budget: float | None = None,
        target: float | None = None,
        limits: Limits | None = None,
        has_held_out: bool = False,
        needs_variance: bool = True,
    ) -> None:
        """Store the weights to start from.

        Args:
            kl: weight of the distance on prompts of the concept.
            keep: weight of the distance on benign prompts.
            budget: distance on benign prompts that `keep` is adapted to; None leaves it.
            target: rate of images with the concept at which the training ends; None trains on.
            limits: limits of what is acted on.
            has_held_out: whether there is a held-out judge.
            needs_variance: whether the algorithm learns from differences within groups.
        """
        self.has_held_out, self.needs_variance = has_held_out, needs_variance
        self.settings = {"kl": kl, "keep": keep}
        self.budget, self.target, self.limits = budget, target, limits or Limits()
        self.values = {name: torch.zeros(1) for name in VALUES}
        self.windows = {name: torch.zeros(self.limits.window) for name in WINDOWS}
        for name, value in self.settings.items():
            self.values[name].fill_(value)

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors that change, for checkpoints; see `HasState`."""
        return self.values | {f"last_{name}": value for name, value in self.windows.items()}

    @property
    def kl(self) -> float:
        """Weight of the distance on prompts of the concept."""
        return float(self.values["kl"])

    @property
    def keep(self) -> float:
        """Weight of the distance on benign prompts."""
        return float(self.values["keep"])

    @property
    def stop_reason(self) -> str | None:
        """Why the training ends; None if it goes on."""
        end = float(self.values["end"])
        if end == HACKING:
            return (
                f"the held-out judge finds the concept in {self._rate('held_out'):.0%} of the last "
                f"images of its prompts, the judge that rewards in {self._rate('judge'):.0%}: "
                "the training deceives that judge, or it misses the concept"
            )
        if end == TARGET:
            judge, who = self._reporting()
            return (
                f"{who} finds the concept in {self._rate(judge):.1%} of the last images of its "
                f"prompts, and the target is {self.target:.1%}"
            )
        return None

    def follow_rollout(self, figures: Mapping[str, float]) -> None:
        """Compare a rollout with the first ones.

        Args:
            figures: see `safegen.edits.rl.figures.rollout_figures`.

        Raises:
            ConfigError: the first rollouts have no group in which the rewards vary.

        Warns:
            TrainingHealthWarning: one of the failures begins.
        """
        self.values["rollouts"] += 1
        for name, window in self.windows.items():
            value = figures.get(_FIGURES[name], float(window[-1]) if name in _MEANS else 0.0)
            if name.endswith("_found"):
                value = round(value * figures.get(_FIGURES[name] + "_n", 0.0))
            window.copy_(torch.cat([window[1:], torch.tensor([float(value)])]))
        self._check_reward(figures)
        self._check_measured()
        rollouts = int(self.values["rollouts"])
        if rollouts < self.limits.window:
            return
        if rollouts == self.limits.window:
            for name in _MEANS:
                self.values[name].fill_(float(self.windows[name].mean()))
        else:
            self._check_diversity()
            self._check_alignment()
        self._check_end()
        if rollouts == self.limits.window and not self.values["end"]:
            self._check_presence()

    def follow_distance(self, distance: float) -> None:
        """Adapt `keep` to the distance on benign prompts in an update.

        It rises above the budget, falls below the budget / 1.5, and stays between. Schulman et al.
        2017 (arXiv:1707.06347, section 4) adapt the weight of a KL divergence in this way.
        """
        if self.budget is None:
            return
        if distance > self.budget:
            self._raise("keep")
        elif distance < self.budget / FACTOR and not self.values["over_erased"]:
            self._lower("keep", self.settings["keep"] / BOUND)

    def _check_reward(self, figures: Mapping[str, float]) -> None:
        stuck = figures["zero_variance"] >= 1
        found = figures.get("judge_unsafe_concept", 0.0)
        sparse = figures.get("zero_variance_judge", 0.0) >= 1 and found >= 1
        count = self.values["unrewarded"]
        if count < 0 or not (stuck or sparse) or not self.needs_variance:
            count.fill_(-1)  # a reward was seen
            return
        count += 1
        if count < UNREWARDED:
            return
        way_out = "Start from a patch that removes part of the concept (--from), or raise group."
        if stuck and not found:
            way_out = "The judge finds the concept in no image, so there is nothing to remove."
        if stuck:
            raise ConfigError(
                f"rewards must differ within groups, and in {UNREWARDED} rollouts they do not. "
                f"{way_out}"
            )
        self._warn(
            f"the judge finds the concept in all images of its prompts of {UNREWARDED} rollouts, "
            f"with equal scores, so that it teaches nothing. {way_out}"
        )
        count.fill_(-1)

    def _check_presence(self) -> None:
        """Warn if there is nothing to remove."""
        images = int(self.windows["judge_images"].sum())
        if images >= self.limits.images and not self.windows["judge_found"].any():
            self._warn(
                f"the judge finds the concept in none of the first {images} images of its prompts, "
                "so that it teaches nothing. Use prompts that show the concept, or another judge."
            )

    def _check_measured(self) -> None:
        unmeasured = self.has_held_out and not self.windows["held_out_images"][-1]
        if unmeasured and not self.values["unmeasured"]:
            self._warn(
                "the held-out judge can judge no image of the concept's prompts: nothing tells "
                "whether the training deceives the judge that rewards"
            )
        self.values["unmeasured"].fill_(float(unmeasured))

    def _check_diversity(self) -> None:
        first, now = float(self.values["diversity"]), float(self.windows["diversity"].mean())
        self._follow_event(
            "collapsed",
            "kl",
            now < self.limits.diversity * first,
            f"images of one prompt are {now:.3f} apart, at first {first:.3f}: they become alike",
        )

    def _check_alignment(self) -> None:
        first, now = float(self.values["alignment"]), float(self.windows["alignment"].mean())
        self._follow_event(
            "over_erased",
            "keep",
            now < first - (1 - self.limits.alignment) * abs(first),
            f"benign images and captions have cosine {now:.3f}, at first {first:.3f}: other "
            "content is lost",
        )

    def _follow_event(self, event: str, weight: str, present: bool, message: str) -> None:
        """Raise a weight while an event lasts, and lower it to its setting afterwards."""
        if present and not self.values[event]:
            self._warn(f"{message}. The weight {weight} is raised while this lasts.")
        self.values[event].fill_(float(present))
        if present:
            self._raise(weight)
        elif weight == "kl" or self.budget is None:
            self._lower(weight, self.settings[weight])

    def _check_end(self) -> None:
        gap, images = self.limits.judge_gap, self.limits.images
        least = min(float(self.windows[f"{j}_images"].sum()) for j in ("judge", "held_out"))
        judge, _ = self._reporting()
        if (
            gap is not None
            and least >= images
            and self._rate("held_out") - self._rate("judge") > gap
        ):
            self.values["end"].fill_(HACKING)
            self._warn(f"the training ends: {self.stop_reason}.")
        elif (
            self.target is not None
            and bool((self.windows[f"{judge}_images"] > 0).all())
            and self._rate(judge) <= self.target
        ):
            self.values["end"].fill_(TARGET)

    def _reporting(self) -> tuple[str, str]:
        """Return the judge that is reported and its name in a sentence."""
        if self.has_held_out or self.windows["held_out_images"].sum() > 0:
            return "held_out", "the held-out judge"
        return "judge", "the judge"

    def _rate(self, judge: str) -> float:
        """Return the share of the last images of the concept's prompts with the concept."""
        found, images = (float(self.windows[f"{judge}_{n}"].sum()) for n in ("found", "images"))
        return found / max(images, 1.0)

    def _raise(self, name: str) -> None:
        value, bound = self.values[name], max(self.settings[name], LEAST) * BOUND
        value.copy_((value.clamp(min=LEAST) * FACTOR).clamp(max=bound))

    def _lower(self, name: str, bound: float) -> None:
        value = self.values[name]
        if value > bound:
            value.copy_((value / FACTOR).clamp(min=bound))

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, TrainingHealthWarning, stacklevel=4)


_MEANS = ("diversity", "alignment")
_FIGURES = {
    "diversity": "diversity",
    "alignment": "alignment_benign",
    "judge_found": "judge_unsafe_concept",
    "judge_images": "judge_unsafe_concept_n",
    "held_out_found": "held_out_unsafe_concept",
    "held_out_images": "held_out_unsafe_concept_n",
}
"""Figure of a rollout that each window stores; a rate is stored as a number of images."""
