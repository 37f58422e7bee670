"""Tiny random models of SD 2.x (v-prediction) and SDXL."""

from __future__ import annotations

import pytest
from real import UNETS


@pytest.fixture(scope="session")
def make_tiny():
    """Return a builder of tiny random models by family; see `tests/tiny.py`."""
    from tests.tiny import build_model

    return build_model


@pytest.fixture(scope="session", params=["sd2-v", "sdxl"])
def other_build(request, make_tiny):
    """Return a tiny SD 2.x, then a tiny SDXL, both read-only."""
    return make_tiny(request.param)


@pytest.fixture(scope="module", params=sorted(UNETS))
def real(request):
    """Return an architecture and its UNet of real size, without weights."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return request.param, UNet2DConditionModel(**UNETS[request.param])
