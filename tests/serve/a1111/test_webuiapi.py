"""The A1111 interface with its usual client, webuiapi, over HTTP."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

webuiapi = pytest.importorskip("webuiapi")

from safegen.serve.config import ServerConfig  # noqa: E402
from tests.serve.conftest import STACK, FakeEngine, serving  # noqa: E402

TIMEOUT = 20


def connect(address, token=None):
    host, _, port = address.removeprefix("http://").rpartition(":")
    return webuiapi.WebUIApi(host=host, port=int(port), username="any", password=token)


@pytest.fixture(scope="module")
def fake_engine():
    return FakeEngine()


@pytest.fixture(scope="module")
def server(fake_engine):
    with serving(ServerConfig(stacks=("fake",)), fake_engine) as address:
        yield address


@pytest.fixture
def engine(fake_engine):
    """Return the engine of the server, as it was at the start."""
    fake_engine.requests.clear()
    fake_engine.cancelled.clear()
    fake_engine.stacks = {STACK.name: STACK}
    return fake_engine


@pytest.fixture
def api(server, engine):
    client = connect(server)
    yield client
    client.session.close()


def pixels(image):
    return np.asarray(image.convert("RGB"))


def error_of(failure):
    """Return the status and the body of webuiapi's error."""
    status, text = failure.value.args
    return status, json.loads(text)


def wait_until(condition):
    until = time.monotonic() + TIMEOUT
    while not (value := condition()):
        assert time.monotonic() < until, "timeout"
        time.sleep(0.02)
    return value


def test_text_to_image_gives_an_image_its_settings_and_its_seed(api, engine):
    result = api.txt2img(prompt="a castle", negative_prompt="fog", seed=7, steps=9, cfg_scale=6.5)
    (request,) = engine.requests
    config = request.generation_config
    assert (request.prompt, request.negative_prompt, request.seeds) == ("a castle", "fog", (7,))
    assert (config.num_inference_steps, config.guidance_scale) == (9, 6.5)
    assert (config.width, config.height, config.scheduler) == (512, 512, "Euler a")
    assert result.image.size == (512, 512)
    info = result.info
    assert (info["seed"], info["all_seeds"], info["all_prompts"]) == (7, [7], ["a castle"])
    assert (info["width"], info["height"], info["steps"], info["cfg_scale"]) == (512, 512, 9, 6.5)
    assert info["sampler_name"] == "Euler a"
    assert info["safegen"]["images"][0]["status"] == "released"
    assert result.parameters["prompt"] == "a castle"
    text = result.image.text
    assert text["parameters"] == info["infotexts"][0]
    assert text["parameters"].startswith("a castle\nNegative prompt: fog\nSteps: 9, Sampler: Eul")
    metadata = json.loads(text["safegen"])
    assert metadata["stack"] == "safe"
    assert (metadata["seed"], metadata["request_id"]) == (7, info["safegen"]["request_id"])


def test_a_seed_gives_its_image_alone_and_in_a_batch(api):
    batch = api.txt2img(prompt="a castle", seed=3, batch_size=2, n_iter=2, width=64, height=64)
    assert batch.info["all_seeds"] == [3, 4, 5, 6]
    assert (batch.parameters["batch_size"], batch.parameters["n_iter"]) == (2, 2)
    for seed, image in zip(batch.info["all_seeds"], batch.images, strict=True):
        alone = api.txt2img(prompt="a castle", seed=seed, width=64, height=64)
        assert np.array_equal(pixels(alone.image), pixels(image))
    chosen = [api.txt2img(prompt="a castle", width=64, height=64).info["seed"] for _ in range(2)]
    assert chosen[0] != chosen[1]


def test_image_to_image_reads_the_image_the_mask_and_the_strength(api, engine):
    image, mask = Image.new("RGB", (64, 32), "blue"), Image.new("L", (64, 32), 0)
    mask.paste(255, (0, 0, 32, 32))
    sent = {"images": [image], "prompt": "a fort", "width": 64, "height": 64, "seed": 1}
    result = api.img2img(**sent, denoising_strength=0.4)
    start = engine.requests[-1].start
    assert (start.strength, start.mask) == (0.4, None)
    assert Image.open(io.BytesIO(start.image)).size == (64, 32)
    assert result.info["denoising_strength"] == 0.4
    assert "Denoising strength: 0.4" in result.info["infotexts"][0]

    for invert in (0, 1):
        api.img2img(**sent, mask_image=mask, inpainting_mask_invert=invert)
        masked = Image.open(io.BytesIO(engine.requests[-1].start.mask))
        assert masked.getpixel((5, 5)) == (255, 0)[invert]
        assert masked.getpixel((60, 5)) == (0, 255)[invert]

    api.img2img(**sent, mask_image=mask, resize_mode=1)
    start = engine.requests[-1].start
    assert Image.open(io.BytesIO(start.image)).size == (64, 64)
    assert Image.open(io.BytesIO(start.mask)).size == (64, 64)


