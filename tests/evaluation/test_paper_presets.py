"""Protocols of the papers, planned from harmless files in the formats of the papers."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest

import safegen
from safegen.core.errors import ConfigError, FileError
from safegen.core.registry import PROTOCOLS
from safegen.data.prompts.prompts import cluster_of
from safegen.evaluation.protocol_file import load_protocol, read_protocol
from safegen.evaluation.samples import hash_prompts, read_prompt_list

HERE = Path(__file__).parents[1] / "data" / "prompts"
RAB = "ring-a-bell/Castle_eta_3_K_16.csv"
FILES = {
    "safegen-four": {
        "sneakyprompt": ("text/castles.txt", "sneakyprompt/castle_results.csv"),
        "i2p-sexual": ("i2p/i2p_benchmark.csv", "i2p-esd/castle-prompts4703.csv"),
        "nsfw-56k": ("csv/prompts_text.csv", "csv/castles.tsv"),
        "coco-25k": ("coco-json/captions_val2014.json", "coco-csv/coco_rece.csv"),
    },
    "i2p-931": {"i2p-sexual": ("i2p/i2p_benchmark.csv", "i2p-esd/castle-prompts4703.csv")},
    "esd-i2p-4703": {"i2p": ("i2p-esd/castle-prompts4703.csv", "i2p/i2p_benchmark.csv")},
    "uda-static-142-exposed9": {
        "uda-142": ("i2p-esd/castle_unnamed.csv", "i2p-esd/castle-prompts4703.csv")
    },
    "rab-nudity-k16-eta3": {"rab-nudity-k16": (RAB, RAB)},
    "rab-nudity-k38-eta3": {"rab-nudity-k38": (RAB, RAB)},
    "rab-nudity-k77-eta3": {"rab-nudity-k77": ("ring-a-bell/Castle_eta_5.5_K_77.csv", RAB)},
    "coco-10k": {"coco-10k": ("coco-csv/coco_esd.csv", "coco-csv/coco_rece.csv")},
    "coco-30k": {"coco-30k": ("coco-csv/coco_esd.csv", "coco-csv/coco_rece.csv")},
}
"""Two files of three rows in an accepted format, for each list of each preset."""


def few(name: str, folder: Path) -> str:
    """Write a copy of a preset that selects three rows of castles and return its path."""
    text = (Path(safegen.__file__).parent / "evaluation" / "protocols" / f"{name}.toml").read_text(
        encoding="utf-8"
    )
    text = re.sub(r"^prompts = \d+$", "prompts = 3", text, flags=re.MULTILINE)
    text = re.sub(
        r'prompts = 3\nselect = \{ categories = "sexual" \}',
        'prompts = 1\nselect = { categories = "castles" }',
        text,
    )
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return str(folder / f"{name}.toml")


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("name", [name for name in PROTOCOLS if not name.startswith("mini")])
def test_every_preset_of_a_paper_plans_from_its_file_format(name, turn, tmp_path):
    files = {part: HERE / names[turn] for part, names in FILES[name].items()}
    protocol = load_protocol(few(name, tmp_path), prompts=files)
    items = protocol.samples()
    assert {i.list_name for i in items} == set(files)
    for part in protocol.lists:
        own = [i for i in items if i.list_name == part.name]
        rows = read_prompt_list(str(files[part.name]), protocol_seed=0).rows
        assert len(own) == part.prompts == (1 if part.select else 3)
        assert [i.prompt for i in own] == [row.prompt for row in rows][: len(own)]
        assert [i.cluster for i in own] == [row.cluster for row in rows][: len(own)]
        assert [i.seed for i in own] == (
            [row.seed for row in rows][: len(own)] if protocol.seeds == "rows" else [1] * len(own)
        )
        assert (part.left_out, part.prompts) == ((), len(own))
    if name == "i2p-931":
        assert items[0].seed == 4290749014


def i2p(path: Path, sexual: int, others: int) -> Path:
    """Write harmless prompts in I2P's columns, with a blank text and an invalid seed."""
    with path.open("w", encoding="utf-8", newline="") as file:
        write = csv.writer(file)
        write.writerow(["prompt", "categories", "sd_seed", "sd_guidance_scale"])
        for i in range(sexual + others):
            labels = (
                "shocking, sexual" if i < sexual else "asexual, violence"
            )  # only entire labels match
            write.writerow([f"castle number {i % 900}", labels, 2**32 - 1 - i, 7])
        write.writerow([" ", "sexual", 1, 7])
        write.writerow(["a teapot", "sexual", "seven", 7])
    return path


def test_i2p_931_runs_from_the_full_benchmark_and_lists_unusable_rows(tmp_path):
    path = i2p(tmp_path / "i2p_benchmark.csv", 931, 200)
    protocol = load_protocol("i2p-931", prompts={"i2p-sexual": path})
    items = protocol.samples()
    assert len(items) == 931
    assert [i.seed for i in items] == [2**32 - 1 - i for i in range(931)]
    assert protocol.lists[0].left_out == (
        "line 1133: the prompt is blank",
        "line 1134: sd_seed is not an integer",
    )
    assert len({i.group for i in items}) == 900  # equal prompts are one cluster ...
    assert items[0].group == items[900].group == cluster_of("castle number 0")
    assert len({i.id for i in items}) == 931  # ... with separate images
    with pytest.raises(
        FileError,
        match=r"must be 931, got 930 in .* and 2 unusable \(line 1132: the prompt is blank; ",
    ):
        load_protocol("i2p-931", prompts={"i2p-sexual": i2p(tmp_path / "less.csv", 930, 200)})


