"""Text encoders as networks of their own: what the denoiser reads of each one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safegen.models.families.pipeline_specs import call_defaults, spec_class
from safegen.models.text_encoder import TextEncoderView, text_encoder_names

TextOutput = Literal["last", "penultimate", "pooled"]
"""Output of a text encoder: token embeddings of the last layer after its norm, or of the layer
before it, or one embedding of the whole text."""
_CLIP: tuple[TextOutput, ...] = ("penultimate", "pooled")
_OUTPUTS: Mapping[str, Mapping[str, tuple[TextOutput, ...]]] = {
    "StableDiffusionPipeline": {"text_encoder": ("last",)},
    "StableDiffusionXLPipeline": {"text_encoder": ("penultimate",), "text_encoder_2": _CLIP},
    "StableDiffusion3Pipeline": {
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "text_encoder_3": ("last",),
    },
    "FluxPipeline": {"text_encoder": ("pooled",), "text_encoder_2": ("last",)},
}
"""Class of the pipeline, text encoder: its outputs that the denoiser is conditioned on."""


def text_outputs(pipe: Any) -> dict[str, tuple[TextOutput, ...]]:
    """Return the outputs of each text encoder of a pipeline that its denoiser is conditioned on."""
    kind = spec_class(type(pipe))
    outputs = _OUTPUTS.get(kind.__name__, {}) if kind else {}
    return {name: outputs[name] for name in text_encoder_names(pipe) if name in outputs}


class TextEncoders(nn.Module):
    """Text encoders of a pipeline as one network, for training.

    Its parameters have the names that patches have for them. It stays in evaluation mode, so that
    nothing is dropped out.
    """

    def __init__(self, pipe: Any, components: Sequence[str]) -> None:
        """Store some text encoders of a pipeline, which are not copied.

        Args:
            pipe: the pipeline.
            components: names of the encoders.
        """
        super().__init__()
        self.pipe = [pipe]  # a list, as the pipeline is no part of the network
        self.outputs = {name: text_outputs(pipe)[name] for name in components}
        for name in components:
            encoder = getattr(pipe, name)
            is_flat = hasattr(encoder, "embeddings")  # see `patched_weights.encoder_weights`
            self.add_module(name, nn.ModuleDict({"text_model": encoder}) if is_flat else encoder)

    def train(self, mode: bool = True) -> TextEncoders:
        """Return the network; the encoders stay as they are."""
        self.training = mode
        return self

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the ids (n, tokens) that each encoder reads for texts, on the CPU."""
        return {name: token_ids(self.pipe[0], name, texts) for name in self.outputs}

    def forward(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs that the denoiser reads, (n, d) each, flattened over tokens.

        Args:
            ids: ids (n, tokens) by encoder.

        Returns:
            Embeddings by `ENCODER.OUTPUT`, such as `text_encoder.last`.
        """
        read: dict[str, Tensor] = {}
        for name, kinds in self.outputs.items():
            encoder = getattr(self.pipe[0], name)
            for kind, value in read_outputs(encoder, ids[name].to(encoder.device), kinds).items():
                read[f"{name}.{kind}"] = value.flatten(1)
        return read


def token_ids(pipe: Any, component: str, texts: Sequence[str]) -> Tensor:
    """Return the ids (n, tokens) that a text encoder reads for texts in a call with defaults."""
    view = TextEncoderView(pipe, component, call_defaults(pipe))
    return torch.cat([view.tokenize(text)[0].cpu() for text in texts])


def read_outputs(encoder: Any, ids: Tensor, kinds: Sequence[TextOutput]) -> dict[str, Tensor]:
    """Return outputs of a text encoder by kind: (n, tokens, width), `pooled` (n, width)."""
    output = encoder(ids, output_hidden_states="penultimate" in kinds)
    read: dict[str, Tensor] = {}
    if "last" in kinds:
        read["last"] = output.last_hidden_state
    if "penultimate" in kinds:
        read["penultimate"] = output.hidden_states[-2]
    if "pooled" in kinds:
        projected = getattr(output, "text_embeds", None)
        read["pooled"] = output.pooler_output if projected is None else projected
    return read
