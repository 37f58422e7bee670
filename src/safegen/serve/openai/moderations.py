"""The moderations of the OpenAI interface: a stack's guards of prompts and of images."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from safegen.core.errors import ConfigError
from safegen.guards.core.result import PASSING_ACTIONS, GuardRecord, GuardTrace
from safegen.serve.errors import FAILED, RequestError
from safegen.serve.gate import block
from safegen.serve.images import flatten, read_upload
from safegen.serve.messages import GuardInfo, StackInfo
from safegen.serve.requests import check_text
from safegen.serve.service import ImageService

InputType = Literal["text", "image"]
"""Type of an input of the client."""


class ImageUrl(BaseModel):
    """An image as a data URL."""

    url: str
    """`data:image/png;base64,...`; the server fetches no addresses."""


class TextInput(BaseModel):
    """A text."""

    type: Literal["text"]
    text: str


class ImageInput(BaseModel):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


Input = Annotated[TextInput | ImageInput, Field(discriminator="type")]


class ModerationBody(BaseModel):
    """Body of `POST /v1/moderations`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    input: str | list[str] | list[Input]
    """A text, texts with a result each, or texts and images with one result together."""
    model: str | None = None
    """Name of a stack. Default: the first one."""


@dataclass(frozen=True)
class Finding:
    """What the guards of one input decided."""

    kind: InputType
    trace: GuardTrace


async def moderate(
    service: ImageService, stack: StackInfo, body: ModerationBody, request_id: str
) -> dict[str, Any]:
    """Return the result of each text, or of all texts and images of a list together.

    Raises:
        ConfigError: an input cannot be read, or the stack has no guard for it.
        RequestError: a guard failed.
        SafegenError: as `ImageService.check_prompts`.
    """
    texts, urls = _split_input(body)
    limits = service.config.limits
    if not 1 <= len(texts) + len(urls) <= limits.moderation_inputs:
        raise ConfigError(
            f"input must have 1 to {limits.moderation_inputs} entries on this server, got "
            f"{len(texts) + len(urls)}"
        )
    for text in texts:
        check_text("input", text)
        if len(text) > limits.prompt_chars:
            raise ConfigError(
                f"the number of characters of a text must be <= {limits.prompt_chars} on this "
                f"server, got {len(text)}"
            )
    _check_guards(stack, texts, urls)
    images = await asyncio.to_thread(_read_images, urls, limits.side)
    findings: list[Finding] = []
    if texts:
        traces = await service.check_prompts(stack.name, texts)
        findings += [Finding("text", trace) for trace in _complete(traces, texts)]
    if images:
        checked = await service.check_images(stack.name, images)
        findings += [Finding("image", each.trace) for each in _complete(checked, images)]
    for finding in findings:
        check_finding(finding, stack)
    is_mixed = isinstance(body.input, list) and not isinstance(body.input[0], str)
    groups = [findings] if is_mixed else [[finding] for finding in findings]
    concept = service.config.concept
    results = [build_result(group, stack, concept) for group in groups]
    return {"id": f"modr-{request_id}", "model": stack.name, "results": results}


def check_finding(finding: Finding, stack: StackInfo) -> None:
    """Check that the guards of an input have run.

    Raises:
        RequestError: one failed or is missing; there is no result then.
    """
    trace, reason = finding.trace, ""
    scores = [score for record in trace.guards for score in record.scores.values()]
    if not all(map(math.isfinite, scores)):
        reason = "scores: not finite"
    elif trace.action == "withhold":
        reason = trace.reason or "withheld"
    elif trace.action in PASSING_ACTIONS:
        ran = {record.guard for record in trace.guards if record.calls > 0}
        missing = [guard.name for guard in _guards(stack, finding.kind) if guard.name not in ran]
        reason = f"guards: {', '.join(missing)} did not run" if missing else ""
    if reason:
        message = f"no result, since a check could not run: {reason}"
        raise RequestError(503, message, code="guard_failed", type=FAILED)


