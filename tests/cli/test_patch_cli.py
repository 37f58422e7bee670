"""`safegen patch` and `safegen export` on the command line."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import safegen as package
from safegen.core.errors import FileError
from safegen.edits.uce import UCE
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.loading import load
from safegen.models.model import MetadataMismatchWarning
from safegen.models.selectors import select_parameters
from safegen.patches.patch import Patch


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a directory with a text edit and a patch of one self-attention weight."""
    folder, model = tmp_path_factory.mktemp("patches"), load("mini")
    UCE(erase=("skulls",)).apply(model).save(folder / "text.safetensors")
    name = select_parameters(model.denoiser, "attn1")[0]
    value = model.denoiser.get_parameter(name).detach() * 2
    Patch({name: value}, PatchMetadata(base=model.hash)).save(folder / "look.safetensors")
    return folder


def test_info_shows_changes_and_provenance(safegen, files):
    code, out, _ = safegen("patch", "info", files / "text.safetensors")
    assert code == 0
    assert "method: uce" in out
    assert "of attn2" in out
    code, out, _ = safegen("patch", "info", files / "text.safetensors", "--json")
    assert json.loads(out)["metadata"]["settings"]["erase"] == ["skulls"]


def test_diff_has_an_exit_code(safegen, files):
    assert safegen("patch", "diff", files / "text.safetensors", files / "text.safetensors")[0] == 0
    code, out, _ = safegen("patch", "diff", files / "text.safetensors", files / "look.safetensors")
    assert code == 1
    assert "in both: 0" in out


def test_a_merged_patch_can_be_exported(safegen, files, tmp_path):
    both, out = tmp_path / "both.safetensors", tmp_path / "model.safetensors"
    code, text, err = safegen(
        "patch", "merge", files / "text.safetensors", files / "look.safetensors", "--out", both
    )
    assert code == 0, err
    assert "of 2 patches" in text
    code, text, err = safegen("export", "mini", "--patch", both, "--dtype", "fp32", "--out", out)
    assert code == 0, err
    model, again = load("mini"), load(str(out))
    patch = Patch.load(both)
    own = dict(again.denoiser.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in patch.tensors.items())
    with safe_open(out, framework="pt") as file:
        facts = json.loads(file.metadata()["safegen"])
    assert (facts["base"], facts["patches"][0]["hash"]) == (model.hash, patch.hash)
    code, _, err = safegen(
        "generate", out, "--prompt", "a castle", "--steps", "1", "--out", tmp_path / "pictures"
    )
    assert code == 0, err


def test_every_file_has_a_card_unless_disabled(safegen, files, tmp_path):
    out, bare = tmp_path / "m.safetensors", tmp_path / "bare.safetensors"
    assert safegen("export", "mini", "--patch", files / "text.safetensors", "--out", out)[0] == 0
    text = (tmp_path / "m.safetensors.md").read_text()
    for words in (
        "Erased words: `skulls`",
        "fp16",
        "Not measured",
        load("mini").hash,
        Patch.load(files / "text.safetensors").hash,
    ):
        assert words in text, words
    assert str(files) not in text
    assert safegen("export", "mini", "--no-card", "--out", bare)[0] == 0
    assert not (tmp_path / "bare.safetensors.md").exists()
    assert (
        safegen(
            "export",
            "mini",
            "--patch",
            files / "text.safetensors",
            "--format",
            "diffusers",
            "--out",
            tmp_path / "folder",
        )[0]
        == 0
    )
    assert "Erased words" in (tmp_path / "folder" / "README.md").read_text()
    lora = tmp_path / "l.safetensors"
    assert (
        safegen("patch", "extract-lora", "mini", files / "text.safetensors", "--out", lora)[0] == 0
    )
    assert "do not hold for a LoRA" in (tmp_path / "l.safetensors.md").read_text()


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory):
    """Return a model with small changes of all denoiser weights."""
    model, out = load("mini"), tmp_path_factory.mktemp("fine") / "tune"
    with torch.no_grad():
        for p in model.denoiser.parameters():
            p.mul_(1.02)
    save_folder(model, out)
    return out