def test_an_unsafe_image_to_start_from_is_blocked_before_anything_is_made(api, engine):
    with pytest.raises(RuntimeError) as failure:
        api.img2img(images=[Image.new("RGB", (64, 64), "red")], prompt="a fort")
    status, body = error_of(failure)
    assert status == 400
    assert body["error"]["moderation_details"]["moderation_stage"] == "input"
    assert not engine.requests


def test_progress_is_between_0_and_1_and_interrupt_ends_the_request(api, engine):
    idle = api.get_progress()
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)
    api.util_wait_for_ready()
    failures = []

    def generate():
        try:
            api.txt2img(prompt="a slow castle", steps=10)
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    busy = wait_until(lambda: (p := api.get_progress())["progress"] and p)
    assert 0 < busy["progress"] < 1
    assert busy["eta_relative"] >= 0
    assert busy["current_image"] is None
    state = busy["state"]
    assert (state["job_count"], state["sampling_step"], state["sampling_steps"]) == (1, 5, 10)
    assert api.interrupt() == {}
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    (failure,) = failures
    assert failure.args[0] == 409
    assert json.loads(failure.args[1])["error"]["code"] == "interrupted"
    assert engine.cancelled == [engine.requests[0].id]
    assert api.get_progress()["state"]["job_count"] == 0
    assert api.interrupt() == {}


def test_a_client_interrupts_and_sees_its_own_requests_only(tmp_path):
    tokens = {"alice": "a" * 16, "bob": "b" * 16}
    path = tmp_path / "tokens.toml"
    path.write_text("".join(f'[{name}]\ntoken = "{token}"\n' for name, token in tokens.items()))
    path.chmod(0o600)
    engine = FakeEngine(slow_seconds=0.5)
    with serving(ServerConfig(stacks=("fake",), token_file=path), engine) as address:
        assert connect(address).get_options()["detail"]  # 401
        alice, bob = (connect(address, token) for token in tokens.values())
        with ThreadPoolExecutor() as pool:
            slow = pool.submit(alice.txt2img, prompt="a slow castle", width=64, height=64)
            wait_until(lambda: alice.get_progress()["progress"])
            assert bob.get_progress()["state"]["job_count"] == 0
            assert bob.interrupt() == {}
            assert slow.result(TIMEOUT).image.size == (64, 64)
            slow = pool.submit(alice.txt2img, prompt="a slow castle", width=64, height=64)
            wait_until(lambda: alice.get_progress()["progress"])
            assert alice.interrupt() == {}
            with pytest.raises(RuntimeError, match="interrupted"):
                slow.result(TIMEOUT)
        alice.session.close()
        bob.session.close()


def test_stacks_samplers_and_loras_are_listed(api, engine):
    first = replace(engine.stacks["safe"], loras=("ghosts",))
    engine.stacks = {"safe": first, "other": replace(first, name="other", samplers=("Heun",))}
    assert (api.has_controlnet, api.has_adetailer, api.has_animatediff) == (False, False, False)
    assert api.util_get_model_names() == ["other", "safe"]
    assert api.util_get_current_model() == "safe"
    assert api.util_get_sampler_names() == ["DDIM", "Euler", "Euler a", "Heun"]
    assert api.util_get_scheduler_names() == ["automatic", "karras", "normal", "uniform"]
    assert [lora["name"] for lora in api.get_loras()] == ["ghosts"]
    assert [upscaler["name"] for upscaler in api.get_upscalers()] == ["None"]
    assert api.get_sd_vae() == api.get_latent_upscale_modes() == []
    result = api.txt2img(
        prompt="a fort", sampler_name="Heun", override_settings={"sd_model_checkpoint": "other"}
    )
    assert result.info["sd_model_name"] == engine.requests[-1].stack == "other"
    with pytest.raises(RuntimeError, match="no stack named"):
        api.txt2img(prompt="a fort", override_settings={"sd_model_checkpoint": "third"})


def test_settings_are_the_operators(api):
    options = api.get_options()
    api.util_set_model("safe")
    assert api.set_options(options) == {}
    for change in ({"sd_model_checkpoint": "other"}, {"filter_nsfw": False}, {"sd_vae": "x"}):
        error = api.set_options(options | change)["error"]
        assert error["param"] in (*change, None)
        assert "Settings are the operator's" in error["message"]
        assert "\n" not in error["message"]
    assert api.get_options() == options


