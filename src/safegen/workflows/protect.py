"""Protection of a diffusers pipeline: patches in its weights, and guards around its calls."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from inspect import Parameter, ismethod, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError, check_keywords
from safegen.guards import GuardConfig, GuardTrace, read_guard

if TYPE_CHECKING:
    from safegen.models.applied_patch import AppliedPatch
    from safegen.patches.patch import Patch

    PatchSpec = Patch | str | Path
GuardSpec = str | Mapping[str, Any] | GuardConfig
"""Guard: its name, with a preset after a dash (`sld-medium`), its table, or its settings."""
CHECKER = "safety-checker"
_OWN = frozenset(
    ("pipe", "guards", "patches", "traces", "_guarded", "_resources", "_applied", "_networks")
)


@check_keywords
def protect(
    pipe: Any,
    *,
    patch: PatchSpec | Sequence[PatchSpec] | None = None,
    guards: GuardSpec | Sequence[GuardSpec] | None = (),
    concept: Concept | str | None = None,
) -> ProtectedPipeline:
    """Return a pipeline that is called as another one, with patches and guards.

    The result takes the arguments of `pipe` and returns its output class. With guards, a withheld
    image is black and flagged in `nsfw_content_detected`, and `traces` says what each guard did.

    Args:
        pipe: diffusers pipeline that makes images, for patches one with a UNet. Patches change its
            weights until `unprotect`; calls of `pipe` itself stay unguarded.
        patch: a patch or its file, or several.
        guards: names (`sld-medium`), tables or settings. `safety-checker` without `weights` uses
            the folder that the pipeline's own checker was loaded from.
        concept: gives its phrases and its judge to the guards that use them.

    Raises:
        ConfigError: it is no pipeline, there is neither a patch nor a guard, a guard cannot run on
            the pipeline, or no guard uses the concept.
        UserError: a patch does not fit, or a file cannot be used.

    Warns:
        BaseMismatchWarning: a patch was made on other weights.

    Example:
        >>> pipe = safegen.load("mini").pipeline  # or a diffusers pipeline of your own
        >>> protected = safegen.protect(pipe, guards=["sld-medium"], concept="skulls")
        >>> output = protected("a castle made of skulls", num_inference_steps=4)
        >>> output.nsfw_content_detected
        [False]
    """
    if isinstance(pipe, ProtectedPipeline):
        raise ConfigError("pipe must not be protected already. Give all guards in one call.")
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise ConfigError(
            f"pipe must be a diffusers pipeline, got {type(pipe).__name__}. "
            "A safegen.Model has one: model.pipeline."
        )
    guards = () if guards is None else guards
    if isinstance(guards, str | Mapping | GuardConfig):
        guards = [guards]
    configs = _read_guards(pipe, guards, concept)
    patches = _list_patches(patch)
    if not configs and not patches:
        raise ConfigError("protect needs a patch or a guard, got neither. Give patch or guards.")
    return ProtectedPipeline(pipe, patches, configs)


def unprotect(protected: ProtectedPipeline) -> Any:
    """Return the pipeline without protection: its patches are undone bit for bit.

    The protected pipeline refuses every later call. A second `unprotect` has no effect.

    Raises:
        ConfigError: it is not the result of `protect`.

    Example:
        >>> pipe = safegen.load("mini").pipeline
        >>> protected = safegen.protect(pipe, guards=["sld-medium"], concept="skulls")
        >>> safegen.unprotect(protected) is pipe
        True
    """
    if not isinstance(protected, ProtectedPipeline):
        raise ConfigError(
            "unprotect takes the result of safegen.protect, got "
            f"{type(protected).__name__}. Pass that result."
        )
    if protected._resources is not None:
        protected._resources.close()
        vars(protected)["_resources"] = None
    return protected.pipe


class ProtectedPipeline:
    """A diffusers pipeline with patches and guards. Attributes are those of the pipeline."""

    pipe: Any
    """The pipeline itself. Its calls are unguarded."""
    guards: tuple[GuardConfig, ...]
    patches: tuple[str, ...]
    """Hashes of the patches."""
    traces: list[GuardTrace]
    """What the guards did in the last call, for each image."""

    def __init__(
        self, pipe: Any, patches: Sequence[PatchSpec], guards: Sequence[GuardConfig]
    ) -> None:
        """Apply patches and build guards; on an error, nothing stays on the pipeline."""
        from safegen.guards.core.adapter import PipelineAdapter
        from safegen.guards.core.pipeline import GuardedPipeline
        from safegen.patches.arithmetic import warn_of_overlap
        from safegen.patches.patch import Patch

        own = vars(self)
        if guards and (spec := PipelineAdapter(pipe).spec) is not None and spec.makes_videos:
            raise ConfigError(
                f"pipe must make images with guards, got a {type(pipe).__name__}. Use it with "
                "safegen.guards.core.pipeline.GuardedPipeline."
            )
        loaded = [p if isinstance(p, Patch) else Patch.load(p) for p in patches]
        warn_of_overlap(loaded)
        with ExitStack() as stack:
            own["_applied"] = [stack.enter_context(each.apply(pipe)) for each in loaded]
            own["_networks"] = _patched_networks(pipe, own["_applied"])
            own["_guarded"] = GuardedPipeline(pipe, guards) if guards else None
            own["_resources"] = stack.pop_all()
        own |= {"pipe": pipe, "guards": tuple(guards), "traces": []}
        own["patches"] = tuple(each.hash for each in loaded)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Return the output of the pipeline's call, guarded.

        Args:
            args: arguments of the pipeline's call, by position.
            options: arguments of the pipeline's call. With guards, `prompt` is text, embeddings and
                image prompts are refused, and so is what a guard cannot see.

        Raises:
            ConfigError: a guard cannot see an option or would have no effect, a patch is no longer
                on the pipeline, or `unprotect` was called.
        """
        if self._resources is None:
            raise ConfigError("the pipeline is no longer protected. Call safegen.protect again.")
        if any(applied not in applied.model.applied_patches for applied in self._applied) or (
            _patched_networks(self.pipe, self._applied) != self._networks
        ):
            raise ConfigError(
                "patches must stay on the pipeline, and one was undone, or a network replaced. "
                "Call safegen.unprotect, then protect again."
            )
        if self._guarded is None:
            vars(self)["traces"] = []
            output = self.pipe(*args, **options)
            if not isinstance(output, tuple):
                output.traces = []
            return output
        return self._guarded_call(self._bind(args, options))

    def _bind(self, args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name."""
        kinds = signature(type(self.pipe).__call__).parameters
        bound = dict(
            signature(type(self.pipe).__call__).bind(self.pipe, *args, **options).arguments
        )
        bound.pop("self", None)
        for name, parameter in kinds.items():
            if parameter.kind is Parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        return bound

    def _guarded_call(self, options: dict[str, Any]) -> Any:
        """Return the output of a call with guards."""
        from safegen.guards.core.adapter import PipelineAdapter
        from safegen.guards.core.output import stack_images

        prompt, returns_dict = options.pop("prompt", None), options.pop("return_dict", True)
        copies = options.pop("num_images_per_prompt", None)
        if not isinstance(prompt, str | list | tuple):
            raise ConfigError(
                "prompt must be a text or a list of texts with guards, which read it, got "
                f"{type(prompt).__name__}. Give the text, and no embeddings."
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if strange := [each for each in prompts if not isinstance(each, str)]:
            raise ConfigError(
                f"prompt must be a text or a list of texts, got {type(strange[0]).__name__} in it"
            )
        copies = 1 if copies is None else copies
        generator = options.get("generator")
        is_single = generator is not None and not isinstance(generator, list | tuple)
        if is_single and len(prompts) == copies == 1:  # the same noise, and guards take the list
            options["generator"] = [generator]
        vars(self)["traces"] = []
        found = self._guarded.generate(prompts, num_images_per_prompt=copies, **options)
        traces = vars(self)["traces"] = [each.trace for each in found]
        adapter = PipelineAdapter(self.pipe)
        images = stack_images([each.image for each in found], adapter, options)
        flags = [each.is_covered for each in found]
        kind = _output_class(type(self.pipe))
        has_flags = "nsfw_content_detected" in kind.__dataclass_fields__
        output = kind(images=images, **({"nsfw_content_detected": flags} if has_flags else {}))
        if not returns_dict:
            return output.to_tuple()
        output.nsfw_content_detected, output.traces = flags, traces
        return output

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the pipeline; its methods that return it return this object."""
        if name in _OWN or name == "__setstate__":
            raise AttributeError(name)
        value = getattr(self.pipe, name)
        if not ismethod(value) or value.__self__ is not self.pipe:
            return value

        def method(*args: Any, **options: Any) -> Any:
            result = value(*args, **options)
            return self if result is self.pipe else result

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the pipeline.

        Raises:
            AttributeError: it is one of this object's own, or a network with patches on it.
        """
        if name in _OWN or (name in self._networks and self._resources):
            raise AttributeError(
                f"{name} cannot be set on a protected pipeline. Call safegen.unprotect first."
            )
        setattr(self.pipe, name, value)

    def __dir__(self) -> list[str]:
        """Return the names of the pipeline's attributes and of its own."""
        return sorted({*dir(self.pipe), *object.__dir__(self)})

    def __repr__(self) -> str:
        """Return the pipeline's class, the guards and the number of patches."""
        guards = ", ".join(guard.name for guard in self.guards) or "none"
        state = "" if self._resources else ", not protected"
        kind = type(self.pipe).__name__
        return f"ProtectedPipeline({kind}, guards: {guards}, patches: {len(self.patches)}{state})"

    def __enter__(self) -> Self:
        """Return the pipeline itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the protection."""
        unprotect(self)


def _list_patches(patch: PatchSpec | Sequence[PatchSpec] | None) -> list[PatchSpec]:
    """Return one patch or several as a list."""
    if patch is None:
        return []
    return list(patch) if isinstance(patch, Sequence) and not isinstance(patch, str) else [patch]


def _read_guards(
    pipe: Any, guards: Sequence[GuardSpec], concept: Concept | str | None
) -> list[GuardConfig]:
    """Return the settings of guards, with the defaults of a concept."""
    known = load_concept(concept) if isinstance(concept, str) else concept
    specs = [_with_checker(pipe, guard) for guard in guards]
    configs = [read_guard(spec, known) for spec in specs]
    if known and not any(type(config).defaults_from(known) for config in configs):
        raise ConfigError(
            f"concept must be used by a guard, got {known.name!r}, which none uses. Leave it out."
        )
    return configs


def _patched_networks(pipe: Any, applied: Sequence[AppliedPatch]) -> dict[str, Any]:
    """Return the networks of a pipeline that patches change, by component name."""
    from safegen.models.families.pipeline_specs import denoiser_name
    from safegen.models.patched_weights import component_of

    names = {component_of(name) or denoiser_name(pipe) for each in applied for name in each.names}
    return {name: getattr(pipe, name, None) for name in sorted(names)}


def _with_checker(pipe: Any, guard: GuardSpec) -> GuardSpec:
    """Return a guard; a safety checker without weights gets the folder of the pipeline's own.

    Raises:
        ConfigError: the pipeline has none that was loaded from a folder.
    """
    table = {"name": guard} if isinstance(guard, str) else guard
    if not isinstance(table, Mapping) or table.get("name") != CHECKER or "weights" in table:
        return guard
    config = getattr(getattr(pipe, "safety_checker", None), "config", None)
    folder = Path(getattr(config, "_name_or_path", None) or "")
    folder = folder.parent if folder.name == "safety_checker" else folder
    if config is None or not folder.is_dir() or folder == Path():
        raise ConfigError(
            f"the guard {CHECKER!r} needs weights, and the pipeline has no checker from a folder. "
            f"Give {{'name': '{CHECKER}', 'weights': FOLDER}}."
        )
    return {**table, "weights": str(folder)}


def _output_class(kind: type) -> Any:
    """Return the output class of a pipeline's class: that of the module that defines it."""
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
    from diffusers.utils import BaseOutput

    for base in kind.__mro__:
        if base.__module__.startswith("diffusers."):
            for value in vars(sys.modules[base.__module__]).values():
                is_output = isinstance(value, type) and issubclass(value, BaseOutput)
                if is_output and "images" in getattr(value, "__dataclass_fields__", {}):
                    return value
    return ImagePipelineOutput
