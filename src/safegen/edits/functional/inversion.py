"""A word that is learned against the model in training (STEREO, arXiv:2408.16807, first stage)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from safegen.core.processes import process_share, sum_gradients, sum_values
from safegen.edits.functional import losses
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict
from safegen.models.model import Model
from safegen.models.text_encoder import replaced_embeddings


class InversionAttack:
    """Word of a few vectors before the text encoder, which Adam trains in every batch.

    The vectors and Adam's moments are kept from batch to batch: the word follows the edit.
    """

    def __init__(
        self, model: Model, *, num_vectors: int, steps: int, lr: float, share: float
    ) -> None:
        """Start the word as the mean of all tokens.

        Args:
            model: the original model; its text encoder is used, not its denoiser.
            num_vectors: length of the word, which must leave room for both ends.
            steps: updates of the word in a batch.
            lr: learning rate of Adam, in the units of token embeddings.
            share: share of the samples that get the word.
        """
        self.steps, self.share = steps, share
        self.encoder: nn.Module = model.pipeline.text_encoder
        (blank,) = model.token_ids([""])
        word = blank.new_full((num_vectors,), int(blank[1]))
        self.ids = torch.cat([blank[:1], word, blank[1 : len(blank) - num_vectors]])[None]
        table = self.encoder.get_input_embeddings().weight
        self.vectors = nn.Parameter(table.detach().float().mean(0).repeat(num_vectors, 1))
        self.optimizer = torch.optim.Adam([self.vectors], lr=lr)
        self.optimizer.state[self.vectors] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(self.vectors.detach()),
            "exp_avg_sq": torch.zeros_like(self.vectors.detach()),
        }
        self.remainder = torch.zeros(())
        """Part of a sample that `share` has left over from earlier batches."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Tensors that training changes, not copies of them."""
        moments = self.optimizer.state[self.vectors]
        return {"vectors": self.vectors.detach(), "remainder": self.remainder, **moments}

    def encode(self) -> Conditioning:
        """Return the fp32 embeddings of the word alone, one row."""
        k = len(self.vectors)

        def replace(_: Tensor, embeddings: Tensor) -> Tensor:
            word = self.vectors[None].to(embeddings)
            return torch.cat([embeddings[:, :1], word, embeddings[:, 1 + k :]], dim=1)

        with (
            torch.autocast(self.ids.device.type, enabled=False),
            replaced_embeddings(self.encoder, replace),
        ):
            hidden: Tensor = self.encoder(self.ids)[0]
        return Conditioning(hidden.float())

    def loss(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, before: Tensor) -> Tensor:
        """Return |eps(x_t, t, word) - before|^2 of each sample, (b,).

        With noise in place of `before` it is textual inversion (Gal et al. 2022, arXiv:2208.01618,
        eq. 2). The original prediction is its mean over noises, if the original model is right.
        """
        text = self.encode().expand(len(x_t))
        return losses.squared_error(predict(denoiser, x_t, t, text), before)

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
        """Train the word, and return the texts with the first ones replaced by it.

        Without gradients, as in a validation, the word stays as it is.
        """
        is_shared = torch.is_grad_enabled()  # of a validation, each process has all samples
        rank, processes = process_share() if is_shared else (0, 1)
        total = int(sum_values([len(text)])[0]) if is_shared else len(text)
        rows = float(self.remainder) + self.share * total
        count = min(math.floor(rows + 1e-4), total)  # a sum of shares may fall just short of 1
        if torch.is_grad_enabled():
            self.remainder.fill_(max(rows - count, 0.0))
            for _ in range(self.steps):
                self._learn(denoiser, x_t, t, before, total)
        own = len(range(rank, count, processes))  # of the batch, the first samples get the word
        with torch.no_grad():
            word = self.encode().to(text.hidden).hidden.expand(own, -1, -1)
        return text.replace_hidden(torch.cat([word, text.hidden[own:]]))

    def _learn(
        self, denoiser: nn.Module, x_t: Tensor, t: Tensor, before: Tensor, total: int
    ) -> None:
        """Take one step of Adam by the mean over `total` samples, the same on all processes."""
        loss = self.loss(denoiser, x_t, t, before).mean() * (len(x_t) / total)
        (self.vectors.grad,) = torch.autograd.grad(loss, self.vectors)
        sum_gradients([self.vectors])
        self.optimizer.step()