def build_result(
    findings: Sequence[Finding], stack: StackInfo, concept: str | None
) -> dict[str, Any]:
    """Return the result of inputs as OpenAI writes it, with our categories.

    Args:
        findings: what the guards decided on each input.
        stack: the stack.
        concept: the only category. Default: the labels of the judges, and names of other guards.
    """
    scores: dict[str, float] = {}
    types: dict[str, list[InputType]] = {}
    flagged: set[str] = set()
    for finding in findings:
        found = category_scores(finding, stack, concept)
        if finding.trace.action not in PASSING_ACTIONS:
            stage: Literal["input", "output"] = "input" if finding.kind == "text" else "output"
            names = block(finding.trace, 0, stack, stage, concept).categories
            flagged.update(names)
            found = dict.fromkeys(names, 1.0) | found
        for name, score in found.items():
            scores[name] = max(score, scores.get(name, 0.0))
            if finding.kind not in types.setdefault(name, []):
                types[name].append(finding.kind)
    return {
        "flagged": bool(flagged),
        "categories": {name: name in flagged for name in scores},
        "category_scores": scores,
        "category_applied_input_types": types,
    }


def category_scores(finding: Finding, stack: StackInfo, concept: str | None) -> dict[str, float]:
    """Return the highest score of each category in a trace, in the units of its guards.

    A guard without scores has 1 if it acted, else 0.
    """
    found: dict[str, float] = {}
    records = {record.guard: record for record in finding.trace.guards}
    for guard in _guards(stack, finding.kind):
        for name, score in _guard_scores(guard, records.get(guard.name)).items():
            category = concept or name
            found[category] = max(score, found.get(category, 0.0))
    return found


def _guard_scores(guard: GuardInfo, record: GuardRecord | None) -> dict[str, float]:
    """Return the scores of a guard by label; by its name if its scores have no labels."""
    acted = record is not None and record.action not in PASSING_ACTIONS
    scores: Mapping[str, float] = record.scores if record is not None else {}
    found = {label: float(scores.get(label, 0.0)) for label in guard.labels}
    others = [float(score) for label, score in scores.items() if label not in guard.labels]
    if others or not found:
        found[guard.name] = max(others, default=float(acted))
    return found


def _guards(stack: StackInfo, kind: InputType) -> list[GuardInfo]:
    """Return the guards of a stack that read an input of a type."""
    return [g for g in stack.guards if (g.reads_prompts if kind == "text" else g.reads_images)]


def _check_guards(stack: StackInfo, texts: Sequence[str], urls: Sequence[str]) -> None:
    """Check that a stack has guards for the inputs.

    Raises:
        ConfigError: it has none.
    """
    for kind, inputs, reads in (
        ("prompts", texts, stack.reads_prompts),
        ("images", urls, stack.reads_images),
    ):
        if inputs and not reads:
            raise ConfigError(
                f"the stack {stack.name!r} must have a guard of {kind} for this, got none. Choose "
                "another stack by model."
            )


def _split_input(body: ModerationBody) -> tuple[list[str], list[str]]:
    """Return the texts and the addresses of images of a request."""
    entries = [body.input] if isinstance(body.input, str) else body.input
    texts = [e if isinstance(e, str) else e.text for e in entries if not isinstance(e, ImageInput)]
    return texts, [entry.image_url.url for entry in entries if isinstance(entry, ImageInput)]


def _read_images(urls: Sequence[str], side: int) -> list[Image.Image]:
    """Return the images of data URLs. Takes a thread.

    Raises:
        ConfigError: one is no data URL or no readable image.
    """
    return [flatten(read_upload(_decode(url), side=side, name="image_url.url")) for url in urls]


def _decode(url: str) -> bytes:
    header, _, data = url.partition(",")
    kind = header.lower()
    if not kind.startswith("data:") or not kind.endswith(";base64"):
        raise ConfigError(
            f"image_url.url must be data:image/...;base64,..., got {url[:40]!r}. The server "
            "fetches no addresses; send the image itself."
        )
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ConfigError("image_url.url must be valid base64") from error


def _complete(found: Sequence[Any], inputs: Sequence[Any]) -> Sequence[Any]:
    """Return what an engine found if it is one entry per input."""
    if len(found) != len(inputs):
        message = f"no result: {len(found)} results for {len(inputs)} inputs"
        raise RequestError(503, message, code="guard_failed", type=FAILED)
    return found
