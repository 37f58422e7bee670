"""Fields of the A1111 interface: what is refused, what other clients send, and what leaks."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from safegen.guards.core.result import GeneratedImage, GuardRecord, GuardTrace
from safegen.serve.a1111.bodies import NEUTRAL, NEUTRAL_SETTINGS
from safegen.serve.a1111.running import RunningRequests
from safegen.serve.app import build_app
from safegen.serve.config import RequestLimits, ServerConfig
from safegen.serve.errors import RequestError

CONFIG = ServerConfig(stacks=("fake",), limits=RequestLimits(images=4, side=128, steps=30))
OTHER = {"alwayson_scripts": {"ADetailer": {"args": [True]}}, "styles": ["noir"]}
SMALL = {"width": 8, "height": 8}
ACTIONS = ("none", "edit", "block", "black", "blur", "mosaic", "refuse", "withhold")


@pytest.fixture
def client(engine):
    with TestClient(build_app(CONFIG, engine), "http://127.0.0.1") as client:
        yield client


def post(client, route="txt2img", **body):
    return client.post(f"/sdapi/v1/{route}", json={"prompt": "a castle", **SMALL, **body})


def to_base64(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def error_of(response):
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["detail"] == body["error"]["message"]
    assert "\n" not in body["detail"]
    return body["error"]


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_a_field_that_would_change_the_image_is_refused_unless_it_is_neutral(client, name):
    for value in (None, *NEUTRAL[name], *(["false"] if NEUTRAL[name] == (False,) else [])):
        assert post(client, **{name: value}).status_code == 200
    other = OTHER.get(name, True if NEUTRAL[name] == (False,) else 3)
    error = error_of(post(client, **{name: other}))
    assert error["param"] == name
    assert error["code"] == "unsupported_value"


@pytest.mark.parametrize("name", sorted(NEUTRAL_SETTINGS))
def test_a_setting_that_would_change_the_image_is_refused_unless_it_is_neutral(client, name):
    for value in (None, *NEUTRAL_SETTINGS[name]):
        assert post(client, override_settings={name: value}).status_code == 200
    error = error_of(post(client, override_settings={name: "other"}))
    assert error["param"] == f"override_settings.{name}"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"override_settings": {"filter_nsfw": False}}, "must not turn a guard off"),
        ({"enable_safety_checker": False}, "must not turn a guard off"),
        ({"alwayson_scripts": {"x": {"guardrails": "off"}}}, "must not turn a guard off"),
        (
            {"prompt": "a fort <lora:ghosts:0.8>"},
            "prompt must call no LoRA, got '<lora:ghosts:0.8>'",
        ),
        ({"negative_prompt": "<hypernet:a>"}, "negative_prompt must call no LoRA"),
        ({"sampler_name": "Euler b"}, "no sampler named 'Euler b'. Did you mean 'Euler a'?"),
        ({"sampler_name": "Euler", "scheduler": "Karras"}, "no sampler named 'Euler Karras'"),
        ({"scheduler": "Exponential"}, "no schedule named 'Exponential'"),
        ({"batch_size": 10**9, "n_iter": 10**9}, "n must be between 1 and 4"),
        ({"batch_size": 0}, "batch_size must be greater than or equal to 1, got 0"),
        ({"steps": 31}, "steps must be <= 30 on this server, got 31"),
        ({"width": 256}, "width must be <= 128 on this server, got 256"),
        ({"cfg_scale": 0.5}, "guidance_scale"),
        ({"prompt": "half a pair: \ud800"}, "prompt must be Unicode text"),
        ({"prompt": 7}, "prompt must be a valid string, got 7"),
    ],
)
def test_what_the_service_does_not_do_is_refused_in_one_line(client, engine, body, words):
    data = json.dumps({"prompt": "a castle", **body})
    headers = {"content-type": "application/json"}
    response = client.post("/sdapi/v1/txt2img", content=data, headers=headers)
    assert words in error_of(response)["message"]
    assert not engine.requests


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "init_images must have one image, got 0"),
        ({"init_images": ["a", "b"]}, "init_images must have one image, got 2"),
        ({"init_images": ["http://localhost/x.png"]}, "Addresses are not fetched"),
        ({"init_images": ["aGVsbG8="]}, "init_images must be a readable PNG"),
        ({"init_images": [to_base64(Image.new("L", (129, 1)))]}, "at most 128 pixels per side"),
        ({"mask": "aGVsbG8="}, "mask must be a readable PNG"),
        ({"denoising_strength": 0}, "denoising_strength must be greater than 0"),
        ({"denoising_strength": 0.01}, "strength must be at least 1 / 25 steps"),
        ({"resize_mode": 2}, "resize_mode must be less than or equal to 1"),
    ],
)
def test_an_image_to_start_from_must_be_readable_and_of_a_size(client, engine, body, words):
    image = {"init_images": [to_base64(Image.new("RGB", (16, 16)))]} if body else {}
    error = error_of(post(client, "img2img", **image | body))
    assert words in error["message"]
    assert not engine.requests


def test_a_mask_with_transparent_parts_is_read_as_a1111_reads_it(client, engine):
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    mask.paste((0, 0, 0, 255), (0, 0, 8, 16))
    data = f"data:image/png;base64,{to_base64(mask)}"
    image = to_base64(Image.new("RGB", (16, 16)))
    assert post(client, "img2img", init_images=[image], mask=data).status_code == 200
    read = Image.open(io.BytesIO(engine.requests[-1].start.mask))
    assert (read.getpixel((2, 2)), read.getpixel((12, 2))) == (255, 0)


def test_what_is_left_out_is_chosen_by_the_server(client, engine):
    data = client.post("/sdapi/v1/txt2img", json={"prompt": "a castle"}).json()
    config = engine.requests[-1].generation_config
    assert (config.width, config.height, config.scheduler) == (None, None, None)
    info = json.loads(data["info"])
    assert (info["width"], info["height"], info["sampler_name"]) == (64, 64, "DDIM")
    assert (info["steps"], info["cfg_scale"]) == (25, 5.0)
    post(client, sampler_index="euler A", scheduler="Automatic")
    assert engine.requests[-1].generation_config.scheduler == "Euler a"


INFO = {
    "prompt": str,
    "all_prompts": list,
    "negative_prompt": str,
    "all_negative_prompts": list,
    "seed": int,
    "all_seeds": list,
    "subseed": int,
    "all_subseeds": list,
    "subseed_strength": int,
    "width": int,
    "height": int,
    "sampler_name": str,
    "cfg_scale": float,
    "steps": int,
    "batch_size": int,
    "restore_faces": bool,
    "face_restoration_model": type(None),
    "sd_model_name": str,
    "sd_model_hash": str,
    "sd_vae_name": type(None),
    "sd_vae_hash": type(None),
    "seed_resize_from_w": int,
    "seed_resize_from_h": int,
    "denoising_strength": type(None),
    "extra_generation_params": dict,
    "index_of_first_image": int,
    "infotexts": list,
    "styles": list,
    "job_timestamp": str,
    "clip_skip": int,
    "is_using_inpainting_conditioning": bool,
    "version": str,
}
"""Names and types in A1111's `Processed.js`, which sd-backend-client checks."""


