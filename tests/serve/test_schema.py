"""The server under requests that schemathesis makes from its own OpenAPI schema: never a 5xx."""

from __future__ import annotations

from contextlib import suppress

import hypothesis
import pytest

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.checks import not_a_server_error  # noqa: E402

from safegen.serve.app import build_app  # noqa: E402
from safegen.serve.config import RequestLimits, ServerConfig  # noqa: E402
from tests.serve.conftest import FakeEngine  # noqa: E402

LIMITS = RequestLimits(images=2, side=64)
EXAMPLES = 20
"""Requests per route and mode."""


class SteadyEngine(FakeEngine):
    """Engine of tests without the image on which its judge fails, which schemathesis sends."""

    async def check_images(self, stack, images, prompts):
        return await super().check_images(stack, [i.resize((8, 8)) for i in images], prompts)

    async def stop(self):
        """Stay in service: schemathesis starts and stops the app for each request."""


@pytest.fixture(scope="module")
def schema():
    config = ServerConfig(stacks=("fake",), allowed_hosts=("testserver",), limits=LIMITS)
    return schemathesis.openapi.from_asgi("/openapi.json", build_app(config, SteadyEngine()))


@pytest.mark.parametrize(("mode", "least"), [("positive", 11), ("negative", 3)])
def test_no_request_makes_the_server_fail(schema, mode, least):
    """Valid requests, and requests that break the schema; `least` routes have such requests."""
    generation_mode, sent, statuses = schemathesis.GenerationMode(mode), set(), set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=EXAMPLES, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=generation_mode))
        def check(case):
            sent.add((case.method, case.path))
            response = case.call_and_validate(checks=[not_a_server_error])
            statuses.add((case.path, response.status_code))

        with suppress(hypothesis.errors.Unsatisfiable):  # nothing to break
            check()
    assert len(sent) >= least, sent
    assert ("/v1/images/generations", 200 if mode == "positive" else 400) in statuses
