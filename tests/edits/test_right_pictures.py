"""Triplets must show the concept that an edit is told to take out."""

from __future__ import annotations

import warnings

import pytest

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, MissingExtraError
from safegen.data.triplets.triplets import Triplets
from safegen.workflows import edit as api


@pytest.mark.parametrize(("shown", "said"), [("skulls", "fire"), ("fire", "skulls")])
def test_triplets_of_another_concept_are_refused(shown, said):
    triplets = Triplets.load(f"mini:{shown}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        api.check_triplets(load_concept(shown), triplets)  # of the right one: no word
    with pytest.raises(
        ConfigError,
        match=f"must show '{said}', but judge 'mini' sees it in none of {len(triplets)}",
    ):
        api.check_triplets(load_concept(said), triplets)


def test_one_picture_that_shows_it_is_enough_wherever_it_lies():
    skulls, fire = Triplets.load("mini:skulls"), Triplets.load("mini:fire")
    few = Triplets(fire.folder, fire.rows[: 2 * api.JUDGE_BATCH_SIZE])
    with pytest.raises(ConfigError, match=f"none of {2 * api.JUDGE_BATCH_SIZE}"):
        api.check_triplets(load_concept("skulls"), few)

    class Mixed(Triplets):
        def images(self, i):
            return skulls.images(0) if i == len(self) - 1 else super().images(i)

    api.check_triplets(load_concept("skulls"), Mixed(few.folder, few.rows))


def test_a_judge_that_is_not_here_is_said_and_not_passed_over(monkeypatch):
    def missing(*args, **kwargs):
        raise MissingExtraError("judge 'nudenet'", "NudeNet", "nudenet")

    monkeypatch.setattr(api, "load_judge", missing)
    with pytest.warns(api.UncheckedTripletsWarning, match="triplets were not checked"):
        api.check_triplets(load_concept("skulls"), Triplets.load("mini:skulls"))


@pytest.mark.parametrize(
    ("judge", "label"),
    [("clip", "skulls"), ("q16", "inappropriate"), ("sd-safety-checker", "nude")],
)
def test_a_concept_whose_judge_asks_for_weights_that_only_its_user_can_name_is_taken_with_a_word(
    judge, label
):
    own = load_concept("skulls").model_copy(update={"judge": judge, "labels": (label,)})
    with pytest.warns(
        api.UncheckedTripletsWarning, match=f"triplets were not checked: the judge '{judge}' needs"
    ):
        api.check_triplets(own, Triplets.load("mini:skulls"))


def test_pictures_that_nobody_can_judge_are_said_too(monkeypatch):
    from safegen.judges import Detections

    class Blind:
        labels, threshold = ("skulls",), 0.5

        def detect(self, images):
            return [Detections((), unjudged="dark") for _ in images]

    monkeypatch.setattr(api, "load_judge", lambda *args, **kwargs: Blind())
    with pytest.warns(api.UncheckedTripletsWarning, match="left all images unjudged"):
        api.check_triplets(load_concept("skulls"), Triplets.load("mini:skulls"))


def test_the_library_call_refuses_before_it_trains(make_model):
    with pytest.raises(ConfigError, match="sees it in none of"):
        api.edit(make_model(), "safegen", triplets="mini:skulls", concept=load_concept("fire"))
