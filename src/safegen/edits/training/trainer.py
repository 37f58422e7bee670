"""The one training loop.

A method brings batches and losses; everything else about training is here.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from safegen.core.errors import ConfigError, DivergedError, InterruptedRunError
from safegen.edits.training.checkpoint import check_resumable, read_checkpoint, write_checkpoint
from safegen.edits.training.config import (
    HasValidation,
    LogRow,
    Objective,
    Training,
    TrainingCallback,
    TrainResult,
    UsesEma,
)

__all__ = [
    "UsesEma",
    "HasValidation",
    "Objective",
    "TrainingCallback",
    "LogRow",
    "TrainResult",
    "Training",
    "check",
    "train",
]


def train(
    denoiser: nn.Module,
    names: Sequence[str],
    problem: Objective,
    settings: Training,
    *,
    folder: Path | None = None,
    resume: bool = False,
    callback: TrainingCallback | None = None,
) -> TrainResult:
    """Train the parameters called `names` and return their averaged values; `denoiser` is given back bit for bit as it came.

    Args:
        denoiser: the network; only `names` get gradients.
        names: parameters to train.
        problem: batches and losses.
        settings: how.
        folder: where checkpoint and log go; none are kept when None.
        resume: continue from the folder's checkpoint, on a CPU bit for bit as if never stopped.
        callback: called after every update.

    Raises:
        ConfigError: a setting would have no effect.
        FileError: nothing to resume, or the checkpoint is another problem's or damaged.
        DivergedError: a loss, a gradient or a new weight is not finite; the last checkpoint stays.
        Stopped: SIGINT or SIGTERM came; the state was saved if there is a folder.
    """
    settings = settings.resolve(denoiser)
    check(denoiser, names, settings, folder=folder, resume=resume)
    if settings.validate_every and not isinstance(problem, HasValidation):
        raise ConfigError(
            "validate_every has no effect on a problem that holds nothing out; set it to 0"
        )
    own = dict(denoiser.named_parameters())
    before = {n: own[n].data for n in names}
    was_training, flags = denoiser.training, {n: p.requires_grad for n, p in own.items()}
    checkpointing = settings.gradient_checkpointing and not denoiser.is_gradient_checkpointing
    attention = (
        dict(getattr(denoiser, "attn_processors", {})) if own[names[0]].device.type == "cpu" else {}
    )
    try:
        if attention:  # the fused kernel's backward is the slower one on a CPU
            denoiser.set_attn_processor(AttnProcessor())  # type: ignore[operator]
        for n, p in own.items():
            p.requires_grad_(n in before)
        for n in names:
            own[n].data = before[n].detach().clone().float()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        return Trainer(
            denoiser, {n: own[n] for n in names}, problem, settings, folder, callback
        ).fit(resume)
    finally:
        vars(denoiser).pop("forward", None)  # accelerate leaves its autocast around it
        vars(denoiser).pop("_original_forward", None)
        if checkpointing:
            denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
        if attention:
            denoiser.set_attn_processor(attention)  # type: ignore[operator]
        denoiser.train(was_training)
        for n, p in own.items():
            p.requires_grad_(flags[n])
            p.grad = None
        for n in names:
            own[n].data = before[n]


def check(
    denoiser: nn.Module,
    names: Sequence[str],
    settings: Training,
    *,
    folder: Path | None = None,
    resume: bool = False,
) -> None:
    """Refuse what `train` would refuse before its first update: for methods whose batches cost time to prepare.

    Raises:
        ConfigError: a setting would have no effect.
        FileError: nothing to resume.
    """
    if settings.warmup >= settings.updates:
        raise ConfigError(
            f"warmup must be shorter than updates ({settings.updates}), got {settings.warmup}"
        )
    if not settings.ema_ramp and not settings.ema:
        raise ConfigError("ema_ramp has no effect with ema 0, which averages nothing; leave it out")
    if settings.patience and not settings.validate_every:
        raise ConfigError(
            "patience has no effect without validate_every; set it, or leave patience at 0"
        )
    if (
        folder is None
        and settings.checkpoint_every != Training.model_fields["checkpoint_every"].default
    ):
        raise ConfigError(
            "checkpoint_every has no effect without a folder to keep checkpoints in; give one, or leave it out"
        )
    if resume and folder is None:
        raise ConfigError("resume needs the folder of the stopped run")
    if resume and folder is not None:
        check_resumable(folder)
    own = dict(denoiser.named_parameters())
    if settings.precision == "fp16" and own[names[0]].device.type == "cpu":
        raise ConfigError("precision fp16 has no effect on a CPU; use bf16 or fp32 there")
    if settings.precision == "fp32" and {p.dtype for n, p in own.items() if n not in names} - {
        torch.float32
    }:
        raise ConfigError(
            "precision fp32 needs a model loaded in fp32; load it so, or set training.precision to bf16 or fp16"
        )


class Trainer:
    """One pass through the loop: its optimiser, its average and where it stands."""

    def __init__(
        self,
        denoiser: nn.Module,
        trained: Mapping[str, nn.Parameter],
        problem: Objective,
        settings: Training,
        folder: Path | None,
        callback: TrainingCallback | None,
    ) -> None:
        AcceleratorState._reset_state(
            reset_partial_state=True
        )  # its precision is a process-wide singleton otherwise
        self.accelerator = Accelerator(
            mixed_precision="no" if settings.precision == "fp32" else settings.precision,
            cpu=next(iter(trained.values())).device.type == "cpu",
        )
        self.trained, self.problem, self.settings, self.folder, self.callback = (
            trained,
            problem,
            settings,
            folder,
            callback,
        )
        self.raw = denoiser
        optimiser = torch.optim.AdamW(
            trained.values(),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            eps=1e-8,
        )
        self.denoiser, self.optimiser = self.accelerator.prepare(denoiser, optimiser)
        late = {} if settings.ema_ramp else {"min_decay": settings.ema, "update_after_step": -1}
        self.ema = (
            EMAModel(list(trained.values()), decay=settings.ema, **late) if settings.ema else None
        )
        self.update, self.spent, self.best, self.epochs_without_gain = 0, 0.0, math.inf, 0
        self.log: list[LogRow] = []
        if isinstance(problem, UsesEma):
            problem.set_ema(self._average)

    def _average(self) -> dict[str, Tensor]:
        values = self.ema.shadow_params if self.ema else list(self.trained.values())
        return {name: value.detach() for name, value in zip(self.trained, values, strict=True)}

    def fit(self, resume: bool) -> TrainResult:
        if resume:
            self._load()
        began, early = time.perf_counter() - self.spent, self._waited_enough()
        with _stop_signals() as stop:
            while self.update < self.settings.updates and not early:
                row = self._one_update()
                self.update += 1
                self.spent = time.perf_counter() - began
                row |= {"update": self.update, "seconds": round(self.spent, 3)}
                early = self._validate(row)
                self.log.append(row)
                if self.callback:
                    self.callback(self.update, self.settings.updates, row)
                last = early or self.update == self.settings.updates
                if self.folder and (
                    last or stop() or self.update % self.settings.checkpoint_every == 0
                ):
                    self._save()
                if stop() and not last:
                    kept = (
                        f"resume continues from {self.folder}"
                        if self.folder
                        else "nothing was kept: no folder was given"
                    )
                    raise InterruptedRunError(
                        f"stopped after update {self.update} of {self.settings.updates}; {kept}"
                    )
        tensors = {n: v.clone() for n, v in self._average().items()}
        for name, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise DivergedError(
                    f"the new {name} has values that are not finite; lower lr ({self.settings.lr})"
                )
        return TrainResult(tensors=tensors, log=self.log, seconds=self.spent, stopped_early=early)

    def _one_update(self) -> LogRow:
        s, acc = self.settings, self.accelerator
        self.raw.train()
        sums: LogRow = {}
        for part in range(s.accumulation):
            micro = self.update * s.accumulation + part
            draw = torch.Generator("cpu").manual_seed(_mix(s.seed, micro))
            with acc.autocast():
                terms = self.problem.training_step(
                    self.denoiser, micro, draw, (acc.process_index, acc.num_processes)
                )
            total = torch.zeros((), device=acc.device)
            for name, value in terms.items():
                mean = value.float().mean()
                if not bool(mean.isfinite()):
                    raise DivergedError(
                        f"the loss {name!r} is {mean.item()} at update {self.update + 1}; lower lr ({s.lr}) or use precision fp32"
                    )
                total = total + self.problem.weights[name] * mean
                sums[name] = sums.get(name, 0.0) + mean.item() / s.accumulation
            acc.backward(total / s.accumulation)
        norm = acc.clip_grad_norm_(list(self.trained.values()), s.clip)
        if not math.isfinite(float(norm)) and acc.scaler is None:
            raise DivergedError(
                f"the gradient is not finite at update {self.update + 1}; lower lr ({s.lr}) or use precision fp32"
            )
        rate = s.lr * self._rate(self.update)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.step(list(self.trained.values()))
        return sums | {"lr": rate, "norm": float(norm)}

    def _rate(self, update: int) -> float:
        s = self.settings
        if update < s.warmup:
            return (update + 1) / s.warmup
        if s.decay == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (update - s.warmup) / max(s.updates - s.warmup, 1)))

    def _validate(self, row: LogRow) -> bool:
        """Look at the held-out samples when it is time; return whether to stop early."""
        s = self.settings
        if not s.validate_every or self.update % s.validate_every:
            return False
        assert isinstance(self.problem, HasValidation)  # or `train` had refused
        self.raw.eval()
        with torch.no_grad(), self.accelerator.autocast(), self._averaged():
            row["held_out"] = value = self.problem.validation_loss(self.raw)
        self.epochs_without_gain = 0 if value < self.best else self.epochs_without_gain + 1
        self.best = min(self.best, value)
        return self._waited_enough()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the average, which becomes the patch, in the place of the weights for a while."""
        own = {name: p.data for name, p in self.trained.items()}
        try:
            for name, value in self._average().items():
                self.trained[name].data = value
            yield
        finally:
            for name, value in own.items():
                self.trained[name].data = value

    def _waited_enough(self) -> bool:
        return bool(self.settings.patience) and self.epochs_without_gain >= self.settings.patience

    def _save(self) -> None:
        assert self.folder is not None
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {}
        for i, (name, p) in enumerate(self.trained.items()):
            state = self.optimiser.state.get(p) or {
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
                "step": 0.0,
            }
            tensors |= {
                f"weight/{name}": p.detach(),
                f"first/{name}": state["exp_avg"],
                f"second/{name}": state["exp_avg_sq"],
            }
            tensors[f"count/{name}"] = torch.as_tensor(state["step"]).reshape(1)
            if self.ema:
                tensors[f"ema/{name}"] = self.ema.shadow_params[i]
        facts = {
            "update": self.update,
            "spent": self.spent,
            "best": self.best if math.isfinite(self.best) else None,
            "waited": self.epochs_without_gain,
        }
        facts["scaler"] = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        write_checkpoint(self.folder, tensors, facts, self.log, fingerprint=self._fingerprint())

    def _load(self) -> None:
        assert self.folder is not None
        tensors, facts, rows = read_checkpoint(self.folder, fingerprint=self._fingerprint())
        for i, (name, p) in enumerate(self.trained.items()):
            with torch.no_grad():
                p.copy_(tensors[f"weight/{name}"])
            moments = {
                "exp_avg": tensors[f"first/{name}"].to(p.device),
                "exp_avg_sq": tensors[f"second/{name}"].to(p.device),
            }
            self.optimiser.state[p] = {"step": tensors[f"count/{name}"][0], **moments}
            if self.ema:
                self.ema.shadow_params[i] = tensors[f"ema/{name}"].to(p.device)
        if self.ema:
            self.ema.optimization_step = facts["update"]
        if self.accelerator.scaler and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.update, self.spent, self.epochs_without_gain = (
            facts["update"],
            facts["spent"],
            facts["waited"],
        )
        self.best = math.inf if facts["best"] is None else facts["best"]
        self.log = [row for row in rows if row["update"] <= self.update]

    def _fingerprint(self) -> str:
        loop = self.settings.model_dump_json(exclude={"checkpoint_every"})
        return f"{self.problem.fingerprint} {loop}"


def _mix(seed: int, step: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a question that the loop asks after each update.

    A second SIGINT stops at once.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    for s in old:
        signal.signal(s, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
