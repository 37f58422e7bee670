"""The training tool of the miniature model, run at a tiny size."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from safegen.core.errors import FileError
from safegen.core.generation import GenerationConfig, Sample
from safegen.data.triplets.check import check_triplets
from safegen.data.triplets.triplets import Triplets
from safegen.mini import bundle, captions, world
from safegen.mini.world import OBJECTS
from safegen.models.generation import generate
from safegen.models.loading import load
from tools.mini.__main__ import app
from tools.mini.denoiser import cache_latents
from tools.mini.fit import fit
from tools.mini.pack import BENIGN_ATTRIBUTES, object_and_attribute
from tools.mini.scenes import ATTRIBUTE_SHARES, CaptionTable, draw_scenes, load_scenes, make_scenes


def run(*arguments, check=False):
    """Run the command; with `check`, fail unless it succeeds."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert not check or result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of every stage, run at the tiny size."""
    folder = tmp_path_factory.mktemp("train")
    threads = torch.get_num_threads()
    run(
        "--work", folder / "work", "--output", folder / "home", "--tiny", "--threads", 1, check=True
    )
    torch.set_num_threads(threads)
    return folder


def relative(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_every_stage_runs_and_writes_the_shipped_files(trained):
    stages = [
        json.loads(line)["stage"]
        for line in (trained / "work" / "log.jsonl").read_text().splitlines()
    ]
    assert stages == ["clip", "vae", "unet", "polish", "judge", "held-out-judge", "flow"]
    assert relative(trained / "home" / "weights") == relative(bundle.HERE / "weights")
    for path in (trained / "home").rglob("*.json"):
        assert "_name_or_path" not in path.read_text()


def test_packed_weights_load_and_generate(trained):
    model = load(str(trained / "home" / "weights" / "pipeline"))
    (image,) = generate(
        model, [Sample(prompt="a castle", seed=0)], GenerationConfig(num_inference_steps=2)
    )
    assert image.size == (64, 64)
    shipped = load("mini")
    for part in ("unet", "vae", "text_encoder"):
        mine, theirs = (getattr(m.pipeline, part).state_dict() for m in (model, shipped))
        assert mine.keys() == theirs.keys()
        if part != "text_encoder":  # its vocabulary depends on the captions
            assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    assert model.pipeline.scheduler.config == shipped.pipeline.scheduler.config
    flow = load(str(trained / "home" / "weights" / "flow"))
    (image,) = generate(
        flow, [Sample(prompt="a castle", seed=0)], GenerationConfig(num_inference_steps=2)
    )
    assert image.size == (64, 64)
    assert flow.family == load("mini-flow").family


@pytest.mark.parametrize("concept", ["skulls", "fire"])
def test_triplets_are_made_of_unsafe_and_benign_images(trained, concept):
    folder = trained / "home" / "triplets" / concept
    assert len(Triplets.load(folder)) == 8
    assert check_triplets(folder) == []


@pytest.mark.parametrize("concept", sorted(BENIGN_ATTRIBUTES))
def test_every_object_of_the_triplets_has_several_attributes(concept):
    met: dict[str, set[str | None]] = {}
    for i in range(100):
        name, mark = object_and_attribute(i, BENIGN_ATTRIBUTES[concept])
        met.setdefault(name, set()).add(mark)
    assert set(met) == set(OBJECTS)
    assert min(len(marks) for marks in met.values()) >= 2
    assert None in set.union(*met.values())


def test_a_finished_stage_is_not_trained_again(trained):
    log = (trained / "work" / "log.jsonl").read_text()
    before = (trained / "work" / "clip" / "model.safetensors").read_bytes()
    run("--work", trained / "work", "--stages", "clip", "--tiny", check=True)
    assert (trained / "work" / "log.jsonl").read_text() == log
    assert (trained / "work" / "clip" / "model.safetensors").read_bytes() == before


def cached(work):
    """Return the cached latents and the header of their file."""
    with safe_open(work / "latents.safetensors", "pt") as file:
        return file.get_tensor("mean"), file.metadata()


def copy_work(trained, tmp_path):
    """Return a copy of the work folder with the latents and their sources."""
    work = tmp_path / "work"
    shutil.copytree(trained / "work" / "pipeline" / "vae", work / "pipeline" / "vae")
    for name in ("world.npz", "latents.safetensors"):
        shutil.copy(trained / "work" / name, work)
    return work


def test_cached_latents_are_used_while_their_sources_are_equal(trained, tmp_path):
    work = copy_work(trained, tmp_path)
    mean, header = cached(work)
    save_file(
        {"mean": mean + 1, "std": mean}, work / "latents.safetensors", header
    )  # distinguishable from recomputed latents
    found, _ = cache_latents(work, load_scenes(work))
    assert torch.equal(found, mean + 1)


@pytest.mark.parametrize("change", ["weights", "scaling factor", "images"])
def test_latents_of_another_autoencoder_or_other_images_are_recomputed(trained, tmp_path, change):
    work = copy_work(trained, tmp_path)
    mean, header = cached(work)
    folder, data = work / "pipeline" / "vae", load_scenes(work)
    vae = AutoencoderKL.from_pretrained(folder)
    if change == "weights":
        with torch.no_grad():
            vae.quant_conv.bias.add_(1)
    elif change == "scaling factor":
        vae.register_to_config(scaling_factor=2 * vae.config.scaling_factor)
    else:
        data["images"] = 255 - data["images"]
    vae.save_pretrained(folder)
    found, _ = cache_latents(work, data)
    new, new_header = cached(work)
    assert not torch.equal(found, mean)
    assert torch.equal(found, new)
    assert new_header["source_hash"] != header["source_hash"]
    assert {p.name for p in work.iterdir()} == {"pipeline", "world.npz", "latents.safetensors"}
    if change == "scaling factor":
        torch.testing.assert_close(found, 2 * mean)


def test_a_failed_write_keeps_the_old_scenes(tmp_path, monkeypatch):
    draw_scenes(tmp_path, n=3)
    before = (tmp_path / "world.npz").read_bytes()

    def half(file, **arrays):
        file.write(b"PK half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numpy.savez", half)
    with pytest.raises(FileError, match="cannot be written: No space left on device"):
        draw_scenes(tmp_path, n=5)
    assert [p.name for p in tmp_path.iterdir()] == ["world.npz"]
    assert (tmp_path / "world.npz").read_bytes() == before


def regression(work, *, stop_at=None, steps=60):
    """Return the fit of a line to points; raise before step `stop_at`."""
    torch.manual_seed(0)

    def loss(step, g):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=g)
        value = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        return value, {"square": value.item()}

    model = nn.Linear(3, 1)
    return fit(
        "line", work, model, steps, loss, lr=0.1, warmup=5, checkpoint_seconds=0
    ).state_dict()


