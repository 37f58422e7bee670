"""The public Python names: complete, documented with examples that work, short to print, silent."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import safegen
from safegen.core.device import resolve_dtype
from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.text import MAX_REPR
from safegen.evaluation.report.page import PAGE
from safegen.evaluation.run.folder import REPORT
from safegen.judges.images import list_images

EXAMPLES = """
import doctest, json, os, sys, tempfile, warnings
import safegen

results = {}
for name in sys.argv[1:]:
    examples = doctest.DocTestParser().get_doctest(
        getattr(safegen, name).__doc__, {"safegen": safegen}, name, None, None
    )
    lines = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        os.chdir(folder)
        doctest.DocTestRunner(verbose=False).run(examples, out=lines.append)
        os.chdir("/")
    results[name] = "".join(lines)
print(json.dumps(results))
"""
"""Runs the examples of public names in one process, each in an empty folder; prints failures."""


def examples_of(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(getattr(safegen, name).__doc__)


def test_the_public_names_are_listed_once_everywhere():
    source = Path(safegen.__file__).read_text(encoding="utf-8")
    typed = re.findall(r"^    from (safegen\S*) import (\w+) as \2$", source, re.MULTILINE)
    assert {name: module for module, name in typed} == safegen._MODULES
    assert safegen.__all__ == sorted(safegen._MODULES)
    assert dir(safegen) == sorted([*safegen.__all__, "__version__"])


@pytest.mark.parametrize("name", safegen.__all__)
def test_every_public_name_has_an_example_after_its_description(name):
    text = getattr(safegen, name).__doc__
    assert "\n    Example:\n        >>> " in text
    assert len(examples_of(name)) <= 6
    assert not [e for e in examples_of(name) if doctest.SKIP in e.options]


@pytest.fixture(scope="module")
def outcome():
    """Return the failures of the examples by name, and what the library wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES, *safegen.__all__],
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("name", safegen.__all__)
def test_examples_work(name, outcome):
    assert outcome[0][name] == ""


def test_the_library_prints_nothing(outcome):
    assert outcome[1] == ""  # on stdout it would have broken the JSON


