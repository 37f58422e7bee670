"""Moderations of the OpenAI interface: the guards of a stack as categories."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import pytest
from PIL import Image

openai = pytest.importorskip("openai")

from safegen.guards.core.result import GuardRecord, GuardTrace  # noqa: E402
from safegen.serve.config import RequestLimits, ServerConfig  # noqa: E402
from safegen.serve.errors import RequestError  # noqa: E402
from safegen.serve.messages import GuardInfo  # noqa: E402
from safegen.serve.openai.moderations import Finding, build_result, check_finding  # noqa: E402
from tests.serve.conftest import STACK, FakeEngine, serving  # noqa: E402

BARE = replace(STACK, name="bare", guards=())
WORDS = replace(STACK, name="words", guards=STACK.guards[:1])
RED = (255, 0, 0)


@pytest.fixture(scope="module")
def engine():
    return FakeEngine((STACK, BARE, WORDS))


@pytest.fixture(scope="module")
def client(engine):
    config = ServerConfig(stacks=("fake",), limits=RequestLimits(side=64, moderation_inputs=4))
    with (
        serving(config, engine) as address,
        openai.OpenAI(api_key="x", base_url=f"{address}/v1", max_retries=0, timeout=20) as found,
    ):
        yield found


def image_input(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def text_input(text):
    return {"type": "text", "text": text}


def moderate(client, inputs, **settings):
    return client.moderations.create(input=inputs, **settings).model_dump()


def test_each_text_has_a_result(client):
    found = moderate(client, ["a castle", "skulls"])
    assert (found["model"], len(found["results"])) == ("safe", 2)
    benign, flagged = found["results"]
    assert not benign["flagged"]
    assert benign["category_scores"]["prompt-filter"] == 0
    assert flagged["flagged"]
    assert flagged["categories"]["prompt-filter"]
    assert flagged["category_scores"]["prompt-filter"] == 1
    assert flagged["category_applied_input_types"]["prompt-filter"] == ["text"]
    assert moderate(client, "skulls")["results"][0]["flagged"]


def test_texts_and_images_have_one_result_together(client):
    inputs = [text_input("a castle"), image_input(Image.new("RGB", (8, 8), RED))]
    (result,) = moderate(client, inputs)["results"]
    assert result["flagged"]
    assert result["categories"]["skulls"]
    assert not result["categories"]["prompt-filter"]
    assert result["category_scores"]["skulls"] == 0.9
    assert result["category_applied_input_types"]["skulls"] == ["image"]
    (result,) = moderate(client, [image_input(Image.new("RGB", (8, 8)))])["results"]
    assert not result["flagged"]
    assert result["category_scores"]["skulls"] == 0.1


def test_a_judge_that_fails_is_503_and_no_result(client):
    with pytest.raises(openai.InternalServerError) as caught:
        moderate(client, [image_input(Image.new("RGB", (1, 1)))])
    assert (caught.value.status_code, caught.value.code) == (503, "guard_failed")


@pytest.mark.parametrize(
    ("inputs", "model", "message"),
    [
        ("a castle", "bare", "the stack 'bare' must have a guard of prompts"),
        ([image_input(Image.new("RGB", (8, 8)))], "words", "must have a guard of images"),
        ([], "safe", "input must have 1 to 4 entries"),
        (["a"] * 5, "safe", "input must have 1 to 4 entries on this server, got 5"),
        ("a" * 4001, "safe", "characters of a text must be <= 4000"),
        ([image_input(Image.new("RGB", (65, 8)))], "safe", "at most 64 pixels per side"),
        (
            [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}],
            "safe",
            "The server fetches no addresses",
        ),
        (
            [{"type": "image_url", "image_url": {"url": "https://example.org/a;base64,AAAA"}}],
            "safe",
            "The server fetches no addresses",
        ),
        (
            [{"type": "image_url", "image_url": {"url": "data:image/png;base64,??"}}],
            "safe",
            "must be valid base64",
        ),
        (
            [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
            "safe",
            "must be a readable PNG",
        ),
        ([{"type": "audio"}], "safe", "input"),
        (7, "safe", "input"),
    ],
)
def test_an_input_beyond_a_rule_is_refused(client, inputs, model, message):
    with pytest.raises(openai.BadRequestError) as caught:
        moderate(client, inputs, model=model)
    assert message in caught.value.body["message"]


def test_an_unknown_stack_is_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        moderate(client, "a castle", model="omni-moderation-latest")
    assert caught.value.code == "model_not_found"


def test_the_concept_is_the_only_category():
    record = GuardRecord("judge-filter", "black", "unsafe", {"skulls": 0.9}, {"score": 0.5}, 1)
    finding = Finding("image", GuardTrace("black", "judge-filter: unsafe", (record,)))
    text = Finding("text", GuardTrace("none", "", (GuardRecord("prompt-filter", calls=1),)))
    assert build_result([finding, text], STACK, "death") == {
        "flagged": True,
        "categories": {"death": True},
        "category_scores": {"death": 0.9},
        "category_applied_input_types": {"death": ["image", "text"]},
    }


def test_scores_without_labels_are_those_of_the_guard():
    stack = replace(STACK, guards=(GuardInfo("latent-guard", True, False),))
    record = GuardRecord("latent-guard", "block", "score", {"score": 7.5}, {"score": 4.0}, calls=1)
    finding = Finding("text", GuardTrace("block", "latent-guard: score", (record,)))
    result = build_result([finding], stack, None)
    assert result["category_scores"]["latent-guard"] == 7.5
    assert result["flagged"]


@pytest.mark.parametrize(
    "trace",
    [
        GuardTrace("none", ""),
        GuardTrace("none", "", (GuardRecord("prompt-filter"),)),
        GuardTrace("none", "", (GuardRecord("another", calls=1),)),
        GuardTrace("withhold", "error: prompt-filter: ValueError"),
        GuardTrace(
            "none", "", (GuardRecord("prompt-filter", scores={"x": float("nan")}, calls=1),)
        ),
    ],
)
def test_a_text_that_no_guard_has_read_is_never_unflagged(trace):
    with pytest.raises(RequestError) as caught:
        check_finding(Finding("text", trace), STACK)
    assert caught.value.status == 503
