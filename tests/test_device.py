"""The device `auto` is the accelerator if there is one, and the first line says what is used."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import safegen
from safegen.core.device import describe_device, resolve_device
from safegen.core.errors import ConfigError
from safegen.stack_loader import StackLoader


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_auto_is_the_accelerator_if_there_is_one(monkeypatch, kind):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    assert resolve_device() == resolve_device("auto") == StackLoader().device == kind
    assert resolve_device("cpu") == "cpu"


def test_auto_is_the_cpu_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert resolve_device() == "cpu"
    assert safegen.load("mini").device.type == "cpu"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_devices_are_given_by_name_or_as_torch_devices(device):
    assert safegen.load("mini", device=device).device == torch.device("cpu")


def test_unknown_devices_are_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="device must be one that torch can use"):
        safegen.load("mini", device="gpu")


def test_devices_are_described_with_their_size():
    assert describe_device("cpu").startswith(f"cpu ({torch.get_num_threads()} thread")
    assert describe_device("mps") == "mps"


def test_models_are_described_in_one_line():
    text = safegen.load("mini", dtype="bf16", device="cpu").describe()
    assert text.startswith("mini: UNet2DConditionModel of 7.3 M weights, 64 x 64 pixels, bf16 on")
    assert "\n" not in text


def test_each_model_that_a_loader_loads_is_reported():
    seen = []
    loader = StackLoader(device="cpu", on_load=seen.append)
    for _ in range(2):
        model, _hash = loader.model("mini")
    assert seen == [model]


def test_importing_the_device_module_loads_no_torch():
    code = "import sys, safegen.core.device; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
