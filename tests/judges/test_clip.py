"""Zero-shot CLIP judge: the bundled miniature CLIP on images of the miniature world."""

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
from safegen.judges.base import DifferentiableJudge
from safegen.judges.clip import UNSAFE, text_probabilities
from safegen.metrics.rates import Rate
from safegen.mini import bundle, world
from safegen.mini.captions import caption
from tools.mini import drawing

N = 64
OBJECTS = list(world.OBJECTS)


def scene_images(attribute, n=N, seed=78):
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


def captions(kind):
    return [caption(kind, 0, name) for name in OBJECTS]


PROMPTS = {
    "unsafe": captions("skulls"),
    "safe": [text for kind in ("benign", "ghosts", "leaves", "fire") for text in captions(kind)],
}


@pytest.fixture(scope="module")
def judge():
    return load_judge("clip", weights="mini", **PROMPTS)


def test_the_judge_detects_skulls_described_by_the_prompts(judge):
    assert (
        Rate.from_outcomes(
            [
                v.contains(judge.labels, judge.threshold)
                for v in judge.detect(scene_images("skulls"))
            ]
        ).value
        >= 0.9
    )


@pytest.mark.parametrize("attribute", [None, "fire", "ghosts", "leaves"])
def test_the_judge_detects_no_skulls_in_other_images(judge, attribute):
    assert (
        Rate.from_outcomes(
            [
                v.contains(judge.labels, judge.threshold)
                for v in judge.detect(scene_images(attribute))
            ]
        ).value
        <= 0.05
    )


def test_scores_equal_the_probabilities_of_clip(judge):
    images = scene_images("skulls", 4)
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
    for detections, row in zip(judge.detect(images), oracle, strict=True):
        scores = {d.label: d.score for d in detections.items}
        assert scores[UNSAFE] == pytest.approx(float(row.sum()), abs=1e-4)
        for prompt, value in zip(PROMPTS["unsafe"], row.tolist(), strict=True):
            assert scores.get(prompt, value) == pytest.approx(value, abs=1e-4)
            assert (prompt in scores) == (value >= 0.2)


def test_a_single_prompt_can_be_the_label():
    owl = next(i for i, name in enumerate(OBJECTS) if name == "owl")
    judge = load_judge("clip", weights="mini", labels=[PROMPTS["unsafe"][owl]], **PROMPTS)
    results = judge.detect(scene_images("skulls"))
    assert {
        OBJECTS[i % 32] for i, v in enumerate(results) if v.contains(judge.labels, judge.threshold)
    } <= {"owl"}
    with pytest.raises(UnknownNameError, match="no label of the judge 'clip' named 'nudity'"):
        load_judge("clip", weights="mini", labels=["nudity"], **PROMPTS)


@pytest.mark.parametrize(("side", "labels"), [(64, []), (64, [0, 1]), (160, [])])
def test_the_score_of_pixels_is_that_of_images_and_has_a_gradient(side, labels, to_pixels):
    labels = [PROMPTS["unsafe"][i] for i in labels]
    judge = load_judge("clip", weights="mini", labels=labels, **PROMPTS)
    images = [*scene_images("skulls", 6), *scene_images(None, 6)]
    images = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
    pixels = to_pixels(images)
    scores = judge.score(pixels)
    sums = [sum(d.score for d in x.items if d.label in judge.labels) for x in judge.detect(images)]
    floor = 0.2 * len(judge.labels)  # detect leaves out lower scores
    for score, total in zip(scores.tolist(), sums, strict=True):
        assert total - 0.02 < score < total + (0.02 if total > floor else floor)
    assert isinstance(judge, DifferentiableJudge)
    scores.sum().backward()
    assert float(pixels.grad.abs().max()) > 1e-6


def test_probabilities_sum_to_1_and_ignore_embedding_norms():
    rng = torch.Generator().manual_seed(0)
    images, texts = torch.randn(5, 8, generator=rng), torch.randn(3, 8, generator=rng)
    probabilities = text_probabilities(images, texts, scale=20.0)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5))
    torch.testing.assert_close(
        text_probabilities(images * 7, texts * 0.1, scale=20.0), probabilities
    )
    torch.testing.assert_close(
        text_probabilities(images, texts, scale=0.0), torch.full((5, 3), 1 / 3)
    )


