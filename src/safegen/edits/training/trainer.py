"""The training loop of all trained edits. An edit contributes batches and losses only."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from safegen.core.errors import DivergedError, InterruptedRunError
from safegen.core.processes import (
    gather_objects,
    is_main_process,
    joint_errors,
    process_share,
    sum_gradients,
    sum_values,
    without_launcher,
)
from safegen.edits.training.check import check_new_weights, check_training
from safegen.edits.training.checkpoint import (
    CheckpointState,
    claim_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from safegen.edits.training.config import (
    FollowsUpdates,
    HasValidation,
    LimitsCheckpoints,
    LogRow,
    Objective,
    Training,
    TrainingCallback,
    TrainResult,
    UsesEma,
    memory_errors,
    training_state,
    warn_unused,
)
from safegen.edits.training.interruption import interruption
from safegen.edits.training.micro_steps import compute_losses, forward_passes
from safegen.edits.training.network import prepared_network
from safegen.edits.training.shares import check_fingerprints, means_of_all


def train(
    denoiser: nn.Module,
    names: Sequence[str],
    objective: Objective,
    config: Training,
    *,
    fingerprint: str,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    callback: TrainingCallback | None = None,
) -> TrainResult:
    """Train some parameters and return their averaged values; `denoiser` is restored bit for bit.

    The processes of a `shared_job` share every batch. Each computes the gradient of its samples,
    the sum of all is that of the whole batch, and all end with the same weights. The first process
    writes checkpoint and log.

    Args:
        denoiser: the network.
        names: parameters to train; no others get gradients.
        objective: batches and losses.
        config: settings of the loop.
        fingerprint: identifies data and settings of the objective, for checkpoints.
        checkpoint_dir: directory for checkpoint and log. Default: none are written.
        resume: continue from the checkpoint; on a CPU the result is equal bit for bit.
        callback: called after every update, on every process; it may end the training.

    Raises:
        ConfigError: see `check_training`, memory does not suffice for a batch, or a process has
            other settings, data or weights.
        FileError: there is no checkpoint to resume, it is damaged, or of another objective.
        DivergedError: a loss, a gradient or a new weight is not finite.
        InterruptedRunError: SIGINT or SIGTERM arrived, at any process; with a directory, a
            checkpoint was written.

    Warns:
        UnusedSettingWarning: a setting of `config` has no effect.
    """
    config = config.resolve(denoiser)
    check_training(denoiser, names, config, checkpoint_dir=checkpoint_dir, resume=resume)
    warn_unused(
        config.unused_settings(
            checkpoints=checkpoint_dir is not None, validation=isinstance(objective, HasValidation)
        )
    )
    with prepared_network(denoiser, names, config) as trained:
        trainer = Trainer(
            denoiser, trained, objective, config, fingerprint, checkpoint_dir, callback
        )
        check_fingerprints(trainer.fingerprint)
        with claim_checkpoints(checkpoint_dir if is_main_process() else None):
            return trainer.fit(resume=resume)


class Trainer:
    """State of one training: optimizer, weight average, step counter and log."""

    def __init__(
        self,
        denoiser: nn.Module,
        trained: Mapping[str, nn.Parameter],
        objective: Objective,
        config: Training,
        fingerprint: str,
        checkpoint_dir: Path | None,
        callback: TrainingCallback | None,
    ) -> None:
        # The precision of accelerate is a process-wide singleton unless it is reset.
        AcceleratorState._reset_state(reset_partial_state=True)
        self.device = next(iter(trained.values())).device
        with without_launcher():  # processes share batches, and accelerate has one
            self.accelerator = Accelerator(
                device_placement=False,
                mixed_precision="no" if config.precision == "fp32" else config.precision,
                cpu=self.device.type == "cpu",
            )
        self.trained, self.objective, self.config = trained, objective, config
        self.checkpoint_dir, self.callback = checkpoint_dir, callback
        settings = config.model_dump_json(exclude={"checkpoint_every"})
        self.fingerprint = f"{fingerprint} {settings}"
        optimizer = torch.optim.AdamW(
            trained.values(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            eps=1e-8,
            fused=config.precision != "fp16",
        )
        self.denoiser, self.optimizer = self.accelerator.prepare(denoiser, optimizer)
        ramp = {} if config.ema_ramp else {"min_decay": config.ema, "update_after_step": -1}
        parameters = list(trained.values())
        average: Any = {"decay": config.ema, "foreach": True, **ramp}
        self.ema = EMAModel(parameters, **average) if config.ema else None
        self.state = training_state(objective)
        self.update, self.seconds, self.skipped = 0, 0.0, 0
        self.best_loss, self.validations_without_gain = math.inf, 0
        self.log: list[LogRow] = []
        if isinstance(objective, UsesEma):
            objective.set_ema(self._ema_weights)

    def _ema_weights(self) -> dict[str, Tensor]:
        values = self.ema.shadow_params if self.ema else list(self.trained.values())
        return {name: value.detach() for name, value in zip(self.trained, values, strict=True)}

    def fit(self, *, resume: bool) -> TrainResult:
        """Run all updates and return the averaged weights and the log."""
        if resume and self.checkpoint_dir:
            self._load_checkpoint(self.checkpoint_dir)
        start = time.perf_counter() - self.seconds
        stop_early, is_due = self._is_over(), False
        with interruption() as interrupted:
            while self.update < self.config.updates and not stop_early:
                with memory_errors(self.config):
                    row = self._training_update()
                self.update += 1
                self.seconds = time.perf_counter() - start
                row |= {"update": self.update, "seconds": round(self.seconds, 3)}
                if self.config.validate_every and self.update % self.config.validate_every == 0:
                    self._validate(row)
                if isinstance(self.objective, FollowsUpdates):
                    self.objective.after_update(row)
                self.log.append(row)
                stop = bool(self.callback and self.callback(self.update, self.config.updates, row))
                is_stopped, is_interrupted = map(bool, sum_values([stop, interrupted()]))
                stop_early = self._is_over() or is_stopped
                is_last = stop_early or self.update == self.config.updates
                is_due |= self.update % self.config.checkpoint_every == 0
                if not (is_last or self._can_stop()):
                    continue
                if self.checkpoint_dir and (is_last or is_interrupted or is_due):
                    self._save_checkpoint(self.checkpoint_dir)
                    is_due = False
                if is_interrupted and not is_last:
                    saved = "Nothing was saved, as there is no checkpoint directory."
                    if self.checkpoint_dir:
                        saved = f"Resume (--resume) continues from {self.checkpoint_dir}."
                    raise InterruptedRunError(
                        f"stopped after update {self.update} of {self.config.updates}. {saved}"
                    )
        tensors = {name: value.clone() for name, value in self._ema_weights().items()}
        check_new_weights(tensors, self.config)
        return TrainResult(
            tensors=tensors,
            log=self.log,
            seconds=self.seconds,
            stopped_early=stop_early,
            stop_reason=self._stop_reason(),
        )

    def _training_update(self) -> LogRow:
        """Update the weights once and return the log row; see `Training.max_skipped`."""
        config, lr = self.config, self.config.lr * self.config.lr_factor(self.update)
        try:
            with joint_errors(), memory_errors(config):  # all get the message with the way out
                row, norm = self._accumulate_gradients()
        except DivergedError as error:
            if not config.max_skipped:
                raise
            if self.skipped >= config.max_skipped:
                raise self._give_up(error) from error
            self.skipped += 1
            self.optimizer.zero_grad(set_to_none=True)
            return {"lr": lr, "skipped": 1.0}
        self.skipped = 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.step(list(self.trained.values()))
        return row | {"lr": lr, "norm": norm}

    def _give_up(self, error: DivergedError) -> DivergedError:
        """Save the last weights, which are finite, and return the error of the whole training."""
        message = f"{error} {self.skipped} updates before it were skipped."
        if not self.checkpoint_dir:
            return DivergedError(message)
        self.skipped = 0
        if all(bool(p.isfinite().all()) for p in self.trained.values()):
            self._save_checkpoint(self.checkpoint_dir)
        final = DivergedError(
            f"{message} The checkpoint in {self.checkpoint_dir} stays; resume (--resume) skips as "
            "many again."
        )
        final.is_resumable = True
        return final

    def _accumulate_gradients(self) -> tuple[LogRow, float]:
        """Return the loss terms of one update and the norm of its gradient, before clipping."""
        config, accelerator, share = self.config, self.accelerator, process_share()
        self.denoiser.train()
        row: LogRow = {}
        advice = f"Lower lr ({config.lr}) or use precision fp32."
        for steps in forward_passes(self.objective, config, self.update):
            part = len(steps) / config.accumulation
            with accelerator.autocast():
                terms = compute_losses(self.objective, self.denoiser, steps, config.seed, share)
            loss = torch.zeros((), device=self.device)
            for name, (own, mean) in means_of_all(terms).items():
                if not math.isfinite(mean):
                    raise DivergedError(
                        f"the loss {name!r} is {mean} at update {self.update + 1}. {advice}"
                    )
                loss = loss + self.objective.weights[name] * own
                row[name] = row.get(name, 0.0) + mean * part
            accelerator.backward(loss * part)
        sum_gradients(self.trained.values())
        norm = accelerator.clip_grad_norm_(list(self.trained.values()), config.clip)
        if not math.isfinite(float(norm)) and accelerator.scaler is None:
            raise DivergedError(f"the gradient is not finite at update {self.update + 1}. {advice}")
        return row, float(norm)

    def _validate(self, row: LogRow) -> None:
        """Add the validation loss to a log row and count validations without a lower one."""
        if not isinstance(self.objective, HasValidation):
            return
        self.denoiser.eval()
        with torch.no_grad(), self.accelerator.autocast(), self._ema_scope():
            loss = gather_objects(self.objective.validation_loss(self.denoiser))[0]
        row["validation_loss"] = loss
        gained = loss < self.best_loss
        self.validations_without_gain = 0 if gained else self.validations_without_gain + 1
        self.best_loss = min(self.best_loss, loss)

    @contextmanager
    def _ema_scope(self) -> Iterator[None]:
        """Put the averaged weights, which become the patch, into the network inside the block."""
        current = {name: p.data for name, p in self.trained.items()}
        try:
            for name, value in self._ema_weights().items():
                self.trained[name].data = value
            yield
        finally:
            for name, value in current.items():
                self.trained[name].data = value

    def _is_over(self) -> bool:
        out_of_patience = 0 < self.config.patience <= self.validations_without_gain
        return out_of_patience or self._stop_reason() is not None

    def _stop_reason(self) -> str | None:
        objective = self.objective
        return objective.stop_reason if isinstance(objective, FollowsUpdates) else None

    def _can_stop(self) -> bool:
        if self.checkpoint_dir and isinstance(self.objective, LimitsCheckpoints):
            return self.objective.can_checkpoint
        return True

    def _save_checkpoint(self, directory: Path) -> None:
        if not is_main_process():
            return
        tensors = {f"state/{name}": value for name, value in self.state.items()}
        for i, (name, p) in enumerate(self.trained.items()):
            zeros: Any = torch.zeros_like(p)
            initial = {"exp_avg": zeros, "exp_avg_sq": zeros, "step": zeros.new_zeros(())}
            moments = self.optimizer.state.get(p) or initial
            tensors[f"weight/{name}"] = p.detach()
            tensors[f"exp_avg/{name}"] = moments["exp_avg"]
            tensors[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"]
            tensors[f"step/{name}"] = torch.as_tensor(moments["step"]).reshape(1)
            if self.ema:
                tensors[f"ema/{name}"] = self.ema.shadow_params[i]
        scaler = self.accelerator.scaler
        state = CheckpointState(
            update=self.update,
            seconds=self.seconds,
            best_loss=self.best_loss if math.isfinite(self.best_loss) else None,
            validations_without_gain=self.validations_without_gain,
            skipped=self.skipped,
            processes=process_share()[1],
            scaler=scaler.state_dict() if scaler else None,
        )
        write_checkpoint(directory, tensors, state, self.log, fingerprint=self.fingerprint)

    def _load_checkpoint(self, directory: Path) -> None:
        fits: Any = {"trained": self.trained, "objective": self.state, "ema": self.ema is not None}
        tensors, state, rows = read_checkpoint(directory, fingerprint=self.fingerprint, **fits)
        for i, (name, p) in enumerate(self.trained.items()):
            with torch.no_grad():
                p.copy_(tensors[f"weight/{name}"])
            moments = {k: tensors[f"{k}/{name}"].to(p.device) for k in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": tensors[f"step/{name}"][0].to(p.device), **moments}
            if self.ema:
                self.ema.shadow_params[i] = tensors[f"ema/{name}"].to(p.device)
        for name, value in self.state.items():
            value.copy_(tensors[f"state/{name}"])
        if self.accelerator.scaler and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.update, self.seconds, self.skipped = state.update, state.seconds, state.skipped
        self.best_loss = math.inf if state.best_loss is None else state.best_loss
        self.validations_without_gain = state.validations_without_gain
        self.log = [row for row in rows if row["update"] <= self.update]
        if self.ema:  # its decay rises with its steps, and a skipped update has none
            self.ema.optimization_step = sum("skipped" not in row for row in self.log)
