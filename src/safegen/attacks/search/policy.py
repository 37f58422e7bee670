"""Policy over sequences of tokens, and the loss that trains it by rewards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 30
"""Width of the policy's embeddings and state (released code of SneakyPrompt)."""


class Policy(nn.Module):
    """Distribution over combinations of tokens, one stage after another, with a value of each."""

    def __init__(self, stages: int, size: int) -> None:
        """Create the networks.

        Args:
            stages: tokens in a combination.
            size: tokens to choose from.
        """
        super().__init__()
        sizes = [1, *[size] * (stages - 1)]
        self.embeddings = nn.ModuleList([nn.Embedding(n, WIDTH) for n in sizes])
        self.embeddings[0].requires_grad_(False)
        self.lstm = nn.LSTMCell(WIDTH, WIDTH)
        self.heads = nn.ModuleList([nn.Linear(WIDTH, size) for _ in sizes])
        self.values = nn.ModuleList([nn.Linear(WIDTH, 1) for _ in sizes])

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> Tensor:
        """Return a combination (stages,)."""
        action, state, actions = torch.zeros(1, dtype=torch.long), None, []
        for embed, head in zip(self.embeddings, self.heads, strict=True):
            state = self.lstm(embed(action), state)
            weights = head(state[0]).softmax(-1)[0]
            action = torch.multinomial(weights, 1, generator=generator)
            actions.append(action)
        return torch.cat(actions)

    def forward(self, combos: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities and the values (n, stages) of combinations (n, stages)."""
        action, state = torch.zeros(len(combos), dtype=torch.long), None
        log_probs, values = [], []
        stages = zip(self.embeddings, self.heads, self.values, combos.unbind(1), strict=True)
        for embed, head, value, chosen in stages:
            state = self.lstm(embed(action), state)
            log_prob = head(state[0]).log_softmax(-1)
            log_probs.append(log_prob.gather(1, chosen[:, None])[:, 0])
            values.append(value(state[0])[:, 0])
            action = chosen
        return torch.stack(log_probs, 1), torch.stack(values, 1)


def policy_loss(log_prob: Tensor, value: Tensor, rewards: Tensor) -> Tensor:
    """Return the loss of REINFORCE with a learned baseline, without discount.

    mean_n sum_k [-log p_nk * (r_n - v_nk) + (r_n - v_nk)^2], with no gradient through the factor of
    log p (released code, commit 4338580).

    Args:
        log_prob: log-probabilities of the drawn tokens (n, stages).
        value: estimates of the reward (n, stages).
        rewards: rewards of the combinations (n,).
    """
    advantage = rewards[:, None] - value
    return (advantage.square() - log_prob * advantage.detach()).sum(1).mean()
