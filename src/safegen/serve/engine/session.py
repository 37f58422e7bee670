"""A stack in a worker process: it generates, and its guards check prompts and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from safegen.core.allocator import keep_freed_memory
from safegen.core.errors import ConfigError
from safegen.core.files import display_name
from safegen.core.generation import Sample, Start
from safegen.guards import read_guard
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.core.result import GeneratedImage, GuardTrace
from safegen.guards.core.stages import check_images, check_prompts
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import EngineFaultError
from safegen.serve.engine.self_test import check_guards
from safegen.serve.messages import GuardInfo, ImageRequest, StackInfo
from safegen.stack import add_guards, hash_guards, load_stack
from safegen.stack_loader import LoadedStack, StackLoader

if TYPE_CHECKING:
    from safegen.guards.core.base import Guard

Report = Callable[[float], None]
"""Called with the part of a batch that is done; it may raise to stop."""


class Session:
    """Guards of a stack, and the stack itself unless another server generates."""

    can_generate = False
    """Whether `generate` makes images."""

    def __init__(self, info: StackInfo, guarded: GuardedPipeline | None) -> None:
        self.info, self.guarded = info, guarded
        self._guards = _guard_states(guarded)

    def generate(
        self, requests: Sequence[ImageRequest], report: Report
    ) -> list[list[GeneratedImage]]:
        """Return the images of each request, one per seed; all requests have one batch key.

        Raises:
            UserError: the stack cannot make images of these settings.
            EngineFaultError: the stack is not what it was when the server started.
        """
        raise EngineFaultError("this worker only checks; another server generates")

    def check_prompts(self, prompts: Sequence[str]) -> list[GuardTrace]:
        """Return what the guards of prompts decide on each prompt."""
        return check_prompts(self._pipeline(), prompts)

    def check_images(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[GeneratedImage]:
        """Return images as the guards of images leave them."""
        return check_images(self._pipeline(), images, prompts)

    def _pipeline(self) -> GuardedPipeline:
        self.check_guards()
        if self.guarded is None:
            raise ConfigError(f"the stack {self.info.name!r} must have guards for this, got none")
        return self.guarded

    def check_guards(self) -> None:
        """Check that the guards and their judges are those of the start.

        Raises:
            EngineFaultError: one was removed, added, replaced or set otherwise.
        """
        if _guard_states(self.guarded) != self._guards:
            raise EngineFaultError("the guards are not those with which the server started")


class GenerationSession(Session):
    """A loaded stack."""

    can_generate = True

    def __init__(self, loaded: LoadedStack, info: StackInfo) -> None:
        super().__init__(info, loaded.guarded)
        self.loaded = loaded
        self._applied = list(loaded.model.applied_patches)
        self._networks = self._loaded_networks()

    def _loaded_networks(self) -> list[Any]:
        """Return the networks of the pipeline, which patches are on."""
        model = self.loaded.model
        return [getattr(model.pipeline, name) for name in model.components]

    def check_guards(self) -> None:
        """Check the guards of the stack, as those of the session."""
        super().check_guards()
        if self.loaded.guarded is not self.guarded:
            raise EngineFaultError("the guards are not those with which the server started")

    def generate(
        self, requests: Sequence[ImageRequest], report: Report
    ) -> list[list[GeneratedImage]]:
        """Return the images of each request, one per seed; all requests have one batch key."""
        self.check_guards()
        model = self.loaded.model
        if model.applied_patches != self._applied or self._loaded_networks() != self._networks:
            raise EngineFaultError("the patches are not those with which the server started")
        with TemporaryDirectory(prefix="safegen-") as folder:
            samples = [
                sample
                for i, request in enumerate(requests)
                for sample in _samples(request, Path(folder), i)
            ]
            images = self.loaded.generate(samples, requests[0].generation_config, callback=report)
        if len(images) != len(samples):
            raise EngineFaultError(f"{len(images)} images for {len(samples)} seeds")
        rest = iter(images)
        return [[next(rest) for _ in request.seeds] for request in requests]


def _samples(request: ImageRequest, folder: Path, number: int) -> list[Sample]:
    """Return one sample per seed, with the files that it starts from in a folder."""
    start = None
    if request.start is not None:
        files = {"image": request.start.image, "mask": request.start.mask}
        names = {kind: f"{number}-{kind}.png" for kind, data in files.items() if data is not None}
        for kind, name in names.items():
            (folder / name).write_bytes(files[kind] or b"")
        start = Start.of(folder, strength=request.start.strength, **names)
    return [
        Sample(
            prompt=request.prompt, seed=seed, negative_prompt=request.negative_prompt, start=start
        )
        for seed in request.seeds
    ]


class RemotePipeline:
    """Stand-in for a pipeline on another server: guards see its prompts and its images only."""

    _execution_device = torch.device("cpu")

    def __call__(self, prompt: Sequence[str]) -> Any:
        """Refuse to generate; the other server does."""
        raise EngineFaultError("this worker only checks; another server generates")


def choose_threads(config: ServerConfig, cores: int) -> int:
    """Return the CPU threads of a worker: those of the settings, or an equal share of the cores.

    Workers that have more threads than there are cores wait for each other, and are several times
    slower. Ray gives each replica its own cores.
    """
    if config.threads is not None:
        return config.threads
    workers = 1 if config.engine == "ray" else config.workers * max(1, len(config.stacks))
    return max(1, cores // workers)


@contextmanager
def open_session(config: ServerConfig, spec: str | None) -> Iterator[Session]:
    """Yield the session of a stack, loaded and tested.

    Args:
        config: settings of the server.
        spec: the stack, as in `ServerConfig.stacks`; None for the guards of another server.

    Raises:
        UserError: the stack or a guard cannot be loaded, or the self-test fails.
    """
    keep_freed_memory()
    torch.set_num_threads(choose_threads(config, torch.get_num_threads()))
    if spec is None:
        session = _open_checker(config)
        _test(session, config)
        yield session
        return
    stack = add_guards(load_stack(spec), config.guards, config.concept if config.guards else None)
    if stack.is_base and not config.allow_base:
        raise ConfigError(
            f"a stack must have a patch, a LoRA or a guard to be served, got the model "
            f"{stack.model!r} alone. Add one, such as --guard judge-filter --concept skulls, "
            "or set allow_base."
        )
    loader = StackLoader(device=config.device, dtype=config.dtype, allow_pickle=config.allow_pickle)
    with loader.open(stack) as loaded:
        session = GenerationSession(loaded, describe_stack(loaded))
        _test(session, config)
        yield session


def _test(session: Session, config: ServerConfig) -> None:
    """Test a session unless the operator has turned the self-test off; errors as `check_guards`."""
    if config.self_test:
        session.info = replace(session.info, tested_concept=check_guards(session, config))


def _open_checker(config: ServerConfig) -> Session:
    """Return a session with the guards of another server."""
    configs = [read_guard(guard, config.concept) for guard in config.guards]
    guarded = GuardedPipeline(RemotePipeline(), configs)
    model = (config.upstream.model if config.upstream else None) or "upstream"
    info = StackInfo(
        name=model,  # the model that clients name
        model=model,
        hash=hash_guards(configs),
        guards=tuple(describe_guard(guard) for guard in guarded.guards),
        size=(0, 0),
    )
    return Session(info, guarded)


def describe_stack(loaded: LoadedStack) -> StackInfo:
    """Return a loaded stack as the front process knows it."""
    from safegen.models.schedulers import list_schedulers, sampler_name

    stack, model = loaded.stack, loaded.model
    scheduler = model.pipeline.scheduler
    return StackInfo(
        name=stack.name,
        model=display_name(stack.model),
        hash=loaded.hash,
        guards=tuple(
            describe_guard(guard) for guard in (loaded.guarded.guards if loaded.guarded else ())
        ),
        patches=len(stack.patches),
        size=(model.size, model.size),
        sampler=sampler_name(scheduler),
        samplers=tuple(list_schedulers(scheduler)),
        loras=tuple(lora.file.stem for lora in stack.loras),
        model_hash=model.hash,
        is_base=stack.is_base,
    )


def _guard_states(guarded: GuardedPipeline | None) -> list[tuple[Any, ...]]:
    """Return what must not change of each guard: the guard, its settings and its judge."""
    judges = [(guard, getattr(guard, "judge", None)) for guard in guarded.guards] if guarded else []
    names = ("labels", "threshold")
    return [
        (guard, guard.config, guard.hook_points, judge, *(getattr(judge, n, None) for n in names))
        for guard, judge in judges
    ]


def describe_guard(guard: Guard) -> GuardInfo:
    """Return a guard as the front process knows it."""
    judge = getattr(guard, "judge", None)
    return GuardInfo(
        name=guard.config.name,
        reads_prompts="prompt" in guard.hook_points,
        reads_images="image" in guard.hook_points,
        judge=getattr(judge, "id", None),
        labels=tuple(getattr(judge, "labels", ())),
    )
