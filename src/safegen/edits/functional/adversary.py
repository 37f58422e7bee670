"""Adversaries: they move the text embedding of a sample to where an edit fails during training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field, PlainSerializer, PlainValidator, ValidationError
from torch import Tensor, nn

from safegen.core.errors import ConfigError, UserError, explain
from safegen.core.registry import ADVERSARIES, resolve
from safegen.core.settings import MAX_STEPS, MethodSettings
from safegen.edits.functional.closed_form import adversarial_embeddings, projections
from safegen.edits.functional.inversion import InversionAttack
from safegen.edits.functional.text_search import adv_unlearn_text, fast_gradient_text
from safegen.edits.training.lora import merged_weight
from safegen.models.families.conditioning import Conditioning
from safegen.models.model import Model
from safegen.models.text_encoder import text_encoder_names

MAX_RADIUS = 2.0
"""Maximum radius of a step, relative to the norm of the embedding."""


class EmbeddingAttack(Protocol):
    """An adversary of one training."""

    def __call__(
        self,
        denoiser: nn.Module,
        x_t: Tensor,
        t: Tensor,
        text: Conditioning,
        *,
        want: Tensor,
        before: Tensor,
    ) -> Conditioning:
        """Return the text embeddings to train on instead of `text`, b rows.

        Args:
            denoiser: the network in training.
            x_t: noised latents, (b, c, h, w).
            t: timesteps, (b,).
            text: embeddings to start from, b rows.
            want: target of the denoiser, (b, c, h, w).
            before: original prediction for the erased concept, (b, c, h, w).
        """
        ...


class Adversary(MethodSettings, ABC):
    """Settings of one adversary."""

    is_additive: ClassVar[bool] = False
    """Whether the move is a sum, which can be added to another text too."""

    name: str
    """Name of the adversary."""

    @abstractmethod
    def build(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return the attack on one training.

        Args:
            model: the original model.
            names: trained parameters.

        Raises:
            ConfigError: the attack does not suit the model or the trained parameters.
        """


