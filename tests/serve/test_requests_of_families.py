"""Requests to a server of a model that guides only by `true_cfg_scale`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from safegen.core.errors import ConfigError
from safegen.serve.config import ServerConfig
from safegen.serve.requests import build_request


def request_to(config):
    service = SimpleNamespace(
        config=config,
        stack=lambda name: SimpleNamespace(name="flux", samplers=("Euler",)),
        check_limits=lambda request: None,
    )
    return build_request(service, id="1", prompt="a castle", negative_prompt="fog")


def test_requests_have_the_servers_true_guidance():
    assert request_to(ServerConfig(stacks=("mini",))).generation_config.true_cfg_scale == 1.0
    config = ServerConfig(stacks=("mini",), true_cfg_scale=4.0)
    assert request_to(config).generation_config.true_cfg_scale == 4.0


@pytest.mark.parametrize("scale", [0.5, 51.0, float("nan")])
def test_true_guidance_has_bounds(scale):
    with pytest.raises(ConfigError, match="true_cfg_scale"):
        ServerConfig(stacks=("mini",), true_cfg_scale=scale)