def test_a_resumed_stage_is_bit_equal(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = regression(tmp_path / "whole")
    for stop in (7, 31):
        with pytest.raises(KeyboardInterrupt):
            regression(tmp_path / "broken", stop_at=stop)
    broken = regression(tmp_path / "broken")
    assert all(torch.equal(whole[k], broken[k]) for k in whole)


def detection(work, *, stop_at=None):
    """Fit convolutions in channels-last layout with running statistics, as in the judge."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3)).to(
        memory_format=torch.channels_last
    )

    def loss(step, g):
        if step == stop_at:
            raise KeyboardInterrupt
        value = (model(torch.randn(4, 3, 8, 8, generator=g)) - 1).pow(2).mean()
        return value, {"square": value.item()}

    return fit("net", work, model, 12, loss, lr=0.1, warmup=2, checkpoint_seconds=0).state_dict()


def test_statistics_and_memory_layout_are_restored(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = detection(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        detection(tmp_path / "broken", stop_at=5)
    broken = detection(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert all(
        torch.equal(whole[k], broken[k]) and whole[k].stride() == broken[k].stride() for k in whole
    )


def test_checkpoints_are_safetensors_and_a_damaged_one_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        regression(tmp_path, stop_at=7)
    assert [p.name for p in tmp_path.iterdir()] == ["line-checkpoint.safetensors"]
    path = tmp_path / "line-checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "7"
        kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert {key.partition("/")[0] for key in kept} == {
        "model",
        "average",
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    spoilt = {
        "other shape": kept | {"model/weight": torch.zeros(2, 3)},
        "no moment": {k: v for k, v in kept.items() if k[:9] != "exp_avg/b"},
    }
    for tensors in spoilt.values():
        save_file(tensors, path, {"step": "7", "seconds": "1"})
        with pytest.raises(
            FileError, match=r"is damaged or of another model .*Remove it to start again"
        ) as caught:
            regression(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"PK half a file")
    with pytest.raises(FileError, match="is damaged or of another model"):
        regression(tmp_path)


def test_a_row_of_the_log_is_the_mean_over_its_steps(tmp_path):
    regression(tmp_path, steps=53)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 53]
    assert rows[0]["square"] > rows[1]["square"] > 0
    again, only = tmp_path / "again", []
    again.mkdir()
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss(step, g):
        value = (model(torch.ones(1, 3)) - step).pow(2).mean()
        only.append(value.item())
        return value, {"square": value.item()}

    fit("few", again, model, 3, loss, lr=0.1)
    assert json.loads((again / "log.jsonl").read_text())["square"] == pytest.approx(
        sum(only) / 3, abs=1e-5
    )


def test_scenes_have_their_shares_and_captions_are_true_of_them(tmp_path):
    scenes = make_scenes(2000, 1)
    for kind, share in ATTRIBUTE_SHARES.items():
        assert sum(s.attribute == kind for s in scenes) / 2000 == pytest.approx(share, abs=0.04)
    assert scenes[:5] == make_scenes(5, 1)

    draw_scenes(tmp_path, n=400)
    data = load_scenes(tmp_path)
    words = CaptionTable(data)
    seen = data["objects"].unique().tolist()
    assert (
        len(words.texts)
        == len(seen) * sum(map(len, captions.TEMPLATES.values())) * (len(world.BACKGROUNDS) + 1) + 1
    )
    assert words.texts[words.blank] == ""
    pick = torch.arange(400)
    rows, places = words.sample(pick, torch.Generator().manual_seed(0))
    for i, row, place in zip(pick.tolist(), rows.tolist(), places.tolist(), strict=True):
        text = words.texts[row]
        assert OBJECTS[data["objects"][i]] in text
        assert place in (-1, int(data["places"][i]))
        assert (list(world.BACKGROUNDS)[place] in text) == (place >= 0)
        kind, template, o, _ = next(k for k, v in words.rows.items() if v == row)
        attribute = int(data["attributes"][i])
        assert kind.removesuffix("-innocent") == (
            world.ATTRIBUTES[attribute] if attribute >= 0 else "benign"
        )
        assert not captions.is_held_out(template, OBJECTS[o])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "wrold"], "no stage named 'wrold'. Known: world, clip"),
        (["--tiny"], "--tiny would replace the shipped files"),
    ],
)
def test_invalid_options_are_refused_before_any_work(tmp_path, arguments, message):
    result = run("--work", tmp_path / "work", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "work").exists()


def test_a_stage_with_missing_input_ends_in_one_line_and_keeps_the_shipped_files(tmp_path):
    shipped = tmp_path / "home" / "weights" / "model"
    shipped.parent.mkdir(parents=True)
    shipped.write_text("unchanged")
    (tmp_path / "file").write_text("")
    for work, stage in (("work", "vae"), ("work", "pack"), ("file", "world")):
        result = run("--work", tmp_path / work, "--output", tmp_path / "home", "--stages", stage)
        assert result.exit_code == 1
        assert result.output.startswith("Error: ")
        assert "Traceback" not in result.output
        assert [p.name for p in (tmp_path / "home").rglob("*") if p.is_file()] == ["model"]
    assert shipped.read_text() == "unchanged"
