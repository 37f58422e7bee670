"""`safegen prompts show` on the command line."""

import json
from functools import partial
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "data" / "prompts"


@pytest.fixture
def show(safegen):
    """Return a function that runs `safegen prompts show`."""
    return partial(safegen, "prompts", "show")


def test_show_prints_format_counts_and_rows_without_texts(show):
    code, out, err = show(HERE / "i2p" / "i2p_benchmark.csv", "--limit", "2")
    assert (code, err) == (0, "")
    assert "dialect i2p, SHA-256" in out
    assert "3 prompts in 3 clusters, 0 without a seed, 0 skipped" in out
    assert (
        "i2p_benchmark:2: seed 4290749014; guidance 7.0; size 512x512; "
        "categories castles, landscapes; 5 words"
    ) in out
    assert "i2p_benchmark:5" not in out
    assert "afar" not in out


def test_show_prints_texts_if_requested(show):
    _, out, _ = show(HERE / "i2p" / "i2p_benchmark.csv", "--reveal")
    assert "'a castle, seen from afar'" in out
    assert r"a cat asks:\n" in out  # one row, one line


def test_show_lists_every_problem_and_note(show):
    _, out, _ = show(HERE / "malformed" / "short_rows.csv")
    assert "2 prompts in 2 clusters, 1 without a seed, 4 skipped" in out
    assert out.count("skipped line") == 4
    _, out, _ = show(HERE / "pairs-not-ga" / "castle-ring-a-bell.csv")
    assert "note: these natural-language pairs" in out


def test_show_names_the_attack_and_reads_the_requested_column(show):
    _, out, _ = show(HERE / "ring-a-bell" / "Castle_eta_5.5_K_77.csv")
    assert "attack ring-a-bell castle eta 5.5 k 77" in out
    _, out, _ = show(
        HERE / "mma-diffusion" / "mma-diffusion-castles.csv",
        "--column",
        "target_prompt",
        "--reveal",
    )
    assert "'a castle by the sea'" in out
    assert "attack" not in out


def test_show_reads_bundled_lists(show):
    code, out, _ = show("mini:skulls", "--limit", "1")
    assert code == 0
    assert "dialect list" in out
    assert "mini:skulls:1: " in out


@pytest.mark.parametrize("reveal", [[], ["--reveal"]])
def test_control_characters_of_a_file_are_escaped(show, tmp_path, reveal):
    (tmp_path / "odd.csv").write_text(
        "prompt,categories\n\x1b[2Ja castle,\x1b[31mcastles\n", encoding="utf-8"
    )
    _, out, _ = show(tmp_path / "odd.csv", *reveal)
    assert "\x1b" not in out


def test_an_error_is_one_line(show, tmp_path):
    for words, says in (
        ([tmp_path / "no.csv"], "Use a file, a bundled list such as mini:skulls"),
        ([HERE / "i2p" / "i2p_benchmark.csv", "--dialect", "i2q"], "Did you mean 'i2p'"),
    ):
        code, out, err = show(*words)
        assert (code, out) == (2, "")
        assert says in err
        assert err.count("\n") == 1


def test_show_prints_json_without_texts_unless_they_are_requested(show):
    source = HERE / "i2p" / "i2p_benchmark.csv"
    code, out, _ = show(source, "--json", "--limit", "2")
    value = json.loads(out)
    assert code == 0
    assert (value["dialect"], value["prompts"], len(value["rows"])) == ("i2p", 3, 2)
    assert len(value["sha256"]) == 64
    assert "afar" not in out
    _, out, _ = show(source, "--json", "--reveal")
    assert json.loads(out)["rows"][0]["prompt"] == "a castle, seen from afar"


def test_show_prints_the_hash_that_a_protocol_wants(show, tmp_path):
    from safegen.core.errors import FileError
    from safegen.evaluation.protocol_file import load_protocol

    (tmp_path / "my.csv").write_text("prompt,seed\na castle,7\nan owl,8\n")
    _, out, _ = show(tmp_path / "my.csv")
    lines = [line for line in out.splitlines() if line.startswith("for a protocol with")]
    text = (
        'name = "own"\nconcept = "skulls"\nSEEDS\nmetrics = ["concept"]\ngeneration = {}\n'
        'judge = { name = "mini", labels = ["skulls"] }\n'
        '[[lists]]\nrole = "benign"\nname = "my"\nsource = "my.csv"\n'
    )
    path = tmp_path / "own.toml"
    for seeds, line in zip(("seeds = [1]", 'seeds = "rows"'), lines, strict=True):
        path.write_text(text.replace("SEEDS", seeds))
        with pytest.raises(FileError, match=r"the one that `safegen prompts show my.csv` prints"):
            load_protocol(str(path))
        path.write_text(text.replace("SEEDS", seeds) + line[line.index("sha256 =") :] + "\n")
        assert load_protocol(str(path)).lists[0].prompts == 2
