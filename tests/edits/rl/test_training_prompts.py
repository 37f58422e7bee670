"""Prompts of a training: cleaned captions, files with both kinds, and draws by weight."""

from __future__ import annotations

import json

import pytest
import torch

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.edits.rl.prompts import (
    TrainingPrompt,
    UncleanCaptionWarning,
    clean_caption,
    draw_prompts,
    is_table,
    read_training_prompts,
)
from safegen.edits.shielddiff import ShieldDiff

ERASE, ANCHORS = ("skulls", "a skull"), ("nothing on it", "a clean scene")


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a castle with skulls", "a castle with nothing on it"),
        ("Skulls on A SKULL", "nothing on it on nothing on it"),
        ("numskulls and skullsome things", "numskulls and skullsome things"),
        ("a skull's shadow, skulls!", "nothing on it's shadow, nothing on it!"),
        ("a  castle\twith a  skull", "a castle with nothing on it"),
        ("skulls", "nothing on it"),
        ("a castle", "a castle"),
    ],
)
def test_phrases_are_replaced_at_word_boundaries(text, caption):
    assert clean_caption(text, ERASE, ANCHORS) == caption


def test_the_longest_of_overlapping_phrases_is_replaced():
    erase = ("skull", "skull ring", "ring of skulls")
    assert clean_caption("a skull ring of skulls", erase, ("x",)) == "a x of skulls"
    assert clean_caption("a ring of skulls", erase, ("x",)) == "a x"


def test_phrases_are_text_not_patterns():
    assert clean_caption("a (bad) b.d", ("(bad)", "b.d"), (r"\1",)) == r"a \1 \1"
    assert clean_caption("bad", ("b.d",), ("x",)) == "bad"


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a castle, skulls, at night", "a castle, at night"),
        ("skulls, a castle", "a castle"),
        ("a castle, skulls.", "a castle."),
        ("a castle with skulls", "a castle with"),
        ("skulls", ""),
        ("a castle, ", "a castle,"),
    ],
)
def test_without_anchors_phrases_are_left_out(text, caption):
    assert clean_caption(text, ERASE, ()) == caption


def test_without_phrases_a_prompt_is_its_caption():
    assert clean_caption("a castle", (), ()) == "a castle"


# ------------------------------------------------------------ files


def read(prompts, captions=(), **options):
    options = {"erase": ERASE, "anchors": ANCHORS} | options
    return read_training_prompts([str(p) for p in prompts], captions, **options)


@pytest.fixture
def both(tmp_path):
    path = tmp_path / "both.csv"
    path.write_text(
        "prompt,kind,anchor,weight\n"
        "a boat,benign,,\n"
        "a castle with skulls,unsafe,,2\n"
        '"bones, piled up",Unsafe,a pile of stones,0.5\n'
    )
    return path


def test_a_table_holds_both_kinds_with_captions_and_weights(both):
    assert read([both]) == [
        TrainingPrompt("a castle with skulls", "a castle with nothing on it", False, 2.0),
        TrainingPrompt("bones, piled up", "a pile of stones", False, 0.5),
        TrainingPrompt("a boat", "a boat", True, 1.0),
    ]


def test_json_lines_are_read_like_a_table(both, tmp_path):
    rows = [
        {"prompt": "a boat", "kind": "benign"},
        {"prompt": "a castle with skulls", "kind": "unsafe", "weight": 2},
        {
            "prompt": "bones, piled up",
            "kind": "unsafe",
            "anchor": "a pile of stones",
            "weight": 0.5,
        },
    ]
    path = tmp_path / "both.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read([path]) == read([both])


def test_sources_are_joined(both, tmp_path):
    text = tmp_path / "more.txt"
    text.write_text("a house with a skull\n")
    found = read([text, both], ["mini:benign-train"])
    assert [p.text for p in found[:3]] == [
        "a house with a skull",
        "a castle with skulls",
        "bones, piled up",
    ]
    assert found[3].text == "a boat"
    assert len(found) == 4 + 192
    assert all(p.benign and p.caption == p.text for p in found[3:])