def test_the_id_depends_on_weights_and_prompts_only(judge):
    same = load_judge("clip", weights=bundle.clip_folder(), **PROMPTS)
    other = load_judge("clip", weights="mini", unsafe=PROMPTS["safe"], safe=PROMPTS["unsafe"])
    assert same.id == judge.id
    assert other.id != judge.id
    assert other.id.split(":")[1] == judge.id.split(":")[1] == judge.weights_hash[:16]
    assert (
        load_judge("clip", weights="mini", threshold=0.9, **PROMPTS).id == judge.id
    )  # the threshold does not change the detections


def test_an_unreadable_image_is_unjudged_and_the_others_are_judged(judge):
    skulls, clean = scene_images("skulls", 1)[0], scene_images(None, 1)[0]
    assert judge_images(judge, [skulls, Image.new("F", (64, 64)), clean]) == [
        "unsafe",
        "unjudged",
        "safe",
    ]


def test_a_network_that_returns_nan_leaves_images_unjudged():
    judge = load_judge("clip", weights="mini", unsafe=["skulls"], safe=["a castle"])
    judge._clip.visual_projection.weight.data.fill_(float("nan"))
    assert set(judge_images(judge, scene_images("skulls", 3))) == {"unjudged"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"safe": ["a castle"]}, "needs a list of unsafe prompts"),
        ({"unsafe": ["skulls"]}, "needs a list of safe prompts"),
        (
            {"unsafe": "skulls", "safe": ["a castle"]},
            "option 'unsafe' of the judge 'clip': 'str' instances are not allowed",
        ),
        ({"unsafe": ["skulls"], "safe": ["skulls"]}, "must differ"),
        ({"unsafe": ["unsafe"], "safe": ["a castle"]}, "must differ"),
        ({"unsafe": ["skulls " * 40], "safe": ["a castle"]}, "must have at most 32 tokens, got"),
    ],
)
def test_invalid_prompts_raise(options, words):
    with pytest.raises(ConfigError, match=words):
        load_judge("clip", weights="mini", **options)


# folders


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(bundle.clip_folder(), tmp_path / "clip")


def load_error(folder):
    with pytest.raises(FileError) as caught:
        load_judge("clip", weights=folder, unsafe=["skulls"], safe=["a castle"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_raises(tmp_path):
    assert "there is no folder" in load_error(tmp_path / "none")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("preprocessor_config.json", "has no preprocessor_config.json"),
        ("model.safetensors", "cannot be read as CLIPModel"),
    ],
)
def test_a_folder_without_a_required_file_raises(folder, file, words):
    (folder / file).unlink()
    assert words in load_error(folder)


def test_a_folder_without_a_tokenizer_raises(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in load_error(folder)


def test_preprocessing_to_another_size_raises(folder, save_pixels):
    save_pixels(folder, 32)
    assert "must give finite images of shape (3, 64, 64), got (3, 32, 32)" in load_error(folder)


@pytest.mark.parametrize("defect", ["missing", "nan"])
def test_a_missing_or_nan_weight_raises(folder, defect):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    if defect == "missing":
        del tensors["visual_projection.weight"]
    else:
        tensors["visual_projection.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert {
        "missing": "lacks 1 weights",
        "nan": "NaN or infinite weights in visual_projection.weight",
    }[defect] in load_error(folder)


def test_pickled_weights_need_allow_pickle(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "allow_pickle=True" in load_error(folder)
    judge = load_judge(
        "clip", weights=folder, allow_pickle=True, unsafe=["skulls"], safe=["a castle"]
    )
    assert judge.id == load_judge("clip", weights="mini", unsafe=["skulls"], safe=["a castle"]).id


def test_hub_weights_are_loaded_from_the_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "hub:owner/name is not in the cache" in load_error("hub:owner/name")
    home, commit = tmp_path / "cache" / "models--owner--name", "a" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(folder, home / "snapshots" / commit)
    judge = load_judge("clip", weights="hub:owner/name", unsafe=["skulls"], safe=["a castle"])
    assert judge.id == load_judge("clip", weights="mini", unsafe=["skulls"], safe=["a castle"]).id
