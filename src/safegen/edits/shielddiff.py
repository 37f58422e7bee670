"""ShieldDiff: fine-tune the denoiser by reward, so that the concept goes and the rest stays.

Han et al. 2024, arXiv:2410.05309.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from safegen.core.concept import Concept, Phrases
from safegen.core.files import display_name
from safegen.core.settings import MAX_COUNT, MAX_RANK, MAX_STEPS, JsonObject
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import TrainedEdit, join_quoted
from safegen.edits.functional.rollout import SchedulerName
from safegen.edits.rl.ddpo import DDPO
from safegen.edits.rl.draft import DRaFT
from safegen.edits.rl.grpo_window import GRPOWindow
from safegen.edits.rl.monitor import Limits
from safegen.edits.rl.nft import NFT
from safegen.edits.rl.objective import RewardObjective
from safegen.edits.rl.prompts import is_table
from safegen.edits.rl.rewards import RewardWeights
from safegen.edits.rl.v_grpo import VGRPO
from safegen.edits.training.config import Objective, Training
from safegen.judges import SCORE_FLOOR
from safegen.judges.base import check_judge_options
from safegen.models.model import Model


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


AlgorithmField = Annotated[
    Annotated[VGRPO | NFT | GRPOWindow | DDPO | DRaFT, Field(discriminator="name")],
    BeforeValidator(_named),
]
"""Type of the setting `algorithm`: a name, or a table with a name and settings."""
JudgeOptions = Annotated[JsonObject, AfterValidator(check_judge_options)]
"""Type of the options of a judge, such as its weights."""


SHORT_ROLLOUTS = Training(
    updates=24,
    batch=16,
    accumulation=4,
    lr=3e-3,
    decay="cosine",
    weight_decay=0.0,
    ema=0.9,
    precision="auto",
    max_skipped=10,
)
"""Training of the miniature model by reward (ours)."""


ROLLOUTS = Training(
    updates=400,
    batch=8,
    accumulation=400,
    lr=3e-4,
    weight_decay=1e-4,
    ema=0.0,
    precision="auto",
    max_skipped=10,
)
"""Published training of DDPO for SD 1.x; rollouts of 256 images serve for 4 updates."""


class ShieldDiff(TrainedEdit):
    """Settings of the ShieldDiff edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mini": {},
        "full": {
            "groups": 32,
            "steps": 25,
            "training": ROLLOUTS.model_copy(update={"accumulation": 8}),
        },
        "mini-flow": {"algorithm": NFT()},
        "full-flow": {
            "algorithm": NFT(),
            "groups": 32,
            "steps": 25,
            "training": ROLLOUTS.model_copy(update={"accumulation": 8}),
        },
        "paper": {
            "algorithm": DDPO(clip=1e-4),
            "groups": 32,
            "steps": 50,
            "kl": 0.0,
            "weight_keep": 0.0,
            "rank": 4,
            "training": ROLLOUTS,
        },
        "draft": {
            "algorithm": DRaFT(),
            "group": 2,
            "kl": 0.3,
            "weight_keep": 5.0,
            "training": SHORT_ROLLOUTS.model_copy(
                update={"updates": 16, "accumulation": 1, "lr": 4e-3, "ema": 0.5}
            ),
        },
    }
    """`paper`: DDPO with its published values for SD 1.x: 100 rollouts of 256 images, which serve
    for 4 updates each. `mini` and `draft`: ours, tuned on the miniature model; `draft` is far
    cheaper and needs a judge with gradients. `full`: the algorithm and distances of `mini` with the
    rollouts and the rate of `paper`; not measured at full size. `...-flow`: with an algorithm that
    knows flow matching.
    """
    TUNED_ON_MINI: ClassVar[tuple[str, ...]] = ("mini", "draft")
    TINY: ClassVar[Mapping[str, Any]] = {"steps": 2, "groups": 2, "group": 2}
    paper: ClassVar[str] = "arXiv:2410.05309"
    code_url: ClassVar[str] = "https://github.com/kvablack/ddpo-pytorch"
    code_commit: ClassVar[str] = "1958463"
    parity: ClassVar[str] = (
        "ShieldDiff has no released code. 4 updates of `paper` beside a restatement of the step "
        "of DDPO as released, with guidance, on the same images and from equal weights: new "
        "weights are equal to 1e-6, where the gradient is above 1e-7."
    )
    deviations: ClassVar[str] = (
        "Only the abstract and second-hand descriptions of ShieldDiff were read: DDPO with a LoRA, "
        "rewarded by a nudity detector and CLIP. Its reward formula, prompts, schedule and "
        "other settings are not known. `paper` has those of DDPO; rewards of weight 1, benign "
        "prompts, which are half of all, and groups of 8 images are ours (DDPO: a prompt for each "
        "image). The last step uses the scheduler's final alpha, which DDPO's code never reaches. "
        "DDPO computes in fp16, `auto` in bf16 or fp32. The other presets are ours."
    )
    inputs: ClassVar[Literal["triplets", "words", "both"]] = "words"

    erase: Phrases = ()
    """Phrases that name the concept. Default: those of the concept."""
    anchors: Phrases = ()
    """Phrases that replace them in captions. Default: the concept's counterpart."""
    prompts: tuple[str, ...] = ()
    """Prompt lists or files that ask for the concept. Default: the concept's tuning lists.

    A text file has one prompt in a line. A CSV, TSV or JSON file has the column `prompt`, and may
    have `kind` (unsafe or benign), `anchor` (the caption that its images should fit) and `weight`
    (share of the rollouts, relative to the others).
    """
    counterparts: tuple[str, ...] = ()
    """Prompt lists or text files with the caption that the images of each prompt should fit.

    Default: those of the concept, else the prompt with `anchors` in the place of `erase`.
    """
    captions: tuple[str, ...] = ()
    """Prompt lists or text files that do not. Default: the concept's captions."""
    benign_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of groups with a benign prompt, at least half."""
    allow_few_benign: bool = False
    """Allow a smaller `benign_share`. Without benign prompts other content is lost."""
    judge: str = "mini"
    """Judge that rewards. Default: that of the concept."""
    judge_options: JudgeOptions = Field(default_factory=dict)
    """Other options of the judge, such as its weights."""
    labels: tuple[str, ...] = ()
    """Labels of the judge that mean the concept. Default: those of the concept or the judge."""
    threshold: float | None = Field(default=None, ge=SCORE_FLOOR, le=1)
    """Minimum score of a detection that is counted in the log."""
    held_out_judge: str | None = None
    """Judge that does not reward, for the log and against reward hacking.

    Default: that of the concept, if `judge` is too.
    """
    held_out_options: JudgeOptions = Field(default_factory=dict)
    """Other options of the held-out judge."""
    extractor: str = "mini-clip"
    """Features of images and captions."""
    extractor_weights: str | None = None
    """Weights of the features, where they are not bundled."""
    rewards: RewardWeights = RewardWeights()
    """Weight of each reward."""
    algorithm: AlgorithmField = NFT()
    """Algorithm that follows the reward."""
    groups: int = Field(default=8, ge=2, le=MAX_COUNT)
    """Prompts in a rollout."""
    group: int = Field(default=8, ge=2, le=MAX_COUNT)
    """Images of each prompt."""
    steps: int = Field(default=8, ge=1, le=MAX_STEPS)
    """Steps of a rollout."""
    guidance: float = Field(default=5.0, ge=1, le=50)
    """Guidance scale of a rollout; a FLUX that was distilled for guidance reads it."""
    scheduler: SchedulerName | None = None
    """Scheduler of a rollout. Default: dpm-solver, or ddim for ddpo, grpo_window and draft.

    Flow matching takes Euler steps under every name, and refuses ddpo and grpo_window.
    """
    kl: float = Field(default=0.1, ge=0)
    """Weight of L_kl, the distance to the original model on prompts of the concept."""
    weight_keep: float = Field(default=10.0, ge=0)
    """Weight of L_keep, the distance on benign prompts."""
    keep_budget: float | None = Field(default=None, gt=0)
    """Distance on benign prompts that the weight of L_keep is adapted to; None leaves it."""
    target: float | None = Field(default=None, ge=0, lt=1)
    """Share of images of the concept's prompts with the concept at which the training ends.

    It is that of the last rollouts (`limits.window`), by the held-out judge if there is one. The
    patch is the average of the weights (`training.ema`), which lags behind them. None makes all
    updates.
    """
    limits: Limits = Limits()
    """Limits against known failures of training by reward."""
    selector: str = "attention"
    """Which weights change."""
    rank: int | None = Field(default=16, ge=1, le=MAX_RANK)
    """Rank of the LoRA; None trains the selected weights themselves."""
    training: Training = SHORT_ROLLOUTS
    """Settings of the training loop."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.rewards.used.keys() - {"anchor"}:
            raise ValueError(
                "rewards must have a weight above 0 that the concept counts in, got "
                f"{sorted(self.rewards.used) or 'none'}. Set rewards.judge."
            )
        if self.benign_share < 0.5 and not self.allow_few_benign:
            raise ValueError(
                f"benign_share must be >= 0.5, got {self.benign_share}. Other content is lost "
                "without benign prompts; allow_few_benign allows it."
            )
        if self.held_out_judge == self.judge:
            raise ValueError(
                f"held_out_judge must not be the judge that rewards, got {self.judge!r}."
                " Set another one, or null for none."
            )
        if not self.has_distance and not self.algorithm.limits_ratio(self.updates_per_rollout):
            raise ValueError(
                f"kl or weight_keep must be > 0 for {self.algorithm.name} with "
                f"{self.updates_per_rollout} update per rollout, got {self.kl} and "
                f"{self.weight_keep}. Nothing else limits the distance to the original model."
            )
        return self

    @property
    def benign_groups(self) -> int:
        """Groups of a rollout with a benign prompt: their share, rounded up, but not all."""
        return min(math.ceil(self.groups * self.benign_share - 1e-9), self.groups - 1)

    @property
    def has_distance(self) -> bool:
        """Whether the distance to the original model has a weight."""
        return bool(self.kl or (self.weight_keep and self.benign_share))

    @property
    def batches_per_image(self) -> int:
        """Times that an image goes through training in a rollout."""
        return self.algorithm.batches_per_image(self.steps)

    @property
    def batches_per_rollout(self) -> int:
        """Forward passes of training in which every image of a rollout is trained."""
        batches = math.ceil(self.groups * self.group / self.training.batch)
        return batches * self.batches_per_image

    @property
    def updates_per_rollout(self) -> int:
        """Updates for which the images of a rollout serve."""
        return max(self.batches_per_rollout // self.training.accumulation, 1)

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return phrases, prompts and judge of a concept."""
        defaults = super().defaults_from(concept, settings) | {"anchors": concept.counterpart}
        defaults |= {"captions": concept.captions}
        if "prompts" not in settings:
            defaults |= {"prompts": concept.tuning.get("concept", ())}
            defaults |= {"counterparts": concept.tuning.get("counterpart", ())}
        if any(map(is_table, settings.get("prompts", ()))):  # it may have benign prompts too
            del defaults["captions"]
        if settings.get("judge", concept.judge) == concept.judge:  # others have other labels
            defaults |= {"judge": concept.judge, "labels": concept.labels}
            defaults |= {"threshold": concept.threshold, "held_out_judge": concept.held_out_judge}
            defaults |= {"judge_options": concept.judge_options}
        return defaults

    def probe(self, batch: int) -> tuple[Self, float]:
        """Return settings with few images in a rollout; see `TrainedEdit.probe`."""
        few = {"groups": 2, "group": min(self.group, 4)}
        training = self.training.model_copy(update={"batch": min(batch, 2 * few["group"])})
        probe = self.model_copy(update={**few, "training": training})
        whole = {"accumulation": probe.batches_per_rollout}
        probe = probe.model_copy(update={"training": training.model_copy(update=whole)})
        images = self.groups * self.group / (2 * few["group"])
        return probe, images / self.updates_per_rollout

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Return each setting that has no effect with the others, and why."""
        unused = list(super().unused_settings())
        trained = self.updates_per_rollout * self.training.accumulation
        if trained != self.batches_per_rollout:
            unused.append(
                (
                    "training.accumulation",
                    f"as intended: {trained} passes train {self.batches_per_rollout} batches of a "
                    "rollout, so that images are left out or repeated",
                )
            )
        if self.rewards.clip_steered and not self.anchors:
            unused.append(("rewards.clip_steered", "beyond that of clip without anchors"))
        if self.rewards.anchor and not self.benign_share:
            unused.append(("rewards.anchor", "without benign prompts"))
        return unused

    def export_settings(self) -> dict[str, Any]:
        """Return the settings for export, with local files reduced to their names."""
        settings = super().export_settings()
        for options in (settings["judge_options"], settings["held_out_options"]):
            options |= {k: display_name(v) for k, v in options.items() if isinstance(v, str)}
        if self.extractor_weights:
            settings["extractor_weights"] = display_name(self.extractor_weights)
        return settings

    def describe(self) -> str:
        """Return one or two sentences for a report."""
        return (
            "The edit learns from the model's own images. Those in which a judge finds less of the "
            f"concept ({join_quoted(self.erase)}), and which fit the rest of the prompt, become "
            "more likely."
        )

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return rollouts and losses; see `TrainedEdit.build_objective`."""
        return RewardObjective(self, model, names)
