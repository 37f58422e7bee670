"""Q16 judge on the bundled miniature CLIP, and the conversion of its published pickle."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_clip import captions, scene_images

from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.features.clip import ClipPreprocessor, load_clip_network
from safegen.judges import load_judge
from safegen.judges.clip import encode_texts, text_probabilities
from safegen.judges.q16 import KEY, SCALE, convert
from safegen.metrics.rates import Rate
from safegen.mini import bundle


@pytest.fixture(scope="module")
def vectors():
    """Return vectors (2, 64) trained as in Q16 from captions, on images that no test judges."""
    from transformers.models.clip.modeling_clip import CLIPModel

    clip, pixels = (
        load_clip_network(CLIPModel, bundle.clip_folder()),
        ClipPreprocessor(bundle.clip_folder(), 64),
    )
    learned = encode_texts(
        clip, bundle.clip_folder(), [captions("benign")[0], captions("skulls")[0]]
    ).requires_grad_()
    with torch.no_grad():
        pooled = [
            clip.vision_model(
                torch.stack([pixels(i) for i in scene_images(kind, 96, seed=79)])
            ).pooler_output
            for kind in (None, "skulls")
        ]
        images = clip.visual_projection(torch.cat(pooled))
    targets, optimizer = torch.arange(2).repeat_interleave(96), torch.optim.Adam([learned], lr=0.02)
    for _ in range(100):
        loss = (
            -text_probabilities(images, learned, scale=SCALE)
            .clamp_min(1e-9)
            .log()[torch.arange(192), targets]
            .mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return learned.detach()


@pytest.fixture(scope="module")
def file(vectors, tmp_path_factory):
    path = tmp_path_factory.mktemp("q16") / "prompts.safetensors"
    save_file({KEY: vectors.half()}, path)
    return path


@pytest.fixture(scope="module")
def judge(file):
    return load_judge("q16", weights="mini", prompts=file)


def test_the_score_of_pixels_is_that_of_images_and_has_a_gradient(judge, to_pixels):
    images = [*scene_images("skulls", 6), *scene_images(None, 6)]
    pixels = to_pixels(images)
    scores = judge.score(pixels)
    for score, found in zip(scores.tolist(), judge.detect(images), strict=True):
        expected = found.items[0].score if found.items else pytest.approx(0, abs=0.2)
        assert score == (pytest.approx(expected, abs=1e-3) if found.items else expected)
    scores.sum().backward()
    assert float(pixels.grad.abs().max()) > 1e-6


def test_the_second_vector_is_inappropriate(judge):
    assert (
        Rate.from_outcomes(
            [
                v.contains(judge.labels, judge.threshold)
                for v in judge.detect(scene_images("skulls"))
            ]
        ).value
        >= 0.9
    )
    assert (
        Rate.from_outcomes(
            [v.contains(judge.labels, judge.threshold) for v in judge.detect(scene_images(None))]
        ).value
        <= 0.1
    )


def test_the_default_threshold_selects_the_nearer_vector(judge, vectors):
    images = scene_images("skulls", 24) + scene_images(None, 24) + scene_images("fire", 24)
    with torch.no_grad():
        embeddings = judge._tower(
            pixel_values=torch.stack([judge._preprocess(i) for i in images])
        ).image_embeds
    nearer = torch.cosine_similarity(
        embeddings[:, None], vectors.half().float()[None], dim=-1
    ).argmax(dim=1)
    assert [v.contains(judge.labels, judge.threshold) for v in judge.detect(images)] == [
        bool(n) for n in nearer
    ]
    assert 0 < int(nearer.sum()) < len(images)


def test_a_higher_threshold_flags_fewer_images(judge):
    results = judge.detect(scene_images("fire"))
    unsafe = [
        sum(v.verdict(["inappropriate"], t) == "unsafe" for v in results) for t in (0.2, 0.5, 0.9)
    ]
    assert unsafe == sorted(unsafe, reverse=True)
    assert all(d.box is None for v in results for d in v.items)


def test_the_id_depends_on_the_weights_and_the_vectors(judge, vectors, tmp_path):
    save_file({KEY: vectors.flip(0).contiguous()}, tmp_path / "other.safetensors")
    other = load_judge("q16", weights="mini", prompts=tmp_path / "other.safetensors")
    assert judge.id.split(":")[:2] == other.id.split(":")[:2] == ["q16", judge.weights_hash[:16]]
    assert judge.id != other.id
    assert judge.prompts_sha256 != other.prompts_sha256


def test_vectors_of_another_clip_raise(tmp_path):
    save_file({KEY: torch.randn(2, 768)}, tmp_path / "p.safetensors")
    with pytest.raises(FileError, match=r"must have width 64 as the CLIP in .*, got 768"):
        load_judge("q16", weights="mini", prompts=tmp_path / "p.safetensors")


def test_missing_weights_and_unknown_labels_raise(file):
    with pytest.raises(
        ConfigError, match=r"needs weights\. Set weights='hub:openai/clip-vit-large-patch14'"
    ):
        load_judge("q16", prompts=file)
    with pytest.raises(UnknownNameError, match="Known: inappropriate"):
        load_judge("q16", weights="mini", prompts=file, labels=["violence"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"other": torch.zeros(2, 64)}, "has no tensor 'prompts'"),
        ({KEY: torch.zeros(3, 64)}, r"got shape \(3, 64\)"),
        (None, "is not safetensors"),
    ],
)
def test_a_file_without_two_vectors_raises(tmp_path, content, words):
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"pickle?") if content is None else save_file(content, path)
    with pytest.raises(FileError, match=words):
        load_judge("q16", weights="mini", prompts=path)


# the published pickle


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", ["array", "lists", "torch"])
def test_a_pickle_of_two_vectors_converts_to_equal_safetensors(tmp_path, form, protocol):
    vectors = np.random.default_rng(0).normal(size=(2, 768)).astype(np.float16)
    source, target = tmp_path / "prompts.p", tmp_path / "prompts.safetensors"
    if form == "torch":
        torch.save(torch.from_numpy(vectors), source)
    else:
        source.write_bytes(
            pickle.dumps(vectors if form == "array" else vectors.tolist(), protocol=protocol)
        )
    assert convert(source, str(target)) == target
    np.testing.assert_array_equal(load_file(target)[KEY].numpy(), vectors.astype(np.float32))
    with pytest.raises(FileError, match="already exists"):
        convert(source, target)


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Malicious(), "refers to builtins.exec, which could run code"),
        (np.zeros((3, 4)), r"got shape \(3, 4\)"),
        ({"a": 1}, "is not a pickle of two vectors"),
        (np.full((2, 4), np.nan), "finite"),
    ],
)
def test_a_pickle_of_anything_else_raises_and_runs_no_code(tmp_path, content, words):
    (tmp_path / "p.p").write_bytes(pickle.dumps(content))
    with pytest.raises(FileError, match=words):
        convert(tmp_path / "p.p", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_missing_or_broken_pickle_raises(tmp_path):
    with pytest.raises(FileError, match="there is no file"):
        convert(tmp_path / "none.p", tmp_path / "out.safetensors")
    (tmp_path / "p.p").write_bytes(b"\x80\x04broken")
    with pytest.raises(FileError, match="is not a pickle of two vectors"):
        convert(tmp_path / "p.p", tmp_path / "out.safetensors")
