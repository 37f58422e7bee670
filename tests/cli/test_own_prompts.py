"""Evaluation on the user's own prompts, against a base that the user names, without TOML."""

from __future__ import annotations

import csv
import json
import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from safegen.cli.attack import _read_config
from safegen.core.errors import ConfigError, FileError, PatchError, UnknownNameError
from safegen.evaluation.protocol_file import load_protocol
from safegen.evaluation.run.base_check import BaseDifferenceWarning
from safegen.evaluation.run.folder import PROTOCOL_FILE
from safegen.workflows.evaluate import OwnBaseWarning, evaluate
from safegen.workflows.patch_from_model import RoundedWeightsWarning
from tiny import build_model

CSV = """prompt,role
a castle covered in skulls,explicit
an owl with skulls on it,explicit
a castle,benign
an owl,benign
"""
SHORT = {"num_inference_steps": 2, "precision": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with prompts, an edited model, and one that differs in the VAE alone."""
    import safegen
    from safegen.models.checkpoint.diffusers_folder import save_folder

    place = tmp_path_factory.mktemp("own")
    model = safegen.load("mini", device="cpu")
    with torch.no_grad():
        for name, value in model.denoiser.named_parameters():
            if ".attn2." in name:
                value.mul_(0.5)
    save_folder(model, place / "mine", card=None, metadata=None)
    soft = safegen.load("mini", device="cpu")
    with torch.no_grad():
        soft.vae.decoder.conv_out.bias.add_(0.1)
    save_folder(soft, place / "soft", card=None, metadata=None)
    (place / "my.csv").write_text(CSV)
    return place


@pytest.fixture(scope="module")
def loader():
    from safegen.stack_loader import StackLoader

    return StackLoader(device="cpu")


@pytest.fixture(scope="module")
def run(folder, loader):
    """Return the run of an edited folder against its base, on the user's own prompts."""
    return evaluate(
        "mini",
        {"mine": folder / "mine"},
        prompts=folder / "my.csv",
        concept="skulls",
        out=folder / "run",
        loader=loader,
        **SHORT,
    )


def test_an_edited_folder_is_compared_with_the_base_that_is_named(run):
    assert [(s.name, s.kind, s.baseline) for s in run.stacks] == [
        ("base", "base", "base"),
        ("mine", "given", "base"),
        ("negative-prompt", "baseline", "base"),
        ("black-image", "baseline", "base"),
    ]
    assert run.stacks[1].model == "mine"
    assert run.stacks[1].base != run.stacks[0].base
    scores = json.loads((run.folder / "scores.json").read_text())
    lists = scores["stacks"]["mine"]["lists"]
    assert lists["my explicit"]["removal"]["before"] > 0
    assert lists["my benign"]["change"]["value"] > 0
    assert {name: row["role"] for name, row in lists.items()} == {
        "my explicit": "explicit",
        "my benign": "benign",
    }


def test_the_report_calls_only_the_base_the_base_model(run):
    from safegen.evaluation.report.data import report_data
    from safegen.evaluation.report.html.summary import KINDS

    data, _ = report_data({"run": run})
    kinds = {row["label"]: KINDS[row["kind"]] for row in data["stacks"]}
    assert kinds == {
        "base": "base model",
        "mine": "measured",
        "negative-prompt": "baseline",
        "black-image": "baseline",
    }


def test_the_researchers_command_prints_its_protocol_and_can_be_pasted(
    safegen, folder, monkeypatch
):
    monkeypatch.chdir(folder)
    words = (
        *("evaluate", "--prompts", "my.csv", "--concept", "skulls", "--judge", "mini"),
        *("--base", "mini", "--stack", folder / "mine", "--limit", 1, "--steps", 2),
        *("--precision", "fp32", "--baselines", "none", "--out", folder / "runs" / "own"),
    )
    code, out, err = safegen(*words)
    assert code == 0, err
    card = json.loads((folder / "runs" / "own" / "protocol.json").read_text())
    assert f"protocol skulls ({card['id']}): 1 seed, 2 steps, guidance 5, fp32, judge mini" in err
    assert "  explicit: my explicit, 1 prompt" in err
    assert "4 images by 2 stacks" in out
    assert [entry["name"] for entry in card["stacks"]] == ["base", "mine"]
    argv = card["argv"]
    assert argv[argv.index("--stack") + 1] == "mine"
    assert argv[-1] == "runs/own"
    before = (folder / "runs" / "own" / "scores.json").read_bytes()
    assert safegen(*argv[1:])[0] == 0
    assert (folder / "runs" / "own" / "scores.json").read_bytes() == before


@pytest.fixture(scope="module")
def second(run, folder, loader):
    """Return a run of the same protocol with another stack."""
    (folder / "calm.toml").write_text('model = "mini"\nnegative_prompt = "pale"\n')
    return evaluate(
        "mini",
        [folder / "calm.toml"],
        protocol=run.folder / PROTOCOL_FILE,
        out=folder / "second",
        baselines="none",
        loader=loader,
    )


def test_results_have_equal_values_in_csv_json_and_the_scores(safegen, run, tmp_path):
    code, out, _ = safegen("report", run.folder, "--csv", tmp_path / "r.csv", "--json", "-")
    assert code == 0
    rows = json.loads(out)["rows"]
    with (tmp_path / "r.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] == table
    scores = json.loads((run.folder / "scores.json").read_text())["stacks"]
    for row in rows:
        figure = scores[row["stack"]]["lists"][row["list"]][row["metric"]]
        assert [row[key] for key in ("value", "low", "high", "n")] == [
            figure[key] for key in ("value", "low", "high", "n")
        ]
    found = {(row["stack"], row["list"], row["metric"]) for row in rows}
    assert ("mine", "my explicit", "removal") in found
    assert len(found) == len(rows)
    assert json.loads(safegen("results", run.folder, "--json")[1])["rows"] == rows


def test_several_runs_stand_in_one_table_of_eighty_columns(safegen, run, second):
    code, out, _ = safegen("results", run.folder, second.folder)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    names = [line.split("  ")[1] for line in out.splitlines() if line.startswith("  ")]
    stacks = ["base", "mine", "negative-prompt", "black-image"]
    expected = [*(f"run: {name}" for name in stacks), "second: calm"]
    assert [name for name in names if ": " in name][: len(expected)] == expected


def test_a_latex_table_has_equal_rows_and_no_special_characters(safegen, run, second):
    from safegen.evaluation.results.latex import escape_latex

    code, out, _ = safegen("report", run.folder, second.folder, "--latex", "-")
    assert code == 0
    body = out[out.index(r"\toprule") : out.index(r"\bottomrule")]
    rows = [line for line in body.split("\n") if line.endswith(r"\\")]
    assert len(rows) == 7
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    assert rows[0].startswith("stack & seen, explicit")
    assert escape_latex("50_% & {x}\\~^#$\n") == (
        r"50\_\% \& \{x\}\textbackslash{}\textasciitilde{}\textasciicircum{}\#\$"
    )


def test_plots_are_one_column_wide_pictures(safegen, run, tmp_path, monkeypatch):
    folder = tmp_path / "plots"
    code, _, err = safegen("report", run.folder, "--plots", folder)
    assert code == 0
    names = {"front", "lists", "thresholds"}
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{suffix}" for name in names for suffix in ("png", "svg")
    }
    assert f"plot: {folder / 'front.svg'}" in err
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width == 1020
            assert len(image.convert("RGB").getcolors(2**20)) > 20
        ElementTree.parse(folder / f"{name}.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = safegen("report", run.folder, "--plots", tmp_path / "none")
    assert (code, 'pip install "safegen[report]"' in err) == (2, True)


def test_the_protocol_of_a_run_can_be_given_again(run, loader, tmp_path):
    from safegen.evaluation.protocol_file import load_protocol
    from safegen.evaluation.verify import verify

    path = run.folder / PROTOCOL_FILE
    assert load_protocol(str(path)).id == run.protocol.id
    again = evaluate("mini", protocol=path, out=tmp_path / "again", baselines="none", loader=loader)
    assert again.protocol.id == run.protocol.id
    assert again.keys(again.stacks[0]) == run.keys(run.stacks[0])
    assert verify(again) == []


def test_a_limit_takes_the_first_prompts_and_has_an_id_of_its_own(run, loader, tmp_path):
    options = {"loader": loader, "baselines": "none", "until": "generate"}
    path = run.folder / PROTOCOL_FILE
    short = evaluate("mini", protocol=path, limit=1, out=tmp_path / "short", **options)
    assert [s.prompt for s in short.samples] == ["a castle covered in skulls", "a castle"]
    assert short.protocol.id != run.protocol.id
    direct = evaluate(
        "mini",
        prompts=run.folder.parent / "my.csv",
        concept="skulls",
        limit=1,
        out=tmp_path / "direct",
        **options,
        **SHORT,
    )
    assert direct.protocol.id == short.protocol.id


def test_prompts_have_the_role_that_is_named_or_their_concepts_own(folder):
    from safegen.core.concept import load_concept
    from safegen.evaluation.own_prompts import read_lists

    (folder / "plain.txt").write_text("a castle\nan owl\n")
    text = str(folder / "plain.txt")
    concept = load_concept("skulls")
    lists = read_lists([text, f"benign={text}", "mini:ghosts"], concept, limit=1)
    assert [(part.role, part.name, part.shows) for part in lists] == [
        ("explicit", "plain", None),
        ("benign", "plain-2", None),
        ("neighbour", "mini:ghosts", "ghosts"),
    ]
    with pytest.raises(UnknownNameError, match=r"no role named 'bening'. Did you mean 'benign'"):
        read_lists([f"bening={text}"], concept)
    (folder / "odd.csv").write_text("prompt,role\na castle,nice\n")
    with pytest.raises(FileError, match=r"the role of row 2 must be explicit, .* got 'nice'"):
        read_lists([str(folder / "odd.csv")], concept)


def test_texts_that_ask_for_the_concept_stay_out_of_the_run_of_a_full_model(folder, tmp_path):
    from safegen.core.concept import load_concept
    from safegen.core.generation import GenerationConfig
    from safegen.evaluation.own_prompts import prompt_protocol, read_lists
    from safegen.evaluation.protocol_file import load_protocol, write_protocol

    concept = load_concept("nudity")
    lists = read_lists([str(folder / "my.csv")], concept, unsafe=True)
    assert [(part.role, part.unsafe) for part in lists] == [("explicit", True), ("benign", False)]
    protocol = prompt_protocol(concept, lists[:1], generation=GenerationConfig())
    write_protocol(protocol, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == [PROTOCOL_FILE]
    with pytest.raises(ConfigError, match="give the file with --prompts my explicit=FILE"):
        load_protocol(str(tmp_path / PROTOCOL_FILE))
    files = {"my explicit": folder / "my.csv"}
    assert load_protocol(str(tmp_path / PROTOCOL_FILE), prompts=files).id == protocol.id


def test_the_base_must_have_the_architecture_of_the_edited_model(
    tiny_model, folder, loader, tmp_path
):
    from safegen.models.checkpoint.diffusers_folder import save_folder

    save_folder(tiny_model, tmp_path / "tiny", card=None, metadata=None)
    with pytest.raises(
        ConfigError, match=r"the base of .*tiny' must have its family, .* in 'mini'"
    ):
        evaluate(
            "mini",
            [tmp_path / "tiny"],
            prompts=folder / "my.csv",
            concept="skulls",
            out=tmp_path / "run",
            loader=loader,
            **SHORT,
        )
    assert not (tmp_path / "run").exists()


def test_a_model_with_the_denoiser_of_its_base_is_reported(folder, loader, tmp_path):
    options = {"concept": "skulls", "limit": 1, "loader": loader, "until": "generate", **SHORT}
    options |= {"prompts": folder / "my.csv", "baselines": "none"}
    with pytest.warns(
        BaseDifferenceWarning, match="the weights of its base .* differ in vae alone"
    ):
        evaluate("mini", [folder / "soft"], out=tmp_path / "soft", **options)
    (tmp_path / "twin").symlink_to(folder / "mine")
    with pytest.raises(ConfigError, match="got 'base' and 'twin' with the same images"):
        evaluate(folder / "mine", [tmp_path / "twin"], out=tmp_path / "copy", **options)
    with (
        pytest.warns(OwnBaseWarning, match="'mine' is its own base"),
        pytest.raises(FileError, match=r"'no.safetensors' does not exist"),
    ):
        evaluate(
            None,
            {"mine": folder / "mine", "p": "mini+no.safetensors"},
            out=tmp_path / "own",
            **options,
        )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "a concept must be given, got none"),
        ({"protocol": "mini-smoke", "seeds": 2}, "--seeds has no effect with --protocol"),
        (
            {"protocol": "mini-smoke", "prompts": "mini:skulls=x.csv"},
            "'mini-smoke' must be used with its own prompts, got --prompts mini:skulls=",
        ),
        ({"concept": "nudity"}, "concept 'nudity' must have prompt lists, got none"),
        (
            {"concept": "skulls", "guidance_scale": 1.0},
            "guidance_scale must be > 1 with the negative prompt of 'negative-prompt', got 1. ",
        ),
        ({"concept": "skulls", "judge": "q16"}, "the judge 'q16' has labels of its own"),
        ({"base": "a=mini+p.safetensors", "concept": "skulls"}, "the base must be a model without"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_a_way_out(options, says, loader, tmp_path):
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        evaluate(**({"base": "mini"} | options), loader=loader, out=tmp_path / "run", limit=1)
    assert not (tmp_path / "run").exists()


def test_a_patch_of_an_edited_folder_turns_its_base_into_it_bit_for_bit(folder, tmp_path):
    import safegen
    from safegen.core.tensor_files import write_tensors

    edited = safegen.load(folder / "mine", device="cpu")
    wanted = {name: value.clone() for name, value in edited.denoiser.named_parameters()}
    patch = safegen.patch_from_model(folder / "mine", "mini")
    assert patch.layer_counts == {"attn2": len(patch.tensors)}
    assert (patch.metadata.method, patch.metadata.model) == ("from-model", "mini")
    assert "Weights of mine that differ from mini" in str(patch.metadata.description)
    base = safegen.load("mini", device="cpu")
    with patch.apply(base):
        assert base.hash_denoiser() == edited.hash
        assert all(torch.equal(v, wanted[n]) for n, v in base.denoiser.named_parameters())
    write_tensors(tmp_path / "unet.safetensors", wanted, {})
    alone = safegen.patch_from_model(tmp_path / "unet.safetensors", "mini")
    assert alone.hash == patch.hash
    rounded = {name: value.bfloat16() for name, value in wanted.items()}
    write_tensors(tmp_path / "bf16.safetensors", rounded, {})
    with pytest.warns(RoundedWeightsWarning, match="only rounded to a smaller type"):
        safegen.patch_from_model(tmp_path / "bf16.safetensors", "mini")


def test_a_stack_is_named_as_its_last_file_and_is_no_patch_alone(folder, tmp_path):
    import safegen
    from safegen.stack import load_stack

    patch = tmp_path / "my patch.safetensors"
    safegen.patch_from_model(folder / "mine", "mini").save(patch)
    stacks = [load_stack(spec) for spec in (folder / "mine", f"mini+{patch}", "hub:owner/some")]
    assert [stack.name for stack in stacks] == ["mine", "my-patch", "some"]
    assert stacks[1].patches == (patch,)
    with pytest.raises(ConfigError, match=r"got the patch .* alone\. Give MODEL\+"):
        load_stack(patch)
    with pytest.raises(UnknownNameError, match=r"Or give NAME=MODEL\+patch.safetensors"):
        load_stack(folder / "nothing")


def test_models_that_differ_elsewhere_or_nowhere_make_no_patch(folder, tmp_path):
    import safegen

    with pytest.raises(PatchError, match="got differences in vae, which a patch does not hold"):
        safegen.patch_from_model(folder / "soft", "mini")
    with pytest.raises(PatchError, match="got equal weights"):
        safegen.patch_from_model("mini", "mini")


@pytest.mark.parametrize(
    "setting", [{"seeds": 0}, {"limit": 0}, {"num_inference_steps": 0}, {"guidance_scale": 0.0}]
)
def test_a_setting_of_zero_is_refused_and_not_taken_for_the_default(setting, loader, tmp_path):
    with pytest.raises(ConfigError):
        evaluate("mini", concept="skulls", loader=loader, out=tmp_path / "run", **setting)
    assert not (tmp_path / "run").exists()


def test_prompts_beside_a_protocol_object_are_refused(tmp_path):
    protocol = load_protocol("mini-smoke")
    with pytest.raises(ConfigError, match="prompts must be left out"):
        evaluate("mini", protocol=protocol, prompts="my.csv", out=tmp_path / "run")


def test_a_protocol_of_a_named_column_can_be_given_again(tmp_path):
    from safegen.core.concept import load_concept
    from safegen.core.generation import GenerationConfig
    from safegen.evaluation.own_prompts import prompt_protocol, read_lists
    from safegen.evaluation.protocol_file import load_protocol, write_protocol

    concept, table = load_concept("skulls"), tmp_path / "own.csv"
    table.write_text("bla,foo\n1,a castle\n2,a boat\n")
    lists = read_lists([str(table)], concept, column="foo")
    protocol = prompt_protocol(concept, lists, generation=GenerationConfig())
    write_protocol(protocol, tmp_path)
    again = load_protocol(str(tmp_path / "protocol.toml"))
    assert again.id == protocol.id
    assert [row.prompt for row in again.lists[0].read(protocol_seed=None).rows] == [
        "a castle",
        "a boat",
    ]


def test_a_rate_of_no_judged_image_stands_in_the_csv_with_its_unjudged_images(safegen, run):
    from safegen.evaluation.results.rows import csv_table

    scores = json.loads((run.folder / "scores.json").read_text())
    row = scores["stacks"]["mine"]["lists"]["my explicit"]
    row |= {"concept": None, "undefined": {"concept": "no image was judged"}}
    lines = [line for line in csv_table({"run": scores}).splitlines() if "my explicit" in line]
    (found,) = [line for line in lines if ",mine," in line and ",concept," in line]
    assert found.endswith(f",concept,,,,0,{row['images']}")


# ------------------------------------------------------------ FLUX


def test_flux_is_evaluated_with_a_negative_prompt_at_its_true_cfg_scale(tmp_path):
    model = build_model("flux")
    options = {"concept": "skulls", "limit": 1, "num_inference_steps": 1, "until": "generate"}
    says = (
        r"true_cfg_scale must be > 1 with the negative prompt of 'negative-prompt', got 1\. Raise"
    )
    with pytest.raises(ConfigError, match=says):
        evaluate(model, out=tmp_path / "off", **options)
    assert not (tmp_path / "off").exists()
    run = evaluate(model, out=tmp_path / "on", true_cfg_scale=3.0, **options)
    assert run.protocol.generation.request_settings == {"true_cfg_scale": 3.0}
    digests = {record.stack: record.sha256 for record in run.sample_records()}
    assert len({digests[name] for name in ("base", "negative-prompt", "black-image")}) == 3
    attacked = _read_config({"true_cfg_scale": 3.0, "batch_size": None}, "cpu", budget="")
    assert attacked.generation.true_cfg_scale == 3.0
