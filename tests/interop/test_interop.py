"""The script that lets other programs read our files, without running them; they take minutes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.tiny import build_model
from tools.interop import __main__ as interop
from tools.interop.files import CHANGE, RANK, Files, random_lora
from tools.interop.packages import PACKAGES
from tools.interop.scene import Report


@pytest.fixture
def cache(tmp_path):
    """Return a cache with empty files, so that none is written."""
    files = Files(tmp_path / "files")
    files.folder.mkdir()
    for path in (files.base, files.patched, files.kohya, files.diffusers):
        path.touch()
    return tmp_path


def test_every_program_has_a_reader_and_packages():
    assert interop.READERS.keys() == PACKAGES.keys()


def test_the_lora_changes_each_matrix_of_attn1_by_a_share_of_its_size():
    model = build_model("sd1")
    lora, own = random_lora(model), dict(model.denoiser.named_parameters())
    assert all(".attn1." in name for name in lora.factors)
    assert len(lora.factors) == 4 * sum(n.endswith(".attn1") for n, _ in own_modules(model))
    for name, (down, up) in lora.factors.items():
        assert len(down) == RANK
        assert float((up @ down).norm() / own[name].norm()) == pytest.approx(CHANGE, rel=1e-4)


def own_modules(model):
    return list(model.denoiser.named_modules())


def test_a_package_that_cannot_be_had_is_named(cache, monkeypatch):
    monkeypatch.setitem(PACKAGES, "comfyui", ("safegen-no-such-package==1",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = CliRunner().invoke(interop.app, ["--cache", str(cache), "--programs", "comfyui"])
    assert result.exit_code == interop.MISSING
    assert (
        "comfyui: not checked: safegen-no-such-package==1, which comfyui needs, cannot be"
        in result.output
    )


@pytest.mark.slow
def test_a_program_that_does_not_run_is_a_failed_check(cache):
    """Run diffusers on an empty file, which it cannot read."""
    result = CliRunner().invoke(interop.app, ["--cache", str(cache), "--programs", "diffusers"])
    assert result.exit_code == interop.FAILED
    assert "diffusers: FAILED: the program runs: status 1" in result.output


def test_an_unknown_program_is_refused(cache):
    result = CliRunner().invoke(interop.app, ["--cache", str(cache), "--programs", "a1111"])
    assert result.exit_code == 2
    assert "unknown a1111" in result.output


@pytest.mark.parametrize(("shift", "passed"), [(0.0, True), (5.0, False)])
def test_results_are_compared_with_those_of_diffusers(tmp_path, shift, passed):
    g = np.random.default_rng(0)
    value, noise = g.random((8, 8)), g.random((8, 8))
    for name, array in (("diffusers", value), ("comfyui", value + shift * noise)):
        (tmp_path / name).mkdir()
        report = Report(tmp_path / name)
        report.save("base-image", array)
        report.save("base-latents", torch.from_numpy(array))
        report.write()
        assert json.loads((tmp_path / name / "checks.json").read_text()) == []
    checks = interop._compare(tmp_path, "comfyui")
    assert [check["passed"] for check in checks] == [passed, passed]


def test_torchvision_is_not_stubbed_in_this_process():
    assert "torchvision" not in sys.modules