def test_i2p_has_4702_prompts_as_one_is_blank(tmp_path):
    protocol = load_protocol("esd-i2p-4703", prompts={"i2p": i2p(tmp_path / "all.csv", 931, 3771)})
    assert (protocol.lists[0].prompts, len(protocol.samples())) == (4702, 4702)


def test_equal_rows_give_one_protocol_and_another_seed_gives_another(tmp_path):
    rows, name = "{0}\na castle,{1},7\na cat,{2},8\n", few("i2p-931", tmp_path)
    heads = ("prompt,categories,sd_seed", "prompt,categories,evaluation_seed")
    ids = []
    for i, (head, first) in enumerate(
        [
            (heads[0], "castles"),
            (heads[1], '"castles, hills"'),
            (heads[0].replace("seed", "seed "), "castles"),
        ]
    ):
        (tmp_path / f"{i}.csv").write_text(rows.format(head, first, "cats"))
        ids.append(load_protocol(name, prompts={"i2p-sexual": tmp_path / f"{i}.csv"}).id)
    (tmp_path / "other.csv").write_text(rows.format(heads[0], "castles", "cats").replace("7", "9"))
    assert len(set(ids)) == 1
    assert load_protocol(name, prompts={"i2p-sexual": tmp_path / "other.csv"}).id not in ids


def test_seeds_of_a_file_are_ignored_if_the_protocol_has_seeds(tmp_path):
    one, two = (
        read_prompt_list(str(HERE / name)).rows
        for name in ("coco-csv/coco_esd.csv", "coco-csv/coco_rece.csv")
    )
    assert hash_prompts(one) == hash_prompts(two)
    assert {row.seed for row in one} == {None}


@pytest.mark.parametrize(
    ("select", "says"),
    [
        (
            {"categories": "castle"},
            "must have a row with categories 'castle', got none",
        ),  # only entire labels match
        ({"colour": "red"}, "must have the column 'colour' to select rows by"),
    ],
)
def test_an_invalid_selection_is_refused_in_one_line(select, says):
    with pytest.raises(FileError, match=says) as caught:
        read_prompt_list(str(HERE / "i2p" / "i2p_benchmark.csv"), select=select)
    assert "\n" not in str(caught.value)


def test_any_column_can_select_rows_and_hold_the_prompts():
    assert [
        row.prompt
        for row in read_prompt_list(
            str(HERE / "csv" / "prompts_text.csv"), select={"topic": "cats"}
        ).rows
    ] == ["A cat is asleep on a chair."]
    assert [
        row.subject
        for row in read_prompt_list(
            str(HERE / "csv" / "castles.tsv"), select={"subject": "cat"}
        ).rows
    ] == ["cat"]
    mma = str(HERE / "mma-diffusion" / "mma-diffusion-castles.csv")
    adversarial, target = read_prompt_list(mma), read_prompt_list(mma, column="target_prompt")
    assert [a.prompt != b.prompt for a, b in zip(adversarial.rows, target.rows, strict=True)] == [
        True
    ] * 3
    assert adversarial.rows[0].cluster == adversarial.rows[1].cluster  # one target
    assert adversarial.notes


def test_a_bundled_list_takes_no_selection_and_no_more_prompts_than_it_has():
    with pytest.raises(FileError, match="must have the column 'categories'"):
        read_prompt_list("mini:skulls", select={"categories": "sexual"})
    with pytest.raises(
        ConfigError, match=r"the prompt list mini:skulls has \d+ prompts, got 100000"
    ):
        read_prompt_list("mini:skulls", prompts=100_000)


def test_other_columns_of_a_file_of_unsafe_prompts_are_left_out(tmp_path):
    path = str(HERE / "csv" / "castles.tsv")
    assert {row.subject for row in read_prompt_list(path).rows} == {"castle", "cat", "teapot"}
    assert {row.subject for row in read_prompt_list(path, unsafe=True).rows} == {None}
    assert read_prompt_list("mini:skulls", prompts=2, unsafe=True) == read_prompt_list(
        "mini:skulls", prompts=2
    )


def test_a_protocol_file_can_name_a_prompt_file_in_its_directory(tmp_path):
    shutil.copy(HERE / "malformed" / "short_rows.csv", tmp_path / "mine.csv")
    text = few("coco-10k", tmp_path)
    digest = hash_prompts(read_prompt_list(str(tmp_path / "mine.csv"), protocol_seed=0).rows)
    Path(text).write_text(
        re.sub(
            r'requires = ".*"\nprompts = 3',
            f'source = "mine.csv"\nsha256 = "{digest}"',
            Path(text).read_text(),
        )
    )
    protocol = load_protocol(text)
    assert (protocol.lists[0].prompts, len(protocol.lists[0].left_out)) == (2, 4)
    assert all(
        re.match(r"line \d+: ", line) and "teapot" not in line
        for line in protocol.lists[0].left_out
    )


def test_an_invalid_hub_file_name_is_refused():
    protocol = read_protocol("coco-10k")
    with pytest.raises(
        FileError,
        match=r"a file of the hub must be named hub:owner/name/path/in/repo\.csv, got 'hub:owner'",
    ):
        load_protocol("coco-10k", prompts={protocol.lists[0].name: "hub:owner"})
