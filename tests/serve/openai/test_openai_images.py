"""The OpenAI Images interface, called by OpenAI's own client over HTTP."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

openai = pytest.importorskip("openai")

from safegen.core.errors import ConfigError  # noqa: E402
from safegen.serve.config import RequestLimits, ServerConfig  # noqa: E402
from safegen.serve.messages import StackInfo  # noqa: E402
from safegen.serve.openai import responses  # noqa: E402
from safegen.serve.openai.store import ImageStore  # noqa: E402
from tests.serve.conftest import STACK, FakeEngine, picture, serving  # noqa: E402

OTHER = StackInfo("other", "mini", "c" * 64, guards=STACK.guards, size=(64, 64))


@pytest.fixture(scope="module")
def engine():
    return FakeEngine((STACK, OTHER))


@pytest.fixture(scope="module")
def address(engine):
    config = ServerConfig(
        stacks=("fake",),
        limits=RequestLimits(images=4, steps=50, side=128, stored_image_bytes=40_000),
    )
    with serving(config, engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(api_key="none", base_url=f"{address}/v1", max_retries=0, timeout=20) as it:
        yield it


@pytest.fixture
def images(client):
    return client.images


def decode(entry):
    return Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))


def pixels(image):
    return np.asarray(image.convert("RGB"))


@contextmanager
def refusal(kind=None, status=400, **expected):
    """Check the error that the client raises."""
    with pytest.raises(kind or openai.BadRequestError) as caught:
        yield caught
    error = caught.value
    assert error.status_code == status
    assert error.body["message"]
    for name, value in expected.items():
        found = error.body[name] if name == "message" else getattr(error, name)
        assert value in found if name == "message" else value == found, error.body


def test_images_come_in_the_order_of_their_seeds(images):
    response = images.generate(prompt="a castle", n=3, extra_body={"safegen": {"seed": 5}})
    assert [image["seed"] for image in response.safegen["images"]] == [5, 6, 7]
    for entry, seed in zip(response.data, (5, 6, 7), strict=True):
        assert (pixels(decode(entry)) == pixels(picture(seed))).all()
    assert (response.output_format, response.size, response.background) == (
        "png",
        "64x64",
        "opaque",
    )
    assert response.created > 1.7e9


def test_a_seed_beside_the_prompt_is_the_seed_as_other_servers_take_it(images):
    response = images.generate(prompt="a castle", extra_body={"seed": 5})
    assert response.safegen["images"][0]["seed"] == 5
    with pytest.raises(openai.BadRequestError, match="must be the same"):
        images.generate(prompt="a castle", extra_body={"seed": 5, "safegen": {"seed": 6}})


def test_one_image_has_the_bytes_of_its_seed_in_a_batch(images):
    both = images.generate(prompt="a castle", n=2, extra_body={"safegen": {"seed": 1}})
    single = images.generate(prompt="a castle", extra_body={"safegen": {"seed": 2}})
    assert (pixels(decode(both.data[1])) == pixels(decode(single.data[0]))).all()


def test_a_png_names_its_stack_request_and_seed_and_no_prompt(images):
    response = images.generate(prompt="a castle of glass", extra_body={"safegen": {"seed": 3}})
    image = decode(response.data[0])
    assert json.loads(image.text["safegen"]) == {
        "stack": "safe",
        "stack_hash": "a" * 64,
        "request_id": response.safegen["request_id"],
        "seed": 3,
    }
    assert b"glass" not in base64.b64decode(response.data[0].b64_json)


def test_every_setting_reaches_the_engine(images, engine):
    images.generate(
        prompt="a castle",
        model="other",
        size="96x32",
        user="u",
        safety_identifier="s",
        quality="high",
        style="vivid",
        background="transparent",
        moderation="auto",
        extra_body={
            "safegen": {
                "seed": 9,
                "steps": 11,
                "guidance": 2.5,
                "negative_prompt": "fog",
                "scheduler": "euler a",
                "stack": "other",
            },
            "unknown_field": [1],
        },
    )
    request = engine.requests[-1]
    config = request.generation_config
    assert (request.stack, request.seeds, request.negative_prompt) == ("other", (9,), "fog")
    assert (config.width, config.height, config.num_inference_steps) == (96, 32, 11)
    assert (config.guidance_scale, config.scheduler) == (2.5, "euler a")  # `other` lists none
    images.generate(prompt="a castle", size="auto")
    assert engine.requests[-1].generation_config.width is None
    assert engine.requests[-1].stack == "safe"


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_the_format_is_the_requested_one(images, output_format):
    response = images.generate(prompt="a castle", output_format=output_format)
    assert decode(response.data[0]).format == output_format.upper()
    assert response.output_format == output_format


def test_compression_makes_a_jpeg_smaller(images):
    sizes = [
        len(
            images.generate(prompt="x", output_format="jpeg", output_compression=c).data[0].b64_json
        )
        for c in (10, 100)
    ]
    assert sizes[0] < sizes[1]


def test_moderation_low_lowers_nothing(images):
    with refusal(code="moderation_blocked"):
        images.generate(prompt="skulls", moderation="low")


def test_a_prompt_that_is_blocked_raises_with_its_stage_and_categories(images):
    with refusal(
        code="moderation_blocked",
        type="image_generation_user_error",
        param="prompt",
        message="the prompt was blocked",
    ) as e:
        images.generate(prompt="skulls", n=2)
    details = e.value.body["moderation_details"]
    assert details == {"moderation_stage": "input", "categories": ["prompt-filter"]}
    extension = e.value.response.json()["safegen"]
    assert extension["guard"] == "prompt-filter"
    assert len(extension["images"]) == 2


def test_a_blocked_image_raises_with_its_judge_and_score(images):
    with refusal(code="moderation_blocked") as e:
        images.generate(prompt="a grinning castle")
    assert e.value.body["moderation_details"]["moderation_stage"] == "output"
    extension = e.value.response.json()["safegen"]
    assert (extension["judge"], extension["score"]) == ("mini-0123", 0.9)
    assert extension["threshold"] == 0.5


def test_of_several_images_those_released_come_and_each_is_listed(images):
    response = images.generate(prompt="partly", n=3, extra_body={"safegen": {"seed": 1}})
    assert [i["status"] for i in response.safegen["images"]] == ["released", "blocked", "released"]
    for entry, seed in zip(response.data, (1, 3), strict=True):
        assert (pixels(decode(entry)) == pixels(picture(seed))).all()


def test_a_guard_that_fails_is_503(images):
    with refusal(openai.InternalServerError, 503, code="guard_failed"):
        images.generate(prompt="broken")
    with refusal(openai.InternalServerError, 503, code="engine_failed"):
        images.generate(prompt="dead")


def test_a_full_queue_is_429_with_the_time_to_wait(images):
    with refusal(openai.RateLimitError, 429, code="queue_full") as e:
        images.generate(prompt="full")
    assert e.value.response.headers["Retry-After"] == "3"


def test_an_unknown_model_is_404_with_the_nearest_name(images, client):
    for settings in ({"model": "sfae"}, {"extra_body": {"safegen": {"stack": "sfae"}}}):
        with refusal(openai.NotFoundError, 404, code="model_not_found", message="mean 'safe'"):
            images.generate(prompt="a castle", **settings)
    with refusal(openai.NotFoundError, 404, code="model_not_found", param="model"):
        client.models.retrieve("gpt-image-2")


def test_a_wrong_base_address_is_404_with_the_right_one(address, client):
    wrong = client.with_options(base_url=address)
    with refusal(openai.NotFoundError, 404, code="not_found", message="OpenAI interface is below"):
        wrong.images.generate(prompt="a castle")


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"size": "64*64"}, "size", "size must be auto or WIDTHxHEIGHT"),
        ({"size": "136x64"}, None, "width must be <= 128 on this server, got 136"),
        ({"n": 5}, None, "n must be between 1 and 4, got 5"),
        ({"n": 0}, "n", "n must be"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 101}, "output_compression", "output_compression must be"),
        ({"moderation": "off"}, "moderation", "moderation must be"),
        ({"response_format": "file"}, "response_format", "response_format must be"),
        ({"partial_images": 2, "stream": True}, "partial_images", "partial_images must be 0"),
        ({"stream": True, "response_format": "url"}, "response_format", "b64_json with stream"),
        ({"model": "safe", "extra_body": {"safegen": {"stack": "other"}}}, "model", "be the same"),
        ({"extra_body": {"safegen": {"sede": 1}}}, "safegen", "Did you mean 'seed'?"),
        ({"extra_body": {"safegen": {"steps": 51}}}, None, "steps must be <= 50"),
        ({"extra_body": {"safegen": {"steps": 0}}}, "safegen.steps", "safegen.steps must be"),
        ({"extra_body": {"safegen": {"seed": -1}}}, "safegen.seed", "safegen.seed must be"),
        ({"extra_body": {"safegen": {"guidance": 0}}}, "safegen.guidance", "safegen.guidance must"),
        ({"extra_body": {"safegen": {"strength": 0.5}}}, "safegen.strength", "without an image"),
        ({"extra_body": {"safegen": [1]}}, "safegen", "safegen must be"),
        ({"extra_body": {"guardrails": False}}, None, "guardrails must not turn a guard off"),
        ({"extra_body": {"extra_params": {"guardrails": "no"}}}, None, "extra_params.guardrails"),
        ({"extra_body": {"enable_safety_checker": False}}, None, "must not turn a guard off"),
        ({"extra_body": {"prompt": None}}, "prompt", "prompt must be"),
        ({"prompt": "x" * 4001}, None, "characters of prompt must be <= 4000"),
    ],
)
def test_a_field_beyond_its_rule_is_refused_in_one_line(images, engine, settings, param, message):
    before = len(engine.requests)
    with refusal(message=message, param=param) as e:
        images.generate(**{"prompt": "a castle"} | settings)
    assert "\n" not in e.value.body["message"]
    assert len(e.value.body["message"]) < 300
    assert len(engine.requests) == before


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"prompt": "a \ud800"}, 400),
        ({"size": "\ud800"}, 400),
        ({"model": "\ud800"}, 404),
        ({"user": "\ud800"}, 200),
        ({"safegen": {"\ud800": 1}}, 400),
        ({"\ud800": {"guardrails": False}}, 400),
    ],
)
def test_half_a_surrogate_pair_is_no_fault_of_the_server(address, fields, status):
    body = json.dumps({"prompt": "a castle", **fields}).encode()
    headers = {"content-type": "application/json"}
    url = f"{address}/v1/images/generations"
    answer = httpx2.post(url, content=body, headers=headers, timeout=20)
    assert answer.status_code == status, answer.text


def test_a_switch_under_a_long_name_is_refused_in_a_short_line(images):
    with refusal(message="...") as caught:
        images.generate(prompt="a castle", extra_body={"x" * 10_000: {"guardrails": False}})
    assert len(caught.value.body["message"]) < 300


def test_fields_of_other_servers_that_turn_nothing_off_are_ignored(images):
    extra = {"guardrails": True, "seed": 4, "num_inference_steps": 3, "lora": "x"}
    assert images.generate(prompt="a castle", extra_body=extra).data


def test_a_stream_has_one_event_per_released_image(images):
    stream = images.generate(
        prompt="partly", n=3, stream=True, partial_images=0, extra_body={"safegen": {"seed": 1}}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    for event, seed in zip(events, (1, 3), strict=True):
        assert (pixels(decode(event)) == pixels(picture(seed))).all()
        assert (event.size, event.output_format, event.usage.total_tokens) == ("64x64", "png", 0)
    with refusal(code="moderation_blocked"):
        images.generate(prompt="skulls", stream=True)


def test_an_image_can_be_fetched_from_its_address(images, address):
    response = images.generate(prompt="a castle", response_format="url", output_format="webp")
    url = response.data[0].url
    assert response.data[0].b64_json is None
    assert url.startswith(f"{address}/v1/images/files/")
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.headers["Content-Type"] == "image/webp"
        assert Image.open(io.BytesIO(answer.read())).size == (64, 64)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url[:-1] + ("A" if url[-1] != "A" else "B"), timeout=10)


def test_the_address_of_an_image_starts_with_that_of_a_proxy(serving, fakes):
    public = "https://images.example.org"
    with serving(ServerConfig(stacks=("fake",), public_url=public), fakes.FakeEngine()) as address:
        body = {"prompt": "a castle", "response_format": "url"}
        answer = httpx2.post(f"{address}/v1/images/generations", json=body, timeout=20)
        url = answer.json()["data"][0]["url"]
        assert url.startswith(f"{public}/v1/images/files/")
        assert httpx2.get(url.replace(public, address)).status_code == 200


def test_the_oldest_images_make_place_for_new_ones(images):
    urls = [images.generate(prompt="a castle", response_format="url").data[0].url for _ in range(6)]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(urls[0], timeout=10)
    with urllib.request.urlopen(urls[-1], timeout=10) as answer:
        assert answer.status == 200


def test_an_image_larger_than_the_store_is_refused(images):
    with refusal(message="response_format must be b64_json for an image of"):
        images.generate(prompt="a castle", size="128x128", n=2, response_format="url")


def test_a_stored_image_expires():
    now = [0.0]
    store = ImageStore(100, 10, clock=lambda: now[0])
    first, second = store.add(b"1" * 40, "image/png"), store.add(b"2" * 40, "image/png")
    assert first != second
    assert store.get(first).data == b"1" * 40
    assert store.get("") is None
    third = store.add(b"3" * 40, "image/png")  # takes the place of the first
    assert [store.get(name) is None for name in (first, second, third)] == [True, False, False]
    now[0] = 10.0
    assert [store.get(name) for name in (second, third)] == [None, None]
    assert store.num_bytes == 0
    store.add(b"4" * 100, "image/png")
    with pytest.raises(ConfigError, match=r"of 101 bytes, got 'url'\. The server stores 100 bytes"):
        store.add(b"5" * 101, "image/png")
    assert store.num_bytes == 100


def test_models_are_the_stacks(client):
    assert [model.id for model in client.models.list()] == ["safe", "other"]
    found = client.models.retrieve("other")
    assert (found.id, found.object, found.owned_by) == ("other", "model", "safegen")


def test_the_server_answers_others_while_it_encodes(images, address, monkeypatch):
    encode = responses.encode_outcome
    encoding, may_end = threading.Event(), threading.Event()

    def encode_slowly(*arguments):
        encoding.set()
        assert may_end.wait(20)
        return encode(*arguments)

    monkeypatch.setattr(responses, "encode_outcome", encode_slowly)
    work = threading.Thread(target=images.generate, kwargs={"prompt": "a castle"})
    work.start()
    try:
        assert encoding.wait(10)
        assert httpx2.get(f"{address}/health", timeout=10).status_code == 200
    finally:
        may_end.set()
        work.join(10)


def test_a_stored_image_needs_no_token_and_nothing_else_does_without(tmp_path):
    tokens, token = tmp_path / "tokens.toml", "alice-" + "a" * 20
    tokens.write_text(f'[alice]\ntoken = "{token}"\nstacks = ["safe"]\n')
    tokens.chmod(0o600)
    config = ServerConfig(stacks=("fake",), token_file=tokens)
    with (
        serving(config, FakeEngine((STACK, OTHER))) as address,
        openai.OpenAI(api_key=token, base_url=f"{address}/v1", max_retries=0, timeout=20) as client,
    ):
        assert [model.id for model in client.models.list()] == ["safe"]  # the client's own
        with refusal(openai.NotFoundError, 404, code="model_not_found"):
            client.images.generate(prompt="a castle", model="other")
        url = client.images.generate(prompt="a castle", response_format="url").data[0].url
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.status == 200
        for path in ("/v1/models", "/v1/images/files", "/v1/images/generations"):
            assert httpx2.get(address + path).status_code == 401


def test_the_example_of_the_page_runs(address, tmp_path, monkeypatch):
    page = Path(__file__).parents[3] / "docs" / "how-to" / "serve-openai.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:8484", address), {})
    for i, seed in enumerate((7, 8)):
        image = Image.open(io.BytesIO(Path(f"{i}.png").read_bytes()))
        assert (pixels(image) == pixels(picture(seed))).all()
