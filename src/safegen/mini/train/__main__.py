"""Train the miniature model from nothing: world -> clip -> vae -> unet -> polish -> judge -> pack -> triplets.

    python -m safegen.mini.train --work DIR [--stages world,vae,...] [--threads 2] [--compile]

Every stage checkpoints into DIR and goes on where it stopped; losses go to DIR/log.jsonl. `pack`
and `triplets` write the shipped files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from safegen.core.errors import SafegenError
from safegen.mini import bundle
from safegen.mini.train.clip import stage_clip
from safegen.mini.train.denoiser import stage_polish, stage_unet
from safegen.mini.train.judge import stage_judge
from safegen.mini.train.pack import stage_pack, stage_triplets
from safegen.mini.train.scenes import stage_world
from safegen.mini.train.vae import stage_vae

STAGES: dict[str, Callable[..., None]] = {
    "world": stage_world,
    "clip": stage_clip,
    "vae": stage_vae,
    "unet": stage_unet,
    "polish": stage_polish,
    "judge": stage_judge,
    "pack": stage_pack,
    "triplets": stage_triplets,
}
COMPILED = ("unet", "polish")
"""Stages that can be compiled."""
PACKED = ("pack", "triplets")
"""Stages that write shipped files."""
TINY: dict[str, dict[str, Any]] = {
    "world": {"n": 96, "objects": ("castle", "bus")},
    "clip": {"steps": 2},
    "vae": {"steps": 2, "test_scenes": 8},
    "unet": {"steps": 2},
    "polish": {"steps": 2},
    "judge": {"steps": 2, "smeared": 8},
    "triplets": {"n": 8},
}
"""What makes a stage run in seconds; it learns nothing then."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the stages that are asked for, in order."""
    ask = argparse.ArgumentParser(
        prog="python -m safegen.mini.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ask.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoints, the log and the result"
    )
    ask.add_argument(
        "--stages", default=",".join(STAGES), help="comma-separated: " + ", ".join(STAGES)
    )
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument(
        "--compile",
        action="store_true",
        help="compile the denoiser: 1.4 times faster after two minutes, needs a C++ compiler",
    )
    ask.add_argument(
        "--home",
        type=Path,
        default=bundle.HERE,
        help="folder that pack and triplets write to; default: the package's own",
    )
    ask.add_argument(
        "--tiny",
        action="store_true",
        help="a few steps on a few scenes: shows that every stage runs, and teaches nothing",
    )
    args = ask.parse_args(words)
    names = args.stages.split(",")
    if wrong := [name for name in names if name not in STAGES]:
        ask.error(f"no stage named {wrong[0]!r}; known: {', '.join(STAGES)}")
    if args.compile and not set(COMPILED) & set(names):
        ask.error(
            f"--compile has no effect without one of the stages {', '.join(COMPILED)}; leave it out"
        )
    if args.tiny and args.home.resolve() == bundle.HERE.resolve() and set(PACKED) & set(names):
        ask.error(
            "--tiny would replace the shipped files by untrained ones; name another folder with --home"
        )
    torch.set_num_threads(args.threads)
    try:
        args.work.mkdir(parents=True, exist_ok=True)
        for name in names:
            settings = TINY.get(name, {}) if args.tiny else {}
            settings = (
                settings
                | ({"compiled": args.compile} if name in COMPILED else {})
                | ({"home": args.home} if name in PACKED else {})
            )
            began = time.time()
            STAGES[name](args.work, **settings)
            print(f"{name}: {time.time() - began:.0f} s", flush=True)
    except (
        SafegenError,
        OSError,
    ) as error:  # OSError: what an earlier stage makes is not there, a full disk
        ask.exit(1, f"{ask.prog}: {error}\n")


if __name__ == "__main__":
    main()