def test_info_has_the_names_and_types_of_a1111(client):
    info = json.loads(post(client).json()["info"])
    assert {name: type(value) for name, value in info.items() if name != "safegen"} == INFO
    lists = ("face-restorers", "hypernetworks", "prompt-styles", "realesrgan-models", "script-info")
    assert [client.get(f"/sdapi/v1/{name}").json() for name in lists] == [[]] * 5


def test_settings_that_another_server_chose_are_not_invented(client, engine):
    proxy = replace(engine.stacks["safe"], size=(0, 0), sampler="", samplers=())
    engine.stacks = {"safe": proxy}
    body = {"prompt": "a partly castle", "batch_size": 2, "sampler_name": "DEIS", "steps": 9}
    data = client.post("/sdapi/v1/txt2img", json=body).json()
    assert engine.requests[-1].generation_config.scheduler == "DEIS"
    sizes = [Image.open(io.BytesIO(base64.b64decode(image))).size for image in data["images"]]
    assert sizes == [(64, 64), (64, 64)]
    info = json.loads(data["info"])
    assert (info["width"], info["height"], info["steps"], info["cfg_scale"]) == (64, 64, 9, None)
    assert "CFG scale" not in info["infotexts"][0]
    image = to_base64(Image.new("RGB", (16, 32)))
    assert (
        post(client, "img2img", init_images=[image], resize_mode=1, width=None).status_code == 200
    )


def test_open_webui_connects_and_generates(client):
    """Requests as in its `routers/images.py`: it sends all options back, with a model."""
    options = client.get("/sdapi/v1/options").json()
    titles = [model["title"] for model in client.get("/sdapi/v1/sd-models").json()]
    assert options["sd_model_checkpoint"] in titles
    assert client.post("/sdapi/v1/options", json=options).status_code == 200
    body = {"prompt": "a castle", "batch_size": 1, "width": 64, "height": 64, "steps": 20}
    data = client.post("/sdapi/v1/txt2img", json=body).json()
    assert Image.open(io.BytesIO(base64.b64decode(data["images"][0]))).size == (64, 64)


