"""Seeds and guidance scales: what wins travels into the prompt file and is generated with."""

from __future__ import annotations

import json

import numpy as np
import pytest

from safegen.attacks.core.base import AttackContext, AttackRecord
from safegen.attacks.core.found_prompts import _write_prompts
from safegen.attacks.core.target import Target
from safegen.attacks.seeds import Seeds
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig, Sample
from safegen.data.prompts.prompts import read_prompts
from safegen.evaluation.samples import hash_prompts
from safegen.judges.base import Detection, Detections
from safegen.stack import Stack

SKULLS = load_concept("skulls")
CONFIG = GenerationConfig(num_inference_steps=2)
STACK = Stack(name="mini", model="mini")


class RisingJudge:
    """Judge by hand: every image that it sees has a higher score than the one before."""

    seen = 0

    def detect(self, images):
        self.seen += len(images)
        first = self.seen - len(images)
        scores = [(first + i + 1) / 1000 for i in range(len(images))]
        return [Detections(items=(Detection(label="skulls", score=s),)) for s in scores]


def test_scales_take_turns_and_the_best_try_is_the_record(loader, tmp_path, benign_samples):
    with loader.open(STACK) as loaded:
        target = Target(loaded, SKULLS, RisingJudge(), CONFIG)
        attacker = Seeds(tries=5, guidance_scales=(9.0, 2.0)).build(AttackContext(target, tmp_path))
        with target.counted():
            records = attacker.attack(benign_samples)
        tries = [attacker._try(benign_samples[0], i) for i in range(5)]
    assert tries[0] == benign_samples[0]
    assert [t.guidance_scale for t in tries] == [None, 9.0, 2.0, None, 9.0]
    assert len({t.seed for t in tries}) == 5
    assert target.cost.queries == 15
    for record in records:
        assert record.guidance_scale == 9.0, "the last try has the highest score"
        assert list(record.history) == sorted(record.history, reverse=True)
    assert records[0].seed == tries[4].seed


def test_a_found_scale_is_in_the_prompt_file_the_list_and_the_image(loader, tmp_path, mini_sample):
    record = AttackRecord(id=mini_sample.id, prompt="a castle", seed=3, guidance_scale=9.0)
    found = {(record.id, ""): record}
    path = _write_prompts(Seeds(), [mini_sample], found, ("",), tmp_path / "p.jsonl")
    (row,) = read_prompts(path).rows
    assert row.guidance_scale == 9.0
    plain = row.model_copy(update={"guidance_scale": None})
    assert hash_prompts([plain]) != hash_prompts([row])
    keys = {
        mini_sample.model_copy(update={"guidance_scale": scale}).key("0" * 64, CONFIG)
        for scale in (None, 5.0, 9.0)
    }
    assert len(keys) == 3
    samples = [Sample(prompt="a castle", seed=3, guidance_scale=s) for s in (None, 9.0, None)]
    with loader.open(STACK) as loaded:
        together = [np.asarray(i) for i in loaded.generate_images(samples, CONFIG)]
        (alone,) = loaded.generate_images(
            samples[:1], CONFIG.model_copy(update={"guidance_scale": 9.0})
        )
    assert np.abs(together[1].astype(int) - np.asarray(alone)).max() <= 1
    assert np.array_equal(together[0], together[2])
    assert not np.array_equal(together[0], together[1])


@pytest.fixture
def mini_sample(benign_samples):
    return benign_samples[0]


def test_published_scales_of_other_files_are_not_used(tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"prompt": "a castle", "guidance_scale": 9.0}) + "\n")
    (row,) = read_prompts(path).rows
    assert (row.guidance, row.guidance_scale) == (9.0, None)


def test_scales_that_cannot_be_used_are_refused(loader, tmp_path):
    row = {"prompt": "a", "seed": 1, "attack": "seeds", "attacked_prompt": "a"}
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row | {"guidance_scale": 0.5}) + "\n")
    with pytest.raises(FileError, match="guidance_scale must be from 1 to 50"):
        read_prompts(path)
    guided = Stack(name="mini", model="mini", negative_prompt="skulls")
    with loader.open(guided) as loaded, pytest.raises(ConfigError, match="must be > 1"):
        loaded.generate([Sample(prompt="a", seed=1, guidance_scale=1.0)], CONFIG)
