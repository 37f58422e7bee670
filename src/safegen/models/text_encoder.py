"""Text encoders of a pipeline, token by token, as its `encode_prompt` reads a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safegen.models.families.pipeline_specs import LENGTH_OPTION, TEXT_ENCODERS, is_t5, spec_of


def text_encoder_names(pipe: Any) -> tuple[str, ...]:
    """Return the names of the text encoders that a pipeline has; SD 3 may lack its third."""
    return tuple(name for name in TEXT_ENCODERS if getattr(pipe, name, None) is not None)


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
    """One text encoder of a pipeline with its tokenizer: a CLIP or a T5."""

    def __init__(
        self, pipe: Any, name: str = "text_encoder", options: Mapping[str, Any] | None = None
    ) -> None:
        """Take a text encoder.

        Args:
            pipe: diffusers pipeline.
            name: name of the encoder among its components.
            options: options of the pipeline's call, which may limit what T5 reads.
        """
        self.pipe, self.name = pipe, name
        self.tokenizer_name = name.replace("text_encoder", "tokenizer")
        self.tokenizer = getattr(pipe, self.tokenizer_name)
        self.encoder = getattr(pipe, name)
        self.device, self.is_t5 = pipe._execution_device, is_t5(self.tokenizer)
        self.is_penultimate = hasattr(pipe, "text_encoder_2") and not self.is_t5
        """Whether the denoiser reads the layer before the last."""
        self.first = 0 if self.is_t5 else 1
        """Position of a text's first own token: CLIP has a start mark, T5 has none."""
        self.row = self.column = 0
        """Place of its first token and of its first column in the embedding."""
        reads_option = self.is_t5 or not hasattr(pipe, "text_encoder_2")
        self._limit = (options or {}).get(LENGTH_OPTION) if reads_option else None

    @property
    def limit(self) -> int:
        """Tokens that the encoder reads, its marks included."""
        return int(self._limit or self.tokenizer.model_max_length)

    def expand(self, text: str) -> str:
        """Return a text with one word per vector of a textual inversion."""
        return expand_prompt(self.pipe, text, self.tokenizer)

    def token_ids(self, text: str) -> list[int]:
        """Return all token ids of a text, with its marks, also those that are not read."""
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
        n = int(tokens.attention_mask.sum()) - self.first - 1  # the end mark
        return tokens.input_ids.to(self.device), n

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """Return the fp32 embeddings (n, tokens, width) that the denoiser is conditioned on."""
        with torch.autocast(ids.device.type, enabled=False):
            if self.is_penultimate:
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
        """Return one fp32 embedding (n, width) per text.

        CLIP: that of the end mark, projected if the encoder does. The encoder's own pooled output
        can stand before the end: at a textual inversion, if the config has the old `eos_token_id`
        2, or at an end mark that the prompt itself contains. T5 pools nothing: the mean over the
        text's own tokens and its end mark (ours).

        Args:
            ids: padded ids (n, tokens).
            lengths: number of each text's own tokens.
        """
        ends = torch.tensor(lengths) + self.first
        with torch.autocast(ids.device.type, enabled=False):
            hidden: Tensor = self.encoder(ids).last_hidden_state
            if self.is_t5:
                read = (torch.arange(hidden.shape[1]) <= ends[:, None]).to(hidden)
                return (hidden * read[:, :, None]).float().sum(1) / read.float().sum(1)[:, None]
            embeds = hidden[torch.arange(len(ids)), ends]
            if hasattr(self.encoder, "text_projection"):
                embeds = self.encoder.text_projection(embeds)
        return embeds.float()

    def pooled_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the pooled embeddings of texts, (n, width)."""
        ids, lengths = zip(*(self.tokenize(text) for text in texts), strict=True)
        return self.pooled(torch.cat(ids), lengths)

    def token_rows(self, text: str) -> list[int]:
        """Return the rows of the embedding with a text's own tokens."""
        start = self.row + self.first
        return list(range(start, start + self.tokenize(text)[1]))


def clip_encoders(pipe: Any) -> list[TextEncoderView]:
    """Return a pipeline's CLIP text encoders, those that only give a pooled embedding included."""
    views = [TextEncoderView(pipe, name) for name in text_encoder_names(pipe)]
    return [view for view in views if not view.is_t5]


def text_encoders(pipe: Any, options: Mapping[str, Any] | None = None) -> list[TextEncoderView]:
    """Return the text encoders of a pipeline's token embeddings, each with its place.

    Columns of the CLIPs stand side by side. T5's tokens follow in SD 3, and are alone in FLUX.

    Args:
        pipe: diffusers pipeline.
        options: options of its call.
    """
    spec = spec_of(pipe)
    names = spec.token_encoders if spec else TEXT_ENCODERS[:2]
    present = [name for name in names if getattr(pipe, name, None) is not None]
    views = [TextEncoderView(pipe, name, options) for name in present]
    column = 0
    for view in views:
        if view.is_t5:
            view.row = max((other.limit for other in views if not other.is_t5), default=0)
        else:
            view.column, column = column, column + int(view.encoder.config.hidden_size)
    return views


def count_tokens(views: Sequence[TextEncoderView], text: str) -> tuple[int, int]:
    """Return the tokens of a text with its marks, and how many are read.

    T5 counts where there is one, since it reads longer texts than CLIP. Of several CLIPs, the one
    that leaves out most counts.
    """
    longest = [view for view in views if view.is_t5] or views
    counts = [(len(view.token_ids(text)), view.limit) for view in longest]
    return max(counts, key=lambda count: count[0] - count[1])


def token_spans(
    pipe: Any, texts: Sequence[str], options: Mapping[str, Any]
) -> list[list[tuple[int, int, int]]]:
    """Return start, last own token and stop of each span of each text's token embeddings.

    See `Model.token_spans`.

    Args:
        pipe: the pipeline.
        texts: the texts.
        options: options of the pipeline's call.
    """
    spans = [view for view in text_encoders(pipe, options) if not view.column]  # CLIPs share one

    def span(view: TextEncoderView, text: str) -> tuple[int, int, int]:
        last = max(view.first + view.tokenize(text)[1] - 1, 0)
        return view.row, view.row + last, view.row + view.limit

    return [[span(view, text) for view in spans] for text in texts]
