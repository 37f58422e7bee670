"""The demo: an edit and an ordinary evaluation in one directory, resumed by the same call."""

from __future__ import annotations

import json
import shlex

import pytest

from safegen.cli.demo import next_lines
from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig
from safegen.evaluation.run.folder import SETTINGS
from safegen.evaluation.verify import verify
from safegen.patches.patch import Patch
from safegen.stack_loader import StackLoader
from safegen.workflows.demo import DemoConfig, run_demo
from safegen.workflows.edit import make_edit

CONFIG = DemoConfig(prompts=1, generation=GenerationConfig(num_inference_steps=2))
TRAINING = {"updates": 4, "warmup": 0, "batch": 2, "accumulation": 1, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def loader():
    return StackLoader()


@pytest.fixture(scope="module")
def edit():
    return make_edit("safegen", concept="skulls", captions=(), teacher=False, training=TRAINING)


@pytest.fixture(scope="module")
def done(edit, loader, tmp_path_factory):
    return run_demo(CONFIG, edit, tmp_path_factory.mktemp("demo") / "out", loader=loader)


def test_a_demo_is_an_ordinary_run_of_the_base_and_the_edited_stack(done, edit):
    assert [entry.name for entry in done.stacks] == ["base", "edited"]
    assert verify(done) == []
    (entry,) = done.stacks[1].patches
    patch = Patch.load(done.folder / "patches" / "edited.safetensors")
    assert (entry.hash, entry.description) == (patch.hash, edit.describe())
    assert json.loads((done.folder / SETTINGS).read_text())["edit"]["method"] == "safegen"
    assert len((done.folder / "patches" / "edited" / "log.jsonl").read_text().splitlines()) == 4


def test_what_next_after_a_demo_is_what_its_report_says_with_paths_that_exist(done):
    titles = [line for line in next_lines(done.folder) if line.startswith("  ") and line[2] != " "]
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert len(titles) >= 5
    assert all(title.strip(" :") in page for title in titles if "'" not in title)
    words = shlex.split("\n".join(next_lines(done.folder)[2:]).replace("'", ""))
    patch = words[words.index("--patch") + 1]
    assert Patch.load(patch).metadata.method == "safegen"
    assert words[words.index("verify") + 1] == str(done.folder)


@pytest.mark.parametrize("stage", ["editing", "generating: base", "generating: edited"])
def test_an_interrupted_demo_resumes_to_the_same_patch_and_scores(
    done, edit, loader, tmp_path, stage
):
    at, stages = 3 if stage == "editing" else 7, []

    def stop(what, n, _):
        if (what, n) == (stage, at):
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError):
        run_demo(CONFIG, edit, tmp_path / "out", loader=loader, progress=stop)
    run = run_demo(
        CONFIG, edit, tmp_path / "out", loader=loader, progress=lambda *s: stages.append(s)
    )
    patches = [Patch.load(r.folder / "patches" / "edited.safetensors").hash for r in (run, done)]
    assert patches[0] == patches[1]
    scores = [(r.folder / "scores.json").read_bytes() for r in (run, done)]
    assert scores[0] == scores[1]
    edited = [n for what, n, _ in stages if what == "editing"]
    assert edited == ([3, 4] if stage == "editing" else [])  # from the checkpoint of update 2


def test_another_edit_in_the_same_directory_is_refused(done, loader):
    other = make_edit("uce", concept="skulls")
    with pytest.raises(FileError, match=r"made with other settings .*safegen.* and .*uce"):
        run_demo(CONFIG, other, done.folder, loader=loader)


def test_an_invalid_demo_is_refused_before_anything_is_written(edit, loader, tmp_path):
    idle = make_edit("uce", erase=("a castle",), debias={"a ghost": 0.3})
    with pytest.raises(ConfigError, match="uce removes nothing with these settings"):
        run_demo(CONFIG, idle, tmp_path / "out", loader=loader)
    nudity = CONFIG.model_copy(update={"concept": "nudity"})
    with pytest.raises(ConfigError, match="'nudity' has no bundled triplets"):
        run_demo(nudity, edit, tmp_path / "out", loader=loader)
    assert list(tmp_path.iterdir()) == []
