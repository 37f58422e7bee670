"""The objective of a training by reward: rollouts, rewards and the losses of an algorithm."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safegen.core.errors import ConfigError, DivergedError
from safegen.core.processes import gather_objects, gather_rows, process_share
from safegen.edits.rl.algorithm import DenoisingPolicy, RolloutBatch, UsesReward
from safegen.edits.rl.figures import rollout_figures
from safegen.edits.rl.monitor import Monitor
from safegen.edits.rl.prompts import draw_prompts, read_training_prompts
from safegen.edits.rl.rewarder import NAN, DifferentiableReward, Rewarder, gather_images
from safegen.edits.rl.rewards import REWARDS
from safegen.edits.training.config import LogRow
from safegen.edits.training.shares import Draws, share_batches
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
        last, processes = edit.groups * edit.group % edit.training.batch, process_share()[1]
        if 0 < last < processes:
            raise ConfigError(
                f"training.batch must leave at least {processes} images, one for each process, for "
                f"the last batch of a rollout, got {edit.training.batch}, which leaves {last} of "
                f"{edit.groups * edit.group}. Choose a divisor."
            )
        self.prompts = read_training_prompts(
            edit.prompts,
            edit.captions,
            edit.counterparts,
            erase=edit.erase,
            anchors=edit.anchors,
            allow_no_benign=edit.allow_few_benign,
        )
        self.policy = DenoisingPolicy(
            model,
            names,
            [prompt.text for prompt in self.prompts],
            steps=edit.steps,
            guidance=edit.guidance,
            scheduler=edit.scheduler or edit.algorithm.scheduler,
            precision=edit.training.precision,
            has_distance=edit.has_distance,
        )
        self.rewarder = Rewarder(edit, self.prompts, model.size)
        self.algorithm = edit.algorithm.build(
            self.policy, edit.groups, edit.group, updates=edit.updates_per_rollout
        )
        if isinstance(self.algorithm, UsesReward):
            self.algorithm.set_reward(DifferentiableReward(edit, model, self.rewarder))
        self.monitor = Monitor(
            edit.kl,
            edit.weight_keep,
            budget=edit.keep_budget,
            target=edit.target,
            limits=edit.limits,
            has_held_out=self.rewarder.held_out is not None,
            needs_variance=self.algorithm.follows_advantages,
        )
        self.prompt_weights = torch.tensor([prompt.weight for prompt in self.prompts])
        self.batch: RolloutBatch | None = None
        self.figures: dict[str, float] = {}
        self.sums: dict[str, list[float]] = {}
        self._updates = 0

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Prompts and judges, for the patch and the fingerprint of checkpoints."""
        benign = sum(prompt.benign for prompt in self.prompts)
        digest = hashlib.sha256(repr(self.prompts).encode()).hexdigest()
        judges = {"judge": self.rewarder.judge.id}
        if self.rewarder.held_out:
            judges["held_out"] = self.rewarder.held_out.id
        counts = {"concept": len(self.prompts) - benign, "benign": benign, "sha256": digest}
        extractor = self.rewarder.extractor.id
        return {"training_prompts": counts, "judges": judges, "extractor": extractor}

    @property
    def stop_reason(self) -> str | None:
        """Why the training ends; None if it goes on."""
        return self.monitor.stop_reason

    @property
    def weights(self) -> Mapping[str, float]:
        """Weights of the loss terms; the monitor adapts those of the distances."""
        return {"L_policy": 1.0, "L_kl": self.monitor.kl, "L_keep": self.monitor.keep}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Tensors besides the weights that training changes."""
        values = {f"monitor/{name}": value for name, value in self.monitor.state.items()}
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
        step = micro_step % (edit.updates_per_rollout * edit.training.accumulation)
        if step == 0 or self.batch is None:
            self._roll_out(denoiser, generator)
        assert self.batch is not None
        part, index = divmod(step % edit.batches_per_rollout, edit.batches_per_image)
        images = torch.arange(edit.groups * edit.group).split(edit.training.batch)
        rows = images[part][share[0] :: share[1]]
        batch = self.batch.rows(rows)
        terms = self.algorithm.loss(denoiser, batch, index)
        device, finite = terms.kl.device, batch.extra["finite"]
        benign = self.rewarder.benign[batch.prompts]
        self.sums.setdefault("benign", []).extend((finite & benign).float().tolist())
        for name, value in terms.figures.items():
            self.sums.setdefault(name, []).extend(value.flatten()[finite.to(value.device)].tolist())
        used = finite
        if self.algorithm.follows_advantages:  # a masked image and an equal group teach nothing
            used = finite & (batch.advantages != 0)
        weight = len(images[part]) * len(images) / (edit.groups * edit.group)  # the last is smaller
        return {
            "L_policy": weight * torch.where(used.to(device), terms.policy, 0.0),
            "L_kl": weight * torch.where((finite & ~benign).to(device), terms.kl, 0.0),
            "L_keep": weight * torch.where((finite & benign).to(device), terms.kl, 0.0),
        }

    def after_update(self, row: LogRow) -> None:
        """Add the figures of the rollout and of the update to a log row, and adapt weights."""
        self.sums = _merge_lists(gather_objects(self.sums))
        self.policy.count_passes()
        ratio = self.sums.pop("ratio", [])
        if ratio:
            row["ratio"] = sum(ratio) / len(ratio)
            row["ratio_deviation"] = max(abs(value - 1) for value in ratio)
        benign = self.sums.pop("benign", [])
        row |= {name: sum(values) / len(values) for name, values in self.sums.items() if values}
        self.sums.clear()
        self._updates = int(row["update"])
        trained = {name: p.detach() for name, p in self.policy.trained.items()}
        row |= self.algorithm.after_update(trained)
        row |= {"weight_kl": self.monitor.kl, "weight_keep": self.monitor.keep}
        row |= self.figures | {"passes": self.policy.passes}
        if "L_keep" in row and any(benign):  # a skipped update has no losses
            self.monitor.follow_distance(row["L_keep"] * len(benign) / sum(benign))

    @torch.no_grad()
    def _roll_out(self, denoiser: nn.Module, generator: torch.Generator) -> None:
        """Draw images of some prompts, reward them, and compute their advantages.

        Raises:
            ConfigError: the judge can judge no image, or no first rollout teaches anything.
            DivergedError: no image is finite.
        """
        edit, self.batch, self.figures = self.edit, None, {}
        groups = torch.arange(edit.groups).repeat_interleave(edit.group)
        prompts = self._choose_prompts(generator)[groups]
        noise = torch.randn(len(groups), *self.policy.sampler.shape, generator=generator)
        own = torch.cat(share_batches(len(groups), edit.training.batch))
        latents, extra = self._draw(denoiser, noise, prompts, generator)
        finite = latents.flatten(1).isfinite().all(1)
        if not finite.any():
            raise DivergedError("the images of a rollout are not finite. Lower training.lr.")
        for value in (latents, *filter(torch.is_floating_point, extra.values())):
            value[~finite] = 0.0
        base = None
        if edit.rewards.anchor:
            base = self._draw_base(denoiser, noise[own], prompts[own])
        judged = self.rewarder.read(self.model, latents[own], prompts[own], finite[own], base)
        judged = gather_images(judged, own, len(groups))
        inputs, weights = judged.inputs, edit.rewards.used
        rewards = {name: REWARDS[name](inputs).masked_fill(~finite, NAN) for name in weights}
        if not torch.stack([value.isfinite() for value in rewards.values()]).all(0).any():
            raise ConfigError(
                f"judge must be able to judge the images, and {edit.judge!r} cannot: "
                f"{judged.unjudged or 'a reward is not finite'}. Use another judge."
            )
        values, varies = self.algorithm.advantages(rewards, weights, prompts, groups)
        self.figures = rollout_figures(inputs, rewards, groups, varies, judged.verdicts)
        self.monitor.follow_rollout(self.figures)
        self.figures["rollout"] = float(self.monitor.values["rollouts"])
        batch = RolloutBatch(prompts, groups, latents, values, extra | {"finite": finite})
        trained = edit.updates_per_rollout * edit.training.accumulation
        if edit.updates_per_rollout > 1 or trained != edit.batches_per_rollout:
            # before `prepare`, which sees the batches of training
            batch = batch.rows(torch.randperm(len(groups), generator=generator))
        has_keep = (self.monitor.keep > 0 or edit.keep_budget is not None) and bool(
            inputs.benign.any()
        )
        self.policy.has_distance = self.monitor.kl > 0 or has_keep
        self.algorithm.prepare(denoiser, batch, edit.training.batch, generator)
        self.batch = batch

    def _draw(
        self, denoiser: nn.Module, noise: Tensor, prompts: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the latents of a rollout and the tensors of the algorithm, on the CPU.

        Each process draws its share of every batch, and all get all.
        """
        parts, extras, n = [], [], len(noise)
        batches, own = torch.arange(n).split(self.edit.training.batch), []
        for batch, rows in zip(batches, share_batches(n, self.edit.training.batch), strict=True):
            text = self.policy.text[prompts[rows].to(self.policy.device)]
            x = noise[rows].to(self.policy.device)
            draws = Draws(generator, rows - batch[0], len(batch))
            latents, extra = self.algorithm.rollout(denoiser, x, text, draws)
            parts.append(latents.float().cpu())
            extras.append(extra)
            own.append(rows)
        tensors = {name: torch.cat([e[name] for e in extras]) for name in extras[0]}
        tensors["latents"], places = torch.cat(parts), torch.cat(own)
        tensors = {name: gather_rows(value, places, n) for name, value in tensors.items()}
        return tensors.pop("latents"), tensors

    def _draw_base(self, denoiser: nn.Module, noise: Tensor, prompts: Tensor) -> Tensor:
        """Return the original model's latents of the benign prompts from the same noise."""
        policy, parts = self.policy, []
        benign = self.rewarder.benign[prompts].nonzero()[:, 0]
        if not len(benign):
            return noise[:0]
        for rows in benign.split(self.edit.training.batch):
            text = policy.text[prompts[rows].to(policy.device)]
            x = noise[rows].to(policy.device)
            latents = policy.draw(denoiser, x, text, tensors=policy.reference)
            parts.append(latents.float().cpu())
        return torch.cat(parts)

    def _choose_prompts(self, generator: torch.Generator) -> Tensor:
        """Return the prompt of each group; see `ShieldDiff.benign_groups`."""
        benign, chosen = self.rewarder.benign, []
        count = self.edit.benign_groups if benign.any() else 0
        for rows, size in ((~benign, self.edit.groups - count), (benign, count)):
            index = rows.nonzero()[:, 0]
            if size:
                numbers = draw_prompts(self.prompt_weights[index], size, generator)
                chosen.append(index[numbers])
        return torch.cat(chosen)


def _merge_lists(parts: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Return the values of all processes by name."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [value for part in parts for value in part.get(name, [])] for name in names}
