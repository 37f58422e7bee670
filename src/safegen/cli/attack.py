"""The `attack` command."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli.console import echo, plural
from safegen.cli.measure.protocol import load_rules, print_notes
from safegen.cli.options import (
    MERGE,
    Address,
    Device,
    Dtype,
    EngineName,
    EngineOption,
    Pickle,
    PlanOnly,
    Settings,
    ShardText,
    Threads,
    TrueCfg,
    Workers,
    make_engine,
    print_model,
    print_plan,
    read_pair,
    read_shard,
    resumable,
    warn_unused,
)
from safegen.cli.progress import show_progress
from safegen.cli.scores import print_run
from safegen.core.errors import ConfigError, UnknownNameError, explain
from safegen.core.registry import ATTACKS
from safegen.core.settings import MAX_BATCH, MAX_COUNT, MAX_SEEDS, MAX_STEPS

if TYPE_CHECKING:
    from safegen.attacks.core.run import AttackConfig


class Tier(StrEnum):
    """Tier of attacks that make a benchmark."""

    static = "static"


def attack(
    out: Annotated[Path, typer.Option(help="Folder of the run: new, or one to resume.")],
    concept: Annotated[
        str, typer.Option(help="Concept to bring back: a built-in name or a TOML file.")
    ],
    name: Annotated[
        str | None, typer.Argument(metavar="ATTACK", help=f"One of {', '.join(sorted(ATTACKS))}.")
    ] = None,
    stack: Annotated[
        str | None,
        typer.Option("--stack", "--base", help="Model name, recipe.toml, or NAME=MODEL+PATCH."),
    ] = None,
    suite: Annotated[
        Tier | None,
        typer.Option(help="Run every attack of a tier, and write a benchmark of their prompts."),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Settings to start from: default, or paper (the published run).")
    ] = "default",
    set_: Settings = None,
    protocol: Annotated[
        str | None, typer.Option(help="Protocol with the prompts, judge and sampling to use.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Prompts to attack: a file or a list. With --protocol, NAME=FILE."),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(help="Role of the prompts to attack, as benign or explicit. Repeatable."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Prompts of each list. Default: all.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, max=MAX_SEEDS, help="Attacks on each prompt.")] = 1,
    budget: Annotated[
        str, typer.Option(help="Limits with commas between: nfe=N, text=N, queries=N, minutes=M.")
    ] = "",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of prompts without one.")
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MAX_STEPS, help="Denoising steps. Default: 25.")
    ] = None,
    true_cfg: TrueCfg = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=MAX_BATCH, help="Images per batch. Default: 32.")
    ] = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Keep the texts of the prompts out of the report.")
    ] = False,
    shard: ShardText = None,
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    plan: PlanOnly = False,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
) -> None:
    """Attack a stack to bring a removed concept back, and report the rates before and after.

    The found prompts are in the folder's prompts.jsonl, which `evaluate` takes for every stack.
    Re-run the same command to resume.
    """
    if suite and (name or protocol or set_ or preset != "default"):
        raise ConfigError("--suite runs its attacks with their defaults. Omit the other options.")
    if suite and shard:
        raise ConfigError("--shard must go with one attack, got --suite. Name an attack.")
    if engine is EngineName.ray and (suite or shard):
        option = "--suite" if suite else "--shard"
        raise ConfigError(f"--engine ray must go with one whole attack, got {option}. Omit one.")
    if not suite and name not in ATTACKS:  # said before torch is imported
        raise UnknownNameError("attack", name or "", ATTACKS)
    if stack is None:
        raise ConfigError("no stack is given. Use --stack.")
    part = read_shard(shard)
    runs_on = make_engine(engine, workers, address, threads)
    from safegen.attacks.core.run import run_attack
    from safegen.attacks.core.shards import attack_shard
    from safegen.attacks.suite.suite import make_suite
    from safegen.core.concept import load_concept
    from safegen.stack import load_stack
    from safegen.stack_loader import StackLoader
    from safegen.workflows.attack import make_attack

    settings = dict(read_pair(pair, "--set") for pair in set_ or [])
    rules = None
    if protocol is not None:
        if steps or batch_size or true_cfg:
            raise ConfigError(
                "--steps, --true-cfg and --batch-size have no effect with --protocol. Omit them."
            )
        rules = load_rules(protocol, prompts or [], None)
        print_notes(rules, device)
    config = _read_config(
        {"num_inference_steps": steps, "true_cfg_scale": true_cfg, "batch_size": batch_size},
        device,
        prompts=() if rules else tuple(prompts or ()),
        roles=tuple(role or ()),
        limit=limit,
        repeat=repeat,
        seed=seed,
        unsafe=unsafe,
        budget=budget,
    )
    target, wanted = load_stack(stack), load_concept(concept)
    loader = StackLoader(device=device, dtype=dtype, allow_pickle=allow_pickle, on_load=print_model)
    if plan:
        if name is None:
            raise ConfigError("--plan must go with one attack, got --suite. Name an attack.")
        if shard:
            warn_unused("--shard", "with --plan, which is of the whole attack")
        from safegen.workflows.plan import plan_attack

        chosen = make_attack(name, preset, **settings)
        print_plan(plan_attack(chosen, target, wanted, config, protocol=rules, loader=loader))
        return
    with resumable(out), show_progress() as progress:
        common: dict[str, Any] = {
            "loader": loader,
            "argv": ["safegen", *sys.argv[1:]],
            "progress": progress,
        }
        if name is None:
            made = make_suite(target, wanted, config, out, **common)
        elif part:
            chosen = make_attack(name, preset, **settings)
            del common["argv"]
            found = (chosen, target, wanted, config, out, part)
            count = attack_shard(*found, protocol=rules, **common)
        elif runs_on:
            from safegen.workflows.ray_attack import attack_on_ray

            chosen = make_attack(name, preset, **settings)
            common |= {"protocol": rules, "engine": runs_on}
            attack_on_ray(chosen, target, wanted, config, out, **common)
        else:
            chosen = make_attack(name, preset, **settings)
            run_attack(chosen, target, wanted, config, out, protocol=rules, **common)
    if name is None:
        names = ", ".join(part.name for part in made.attacks)
        echo(f"{out}: prompts of {names}. Card: {out / 'README.md'}")
    elif part:
        echo(f"shard {part}: {plural(count, 'sample')} attacked in {out}. {MERGE}")
    else:
        print_run(out)


def _read_config(
    chosen: Mapping[str, float | None], device: str, *, budget: str, **values: Any
) -> AttackConfig:
    """Return the settings of a run of an attack.

    Args:
        chosen: settings of generation, None where the user chose none.
        device: device that images are generated on.
        budget: limits of the attack.
        **values: other settings.

    Raises:
        ConfigError: one breaks its rule.
    """
    from pydantic import ValidationError

    from safegen.attacks.core.cost import Budget
    from safegen.attacks.core.run import AttackConfig
    from safegen.core.generation import GenerationConfig, preferred_precision

    generation: dict[str, Any] = {"precision": preferred_precision(device)}
    generation |= {name: value for name, value in chosen.items() if value is not None}
    try:
        return AttackConfig(
            budget=Budget.parse(budget), generation=GenerationConfig(**generation), **values
        )
    except ValidationError as error:
        raise ConfigError(explain(error, AttackConfig)) from error
