"""Prompt files of every dialect, harmless ones in the published layouts, and what may be wrong with them."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from safegen.core.concept import load_concept, prompt_list
from safegen.core.errors import ConfigError, FileError, UnknownNameError, UserError
from safegen.data.prompts.dialects import DIALECTS, AttackInfo
from safegen.data.prompts.prompts import Prompt, cluster_of, over_long, read_prompts, seed_for

HERE = Path(__file__).parent / "prompts"
FIXTURES = sorted(path for path in HERE.glob("*/*") if path.parent.name != "malformed")


def fixture(path: Path) -> str:
    return str(path.relative_to(HERE))


@pytest.fixture
def write(tmp_path):
    """Return a writer of one file, text or bytes."""

    def put(name: str, content: str | bytes) -> Path:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return put


# --- the contract of every dialect, those to come included


def test_every_dialect_has_a_fixture_and_every_fixture_a_dialect():
    assert {path.parent.name for path in FIXTURES} == set(DIALECTS)


@pytest.mark.parametrize("path", FIXTURES, ids=fixture)
def test_a_fixture_is_told_by_its_columns_and_gives_its_three_rows(path):
    found = read_prompts(path)
    assert (found.dialect, len(found), found.found, found.problems) == (path.parent.name, 3, 3, ())
    assert found == read_prompts(str(path), dialect=path.parent.name)
    assert len({row.id for row in found.rows}) == 3
    assert {row.source for row in found.rows} == {path.name}
    assert (
        {row.source_sha256 for row in found.rows}
        == {found.sha256}
        == {hashlib.sha256(path.read_bytes()).hexdigest()}
    )
    assert [row.line for row in found.rows] == sorted(row.line for row in found.rows)
    assert [Prompt.model_validate_json(row.model_dump_json()) for row in found.rows] == list(
        found.rows
    )
    assert read_prompts(path, limit=2).rows == found.rows[:2]
    assert read_prompts(path, limit=2).found == 3


@pytest.mark.parametrize("path", [p for p in FIXTURES if p.suffix in {".csv", ".tsv"}], ids=fixture)
def test_no_cell_of_a_table_is_lost(path):
    with path.open(encoding="utf-8", newline="") as file:
        names = (
            ["prompt", "case_number", "evaluation_seed"]
            if path.stem == "Castle_eta_5.5_K_77"
            else None
        )
        oracle = list(csv.DictReader(file, names, delimiter="\t" if path.suffix == ".tsv" else ","))
    for row, cells in zip(read_prompts(path).rows, oracle, strict=True):
        kept = {
            row.prompt,
            row.id.partition(":")[2].partition("@")[0],
            *row.categories,
            *row.extra.values(),
        }
        kept |= {str(value) for value in (row.subject, row.reference_id)}
        numbers = {row.seed, row.guidance, row.width, row.height}
        for column, cell in cells.items():
            if column and not column.startswith("Unnamed") and cell:
                assert (
                    cell in kept
                    or {part.strip() for part in cell.split(",")} <= kept
                    or float(cell) in numbers
                ), column


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_every_dialect_says_what_it_is_and_stands_in_the_documentation(name):
    assert DIALECTS[name].about
    table = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in table


# --- what the dialects mean


def test_i2p_keeps_large_seeds_many_labels_sizes_and_line_breaks():
    castle, cat, teapot = read_prompts(HERE / "i2p" / "i2p_benchmark.csv").rows
    assert [row.seed for row in (castle, cat, teapot)] == [4290749014, 2**31, 2**31 - 1]
    assert castle.categories == ("castles", "landscapes")
    assert (castle.guidance, cat.width, cat.height) == (7.0, 512, 768)
    assert cat.prompt == 'a cat asks:\n"is it tea time?"'
    assert [row.line for row in (castle, cat, teapot)] == [2, 3, 5]  # the cat's takes two lines
    assert castle.extra["sd_model"] == "1.4"
    assert castle.attack is None


def test_the_two_index_columns_of_esds_files_are_dropped_and_case_numbers_are_ids():
    for name, ids in (("castle-prompts4703", "0 1 2"), ("castle_unnamed", "17 23 42")):
        rows = read_prompts(HERE / "i2p-esd" / f"{name}.csv").rows
        assert [row.id for row in rows] == [f"{name}:{key}" for key in ids.split()]
        assert (rows[0].seed, rows[0].guidance, rows[2].categories) == (
            4290749014,
            7.0,
            ("teapots", "kitchens"),
        )
        assert not any(key == "" or key.startswith("unnamed") for row in rows for key in row.extra)


def test_ring_a_bell_reads_eta_and_k_from_the_name_and_needs_no_header():
    headed, bare = (
        read_prompts(HERE / "ring-a-bell" / f"Castle_eta_{end}.csv")
        for end in ("3_K_16", "5.5_K_77")
    )
    assert headed.rows[0].attack == AttackInfo(name="ring-a-bell", variant="castle", k=16, eta=3)
    assert bare.rows[0].attack == AttackInfo(name="ring-a-bell", variant="castle", k=77, eta=5.5)
    assert [row.prompt for row in headed.rows] == [row.prompt for row in bare.rows]
    assert [row.seed for row in bare.rows] == [3, 7, 93]
    assert [(row.line, row.id) for row in bare.rows] == [
        (1, f"{bare.rows[0].id}"),
        (2, "Castle_eta_5.5_K_77:1"),
        (3, "Castle_eta_5.5_K_77:2"),
    ]
    assert not {row.id for row in headed.rows} & {
        row.id for row in bare.rows
    }  # case numbers repeat across files
    assert "no header" in bare.notes[0]


def test_ring_a_bell_under_another_name_says_that_eta_and_k_are_unknown(write):
    found = read_prompts(write("found.csv", "castle tower,0,3\nwool paw,1,7\n"))
    assert (found.dialect, found.rows[0].attack) == ("ring-a-bell", AttackInfo(name="ring-a-bell"))
    assert any("does not tell eta and K" in note for note in found.notes)


def test_the_columns_of_ring_a_bell_alone_do_not_make_an_attack(write):
    found = read_prompts(
        write("castles.csv", "case_number,evaluation_seed,prompt\n0,3,a castle\n")
    )  # as Six-CD has them
    assert (found.dialect, found.rows[0].attack, found.rows[0].seed) == ("csv", None, 3)


def test_mma_diffusion_reads_the_column_asked_for_and_clusters_by_target():
    path = HERE / "mma-diffusion" / "mma-diffusion-castles.csv"
    found = read_prompts(path)
    assert [row.prompt.split()[0] for row in found.rows] == ["fortress", "keep", "whisker"]
    assert (
        found.rows[0].cluster
        == found.rows[1].cluster
        == cluster_of("a castle by the sea")
        != found.rows[2].cluster
    )
    assert found.rows[0].seed is None
    assert any("sanitized_adv_prompt" in note for note in found.notes)
    clean = read_prompts(path, column="Sanitized_adv_prompt")
    assert (clean.rows[0].prompt, clean.rows[0].attack) == (
        "fort wave tower brine",
        AttackInfo(name="mma-diffusion", variant="sanitized_adv_prompt"),
    )
    assert clean.notes == ()
    assert (
        read_prompts(path, column="target_prompt").rows[0].attack is None
    )  # nobody attacked with the target itself
    with pytest.raises(
        ConfigError, match=r"reads its prompts from adv_prompt or .*, got column 'success"
    ):
        read_prompts(path, column="success_against_sanitization_defense")


def test_p4d_tells_found_prompts_from_those_it_started_from():
    assert read_prompts(HERE / "p4d" / "p4dn_16_prompt.csv").rows[0].attack == AttackInfo(
        name="p4d", variant="n", k=16
    )
    assert read_prompts(HERE / "p4d" / "p4dk_3_start.csv").rows[0].attack is None


def test_sneakyprompt_clusters_by_the_original_text():
    rows = read_prompts(HERE / "sneakyprompt" / "castle_results.csv").rows
    assert rows[0].prompt == "a mowwly in the rain"
    assert rows[0].cluster == rows[1].cluster == cluster_of("a castle in the rain")
    assert (rows[0].attack, rows[2].extra["result_type"]) == (
        AttackInfo(name="sneakyprompt"),
        "FailedAttackResult",
    )


def test_the_pair_file_called_ring_a_bell_is_not_ring_a_bell_and_says_so():
    path = HERE / "pairs-not-ga" / "castle-ring-a-bell.csv"
    found, normal = read_prompts(path), read_prompts(path, column="normal prompt")
    assert found.rows[0].attack is None
    assert "none of them came out of Ring-A-Bell's genetic search" in found.notes[0]
    assert normal.rows[0].prompt == "A castle over the bay"
    assert [row.cluster for row in normal.rows] == [row.cluster for row in found.rows]


def test_prompts_that_unlearndiffatk_starts_from_are_no_attack():
    found = read_prompts(HERE / "unlearndiffatk" / "castle_style.csv")
    assert found.rows[0].attack is None
    assert found.rows[1].extra == {"artist": "A. Painter"}
    assert any("not an attack" in note for note in found.notes)
    same = read_prompts(
        HERE / "i2p-esd" / "castle-prompts4703.csv", dialect="unlearndiffatk"
    )  # its nudity file has I2P's columns
    assert same.rows[0].categories == ("castles", "landscapes")


def test_coco_takes_the_caption_with_the_lowest_annotation_id_of_each_image_in_the_files_order():
    path = HERE / "coco-json" / "captions_val2014.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    oracle = {}
    for note in sorted(data["annotations"], key=lambda note: -note["id"]):
        oracle[note["image_id"]] = (note["caption"], str(note["id"]))
    rows = read_prompts(path).rows
    assert len(data["annotations"]) == 15
    assert (
        [row.reference_id for row in rows]
        == [str(image["id"]) for image in data["images"]]
        == ["285", "139", "632"]
    )
    assert {
        int(row.reference_id): (row.prompt, row.extra["annotation_id"]) for row in rows
    } == oracle
    assert (rows[0].id, rows[0].width, rows[0].extra["image_width"]) == (
        "captions_val2014:285",
        None,
        "640",
    )  # a photograph's size


def test_coco_in_a_table_keeps_the_ids_of_images_and_marks_repeated_rows():
    esd, rece = (read_prompts(HERE / "coco-csv" / f"coco_{name}.csv") for name in ("esd", "rece"))
    assert [row.reference_id for row in esd.rows] == ["139", "285", "285"]
    assert [row.id for row in esd.rows] == ["coco_esd:139", "coco_esd:285", "coco_esd:285@4"]
    assert any("ends in @line: 1" in note for note in esd.notes)
    assert (rece.rows[0].id, rece.rows[0].reference_id) == ("coco_rece:0", "139")


def test_t2i_riskyprompt_has_its_labels_as_categories_and_the_reasons_kept(write):
    row = read_prompts(HERE / "t2i-riskyprompt" / "castles.json").rows[0]
    assert row.categories == ("Buildings--Castles", "Animals--Cats")
    assert json.loads(row.extra["label"])["Animals--Cats"] == ["it purrs"]
    keyed = read_prompts(
        write("keyed.json", '{"c1": {"prompt": "a castle", "label": {"Buildings--Castles": []}}}')
    )
    assert (keyed.dialect, keyed.rows[0].id) == ("t2i-riskyprompt", "keyed:c1")


def test_a_generic_table_takes_the_first_prompt_like_column_whatever_its_capitals(write):
    rows = read_prompts(HERE / "csv" / "castles.tsv").rows
    assert [(row.id, row.seed, row.subject) for row in rows][:2] == [
        ("castles:castle-a", 3, "castle"),
        ("castles:cat-b", None, "cat"),
    ]
    both = read_prompts(write("both.csv", "Caption,PROMPT ,width\na cat,a castle,640\n"))
    assert (both.rows[0].prompt, both.rows[0].extra, both.rows[0].width) == (
        "a castle",
        {"caption": "a cat", "width": "640"},
        None,
    )
    assert any("there is caption too" in note for note in both.notes)
    odd = write("odd.csv", "Original,Spanish\na castle,un castillo\n")
    assert read_prompts(odd, column="spanish").rows[0].prompt == "un castillo"
    with pytest.raises(FileError, match=r"no column that is known, or no header"):
        read_prompts(odd)


def test_json_lines_are_parted_by_line_breaks_only_and_keep_what_is_nested():
    castle, cat, teapot = read_prompts(HERE / "jsonl" / "castles.jsonl").rows
    assert (castle.prompt, castle.seed, castle.id) == (
        "a castle\u2028by the sea",
        4290749014,
        "castles:castle-1",
    )
    assert (cat.categories, cat.guidance) == (("cats", "animals"), 7.5)
    assert json.loads(teapot.extra["size"]) == {"side": 64}


def test_json_lines_are_known_under_the_ending_of_json_too(write):
    content = (HERE / "jsonl" / "castles.jsonl").read_bytes()
    assert [row.prompt for row in read_prompts(write("castles.json", content)).rows] == [
        row.prompt for row in read_prompts(HERE / "jsonl" / "castles.jsonl").rows
    ]


def test_any_file_can_be_read_as_text(write):
    path = write(
        "lines.csv", "a castle, seen from afar\n\na cat\x0bwith a teapot\n\n"
    )  # a vertical tab parts no line
    found = read_prompts(path, dialect="text")
    assert [row.prompt for row in found.rows] == [
        "a castle, seen from afar",
        "a cat\x0bwith a teapot",
    ]
    assert [str(problem) for problem in found.problems] == ["line 2: its prompt is blank"]


# --- encodings, and rows that cannot be used


def test_a_byte_order_mark_is_no_part_of_the_first_column(write):
    found = read_prompts(write("marked.csv", b"\xef\xbb\xbfprompt\na caf\xc3\xa9\n"))
    assert (found.rows[0].prompt, found.notes) == ("a café", ())


def test_latin_1_is_read_only_when_utf_8_fails_and_is_said(write):
    found = read_prompts(write("old.csv", b"prompt\na caf\xe9\n"))
    assert found.rows[0].prompt == "a café"
    assert found.notes == (
        "the file is not UTF-8; it was read as latin-1, so letters with accents may be wrong",
    )


@pytest.mark.parametrize(
    ("name", "rows", "problems"),
    [
        (
            "short_rows.csv",
            [2, 7],
            [
                "line 3: it has 2 fields, but there are 3 columns",
                "line 4: it is empty",
                "line 5: it has 4 fields, but there are 3 columns",
                "line 6: its prompt is blank",
            ],
        ),
        (
            "open_quote.csv",
            [2],
            [
                "line 3: it is not CSV (unexpected end of data); is a quote never closed? Lines 3 to 4 were not read"
            ],
        ),
        (
            "stray_quote.csv",
            [2, 6],
            [
                "line 3: it is not CSV (',' expected after '\"'); is a quote never closed? Lines 3 to 5 were not read"
            ],
        ),
        (
            "numbers.csv",
            [5, 9],
            [
                f"line 2: its evaluation_seed must be in 0..{2**63 - 1}, got {2**63}",
                f"line 3: its evaluation_seed must be in 0..{2**63 - 1}, got -1",
                "line 4: its evaluation_seed is no whole number",
                "line 6: its evaluation_guidance must be a number of at least 0, got -3.0",
                "line 7: its evaluation_seed is no whole number",
                "line 8: its sd_image_width must be in 1..65536, got 0",
            ],
        ),
        (
            "lines.jsonl",
            [1],
            [
                "line 2: it is not JSON: Expecting value at character 1",
                "line 3: it is no JSON object",
                "line 4: it is empty",
                "line 5: its prompt is no text",
                "line 6: it has no prompt",
                "line 7: it has half a surrogate pair, which is no text",
            ],
        ),
        (
            "captions.json",
            [1],
            [
                "annotation 2: there is no image 9",
                "image 2: image 2 has no caption",
                "annotation 3: it has no whole numbers as id and image_id",
                "image 3: image 1 is there twice",
                "image 4: it has no whole number as id",
                "image 5: its prompt is blank",
            ],
        ),
    ],
)
def test_every_malformed_row_is_listed_with_its_place_and_the_rest_is_read(name, rows, problems):
    found = read_prompts(HERE / "malformed" / name)
    assert [row.line for row in found.rows] == rows
    assert [str(problem) for problem in found.problems] == problems
    assert found.counts()["left out"] == len(problems)


def test_a_quote_never_closed_in_a_long_file_says_which_lines_it_swallowed(write):
    found = read_prompts(
        write("long.csv", "prompt\na castle\n" + '"a cat\n' + "a teapot\n" * 20_000)
    )
    (problem,) = found.problems
    last = int(problem.reason.partition("Lines 3 to ")[2].split()[0])
    assert problem.line == 3
    assert [row.line for row in found.rows] == [2, *range(last + 1, 20_004)]


def test_no_problem_and_no_error_repeats_what_a_row_says(write):
    """Lists of benchmarks hold unsafe texts; a shifted row must not carry them into a message."""
    secret = "xyzzy"
    bad = f"a castle,{secret},{secret},{secret}\n{secret},{secret}\n,{secret},7,512\n"
    for head in ("", "a castle,1,7,512\n"):
        path = write(
            "shifted.csv",
            "prompt,evaluation_seed,evaluation_guidance,sd_image_width\n" + head + bad,
        )
        try:
            said = "".join(map(str, read_prompts(path).problems))
        except FileError as error:
            said = str(error)
        assert "line" in said
        assert secret not in said
    for name, content in (
        ("no_header.csv", f"{secret},{secret}\n"),
        ("no_json.json", f'{{"a": {secret}}}'),
        ("lines.jsonl", secret),
    ):
        with pytest.raises(FileError) as caught:
            read_prompts(write(name, content))
        assert secret not in str(caught.value)


def test_what_csv_writes_comes_back_with_the_line_it_starts_on(write, tmp_path):
    rng = np.random.default_rng(0)
    letters = list("ab ,\";'\n\r\t\u2028é猫😀|")
    texts = ["x" + "".join(rng.choice(letters, rng.integers(0, 12))) for _ in range(300)]
    path, lines = tmp_path / "odd.csv", []
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["", "prompt", "seed"])
        for i, text in enumerate(texts):
            file.flush()
            lines.append(
                len(
                    path.read_bytes().decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
                )
            )
            out.writerow([i, text, i])
    found = read_prompts(path)
    assert [row.prompt for row in found.rows] == texts
    assert [row.line for row in found.rows] == lines
    assert found.problems == ()


def test_damaged_files_are_read_or_refused_in_one_line_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    said = []
    for path in [*FIXTURES, *(HERE / "malformed").glob("*")]:
        for _ in range(12):
            data = bytearray(path.read_bytes())
            for at in rng.integers(0, len(data), 6):
                data[at] = rng.choice(list(b'"\n,{}[]:0\xff\x80a'))
            broken = tmp_path / path.name
            broken.write_bytes(data[: rng.integers(1, len(data) + 1)])
            try:
                found = read_prompts(broken)
            except UserError as error:
                said.append(str(error))
            else:
                assert len(found) == found.found > 0
                assert len({row.id for row in found.rows}) == len(found)
    assert 0 < len(said) < 12 * len(FIXTURES)
    assert not [line for line in said if "\n" in line]


# --- what cannot be read at all


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.csv", "", "has no rows"),
        ("head.csv", "prompt,seed\n", "holds no prompt that can be used: it is empty"),
        (
            "blank.csv",
            "prompt,seed\n ,1\n",
            "holds no prompt that can be used: line 2: its prompt is blank",
        ),
        ("blank.txt", "\n \n", "holds no prompt that can be used: it is empty"),
        ("twice.csv", "prompt,Prompt\na,b\n", "two columns named 'prompt'"),
        ("ids.csv", "id,seed\n1,2\n", "no column that may hold prompts"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0", "is not text: it has null bytes"),
        ("wide.csv", "prompt\na castle\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("broken.json", '[{"prompt": "a castle"}', "is not JSON: "),
        ("number.json", "7", "JSON of an unknown make"),
        ("deep.json", "[" * 100_000, "is not JSON: "),
        ("empty.json", "[]", "holds no prompt that can be used"),
    ],
)
def test_a_file_without_a_usable_row_is_refused(write, name, content, says):
    with pytest.raises(FileError) as caught:
        read_prompts(write(name, content))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"dialect": "i2q"}, UnknownNameError, "Did you mean 'i2p'"),
        (
            {"dialect": "i2p"},
            FileError,
            "is not in dialect i2p: it has no column prompt, nor categories, nor sd_seed",
        ),
        ({"column": "topik"}, FileError, "is not in dialect csv: it has no column topik"),
        ({"dialect": "text", "column": "topic"}, ConfigError, "column has no effect"),
        ({"limit": 0}, ConfigError, "limit must be at least 1, got 0"),
    ],
)
def test_what_does_not_go_with_a_file_is_refused(options, kind, says):
    with pytest.raises(kind, match=says):
        read_prompts(HERE / "csv" / "prompts_text.csv", **options)


def test_a_name_that_is_nothing_comes_with_the_way_out(tmp_path):
    for name in ("skulls", "minni:skulls", str(tmp_path / "no.csv")):
        with pytest.raises(
            FileError,
            match="name a file, a bundled list such as mini:skulls, or hub:owner/name/path",
        ):
            read_prompts(name)
    with pytest.raises(FileError, match="is a folder; name a file in it"):
        read_prompts(tmp_path)
    with pytest.raises(FileError, match="cannot be read"):
        read_prompts("a\0b.csv")


# --- bundled lists and the hub


@pytest.mark.parametrize("name", ["mini:skulls", "mini:ghosts-train", "mini:benign"])
def test_a_bundled_list_gives_the_prompts_and_subjects_that_plans_draw(name):
    found = read_prompts(name, limit=64)
    assert [(row.prompt, row.subject) for row in found.rows] == [
        (row.text, row.subject) for row in prompt_list(name, 64)
    ]
    assert (found.dialect, found.rows[0].id, found.rows[0].line, found.rows[0].source) == (
        "list",
        f"{name}:1",
        1,
        name,
    )
    assert found.found == len(prompt_list(name)) > 64
    assert read_prompts(name).sha256 == found.sha256  # of the list, wherever it is cut


def test_a_concept_says_what_a_list_shows_besides():
    skulls = load_concept("skulls")
    assert {row.shows for row in read_prompts("mini:ghosts", limit=3, concept=skulls).rows} == {
        "ghosts"
    }
    assert {row.shows for row in read_prompts("mini:skulls", limit=3, concept=skulls).rows} == {
        None
    }
    assert {row.shows for row in read_prompts("mini:ghosts", limit=3).rows} == {None}


def test_held_out_and_train_lists_share_no_prompt_cluster_or_hash():
    held, train = read_prompts("mini:skulls"), read_prompts("mini:skulls-train")
    assert not {row.cluster for row in held.rows} & {row.cluster for row in train.rows}
    assert held.sha256 != train.sha256
    assert held.counts()["clusters"] == len(held)


def test_a_list_that_is_unknown_or_told_how_to_be_read_is_refused():
    with pytest.raises(
        UnknownNameError, match=r"Did you mean 'skulls-train'.*Known: benign, benign-train"
    ):
        read_prompts("mini:skull-train")
    with pytest.raises(ConfigError, match="have no effect"):
        read_prompts("mini:skulls", dialect="csv")


def test_the_hub_is_asked_only_by_name_and_fails_in_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileError) as caught:
        read_prompts("hub:owner/name/folder/castles.csv")
    assert str(caught.value).startswith("hub:owner/name/folder/castles.csv is not in the cache ")
    assert "run: hf auth login" in str(caught.value)
    assert "\n" not in str(caught.value)
    for name in ("hub:", "hub:castles.csv", "hub:owner/name", "hub:owner//castles.csv"):
        with pytest.raises(FileError, match="must be named hub:owner/name/path"):
            read_prompts(name)


# --- clusters, seeds, lengths


def test_texts_that_differ_in_case_spaces_or_unicode_form_are_one_cluster():
    same = ["A castle, caf\u00e9", "a  CASTLE,\n cafe\u0301 ", "\uff41 castle, café"]
    assert len({cluster_of(text) for text in same}) == 1
    assert len({cluster_of(text) for text in ("a castle", "acastle", "a castle.", "a cat")}) == 4
    assert cluster_of("a castle") == hashlib.sha256(b"a castle").hexdigest()[:16]


def test_duplicate_prompts_of_a_file_are_one_cluster_and_stay_two_rows(write):
    found = read_prompts(write("two.csv", "prompt,seed\na castle,1\nA  castle,2\na cat,3\n"))
    assert found.counts() == {
        "prompts": 3,
        "found": 3,
        "left out": 0,
        "clusters": 2,
        "without seed": 0,
    }


def test_the_seed_of_a_prompt_depends_on_its_id_and_the_protocols_seed_alone():
    assert (
        seed_for("castles:1", 7) == 0xAB6681526B78
    )  # pinned: a change would change every picture of every protocol
    assert seed_for("castles:1", 7) == int(hashlib.sha256(b"7:castles:1").hexdigest()[:12], 16)
    seeds = {seed_for(f"castles:{i}", s) for i in range(2000) for s in (0, 1, -1)}
    assert len(seeds) == 6000
    assert max(seeds) < 2**48
    assert np.mean(list(seeds)) == pytest.approx(2**47, rel=0.05)


def test_over_long_prompts_are_found_with_the_tokenizer_of_the_model():
    from tools.mini.networks import build_tokenizer

    tokenizer = build_tokenizer(["a castle by the sea"])
    tokenizer.model_max_length = 10**6  # counted uncut
    rows = read_prompts(HERE / "text" / "castles.txt").rows

    def count(text: str) -> int:
        return len(tokenizer(text).input_ids)

    lengths = [count(row.prompt) for row in rows]
    assert over_long(rows, count, most=max(lengths)) == []
    found = over_long(rows, count, most=min(lengths))
    assert [(row.id, n) for row, n in found] == [
        (row.id, n) for row, n in zip(rows, lengths, strict=True) if n > min(lengths)
    ]
    assert found
