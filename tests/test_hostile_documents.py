"""Concepts, recipes, protocols, prompts and judges' files from strangers: one line, no wait."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import FileError, SafegenError
from safegen.core.files import display_name
from safegen.core.generation import GenerationConfig
from safegen.core.settings import check_file_name, check_name
from safegen.data.prompts.prompts import read_prompts
from safegen.evaluation.evaluate import expand_baselines
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.protocol_file import load_protocol, read_protocol
from safegen.evaluation.schema import JudgeRule
from safegen.judges import load_judge
from safegen.judges.nudenet import _read_side
from safegen.stack import Stack, load_stack

CONCEPT = """name = "cats"
words = ["a cat"]
counterpart = ["a dog"]
judge = "mini"
labels = ["skulls"]
[lists]
explicit = ["mini:skulls"]
"""
RECIPE = 'model = "mini"\nnegative_prompt = "x"\n[[guards]]\nname = "sld"\npreset = "max"\n'
VALUES = (
    *(
        "nan",
        "inf",
        "-1",
        "1e400",
        "9" * 5000,
        "9" * 400,
        "true",
        '""',
        '"x"',
        '"a\\u0000b"',
        '"\\u001b[31m"',
    ),
    *("1979-05-27", "[]", "[[]]", "{}", "{ x = 1 }", '"../../etc/passwd"', "[nan]", '[""]', "= ="),
    "[" * 3000 + "]" * 3000,
)
READERS = {
    "concept": (load_concept, CONCEPT),
    "recipe": (load_stack, RECIPE),
    "protocol": (read_protocol, None),
}


@pytest.fixture(scope="module")
def protocol_text():
    folder = Path(read_protocol.__code__.co_filename).parent / "protocols"
    return (folder / "mini-smoke.toml").read_text(encoding="utf-8")


def check_one_line(read, *arguments, **options):
    message = ""
    try:
        read(*arguments, **options)
    except SafegenError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 2000


@pytest.mark.parametrize("kind", READERS)
def test_no_reader_waits_for_a_pipe_or_trusts_a_file(kind, tmp_path, protocol_text):
    read, text = READERS[kind]
    path = tmp_path / "x.toml"
    os.mkfifo(path)
    with pytest.raises(FileError, match="must be a regular file, got a pipe"):
        read(str(path))
    path.unlink()
    for content in (b"", b"\xff\xfe", bytes(range(256)), b"a = " + b"[" * 5000, b"[[[\n"):
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"x\.toml") as caught:
            read(str(path))
        assert "\n" not in str(caught.value)
    path.write_text(text or protocol_text)
    read(str(path))


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_of_a_document_may_be_wrong(tmp_path, protocol_text, data):
    kind = data.draw(st.sampled_from(sorted(READERS)))
    read, text = READERS[kind]
    lines = (text or protocol_text).splitlines()
    number = data.draw(st.sampled_from([i for i, line in enumerate(lines) if "=" in line]))
    key = lines[number].partition("=")[0]
    value = data.draw(st.sampled_from(VALUES))
    lines[number] = data.draw(st.sampled_from([f"{key}= {value}", "", f"{key.strip()}x = 1"]))
    path = tmp_path / "x.toml"
    path.write_text("\n".join(lines))
    check_one_line(read, str(path))
    if kind == "protocol":
        check_one_line(load_protocol, str(path))


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["csv", "tsv", "json", "jsonl", "txt"]),
    st.one_of(
        st.binary(max_size=80),
        st.sampled_from(
            [
                b'{"prompt": "\\ud800"}',
                b'{"prompt": "a", "\\udfff": 1}',
                b'{"prompt": "a", "guidance": ' + b"9" * 400 + b"}",
                b'{"prompt": "a", "seed": 1e999, "guidance": NaN}',
                b'{"prompt": "a\\u0000\\u001b[31m"}',
                b"[" * 100_000,
                b'[{"prompt": "a", "categories": ' + b"[" * 989 + b"]" * 989 + b"}]",
                b'{"prompt": "a", "categories": ' + b"[" * 989 + b"]" * 989 + b"}",
                b'[{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}]",
                b'{"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "caption": 5}]}',
                b"prompt,seed\na,-1\nb,1e30\n\xff,1\n",
            ]
        ),
    ),
)
def test_any_bytes_may_stand_in_a_file_of_prompts(tmp_path, extension, content):
    path = tmp_path / f"x.{extension}"
    path.write_bytes(content)
    check_one_line(read_prompts, path)


@pytest.mark.parametrize("depth", [101, 500, 980, 989, 995])
@pytest.mark.parametrize(("extension", "pattern"), [("json", "[{}]"), ("jsonl", "{}")])
def test_a_deep_cell_of_a_prompt_is_refused_in_one_line(tmp_path, depth, extension, pattern):
    record = '{"prompt": "a", "categories": ' + "[" * depth + "]" * depth + "}"
    path = tmp_path / f"x.{extension}"
    path.write_text(pattern.replace("{}", record))
    with pytest.raises(FileError, match="it is nested too deeply") as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


def test_an_integer_beyond_any_float_is_refused_in_one_line(tmp_path, protocol_text):
    big = "1" + "0" * 400
    path = tmp_path / "x.toml"
    path.write_text(f"{protocol_text}\n[judge.options]\nx = [{big}]\n")
    with pytest.raises(FileError, match=r"x\.toml.*got 1000") as caught:
        load_protocol(str(path))
    assert len(str(caught.value)) < 300
    with pytest.raises(ValidationError, match="got -1000"):
        JudgeRule(name="mini", labels=("skulls",), options={"x": -int(big)})


@pytest.mark.parametrize("name", ["p\u3000x.safetensors", "p\u00a0x", "\U0001f469\u200d\U0001f52c"])
def test_a_name_may_have_any_space_or_emoji(name):
    assert check_file_name(name) == check_name(name) == name


@pytest.mark.parametrize("char", ["\n", "\x1b", "\u202e", "\u2028", "\udc80"])
def test_a_name_has_no_character_that_controls_a_line(char):
    for check in (check_file_name, check_name):
        with pytest.raises(ValueError, match="printable"):
            check(f"p{char}x")


def test_prompts_are_not_read_from_a_pipe_and_names_need_not_be_text(tmp_path):
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(FileError, match="must be a regular file, got a pipe"):
        read_prompts(tmp_path / "x.csv")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    path.write_text("a cube\n")
    check_one_line(read_prompts, path)


def test_a_concept_of_ones_own_has_all_baselines():
    concept = Concept(
        name="cats",
        words=("a cat", "a kitten"),
        counterpart=("a dog",),
        judge="mini",
        labels=("skulls",),
        lists={"explicit": ("mini:skulls",)},
    )
    protocol = Protocol.from_concept(
        concept, prompts=2, seeds=[1], generation=GenerationConfig(), roles=["explicit"]
    )
    stacks = expand_baselines(protocol, [Stack(name="mini", model="mini")], "all")
    assert [s.stack.negative_prompt for s in stacks if s.stack.negative_prompt] == [
        "a cat, a kitten"
    ]


@pytest.mark.parametrize("name", ["/home/bob/", "/home/bob", "/Users/bob", str(Path.home())])
def test_the_name_of_a_home_folder_is_not_shown(name):
    assert display_name(name) == "~"
    assert display_name("/home/bob/model") == "model"


@pytest.mark.parametrize("judge", ["nudenet", "open-nsfw"])
def test_a_damaged_network_of_a_judge_is_one_line(tmp_path, judge):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "x.onnx"
    for content in (b"", b"\x08\x07", bytes(range(256)) * 8):
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"x\.onnx") as caught:
            load_judge(judge, weights=str(path))
        assert "\n" not in str(caught.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileError, match="must be a regular file, got a pipe"):
        load_judge(judge, weights=str(path))


@pytest.mark.parametrize("names", ["5", "[]", "{0: 1}", "{'a': 'b'}", "(" * 5000, "x()"])
@pytest.mark.parametrize(
    "size", ["[320, 320]", "5", "[]", "['a']", "[-1]", "[10**9]", "1" + "0" * 400]
)
def test_metadata_that_is_not_nudenets_is_one_line(names, size):
    with pytest.raises(FileError, match="NudeNet") as caught:
        _read_side(Path("x.onnx"), {"names": names, "imgsz": size})
    assert "\n" not in str(caught.value)
