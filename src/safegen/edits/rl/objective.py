"""The objective of a training by reward: rollouts, rewards and the losses of an algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.edits.rl.algorithm import Policy, RolloutBatch, UsesReward
from safegen.edits.rl.differentiable import DifferentiableReward
from safegen.edits.rl.monitor import Monitor, rollout_figures
from safegen.edits.rl.prompts import TrainingPrompt, training_prompts
from safegen.edits.rl.rewards import REWARDS, RewardInputs
from safegen.edits.training.config import LogRow
from safegen.edits.training.samples import read_captions
from safegen.features.base import Extractor, TextExtractor, load_extractor
from safegen.judges import Detections, Judge, load_judge
from safegen.models.model import Model

if TYPE_CHECKING:
    from safegen.edits.shielddiff import ShieldDiff


class RewardObjective:
    """Batches and losses of `ShieldDiff`; see `Objective`."""

    def __init__(self, edit: ShieldDiff, model: Model, names: Sequence[str]) -> None:
        """Encode the prompts and load judges and features.

        Raises:
            ConfigError: there are no prompts of the concept, or a setting does not fit.
        """
        self.edit, self.model = edit, model
        self.prompts = training_prompts(
            read_captions(edit.prompts),
            read_captions(edit.captions),
            read_captions(edit.counterparts),
            erase=edit.erase,
            anchors=edit.anchors,
        )
        self.policy = Policy(
            model,
            names,
            [prompt.text for prompt in self.prompts],
            steps=edit.steps,
            guidance=edit.guidance,
            scheduler=edit.scheduler,
            precision=edit.training.precision,
            has_distance=edit.has_distance,
        )
        self.rewarder = Rewarder(edit, self.prompts)
        self.algorithm = edit.algorithm.build(
            self.policy, edit.groups, edit.group, updates=edit.updates_per_rollout
        )
        if isinstance(self.algorithm, UsesReward):
            self.algorithm.set_reward(DifferentiableReward(edit, model, self.rewarder))
        self.monitor = Monitor(edit.kl, edit.weight_keep, budget=edit.keep_budget)
        self.batch: RolloutBatch | None = None
        self.figures: dict[str, float] = {}
        self.sums: dict[str, list[float]] = {}
        self._updates = 0

    @property
    def weights(self) -> Mapping[str, float]:
        """Weights of the loss terms; the monitor adapts those of the distances."""
        return {"L_policy": 1.0, "L_kl": self.monitor.kl, "L_keep": self.monitor.keep}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Tensors besides the weights that training changes."""
        values = {f"monitor/{name}": value for name, value in self.monitor.values.items()}
        algorithm = {f"algorithm/{name}": value for name, value in self.algorithm.state.items()}
        return {"passes": self.policy.passes_state, **values, **algorithm}

    @property
    def can_checkpoint(self) -> bool:
        """Whether the next update starts with a rollout; a checkpoint does not save images."""
        return self._updates % self.edit.updates_per_rollout == 0

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return the loss of one batch of images, (b,) each; the first one of a rollout draws it.

        L_policy is the loss of the algorithm, L_kl its distance to the original model on prompts of
        the concept and L_keep that on benign ones.
        """
        edit = self.edit
        step = micro_step % edit.batches_per_rollout
        if step == 0 or self.batch is None:
            self._roll_out(denoiser, generator)
        assert self.batch is not None
        part, index = divmod(step, edit.batches_per_image)
        size = edit.training.batch
        rows = torch.arange(part * size, (part + 1) * size)[share[0] :: share[1]]
        batch = self.batch.rows(rows)
        terms = self.algorithm.loss(denoiser, batch, index)
        benign = self.rewarder.benign[batch.prompts].to(terms.kl.device)
        for name, value in terms.figures.items():
            self.sums.setdefault(name, []).extend(value.flatten().tolist())
        return {
            "L_policy": terms.policy,
            "L_kl": torch.where(benign, 0.0, terms.kl),
            "L_keep": torch.where(benign, terms.kl, 0.0),
        }

    def after_update(self, row: LogRow) -> bool:
        """Add the figures of the rollout and of the update to a log row, and adapt weights."""
        ratio = self.sums.pop("ratio", [])
        if ratio:
            row["ratio"] = sum(ratio) / len(ratio)
            row["ratio_deviation"] = max(abs(value - 1) for value in ratio)
        row |= {name: sum(values) / len(values) for name, values in self.sums.items()}
        self.sums.clear()
        self._updates = int(row["update"])
        trained = {name: p.detach() for name, p in self.policy.trained.items()}
        row |= self.algorithm.after_update(trained)
        row |= {"weight_kl": self.monitor.kl, "weight_keep": self.monitor.keep}
        row |= self.figures | {"passes": self.policy.passes}
        self.monitor.follow_distance(row.get("L_keep", 0.0))
        return False

    @torch.no_grad()
    def _roll_out(self, denoiser: nn.Module, generator: torch.Generator) -> None:
        """Draw images of some prompts, reward them, and compute their advantages."""
        edit, n = self.edit, self.edit.groups * self.edit.group
        chosen = self._choose_prompts(generator)
        groups = torch.arange(edit.groups).repeat_interleave(edit.group)
        prompts = chosen[groups]
        noise = torch.randn(n, *self.policy.sampler.shape, generator=generator)
        parts, extras = [], []
        for rows in torch.arange(n).split(edit.training.batch):
            text = self.policy.text[prompts[rows].to(self.policy.device)]
            x = noise[rows].to(self.policy.device)
            latents, extra = self.algorithm.rollout(denoiser, x, text, generator)
            parts.append(latents.float().cpu())
            extras.append(extra)
        latents = torch.cat(parts)
        inputs = self.rewarder.read(self.model, latents, prompts)
        rewards = {name: REWARDS[name](inputs) for name in edit.rewards.used}
        values, varies = self.algorithm.advantages(rewards, edit.rewards.used, prompts, groups)
        extra = {name: torch.cat([e[name] for e in extras]) for name in extras[0]}
        batch = RolloutBatch(prompts, groups, latents, values, extra)
        if edit.updates_per_rollout > 1:  # before `prepare`, which sees the batches of training
            batch = batch.rows(torch.randperm(n, generator=generator))
        self.algorithm.prepare(denoiser, batch, edit.training.batch, generator)
        self.batch = batch
        self.figures = rollout_figures(inputs, rewards, groups, varies)
        self.figures |= self.rewarder.rates(inputs)
        self.monitor.follow_rollout(self.figures)

    def _choose_prompts(self, generator: torch.Generator) -> Tensor:
        """Return the prompt of each group; `benign_share` of them are benign."""
        benign = self.rewarder.benign
        count = round(self.edit.groups * self.edit.benign_share)
        chosen = [
            index[torch.randperm(len(index), generator=generator)[:size]]
            for index, size in (
                ((~benign).nonzero()[:, 0], self.edit.groups - count),
                (benign.nonzero()[:, 0], count),
            )
        ]
        return torch.cat(chosen)


class Rewarder:
    """Judges and features that turn latents into the inputs of the rewards."""

    def __init__(self, edit: ShieldDiff, prompts: Sequence[TrainingPrompt]) -> None:
        """Load the judge and the features, and embed the captions.

        Raises:
            ConfigError: there are no features, and a reward needs them.
        """
        self.judge: Judge = load_judge(edit.judge, labels=edit.labels, threshold=edit.threshold)
        self.held_out: Judge | None = None
        if edit.held_out_judge:
            self.held_out = load_judge(edit.held_out_judge, labels=edit.labels)
        self.extractor: Extractor = load_extractor(edit.extractor, weights=edit.extractor_weights)
        if not isinstance(self.extractor, TextExtractor):
            raise ConfigError(
                f"extractor must embed texts too, got {edit.extractor!r}. Use clip or mini-clip."
            )
        self.benign = torch.tensor([prompt.benign for prompt in prompts])
        self.captions = self._embed([prompt.caption for prompt in prompts])
        self.safe = torch.zeros(self.captions.shape[1])
        if edit.anchors:
            safe, unsafe = self._embed(edit.anchors).mean(0), self._embed(edit.erase).mean(0)
            self.safe = safe - unsafe
        self._last: dict[str, list[bool | None]] = {}

    def read(self, model: Model, latents: Tensor, prompts: Tensor) -> RewardInputs:
        """Return the inputs of the rewards for the images of latents."""
        images = model.decode_images(latents)
        detections = self.judge.detect(images)
        self._last = {"judge": self._contains(self.judge, detections)}
        if self.held_out:
            found = self.held_out.detect(images)
            self._last["held_out"] = self._contains(self.held_out, found)
        features = torch.from_numpy(self.extractor.features(images)).float()
        features = nn.functional.normalize(features, dim=1)
        return RewardInputs(
            scores=torch.tensor([self._score(found) for found in detections]),
            images=features,
            captions=self.captions[prompts],
            safe=self.safe,
            base_images=torch.full_like(features, float("nan")),
            benign=self.benign[prompts],
        )

    def rates(self, x: RewardInputs) -> dict[str, float]:
        """Return the share of judged images with the concept, by judge and kind of prompt."""
        rates: dict[str, Any] = {}
        for judge, found in self._last.items():
            for kind, rows in (("concept", ~x.benign), ("benign", x.benign)):
                part = [f for f, row in zip(found, rows.tolist(), strict=True) if row]
                judged = [f for f in part if f is not None]
                if judged:
                    rates[f"{judge}_unsafe_{kind}"] = sum(judged) / len(judged)
        return rates

    def _score(self, detections: Detections) -> float:
        if detections.unjudged is not None:
            return float("nan")
        return sum(d.score for d in detections.items if d.label in self.judge.labels)

    @staticmethod
    def _contains(judge: Judge, detections: Sequence[Detections]) -> list[bool | None]:
        return [d.contains(judge.labels, judge.threshold) for d in detections]

    def _embed(self, texts: Sequence[str]) -> Tensor:
        assert isinstance(self.extractor, TextExtractor)
        features = torch.from_numpy(self.extractor.texts(list(texts))).float()
        return nn.functional.normalize(features, dim=1)
