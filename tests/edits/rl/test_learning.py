"""Every algorithm learns: on the toy, the concept goes and the object stays."""

from __future__ import annotations

import pytest
from toy import BENIGN, EXPLICIT, measure

SETTINGS = {
    "ddpo": {  # without a distance, as published: two updates a rollout, whose ratio is clipped
        "steps": 5,
        "kl": 0.0,
        "weight_keep": 0.0,
        "training": {"updates": 60, "batch": 64, "accumulation": 5},
    },
    "draft": {"kl": 0.01, "weight_keep": 0.1, "training": {"updates": 40}},
    "grpo_window": {"training": {"updates": 30, "accumulation": 2}},
    "nft": {"training": {"updates": 20, "lr": 2e-2}},
    "v_grpo": {"training": {"updates": 20, "lr": 2e-2}},
}
"""Settings by algorithm, other than those of `toy_edit`."""


def apply(patch, model):
    """Put new weights on the toy."""
    for name, value in patch.tensors.items():
        model.denoiser.get_parameter(name).data.copy_(value)


CELLS = [
    *((name, kind) for name in sorted(SETTINGS) for kind in ("epsilon", "v_prediction")),
    *((name, "flow_prediction") for name in ("nft", "v_grpo")),
]


@pytest.mark.parametrize(("algorithm", "prediction"), CELLS)
def test_the_concept_goes_and_the_object_stays(algorithm, prediction, toy, toy_edit):
    model = toy(prediction)
    shown, cosine = measure(model, EXPLICIT)
    benign_shown, benign_cosine = measure(model, BENIGN)
    assert shown > 0.95
    assert benign_shown < 0.05
    apply(toy_edit(algorithm, **SETTINGS[algorithm]).apply(model), model)
    after, kept = measure(model, EXPLICIT)
    benign_after, benign_kept = measure(model, BENIGN)
    assert after < 0.05
    assert benign_after < 0.05
    assert kept > cosine - 0.03
    assert benign_kept > benign_cosine - 0.03
