"""Prompt files of every dialect in their published layouts, and malformed files."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from safegen.core.concept import prompt_list
from safegen.core.errors import ConfigError, FileError, UnknownNameError, UserError
from safegen.data.prompts.dialects import DIALECTS
from safegen.data.prompts.prompt import AttackInfo, Prompt, cluster_of, seed_for
from safegen.data.prompts.prompts import read_prompts

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


# --- the contract of every dialect


def test_every_dialect_has_a_fixture_and_every_fixture_a_dialect():
    assert {path.parent.name for path in FIXTURES} == set(DIALECTS)


@pytest.mark.parametrize("path", FIXTURES, ids=fixture)
def test_a_fixture_is_detected_and_gives_its_three_rows(path):
    prompts = read_prompts(path)
    assert (prompts.dialect, len(prompts), prompts.problems) == (path.parent.name, 3, ())
    assert prompts == read_prompts(str(path), dialect=path.parent.name)
    assert len({row.id for row in prompts.rows}) == 3
    assert {row.source for row in prompts.rows} == {path.name}
    assert (
        {row.source_sha256 for row in prompts.rows}
        == {prompts.sha256}
        == {hashlib.sha256(path.read_bytes()).hexdigest()}
    )
    assert [row.line for row in prompts.rows] == sorted(row.line for row in prompts.rows)
    assert [Prompt.model_validate_json(row.model_dump_json()) for row in prompts.rows] == list(
        prompts.rows
    )


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
def test_every_dialect_has_a_description(name):
    assert DIALECTS[name].about


# --- what the dialects mean


def test_i2p_keeps_large_seeds_labels_sizes_and_line_breaks():
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


def test_ring_a_bell_under_another_name_has_unknown_eta_and_k(write):
    prompts = read_prompts(write("prompts.csv", "castle tower,0,3\nwool paw,1,7\n"))
    assert (prompts.dialect, prompts.rows[0].attack) == (
        "ring-a-bell",
        AttackInfo(name="ring-a-bell"),
    )
    assert any("eta and K are unknown" in note for note in prompts.notes)


def test_ring_a_bells_columns_alone_are_not_an_attack(write):
    prompts = read_prompts(
        write("castles.csv", "case_number,evaluation_seed,prompt\n0,3,a castle\n")
    )  # as Six-CD has them
    assert (prompts.dialect, prompts.rows[0].attack, prompts.rows[0].seed) == ("csv", None, 3)


def test_mma_diffusion_reads_the_chosen_column_and_clusters_by_target():
    path = HERE / "mma-diffusion" / "mma-diffusion-castles.csv"
    prompts = read_prompts(path)
    assert [row.prompt.split()[0] for row in prompts.rows] == ["fortress", "keep", "whisker"]
    assert (
        prompts.rows[0].cluster
        == prompts.rows[1].cluster
        == cluster_of("a castle by the sea")
        != prompts.rows[2].cluster
    )
    assert prompts.rows[0].seed is None
    assert any("sanitized_adv_prompt" in note for note in prompts.notes)
    clean = read_prompts(path, column="Sanitized_adv_prompt")
    assert (clean.rows[0].prompt, clean.rows[0].attack) == (
        "fort wave tower brine",
        AttackInfo(name="mma-diffusion", variant="sanitized_adv_prompt"),
    )
    assert clean.notes == ()
    assert (
        read_prompts(path, column="target_prompt").rows[0].attack is None
    )  # the target itself is no attack
    with pytest.raises(ConfigError, match=r"column must be adv_prompt or .*, got 'success"):
        read_prompts(path, column="success_against_sanitization_defense")


def test_p4d_separates_optimized_from_initial_prompts():
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


def test_the_pair_file_called_ring_a_bell_has_a_note():
    path = HERE / "pairs-not-ga" / "castle-ring-a-bell.csv"
    prompts, normal = read_prompts(path), read_prompts(path, column="normal prompt")
    assert prompts.rows[0].attack is None
    assert "none came out of Ring-A-Bell's genetic search" in prompts.notes[0]
    assert normal.rows[0].prompt == "A castle over the bay"
    assert [row.cluster for row in normal.rows] == [row.cluster for row in prompts.rows]


def test_initial_prompts_of_unlearndiffatk_are_not_an_attack():
    prompts = read_prompts(HERE / "unlearndiffatk" / "castle_style.csv")
    assert prompts.rows[0].attack is None
    assert prompts.rows[1].extra == {"artist": "A. Painter"}
    assert any("not an attack" in note for note in prompts.notes)
    same = read_prompts(
        HERE / "i2p-esd" / "castle-prompts4703.csv", dialect="unlearndiffatk"
    )  # its nudity file has I2P's columns
    assert same.rows[0].categories == ("castles", "landscapes")


def test_coco_reads_the_caption_with_the_lowest_annotation_id_of_each_image():
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
    assert any("extended by @line: 1" in note for note in esd.notes)
    assert (rece.rows[0].id, rece.rows[0].reference_id) == ("coco_rece:0", "139")


def test_t2i_riskyprompt_reads_labels_as_categories(write):
    row = read_prompts(HERE / "t2i-riskyprompt" / "castles.json").rows[0]
    assert row.categories == ("Buildings--Castles", "Animals--Cats")
    assert json.loads(row.extra["label"])["Animals--Cats"] == ["it purrs"]
    keyed = read_prompts(
        write("keyed.json", '{"c1": {"prompt": "a castle", "label": {"Buildings--Castles": []}}}')
    )
    assert (keyed.dialect, keyed.rows[0].id) == ("t2i-riskyprompt", "keyed:c1")


def test_a_generic_table_reads_the_first_prompt_column_in_any_case(write):
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
    assert any("other prompt columns: caption" in note for note in both.notes)
    odd = write("odd.csv", "Original,Spanish\na castle,un castillo\n")
    assert read_prompts(odd, column="spanish").rows[0].prompt == "un castillo"
    with pytest.raises(FileError, match=r"no known column, or no header"):
        read_prompts(odd)


def test_json_lines_are_separated_by_line_breaks_only_and_keep_nested_values():
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
    )  # a vertical tab separates no lines
    prompts = read_prompts(path, dialect="text")
    assert [row.prompt for row in prompts.rows] == [
        "a castle, seen from afar",
        "a cat\x0bwith a teapot",
    ]
    assert [str(problem) for problem in prompts.problems] == ["line 2: the prompt is blank"]


# --- encodings and malformed rows


def test_a_byte_order_mark_is_not_part_of_the_first_column(write):
    prompts = read_prompts(write("marked.csv", b"\xef\xbb\xbfprompt\na caf\xc3\xa9\n"))
    assert (prompts.rows[0].prompt, prompts.notes) == ("a café", ())


def test_latin_1_is_a_fallback_with_a_note(write):
    prompts = read_prompts(write("old.csv", b"prompt\na caf\xe9\n"))
    assert prompts.rows[0].prompt == "a café"
    assert prompts.notes == (
        "the file is not UTF-8; it was read as latin-1, so accented letters may be wrong",
    )


@pytest.mark.parametrize(
    ("name", "rows", "problems"),
    [
        (
            "short_rows.csv",
            [2, 7],
            [
                "line 3: the row has 2 fields, the table has 3 columns",
                "line 4: the row is empty",
                "line 5: the row has 4 fields, the table has 3 columns",
                "line 6: the prompt is blank",
            ],
        ),
        (
            "open_quote.csv",
            [2],
            [
                "line 3: the row is not CSV (unexpected end of data); "
                "check for an unclosed quote: lines 3 to 4 are lost"
            ],
        ),
        (
            "stray_quote.csv",
            [2, 6],
            [
                "line 3: the row is not CSV (',' expected after '\"'); "
                "check for an unclosed quote: lines 3 to 5 are lost"
            ],
        ),
        (
            "numbers.csv",
            [5, 9],
            [
                f"line 2: evaluation_seed must be in 0..{2**63 - 1}, got {2**63}",
                f"line 3: evaluation_seed must be in 0..{2**63 - 1}, got -1",
                "line 4: evaluation_seed is not an integer",
                "line 6: evaluation_guidance must be at least 0, got -3.0",
                "line 7: evaluation_seed is not an integer",
                "line 8: sd_image_width must be in 1..65536, got 0",
            ],
        ),
        (
            "lines.jsonl",
            [1],
            [
                "line 2: the record is not JSON: Expecting value at character 1",
                "line 3: the record is not a JSON object",
                "line 4: the line is empty",
                "line 5: prompt is not text",
                "line 6: prompt is missing",
                "line 7: the row has half a surrogate pair, which is not valid text",
            ],
        ),
        (
            "captions.json",
            [1],
            [
                "annotation 2: there is no image 9",
                "image 2: image 2 has no caption",
                "annotation 3: id and image_id must be integers",
                "image 3: image 1 is repeated",
                "image 4: id must be an integer",
                "image 5: the prompt is blank",
            ],
        ),
    ],
)
def test_malformed_rows_are_listed_and_the_others_are_read(name, rows, problems):
    prompts = read_prompts(HERE / "malformed" / name)
    assert [row.line for row in prompts.rows] == rows
    assert [str(problem) for problem in prompts.problems] == problems
    assert prompts.counts()["skipped"] == len(problems)


def test_an_unclosed_quote_in_a_long_file_reports_the_lost_lines(write):
    prompts = read_prompts(
        write("long.csv", "prompt\na castle\n" + '"a cat\n' + "a teapot\n" * 20_000)
    )
    (problem,) = prompts.problems
    last = int(problem.reason.partition("lines 3 to ")[2].split()[0])
    assert problem.line == 3
    assert [row.line for row in prompts.rows] == [2, *range(last + 1, 20_004)]


def test_no_message_quotes_a_row(write):
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


def test_csv_round_trips_with_the_first_line_of_each_row(write, tmp_path):
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
    prompts = read_prompts(path)
    assert [row.prompt for row in prompts.rows] == texts
    assert [row.line for row in prompts.rows] == lines
    assert prompts.problems == ()


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
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
                prompts = read_prompts(broken)
            except UserError as error:
                said.append(str(error))
            else:
                assert len(prompts) > 0
                assert len({row.id for row in prompts.rows}) == len(prompts)
    assert 0 < len(said) < 12 * len(FIXTURES)
    assert not [line for line in said if "\n" in line]


# --- unreadable files


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.csv", "", "has no rows"),
        ("head.csv", "prompt,seed\n", "has no usable prompt: it is empty"),
        ("blank.csv", "prompt,seed\n ,1\n", "has no usable prompt: line 2: the prompt is blank"),
        ("blank.txt", "\n \n", "has no usable prompt: it is empty"),
        ("twice.csv", "prompt,Prompt\na,b\n", "two columns named 'prompt'"),
        ("ids.csv", "id,seed\n1,2\n", "has no prompt column"),
        ("image.png", b"\x89PNG\r\n\x1a\n\0\0", "is not text: it has null bytes"),
        ("wide.csv", "prompt\na castle\n".encode("utf-16"), "is UTF-16 text. Save it as UTF-8."),
        ("broken.json", '[{"prompt": "a castle"}', "is not JSON: "),
        ("number.json", "7", "an unknown JSON structure"),
        ("deep.json", "[" * 100_000, "is not JSON: "),
        ("empty.json", "[]", "has no usable prompt"),
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
        ({"dialect": "text", "column": "topic"}, ConfigError, "plain text, which has no columns"),
    ],
)
def test_options_that_do_not_apply_to_a_file_are_refused(options, kind, says):
    with pytest.raises(kind, match=says):
        read_prompts(HERE / "csv" / "prompts_text.csv", **options)


def test_an_unknown_source_is_refused_with_the_way_out(tmp_path):
    for name in ("skulls", "minni:skulls", str(tmp_path / "no.csv")):
        with pytest.raises(
            FileError,
            match="Use a file, a bundled list such as mini:skulls, or hub:owner/name/path",
        ):
            read_prompts(name)
    with pytest.raises(FileError, match=r"must be a regular file, got a folder"):
        read_prompts(tmp_path)
    with pytest.raises(FileError, match="there are no prompts named"):
        read_prompts("a\0b.csv")


# --- bundled lists and the hub


@pytest.mark.parametrize("name", ["mini:skulls", "mini:ghosts-train", "mini:benign"])
def test_a_bundled_list_gives_its_prompts_and_subjects(name):
    prompts = read_prompts(name)
    assert [(row.prompt, row.subject) for row in prompts.rows] == [
        (row.text, row.subject) for row in prompt_list(name)
    ]
    assert (prompts.dialect, prompts.rows[0].id, prompts.rows[0].line, prompts.rows[0].source) == (
        "list",
        f"{name}:1",
        1,
        name,
    )
    assert len(prompts) > 64


def test_held_out_and_train_lists_share_no_prompt_cluster_or_hash():
    held, train = read_prompts("mini:skulls"), read_prompts("mini:skulls-train")
    assert not {row.cluster for row in held.rows} & {row.cluster for row in train.rows}
    assert held.sha256 != train.sha256
    assert held.counts()["clusters"] == len(held)


def test_an_unknown_list_or_a_list_with_a_dialect_is_refused():
    with pytest.raises(
        UnknownNameError, match=r"Did you mean 'skulls-train'.*Known: benign, .*benign-train"
    ):
        read_prompts("mini:skull-train")
    with pytest.raises(ConfigError, match="Omit dialect and column"):
        read_prompts("mini:skulls", dialect="csv")


def test_a_hub_failure_is_one_line(monkeypatch, tmp_path):
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


# --- clusters and seeds


def test_texts_that_differ_in_case_spaces_or_unicode_form_are_one_cluster():
    same = ["A castle, caf\u00e9", "a  CASTLE,\n cafe\u0301 ", "\uff41 castle, café"]
    assert len({cluster_of(text) for text in same}) == 1
    assert len({cluster_of(text) for text in ("a castle", "acastle", "a castle.", "a cat")}) == 4
    assert cluster_of("a castle") == hashlib.sha256(b"a castle").hexdigest()[:16]


def test_duplicate_prompts_are_one_cluster_and_two_rows(write):
    prompts = read_prompts(write("two.csv", "prompt,seed\na castle,1\nA  castle,2\na cat,3\n"))
    assert prompts.counts() == {"prompts": 3, "skipped": 0, "clusters": 2, "without_seed": 0}


def test_a_derived_seed_depends_on_prompt_id_and_protocol_seed_only():
    assert (
        seed_for("castles:1", 7) == 0xAB6681526B78
    )  # pinned: a change would change every image of every protocol
    assert seed_for("castles:1", 7) == int(hashlib.sha256(b"7:castles:1").hexdigest()[:12], 16)
    seeds = {seed_for(f"castles:{i}", s) for i in range(2000) for s in (0, 1, -1)}
    assert len(seeds) == 6000
    assert max(seeds) < 2**48
    assert np.mean(list(seeds)) == pytest.approx(2**47, rel=0.05)


@pytest.mark.parametrize("column", ["attack", "attacked_prompt"])
def test_a_found_prompt_that_does_not_name_its_attack_is_left_out(tmp_path, column):
    row = {"id": "0", "prompt": "a", "seed": 1, "attack": "mma", "attacked_prompt": "b"}
    rows = [row, {k: v for k, v in row.items() if k != column} | {"id": "1"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    found = read_prompts(path)
    assert len(found) == 1
    assert f"{column} is missing" in str(found.problems[0])