@pytest.mark.parametrize(
    ("prompt", "stage", "category"),
    [("skulls", "input", "prompt-filter"), ("a grinning castle", "output", "skulls")],
)
def test_a_block_is_a_400_with_its_stage_and_category(api, prompt, stage, category):
    with pytest.raises(RuntimeError) as failure:
        api.txt2img(prompt=prompt, batch_size=2)
    status, body = error_of(failure)
    assert status == 400
    assert body["error"]["code"] == "moderation_blocked"
    details = {"moderation_stage": stage, "categories": [category]}
    assert body["error"]["moderation_details"] == details
    assert body["detail"] == body["error"]["message"]
    assert len(body["safegen"]["images"]) == 2
    assert "images" not in body


@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [
        ("a broken castle", 503, "guard_failed"),
        ("a dead castle", 503, "engine_failed"),
        ("a full castle", 429, "queue_full"),
    ],
)
def test_a_fault_gives_no_image(api, prompt, status, code):
    with pytest.raises(RuntimeError) as failure:
        api.txt2img(prompt=prompt)
    got, body = error_of(failure)
    assert (got, body["error"]["code"]) == (status, code)
    assert "images" not in body


def test_a_withheld_image_of_several_is_a_new_black_one_in_its_place(api):
    result = api.txt2img(prompt="a partly castle", seed=1, batch_size=3, width=96, height=64)
    assert [image.size for image in result.images] == [(96, 64)] * 3
    assert [bool(pixels(image).any()) for image in result.images] == [True, False, True]
    images = result.info["safegen"]["images"]
    assert [image["status"] for image in images] == ["released", "blocked", "released"]
    assert (images[1]["guard"], images[1]["score"]) == ("judge-filter", 0.9)
    assert "Withheld: blocked by judge-filter" in result.info["infotexts"][1]
    assert json.loads(result.images[1].text["safegen"]) == {"status": "blocked"}
    assert api.txt2img(prompt="a partly castle", batch_size=3, send_images=False).images == []


@pytest.mark.slow
def test_the_miniature_behind_its_guards(mini_server):
    api = connect(mini_server)
    size = {"width": 64, "height": 64, "steps": 10}
    result = api.txt2img(prompt="a castle", seed=5, **size)
    again = api.txt2img(prompt="a castle", seed=5, **size)
    assert np.array_equal(pixels(result.image), pixels(again.image))
    assert "Model: mini" in result.image.text["parameters"]
    with pytest.raises(RuntimeError) as failure:
        api.txt2img(prompt="a castle covered in skulls", **size)
    assert error_of(failure)[1]["error"]["moderation_details"]["categories"] == ["skulls"]
    mixed = {"prompt": "a castle with pale faces", "sampler_name": "DDIM", "seed": 2}
    batch = api.txt2img(**mixed, batch_size=2, **size)
    images = batch.info["safegen"]["images"]
    statuses = [image["status"] for image in images]
    assert statuses == ["released", "blocked"], images
    assert [bool(pixels(i).any()) for i in batch.images] == [s == "released" for s in statuses]
    start = base64.b64decode(batch.json["images"][statuses.index("released")])
    drawn = api.img2img(images=[Image.open(io.BytesIO(start))], prompt="a castle", seed=1, **size)
    assert drawn.image.size == (64, 64)
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(api.txt2img, prompt="a castle", batch_size=8, **size | {"steps": 100})
        progress = wait_until(lambda: api.get_progress()["progress"])
        assert 0 < progress < 1
        api.interrupt()
        with pytest.raises(RuntimeError, match="interrupted"):
            slow.result(TIMEOUT)
    assert api.txt2img(prompt="a castle", seed=5, **size).info["seed"] == 5
    api.session.close()


def test_the_comfyui_node_of_the_how_to_returns_images_and_the_servers_errors(server, engine):
    page = Path(__file__).parents[3] / "docs" / "how-to" / "serve-comfyui.md"
    code = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    scope = {}
    exec(compile(code, page.name, "exec"), scope)
    scope["URL"] = server
    node = scope["NODE_CLASS_MAPPINGS"]["SafegenImage"]
    inputs = node.INPUT_TYPES()["required"]
    fields = {name: options["default"] for name, (_, options) in inputs.items()}
    (images,) = node().generate(
        **fields | {"prompt": "a partly castle", "batch_size": 2, "seed": 4}
    )
    assert images.shape == (2, 512, 512, 3)
    assert images[0].max() > 0.9
    assert images[1].max() == 0
    assert engine.requests[0].seeds == (4, 5)
    with pytest.raises(RuntimeError, match="was blocked"):
        node().generate(**fields | {"prompt": "skulls"})
