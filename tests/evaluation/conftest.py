"""Fixtures: a small protocol, a patch and a finished run of the bundled model in two steps."""

from __future__ import annotations

import shutil

import pytest

LISTS = (("explicit", "mini:skulls", None), ("neighbour", "mini:ghosts", "ghosts"))
METRICS = """[
  "concept", "removal", "removal_images", "removal_labels", "subject", "shown",
  "mosaicked", "change", "asr", "asr_any", "inappropriate", "expected_maximum", "over_censoring",
  "coherence", "coherence_kept", "clip_score", "fid_to_base", "kid_to_base", "cmmd_to_base",
]"""


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """Return a protocol of two lists of three prompts, two seeds and batches that span both."""
    from safegen.evaluation.samples import hash_prompts, read_prompt_list

    text = f'name = "quick"\nconcept = "skulls"\nseeds = [1, 2]\nmetrics = {METRICS}\n'
    text += "[generation]\nnum_inference_steps = 2\nbatch_size = 4\n"
    text += '[features]\nextractor = "mini-clip"\n[judge]\nname = "mini"\nlabels = ["skulls"]\n'
    for role, name, shows in LISTS:
        text += f'[[lists]]\nrole = "{role}"\nname = "{name}"\nsource = "{name}"\nprompts = 3\n'
        text += f'sha256 = "{hash_prompts(read_prompt_list(name, prompts=3).rows)}"\n' + (
            f'shows = "{shows}"\n' if shows else ""
        )
    path = tmp_path_factory.mktemp("protocol") / "quick.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def loader():
    """Return a loader that keeps the bundled model loaded."""
    from safegen.stack_loader import StackLoader

    return StackLoader()


@pytest.fixture(scope="session")
def patch_file(tmp_path_factory, loader):
    """Return a patch for the bundled model that changes its images slightly."""
    from safegen.models.checkpoint.metadata import PatchMetadata
    from safegen.models.selectors import select_parameters
    from safegen.patches.patch import Patch

    model, _ = loader.model("mini")
    own = dict(model.denoiser.named_parameters())
    path = tmp_path_factory.mktemp("patch") / "calm.safetensors"
    Patch(
        {k: own[k] * 0.7 for k in select_parameters(model.denoiser, "attn1")},
        PatchMetadata(base=model.hash, method="test", seconds=1.5),
    ).save(path)
    return path


@pytest.fixture(scope="session")
def go(quick, patch_file, loader):
    """Return a function that evaluates the quick protocol on the model and on the patched model."""
    from safegen.evaluation.evaluate import evaluate
    from safegen.evaluation.protocol_file import load_protocol
    from safegen.stack import load_stack

    argv = ("safegen", "evaluate", "--stack", f"calm=mini+{patch_file}")

    def run(out, *, stacks=("mini", f"calm=mini+{patch_file}"), protocol=None, **options):
        return evaluate(
            protocol or load_protocol(str(quick)),
            [load_stack(s) for s in stacks],
            out,
            **({"loader": loader, "argv": argv} | options),
        )

    return run


@pytest.fixture(scope="session")
def finished(go, tmp_path_factory):
    """Return the folder of a finished run, to be read only."""
    return go(tmp_path_factory.mktemp("run") / "whole").folder


@pytest.fixture
def copy(finished, tmp_path):
    """Return a copy of the finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "copy")
