"""The one training loop. A method brings batches and losses; everything else about training is here."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from safegen.errors import BadFile, BadSetting, Diverged, Stopped

Row = dict[str, float]
Report = Callable[[int, int, Row], None]
"""Called after every update with (updates done, updates in all, the row of the log)."""


class Training(BaseModel):
    """How the loop trains. Defaults are the published SafeGen run's, less its inert flags."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    updates: int = Field(default=1000, ge=1)
    """Optimiser updates."""
    batch: int = Field(default=1, ge=1)
    """Samples in one forward pass."""
    accumulation: int = Field(default=5, ge=1)
    """Forward passes in one update."""
    lr: float = Field(default=1e-5, gt=0)
    """Learning rate of AdamW."""
    warmup: int = Field(default=0, ge=0)
    """Updates over which the learning rate rises from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after warm-up; cosine ends at zero."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of an update's gradient."""
    ema: float = Field(default=0.9999, ge=0, lt=1)
    """Largest decay of the weight average that becomes the patch; 0 takes the last weights."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward pass; trained weights are always fp32."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""
    seed: int = 0
    """Decides every draw: the draws of a step depend on the seed and the step alone."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Updates between checkpoints, when a folder is given."""
    validate_every: int = Field(default=0, ge=0)
    """Updates between looks at the held-out samples; 0 is never."""
    patience: int = Field(default=0, ge=0)
    """Stop after so many looks without a better held-out loss; 0 is never."""


class Problem(Protocol):
    """What a method brings to the loop."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each loss term in the sum that is minimised."""
        ...

    fingerprint: str
    """Names data and settings: a checkpoint of another problem is refused."""

    def losses(self, denoiser: nn.Module, micro_step: int, generator: torch.Generator, share: tuple[int, int]) -> Mapping[str, Tensor]:
        """Return each term's unweighted loss per sample, (b,), for this process's `share` (rank, of how many) of one batch."""
        ...

    def held_out(self, denoiser: nn.Module) -> float:
        """Return the weighted loss on samples that are never trained on, with fixed draws."""
        ...


