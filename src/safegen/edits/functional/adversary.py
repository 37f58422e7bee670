"""Adversaries: who moves a sample's text embedding to where an edit fails, while the edit learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError
from torch import Tensor, nn

from safegen.core.errors import ConfigError, UserError, explain
from safegen.core.registry import ADVERSARIES, resolve
from safegen.edits.functional import losses
from safegen.edits.functional.closed_form import adversarial_embeddings, projections
from safegen.edits.training.lora import weight_of
from safegen.models.model import Model
from safegen.models.selectors import select_parameters

LARGEST = 2.0
"""Largest radius of a step, as a part of the embedding's norm."""


class EmbeddingAttack(Protocol):
    """An adversary at work on one training."""

    def __call__(
        self,
        denoiser: nn.Module,
        x_t: Tensor,
        t: Tensor,
        text: Tensor,
        *,
        want: Tensor,
        before: Tensor,
    ) -> Tensor:
        """Return the text that is trained on in the place of `text`, (b, tokens, width).

        Args:
            denoiser: the network in training.
            x_t: noised latents, (b, c, h, w).
            t: their timesteps, (b,).
            text: embeddings to start from, (b, tokens, width).
            want: what the denoiser should predict, (b, c, h, w).
            before: what the untouched model predicts for what is erased.
        """
        ...


class Adversary(BaseModel, ABC):
    """Settings of one adversary."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    is_additive: ClassVar[bool] = False
    """Whether its move of one text can be put on another: a sum, not a replacement."""

    name: str
    """The adversary, as in the table."""

    @abstractmethod
    def ready(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return it at work.

        Args:
            model: the untouched model.
            names: parameters that are trained.

        Raises:
            ConfigError: it has no effect on this training.
        """