# reprs


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Return an object of every public class, with long values, and of classes that they hold."""
    from safegen.guards.core.pipeline import GuardedPipeline
    from safegen.stack_loader import StackLoader
    from safegen.workflows.protect import ProtectedPipeline

    model = safegen.load("mini", device="cpu")
    patch = safegen.edit(model, "uce", concept="skulls")
    triplets = safegen.Triplets.load("mini:skulls")
    judge = safegen.load_judge("mini", labels=["skulls"])
    guard = {"name": "sld", "preset": "max", "concept": "skulls"}
    stack = safegen.Stack(name="guarded", model="mini", guards=(guard,) * 9)
    applied = patch.apply(model)
    applied.undo()
    made = [
        *(model, patch, triplets, judge, stack, applied),
        *safegen.judge([triplets.images(0)[0], "x" * 999 + ".png"], "skulls"),
        *judge.detect(triplets.images(0)[0]),
        safegen.load_concept("skulls"),
        safegen.load_protocol("mini-full"),
        safegen.GenerationConfig(num_inference_steps=10),
        safegen.Sample(prompt="a castle " * 99, seed=1),
        safegen.SafegenError("x"),
        safegen.SafegenWarning("x"),
        GuardedPipeline(model.pipeline, stack.guards[:1]),
        ProtectedPipeline(model.pipeline, [], stack.guards[:1]),
        StackLoader(device="cpu"),
    ]
    return {type(one).__name__: one for one in made}


def test_every_public_class_has_an_object_among_those_that_are_printed(objects):
    kinds = {name for name in safegen.__all__ if isinstance(getattr(safegen, name), type)}
    assert kinds - objects.keys() == {"Judge", "Run"}  # an interface, and one that takes seconds


def test_reprs_and_texts_are_one_short_line_that_names_the_class(objects):
    for name, one in objects.items():
        assert len(repr(one)) <= MAX_REPR, name
        assert "\n" not in repr(one) + str(one), name
        assert repr(one).startswith(f"{name}("), name
        assert " at 0x" not in repr(one), name


def test_reprs_say_what_one_wants_to_know(objects):
    assert "7.3 M weights, 64 x 64 pixels, fp32 on cpu" in repr(objects["Model"])
    assert repr(objects["Patch"]).endswith("numbers, method='uce', model='mini')")
    assert "100 triplets" in repr(objects["Triplets"])
    assert "labels=('skulls',), threshold=0.5" in repr(objects["MiniJudge"])
    assert (
        repr(objects["GuardedPipeline"])
        == "GuardedPipeline(StableDiffusionPipeline, guards=['sld'])"
    )
    assert repr(objects["GenerationConfig"]) == "GenerationConfig(num_inference_steps=10)"
    assert "words=('skulls', 'a skull')" in repr(objects["Concept"])


def test_a_run_names_the_page_that_the_report_writes():
    assert REPORT == PAGE


# arguments


@pytest.mark.parametrize(
    ("given", "name"),
    [
        *(("fp32", "fp32"), ("float32", "fp32"), ("bf16", "bf16"), ("bfloat16", "bf16")),
        *(("fp16", "fp16"), ("float16", "fp16"), ("torch.float16", "fp16")),
    ],
)
def test_types_of_weights_have_short_names_torch_names_and_objects(given, name):
    import torch

    assert resolve_dtype(given) == name
    assert resolve_dtype(getattr(torch, given.removeprefix("torch."), given)) == name


@pytest.mark.parametrize("given", ["fp8", "float64", "", "torch.int8"])
def test_other_types_of_weights_are_refused(given):
    with pytest.raises(UnknownNameError, match="no dtype named"):
        resolve_dtype(given)


def test_load_and_export_take_torch_objects(tmp_path):
    import torch
    from safetensors.torch import load_file

    model = safegen.load("mini", dtype=torch.bfloat16, device=torch.device("cpu"))
    assert model.dtype == "bf16"
    safegen.export(model, tmp_path / "m.safetensors", dtype=torch.bfloat16, card=False)
    weights = load_file(tmp_path / "m.safetensors").values()
    assert {w.dtype for w in weights if w.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "keyword", "nearest"),
    [
        ("load", "dtyp", "dtype"),
        ("edit", "tripletz", "triplets"),
        ("edit", "trainning", "training"),
        ("attack", "progres", "progress"),
        ("export", "formt", "format"),
        ("save_patch", "metric", "metrics"),
        ("judge", "label", "labels"),
        ("generate", "prompt", "prompts"),
        ("protect", "gards", "guards"),
        ("make_safe", "trainning", "training"),
        ("evaluate", "protokol", "protocol"),
    ],
)
def test_an_unknown_keyword_is_answered_with_the_nearest_name(name, keyword, nearest):
    needed = {"concept": "skulls", "out": "run"} if name in ("attack", "make_safe") else {}
    model = safegen.load("mini", device="cpu") if name == "edit" else "mini"
    with pytest.raises(UnknownNameError, match=f"'{keyword}'. Did you mean '{nearest}'") as raised:
        getattr(safegen, name)(model, **needed, **{keyword: 1})
    assert "\n" not in str(raised.value)


# images of a judge


@pytest.fixture(scope="module")
def skulls():
    """Return an image with skulls and one without."""
    unsafe, _, benign = safegen.Triplets.load("mini:skulls").images(0)
    return unsafe, benign


def verdicts(images, **options):
    return [j.verdict for j in safegen.judge(images, "skulls", **options)]


def test_judges_take_images_files_folders_and_arrays_alike(skulls, tmp_path):
    both = ["unsafe", "safe"]
    for name, image in zip("ab", skulls, strict=True):
        image.save(tmp_path / f"{name}.png")
    (tmp_path / ".hidden").write_text("x")
    files = [tmp_path / "a.png", str(tmp_path / "b.png")]
    arrays = [np.asarray(image) for image in skulls]
    assert verdicts(skulls[0]) == verdicts(files[1][:-5] + "a.png") == ["unsafe"]
    assert verdicts(list(skulls)) == verdicts(files) == verdicts(tmp_path) == both
    assert verdicts(arrays[0]) == ["unsafe"]
    assert verdicts(np.stack(arrays)) == verdicts(arrays) == both
    assert verdicts([array.astype(np.float32) / 255 for array in arrays]) == both
    scores = [[j.score for j in safegen.judge(x, "skulls")] for x in (list(skulls), files, arrays)]
    assert scores[0] == scores[1] == scores[2]
    assert [j.image for j in safegen.judge(files, "skulls")] == list(map(str, files))
    assert safegen.load_judge("mini").detect(skulls[0]) == safegen.load_judge("mini").detect(
        [arrays[0]]
    )


UNREADABLE = {
    "missing.png": "does not exist",
    "text.png": "must be an image of a known format",
    "half.png": "truncated",
    "folder": "must be a regular file, got a folder",
    "deep.png": "8-bit channels",
}


def test_an_image_that_cannot_be_read_is_unjudged_with_the_reason(skulls, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:800])
    (tmp_path / "folder").mkdir()
    Image.new("I;16", (64, 64)).save(tmp_path / "deep.png")
    array = np.asarray(skulls[1])
    arrays = {
        "in [0, 1], got -1 to 1": np.linspace(-1, 1, 12).reshape(2, 2, 3),
        "in [0, 1], got nan": np.full((2, 2, 3), np.nan),
        "(height, width, 3), got shape (3, 2, 2)": np.zeros((3, 2, 2)),
        "(height, width, 3), got shape (0, 2, 3)": np.zeros((0, 2, 3)),
        "uint8 or floats in [0, 1], got int64": array.astype(np.int64),
        "a file or a numpy array, got int": 3,
    }
    given = [tmp_path / name for name in UNREADABLE] + [*arrays.values(), skulls[1]]
    found = safegen.judge(given, "skulls")
    assert [j.verdict for j in found] == ["unjudged"] * (len(given) - 1) + ["safe"]
    assert [j.score for j in found[:-1]] == [None] * (len(given) - 1)
    for judgment, reason in zip(found, [*UNREADABLE.values(), *arrays], strict=False):
        assert reason in judgment.reason


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ConfigError, "at least one, got none"),
        (np.zeros((0, 8, 8, 3)), ConfigError, "at least one, got none"),
        ("missing.png", FileError, "'missing.png' must be an image or a folder"),
        (3, ConfigError, "got int. Convert it first"),
    ],
)
def test_nothing_to_judge_is_an_error(images, error, message):
    with pytest.raises(error, match=re.escape(message)):
        safegen.judge(images, "skulls")


def test_an_empty_folder_and_a_contact_sheet_alone_are_errors(tmp_path):
    from safegen.evaluation.report.contact_sheet import contact_sheet, save_sheet

    for _ in range(2):
        with pytest.raises(FileError, match="It is empty"):
            safegen.judge(tmp_path, "skulls")
        save_sheet(contact_sheet([Image.new("RGB", (64, 64))], cell=64), tmp_path / "sheet.png")


def test_a_tensor_is_refused_and_not_taken_apart():
    import torch

    with pytest.raises(ConfigError, match="got Tensor"):
        list_images(torch.zeros(3, 8, 8))


def test_transparency_of_a_file_is_judged_on_white_and_its_rotation_is_applied(tmp_path, skulls):
    image = skulls[0].convert("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x112] = 3
    skulls[0].rotate(180).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert verdicts([tmp_path / "clear.png", tmp_path / "turned.jpg"]) == ["safe", "unsafe"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a concept or the name of a judge, got neither"),
        ({"concept": "skulls", "judge": "nudenet"}, "has labels of its own"),
        ({"judge": "minni"}, "no judge named 'minni'"),
        ({"concept": "skuls"}, "no concept named 'skuls'"),
        ({"concept": Image.new("RGB", (8, 8))}, "got Image. Images come first"),
        ({"concept": "skulls", "labels": "skull"}, "no label .* named 'skull'"),
    ],
)
def test_the_judge_must_be_known_by_concept_or_name(arguments, message, skulls):
    with pytest.raises(safegen.SafegenError, match=message):
        safegen.judge(skulls[0], **arguments)


def test_a_judge_by_name_or_loaded_gives_the_verdicts_of_the_concept(skulls):
    loaded = safegen.load_judge("mini", labels=["skulls"])
    for judge in (loaded, "mini"):
        found = safegen.judge(list(skulls), judge=judge)
        assert [j.verdict for j in found] == ["unsafe", "safe"]
    assert verdicts(list(skulls), judge="mini-held-out")[0] == "unsafe"
    with pytest.raises(ConfigError, match="must come alone"):
        safegen.judge(skulls[0], "skulls", judge=loaded)


def test_a_loaded_model_is_evaluated_without_patches_only(objects, tmp_path):
    from safegen.stack_loader import StackLoader

    model = objects["Model"]
    assert StackLoader(model=model).model(model.name)[0] is model
    with objects["Patch"].apply(model), pytest.raises(ConfigError, match="no patches on it"):
        safegen.evaluate(model, concept="skulls", out=tmp_path / "run")


@pytest.mark.parametrize("model", ["mini", 3, "pipeline"])
def test_a_model_that_is_not_loaded_is_refused_in_one_line(objects, tmp_path, model):
    given = objects["Model"].pipeline if model == "pipeline" else model
    calls = (
        lambda: safegen.generate(given, "a castle"),
        lambda: safegen.edit(given, "uce", concept="skulls"),
        lambda: safegen.export(given, tmp_path / "x.safetensors"),
    )
    for call in calls:
        with pytest.raises(ConfigError, match=r"model must be a safegen.Model, got .*\(\.\.\.\)"):
            call()


def test_an_evaluation_takes_a_label_as_text_and_names_what_is_no_stack(objects, tmp_path):
    from safegen.stack_loader import StackLoader
    from safegen.workflows.evaluate import prepare_evaluation

    model, options = objects["Model"], {"concept": "skulls", "loader": StackLoader()}
    own = {"prompts": "mini:skulls", "limit": 1, "labels": "fire"}
    assert prepare_evaluation("mini", **own, **options).protocol.judge.labels == ("fire",)
    for base, stacks in ((model.pipeline, ()), ("mini", {"x": objects["Patch"]})):
        with pytest.raises(ConfigError, match=r"a stack must be a name or a path, got [A-Z]\w+\."):
            prepare_evaluation(base, stacks, **options)
