"""The release check: what it says of an image that is withheld."""

from __future__ import annotations

import pytest

from safegen.core.generation import GenerationConfig
from safegen.guards.core.result import GeneratedImage, GuardTrace
from safegen.serve.gate import check_release
from safegen.serve.messages import ImageRequest
from tests.serve.conftest import STACK, records

REQUEST = ImageRequest("r", "a castle", "safe", (7,), GenerationConfig())


@pytest.mark.parametrize(
    ("reason", "guard"),
    [
        ("judge-filter: unjudged", "judge-filter"),
        ("error: judge-filter: ValueError in judge.detect", "judge-filter"),
        ("calls: 1 hooks were removed during the call", ""),
        ("", ""),
    ],
)
def test_a_fault_names_the_guard_that_failed_and_no_other_word(reason, guard):
    generated = GeneratedImage(None, GuardTrace("withhold", reason, records()))
    outcome = check_release(generated, REQUEST, 7, STACK)
    assert (outcome.status, outcome.guard, outcome.image) == ("fault", guard, None)