class NoAdversary(Adversary):
    """No adversary."""

    name: Literal["none"] = "none"
    """The adversary, as in the table."""

    def __bool__(self) -> bool:
        """Return False: a training without one."""
        return False

    def ready(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return what changes nothing."""
        return lambda denoiser, x_t, t, text, *, want, before: text


class FastGradient(Adversary):
    """One step up the loss that is trained (ours)."""

    is_additive: ClassVar[bool] = True
    name: Literal["one-step"] = "one-step"
    """The adversary, as in the table."""
    radius: float = Field(default=0.25, gt=0, le=LARGEST)
    """Size of the step, as a part of the embedding's norm."""

    def ready(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return it at work."""
        return lambda denoiser, x_t, t, text, *, want, before: fast_gradient_text(
            denoiser, x_t, t, text, want, radius=self.radius
        )


class AdvUnlearn(Adversary):
    """Many steps toward what the untouched model said (Zhang et al.

    2024, arXiv:2405.15234); docs/edits.md says what differs.
    """

    name: Literal["adv-unlearn"] = "adv-unlearn"
    """The adversary, as in the table."""
    steps: int = Field(default=30, ge=1)
    """Steps, each of which costs a forward and a backward pass of the batch."""
    step: float = Field(default=0.05, gt=0)
    """Size of a step, as a part of the embedding's root mean square.

    The paper's is 1e-3 on token embeddings, which CLIP draws at 0.02.
    """
    rule: Literal["adam", "sign"] = "adam"
    """What makes a step of a gradient: Adam, or its sign alone (the paper's fast variant)."""
    tokens: int = Field(default=1, ge=0)
    """Length of a prefix put behind the start mark, which alone is moved.

    0 moves the whole embedding (ours).
    """

    def ready(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return it at work. A prefix starts as what follows the start mark of a blank text.

        Raises:
            ConfigError: the prefix leaves no room for the text.
        """
        _, *rest = model.encode_text([""])[0].float()
        if self.tokens >= len(rest):
            raise ConfigError(
                f"adversary.tokens must be below {len(rest)} on this model, or no word of the text is left, got {self.tokens}"
            )
        prefix = rest[0].expand(self.tokens, -1) if self.tokens else None
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
    """The embedding whose keys and values are now what the text's were, solved anew for each batch (RECE, arXiv:2407.12383, eq. 8)."""

    name: Literal["closed-form"] = "closed-form"
    """The adversary, as in the table."""
    ridge: float = Field(default=0.1, gt=0)
    """Weight that keeps the found embedding short, as in RECE."""

    def ready(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return it at work.

        Raises:
            ConfigError: no key and no value of the text is trained, so that the embedding found is
                the text itself, only shorter.
        """
        if not set(select_parameters(model.denoiser, "kv2")) & set(names):
            raise ConfigError(
                "adversary closed-form has no effect where keys and values of attn2 are not trained; "
                "train them (selector kv2, attn2, attention or all), or take one-step or adv-unlearn"
            )
        original = projections(model)
        where = "cpu" if model.device.type == "mps" else model.device  # which knows no float64

        @torch.no_grad()
        def attack(
            denoiser: nn.Module,
            x_t: Tensor,
            t: Tensor,
            text: Tensor,
            *,
            want: Tensor,
            before: Tensor,
        ) -> Tensor:
            net = getattr(denoiser, "module", denoiser)
            now = [
                weight_of(net.get_submodule(name.removesuffix(".weight"))).to(where)
                for name in original
            ]
            then = [w.to(where) for w in original.values()]
            found = adversarial_embeddings(
                now, then, text.flatten(0, 1).to(where), ridge=self.ridge
            )
            return found.reshape(text.shape).to(text)

        return attack


def read_adversary(value: object) -> float | Adversary:
    """Return the adversary that a setting means: a number is the radius of one step (0 is none), a word a name, a table its settings.

    Raises:
        ValueError: it breaks a rule; the message says which.
    """
    if isinstance(value, Adversary):
        return value
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = {"name": value}
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 <= value <= LARGEST:
            raise ValueError(
                f"the radius of one step must be from 0 (none) to {LARGEST:g}, got {value:g}"
            )
        return float(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(
            f"an adversary is a number, one of {', '.join(sorted(ADVERSARIES))}, or a table with such a name, got {value!r}"
        )
    try:
        kind: type[Adversary] = resolve(ADVERSARIES, value["name"], "adversary")
        return kind.model_validate(dict(value))
    except ValidationError as error:
        raise ValueError(f"adversary {value['name']!r}: {explain(error, kind)}") from error
    except UserError as error:
        raise ValueError(str(error)) from error


AdversarySetting = Annotated[
    float | Adversary,
    PlainValidator(read_adversary, json_schema_input_type=Any),
    PlainSerializer(lambda value: value.model_dump() if isinstance(value, Adversary) else value),
]
"""The setting of an edit that takes an adversary."""


def build_adversary(
    setting: float | Adversary, model: Model, names: Sequence[str]
) -> EmbeddingAttack | None:
    """Return the adversary of a setting at work; None for none.

    Args:
        setting: what the edit says.
        model: the untouched model.
        names: parameters that are trained.

    Raises:
        ConfigError: it has no effect on this training.
    """
    if not setting:
        return None
    return resolve_adversary(setting).ready(model, names)


def resolve_adversary(setting: float | Adversary) -> Adversary:
    """Return the adversary that a setting means; a number is the radius of one step, 0 none."""
    if isinstance(setting, Adversary):
        return setting
    return FastGradient(radius=setting) if setting else NoAdversary()


def fast_gradient_text(
    denoiser: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, want: Tensor, *, radius: float
) -> Tensor:
    """Return text embeddings one normalised ascent step up the loss: the nearby text under which the censoring fails most.

    c + radius |c| g / |g|, g = d |eps(x_t, t, c) - want|^2 / dc, norms per sample (ours;
    adversarial training of a concept edit as in Zhang et al. 2024, arXiv:2405.15234, with one step,
    no word of the concept, and pictures in place of a prompt).

    Args:
        denoiser: the network in training.
        x_t: noised unsafe latents, (b, c, h, w).
        t: timesteps, (b,).
        text: embeddings to start from, (b, tokens, width).
        want: what the denoiser should predict.
        radius: size of the step as a part of the embedding's norm; unitless, > 0.
    """
    start = text.detach().requires_grad_()
    with torch.enable_grad():
        gap = losses.squared_error(denoiser(x_t, t, start).sample, want).sum()
        (slope,) = torch.autograd.grad(gap, start)
    size = text.norm(dim=(1, 2), keepdim=True) / slope.norm(dim=(1, 2), keepdim=True).clamp(
        min=1e-12
    )
    return (text + radius * size * slope).detach()


def adv_unlearn_text(
    denoiser: nn.Module,
    x_t: Tensor,
    t: Tensor,
    text: Tensor,
    before: Tensor,
    *,
    steps: int,
    step: float,
    rule: str,
    prefix: Tensor | None,
) -> Tensor:
    """Return text embeddings under which the edited model says what the untouched one said: the way back to the concept.

    Descends |eps(x_t, t, c*) - before|^2, the inner problem of AdvUnlearn (Zhang et al. 2024,
    arXiv:2405.15234), from a move of zero, by Adam (betas 0.9 and 0.999) or by signs. Moves are in
    units of the root mean square of a sample's text. Samples do not touch each other.

    Args:
        denoiser: the network in training.
        x_t: noised latents, (b, c, h, w).
        t: timesteps, (b,).
        text: embeddings to start from, (b, tokens, width).
        before: what the untouched model predicts for what is erased, (b, c, h, w).
        steps: how many, >= 1.
        step: size of one; unitless, > 0.
        rule: `adam` or `sign`.
        prefix: rows (k, width) that are put behind the start mark and alone are moved, as many of
            the last dropped; None moves all rows.

    Returns:
        The embeddings, (b, tokens, width).
    """
    head, rows, tail = text[:, :0], text, text[:, :0]
    if prefix is not None:
        head, rows, tail = (
            text[:, :1],
            prefix.to(text).expand(len(text), -1, -1),
            text[:, 1 : text.shape[1] - len(prefix)],
        )
    size = text.pow(2).mean(dim=(1, 2), keepdim=True).sqrt()
    move, mean, square = torch.zeros(3, *rows.shape, dtype=text.dtype, device=text.device)
    for i in range(1, steps + 1):
        move = move.detach().requires_grad_()
        with torch.enable_grad():
            moved = torch.cat([head, rows + size * move, tail], dim=1)
            (slope,) = torch.autograd.grad(
                losses.squared_error(denoiser(x_t, t, moved).sample, before).sum(), move
            )
        if rule == "sign":
            way = slope.sign()
        else:
            mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
            way = mean / (1 - 0.9**i) / ((square / (1 - 0.999**i)).sqrt() + 1e-8)
        move = move.detach() - step * way
    return torch.cat([head, rows + size * move, tail], dim=1).detach()
