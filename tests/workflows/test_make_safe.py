"""`make_safe`: one job from a model to a file that is shipped only if its check passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import safegen
from safegen.cli import main
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.generation import GenerationConfig, Sample
from safegen.edits.des import DES
from safegen.patches.patch import Patch
from safegen.stack_loader import StackLoader
from safegen.workflows.edit import FewTripletsWarning
from safegen.workflows.make_safe import make_safe, prepare_job
from safegen.workflows.removal.check import (
    CheckConfig,
    CheckResult,
    ListCheck,
    check_scores,
    make_protocol,
)
from safegen.workflows.removal.files import JobFiles
from safegen.workflows.removal.images import GeneratedImages, _latent_batches
from safegen.workflows.removal.prompts import check_prompts, training_prompts
from tiny import build_model

FEW_STEPS = GenerationConfig(num_inference_steps=4, batch_size=8)
GENERATED = GeneratedImages(triplets=4, generation=FEW_STEPS)
SMALL_CHECK = CheckConfig(images=2, max_share=0.7, generation=FEW_STEPS)
TRAINING = {"updates": 3, "warmup": 0, "batch": 2, "accumulation": 1, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    """Return the files of two concepts with fewer prompt lists, by name."""
    files = {}
    for name in ("skulls", "fire"):
        concept = load_concept(name)
        lists = {role: list(concept.lists[role]) for role in ("explicit", "benign")}
        values = concept.model_dump(mode="json", exclude_none=True, exclude={"shows", "lists"})
        tables = {"tuning": values.pop("tuning"), "lists": lists}
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        for table, rows in tables.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(row)}" for key, row in rows.items())]
        files[name] = tmp_path_factory.mktemp("concepts") / f"{name}.toml"
        files[name].write_text("\n".join(lines))
    return files


@pytest.fixture(scope="module")
def tiny(concepts):
    """Return options of a job with a training too short to remove anything."""
    return {
        "concept": concepts["skulls"],
        "generated": GENERATED,
        "check": SMALL_CHECK,
        "training": TRAINING,
        "teacher": False,
        "captions": (),
    }


@pytest.fixture(scope="module")
def loader():
    return StackLoader(device="cpu")


@pytest.fixture(scope="module")
def refused(loader, tiny, tmp_path_factory):
    """Return the result of a job with a training too short to remove anything, and its `out`."""
    out = tmp_path_factory.mktemp("job") / "safe.safetensors"
    result = make_safe("mini", out=out, loader=loader, lora=True, **tiny)
    return result, out


def test_a_model_that_still_draws_the_concept_is_kept_aside_with_its_report(refused):
    result, out = refused
    assert result.check.outcome == "remains"
    assert not result.is_shipped
    assert "still show the concept" in result.check.reasons[0]
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "safe.not-safe.lora.safetensors",
        "safe.not-safe.lora.safetensors.md",
        "safe.not-safe.safetensors",
        "safe.not-safe.safetensors.md",
        "safe.not-safe.safetensors.report",
    ]
    page = (result.report / "report.html").read_text()
    assert "mini:skulls" in page
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    assert "safegen verify" not in page  # the run is not kept
    card = (out.parent / "safe.not-safe.safetensors.md").read_text()
    table = (result.report / "report.md").read_text()
    for text in (page, card, table):
        assert "NOT SHIPPED (remains): safe.not-safe.safetensors must not be used" in text
        assert "still show the concept" in text
    lora = (out.parent / "safe.not-safe.lora.safetensors.md").read_text()
    assert "NOT SHIPPED (remains): safe.not-safe.lora.safetensors" in lora
    summary = json.loads((result.report / "make-safe.json").read_text())
    assert summary["shipped"] is False
    assert summary["check"]["lists"][0]["n"] == 2
    assert str(out.parent) not in json.dumps(summary)


@pytest.fixture
def short_probes(monkeypatch):
    """End probes early."""
    monkeypatch.setattr("safegen.workflows.plan.edit.PROBE_SECONDS", 0.1)


def test_the_plan_comes_before_the_first_stage(loader, tiny, tmp_path, short_probes):
    lines, stages, out = [], [], tmp_path / "safe"

    def stop(*stage):
        stages.append(stage)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        make_safe("mini", out=out, loader=loader, notify=lines.append, progress=stop, **tiny)
    assert lines[0].startswith("safegen, preset mini; mini: ")
    assert "none is written as an image" in lines[1]
    assert lines[2] == (
        "plan: 8 training images, safegen, 3 updates of 2 x 1 samples, check of 1 edited stack"
    )
    assert lines[3].split() == ["images", "16", "to", "generate"]  # 8, and 2 x 2 of 2 lists
    assert [line.split()[0] for line in lines[4:7]] == ["passes", "time", "memory"]
    assert len(stages) == 1
    (work,) = tmp_path.iterdir()
    assert not list(work.rglob("*.safetensors"))


def test_a_plan_alone_writes_nothing(concepts, loader, tmp_path):
    options = {"words": True, "method": "uce", "check": SMALL_CHECK, "loader": loader}
    job = prepare_job("mini", concept=concepts["skulls"], out=tmp_path / "safe", **options)
    plan = job.plan()
    assert plan.images == 2 * 2 * 2
    assert plan.seconds > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_job_that_is_stopped_in_each_stage_resumes_to_the_same_weights(
    refused, loader, tiny, tmp_path
):
    result, _ = refused
    out, work, stages = tmp_path / "safe.safetensors", tmp_path / "safe.safetensors.work", []

    def run(stop, **changes):
        def progress(stage, done, total):
            stages.append((stage, done))
            if stage == stop and done:
                raise RuntimeError("pulled the plug")

        return make_safe(
            "mini", out=out, loader=loader, progress=progress, lora=True, **tiny | changes
        )

    for stop in ("generating benign images", "editing", "generating: edited", "writing"):
        stages.clear()
        with pytest.raises(RuntimeError):
            run(stop)
        assert [path.name for path in tmp_path.iterdir()] == ["safe.safetensors.work"]
        if stop == "editing":  # nothing that was generated for the training is an image
            (latents,) = (work / "images").iterdir()
            assert sorted(path.name for path in latents.iterdir()) == ["benign", "unsafe"]
            assert not list(work.rglob("*.png"))
    assert not any(stage == "editing" for stage, _ in stages)
    with pytest.raises(FileError, match=r"made with other settings .*max_share"):
        run("", check=SMALL_CHECK.model_copy(update={"max_share": 0.8}))
    again = run("")
    assert load_file(again.model).keys() == load_file(result.model).keys()
    for file in ("model", "lora"):
        pairs = [load_file(getattr(r, file)) for r in (again, result)]
        assert all(torch.equal(pairs[0][key], pairs[1][key]) for key in pairs[1])
    assert again.check == result.check
    assert not work.exists()


def test_a_job_that_was_stopped_while_its_files_were_moved_finishes_the_move(tmp_path):
    files = JobFiles(tmp_path / "safe.safetensors")
    (files.finished / "safe.safetensors.report").mkdir(parents=True)
    (files.finished / "safe.safetensors").write_text("new")
    (tmp_path / "safe.safetensors.md").write_text("moved already")
    with pytest.raises(FileError, match="already exists"):
        files.check_outputs()
    files.result.write_text("{}")
    files.check_outputs()
    files.publish()
    assert (tmp_path / "safe.safetensors").read_text() == "new"
    assert not any(files.work.iterdir())


def test_images_are_used_again_after_an_error_of_the_edit(loader, tiny, tmp_path):
    out, stages = tmp_path / "safe", []
    with pytest.raises(ConfigError, match="timesteps must end by"):
        make_safe("mini", out=out, loader=loader, timesteps=(0, 2000), **tiny)
    assert [path.name for path in (tmp_path / "safe.work").iterdir()] == ["images"]

    def progress(stage, done, total):
        stages.append(stage)
        if stage == "editing":
            raise RuntimeError

    before = sorted((tmp_path / "safe.work" / "images").rglob("*.safetensors"))
    with pytest.raises(RuntimeError):
        make_safe("mini", out=out, loader=loader, progress=progress, **tiny)
    assert sorted((tmp_path / "safe.work" / "images").rglob("*.safetensors")) == before


@pytest.mark.slow
def test_a_word_edit_that_removes_the_concept_is_shipped(concepts, loader, tmp_path):
    check = CheckConfig(images=4, max_share=0.6, generation=GenerationConfig(num_inference_steps=8))
    result = make_safe(
        "mini",
        concept=concepts["fire"],
        out=tmp_path / "safe",
        words=True,
        check=check,
        loader=loader,
    )
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["safe", "safe.report"]
    assert (result.check.outcome, result.is_shipped) == ("removed", True)
    row = result.check.lists[0]
    assert row.before > 2
    assert row.interval[1] <= row.limit
    card = (tmp_path / "safe" / "README.md").read_text()
    assert "mini:fire (explicit)" in card
    model = safegen.load(str(tmp_path / "safe"), device="cpu")
    assert model.verified_metadata.patches[0].metadata.method == "rece"


def test_a_concept_that_the_model_does_not_draw_is_refused_before_training(loader, tiny, tmp_path):
    concept = tmp_path / "leaf.toml"
    concept.write_text(
        'name = "bones"\nwords = ["a castle"]\ncounterpart = ["a cat"]\n'
        'judge = "mini"\nlabels = ["skulls"]\n'
    )
    with pytest.raises(ConfigError, match=r"must show 'bones'.*finds only 0 of .*--words"):
        make_safe("mini", out=tmp_path / "safe", loader=loader, **tiny | {"concept": concept})
    assert [path.name for path in tmp_path.iterdir()] == ["leaf.toml"]
    check = CheckConfig(images=4, max_share=0.6, generation=FEW_STEPS)
    result = make_safe(
        "mini", concept=concept, out=tmp_path / "safe", words=True, check=check, loader=loader
    )
    assert result.check.outcome == "not-measured"
    assert "too few to show a removal" in result.check.reasons[0]
    assert result.model == tmp_path / "safe.not-safe"
    assert not (tmp_path / "safe").exists()


def test_own_images_are_censored_and_used(loader, tiny, tmp_path, short_probes):
    from safegen.data.triplets.triplets import Triplets

    source = Triplets.load("mini:skulls")
    for role in ("unsafe", "benign"):
        (tmp_path / role).mkdir()
        for row in source.rows[:4]:
            shutil.copy(source.folder / getattr(row, role), tmp_path / role / f"{row.id}.png")
    (tmp_path / "unsafe" / "broken.png").write_bytes(b"")
    lines: list[str] = []
    out, folders = tmp_path / "safe", {r: tmp_path / r for r in ("unsafe", "benign")}

    def stop(stage, done, total):
        if stage == "generating: base":
            raise RuntimeError

    with pytest.raises(RuntimeError), pytest.warns(FewTripletsWarning, match="got 4"):
        make_safe(
            "mini", out=out, loader=loader, progress=stop, notify=lines.append, **folders, **tiny
        )
    assert any(line.startswith("skipped unsafe/broken.png") for line in lines), lines
    (folder,) = (tmp_path / "safe.work" / "images").iterdir()
    triplets = Triplets.load(folder)
    patch = Patch.load(tmp_path / "safe.work" / "patches" / "edited.safetensors")
    assert patch.metadata.data == triplets.hash
    (tmp_path / "unsafe" / "new.png").write_bytes(b"more")
    with pytest.raises(FileError, match=r"made with other settings .*images"):
        make_safe("mini", out=out, loader=loader, **folders, **tiny)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benign": "."}, "benign must go with unsafe"),
        ({"unsafe": ".", "triplets": "mini:skulls"}, "as folders or as triplets, got both"),
        ({"words": True, "triplets": "mini:skulls"}, "an edit by words learns from no images"),
        ({"words": True, "method": "safegen"}, "must learn from words alone"),
        ({"words": True, "method": "des", "lora": True}, "lora must not be asked for with des"),
        ({"unsafe": "missing"}, "unsafe must be a folder of images, got 'missing', which does not"),
        ({"out": "safe.ckpt"}, "out must end in .safetensors, or have no ending"),
        ({"triplets": "mini:ghosts"}, "no bundled triplets named 'ghosts'"),
        ({"method": "safegne"}, "Did you mean 'safegen'"),
        ({"concept": "skull"}, "Did you mean 'skulls'"),
        ({"check": {"images": 5000}}, "mini:skulls has [0-9]+ prompts, got 5000"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_anything_is_written(
    loader, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, FileError, UnknownNameError), match=message):
        make_safe("mini", **{"concept": "skulls", "out": "safe", "loader": loader} | options)
    assert list(tmp_path.iterdir()) == []


def test_a_transformers_file_has_no_place_for_an_edit_of_text_encoders(tmp_path):
    des, file, folder = DES(erase=("a red cube",)), tmp_path / "safe.safetensors", tmp_path / "safe"
    with pytest.raises(ConfigError, match="out must be a folder with des on 'sd3'"):
        JobFiles(file).check_edit(des, build_model("sd3"))
    JobFiles(folder).check_edit(des, build_model("sd3"))
    JobFiles(file).check_edit(des, build_model("sd1"))


def test_a_judge_that_cannot_be_loaded_stops_the_job_before_the_model_is_loaded(tmp_path):
    concept = tmp_path / "c.toml"
    concept.write_text(
        'name = "c"\nwords = ["c"]\ncounterpart = []\njudge = "nudenet"\nlabels = ["strict5"]\n'
    )
    with pytest.raises((ConfigError, FileError, safegen.core.errors.UserError)):
        make_safe("no-such-model.safetensors", concept=concept, out=tmp_path / "safe")
    assert [path.name for path in tmp_path.iterdir()] == ["c.toml"]


def test_prompts_of_a_check_are_never_those_of_a_training():
    plain = load_concept("nudity").model_copy(update={"lists": {}, "tuning": {}})
    training, check = training_prompts(plain), check_prompts(plain, 32)
    assert not {*training[0], *training[1]} & {*check[0], *check[1]}
    assert all(len(texts) == len(set(texts)) > 3 for texts in (*training, *check))
    skulls = load_concept("skulls")
    measured = {s.prompt for s in make_protocol(skulls, CheckConfig(), Path()).samples()}
    assert not measured & {text for texts in training_prompts(skulls) for text in texts}


def test_a_concept_without_lists_is_checked_on_prompts_of_its_phrases(tmp_path):
    concept = load_concept("nudity").model_copy(update={"words": ("a", "b", "c")})
    protocol = make_protocol(concept, CheckConfig(images=32), tmp_path)
    samples = protocol.samples()
    for role in ("explicit", "benign"):
        assert sum(sample.role == role for sample in samples) == 32
    assert {s.prompt for s in samples if s.role == "explicit"} >= {"a sketch of a", "b at night"}
    assert make_protocol(concept, CheckConfig(images=32), tmp_path).id == protocol.id


@pytest.mark.parametrize("phrases", [("a",), tuple(f"word{i}" for i in range(100))])
def test_a_check_of_phrases_has_a_prompt_for_each_image_and_covers_the_list(tmp_path, phrases):
    concept = load_concept("nudity").model_copy(update={"words": phrases})
    samples = make_protocol(concept, CheckConfig(images=32), tmp_path).samples()
    explicit = [sample for sample in samples if sample.role == "explicit"]
    assert len({sample.prompt for sample in explicit}) == len(explicit) == 32
    assert any(phrases[len(phrases) * 31 // 32] in sample.prompt for sample in explicit)


def test_a_concept_with_explicit_lists_alone_is_checked_on_harmless_prompts_too(tmp_path):
    skulls = load_concept("skulls").model_copy(update={"lists": {"explicit": ("mini:skulls",)}})
    samples = make_protocol(skulls, CheckConfig(images=32), tmp_path).samples()
    assert [s.role for s in samples] == ["explicit"] * 32 + ["benign"] * 32


def test_training_images_are_drawn_with_the_scheduler_that_was_asked_for(loader, tmp_path):
    model, _ = loader.model("mini")
    samples = [Sample(prompt="a castle", seed=0)]
    drawn = []
    for name in (None, "Euler"):
        config = FEW_STEPS.model_copy(update={"scheduler": name})
        (batch,) = _latent_batches(model, samples, config, tmp_path / str(name))
        (image,) = safegen.generate(model, samples, config)
        (decoded,) = model.decode_images(batch)
        assert np.abs(np.asarray(decoded, int) - np.asarray(image, int)).max() <= 2
        drawn.append(batch)
    assert not torch.allclose(*drawn)


def row(role, hits, n=32, unjudged=0, **more):
    rate = {"hits": hits, "value": hits / n, "n": n - unjudged, "unjudged": unjudged}
    return {"role": role, "images": n, "concept": rate, "blank": {"value": 0.0}} | more


@pytest.mark.parametrize(
    ("before", "after", "unjudged", "outcome"),
    [
        (32, 0, 0, "removed"),  # up to 11 %, limit 25 %
        (32, 3, 0, "removed"),  # up to 24 %
        (32, 4, 0, "remains"),  # up to 28 %
        (32, 0, 4, "remains"),  # an unjudged image counts as showing the concept
        (14, 0, 0, "removed"),  # limit 10.9 %
        (13, 0, 0, "not-measured"),  # limit 10.2 %, up to 10.7 % with none at all
        (13, 9, 0, "remains"),  # seen more often than the limit, however few there were
        (0, 0, 0, "not-measured"),
    ],
)
def test_the_rule_of_a_check(before, after, unjudged, outcome):
    scores = {
        "stacks": {
            "base": {"lists": {"e": row("explicit", before)}},
            "edited": {"baseline": "base", "lists": {"e": row("explicit", after, 32, unjudged)}},
        }
    }
    assert check_scores(scores, "edited", CheckConfig()).outcome == outcome


def test_images_of_few_prompts_do_not_show_a_removal_by_their_number():
    few = {"hits": 0, "value": 0.0, "n": 32, "unjudged": 0, "low": 0.0, "high": 0.32}  # 8 prompts
    lists = [{"e": row("explicit", 32)}, {"e": row("explicit", 0) | {"concept": few}}]
    stacks = {"base": {"lists": lists[0]}, "edited": {"baseline": "base", "lists": lists[1]}}
    result = check_scores({"stacks": stacks}, "edited", CheckConfig())
    assert result.lists[0].interval == (0.0, 0.32)
    assert result.outcome == "not-measured"


def test_a_model_that_no_longer_draws_what_is_harmless_is_not_shipped():
    lists = {"e": row("explicit", 32), "b": row("benign", 0, subject={"value": 1.0})}
    blank = {"e": row("explicit", 0), "b": row("benign", 0, subject={"value": 0.5})}
    scores = {"stacks": {"base": {"lists": lists}, "edited": {"baseline": "base", "lists": blank}}}
    result = check_scores(scores, "edited", CheckConfig())
    assert result.outcome == "broken"
    assert result.reasons == (
        "b: 50 % of the images show the object of their prompt, 100 % before the edit",
    )
    blank["b"]["subject"] = None
    assert check_scores(scores, "edited", CheckConfig()).outcome == "removed"
    blank["b"]["blank"] = {"value": 0.9}
    assert check_scores(scores, "edited", CheckConfig()).outcome == "broken"


def test_a_check_of_too_few_images_is_refused():
    with pytest.raises(ValueError, match="images must be enough to show a removal, got 11"):
        CheckConfig(images=11)
    assert CheckConfig(images=12).images == 12


def test_the_command_exits_with_3_and_says_how_to_go_on(refused, monkeypatch, capsys):
    result, _ = refused
    job = lambda *args, **options: result  # noqa: E731  (its stages are tested above)
    monkeypatch.setattr("safegen.workflows.make_safe.make_safe", job)
    for more in ([], ["--json"]):
        words = ["make-safe", "mini", "--concept", "skulls", "--out", "safe.safetensors", *more]
        monkeypatch.setattr("sys.argv", ["safegen", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 3
        text = capsys.readouterr().out
        if more:
            assert json.loads(text)["is_shipped"] is False
        else:
            assert "NOT SHIPPED (remains)" in text
            assert "--unsafe DIR" in text
            assert "of 2 after" in text


@pytest.mark.slow  # about five minutes on one core
def test_the_default_job_on_the_miniature_removes_skulls_and_ships(tmp_path):
    result = make_safe("mini", concept="skulls", out=tmp_path / "safe.safetensors")
    assert result.is_shipped
    assert max(row.after for row in result.check.lists) <= 3
    scores = json.loads((result.report / "report.json").read_text())
    roles = {row["label"]: row["roles"] for row in scores["stacks"]}["edited"]
    assert roles["benign"]["subject"]["value"] > 0.9


def test_a_shipped_model_names_the_lists_that_were_not_measured():
    measured = {"name": "a", "role": "explicit", "n": 32, "before": 32, "after": 0, "unjudged": 0}
    rare = measured | {"name": "b", "role": "innocent", "before": 1}
    lists = (
        ListCheck(**measured, interval=(0.0, 0.11), limit=0.25),
        ListCheck(**rare, interval=(0.0, 0.11), limit=0.01),
    )
    first, second = CheckResult(outcome="removed", reasons=(), lists=lists).lines("safe")
    assert first.startswith("safe: the concept is removed on these prompts")
    assert second.startswith("b: not measured, as the base model shows the concept in 1 of 32")
