"""`safegen patch` and `safegen export` as a user meets them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from safegen.edit.uce import UCE
from safegen.models import Patch, load, select


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The miniature model's text edit, and a change of one self-attention weight of it."""
    folder, model = tmp_path_factory.mktemp("patches"), load("mini")
    UCE(erase=("skulls",)).apply(model).save(folder / "text.safetensors")
    name = select(model.denoiser, "attn1")[0]
    value = model.denoiser.get_parameter(name).detach() * 2
    Patch({name: value}, {"base": model.hash}).save(folder / "look.safetensors")
    return folder


def test_info_says_what_changes_and_where_it_comes_from(safegen, files):
    code, out, _ = safegen("patch", "info", files / "text.safetensors")
    assert code == 0
    assert "method: uce" in out
    assert "of attn2" in out
    code, out, _ = safegen("patch", "info", files / "text.safetensors", "--json")
    assert json.loads(out)["provenance"]["settings"]["erase"] == ["skulls"]


def test_diff_tells_by_its_exit_code(safegen, files):
    assert safegen("patch", "diff", files / "text.safetensors", files / "text.safetensors")[0] == 0
    code, out, _ = safegen("patch", "diff", files / "text.safetensors", files / "look.safetensors")
    assert code == 1
    assert "in both: 0" in out


def test_merge_and_export_go_together(safegen, files, tmp_path):
    both, out = tmp_path / "both.safetensors", tmp_path / "model.safetensors"
    code, text, err = safegen("patch", "merge", files / "text.safetensors", files / "look.safetensors", "--out", both)
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
    code, _, err = safegen("generate", out, "--prompt", "a castle", "--steps", "1", "--out", tmp_path / "pictures")
    assert code == 0, err


def test_every_file_comes_with_its_card_unless_told(safegen, files, tmp_path):
    out, bare = tmp_path / "m.safetensors", tmp_path / "bare.safetensors"
    assert safegen("export", "mini", "--patch", files / "text.safetensors", "--out", out)[0] == 0
    text = (tmp_path / "m.safetensors.md").read_text()
    for words in ("Erased words: `skulls`", "fp16", "Not measured", load("mini").hash, Patch.load(files / "text.safetensors").hash):
        assert words in text, words
    assert str(files) not in text
    assert safegen("export", "mini", "--no-card", "--out", bare)[0] == 0
    assert not (tmp_path / "bare.safetensors.md").exists()
    assert safegen("apply", files / "text.safetensors", "mini", "--out", tmp_path / "folder")[0] == 0
    assert "Erased words" in (tmp_path / "folder" / "README.md").read_text()
    lora = tmp_path / "l.safetensors"
    assert safegen("patch", "extract-lora", files / "text.safetensors", "mini", "--out", lora)[0] == 0
    assert "do not hold for a LoRA" in (tmp_path / "l.safetensors.md").read_text()


def test_a_patchs_card_is_written_anew(safegen, files, tmp_path):
    code, out, err = safegen("patch", "card", files / "text.safetensors", "--out", tmp_path / "card.md")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "card.md")
    assert "Not measured" in (tmp_path / "card.md").read_text()


def test_patches_that_undo_each_other_are_said_in_one_line(safegen, files, tmp_path):
    two = ("--patch", files / "text.safetensors", "--patch", files / "text.safetensors")
    code, _, err = safegen("export", "mini", *two, "--out", tmp_path / "model.safetensors")
    assert code == 0, err
    assert [line for line in err.splitlines() if "weights are changed by more than one patch" in line and line.startswith("warning: ")]


def test_a_lora_comes_with_what_it_holds(safegen, files, tmp_path):
    out = tmp_path / "lora.safetensors"
    code, text, err = safegen("patch", "extract-lora", files / "text.safetensors", "mini", "--rank", "4", "--out", out)
    assert code == 0, err
    assert "% of the change" in text
    assert all(key.startswith("lora_unet_") for key in load_file(out))
    code, _, _ = safegen(
        "patch", "extract-lora", files / "text.safetensors", "mini", "--keys", "diffusers", "--out", tmp_path / "d.safetensors"
    )
    assert code == 0
    assert all(key.startswith("unet.") for key in load_file(tmp_path / "d.safetensors"))


def test_a_safety_lora_and_a_users_lora_act_side_by_side(safegen, files, tmp_path):
    """Modular: each is trained against the base, and the merged patch is W + safe + user (arXiv:2412.00357)."""
    for name in ("text", "look"):
        lora = tmp_path / f"{name}-lora.safetensors"
        assert safegen("patch", "extract-lora", files / f"{name}.safetensors", "mini", "--rank", "8", "--out", lora)[0] == 0
        code, _, err = safegen("patch", "from-lora", lora, "mini", "--out", tmp_path / f"{name}.safetensors")
        assert code == 0, err
    parts, both = [tmp_path / "text.safetensors", tmp_path / "look.safetensors"], tmp_path / "both.safetensors"
    code, _, err = safegen("patch", "merge", *parts, "--overlap", "add", "--model", "mini", "--out", both)
    assert code == 0, err
    merged, text, look = (Patch.load(path) for path in (both, *parts))
    assert merged.tensors.keys() == text.tensors.keys() | look.tensors.keys()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["patch", "from-lora", "TEXT", "mini", "--out", "OUT.safetensors"], "is not a LoRA of a denoiser"),
        (["patch", "info", "no.safetensors"], "'no.safetensors' does not exist"),
        (["patch", "merge", "TEXT", "--out", "OUT.safetensors"], "at least two patches, got 1"),
        (["patch", "merge", "TEXT", "TEXT", "--out", "OUT.safetensors"], "changed by more than one patch"),
        (["patch", "merge", "TEXT", "LOOK", "--overlap", "sum", "--out", "OUT.safetensors"], "overlap must be refuse, add or last"),
        (["patch", "merge", "TEXT", "LOOK", "--model", "mini", "--out", "OUT.safetensors"], "model has no effect without --overlap add"),
        (["patch", "extract-lora", "TEXT", "mini", "--keys", "a1111", "--out", "OUT.safetensors"], "keys must be kohya or diffusers"),
        (["patch", "extract-lora", "TEXT", "minni", "--out", "OUT.safetensors"], "Did you mean 'mini'"),
        (["patch", "merge", "TEXT", "LOOK", "--config", ".", "--out", "OUT.safetensors"], "config has no effect without --model"),
        (["export", "mini", "--out", "OUT.ckpt"], "must end in .safetensors"),
        (["export", "mini", "--dtype", "int8", "--out", "OUT.safetensors"], "dtype must be one of"),
        (["export", "mini", "--metrics", ".", "--no-card", "--out", "OUT.safetensors"], "metrics have no effect with --no-card"),
        (["export", "mini", "--metrics", ".", "--out", "OUT.safetensors"], "has no figures: neither a demo's summary.json"),
        (["export", "mini", "--config", ".", "--out", "OUT.safetensors"], "config has no effect on 'mini'"),
    ],
)
def test_a_users_mistake_is_one_line_and_leaves_nothing(safegen, files, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    words = [str(files / {"TEXT": "text.safetensors", "LOOK": "look.safetensors"}[w]) if w in ("TEXT", "LOOK") else w for w in words]
    code, _, err = safegen(*words)
    assert code == 2
    assert says in err
    assert len([line for line in err.strip().splitlines() if line.startswith("safegen: ")]) == 1
    assert list(tmp_path.iterdir()) == []