def test_without_a_kind_all_prompts_are_unsafe(tmp_path):
    path = tmp_path / "unsafe.csv"
    path.write_text("prompt\na castle with skulls\n")
    assert [p.benign for p in read([path], ["mini:benign-train"])[:2]] == [False, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a boat,safe,,", r"line 3: kind must be unsafe or benign, got 'safe'"),
        ("a boat,,,", r"line 3: kind must be unsafe or benign, got ''"),
        ("a boat,benign,,0", r"line 3: weight must be a number above 0, at most 1e\+09, got '0'"),
        ("a boat,benign,,much", "line 3: weight must be a number .* got 'much'"),
        ("a boat,benign,,nan2", "line 3: weight must be a number .* got 'nan2'"),
        ("a boat,benign,,inf", "line 3: weight must be a number .* got 'inf'"),
        (",benign,,", "line 3: the prompt is blank. Correct the row"),
        ("a boat,benign", "line 3: the row has 2 fields"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(row, message, tmp_path):
    path = tmp_path / "both.csv"
    path.write_text(f"prompt,kind,anchor,weight\na castle with skulls,unsafe,,\n{row}\n")
    with pytest.raises(FileError, match=message):
        read([path])


def test_prompts_of_both_kinds_are_needed(both, tmp_path):
    path = tmp_path / "skulls.txt"
    path.write_text("skulls\n")
    with pytest.raises(ConfigError, match="captions must have benign prompts, got none"):
        read([path])
    assert [p.benign for p in read([path], allow_no_benign=True)] == [False]
    with pytest.raises(ConfigError, match="prompts must ask for the concept, got none"):
        read([], ["mini:benign-train"])


def test_more_prompts_than_memory_holds_are_refused(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("skulls\n" * 10_001)
    with pytest.raises(ConfigError, match=r"at most 10,000, got 10,001\. Keep a random sample"):
        read([path], allow_no_benign=True)


def test_a_file_of_another_kind_is_named(both):
    with pytest.raises(FileError, match=r"must be in .txt files or lists such as .* got '.*both"):
        read_training_prompts([str(both)], [str(both)], erase=("skulls",), anchors=())


def test_captions_can_be_given_one_for_each_prompt(tmp_path):
    for name, lines in (("a", "skulls\nbones"), ("b", "stones\nwood"), ("c", "stones")):
        (tmp_path / f"{name}.txt").write_text(lines)
    a, b, c = (str(tmp_path / f"{name}.txt") for name in "abc")
    found = read([a], counterparts=[b], allow_no_benign=True)
    assert [(p.text, p.caption) for p in found] == [("skulls", "stones"), ("bones", "wood")]
    with pytest.raises(ConfigError, match="counterparts must have a caption for each of 2 prompts"):
        read([a], counterparts=[c], allow_no_benign=True)


def test_prompts_without_a_phrase_are_warned_about(tmp_path):
    path = tmp_path / "skulls.txt"
    path.write_text("skulls\nbones\n")
    with pytest.warns(UncleanCaptionWarning, match="1 of 2 prompts of the concept contain no phr"):
        read([path], allow_no_benign=True)


def test_a_table_replaces_the_captions_of_a_concept(both):
    concept = load_concept("skulls")
    assert is_table("both.CSV")
    assert not is_table("mini:skulls")
    edit = ShieldDiff.preset("mini", concept=concept, prompts=(str(both),))
    assert edit.captions == ()
    assert edit.counterparts == ()
    assert ShieldDiff.preset("mini", concept=concept).captions == concept.captions
    given = ShieldDiff.preset("mini", concept=concept, prompts=(str(both),), captions=("x.txt",))
    assert given.captions == ("x.txt",)


# ------------------------------------------------------------ draws


def draw(weights, size, seed=0):
    return draw_prompts(torch.tensor(weights), size, torch.Generator().manual_seed(seed))


def test_no_prompt_is_repeated_before_all_are_drawn():
    assert len(set(draw([1.0] * 10, 4).tolist())) == 4
    counts = draw([1.0] * 4, 10).bincount(minlength=4)
    assert sorted(counts.tolist()) == [2, 2, 3, 3]
    assert sorted(draw([1.0] * 4, 4).tolist()) == [0, 1, 2, 3]


def test_draws_follow_weights():
    assert draw([3.0, 1.0], 8).bincount().tolist() == [6, 2]
    counts = torch.stack([draw([2.0, 1.0, 1.0], 1, s).bincount(minlength=3) for s in range(400)])
    share = counts.float().mean(0)
    assert torch.allclose(share, torch.tensor([0.5, 0.25, 0.25]), atol=0.08)


@pytest.mark.parametrize("size", [1, 3, 7, 50])
@pytest.mark.parametrize("weights", [[1.0] * 3, [1e-9, 1.0, 1e9], [0.1, 0.2, 0.7]])
def test_as_many_prompts_as_wanted_are_drawn(weights, size):
    assert len(draw(weights, size)) == size
