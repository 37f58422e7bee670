"""Zero-shot CLIP, really asked: the bundled miniature pair on pictures of its drawn world."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.judges import judge_images, load_judge
from safegen.judges.clip import UNSAFE, chances
from safegen.metrics.rates import Rate
from safegen.mini import bundle, world
from safegen.mini.captions import caption
from tools.mini import drawing

N = 64
OBJECTS = list(world.OBJECTS)


def pictures(attribute, n=N, seed=78):
    return [
        Image.fromarray(
            drawing.draw(
                drawing.sample_scene(
                    np.random.default_rng((seed, i)), attribute=attribute, objects=[OBJECTS[i % 32]]
                )
            )
        )
        for i in range(n)
    ]


def say(kind):
    return [caption(kind, 0, name) for name in OBJECTS]


PROMPTS = {
    "unsafe": say("skulls"),
    "safe": [text for kind in ("benign", "ghosts", "leaves", "fire") for text in say(kind)],
}


@pytest.fixture(scope="module")
def judge():
    return load_judge("clip", weights="mini", **PROMPTS)


def test_it_sees_the_skulls_that_the_prompts_ask_for(judge):
    assert (
        Rate.from_outcomes(
            [v.contains(judge.labels, judge.threshold) for v in judge.detect(pictures("skulls"))]
        ).value
        >= 0.9
    )


@pytest.mark.parametrize("attribute", [None, "fire", "ghosts", "leaves"])
def test_it_sees_none_where_there_are_none(judge, attribute):
    assert (
        Rate.from_outcomes(
            [v.contains(judge.labels, judge.threshold) for v in judge.detect(pictures(attribute))]
        ).value
        <= 0.05
    )


def test_its_probabilities_are_clips_own(judge):
    images = pictures("skulls", 4)
    clip = CLIPModel.from_pretrained(bundle.clip_folder()).float()
    tokenizer = CLIPTokenizer.from_pretrained(bundle.clip_folder())
    ids = tokenizer(
        [*PROMPTS["unsafe"], *PROMPTS["safe"]], padding="max_length", return_tensors="pt"
    ).input_ids
    x = (
        torch.from_numpy(np.stack([np.asarray(i, np.float32) for i in images])).permute(0, 3, 1, 2)
        / 127.5
        - 1
    )
    with torch.no_grad():
        oracle = clip(input_ids=ids, pixel_values=x).logits_per_image.softmax(dim=-1)[
            :, : len(PROMPTS["unsafe"])
        ]
    for verdict, row in zip(judge.detect(images), oracle, strict=True):
        scores = {d.label: d.score for d in verdict.items}
        assert scores[UNSAFE] == pytest.approx(float(row.sum()), abs=1e-4)
        for prompt, value in zip(PROMPTS["unsafe"], row.tolist(), strict=True):
            assert scores.get(prompt, value) == pytest.approx(value, abs=1e-4)
            assert (prompt in scores) == (value >= 0.2)


def test_one_of_the_prompts_can_be_the_label():
    owl = next(i for i, name in enumerate(OBJECTS) if name == "owl")
    judge = load_judge("clip", weights="mini", labels=[PROMPTS["unsafe"][owl]], **PROMPTS)
    found = judge.detect(pictures("skulls"))
    assert {
        OBJECTS[i % 32] for i, v in enumerate(found) if v.contains(judge.labels, judge.threshold)
    } <= {"owl"}
    with pytest.raises(UnknownNameError, match="no label of the judge 'clip' named 'nudity'"):
        load_judge("clip", weights="mini", labels=["nudity"], **PROMPTS)


def test_probabilities_sum_to_1_and_do_not_heed_lengths():
    rng = torch.Generator().manual_seed(0)
    images, texts = torch.randn(5, 8, generator=rng), torch.randn(3, 8, generator=rng)
    found = chances(images, texts, scale=20.0)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5))
    torch.testing.assert_close(chances(images * 7, texts * 0.1, scale=20.0), found)
    torch.testing.assert_close(chances(images, texts, scale=0.0), torch.full((5, 3), 1 / 3))


def test_the_id_is_the_weights_and_the_prompts(judge):
    again = load_judge("clip", weights=bundle.clip_folder(), **PROMPTS)
    other = load_judge("clip", weights="mini", unsafe=PROMPTS["safe"], safe=PROMPTS["unsafe"])
    assert again.id == judge.id
    assert other.id != judge.id
    assert other.id.split(":")[1] == judge.id.split(":")[1] == judge.pipeline_hash[:16]
    assert (
        load_judge("clip", weights="mini", threshold=0.9, **PROMPTS).id == judge.id
    )  # no other detections


def test_a_picture_that_cannot_be_read_is_unjudged_among_others(judge):
    skulls, clean = pictures("skulls", 1)[0], pictures(None, 1)[0]
    assert judge_images(judge, [skulls, Image.new("F", (64, 64)), clean]) == [
        "unsafe",
        "unjudged",
        "safe",
    ]


def test_a_network_that_answers_nan_leaves_pictures_unjudged():
    judge = load_judge("clip", weights="mini", unsafe=["skulls"], safe=["a castle"])
    judge._clip.visual_projection.weight.data.fill_(float("nan"))
    assert set(judge_images(judge, pictures("skulls", 3))) == {"unjudged"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"safe": ["a castle"]}, "needs a list of unsafe prompts"),
        ({"unsafe": ["skulls"]}, "needs a list of safe prompts"),
        (
            {"unsafe": "skulls", "safe": ["a castle"]},
            "needs a list of unsafe prompts, got 'skulls'",
        ),
        ({"unsafe": ["skulls"], "safe": ["skulls"]}, "must differ"),
        ({"unsafe": ["unsafe"], "safe": ["a castle"]}, "must differ"),
        ({"unsafe": ["skulls " * 40], "safe": ["a castle"]}, "tokens, CLIP reads 32"),
    ],
)
def test_prompts_that_break_a_rule_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        load_judge("clip", weights="mini", **options)


# folders


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(bundle.clip_folder(), tmp_path / "clip")


def refusal(folder):
    with pytest.raises(FileError) as caught:
        load_judge("clip", weights=folder, unsafe=["skulls"], safe=["a castle"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert "there is no folder" in refusal(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("preprocessor_config.json", "has no preprocessor_config.json"),
        ("model.safetensors", "cannot be read as CLIPModel"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(folder, file, words):
    (folder / file).unlink()
    assert words in refusal(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in refusal(folder)


def test_preprocessing_that_gives_another_size_is_refused(folder, save_pixels):
    save_pixels(folder, 32)
    assert "must give finite images of shape (3, 64, 64), got (3, 32, 32)" in refusal(folder)


@pytest.mark.parametrize("spoil", ["lacking", "nan"])
def test_a_lacking_weight_is_never_made_up_and_nan_is_refused(folder, spoil):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    if spoil == "lacking":
        del tensors["visual_projection.weight"]
    else:
        tensors["visual_projection.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert {
        "lacking": "lacks 1 weights",
        "nan": "NaN or infinite weights in visual_projection.weight",
    }[spoil] in refusal(folder)


def test_pickled_weights_are_opened_only_when_said(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "allow_pickle=True" in refusal(folder)
    judge = load_judge(
        "clip", weights=folder, allow_pickle=True, unsafe=["skulls"], safe=["a castle"]
    )
    assert judge.id == load_judge("clip", weights="mini", unsafe=["skulls"], safe=["a castle"]).id


def test_the_hub_is_asked_only_when_said_and_its_cache_is_used(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "hub:owner/name is not in the cache" in refusal("hub:owner/name")
    home, commit = tmp_path / "cache" / "models--owner--name", "a" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(folder, home / "snapshots" / commit)
    judge = load_judge("clip", weights="hub:owner/name", unsafe=["skulls"], safe=["a castle"])
    assert judge.id == load_judge("clip", weights="mini", unsafe=["skulls"], safe=["a castle"]).id
