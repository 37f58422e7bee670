"""Self-test of a session at its start: its guards must run, and catch prompts of the concept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image

from safegen.core.concept import Concept, load_concept, prompt_list
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.core.registry import CONCEPTS
from safegen.guards.core.result import GeneratedImage
from safegen.judges import judge_images, load_concept_judge
from safegen.serve.config import ServerConfig
from safegen.serve.gate import check_release
from safegen.serve.messages import ImageRequest

if TYPE_CHECKING:
    from safegen.serve.engine.session import Session

NUM_PROMPTS = 4
"""Prompts of the concept that the self-test generates."""


def check_guards(session: Session, config: ServerConfig) -> str:
    """Check that the guards of a session run, and that prompts of its concept show nothing.

    Returns the name of the concept; empty without guards or a concept. The concept is that of
    the configuration, or else a built-in one with the judge and labels of a guard. Without one
    it is only checked that every guard runs.

    Raises:
        ConfigError: a guard fails or lets the concept pass, or an image of such a prompt would be
            released although the concept's judge finds the concept in it, or cannot judge it.
    """
    info = session.info
    if not info.guards:
        return ""
    concept = _concept(session, config)
    if info.reads_prompts:
        _check_prompt_guards(session, concept)
    if info.reads_images:
        _check_image_guards(session, concept)
    if session.can_generate:
        _check_generation(session, concept, config)
    return concept.name if concept else ""


def _concept(session: Session, config: ServerConfig) -> Concept | None:
    """Return the concept that the guards of a session watch for; None if it is unknown."""
    if config.concept is not None:
        return load_concept(config.concept)
    judged = [guard for guard in session.info.guards if guard.labels]
    for concept in map(load_concept, CONCEPTS):
        for guard in judged:
            same_judge = (guard.judge or "").startswith(concept.judge)
            if same_judge and set(guard.labels) == set(concept.labels):
                return concept
    return None


def _check_prompt_guards(session: Session, concept: Concept | None) -> None:
    """Check that the guards of prompts run; a word list must block the concept's phrases."""
    prompts = list(concept.words) if concept else ["a castle"]
    has_words = any(guard.name == "prompt-filter" for guard in session.info.guards)
    for trace in session.check_prompts(prompts):
        if trace.action == "withhold":
            raise ConfigError(f"self-test: a guard of prompts must run, got {trace.reason!r}")
        if concept and has_words and trace.action != "block":
            raise ConfigError(
                f"self-test: prompt-filter must block the phrases of {concept.name}, and one "
                "passes. Add it to words, or set self_test = false."
            )


def _check_image_guards(session: Session, concept: Concept | None) -> None:
    """Check that the guards of images can judge noise, and cover the concept's own images."""
    noise = Image.effect_noise((64, 64), 32).convert("RGB")
    unsafe = _unsafe_images(concept)
    checked = session.check_images([noise, *unsafe], ["noise"] * (1 + len(unsafe)))
    for image in checked:
        if image.trace.action == "withhold":
            raise ConfigError(f"self-test: a guard of images must run, got {image.trace.reason!r}")
    passed = [image for image in checked[1:] if not image.is_covered]
    if concept is not None and passed:
        raise ConfigError(
            f"self-test: the guards of images must cover images of {concept.name}, and "
            f"{len(passed)} of {len(unsafe)} pass. Use a judge of {concept.name}, or set "
            "self_test = false."
        )


def _unsafe_images(concept: Concept | None) -> list[Image.Image]:
    """Return images that show the concept, of its bundled triplets; empty without any."""
    if concept is None or concept.triplets is None:
        return []
    from safegen.data.triplets.triplets import Triplets

    triplets = Triplets.load(concept.triplets)
    return [triplets.images(i)[0] for i in range(min(NUM_PROMPTS, len(triplets)))]


def _check_generation(session: Session, concept: Concept | None, config: ServerConfig) -> None:
    """Check the images of prompts of the concept, as a client would get them."""
    prompts = _prompts(concept) if concept else ["a castle"]
    info = session.info
    request = ImageRequest(
        id="self-test",
        prompt="",
        stack=info.name,
        seeds=(0,),
        generation_config=GenerationConfig(
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            true_cfg_scale=config.true_cfg_scale,
            batch_size=config.max_batch_size,
        ),
    )
    requests = [replace(request, prompt=text, seeds=(i,)) for i, text in enumerate(prompts)]
    found = session.generate(requests, lambda share: None)
    released: list[GeneratedImage] = []
    for each, images in zip(requests, found, strict=True):
        outcome = check_release(images[0], each, each.seeds[0], info)
        if outcome.status == "fault":
            raise ConfigError(f"self-test: every guard must run, got {outcome.reason!r}")
        released += images if outcome.status == "released" else []
    if concept is not None and released:
        _judge_released(concept, released)


def _judge_released(concept: Concept, released: list[GeneratedImage]) -> None:
    judge = load_concept_judge(concept)
    images = [image.image for image in released if image.image is not None]
    bad = [verdict for verdict in judge_images(judge, images) if verdict != "safe"]
    if bad:
        raise ConfigError(
            f"self-test: no image of prompts for {concept.name} may be released, got "
            f"{len(bad)} that are {bad[0]}. Use other guards or patches, or set self_test = false."
        )


def _prompts(concept: Concept) -> list[str]:
    """Return prompts that ask for the concept."""
    for name in concept.lists.get("explicit", ()):
        return [row.text for row in prompt_list(name, NUM_PROMPTS)]
    return list(concept.words)[:NUM_PROMPTS]
