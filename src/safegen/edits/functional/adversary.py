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
from safegen.core.settings import MAX_STEPS, BaseSettings
from safegen.edits.functional import losses
from safegen.edits.functional.closed_form import adversarial_embeddings, projections
from safegen.edits.training.lora import merged_weight
from safegen.models.model import Model
from safegen.models.selectors import select_parameters

MAX_RADIUS = 2.0
"""Maximum radius of a step, relative to the norm of the embedding."""


class EmbeddingAttack(Protocol):
    """An adversary of one training."""

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
        """Return the text embeddings to train on instead of `text`, (b, tokens, width).

        Args:
            denoiser: the network in training.
            x_t: noised latents, (b, c, h, w).
            t: timesteps, (b,).
            text: embeddings to start from, (b, tokens, width).
            want: target of the denoiser, (b, c, h, w).
            before: original prediction for the erased concept, (b, c, h, w).
        """
        ...


class Adversary(BaseSettings, ABC):
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

    name: Literal["adv-unlearn"] = "adv-unlearn"
    """Name of the adversary."""
    steps: int = Field(default=30, ge=1, le=MAX_STEPS)
    """Steps, each with a forward and a backward pass of the batch."""
    step: float = Field(default=0.05, gt=0)
    """Size of a step, relative to the root mean square of the embedding.

    The paper has 1e-3 on token embeddings, which CLIP initializes with a deviation of 0.02.
    """
    rule: Literal["adam", "sign"] = "adam"
    """Update rule: Adam, or the sign of the gradient (the paper's fast variant)."""
    tokens: int = Field(default=1, ge=0, le=MAX_STEPS)
    """Length of a prefix after the start token, which alone is moved; 0 moves all tokens (ours)."""

    def build(self, model: Model, names: Sequence[str]) -> EmbeddingAttack:
        """Return the attack. A prefix starts as the token after the start token of a blank text.

        Raises:
            ConfigError: the prefix leaves no room for the text.
        """
        _, *tokens = model.encode_text([""])[0].float()
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
        if not set(select_parameters(model.denoiser, "kv2")) & set(names):
            raise ConfigError(
                "adversary closed-form needs trained keys and values of attn2, got none. "
                "Use selector kv2, attn2, attention or all, or another adversary."
            )
        original = projections(model)
        device = "cpu" if model.device.type == "mps" else model.device  # MPS has no float64

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
            modules = [net.get_submodule(name.removesuffix(".weight")) for name in original]
            edited = [merged_weight(module).to(device) for module in modules]
            unedited = [w.to(device) for w in original.values()]
            keys = text.flatten(0, 1).to(device)
            embeddings = adversarial_embeddings(edited, unedited, keys, ridge=self.ridge)
            return embeddings.reshape(text.shape).to(text)

        return attack


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


def fast_gradient_text(
    denoiser: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, want: Tensor, *, radius: float
) -> Tensor:
    """Return text embeddings after one normalized gradient step up the loss.

    c + radius |c| g / |g|, g = d |eps(x_t, t, c) - want|^2 / dc, with norms per sample (ours, after
    the adversarial training of Zhang et al. 2024, arXiv:2405.15234).

    Args:
        denoiser: the network in training.
        x_t: noised latents, (b, c, h, w).
        t: timesteps, (b,).
        text: embeddings to start from, (b, tokens, width).
        want: target of the denoiser, (b, c, h, w).
        radius: size of the step, relative to the norm of the embedding; unitless, > 0.
    """
    start = text.detach().requires_grad_()
    with torch.enable_grad():
        loss = losses.squared_error(denoiser(x_t, t, start).sample, want).sum()
        (gradient,) = torch.autograd.grad(loss, start)
    norm = gradient.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    size = text.norm(dim=(1, 2), keepdim=True) / norm
    return (text + radius * size * gradient).detach()


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
    """Return text embeddings for which the edited model predicts what the original one predicted.

    Descends |eps(x_t, t, c*) - before|^2, the inner problem of AdvUnlearn (Zhang et al. 2024,
    arXiv:2405.15234), by Adam (betas 0.9 and 0.999) or by signs. Samples are independent.

    Args:
        denoiser: the network in training.
        x_t: noised latents, (b, c, h, w).
        t: timesteps, (b,).
        text: embeddings to start from, (b, tokens, width).
        before: original prediction for the erased concept, (b, c, h, w).
        steps: number of steps, >= 1.
        step: size of a step, relative to the root mean square of a sample's text; unitless, > 0.
        rule: `adam` or `sign`.
        prefix: rows (k, width) inserted after the start token; the last k rows are dropped, and
            only the prefix is moved. None moves all rows.

    Returns:
        The embeddings, (b, tokens, width).
    """
    head, rows, tail = text[:, :0], text, text[:, :0]
    if prefix is not None:
        head, tail = text[:, :1], text[:, 1 : text.shape[1] - len(prefix)]
        rows = prefix.to(text).expand(len(text), -1, -1)
    size = text.pow(2).mean(dim=(1, 2), keepdim=True).sqrt()
    move, mean, square = torch.zeros(3, *rows.shape, dtype=text.dtype, device=text.device)
    for i in range(1, steps + 1):
        move = move.detach().requires_grad_()
        with torch.enable_grad():
            moved = torch.cat([head, rows + size * move, tail], dim=1)
            loss = losses.squared_error(denoiser(x_t, t, moved).sample, before).sum()
            (gradient,) = torch.autograd.grad(loss, move)
        if rule == "sign":
            direction = gradient.sign()
        else:
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            direction = mean / (1 - 0.9**i) / ((square / (1 - 0.999**i)).sqrt() + 1e-8)
        move = move.detach() - step * direction
    return torch.cat([head, rows + size * move, tail], dim=1).detach()
