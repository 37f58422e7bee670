"""Checks that triplets show the concept of an edit."""

from __future__ import annotations

import warnings

import pytest

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, MissingExtraError
from safegen.data.triplets.triplets import Triplets
from safegen.workflows import edit

RIDDLE = (
    "safegen learns from images, and there are no triplets. Make some of images that show the "
    "concept, and of others: `safegen triplets make --unsafe DIR --benign DIR --judge nudenet "
    "--label i2p5 --out TRIPLETS`, and give them as triplets (--triplets). Or edit by words, "
    "without images: method uce (--method uce). `safegen make-safe` does all steps in one job."
)
"""Answer to an edit by images without images."""


@pytest.mark.parametrize(("shown_concept", "concept"), [("skulls", "fire"), ("fire", "skulls")])
def test_triplets_of_another_concept_raise(shown_concept, concept):
    triplets = Triplets.load(f"mini:{shown_concept}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit.check_triplets(
            load_concept(shown_concept), triplets
        )  # triplets of the same concept do not warn
    with pytest.raises(
        ConfigError,
        match=f"must show '{concept}', but judge 'mini' sees it in none of {len(triplets)}",
    ):
        edit.check_triplets(load_concept(concept), triplets)


def test_one_image_with_the_concept_is_enough():
    skulls, fire = Triplets.load("mini:skulls"), Triplets.load("mini:fire")
    subset = Triplets(fire.folder, fire.rows[: 2 * edit.JUDGE_BATCH_SIZE])
    with pytest.raises(ConfigError, match=f"none of {2 * edit.JUDGE_BATCH_SIZE}"):
        edit.check_triplets(load_concept("skulls"), subset)

    class Mixed(Triplets):
        def images(self, i):
            return skulls.images(0) if i == len(self) - 1 else super().images(i)

    edit.check_triplets(load_concept("skulls"), Mixed(subset.folder, subset.rows))


def test_a_missing_judge_warns(monkeypatch):
    def missing(*args, **kwargs):
        raise MissingExtraError("judge 'nudenet'", "NudeNet", "nudenet")

    monkeypatch.setattr(edit, "load_concept_judge", missing)
    with pytest.warns(edit.UncheckedTripletsWarning, match="triplets were not checked"):
        edit.check_triplets(load_concept("skulls"), Triplets.load("mini:skulls"))


@pytest.mark.parametrize(
    ("judge", "label"),
    [("clip", "skulls"), ("q16", "inappropriate"), ("sd-safety-checker", "nude")],
)
def test_a_judge_without_weights_warns(judge, label):
    custom = load_concept("skulls").model_copy(update={"judge": judge, "labels": (label,)})
    with pytest.warns(
        edit.UncheckedTripletsWarning, match=f"triplets were not checked: the judge '{judge}' needs"
    ):
        edit.check_triplets(custom, Triplets.load("mini:skulls"))


def test_unjudged_images_warn(monkeypatch):
    from safegen.judges import Detections

    class Blind:
        labels, threshold = ("skulls",), 0.5

        def detect(self, images):
            return [Detections((), unjudged="dark") for _ in images]

    monkeypatch.setattr(edit, "load_concept_judge", lambda *args, **kwargs: Blind())
    with pytest.warns(edit.UncheckedTripletsWarning, match="left all images unjudged"):
        edit.check_triplets(load_concept("skulls"), Triplets.load("mini:skulls"))


def test_edit_raises_before_training(make_model):
    with pytest.raises(ConfigError, match="sees it in none of"):
        edit.edit(make_model(), "safegen", triplets="mini:skulls", concept=load_concept("fire"))


def test_an_edit_without_images_says_how_to_make_them_or_to_go_without(make_model):
    with pytest.raises(ConfigError) as caught:
        edit.edit(make_model(), concept="nudity")
    assert str(caught.value) == RIDDLE
    with pytest.raises(ConfigError, match="Take the bundled mini:skulls, and give them"):
        edit.edit(make_model(), concept="skulls")


def test_a_handful_of_triplets_warns(triplets):
    with pytest.warns(edit.FewTripletsWarning, match="should be 20 or more, got 6"):
        edit.prepare_edit("safegen", triplets=triplets)
    edit.prepare_edit("safegen", triplets="mini:skulls")