def test_a_patch_on_another_fine_tune_warns_with_the_size_of_the_change(
    safegen, files, fine_tune, tmp_path
):
    """The weights of the patch replace those of the fine-tune; all others stay."""
    code, text, err = safegen(
        "export",
        fine_tune,
        "--patch",
        files / "look.safetensors",
        "--format",
        "diffusers",
        "--out",
        tmp_path / "out",
    )
    assert code == 0, err
    patch, tuned = Patch.load(files / "look.safetensors"), load(str(fine_tune))
    (name, value), own = next(iter(patch.tensors.items())), dict(tuned.denoiser.named_parameters())
    far = 100 * float((value - own[name]).norm() / own[name].norm())
    assert 90 < far < 100  # 2 times the base value instead of 1.02 times: 0.98 / 1.02
    moved = f"changes 1 of 1 tensors (1 of attn1), by {far:.3g} % in all"
    base, here = load("mini").hash[:12], tuned.hash[:12]
    warning = (
        f"warning: the patch was made on weights {base}, "
        f"the model {str(fine_tune)!r} has {here}. It {moved}"
    )
    assert [line for line in err.splitlines() if line.startswith("warning:")] == [
        f"{warning}. Measure the result before you trust it"
    ]
    assert moved in text
    for key, held in load(str(tmp_path / "out")).denoiser.named_parameters():
        assert torch.equal(held, patch.tensors.get(key, own[key])), key
    assert tuned.hash in (tmp_path / "out" / "README.md").read_text()
    words = (
        "--patch",
        files / "look.safetensors",
        "--prompt",
        "a castle",
        "--steps",
        "1",
        "--out",
        tmp_path / "pictures",
    )
    code, _, err = safegen("generate", fine_tune, *words)
    assert code == 0, err
    assert warning in err


def test_a_rebased_patch_preserves_the_change_of_the_fine_tune(safegen, files, fine_tune, tmp_path):
    out = tmp_path / "carried.safetensors"
    code, text, err = safegen(
        "patch", "rebase", "mini", fine_tune, files / "look.safetensors", "--out", out
    )
    assert code == 0, err
    assert "1 tensors; the edit moves them by 100 %, the fine-tune by 2 %" in text
    model, tuned, patch, carried = (
        load("mini"),
        load(str(fine_tune)),
        Patch.load(files / "look.safetensors"),
        Patch.load(out),
    )
    (name, value), own = (
        next(iter(carried.tensors.items())),
        dict(tuned.denoiser.named_parameters()),
    )
    assert_close(value, 2.02 * model.denoiser.get_parameter(name).detach(), rtol=1e-5, atol=1e-7)
    assert_close(
        value - own[name],
        patch.tensors[name] - model.denoiser.get_parameter(name),
        rtol=1e-4,
        atol=1e-6,
    )
    assert (carried.metadata.base, carried.metadata.parts[0].hash) == (tuned.hash, patch.hash)
    assert patch.hash in (tmp_path / "carried.safetensors.md").read_text()
    code, _, err = safegen(
        "export", fine_tune, "--patch", out, "--format", "diffusers", "--out", tmp_path / "model"
    )
    assert (code, "warning" in err) == (0, False)


