"""Plan of an attack: its first sample within the time of a probe, and the evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from safegen.attacks.core.base import Attack, AttackContext
from safegen.attacks.core.prompts import with_protocol
from safegen.attacks.core.run import AttackConfig, check_model, repeat_samples
from safegen.attacks.core.target import Target
from safegen.core.concept import Concept
from safegen.evaluation.protocol import Protocol
from safegen.judges import load_concept_judge
from safegen.models.model import Model
from safegen.models.text_encoder import text_encoder_names
from safegen.stack import Stack
from safegen.stack_loader import StackLoader
from safegen.workflows.plan.evaluation import plan_evaluation
from safegen.workflows.plan.plan import Plan, format_seconds
from safegen.workflows.plan.probe import PROBE_SECONDS, measured


class _ProbeEndedError(Exception):
    """The time of the probe is over."""


def plan_attack(
    attack: Attack,
    stack: Stack,
    concept: Concept,
    config: AttackConfig,
    *,
    protocol: Protocol | None = None,
    loader: StackLoader | None = None,
) -> Plan:
    """Return what an attack and its evaluation will cost, from a probe of its first sample.

    Where the first sample does not end within the probe, the time of the attack is a lower bound
    unless the budget limits it, and a note says so.

    Args:
        attack: the attack.
        stack: the attacked stack.
        concept: concept to bring back.
        config: prompts, budget and generation.
        protocol: gives the prompts, the judge and `generation` in place of concept and config.
        loader: loads the stack; on the accelerator or the CPU if not given.

    Raises:
        UserError: see `safegen.attacks.core.run.run_attack`.
    """
    check_model(stack)
    loader = loader or StackLoader()
    concept, config, protocol = with_protocol(attack, concept, config, protocol)
    samples = repeat_samples(protocol.samples(), config.repeat)
    before = plan_evaluation(protocol, [stack], baselines="none", loader=loader)
    variants = len(attack.variants) + len(attack.controls)
    rounds = 1 + variants * len(samples) / len(protocol.samples())
    judge = load_concept_judge(concept)
    with TemporaryDirectory() as folder, loader.open(stack) as loaded:
        target = Target(loaded, concept, judge, config.generation, config.budget)
        context = AttackContext(target, Path(folder))
        built = done = False
        with measured(loaded.model) as cost, target.counted():
            try:
                with _time_limit(*_networks(loaded.model)):
                    attacker = attack.build(context)
                    built, built_at = True, target.cost
                    attacker.attack(samples[:1])
                    done = True
            except _ProbeEndedError:
                pass
        spent = target.cost
    first = built_at.seconds if built else 0.0
    scale = len(samples) if done else 1
    seconds = first + (spent.seconds - first) * scale
    notes, passes, queries = list(before.notes), spent.denoiser * scale, spent.queries * scale
    if not done:
        notes.append(
            f"the attack on the first of {len(samples)} samples did not end within the probe: its "
            "time is a lower bound. Limit it with --budget, such as minutes=10"
        )
    elif attack.batch_size > 1 and len(samples) > 1:
        notes.append("samples that are attacked together cost less than one by one, as planned")
    if (minutes := config.budget.minutes) is not None:
        seconds = 60 * minutes if not done else min(seconds, 60 * minutes)
        notes = [*before.notes, f"the budget ends the attack after {format_seconds(60 * minutes)}"]
    return replace(
        before,
        title=f"{attack.method()} on {len(samples):,} samples, evaluated before and after",
        images=round(before.images * rounds) + queries,
        passes=round(before.passes * rounds) + passes,
        seconds=before.seconds * rounds + seconds,
        memory=max(before.memory, cost.memory),
        notes=tuple(notes),
    )


def _networks(model: Model) -> list[nn.Module]:
    """Return the networks that an attack calls: the denoiser and the text encoders."""
    names = (model.denoiser_name, *text_encoder_names(model.pipeline))
    return [getattr(model.pipeline, name) for name in names]


@contextmanager
def _time_limit(*networks: nn.Module) -> Iterator[None]:
    """End the block, by an exception out of a network, when the time of the probe is over."""
    began = time.perf_counter()

    def check(*_: Any) -> None:
        if time.perf_counter() - began > 2 * PROBE_SECONDS:
            raise _ProbeEndedError

    handles = [network.register_forward_pre_hook(check) for network in networks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
