"""CPU threads of workers: together they have as many as there are cores."""

from __future__ import annotations

import pytest

from safegen.serve.config import ServerConfig, UpstreamConfig
from safegen.serve.engine.session import choose_threads


@pytest.mark.parametrize(
    ("settings", "threads"),
    [
        ({"stacks": ("a",)}, 8),
        ({"stacks": ("a", "b")}, 4),
        ({"stacks": ("a", "b"), "workers": 2}, 2),
        ({"stacks": ("a",), "workers": 20}, 1),
        ({"stacks": ("a", "b"), "threads": 3}, 3),
        ({"stacks": ("a", "b"), "engine": "ray"}, 8),
        ({"upstream": UpstreamConfig(url="http://x"), "guards": ("g",), "workers": 2}, 4),
    ],
)
def test_workers_share_the_cores(settings, threads):
    assert choose_threads(ServerConfig(**settings), cores=8) == threads