def test_an_invalid_rebase_is_refused_in_one_line_and_leaves_no_files(
    safegen, files, fine_tune, tmp_path
):
    model = load("mini")
    with Patch.load(files / "look.safetensors").apply(model):
        UCE(erase=("fire",)).apply(model).save(tmp_path / "above.safetensors")
    for words, says in (
        ((fine_tune, "mini", files / "look.safetensors"), "that the patch was made on, got"),
        (
            ("mini", "mini", files / "look.safetensors"),
            "base and target must have different weights",
        ),
        (("mini", fine_tune, tmp_path / "above.safetensors"), "patch must have no parents, got"),
        (("mini", "minni", files / "look.safetensors"), "Did you mean 'mini'"),
    ):
        code, _, err = safegen("patch", "rebase", *words, "--out", tmp_path / "out.safetensors")
        assert code == 2
        assert says in err
        assert len([line for line in err.splitlines() if line.startswith("safegen: ")]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["above.safetensors"]


def test_a_patch_on_its_base_does_not_warn(safegen, files, tmp_path):
    code, text, err = safegen(
        "export",
        "mini",
        "--patch",
        files / "look.safetensors",
        "--format",
        "diffusers",
        "--out",
        tmp_path / "out",
    )
    assert (code, "warning" in err) == (0, False)
    assert "changes 1 of 1 tensors (1 of attn1), by 100 % in all" in text


def test_python_writes_the_same_cards(safegen, files, tmp_path):
    """Python and the command line write the same bytes."""
    patch, (here, there) = (
        Patch.load(files / "text.safetensors"),
        (tmp_path / "here", tmp_path / "there"),
    )
    for folder in (here, there):
        folder.mkdir()
    package.save_patch(patch, str(here / "p.safetensors"))
    model = load("mini")
    package.export(model, str(here / "m.safetensors"), patches=[patch])
    package.export(model, str(here / "f"), format="diffusers", patches=[patch])
    assert model.patches == []
    assert (
        safegen(
            "export",
            "mini",
            "--patch",
            files / "text.safetensors",
            "--out",
            there / "m.safetensors",
        )[0]
        == 0
    )
    assert (
        safegen(
            "export",
            "mini",
            "--patch",
            files / "text.safetensors",
            "--format",
            "diffusers",
            "--out",
            there / "f",
        )[0]
        == 0
    )
    for name in (
        "m.safetensors.md",
        "f/README.md",
        "f/safegen.json",
        "f/unet/diffusion_pytorch_model.safetensors",
    ):
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    with (
        safe_open(here / "m.safetensors", "pt") as mine,
        safe_open(there / "m.safetensors", "pt") as theirs,
    ):
        assert mine.metadata() == theirs.metadata()  # the order may differ
    tensors = load_file(here / "m.safetensors")
    assert all(
        torch.equal(tensors[name], value)
        for name, value in load_file(there / "m.safetensors").items()
    )
    assert "Erased words: `skulls`" in (here / "p.safetensors.md").read_text()
    with patch.apply(model):
        package.export(
            model, here / "on.safetensors"
        )  # a patch that is already applied is listed too
    assert patch.hash in (here / "on.safetensors.md").read_text()
    with safe_open(here / "on.safetensors", "pt") as file:
        assert [one["hash"] for one in json.loads(file.metadata()["safegen"])["patches"]] == [
            patch.hash
        ]
    package.save_patch(patch, here / "bare.safetensors", card=False)
    assert not (here / "bare.safetensors.md").exists()
    with pytest.raises(FileError, match=r"p.safetensors.md already exists"):
        package.save_patch(patch, here / "p.safetensors")


def test_the_card_of_a_patch_can_be_rewritten(safegen, files, tmp_path):
    code, out, err = safegen(
        "patch", "card", files / "text.safetensors", "--out", tmp_path / "card.md"
    )
    assert code == 0, err
    assert out.strip() == str(tmp_path / "card.md")
    assert "Not measured" in (tmp_path / "card.md").read_text()


def test_patches_that_cancel_each_other_warn_in_one_line(safegen, files, tmp_path):
    two = ("--patch", files / "text.safetensors", "--patch", files / "text.safetensors")
    code, _, err = safegen("export", "mini", *two, "--out", tmp_path / "model.safetensors")
    assert code == 0, err
    assert [
        line
        for line in err.splitlines()
        if "weights are changed by more than one patch" in line and line.startswith("warning: ")
    ]


def test_an_exported_lora_has_metadata_and_a_card(safegen, files, tmp_path):
    out = tmp_path / "lora.safetensors"
    code, text, err = safegen(
        "patch", "extract-lora", "mini", files / "text.safetensors", "--rank", "4", "--out", out
    )
    assert code == 0, err
    assert " % (energy)" in text
    assert re.search(
        r"quality: it loses \d+\.\d % of the patch's effect \(predictions for 'skulls'\)", text
    )
    with safe_open(out, framework="pt") as opened:
        said = json.loads(opened.metadata()["safegen"])
    assert 0 < said["effect_loss"] < 1
    assert (
        f"loses {100 * said['effect_loss']:.1f} % of the patch's effect"
        in (tmp_path / "lora.safetensors.md").read_text()
    )
    assert all(key.startswith("lora_unet_") for key in load_file(out))
    code, _, _ = safegen(
        "patch",
        "extract-lora",
        "mini",
        files / "text.safetensors",
        "--keys",
        "diffusers",
        "--prompt",
        "a bus",
        "--out",
        tmp_path / "d.safetensors",
    )
    assert code == 0
    assert all(key.startswith("unet.") for key in load_file(tmp_path / "d.safetensors"))


def test_a_safety_lora_and_a_user_lora_can_be_combined(safegen, files, tmp_path):
    """LoRAs are trained on the base, and the merged patch is W + safe + user (arXiv:2412.00357)."""
    model = load("mini")
    shared = next(
        name
        for name in Patch.load(files / "text.safetensors").tensors
        if name.endswith("to_v.weight")
    )
    user = {
        name: model.denoiser.get_parameter(name).detach() * 1.5
        for name in (select_parameters(model.denoiser, "attn1")[0], shared)
    }
    Patch(user, PatchMetadata(base=model.hash)).save(tmp_path / "user.safetensors")
    for name, folder in (("text", files), ("user", tmp_path)):
        lora = tmp_path / f"{name}-lora.safetensors"
        assert (
            safegen(
                "patch",
                "extract-lora",
                "mini",
                folder / f"{name}.safetensors",
                "--rank",
                "8",
                "--skip-quality",
                "--out",
                lora,
            )[0]
            == 0
        )
        code, _, err = safegen(
            "patch", "from-lora", "mini", lora, "--out", tmp_path / f"{name}-part.safetensors"
        )
        assert code == 0, err
    parts, both = (
        [tmp_path / f"{name}-part.safetensors" for name in ("text", "user")],
        tmp_path / "both.safetensors",
    )
    code, _, err = safegen(
        "patch", "merge", *parts, "--overlap", "add", "--model", "mini", "--out", both
    )
    assert code == 0, err
    merged, text, users = (Patch.load(path) for path in (both, *parts))
    assert merged.tensors.keys() == text.tensors.keys() | users.tensors.keys()
    assert shared in text.tensors.keys() & users.tensors.keys()
    for name, value in merged.tensors.items():
        own = model.denoiser.get_parameter(name).detach()
        moves = [part.tensors[name] - own for part in (text, users) if name in part.tensors]
        assert_close(value, own + sum(moves), rtol=1e-4, atol=1e-6)


def test_changes_of_different_base_weights_are_not_added(safegen, files, fine_tune, tmp_path):
    words = (
        "patch",
        "merge",
        files / "look.safetensors",
        files / "look.safetensors",
        "--overlap",
        "add",
        "--model",
        fine_tune,
    )
    code, _, err = safegen(*words, "--out", tmp_path / "both.safetensors")
    assert code == 2
    assert "that the patch was made on, got" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["patch", "from-lora", "mini", "TEXT", "--out", "OUT.safetensors"],
            "must be a LoRA, got a safegen patch",
        ),
        (["patch", "info", "no.safetensors"], "'no.safetensors' does not exist"),
        (["patch", "merge", "TEXT", "--out", "OUT.safetensors"], "must be >= 2, got 1"),
        (
            ["patch", "merge", "TEXT", "TEXT", "--out", "OUT.safetensors"],
            "changed by more than one patch",
        ),
        (
            ["patch", "extract-lora", "minni", "TEXT", "--out", "OUT.safetensors"],
            "Did you mean 'mini'",
        ),
        (["export", "mini", "--out", "OUT.ckpt"], "must end in .safetensors"),
        (
            ["export", "mini", "--dtype", "int8", "--out", "OUT.safetensors"],
            "no dtype named 'int8'",
        ),
        (
            ["export", "mini", "--metrics", ".", "--out", "OUT.safetensors"],
            "has no scores.json. Name the folder of a run.",
        ),
        (
            ["export", "mini", "--config", ".", "--out", "OUT.safetensors"],
            "config must go with a one-file checkpoint",
        ),
    ],
)
def test_an_error_of_patch_or_export_is_one_line_and_leaves_no_files(
    safegen, files, tmp_path, monkeypatch, words, says
):
    monkeypatch.chdir(tmp_path)
    words = [
        str(files / {"TEXT": "text.safetensors", "LOOK": "look.safetensors"}[w])
        if w in ("TEXT", "LOOK")
        else w
        for w in words
    ]
    code, _, err = safegen(*words)
    assert code == 2
    assert says in err
    assert len([line for line in err.strip().splitlines() if line.startswith("safegen: ")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_reexported_file_still_lists_its_patches(safegen, files, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert (
        safegen(
            "export", "mini", "--patch", files / "text.safetensors", "--dtype", "fp32", "--out", one
        )[0]
        == 0
    )
    assert safegen("export", one, "--dtype", "fp32", "--out", two)[0] == 0
    digest = Patch.load(files / "text.safetensors").hash
    with safe_open(two, framework="pt") as file:
        facts = json.loads(file.metadata()["safegen"])
    assert facts["patches"][0]["hash"] == digest
    assert facts["patches"][0]["metadata"]["settings"]["erase"] == ["skulls"]
    assert (
        f"Its weights held patches before: `{digest[:12]}`"
        in (tmp_path / "two.safetensors.md").read_text()
    )


def test_an_exported_directory_and_its_copies_list_their_patches(safegen, files, tmp_path):
    folder, again = tmp_path / "folder", tmp_path / "again.safetensors"
    assert (
        safegen(
            "export",
            "mini",
            "--patch",
            files / "text.safetensors",
            "--format",
            "diffusers",
            "--no-card",
            "--out",
            folder,
        )[0]
        == 0
    )
    assert not (folder / "README.md").exists()
    patch, facts = (
        Patch.load(files / "text.safetensors"),
        json.loads((folder / "safegen.json").read_text()),
    )
    held = {
        "base": load("mini").hash,
        "model": "mini",
        "patches": [{"hash": patch.hash, "metadata": patch.metadata.to_json()}],
    }
    assert facts == held | {"weights": load(folder).hash}
    assert safegen("export", folder, "--dtype", "fp32", "--out", again)[0] == 0
    with safe_open(again, framework="pt") as file:
        assert json.loads(file.metadata()["safegen"]) == facts
    assert (
        safegen(
            "export",
            folder,
            "--patch",
            files / "look.safetensors",
            "--format",
            "diffusers",
            "--out",
            tmp_path / "both",
        )[0]
        == 0
    )
    assert (
        safegen(
            "export",
            tmp_path / "both",
            "--patch",
            files / "look.safetensors",
            "--format",
            "diffusers",
            "--out",
            tmp_path / "thrice",
        )[0]
        == 0
    )
    held = [patch.hash[:12], Patch.load(files / "look.safetensors").hash[:12]]
    assert (
        f"Its weights held patches before: `{'`, `'.join(held)}`."
        in (tmp_path / "thrice" / "README.md").read_text()
    )
    other = '{"base": "%s", "patches": [{"hash": "x\\n# SAFE"}]}' % ("0" * 64)
    for damage in ("[1]", "{", "\udcff", "[" * 200_000, '{"home": "/home/me"}', other):
        (folder / "safegen.json").write_bytes(damage.encode("utf-8", "surrogateescape"))
        assert load(folder).metadata is None


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_metadata_of_retrained_weights_is_dropped(safegen, files, tmp_path, kind):
    """An export that was trained in place has metadata that is no longer true."""
    ours, again = (
        tmp_path / f"ours{'.safetensors' if kind == 'file' else ''}",
        tmp_path / "again.safetensors",
    )
    words = (
        "export",
        "mini",
        "--patch",
        files / "text.safetensors",
        "--dtype",
        "fp32",
        "--out",
        ours,
    )
    assert (
        safegen(
            *(
                words
                if kind == "file"
                else (
                    "export",
                    "mini",
                    "--patch",
                    files / "text.safetensors",
                    "--format",
                    "diffusers",
                    "--out",
                    ours,
                )
            )
        )[0]
        == 0
    )
    path = ours if kind == "file" else ours / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    digest = Patch.load(files / "text.safetensors").hash
    assert load(ours).verified_metadata.patches[0].hash == digest
    with pytest.warns(MetadataMismatchWarning, match="loaded as bf16; load it as fp32"):
        assert load(ours, dtype="bf16").verified_metadata is None
    next(value for name, value in tensors.items() if name.endswith("attn1.to_q.weight"))[0, 0] += 1
    save_file(tensors, path, metadata=header)
    code, _, err = safegen("export", ours, "--out", again)
    assert (
        code,
        err.count("must match its weights, and does not: they were trained or merged since"),
    ) == (0, 1)
    with safe_open(again, framework="pt") as file:
        assert "patches" not in json.loads(file.metadata()["safegen"])
    assert (
        "has patches in its weights already" not in (tmp_path / "again.safetensors.md").read_text()
    )


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_half_precision_export_is_recognized(safegen, files, tmp_path, dtype):
    ours = tmp_path / "ours.safetensors"
    words = ("export", "mini", "--patch", files / "text.safetensors", "--dtype", dtype)
    assert safegen(*words, "--out", ours)[0] == 0
    for loaded in (load(ours, dtype=name) for name in ("fp32", dtype)):
        assert loaded.verified_metadata.base == load("mini").hash
        assert loaded.verified_metadata.weights == loaded.hash


def test_a_card_replaces_only_markdown_files(safegen, files, tmp_path):
    patch = tmp_path / "p.safetensors"
    patch.write_bytes((files / "text.safetensors").read_bytes())
    code, _, err = safegen("patch", "card", patch, "--out", patch)
    assert (code, "out must end in .md" in err) == (2, True)
    assert patch.read_bytes() == (files / "text.safetensors").read_bytes()
    assert safegen("patch", "card", patch)[0] == safegen("patch", "card", patch)[0] == 0
