"""Text encoders of a pipeline, token by token, as its `encode_prompt` reads a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safegen.models.pipeline_specs import is_t5


def expand_prompt(pipe: Any, text: str, tokenizer: Any) -> str:
    """Return the text that a pipeline tokenizes: one word per vector of a textual inversion."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return text if convert is None else str(convert(text, tokenizer))


@contextmanager
def replaced_embeddings(
    encoder: Any, replace: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Change the token embeddings that a text encoder reads inside the block.

    Args:
        encoder: the text encoder.
        replace: gets the ids (n, length) and their embeddings (n, length, width), and returns the
            embeddings to use; gradients flow through them.
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return replace(inputs[0], output)

    handle = encoder.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_ids(encoder: Any, ids: Tensor) -> Iterator[None]:
    """Make a text encoder read other ids inside the block than it is called with.

    Args:
        encoder: the text encoder.
        ids: ids (n, length), as many rows as the encoder is called with.
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (ids.to(inputs[0]), *inputs[1:])

    handle = encoder.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class TextEncoderView:
    """One text encoder of a pipeline with its tokenizer."""

    def __init__(self, pipe: Any, name: str = "text_encoder") -> None:
        self.pipe, self.tokenizer_name = pipe, name.replace("text_encoder", "tokenizer")
        self.tokenizer = getattr(pipe, self.tokenizer_name)
        self.encoder = getattr(pipe, name)
        self.device, self.is_sdxl = pipe._execution_device, hasattr(pipe, "text_encoder_2")

    @property
    def limit(self) -> int:
        """Tokens that the encoder reads, both ends included."""
        return int(self.tokenizer.model_max_length)

    def expand(self, text: str) -> str:
        """Return a text with one word per vector of a textual inversion."""
        return expand_prompt(self.pipe, text, self.tokenizer)

    def token_ids(self, text: str) -> list[int]:
        """Return all token ids of a text, with both ends, also those that are not read."""
        return list(self.tokenizer(self.expand(text)).input_ids)

    def tokenize(self, text: str) -> tuple[Tensor, int]:
        """Return the padded ids (1, tokens) of a prompt, and the number of its own tokens."""
        tokens = self.tokenizer(
            [self.expand(text)],
            padding="max_length",
            max_length=self.limit,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.device), int(tokens.attention_mask.sum()) - 2

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """Return the fp32 embeddings (n, tokens, width) that the denoiser is conditioned on."""
        with torch.autocast(ids.device.type, enabled=False):
            if self.is_sdxl:
                hidden: Tensor = self.encoder(ids, output_hidden_states=True).hidden_states[-2]
            else:
                hidden = self.encoder(ids)[0]
        return hidden.float()

    @torch.no_grad()
    def normed(self, ids: Tensor) -> Tensor:
        """Return the fp32 embeddings (n, tokens, width) after the last layer norm."""
        with torch.autocast(ids.device.type, enabled=False):
            hidden: Tensor = self.encoder(ids).last_hidden_state
        return hidden.float()

    @torch.no_grad()
    def pooled(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the fp32 embeddings (n, width) of the end marks, projected if the encoder does.

        The encoder's own pooled output can stand before the end: at a textual inversion, if the
        config has the old `eos_token_id` 2, or at an end mark that the prompt itself contains.

        Args:
            ids: padded ids (n, tokens).
            lengths: number of each text's own tokens.
        """
        with torch.autocast(ids.device.type, enabled=False):
            hidden: Tensor = self.encoder(ids).last_hidden_state
            embeds = hidden[torch.arange(len(ids)), torch.tensor(lengths) + 1]
            if hasattr(self.encoder, "text_projection"):
                embeds = self.encoder.text_projection(embeds)
        return embeds.float()

    def pooled_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the pooled embeddings of texts, (n, width)."""
        ids, lengths = zip(*(self.tokenize(text) for text in texts), strict=True)
        return self.pooled(torch.cat(ids), lengths)


def clip_encoders(pipe: Any) -> list[TextEncoderView]:
    """Return a pipeline's CLIP text encoders; T5, whose tokens are others, is none of them."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    views = [TextEncoderView(pipe, name) for name in names if getattr(pipe, name, None) is not None]
    return [view for view in views if not is_t5(view.tokenizer)]


def text_encoders(pipe: Any) -> list[TextEncoderView]:
    """Return a pipeline's CLIP text encoders in the order of their columns in the embedding."""
    return [
        TextEncoderView(pipe, name)
        for name in ("text_encoder", "text_encoder_2")
        if getattr(pipe, name, None) is not None
    ]
