"""Requests of every interface: defaults, limits, seeds, and switches that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from safegen.core.errors import ConfigError, UnknownNameError
from safegen.core.settings import MAX_SEED
from safegen.serve.config import RequestLimits, ServerConfig
from safegen.serve.messages import StackInfo, StartImage
from safegen.serve.operations.audit import AuditLog
from safegen.serve.requests import build_request
from safegen.serve.service import ImageService
from safegen.serve.switches import check_switches

STACKS = {
    "guarded": StackInfo("guarded", "mini", "0" * 64, size=(64, 64), samplers=("Euler a",)),
    "base": StackInfo("base", "mini", "1" * 64, size=(64, 64)),
}


@pytest.fixture
def service():
    config = ServerConfig(
        stacks=("mini",),
        num_inference_steps=7,
        guidance_scale=3.0,
        limits=RequestLimits(images=4, steps=20, side=128, prompt_chars=100),
    )
    return ImageService(SimpleNamespace(stacks=STACKS), config, AuditLog())


def build(service, **settings):
    return build_request(service, id="r", **{"prompt": "a castle"} | settings)


def test_settings_that_are_left_out_are_those_of_the_server(service):
    request = build(service)
    assert request.stack == "guarded"
    assert request.generation_config.num_inference_steps == 7
    assert request.generation_config.guidance_scale == 3.0
    assert request.generation_config.width is None
    assert len(request.seeds) == 1
    assert 0 <= request.seeds[0] < 2**31


def test_image_k_has_the_seed_plus_k(service):
    assert build(service, seed=5, n=3).seeds == (5, 6, 7)
    assert build(service, seed=0).seeds == (0,)  # 0 is a seed, not "random"
    assert build(service, seed=MAX_SEED).seeds == (MAX_SEED,)


def test_random_seeds_differ_between_requests(service):
    assert len({build(service).seeds for _ in range(20)}) > 1


def test_a_scheduler_is_found_in_any_case(service):
    assert build(service, scheduler="euler A").generation_config.scheduler == "Euler a"
    assert build(service, scheduler=" ").generation_config.scheduler is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n must be between 1 and 4, got 0"),
        ({"n": 10**12}, "n must be between 1 and 4"),
        ({"steps": 21}, "steps must be <= 20"),
        ({"steps": 0}, "num_inference_steps must be"),
        ({"guidance": 0.5}, "guidance_scale must be"),
        ({"guidance": float("nan")}, "guidance_scale must be"),
        ({"width": 136}, "width must be <= 128"),
        ({"height": 4}, "height must be"),
        ({"seed": -1}, "seed must be between 0"),
        ({"seed": MAX_SEED, "n": 2}, "seed must be between 0"),
        ({"prompt": "a" * 101}, "characters of prompt must be <= 100"),
        ({"prompt": "a \ud800"}, "prompt must be Unicode text"),
        ({"negative_prompt": "\udfff"}, "negative_prompt must be Unicode text"),
        ({"start": StartImage(b"", 0.1)}, "strength must be at least 1 / 7 steps"),
        ({"start": StartImage(b"", 0.0)}, "strength must be > 0"),
        ({"start": StartImage(b"", 1.5)}, "strength must be > 0"),
    ],
)
def test_a_setting_beyond_its_rule_is_refused(service, settings, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        build(service, **settings)


def test_an_unknown_stack_is_answered_with_the_nearest_name(service):
    with pytest.raises(UnknownNameError, match="Did you mean 'guarded'"):
        build(service, stack="gaurded")


@pytest.mark.parametrize(
    "fields",
    [
        {"guardrails": False},
        {"use_guardrails": "false"},
        {"extra_params": {"guardrails": 0}},
        {"extra_body": {"extra_params": {"Use-Guardrails": "OFF"}}},
        {"enable_safety_checker": False},
        {"safety_checker": "None"},
        {"safegen": {"guards": []}},
        {"disable_safety_checker": True},
        {"allow_nsfw": "yes"},
    ],
)
def test_a_switch_that_turns_a_guard_off_is_refused(fields):
    with pytest.raises(ConfigError, match="must not turn a guard off"):
        check_switches(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"guardrails": True},
        {"extra_params": {"guardrails": "on"}},
        {"disable_safety_checker": False},
        {"enable_safety_checker": None},
        {"prompt": "guardrails", "safe_n": 0},
    ],
)
def test_other_fields_pass(fields):
    check_switches(fields)