def test_sillytavern_connects_and_generates(client):
    """Requests as in its `endpoints/stable-diffusion.js` and its extension."""
    for route in ("upscalers", "latent-upscale-modes", "sd-vae", "samplers", "schedulers"):
        assert isinstance(client.get(f"/sdapi/v1/{route}").json(), list)
    model = client.get("/sdapi/v1/sd-models").json()[0]["title"]
    options = {"sd_model_checkpoint": model}
    assert client.post("/sdapi/v1/options", json=options).status_code == 200
    progress = client.get("/sdapi/v1/progress").json()
    assert (progress["progress"], progress["state"]["job_count"]) == (0, 0)
    body = {
        "sampler_name": "DDIM",
        "scheduler": "Automatic",
        "steps": 20,
        "cfg_scale": 7,
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "Latent",
        "hr_scale": 2,
        "hr_additional_modules": [],
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    assert len(post(client, **body).json()["images"]) == 1


def test_a_client_interrupts_and_sees_its_own_requests_only(engine):
    async def scenario():
        jobs, started = RunningRequests(), asyncio.Event()

        async def work():
            started.set()
            await asyncio.sleep(30)

        request = type("Request", (), {"id": "first"})
        running = asyncio.create_task(jobs.run(request, "alice", work()))
        await started.wait()
        assert jobs.of_client("bob") == []
        assert jobs.interrupt("bob") == 0
        await asyncio.sleep(0)
        assert not running.done()
        assert [job.request.id for job in jobs.of_client("alice")] == ["first"]
        assert jobs.interrupt("alice") == 1
        with pytest.raises(RequestError, match="interrupted"):
            await running
        assert jobs.of_client("alice") == []

    asyncio.run(asyncio.wait_for(scenario(), 10))


def solid(seed, size):
    """Return the image of a seed: one color that no other seed has, and not black."""
    return Image.new("RGB", size, (seed % 251 + 1, seed // 251 % 251 + 1, 99))


def image_with_action(request, seed, action):
    """Return an image with the trace of an action. The image is there, whatever the action."""
    config = request.generation_config
    image = solid(seed, (config.width or 64, config.height or 64))
    records = (GuardRecord("prompt-filter", calls=1), GuardRecord("judge-filter", action, calls=1))
    reason = "" if action in ("none", "edit") else f"judge-filter: {action}"
    return GeneratedImage(image, GuardTrace(action, reason, records))


TEXT = st.text(st.characters(categories=["L", "P", "Cc", "Cs"]), max_size=9)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=5,
)
FIELDS = (
    *NEUTRAL,
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "cfg_scale",
    "width",
    "height",
    "batch_size",
    "n_iter",
    "sampler_name",
    "sampler_index",
    "scheduler",
    "override_settings",
    "send_images",
    "init_images",
    "mask",
    "denoising_strength",
    "resize_mode",
    "guardrails",
    "filter_nsfw",
)


PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@PROPERTY
@given(
    actions=st.lists(st.sampled_from(ACTIONS) | st.just("none"), min_size=1, max_size=4),
    flagged=st.booleans(),
    seed=st.integers(0, 60_000),
    width=st.sampled_from([8, 16, None]),
    route=st.sampled_from(["txt2img", "img2img"]),
    switch=st.sampled_from(["moderation", "guardrails", "unknown_field"]),
    value=st.sampled_from([True, "low", None]),
)
def test_no_body_has_pixels_of_a_withheld_image(
    client, engine, records, actions, flagged, seed, width, route, switch, value
):
    made = {}

    async def generate(request):
        found = []
        for index, seed in enumerate(request.seeds):
            action, is_flagged = actions[index], flagged and index == 0
            made[seed] = action in ("none", "edit") and not is_flagged
            image = image_with_action(request, seed, action)
            found.append(GeneratedImage(image.image, image.trace, is_flagged or None))
        return found

    engine.generate = generate
    body = {"width": width, "height": 8, "seed": seed, "batch_size": len(actions), switch: value}
    if route == "img2img":
        body["init_images"] = [to_base64(Image.new("RGB", (8, 8), "blue"))]
    response = post(client, route, **body)
    answer = response.json()
    if not any(made.values()):
        is_fault = "withhold" in actions
        assert response.status_code == (503 if is_fault else 400)
        assert answer["detail"]
        assert not answer.keys() & {"images", "info", "parameters"}
        return
    assert response.status_code == 200, response.text
    info = json.loads(answer["info"])
    statuses = [image["status"] for image in info["safegen"]["images"]]
    assert [status == "released" for status in statuses] == [made[s] for s in info["all_seeds"]]
    for seed, status, text in zip(info["all_seeds"], statuses, answer["images"], strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
        assert image.size == (info["width"], info["height"]) == (width or 64, 8)
        expected = solid(seed, image.size) if status == "released" else Image.new("RGB", image.size)
        assert np.array_equal(np.asarray(image), np.asarray(expected))


@PROPERTY
@given(
    body=st.dictionaries(st.sampled_from(FIELDS) | TEXT, JSON, max_size=3),
    route=st.sampled_from(["txt2img", "img2img", "options"]),
)
def test_fields_of_any_value_are_used_or_refused_in_one_line(client, body, route):
    image = {"init_images": [to_base64(Image.new("RGB", (8, 8), "blue"))]}
    fields = {} if route == "options" else {"prompt": "a castle", **SMALL, **image}
    headers, data = {"content-type": "application/json"}, json.dumps(fields | body)
    response = client.post(f"/sdapi/v1/{route}", content=data, headers=headers)
    if response.status_code == 404:
        assert "no stack named" in response.json()["detail"]
    elif response.status_code != 200:
        error_of(response)
