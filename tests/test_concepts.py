"""Built-in concepts, the template of others, and the options of a concept's judge."""

from __future__ import annotations

import pytest

from safegen.core.concept import Concept, load_concept, write_template
from safegen.core.errors import ConfigError, FileError
from safegen.evaluation.schema import concept_rule
from safegen.judges import load_concept_judge
from safegen.workflows.edit import UncheckedTripletsWarning, make_edit, prepare_edit


def test_nudity_and_violence_have_published_phrases():
    nudity, violence = load_concept("nudity"), load_concept("violence")
    assert {"nudity", "naked", "erotic", "sexual"} <= set(nudity.words)
    assert {"violence", "blood", "suffering", "gun", "horror"} <= set(violence.words)
    assert make_edit("uce", "full", concept="violence").erase == violence.words
    for concept in (nudity, violence):
        assert not set(concept.words) & set(concept.counterpart)
        assert (concept.triplets, concept.lists) == (None, {})  # no such data in the package


def test_violence_says_what_its_judge_needs():
    with pytest.raises(ConfigError, match="the judge 'q16' needs its two prompt vectors"):
        load_concept_judge(load_concept("violence"))
    with pytest.warns(UncheckedTripletsWarning, match="not checked: the judge 'q16' needs its two"):
        prepare_edit("safegen", triplets="mini:skulls", concept="violence")


def test_the_template_is_a_valid_concept_that_explains_every_setting(tmp_path):
    path = tmp_path / "burning-houses.toml"
    write_template("burning-houses", path)
    concept, text = load_concept(str(path)), path.read_text()
    assert (concept.name, concept.words) == ("burning-houses", ("burning houses",))
    assert concept.judge_options["unsafe"] == ["a photo of burning houses"]
    rare = {"triplets", "tuning", "shows"}  # for bundled data and attributes
    assert [name for name in Concept.model_fields if name not in text and name not in rare] == []
    everything = [
        line.removeprefix("# ")
        if line.startswith(("# captions", "# weights", "# [", "# ex"))
        else line
        for line in text.splitlines()
    ]
    path.write_text("\n".join(everything))
    whole = load_concept(str(path))
    assert (whole.captions, whole.lists["explicit"]) == (("captions.txt",), ("explicit.txt",))
    with pytest.raises(FileError, match="already exists"):
        write_template("burning-houses", path)


@pytest.mark.parametrize("name", ["two words", "../up", "", "ä", "x" * 65])
def test_a_name_that_is_no_file_name_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="must be 1 to 64 letters, digits"):
        write_template(name, tmp_path / "c.toml")
    assert list(tmp_path.iterdir()) == []


def test_the_options_of_a_concept_reach_its_judge_and_its_protocol(tmp_path):
    path = tmp_path / "castles.toml"
    write_template("castles", path)
    text = path.read_text().replace(
        '# weights = "hub:openai/clip-vit-large-patch14"', 'weights = "mini"'
    )
    path.write_text(text.replace('"a photo of castles"', '"a castle covered in skulls"'))
    concept = load_concept(str(path))
    judge = load_concept_judge(concept)
    assert (judge.labels, judge.threshold) == (("unsafe",), 0.5)
    assert concept_rule(concept).options == concept.judge_options
    plain = load_concept("skulls")
    assert concept_rule(plain).options == {}


def test_the_command_writes_a_concept_and_says_what_to_do_with_it(monkeypatch, capsys, tmp_path):
    from safegen.cli import main

    monkeypatch.chdir(tmp_path)
    for code in (0, 2):  # it is not overwritten
        monkeypatch.setattr("sys.argv", ["safegen", "concept", "new", "smoke"])
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == code
    text = capsys.readouterr()
    assert text.out == "smoke.toml\n"
    assert "safegen edit MODEL --method uce --concept smoke.toml" in text.err
    assert "smoke.toml already exists" in text.err
    assert load_concept("smoke.toml").name == "smoke"
