"""Protocols: ids, refusals and planned samples."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

import safegen
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError, UnknownNameError, UnusedSettingWarning
from safegen.core.files import display_name
from safegen.core.generation import GenerationConfig
from safegen.core.registry import LABEL_SETS, PROTOCOLS
from safegen.data.prompts.prompt import Prompt, cluster_of, seed_for
from safegen.evaluation.compare import differences, same_protocol
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.protocol_file import load_protocol, read_protocol
from safegen.evaluation.samples import ROLES, hash_prompts, read_prompt_list
from safegen.evaluation.schema import Rung

MINI = [name for name in PROTOCOLS if name.startswith("mini")]


def changed(path: Path, out: Path, old: str, new: str) -> str:
    text = path.read_text()
    assert old in text
    out.write_text(text.replace(old, new, 1))
    return str(out)


def test_the_table_and_the_directory_have_the_same_protocols():
    assert {
        p.stem for p in (Path(safegen.__file__).parent / "evaluation" / "protocols").glob("*.toml")
    } == set(PROTOCOLS)
    assert all(read_protocol(name).name == name for name in PROTOCOLS)


@pytest.mark.parametrize("name", MINI)
def test_a_bundled_protocol_plans_every_prompt_with_every_seed(name):
    protocol = load_protocol(name)
    items = protocol.samples()
    assert len(items) == sum(p.prompts for p in protocol.lists) * len(protocol.seeds)
    assert len({(i.prompt, i.seed, i.index) for i in items}) == len(items)
    assert all(i.subject for i in items)
    harmless = {i.shows for i in items if i.role in ("neighbour", "other")}
    if any(part.rung for part in protocol.lists):
        assert [part.rung for part in protocol.lists] == list(get_args(Rung))
        assert not harmless
    else:
        assert harmless >= {"ghosts", "leaves"}


def test_another_precision_is_another_protocol():
    own = read_protocol("mini-smoke")
    assert (own.generation.precision, own.with_precision("fp32").id) == (
        "fp32",
        own.id,
    )  # whoever looks quickly has any processor
    assert own.with_precision("bf16").id != own.id
    assert own.with_precision("bf16").with_precision("fp32") == own


def test_the_smoke_protocol_generates_200_images_with_two_stacks():
    assert 2 * len(load_protocol("mini-smoke").samples()) >= 200


@pytest.mark.parametrize("name", [n for n in PROTOCOLS if n not in MINI])
def test_a_protocol_of_a_paper_lists_its_deviations_and_requires_its_prompts(name):
    protocol = read_protocol(name)
    assert len(protocol.about) > 100
    with pytest.raises(
        ConfigError,
        match=rf"the protocol '{name}' needs the prompts of .* give the file with --prompts",
    ) as caught:
        load_protocol(name)
    assert "\n" not in str(caught.value)
    assert all(part.unsafe for part in protocol.lists if part.role == "explicit")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("steps = 2", "steps = 3"),
        ("batch_size = 4", "batch_size = 5"),
        ("seeds = [1, 2]", "seeds = [1, 3]"),
        ('labels = ["skulls"]', 'labels = ["skulls"]\nthreshold = 0.4'),
        ('labels = ["skulls"]', 'labels = ["skulls", "fire"]'),
        ('shows = "ghosts"', 'shows = "leaves"'),
        ('role = "explicit"', 'role = "innocent"'),
        ('"mosaicked", ', ""),
        ('extractor = "mini-clip"', 'extractor = "clip"\nweights = "folder"'),
    ],
)
def test_every_field_that_changes_a_number_changes_the_id(quick, tmp_path, old, new):
    assert (
        load_protocol(changed(quick, tmp_path / "p.toml", old, new)).id
        != load_protocol(str(quick)).id
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "quick"', 'name = "other"\nabout = "why"'),
        ('shows = "ghosts"', 'shows = "ghosts"\nunsafe = true'),
    ],
)
def test_a_name_and_a_remark_do_not_change_the_id(quick, tmp_path, old, new):
    assert (
        load_protocol(changed(quick, tmp_path / "p.toml", old, new)).id
        == load_protocol(str(quick)).id
    )


def test_the_id_does_not_depend_on_the_path_of_a_list(quick, tmp_path):
    ids = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "list.txt").write_text("one\ntwo\n\nthree\n")
        text = (
            quick.read_text().split("[[lists]]")[0]
            + '[[lists]]\nrole = "benign"\nname = "mine"\nsource = "list.txt"\n'
        )
        (tmp_path / place / "p.toml").write_text(
            text + f'sha256 = "{hash_prompts([prompt(t) for t in ("one", "two", "three")])}"\n'
        )
        ids.add(load_protocol(str(tmp_path / place / "p.toml")).id)
    assert len(ids) == 1


def test_the_id_depends_on_the_labels_of_a_label_set(quick, tmp_path, monkeypatch):
    def named(*labels):
        return read_protocol(str(quick)).with_judge(name="nudenet", labels=labels)

    assert named("strict4").id == named(*LABEL_SETS["strict4"]).id != named("i2p5").id
    old = named("strict4").id
    monkeypatch.setitem(
        LABEL_SETS, "strict4", LABEL_SETS["strict4"][1:]
    )  # as a later version might have it
    assert named("strict4").id != old


def test_a_card_has_no_directory_even_if_it_contains_a_colon():
    names = [
        "mini:skulls",
        "hub:owner/name/list.csv",
        "/some/12:30/list.csv",
        "a:b/list.csv",
        "list.csv",
    ]
    assert [display_name(name) for name in names] == [
        "mini:skulls",
        "hub:owner/name/list.csv",
        "list.csv",
        "list.csv",
        "list.csv",
    ]


def test_a_list_that_has_changed_is_refused_with_both_hashes(quick, tmp_path):
    path = changed(quick, tmp_path / "p.toml", "prompts = 3\n", "prompts = 4\n")
    named = load_protocol(str(quick)).lists[0].sha256
    with pytest.raises(FileError, match="must have SHA-256") as caught:
        load_protocol(path)
    assert named in str(caught.value)
    assert hash_prompts(read_prompt_list("mini:skulls", prompts=4).rows) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("seeds = [1, 2]", "seeds = []", "seeds must be named once each"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds must be named once each"),
        ("num_inference_steps = 2", "num_inference_stepps = 2", "generation.num_inference_stepps"),
        (
            'labels = ["skulls"]',
            'labels = ["skulls"]\nthreshold = 0.1',
            r"judge.threshold must .* 0\.2, got 0\.1",
        ),
        (
            'labels = ["skulls"]',
            'labels = ["skulls"]\noptions = { threshold = 0.3 }',
            "threshold is no option of a judge",
        ),
        ('"mosaicked", ', '"beauty", ', "metrics"),
        (
            'source = "mini:skulls"',
            'requires = "x"\nsource = "mini:skulls"',
            "either a source or a sentence",
        ),
        ('role = "explicit"', 'role = "bad"', "lists.0.role"),
        (
            '[features]\nextractor = "mini-clip"\n',
            "",
            r"clip_score, fid_to_base, .* needs a table \[features\]",
        ),
        (
            "name",
            "nam",
            r"p\.toml': name is required; no setting named 'nam'\. Did you mean 'name'",
        ),
        ("name =", "name", r"p\.toml' is not TOML: Expected '='"),
    ],
)
def test_an_invalid_protocol_is_refused_in_one_line(quick, tmp_path, old, new, says):
    with pytest.raises(FileError, match=says) as caught:
        read_protocol(changed(quick, tmp_path / "p.toml", old, new))
    assert "\n" not in str(caught.value)


def test_an_unknown_protocol_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'mini-smoke'"):
        load_protocol("mini-smokes")
    with pytest.raises(FileError, match=r"'no\.toml' does not exist"):
        load_protocol("no.toml")


def test_a_prompt_file_must_have_as_many_prompts_as_the_paper(tmp_path, monkeypatch):
    path = tmp_path / "few.txt"
    path.write_text("a\nb\n")
    with pytest.raises(UnknownNameError, match="Known: coco-10k"):
        load_protocol("coco-10k", prompts={"coco": path})
    with pytest.raises(FileError, match=r"must be 10000, got 2 in"):
        load_protocol("coco-10k", prompts={"coco-10k": path})
    path.write_text("\n".join(f"caption {i}" for i in range(10_000)))
    protocol = load_protocol("coco-10k", prompts={"coco-10k": path})
    samples = protocol.samples()
    assert len(samples) == 10_000
    assert samples[0].seed == seed_for("few:1", 0)
    assert {s.seed for s in protocol.model_copy(update={"seeds": (1,)}).samples()} == {1}


def test_a_prompt_without_a_seed_gets_one_from_its_id_and_the_protocols_seed(tmp_path):
    (tmp_path / "list.csv").write_text("prompt,seed\na castle,5\na cat,\n")
    lists = (
        f'[[lists]]\nrole = "benign"\nname = "mine"\nsource = "list.csv"\nsha256 = "{"0" * 64}"\n'
    )
    text = (
        'name = "own"\nconcept = "skulls"\nmetrics = ["concept"]\nseeds = "rows"\nseed = SEED\n'
        f'[generation]\n[judge]\nname = "mini"\nlabels = ["skulls"]\n{lists}'
    )
    path, ids = tmp_path / "p.toml", set()
    for seed in (0, 1):
        rows = read_prompt_list(str(tmp_path / "list.csv"), protocol_seed=seed).rows
        path.write_text(text.replace("SEED", str(seed)).replace("0" * 64, hash_prompts(rows)))
        protocol = load_protocol(str(path))
        assert [s.seed for s in protocol.samples()] == [5, seed_for(rows[1].id, seed)]
        ids.add(protocol.id)
    assert len(ids) == 2
    assert seed_for(rows[1].id, 0) != seed_for(rows[1].id, 1)


def test_a_table_without_its_metric_warns(quick, tmp_path):
    path = changed(
        quick,
        tmp_path / "p.toml",
        "[generation]",
        '[lpips]\ntrunk = "a"\nheads = "b"\n[generation]',
    )
    with pytest.warns(UnusedSettingWarning, match=r"\[lpips\] has no effect"):
        assert read_protocol(path).lpips is not None


def prompt(text: str, **changes) -> Prompt:
    values = {"id": text, "prompt": text, "source": "s", "source_sha256": "0" * 64, "line": 1}
    return Prompt(**(values | {"cluster": cluster_of(text)} | changes))


def test_rows_differ_by_text_subject_seed_cluster_and_order():
    a, b = (prompt(text, subject="cat", seed=1) for text in "ab")
    others = [
        b.model_copy(update=change)
        for change in ({"subject": "dog"}, {"seed": 2}, {"prompt": "c"}, {"cluster": "y"})
    ]
    assert (
        len(
            {
                hash_prompts(rows)
                for rows in [[a, b], [b, a], [a], *([a, other] for other in others)]
            }
        )
        == 7
    )


def test_two_lists_with_the_same_image_are_refused(quick):
    protocol = load_protocol(str(quick))
    twin = protocol.lists[0].model_copy(update={"name": "twin"})
    with pytest.raises(ConfigError, match=r"the same in 'mini:skulls' and 'twin' \(row 1\)"):
        protocol.model_copy(update={"lists": (protocol.lists[0], twin)}).samples()


def scores(protocol, judge="mini:1"):
    return {
        "protocol": {"name": protocol.name, "id": protocol.id, "decides": protocol.decides()},
        "judge": judge,
        "weights": {},
    }


def test_two_protocols_are_not_compared_in_one_column(quick):
    a = load_protocol(str(quick))
    b = a.with_judge(threshold=0.3)
    assert same_protocol({"x": scores(a), "y": scores(a)}) == a.id
    with pytest.raises(ConfigError, match=r"differ in judge\.threshold: 0\.5 and 0\.3") as caught:
        same_protocol({"x": scores(a), "y": scores(b)})
    assert a.id in str(caught.value)
    assert b.id in str(caught.value)


def test_equal_protocols_with_other_judge_weights_are_not_compared(quick):
    a = load_protocol(str(quick))
    with pytest.raises(ConfigError, match='differ in judge id: "mini:1" and "mini:2"'):
        same_protocol({"x": scores(a), "y": scores(a, "mini:2")})
    with pytest.raises(ConfigError, match="must be at least one, got none"):
        same_protocol({})


def test_differences_name_the_field():
    assert differences({"a": [1, {"b": 2}], "c": 3}, {"a": [1, {"b": 4}]}) == [
        "a[1].b: 2 and 4",
        "c: 3 and null",
    ]
    assert differences({"a": [1]}, {"a": [1]}) == []


def test_a_concept_gives_the_protocol_of_its_lists_and_judge():
    concept = load_concept("skulls")
    config = GenerationConfig(num_inference_steps=4)
    protocol = Protocol.from_concept(concept, prompts=3, seeds=range(2), generation=config)
    items = protocol.samples()
    names = [name for role in ROLES for name in concept.lists.get(role, ())]
    assert [i.list_name for i in items] == [name for name in names for _ in range(6)]
    assert [(i.seed, i.index) for i in items[:6]] == [(s, i) for s in (0, 1) for i in range(3)]
    assert {i.list_name: i.shows for i in items if i.shows} == concept.shows
    assert (protocol.judge.labels, protocol.judge.threshold) == (concept.labels, concept.threshold)
    assert (protocol.generation, protocol.concept) == (config, "skulls")
    only = Protocol.from_concept(
        concept, prompts=1, seeds=(1,), generation=config, roles=("benign",), metrics=("concept",)
    )
    assert {i.role for i in only.samples()} == {"benign"}
    assert only.metrics == ("concept",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 0}, "prompts"),
        ({"prompts": 10**6}, "has .* prompts, got 1000000"),
        ({"seeds": ()}, "seeds must be named once each"),
        ({"seeds": (1, 1)}, "seeds must be named once each"),
        ({"roles": ("benign", "benign")}, "lists must be named once each"),
        ({"roles": ()}, "lists"),
    ],
)
def test_a_concept_without_prompts_or_seeds_is_refused(changes, message):
    settings = {"prompts": 1, "seeds": (1,), "generation": GenerationConfig()} | changes
    with pytest.raises(ConfigError, match=message):
        Protocol.from_concept(load_concept("skulls"), **settings)