class NoAdversary(Adversary):
    """No adversary."""

    name: Literal["none"] = "none"
    """Name of the adversary."""

    def __bool__(self) -> bool:
        """Return False, so that an edit skips the attack."""
        return False

    def build(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return an attack that changes nothing."""
        return lambda denoiser, x_t, t, text, *, want, before: text


class FastGradient(Adversary):
    """One normalized gradient step up the training loss (ours)."""

    is_additive: ClassVar[bool] = True
    name: Literal["one-step"] = "one-step"
    """Name of the adversary."""
    radius: float = Field(default=0.25, gt=0, le=MAX_RADIUS)
    """Size of the step, relative to the norm of the embedding."""

    def build(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return the attack."""
        return lambda denoiser, x_t, t, text, *, want, before: fast_gradient_text(
            denoiser, x_t, t, text, want, radius=self.radius
        )


class AdvUnlearn(Adversary):
    """Several steps toward the original prediction (Zhang et al. 2024, arXiv:2405.15234)."""

    paper: ClassVar[str] = "arXiv:2405.15234"
    code_url: ClassVar[str] = "https://github.com/OPTML-Group/AdvUnlearn"
    code_commit: ClassVar[str] = "9d23124"
    parity: ClassVar[str] = (
        "Five steps of either rule equal those of torch's Adam to 1e-4. With `rule=sign` Adam gets "
        "the signs of the gradient, as in the released `fast_at`."
    )
    deviations: ClassVar[str] = (
        "The denoiser is trained, not the text encoder, and attacked from the first update on. The "
        "prefix is in the text encoder's output, where padding was, not in its input. Every search "
        "starts from the same embedding, so that a training can resume. It uses the latents and "
        "the timestep of the sample, not those of a new trajectory. Each step has a gradient of "
        "its own; the released search adds up those of all steps."
    )
    name: Literal["adv-unlearn"] = "adv-unlearn"
    """Name of the adversary."""
    steps: int = Field(default=30, ge=1, le=MAX_STEPS)
    """Steps, each with a forward and a backward pass of the batch."""
    step: float = Field(default=0.05, gt=0)
    """Size of a step, relative to the root mean square of the embedding.

    The paper has 1e-3 on token embeddings, which CLIP initializes with a deviation of 0.02.
    """
    rule: Literal["adam", "sign"] = "adam"
    """Gradient that Adam gets: itself, or its signs (the released `fast_at`)."""
    tokens: int = Field(default=1, ge=0, le=MAX_STEPS)
    """Length of a prefix after the start token, which alone is moved; 0 moves all tokens (ours)."""

    def build(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return the attack. A prefix starts as the token after the start token of a blank text.

        Raises:
            ConfigError: the prefix leaves no room for the text.
        """
        _, *tokens = model.encode_text([""]).hidden[0].float()
        if self.tokens >= len(tokens):
            raise ConfigError(
                f"adversary.tokens must be below {len(tokens)} on this model, got {self.tokens}. "
                "A longer prefix leaves no room for the text."
            )
        prefix = tokens[0].expand(self.tokens, -1) if self.tokens else None
        return lambda denoiser, x_t, t, text, *, want, before: adv_unlearn_text(
            denoiser,
            x_t,
            t,
            text,
            before,
            steps=self.steps,
            step=self.step,
            rule=self.rule,
            prefix=prefix,
        )


class ReceAdversary(Adversary):
    """The embedding that the edited keys and values map as the original ones map the text.

    Solved for each batch (Gong et al. 2024, RECE, arXiv:2407.12383, eq. 8).
    """

    paper: ClassVar[str] = "arXiv:2407.12383"
    code_url: ClassVar[str] = "https://github.com/CharlesGong12/RECE"
    parity: ClassVar[str] = "The embedding is that of the edit `rece`, which has its figures."
    deviations: ClassVar[str] = (
        "It is solved for the weights of every training step, in float64, and the edit is trained "
        "on it by gradient; RECE solves once a round and edits in closed form."
    )
    name: Literal["closed-form"] = "closed-form"
    """Name of the adversary."""
    ridge: float = Field(default=0.1, gt=0)
    """Weight of the norm of the embedding, as in RECE."""

    def build(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return the attack.

        Raises:
            ConfigError: no key or value of cross-attention is trained, so that the solution is the
                text itself.
        """
        original = projections(model)["hidden"]
        trained = {name for name in original if any(n.startswith(_module(name)) for n in names)}
        if not trained:
            raise ConfigError(
                "adversary closed-form needs trained projections of text "
                f"({', '.join(list(original)[:2])}, ...), got none. Use another selector, such as "
                "all, or another adversary."
            )
        device = "cpu" if model.device.type == "mps" else model.device  # MPS has no float64

        @torch.no_grad()
        def attack(
            denoiser: nn.Module,
            x_t: Tensor,
            t: Tensor,
            text: Conditioning,
            *,
            want: Tensor,
            before: Tensor,
        ) -> Conditioning:
            edited = [
                merged_weight(denoiser.get_submodule(name.removesuffix(".weight")))
                if name in trained
                else weight
                for name, weight in original.items()
            ]
            edited = [weight.to(device) for weight in edited]
            unedited = [w.to(device) for w in original.values()]
            hidden = text.hidden
            keys = hidden.flatten(0, 1).to(device)
            embeddings = adversarial_embeddings(edited, unedited, keys, ridge=self.ridge)
            return text.replace_hidden(embeddings.reshape(hidden.shape).to(hidden))

        return attack


class InversionAdversary(Adversary):
    """A word that is learned against the edited model, beside it (STEREO, arXiv:2408.16807).

    The model must have one text encoder.
    """

    paper: ClassVar[str] = "arXiv:2408.16807"
    code_url: ClassVar[str] = "https://github.com/koushiksrivats/robust-concept-erasing"
    code_commit: ClassVar[str] = "86f124f"
    parity: ClassVar[str] = (
        "Three steps of the word equal those of torch's Adam on a row of the embedding table, as "
        "in the released `train_concept_inversion`, to 1e-6."
    )
    deviations: ClassVar[str] = (
        "This is the first stage, and its rounds are batches: the word takes `steps` updates in "
        "each, and stays one word. The released code takes turns, 200 updates of ESD and 3000 of a "
        "new word, and edits the original model in its second stage, against the words of all "
        "rounds. The word is trained toward the original prediction on the latents of the edit, "
        "not toward the noise of images of the concept. It starts as the mean of all tokens, not "
        "as a word such as person. Adam has no weight decay."
    )
    name: Literal["inversion"] = "inversion"
    """Name of the adversary."""
    num_vectors: int = Field(default=3, ge=1, le=MAX_STEPS)
    """Vectors of the word."""
    steps: int = Field(default=3, ge=1, le=MAX_STEPS)
    """Updates of the word in a batch, each with a forward and a backward pass of the batch."""
    lr: float = Field(default=5e-3, gt=0)
    """Learning rate of the word."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the samples that get the word; the others keep their text."""

    def build(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return the attack.

        Raises:
            ConfigError: the model has several text encoders, or the word leaves no room for the
                marks at both ends of a text.
        """
        encoders = text_encoder_names(model.pipeline)
        if len(encoders) > 1:
            raise ConfigError(
                "adversary inversion needs a model with one text encoder, got "
                f"{', '.join(encoders)}. Use another adversary, such as one-step."
            )
        limit = int(model.pipeline.tokenizer.model_max_length) - 2
        if self.num_vectors > limit:
            raise ConfigError(
                f"adversary.num_vectors must be at most {limit} on this model, "
                f"got {self.num_vectors}."
            )
        settings = self.model_dump(exclude={"name"})
        return InversionAttack(model, **settings)


def _module(name: str) -> str:
    """Return the module of a weight, before which peft and LoRAs put their own names."""
    return name.removesuffix("weight")


def parse_adversary(value: object) -> float | Adversary:
    """Return the adversary of a setting: the radius of one step, a name, or a table.

    Raises:
        ValueError: the value breaks a rule.
    """
    if isinstance(value, Adversary):
        return value
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = {"name": value}
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 <= value <= MAX_RADIUS:
            raise ValueError(
                f"the radius of one step must be from 0 (none) to {MAX_RADIUS:g}, got {value:g}"
            )
        return float(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(  # noqa: TRY004, pydantic reports ValueError only
            f"an adversary must be a number, one of {', '.join(sorted(ADVERSARIES))}, "
            f"or a table with such a name, got {value!r}"
        )
    name = value["name"]
    try:
        kind: type[Adversary] = resolve(ADVERSARIES, name, "adversary")
        return kind.model_validate(dict(value))
    except ValidationError as error:
        raise ValueError(f"adversary {name!r}: {explain(error, kind)}") from error
    except UserError as error:
        raise ValueError(str(error)) from error


AdversarySetting = Annotated[
    float | Adversary,
    PlainValidator(parse_adversary, json_schema_input_type=Any),
    PlainSerializer(lambda value: value.model_dump() if isinstance(value, Adversary) else value),
]
"""Type of the setting of an edit that takes an adversary."""


def build_adversary(
    setting: float | Adversary, model: Model, names: Sequence[str]
) -> EmbeddingAttack | None:
    """Return the attack of a setting on one training; None for no adversary.

    Args:
        setting: the setting of the edit.
        model: the original model.
        names: trained parameters.

    Raises:
        ConfigError: the attack does not suit the model or the trained parameters.
    """
    return resolve_adversary(setting).build(model, names) if setting else None


def resolve_adversary(setting: float | Adversary) -> Adversary:
    """Return the adversary of a setting; a number is the radius of one step, and 0 is none."""
    if isinstance(setting, Adversary):
        return setting
    return FastGradient(radius=setting) if setting else NoAdversary()