@runtime_checkable
class Follower(Protocol):
    """A problem that looks at the weight average while it trains."""

    def follow(self, average: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep the question for the averaged weights as they stand, by name; it is to be asked within `losses`."""
        ...


class Trained(BaseModel):
    """What the loop found."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    tensors: dict[str, Tensor]
    """The averaged weights, fp32."""
    log: list[Row]
    """One row an update: update, lr, norm, seconds and each term."""
    seconds: float
    """Time spent training, over all resumed parts."""
    stopped_early: bool = False

    def facts(self, terms: Iterable[str]) -> dict[str, Any]:
        """Return what a patch says of its training: updates, seconds, the last losses."""
        return {
            "updates": len(self.log),
            "seconds": round(self.seconds, 2),
            "stopped_early": self.stopped_early,
            "losses": {k: self.log[-1][k] for k in terms},
        }


def train(
    denoiser: nn.Module,
    names: Sequence[str],
    problem: Problem,
    settings: Training,
    *,
    folder: Path | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> Trained:
    """Train the parameters called `names` and return their averaged values; `denoiser` is given back bit for bit as it came.

    Args:
        denoiser: the network; only `names` get gradients.
        names: parameters to train.
        problem: batches and losses.
        settings: how.
        folder: where checkpoint and log go; none are kept when None.
        resume: continue from the folder's checkpoint, on a CPU bit for bit as if never stopped.
        report: called after every update.

    Raises:
        BadSetting: a setting would have no effect.
        BadFile: nothing to resume, or the checkpoint is another problem's or damaged.
        Diverged: a loss or gradient is not finite; the last checkpoint stays.
        Stopped: SIGINT or SIGTERM came; the state was saved if there is a folder.
    """
    if settings.warmup >= settings.updates:
        raise BadSetting(f"warmup must be shorter than updates ({settings.updates}), got {settings.warmup}")
    if settings.patience and not settings.validate_every:
        raise BadSetting("patience has no effect without validate_every; set it, or leave patience at 0")
    if folder is None and settings.checkpoint_every != Training.model_fields["checkpoint_every"].default:
        raise BadSetting("checkpoint_every has no effect without a folder to keep checkpoints in; give one, or leave it out")
    if resume and folder is None:
        raise BadSetting("resume needs the folder of the stopped run")
    own = dict(denoiser.named_parameters())
    before = {n: own[n].data for n in names}
    was_training, flags = denoiser.training, {n: p.requires_grad for n, p in own.items()}
    checkpointing = settings.gradient_checkpointing and not denoiser.is_gradient_checkpointing
    if settings.precision == "fp16" and own[names[0]].device.type == "cpu":
        raise BadSetting("precision fp16 has no effect on a CPU; use bf16 or fp32 there")
    kinds = {p.dtype for n, p in own.items() if n not in before}
    if settings.precision == "fp32" and kinds - {torch.float32}:
        raise BadSetting("precision fp32 needs a model loaded in fp32; load it so, or set training.precision to bf16 or fp16")
    attention = dict(getattr(denoiser, "attn_processors", {})) if own[names[0]].device.type == "cpu" else {}
    try:
        if attention:  # the fused kernel's backward is the slower one on a CPU
            denoiser.set_attn_processor(AttnProcessor())  # type: ignore[operator]
        for n, p in own.items():
            p.requires_grad_(n in before)
        for n in names:
            own[n].data = before[n].detach().clone().float()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        return _Run(denoiser, {n: own[n] for n in names}, problem, settings, folder, report).go(resume)
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


class _Run:
    """One pass through the loop: its optimiser, its average and where it stands."""

    def __init__(
        self,
        denoiser: nn.Module,
        trained: Mapping[str, nn.Parameter],
        problem: Problem,
        settings: Training,
        folder: Path | None,
        report: Report | None,
    ) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # its precision is a process-wide singleton otherwise
        self.accelerator = Accelerator(
            mixed_precision="no" if settings.precision == "fp32" else settings.precision,
            cpu=next(iter(trained.values())).device.type == "cpu",
        )
        self.trained, self.problem, self.settings, self.folder, self.report = trained, problem, settings, folder, report
        self.raw = denoiser
        optimiser = torch.optim.AdamW(trained.values(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, eps=1e-8)
        self.denoiser, self.optimiser = self.accelerator.prepare(denoiser, optimiser)
        self.ema = EMAModel(list(trained.values()), decay=settings.ema) if settings.ema else None
        self.update, self.spent, self.best, self.waited = 0, 0.0, math.inf, 0
        self.log: list[Row] = []
        if isinstance(problem, Follower):
            problem.follow(self._average)

    def _average(self) -> dict[str, Tensor]:
        values = self.ema.shadow_params if self.ema else list(self.trained.values())
        return {name: value.detach() for name, value in zip(self.trained, values, strict=True)}

    def go(self, resume: bool) -> Trained:
        if resume:
            self._load()
        began, early = time.perf_counter() - self.spent, self._waited_enough()
        with _stop_signals() as stop:
            while self.update < self.settings.updates and not early:
                row = self._one_update()
                self.update += 1
                self.spent = time.perf_counter() - began
                row |= {"update": self.update, "seconds": round(self.spent, 3)}
                early = self._look(row)
                self.log.append(row)
                if self.report:
                    self.report(self.update, self.settings.updates, row)
                last = early or self.update == self.settings.updates
                if self.folder and (last or stop() or self.update % self.settings.checkpoint_every == 0):
                    self._save()
                if stop() and not last:
                    kept = f"resume continues from {self.folder}" if self.folder else "nothing was kept: no folder was given"
                    raise Stopped(f"stopped after update {self.update} of {self.settings.updates}; {kept}")
        tensors = {n: v.clone() for n, v in self._average().items()}
        return Trained(tensors=tensors, log=self.log, seconds=self.spent, stopped_early=early)

    def _one_update(self) -> Row:
        s, acc = self.settings, self.accelerator
        self.raw.train()
        sums: Row = {}
        for part in range(s.accumulation):
            micro = self.update * s.accumulation + part
            draw = torch.Generator("cpu").manual_seed(_mix(s.seed, micro))
            with acc.autocast():
                terms = self.problem.losses(self.denoiser, micro, draw, (acc.process_index, acc.num_processes))
            total = torch.zeros((), device=acc.device)
            for name, value in terms.items():
                mean = value.float().mean()
                if not bool(mean.isfinite()):
                    raise Diverged(
                        f"the loss {name!r} is {mean.item()} at update {self.update + 1}; lower lr ({s.lr}) or use precision fp32"
                    )
                total = total + self.problem.weights[name] * mean
                sums[name] = sums.get(name, 0.0) + mean.item() / s.accumulation
            acc.backward(total / s.accumulation)
        norm = acc.clip_grad_norm_(list(self.trained.values()), s.clip)
        if not math.isfinite(float(norm)) and acc.scaler is None:
            raise Diverged(f"the gradient is not finite at update {self.update + 1}; lower lr ({s.lr}) or use precision fp32")
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

    def _look(self, row: Row) -> bool:
        """Look at the held-out samples when it is time; return whether to stop early."""
        s = self.settings
        if not s.validate_every or self.update % s.validate_every:
            return False
        self.raw.eval()
        with torch.no_grad(), self.accelerator.autocast():
            row["held_out"] = value = self.problem.held_out(self.raw)
        self.waited = 0 if value < self.best else self.waited + 1
        self.best = min(self.best, value)
        return self._waited_enough()

    def _waited_enough(self) -> bool:
        return bool(self.settings.patience) and self.waited >= self.settings.patience

    # ------------------------------------------------------------ checkpoints: tensors in safetensors, the rest in its header

    def _save(self) -> None:
        assert self.folder is not None
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {}
        for i, (name, p) in enumerate(self.trained.items()):
            state = self.optimiser.state.get(p) or {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "step": 0.0}
            tensors |= {f"weight/{name}": p.detach(), f"first/{name}": state["exp_avg"], f"second/{name}": state["exp_avg_sq"]}
            tensors[f"count/{name}"] = torch.as_tensor(state["step"]).reshape(1)
            if self.ema:
                tensors[f"ema/{name}"] = self.ema.shadow_params[i]
        facts = {"update": self.update, "spent": self.spent, "best": self.best if math.isfinite(self.best) else None, "waited": self.waited}
        facts["scaler"] = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        header = {"fingerprint": self._fingerprint(), "facts": json.dumps(facts)}
        path = self.folder / "checkpoint.safetensors"
        tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        rows = self.folder / f".log.jsonl.tmp-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows.write_text("".join(json.dumps(row) + "\n" for row in self.log), encoding="utf-8")
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, tmp, metadata=header)
            rows.replace(self.folder / "log.jsonl")  # the log first: a kill between the two leaves rows that resume cuts off
            tmp.replace(path)
        except (OSError, SafetensorError) as error:
            raise BadFile(f"the checkpoint {path} cannot be written: {error}") from error
        finally:
            for leftover in (tmp, rows):
                with suppress(OSError):
                    leftover.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()  # goes only if nothing is in it: the first checkpoint failed

    def _load(self) -> None:
        assert self.folder is not None
        path = self.folder / "checkpoint.safetensors"
        if not path.is_file():
            raise BadFile(f"there is nothing to resume in {self.folder}: it has no checkpoint.safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                header, tensors = file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            rows = [json.loads(line) for line in (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        except (SafetensorError, OSError, ValueError) as error:  # ValueError: the log is not JSON, or not UTF-8
            raise BadFile(f"the checkpoint in {self.folder} is damaged ({error}); start again without resume") from error
        if header.get("fingerprint") != self._fingerprint():
            raise BadFile(f"the checkpoint in {self.folder} is of other settings, data or weights; resume with those it was started with")
        facts: dict[str, Any] = json.loads(header["facts"])
        for i, (name, p) in enumerate(self.trained.items()):
            with torch.no_grad():
                p.copy_(tensors[f"weight/{name}"])
            moments = {"exp_avg": tensors[f"first/{name}"].to(p.device), "exp_avg_sq": tensors[f"second/{name}"].to(p.device)}
            self.optimiser.state[p] = {"step": tensors[f"count/{name}"][0], **moments}
            if self.ema:
                self.ema.shadow_params[i] = tensors[f"ema/{name}"].to(p.device)
        if self.ema:
            self.ema.optimization_step = facts["update"]
        if self.accelerator.scaler and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.update, self.spent, self.waited = facts["update"], facts["spent"], facts["waited"]
        self.best = math.inf if facts["best"] is None else facts["best"]
        self.log = [row for row in rows if row["update"] <= self.update]

    def _fingerprint(self) -> str:
        loop = self.settings.model_dump_json(exclude={"checkpoint_every"})
        return f"{self.problem.fingerprint} {loop}"


def _mix(seed: int, step: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a question that the loop asks after each update; a second SIGINT stops at once."""
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
